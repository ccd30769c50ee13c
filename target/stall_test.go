package target

import (
	"context"
	"testing"
	"time"

	"lunshift/iscsi"
)

// stall makes an initiator that sends reads and takes no answers, until the target has
// no room to gather more.
func stall(t *testing.T, s *Server, i *initiator) {
	t.Helper()
	go func() {
		for range 120 {
			h := i.command(rw16(0x88, 0, 512), iscsi.FlagRead|iscsi.FlagFinal, 512*512)
			if _, err := i.nc.Write(h[:]); err != nil {
				return
			}
		}
	}()
	waitFor(t, "a writer without room", func() bool {
		for _, c := range s.sessions(iqn) {
			if c.nc.RemoteAddr().String() == i.nc.LocalAddr().String() {
				c.mu.Lock()
				defer c.mu.Unlock()
				return !c.w.Room(iscsi.MaxFrame)
			}
		}
		return false
	})
}

func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := deadline(); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// stalling is an initiator whose target sends many small PDUs, which fill a writer soon.
func stalling(t *testing.T, s *Server, addr string) *initiator {
	t.Helper()
	i := login(t, addr, loginOptions{isid: iscsi.ISID{1}, want: func(p *iscsi.Params) { p.MaxRecv = 8192 }})
	stall(t, s, i)
	return i
}

func TestInitiatorThatTakesNothingDoesNotKeepOthersFromBeingPinged(t *testing.T) {
	s, addr := begin(t, Config{NopInterval: 100 * time.Millisecond}, Unit{IQN: iqn, Device: newMemory(512, 4096)})
	login(t, addr, loginOptions{isid: iscsi.ISID{2}}) // silent from here on
	stalling(t, s, addr)
	login(t, addr, loginOptions{isid: iscsi.ISID{3}})
	waitFor(t, "the end of three silent sessions", func() bool { return len(s.Sessions(iqn)) == 0 })
}

func TestRetireKeepsToItsContextWhenAnInitiatorTakesNothing(t *testing.T) {
	s, addr := begin(t, Config{NopInterval: -1}, Unit{IQN: iqn, Device: newMemory(512, 4096)})
	stalling(t, s, addr)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Retire(ctx, iqn, 0) }()
	select {
	case err := <-done:
		if err != context.DeadlineExceeded {
			t.Errorf("Retire gave %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Retire did not return when its context had ended")
	}
	if n := len(s.Sessions(iqn)); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}
