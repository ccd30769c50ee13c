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
		return true // dropped already
	})
}

func waitFor(t testing.TB, what string, is func() bool) {
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

func TestResetIsAnsweredWhileAnotherInitiatorTakesNothing(t *testing.T) {
	s, addr := begin(t, Config{NopInterval: -1}, Unit{IQN: iqn, Device: newMemory(512, 4096)})
	stalling(t, s, addr)
	j := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	for _, f := range []byte{iscsi.TMFLUNReset, iscsi.TMFClearTaskSet, iscsi.TMFTargetWarmReset} {
		ref := j.tmf(f, 0)
		if p := j.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.ITT() != ref || p.Response() != iscsi.TMFComplete {
			t.Fatalf("%s: %v, response %d", tmfName(f), p.Opcode(), p.Response())
		}
	}
}

func TestResetIsAnsweredWhileAnotherInitiatorSendsHalfAWrite(t *testing.T) {
	m := newMemory(512, 4096)
	s, addr := begin(t, Config{NopInterval: -1}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
	h := i.command(rw16(0x8a, 0, 16), iscsi.FlagWrite|iscsi.FlagFinal, 8192)
	h.SetDataLength(8192)
	data := pattern(8192, 3)
	if _, err := i.nc.Write(append(h[:], data[:1000]...)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the task", func() bool {
		for _, c := range s.sessions(iqn) {
			c.mu.Lock()
			defer c.mu.Unlock()
			if len(c.tasks) == 1 {
				return true
			}
		}
		return false
	})
	j := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	ref := j.tmf(iscsi.TMFLUNReset, 0)
	if p := j.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.ITT() != ref || p.Response() != iscsi.TMFComplete {
		t.Fatalf("%v, response %d", p.Opcode(), p.Response())
	}
	if _, err := i.nc.Write(data[1000:]); err != nil {
		t.Fatal(err)
	}
	// The session goes on: it learns of the reset, and the write was not done.
	if r := i.do(tur, nil, 0); !r.is(attnLUNReset) {
		t.Errorf("after the reset: %v", r)
	}
	if got := i.good(rw16(0x88, 0, 1), nil, 512); got.data[1] != 0 {
		t.Error("a write was done after the reset that aborted it was answered")
	}
}
