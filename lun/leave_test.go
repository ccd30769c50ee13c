package lun

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
)

// askToLeave sends the request for a Logout within that many seconds.
func (c *fakeConn) askToLeave(seconds uint16) {
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpAsync)
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(iscsi.NoTag)
	h.SetAsync(iscsi.AsyncLogoutRequest, 0, 0, 0, seconds)
	c.numbers(&h, true)
	c.send(&h, nil)
}

// leaver is a target that asks for a Logout while it holds a read back.
type leaver struct {
	*fakeTarget
	first   *fakeConn // once held is closed
	read    iscsi.BHS
	held    chan struct{}
	logouts atomic.Int32
	late    atomic.Int32 // commands that came after the request
}

func newLeaver(t *testing.T, seconds uint16) *leaver {
	l := &leaver{fakeTarget: newFakeTarget(t), held: make(chan struct{})}
	l.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		if h.Opcode() == iscsi.OpLogout && c == l.first {
			l.logouts.Add(1)
			return false
		}
		if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != opRead16 || h.ExpectedLength() == 0 {
			return false
		}
		if l.first == nil {
			l.first, l.read = c, *h
			c.askToLeave(seconds)
			close(l.held)
			return true
		}
		if c == l.first {
			l.late.Add(1)
		}
		return false
	})
	return l
}

func TestLogoutThatTheTargetAsksForFollowsTheCommandsInFlight(t *testing.T) {
	l := newLeaver(t, 20)
	dev := l.open(Options{})
	var wg sync.WaitGroup
	read := func() {
		if err := dev.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	}
	wg.Go(read)
	<-l.held
	s := dev.(*remote).sessions[0]
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		leaving := s.c.leaving
		s.mu.Unlock()
		if leaving {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the request was not taken")
		}
	}
	wg.Go(read)
	for s.inFlight() != 2 {
		time.Sleep(time.Millisecond)
	}
	if n := l.logouts.Load(); n != 0 {
		t.Error("Logout was sent with a command in flight")
	}
	l.mu.Lock()
	l.first.in(&l.read, make([]byte, 512))
	l.mu.Unlock()
	wg.Wait()
	if l.logouts.Load() != 1 || l.late.Load() != 0 || l.loginCount() != 2 {
		t.Errorf("%d logouts, %d commands after the request, %d logins", l.logouts.Load(), l.late.Load(), l.loginCount())
	}
}

func TestLogoutThatTheTargetAsksForDoesNotWaitTooLong(t *testing.T) {
	l := newLeaver(t, 2)
	dev := l.open(Options{})
	start := time.Now()
	if err := dev.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 4*time.Second || l.logouts.Load() != 1 || l.loginCount() != 2 {
		t.Errorf("%d logouts, %d logins, after %v", l.logouts.Load(), l.loginCount(), took)
	}
}

func TestIdleSessionLogsOutWhenAsked(t *testing.T) {
	f := newFakeTarget(t)
	var logouts atomic.Int32
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() == iscsi.OpLogout {
			logouts.Add(1)
		}
		return false
	})
	dev := f.open(Options{})
	f.mu.Lock()
	f.conns[0].askToLeave(3)
	f.mu.Unlock()
	for deadline := time.Now().Add(5 * time.Second); f.loginCount() != 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no new login")
		}
	}
	if logouts.Load() != 1 {
		t.Errorf("%d logouts", logouts.Load())
	}
	roundTrip(t, dev, 512)
}
