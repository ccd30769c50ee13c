package target

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"testing"
	"time"

	"lunshift/iscsi"
)

// connOf is the target's side of an initiator's session.
func connOf(t *testing.T, s *Server, i *initiator) *conn {
	t.Helper()
	for _, c := range s.sessions("") {
		if c.nc.RemoteAddr().String() == i.nc.LocalAddr().String() {
			return c
		}
	}
	t.Fatal("no such session")
	return nil
}

// damaged is the Data-Out PDU that answers an R2T for all of a command's data, with a data
// digest that does not match.
func damaged(h *iscsi.BHS, ttt uint32, data []byte) []byte {
	var d iscsi.BHS
	d.SetOpcode(iscsi.OpDataOut)
	d.SetFlags(iscsi.FlagFinal)
	d.SetITT(h.ITT())
	d.SetTTT(ttt)
	d.SetDataLength(len(data))
	b := append(d[:], data...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))^1)
}

// dataDigest negotiates a digest of data only, and PDUs that fill a writer soon.
func dataDigest(p *iscsi.Params) { p.MaxRecv, p.HeaderDigest, p.DataDigest = 8192, false, true }

// damagedWithoutRoom sends damaged data of a command, whose Reject finds no room as the
// initiator takes nothing; it returns when the target has read it.
func damagedWithoutRoom(t *testing.T, s *Server, i *initiator) *conn {
	t.Helper()
	c := connOf(t, s, i)
	h := announce(i, 128, 64<<10)
	p := i.recv()
	if p.Opcode() != iscsi.OpR2T {
		t.Fatal(p.Opcode())
	}
	stall(t, s, i)
	go i.nc.Write(damaged(h, p.TTT(), pattern(64<<10, 9)))
	waitFor(t, "data that was read", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		x := c.tasks[h.ITT()]
		return x == nil || x.received == 64<<10
	})
	return c
}

// writesLand does writes, all in flight at once, and sees that each is answered once and
// is on the device.
func writesLand(t *testing.T, m *memory, i *initiator) {
	t.Helper()
	const n = 120
	hold := make(chan struct{})
	m.set(hold, nil)
	want := map[uint32]int{}
	for k := range n {
		h := i.command(rw16(0x8a, uint64(1000+k*8), 8), iscsi.FlagWrite, 4096)
		i.start(h, pattern(4096, byte(k+1)))
		want[h.ITT()] = k
	}
	for range n {
		<-m.entered
	}
	m.set(nil, nil)
	close(hold)
	for range n {
		p := i.recv()
		if _, ok := want[p.ITT()]; p.Opcode() != iscsi.OpSCSIResponse || p.Status() != 0 || !ok {
			t.Fatalf("%v for task %d, status %02Xh", p.Opcode(), p.ITT(), p.Status())
		}
		delete(want, p.ITT())
	}
	there := m.bytes()
	for k := range n {
		if !bytes.Equal(there[(1000+k*8)*512:][:4096], pattern(4096, byte(k+1))) {
			t.Errorf("write %d was answered GOOD and is not there", k)
		}
	}
}

func TestResetWhileDamagedDataIsRejectedEndsTheTaskOnce(t *testing.T) {
	m := newMemory(512, 4096)
	s, addr := begin(t, Config{NopInterval: -1}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{isid: iscsi.ISID{1}, want: dataDigest})
	j := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	c := damagedWithoutRoom(t, s, i)
	ref := j.tmf(iscsi.TMFLUNReset, 0)
	if p := j.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.ITT() != ref || p.Response() != iscsi.TMFComplete {
		t.Fatalf("%v, response %d", p.Opcode(), p.Response())
	}
	if r := j.do(tur, nil, 0); !r.is(attnLUNReset) {
		t.Errorf("after the reset: %v", r)
	}
	go io.Copy(io.Discard, i.nc) // from here on it takes everything
	writesLand(t, m, j)
	waitFor(t, "the end of all tasks", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.tasks) == 0 && c.inFlight == 0 && c.immediate == 0
	})
	allBack(t, s)
}

