package target

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"lunshift/iscsi"
)

// attach makes the server serve one end of a pipe, which holds nothing on the way, and
// gives the other.
func attach(s *Server) net.Conn {
	ours, theirs := net.Pipe()
	c := newConn(s, theirs, 1)
	c.from = netip.MustParseAddr("127.0.0.1")
	s.mu.Lock()
	s.conns[c] = struct{}{}
	s.pending.Go(c.serve)
	s.mu.Unlock()
	return ours
}

// A read that can be had at once waits for room in the writer, and a command that is
// answered meanwhile must not promise the read's place in the window to another.
func TestCommandWithinTheWindowIsAnswered(t *testing.T) {
	m := newMemory(512, 1024)
	s, _ := begin(t, Config{CommandsPerSession: 2, NopInterval: -1}, Unit{IQN: iqn, Device: quick{m}})
	i := over(t, attach(s))
	if status := i.tryLogin(loginOptions{}); status != 0 {
		t.Fatalf("login status %04Xh", status)
	}
	i.do(tur, nil, 0)
	first, second := make(chan struct{}), make(chan struct{})
	m.set(first, nil)
	a := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
	i.start(a, pattern(512, 1))
	<-m.entered
	m.set(second, nil)
	var burst []byte
	for range 4 { // fill the writer with answers
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpNopOut)
		h.SetImmediate()
		h.SetFlags(iscsi.FlagFinal)
		h.SetITT(9999)
		h.SetTTT(iscsi.NoTag)
		h.SetCmdSN(i.cmdSN)
		h.SetDataLength(64000)
		burst = append(append(burst, h[:]...), make([]byte, 64000)...)
	}
	r := i.command(rw16(0x88, 0, 16), iscsi.FlagRead|iscsi.FlagFinal, 8192)
	if _, err := i.nc.Write(append(burst, r[:]...)); err != nil {
		t.Fatal(err)
	}
	// The reader took all of it and is about to wait, or waits, for room.
	time.Sleep(50 * time.Millisecond)
	close(first)
	time.Sleep(50 * time.Millisecond)
	for p := i.recv(); p.Opcode() != iscsi.OpSCSIResponse; p = i.recv() {
	}
	want := map[uint32]bool{r.ITT(): true}
	for !iscsi.SNLess(i.maxSN, i.cmdSN) {
		h := i.command(rw16(0x88, 0, 1), iscsi.FlagRead, 512)
		i.start(h, nil)
		want[h.ITT()] = true
	}
	time.Sleep(50 * time.Millisecond)
	close(second)
	i.nc.SetDeadline(time.Now().Add(5 * time.Second))
	for len(want) > 0 {
		p, err := i.next()
		if err != nil {
			t.Fatalf("%d commands within the window are not answered: %v", len(want), err)
		}
		delete(want, p.ITT())
	}
}
