package lun

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
)

// endable is a context that tells its end by a call, as a target's tasks do.
type endable struct {
	context.Context
	mu    sync.Mutex
	err   error
	ended Ended
	done  chan struct{}
}

func newEndable() *endable {
	return &endable{Context: context.Background(), done: make(chan struct{})}
}

func (e *endable) Done() <-chan struct{} { return e.done }

func (e *endable) Err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

func (e *endable) OnEnd(n Ended) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n != nil && e.err != nil {
		return false
	}
	e.ended = n
	return true
}

func (e *endable) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.err = context.Canceled
	close(e.done)
	if e.ended != nil {
		e.ended.Ended(e.err)
	}
}

// straight bends nothing.
func straight(*fakeConn, *iscsi.BHS, []byte) bool { return false }

// lonely waits until callers receive: the receiver goroutine has let go of the role.
func lonely(t *testing.T, dev Device) *session {
	t.Helper()
	s := dev.(*remote).sessions[0]
	p := make([]byte, 512)
	for deadline := time.Now().Add(10 * time.Second); ; {
		if err := dev.ReadAt(context.Background(), p, 0); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		free := s.c != nil && !s.c.receiving && !s.c.summoned
		s.mu.Unlock()
		if free {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatal("the receiver goroutine keeps the role though commands come one at a time")
		}
	}
}

func TestLoneCommandIsAbortedWhenItsContextEnds(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	held := make(chan struct{}, 8)
	lonely(t, dev)
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opRead16 {
			held <- struct{}{}
			return true
		}
		return false
	})
	for range 3 {
		ctx := newEndable()
		failed := make(chan error, 1)
		go func() { failed <- dev.ReadAt(ctx, make([]byte, 512), 0) }()
		<-held
		began := time.Now()
		ctx.end()
		if err := <-failed; !errors.Is(err, context.Canceled) {
			t.Fatalf("want the context's error, got %v", err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("the abort took %v", took)
		}
	}
	f.bend(straight)
	lonely(t, dev)
	ctx := newEndable()
	ctx.end()
	if err := dev.ReadAt(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that had ended: %v", err)
	}
}

// TestOthersAreServedWhileALoneCommandIsHeld: the caller that receives takes what is
// others', and when it goes somebody else receives.
func TestOthersAreServedWhileALoneCommandIsHeld(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	for range 5 {
		s := lonely(t, dev)
		// The command that is held is told from the others by its address.
		held := make(chan struct{}, 1)
		var release atomic.Bool
		var waits *iscsi.BHS // the target's connection's
		f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
			if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opRead16 && h.CDB()[9] == 7 {
				req := *h
				waits = &req
				held <- struct{}{}
				return true
			}
			if waits != nil && release.Load() {
				c.execute(waits, nil)
				waits = nil
			}
			return false
		})
		first := make(chan error, 1)
		go func() { first <- dev.ReadAt(newEndable(), make([]byte, 512), 7) }()
		<-held
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			receiving := s.c.receiving
			s.mu.Unlock()
			if receiving {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("nobody receives while a command is in flight")
			}
		}
		var others sync.WaitGroup
		for n := range 4 {
			others.Go(func() {
				for range 20 {
					if err := dev.ReadAt(t.Context(), make([]byte, 512), LBA(n)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		others.Wait()
		release.Store(true)
		if err := dev.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
		if err := <-first; err != nil {
			t.Error(err)
		}
		f.bend(straight)
		for range lonelyAfter {
			if err := dev.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestLoneCommandOutlivesItsConnection: the caller that received sees the loss, and the
// command is sent again on the next connection.
func TestLoneCommandOutlivesItsConnection(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	for range 3 {
		lonely(t, dev)
		held := make(chan struct{}, 1)
		var once sync.Once
		f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) (taken bool) {
			if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opRead16 {
				once.Do(func() {
					taken = true
					held <- struct{}{}
				})
			}
			return taken
		})
		got := make(chan error, 1)
		go func() { got <- dev.ReadAt(newEndable(), make([]byte, 512), 1) }()
		<-held
		f.drop()
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		f.bend(straight)
	}
}