func TestSessionDroppedWhileDamagedDataIsRejectedLeavesNoTaskBehind(t *testing.T) {
	m := newMemory(512, 4096)
	s, addr := begin(t, Config{NopInterval: -1}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{isid: iscsi.ISID{1}, want: dataDigest})
	c := damagedWithoutRoom(t, s, i)
	c.close(errors.New("takes nothing"))
	<-c.done
	c.mu.Lock()
	if len(c.tasks) != 0 || c.inFlight != 0 {
		t.Errorf("%d tasks are left, %d in the window", len(c.tasks), int32(c.inFlight))
	}
	c.mu.Unlock()
	writesLand(t, m, login(t, addr, loginOptions{isid: iscsi.ISID{2}}))
}

func TestNothingOfAnAbortedTaskFollowsTheAnswerOfItsAbort(t *testing.T) {
	m := newMemory(512, 1<<16)
	s, addr := begin(t, Config{NopInterval: -1}, Unit{IQN: iqn, Device: m})
	for _, f := range []byte{iscsi.TMFAbortTaskSet, iscsi.TMFAbortTask, iscsi.TMFLUNReset} {
		i := login(t, addr, loginOptions{isid: iscsi.ISID{f}, want: func(p *iscsi.Params) { p.MaxRecv = 8192 }})
		c := connOf(t, s, i)
		h := i.command(rw16(0x88, 0, 1<<16), iscsi.FlagRead|iscsi.FlagFinal, 32<<20)
		i.send(h, nil)
		waitFor(t, "an answer half of which is queued", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			x := c.tasks[h.ITT()]
			return x != nil && x.dataSN > 0
		})
		ref := i.tmf(f, h.ITT())
		waitFor(t, "the abort", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.tasks[h.ITT()] == nil
		})
		before := 0
		for {
			p := i.recv()
			if p.Opcode() == iscsi.OpTaskMgmtResp && p.ITT() == ref {
				if p.Response() != iscsi.TMFComplete {
					t.Errorf("%s: response %d", tmfName(f), p.Response())
				}
				break
			}
			if p.Opcode() != iscsi.OpDataIn || p.Flags()&iscsi.FlagStatus != 0 {
				t.Fatalf("%s: %v before its answer", tmfName(f), p.Opcode())
			}
			before += len(p.data)
		}
		if before == 32<<20 {
			t.Errorf("%s: all of the data was sent", tmfName(f))
		}
		// The next thing answered is the next command.
		r := i.do(tur, nil, 0)
		if f == iscsi.TMFLUNReset && !r.is(attnLUNReset) || f != iscsi.TMFLUNReset && r.status != 0 {
			t.Errorf("after %s: %v", tmfName(f), r)
		}
		i.nc.Close()
		<-c.done
	}
	allBack(t, s)
}

func TestDamagedDataOfAnEndedTaskIsRejectedAndTheSessionGoesOn(t *testing.T) {
	m := newMemory(512, 4096)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{want: dataDigest})
	h := announce(i, 128, 64<<10)
	p := i.recv()
	ref := i.tmf(iscsi.TMFAbortTask, h.ITT())
	if p := i.recv(); p.ITT() != ref || p.Response() != iscsi.TMFComplete {
		t.Fatalf("%v, response %d", p.Opcode(), p.Response())
	}
	if _, err := i.nc.Write(damaged(h, p.TTT(), pattern(64<<10, 9))); err != nil {
		t.Fatal(err)
	}
	if p := i.recv(); p.Opcode() != iscsi.OpReject || p.Response() != iscsi.RejectDataDigest {
		t.Fatalf("%v, reason %02Xh", p.Opcode(), p.Response())
	}
	if r := i.do(tur, nil, 0); r.status != 0 {
		t.Errorf("the next command: %v", r)
	}
}

