package target

import (
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/lun"
)

// with gives a command another task attribute.
func with(h *iscsi.BHS, attribute byte) *iscsi.BHS {
	h.SetFlags(h.Flags()&^iscsi.FlagAttrMask | attribute)
	return h
}

// begins waits until a command waits in the device.
func begins(t *testing.T, m *memory) {
	t.Helper()
	select {
	case <-m.entered:
	case <-time.After(30 * time.Second):
		t.Fatal("a command does not begin")
	}
}

// idle sends a ping and sees that no command began meanwhile: what the reader of a session
// took before is on its way by then.
func idle(t *testing.T, m *memory, i *initiator) {
	t.Helper()
	i.good([]byte{0x12, 0, 0, 0, 96, 0}, nil, 96)
	select {
	case <-m.entered:
		t.Fatal("a command began before its turn")
	case <-time.After(50 * time.Millisecond):
	}
}

func (i *initiator) read(lba uint64, attribute byte) {
	i.t.Helper()
	i.start(with(i.command(rw16(0x88, lba, 1), iscsi.FlagRead, 512), attribute), nil)
}

// ends takes the answers of n commands.
func (i *initiator) ends(n int) {
	i.t.Helper()
	for range n {
		if p := i.recv(); p.Opcode() != iscsi.OpDataIn || p.Flags()&iscsi.FlagStatus == 0 || p.Status() != 0 {
			i.t.Fatalf("%v with status %02Xh", p.Opcode(), p.Status())
		}
	}
}

func TestOrderedCommandKeepsItsPlaceInItsSession(t *testing.T) {
	for _, device := range []func(*memory) lun.Updater{func(m *memory) lun.Updater { return m }, func(m *memory) lun.Updater { return quick{m} }} {
		m := newMemory(512, 64)
		s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: device(m)})
		i := login(t, addr, loginOptions{})
		hold := make(chan struct{})
		m.set(hold, nil)
		i.read(1, iscsi.AttrSimple)
		i.read(2, iscsi.AttrSimple)
		begins(t, m)
		begins(t, m)
		for n, a := range []byte{iscsi.AttrOrdered, iscsi.AttrSimple, iscsi.AttrSimple, iscsi.AttrOrdered, iscsi.AttrOrdered, iscsi.AttrSimple} {
			i.read(uint64(3+n), a)
			idle(t, m, i)
		}
		next := func(end, begin int) {
			t.Helper()
			was := hold
			hold = make(chan struct{})
			m.set(hold, nil)
			close(was)
			i.ends(end)
			for range begin {
				begins(t, m)
			}
			idle(t, m, i)
		}
		next(2, 1) // 3 alone
		next(1, 2) // 4 and 5
		next(2, 1) // 6
		next(1, 1) // 7
		next(1, 1) // 8
		m.set(nil, nil)
		close(hold)
		i.ends(1)
		i.read(9, iscsi.AttrSimple)
		i.ends(1)
		for _, c := range s.sessions(iqn) {
			c.mu.Lock()
			if len(c.fences) > 0 {
				t.Errorf("%d units keep fences", len(c.fences))
			}
			c.mu.Unlock()
		}
	}
}

// late is a session of the host that sends no data unasked.
func late(t *testing.T, addr, name string) *initiator {
	t.Helper()
	return login(t, addr, loginOptions{name: name, isid: isidOf(name), want: func(p *iscsi.Params) { p.InitialR2T, p.ImmediateData = true, false }})
}

// announced sends an ORDERED WRITE of one block whose data does not come.
func (i *initiator) announced() *iscsi.BHS {
	i.t.Helper()
	h := with(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite|iscsi.FlagFinal, 512), iscsi.AttrOrdered)
	i.send(h, nil)
	if p := i.recv(); p.Opcode() != iscsi.OpR2T {
		i.t.Fatalf("%v", p.Opcode())
	}
	return h
}

func TestOrderedWriteWithoutItsDataHoldsUpNobodyElse(t *testing.T) {
	for _, device := range []lun.Updater{newMemory(512, 64), quick{newMemory(512, 64)}} {
		_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: device}, Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)})
		a, b := late(t, addr, nameA), host(t, addr, nameB)
		a.announced()
		for _, attribute := range []byte{iscsi.AttrSimple, iscsi.AttrOrdered} {
			b.read(0, attribute)
			b.ends(1)
		}
		a.lun = 1 // has a task set of its own
		a.do(tur, nil, 0)
		a.good(rw16(0x88, 0, 1), nil, 512)
	}
}

func TestOrderedWriteWithoutItsDataDoesNotKeepItsHostFromBeingFenced(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	a, b := late(t, addr, nameA), host(t, addr, nameB)
	a.pr(prRegister, 0, 0, 0xa, 0)
	a.pr(prReserve, typeWriteRegistrantsOnly, 0xa, 0, 0)
	b.pr(prRegister, 0, 0, 0xb, 0)
	a.announced()
	b.pr(prPreemptAbort, typeWriteRegistrantsOnly, 0xb, 0xa, 0)
	if m.bytes()[0] != 0 {
		t.Error("the write was done")
	}
}

