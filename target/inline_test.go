package target

import (
	"testing"
	"time"

	"lunshift/iscsi"
)

// TestCommandOnTheReaderStallsNothing holds commands that run on the reader, again and
// again, and has each kind of PDU arrive meanwhile.
func TestCommandOnTheReaderStallsNothing(t *testing.T) {
	m := newMemory(512, 1024)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	inline := func() bool {
		for _, c := range s.sessions(iqn) {
			c.mu.Lock()
			is := c.inline
			c.mu.Unlock()
			if is {
				return true
			}
		}
		return false
	}
	for round := range 6 {
		// The next command may arrive before the reader is done with the one before.
		waitFor(t, "commands that come one at a time", func() bool {
			i.good(rw16(0x88, 0, 1), nil, 512)
			for inline() {
				time.Sleep(time.Millisecond)
			}
			for _, c := range s.sessions(iqn) {
				c.mu.Lock()
				defer c.mu.Unlock()
				return c.lonely >= 0
			}
			return false
		})
		hold := make(chan struct{})
		m.set(hold, nil)
		h := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
		i.start(h, pattern(512, byte(round)))
		<-m.entered
		if !inline() {
			t.Fatalf("round %d: a lone command does not run on the reader", round)
		}
		switch round % 3 {
		case 0:
			i.ping()
			if inline() {
				t.Error("the command is still on the reader")
			}
			i.good([]byte{0x12, 0, 0, 0, 36, 0}, nil, 36)
		case 1:
			began := time.Now()
			ref := i.tmf(iscsi.TMFAbortTask, h.ITT())
			if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.ITT() != ref || p.Response() != iscsi.TMFComplete {
				t.Fatalf("abort: %v, response %d", p.Opcode(), p.Response())
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("the abort took %v", took)
			}
			m.set(nil, nil)
			continue
		case 2:
			h2 := i.command(rw16(0x8a, 8, 1), iscsi.FlagWrite, 512)
			i.start(h2, pattern(512, 9))
			<-m.entered // both are with the device
			m.set(nil, nil)
			close(hold)
			for range 2 {
				if p := i.recv(); p.Opcode() != iscsi.OpSCSIResponse || p.Status() != iscsi.StatusGood {
					t.Fatalf("got %v", p.Opcode())
				}
			}
			continue
		}
		m.set(nil, nil)
		close(hold)
		if r := i.finish(h.ITT(), nil); r.status != 0 {
			t.Fatalf("the command in flight: %v", r)
		}
	}
	// The loss of the connection ends a command on the reader.
	for range lonelyAfter + 1 {
		i.good(rw16(0x88, 0, 1), nil, 512)
	}
	m.set(make(chan struct{}), nil)
	i.start(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512), pattern(512, 1))
	<-m.entered
	i.nc.Close()
	for limit := time.Now().Add(5 * time.Second); len(s.sessions(iqn)) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("the session outlives its connection")
		}
	}
}