func TestInitiatorThatTakesSlowlyIsNotDropped(t *testing.T) {
	s, addr := begin(t, Config{NopInterval: 500 * time.Millisecond}, Unit{IQN: iqn, Device: newMemory(512, 1<<16)})
	i := login(t, addr, loginOptions{})
	i.send(i.command(rw16(0x88, 0, 1<<16), iscsi.FlagRead|iscsi.FlagFinal, 32<<20), nil)
	// It answers no ping: the answer to its command is in front of them.
	buf := make([]byte, 64<<10)
	total := 0
	for begun := time.Now(); total < 32<<20 && time.Since(begun) < 4*time.Second; time.Sleep(8 * time.Millisecond) {
		n, err := i.nc.Read(buf)
		total += n
		if err != nil {
			t.Fatalf("dropped after %d KiB: %v", total>>10, err)
		}
	}
	if len(s.Sessions(iqn)) != 1 {
		t.Error("the session ended")
	}
}

func TestInitiatorThatTalksAndTakesNothingIsDropped(t *testing.T) {
	s, addr := begin(t, Config{NopInterval: 400 * time.Millisecond}, Unit{IQN: iqn, Device: newMemory(512, 4096)})
	i := stalling(t, s, addr)
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpNopOut)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(iscsi.NoTag)
	h.SetTTT(iscsi.NoTag)
	h.SetCmdSN(i.cmdSN)
	waitFor(t, "the end of the session", func() bool {
		i.nc.Write(h[:])
		time.Sleep(50 * time.Millisecond)
		return len(s.Sessions(iqn)) == 0
	})
}

func TestSessionsBeyondTheirShareDisturbNoOther(t *testing.T) {
	s, addr := begin(t, Config{NopInterval: -1, CommandsPerSession: 200}, Unit{IQN: iqn, Device: newMemory(512, 1<<17)})
	for k := range 2 {
		i := login(t, addr, loginOptions{isid: iscsi.ISID{1, byte(k)}})
		for range 2 {
			i.send(i.command(rw16(0x8a, 0, 1<<16), iscsi.FlagWrite|iscsi.FlagFinal, 32<<20), nil)
		}
		for range 128 {
			i.send(i.command(rw16(0x8a, 0, 1<<16), iscsi.FlagWrite|iscsi.FlagFinal, 32<<20), make([]byte, 256<<10))
		}
	}
	waitFor(t, "early data that fills its part", func() bool { return s.bytes.early.Load() < 4096 })
	j := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	if r := j.do(rw16(0x8a, 0, 8), make([]byte, 4096), 0); r.status != 0 {
		t.Errorf("a write of an idle session: %v", r)
	}
}

func TestLostDataOfACommandThatWaitsForMemoryFailsIt(t *testing.T) {
	m := newMemory(512, 4096)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{want: func(p *iscsi.Params) { p.ImmediateData = false }})
	all, whole := &share{a: s.bytes}, s.cfg.BytesInFlight*3/4
	s.bytes.each = whole
	if !all.acquire(whole, &claim{}, true) {
		t.Fatal("memory is in use")
	}
	h := i.command(rw16(0x8a, 0, 32), iscsi.FlagWrite, 16<<10)
	i.send(h, nil)
	for sn := range uint32(2) { // the second without the first, and the last
		var d iscsi.BHS
		d.SetOpcode(iscsi.OpDataOut)
		d.SetITT(h.ITT())
		d.SetTTT(iscsi.NoTag)
		d.SetDataSN(sn + 1)
		d.SetBufferOffset(sn * 8192)
		if sn == 1 {
			d.SetFlags(iscsi.FlagFinal)
		}
		i.send(&d, make([]byte, 8192))
	}
	if r := i.finish(h.ITT(), nil); !r.is(senseDataLost) {
		t.Errorf("%v", r)
	}
	all.release(whole)
	i.good(rw16(0x8a, 0, 32), pattern(16<<10, 1), 0)
	allBack(t, s)
}
