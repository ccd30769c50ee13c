package lun

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
)

// A write that was given up ends when the target answered the request to abort it, not by the answer to that of a task
// before it, which ended by itself: it may take effect until then. Caught: a tag of the slot for both.
func TestAGivenUpWriteEndsByItsOwnAbort(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	var mu sync.Mutex
	var writes, aborts []iscsi.BHS
	wrote, aborted := make(chan struct{}, 2), make(chan struct{}, 2)
	answer := func(c *fakeConn, abort *iscsi.BHS) {
		c.reply(iscsi.OpTaskMgmtResp, abort, iscsi.FlagFinal, iscsi.TMFNoTask, 0, nil)
	}
	var of *fakeConn
	f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opWrite16:
			of = c
			writes = append(writes, *h)
			wrote <- struct{}{}
			return true
		case h.Opcode() == iscsi.OpTaskMgmt:
			if aborts = append(aborts, *h); len(aborts) == 1 {
				c.good(&writes[0]) // its own answer comes first
			} else {
				answer(c, &aborts[0])
			}
			aborted <- struct{}{}
			return true
		}
		return false
	})
	write := func(at LBA) chan error {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- dev.WriteAt(ctx, bytes.Repeat([]byte{'Y'}, 512), at) }()
		<-wrote
		cancel()
		<-aborted
		return done
	}
	if err := <-write(100); err != nil {
		t.Fatalf("the one that was done: %v", err)
	}
	second := write(7)
	if err := dev.ReadAt(t.Context(), make([]byte, 512), 9); err != nil { // comes after the answer
		t.Fatal(err)
	}
	if n := dev.(*remote).sessions[0].inFlight(); n != 1 {
		t.Fatalf("it ended by the abort of another: %d in flight, %v", n, <-second)
	}
	mu.Lock()
	answer(of, &aborts[1])
	mu.Unlock()
	select {
	case err := <-second:
		if err == nil {
			t.Error("it was not done, and is GOOD")
		}
	case <-time.After(30 * time.Second):
		t.Error("it does not end")
	}
}

// A deferred error is of a write before; the command that is told of it was not done (SPC-4 4.5.5). Caught: RECOVERED ERROR
// taken for done; an error of the medium for that of the read; the loss not counted.
func TestADeferredErrorIsNotTheCommandsOwn(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	var key atomic.Int32
	f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
		if h.Opcode() != iscsi.OpSCSICommand {
			return false
		}
		k := byte(key.Swap(0))
		if k == 0 {
			return false
		}
		sense := make([]byte, 2+18)
		sense[1], sense[2], sense[4], sense[9], sense[14] = 18, 0x71, k, 10, 0x0c
		c.reply(iscsi.OpSCSIResponse, h, iscsi.FlagFinal, 0, statusCheckCondition, sense)
		return true
	})
	p := bytes.Repeat([]byte{'N'}, 512)
	for _, do := range []func() error{
		func() error { return dev.WriteAt(t.Context(), p, 3) },
		func() error { return dev.Flush(t.Context()) },
		func() error { return dev.ReadAt(t.Context(), p, 9) },
	} {
		for _, k := range []byte{senseRecovered, 3} { // MEDIUM ERROR
			resets := dev.(Resetter).Resets()
			key.Store(int32(k))
			if err := do(); err != nil {
				t.Errorf("key %d: %v", k, err)
			}
			if n := dev.(Resetter).Resets() - resets; n != 1 || key.Load() != 0 {
				t.Errorf("key %d: %d losses", k, n)
			}
			f.mu.Lock()
			if f.data[3*512] != 'N' {
				t.Errorf("key %d: the write was not done", k)
			}
			f.mu.Unlock()
		}
	}
}

// A loss of power that a target tells while a session of it comes back counts for what went by another one meanwhile.
// Caught: the loss of the connection counted alone.
func TestALossOfPowerBesideASessionThatComesBackCounts(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{Sessions: 2})
	f.mu.Lock()
	a, b := f.conns[0], f.conns[1]
	f.mu.Unlock()
	f.deaf.Store(&a.isid)
	a.nc.Close()
	r := dev.(*remote)
	eventual := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	eventual("the loss is not noticed", func() bool { return r.sessions[0].reachable() != nil && r.Resets() > 0 })
	resets := r.Resets()
	r.turn.Store(0) // the other one is next
	if err := dev.WriteAt(t.Context(), bytes.Repeat([]byte{'W'}, 512), 5); err != nil {
		t.Fatal(err)
	}
	var told atomic.Bool
	f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
		if c.isid == b.isid {
			return true // it is not heard of any more
		}
		if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] != opInquiry && told.CompareAndSwap(false, true) {
			c.check(h, senseUnitAttention, 0x29, 0x01)
			return true
		}
		return false
	})
	f.deaf.Store(nil)
	eventual("it does not come back", func() bool { return r.sessions[0].reachable() == nil })
	if !told.Load() || r.Resets() == resets {
		t.Errorf("told %v, %d losses", told.Load(), r.Resets()-resets)
	}
}
