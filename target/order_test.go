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

func TestOrderedCommandKeepsItsPlaceAmongSessions(t *testing.T) {
	for _, device := range []func(*memory) lun.Updater{func(m *memory) lun.Updater { return m }, func(m *memory) lun.Updater { return quick{m} }} {
		m := newMemory(512, 64)
		_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: device(m)})
		a := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
		b := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
		hold := make(chan struct{})
		m.set(hold, nil)
		a.read(1, iscsi.AttrSimple)
		b.read(2, iscsi.AttrSimple)
		begins(t, m)
		begins(t, m)
		a.read(3, iscsi.AttrOrdered)
		idle(t, m, a)
		b.read(4, iscsi.AttrSimple)
		idle(t, m, b)
		a.read(5, iscsi.AttrOrdered)
		idle(t, m, a)
		b.read(6, iscsi.AttrSimple)
		idle(t, m, b)

		next := func() {
			t.Helper()
			was := hold
			hold = make(chan struct{})
			m.set(hold, nil)
			close(was)
		}
		next() // the two that are older end
		a.ends(1)
		b.ends(1)
		begins(t, m) // 3 alone
		idle(t, m, b)
		next()
		a.ends(1)
		begins(t, m) // 4, which is older than 5
		idle(t, m, b)
		next()
		b.ends(1)
		begins(t, m) // 5 alone
		idle(t, m, b)
		next()
		a.ends(1)
		begins(t, m)
		m.set(nil, nil)
		close(hold)
		b.ends(1)
		a.read(7, iscsi.AttrSimple)
		a.ends(1)
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