func TestReservationCommandsWaitForNoOtherCommand(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := late(t, addr, nameA)
	h := i.announced()
	list := prList(0, 0xa, 0)
	for _, attribute := range []byte{iscsi.AttrSimple, iscsi.AttrOrdered, iscsi.AttrHeadQueue} {
		p := with(i.command(prOutCDB(prRegisterAnyhow, 0, len(list)), iscsi.FlagWrite|iscsi.FlagFinal, len(list)), attribute)
		i.start(p, list)
		if r := i.finish(p.ITT(), list); r.status != good {
			t.Fatalf("attribute %d: %v", attribute, r)
		}
	}
	i.good([]byte{0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0}, nil, 64)
	i.tmf(iscsi.TMFAbortTask, h.ITT())
	if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.Response() != iscsi.TMFComplete {
		t.Fatalf("%v, response %d", p.Opcode(), p.Response())
	}
	i.good(rw16(0x88, 0, 1), nil, 512)
}

// What an ORDERED command waits for is the device, not that its own initiator takes the
// answers of older commands.
func TestOrderedCommandBeginsWhenTheDeviceIsDoneWithOlderOnes(t *testing.T) {
	m := newMemory(512, 8192)
	s, addr := begin(t, Config{NopInterval: -1}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{want: func(p *iscsi.Params) { p.MaxRecv = 8192 }})
	for range 100 {
		i.send(i.command(rw16(0x88, 0, 512), iscsi.FlagRead|iscsi.FlagFinal, 512*512), nil)
	}
	waitFor(t, "a writer without room", func() bool {
		c := s.sessions(iqn)[0]
		c.mu.Lock()
		defer c.mu.Unlock()
		return !c.w.Room(iscsi.MaxFrame)
	})
	h := with(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite|iscsi.FlagFinal, 512), iscsi.AttrOrdered)
	h.SetDataLength(512)
	i.send(h, pattern(512, 1))
	waitFor(t, "the ORDERED WRITE", func() bool { return m.bytes()[1] != 0 })
}

// Newer commands that wait for an ORDERED one have none of the memory that it waits for.
func TestOrderedCommandThatWaitsForMemoryBegins(t *testing.T) {
	m := newMemory(512, 65536)
	s, addr := begin(t, Config{BytesInFlight: 2 * maxTransfer}, Unit{IQN: iqn, Device: m})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	hold := make(chan struct{})
	m.set(hold, nil)
	large := func(i *initiator, mebibytes int, attribute byte) {
		i.send(with(i.command(rw16(0x88, 0, uint32(mebibytes<<11)), iscsi.FlagRead|iscsi.FlagFinal, mebibytes<<20), attribute), nil)
	}
	large(a, 32, iscsi.AttrSimple)
	begins(t, m)
	large(b, 8, iscsi.AttrSimple)
	begins(t, m)
	for _, i := range []*initiator{a, b} {
		large(i, 16, iscsi.AttrOrdered) // does not fit
		for range 8 {
			large(i, 1, iscsi.AttrSimple) // would fit
		}
	}
	waitFor(t, "a command that waits for memory", s.bytes.some.Load)
	m.set(nil, nil)
	close(hold)
	for _, i := range []*initiator{a, b} {
		for n := 0; n < 10; {
			if p := i.recv(); p.Flags()&iscsi.FlagStatus != 0 {
				n++
			}
		}
	}
}

func TestHeadOfQueueGoesFirst(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	first, second := make(chan struct{}), make(chan struct{})
	m.set(first, nil)
	i.read(1, iscsi.AttrSimple)
	begins(t, m)
	i.read(2, iscsi.AttrOrdered)
	idle(t, m, i)
	m.set(second, nil)
	i.read(3, iscsi.AttrHeadQueue)
	begins(t, m) // ahead of the ORDERED command, which waits for the first
	i.read(4, iscsi.AttrSimple)
	idle(t, m, i)
	m.set(nil, nil)
	close(second)
	i.ends(1)
	idle(t, m, i)
	close(first)
	i.ends(3)
}

func TestAbortOfAnOrderedCommandLetsOthersGo(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	hold := make(chan struct{})
	m.set(hold, nil)
	i.read(1, iscsi.AttrSimple)
	begins(t, m)
	i.read(2, iscsi.AttrOrdered)
	ordered := i.itt
	i.read(3, iscsi.AttrSimple)
	idle(t, m, i)
	tag := i.tmf(iscsi.TMFAbortTask, ordered)
	if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.ITT() != tag {
		t.Fatalf("%v", p.Opcode())
	}
	begins(t, m) // the third, beside the first
	m.set(nil, nil)
	close(hold)
	i.ends(2)
}

func TestReservedTaskAttributesAreRefused(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	for attribute := byte(0); attribute < 8; attribute++ {
		h := with(i.command(rw16(0x88, 1, 1), iscsi.FlagRead, 512), attribute)
		i.start(h, nil)
		switch r := i.finish(h.ITT(), nil); {
		case attribute <= iscsi.AttrHeadQueue && r.status != 0, attribute > iscsi.AttrHeadQueue && !r.is(senseInvalidIU): // ACA among them
			t.Errorf("attribute %d: %v", attribute, r)
		}
	}
	if v := i.good([]byte{0x12, 1, 0x86, 0, 64, 0}, nil, 64).data; len(v) != 64 || v[5] != 0x07 {
		t.Errorf("page 86h %x", v)
	}
}
