package target

import (
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"testing"

	"lunshift/iscsi"
	"lunshift/lun"
)

func TestAttentionsAreQueuedInOrderOfPrecedenceAndOnce(t *testing.T) {
	power, target, unit, loss := attnPowerOn, attnTargetReset, attnLUNReset, attnNexusLoss
	for _, c := range []struct{ established, want []sense }{
		{[]sense{attnLUNsChanged, attnCleared, attnLUNsChanged}, []sense{attnLUNsChanged, attnCleared}},
		{[]sense{power, unit, target, loss, power}, []sense{power}},
		{[]sense{loss, unit}, []sense{unit}},
		{[]sense{unit, target}, []sense{target}},
		{[]sense{target, unit, loss}, []sense{target}},
		{[]sense{attnCleared, attnLUNsChanged, loss}, []sense{loss, attnLUNsChanged}},
		{[]sense{attnCleared, attnLUNsChanged, unit}, []sense{unit}},
		{[]sense{attnRegistrationsPreempted, attnReservationsReleased, power}, []sense{power, attnRegistrationsPreempted, attnReservationsReleased}},
		{[]sense{unit, attnReservationsPreempted, target}, []sense{target, attnReservationsPreempted}},
	} {
		var list []sense
		for _, s := range c.established {
			list = establish(list, s)
		}
		if !slices.Equal(list, c.want) {
			t.Errorf("%v became %v, want %v", c.established, list, c.want)
		}
	}
}

// attentions takes all that await the initiator off.
func (i *initiator) attentions() (all []sense) {
	i.t.Helper()
	for {
		r := i.do(tur, nil, 0)
		if r.status != iscsi.StatusCheckCondition || r.key != keyUnitAttention {
			return all
		}
		all = append(all, sense{r.key, r.asc, r.ascq})
		if len(all) > 10 {
			i.t.Fatalf("attentions without end: %v", all)
		}
	}
}

// enter logs in and leaves the attentions alone.
func enter(t *testing.T, addr, name string) *initiator {
	t.Helper()
	i, status := tryLogin(t, addr, loginOptions{name: name, isid: isidOf(name)})
	if status != 0 {
		t.Fatalf("login status %04Xh", status)
	}
	return i
}

func TestReturningNexusLearnsWhatHappenedToItsRegistration(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a := enter(t, addr, nameA)
	if got := a.attentions(); !slices.Equal(got, []sense{attnPowerOn}) {
		t.Errorf("a new nexus finds %v", got)
	}
	b := host(t, addr, nameB)
	leave := func() {
		t.Helper()
		a.nc.Close()
		waitFor(t, "the session's end", func() bool { return len(s.Sessions(iqn)) == 1 })
	}
	leave()
	a = enter(t, addr, nameA)
	if got := a.attentions(); !slices.Equal(got, []sense{attnNexusLoss}) {
		t.Errorf("a nexus that comes back finds %v", got)
	}
	b.pr(prRegister, 0, 0, 0xb, 0)
	for _, c := range []struct {
		kind byte
		do   func()
		want sense
	}{
		{typeWriteRegistrantsOnly, func() { b.pr(prRelease, typeWriteRegistrantsOnly, 0xb, 0, 0) }, attnReservationsReleased},
		{typeWriteExclusive, func() { b.pr(prPreempt, 0, 0xb, 0xa, 0) }, attnRegistrationsPreempted},
		{typeWriteExclusive, func() { b.pr(prClear, 0, 0xb, 0, 0); b.pr(prRegister, 0, 0, 0xb, 0) }, attnReservationsPreempted},
	} {
		for _, connected := range []bool{true, false} {
			a.pr(prRegisterAnyhow, 0, 0, 0xa, 0)
			if _, kind := b.reservation(); kind != c.kind {
				if kind != 0 {
					b.pr(prRelease, kind, 0xb, 0, 0)
				}
				b.pr(prReserve, c.kind, 0xb, 0, 0)
			}
			want := []sense{c.want}
			if !connected {
				leave()
				want = []sense{attnNexusLoss, c.want}
			}
			c.do()
			if connected {
				// Established and not reported: it is still there after a reconnect.
				leave()
				want = []sense{attnNexusLoss, c.want}
			}
			a = enter(t, addr, nameA)
			if got := a.attentions(); !slices.Equal(got, want) {
				t.Errorf("%v, connected %v: the nexus finds %v, want %v", c.want, connected, got, want)
			}
		}
	}
}

func TestNexusesThatAreGoneAreBounded(t *testing.T) {
	r := &reservations{departed: map[nexus][]sense{}, turn: make(chan struct{}, 1)}
	out, err := (&persistent{}).serve(&prRequest{action: prRegister, newKey: 1, from: nexus{name: "registered"}})
	if err != nil {
		t.Fatal(err)
	}
	r.publish(out.persistent)
	r.depart(nexus{name: "registered"}, []sense{attnReservationsReleased, attnCleared})
	for n := range 3 * mostDeparted {
		r.depart(nexus{name: fmt.Sprint(n)}, nil)
	}
	if len(r.departed) != mostDeparted {
		t.Errorf("%d are remembered, at most %d should be", len(r.departed), mostDeparted)
	}
	if got := r.arrive(nexus{name: "registered"}); !slices.Equal(got, []sense{attnNexusLoss, attnReservationsReleased}) {
		t.Errorf("the registered one finds %v", got)
	}
	if got := r.arrive(nexus{name: "new"}); !slices.Equal(got, []sense{attnPowerOn}) {
		t.Errorf("a new one finds %v", got)
	}
}

func TestAttentionIsClearedByWhatReportsIt(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := host(t, addr, nameA)
	if err := s.AddUnit(Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)}); err != nil {
		t.Fatal(err)
	}
	// INQUIRY neither reports nor clears (SPC-4 6.6.1).
	i.good([]byte{0x12, 0, 0, 0, 96, 0}, nil, 96)
	// REPORT LUNS clears it without a report.
	i.good([]byte{0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, nil, 256)
	if got := i.attentions(); len(got) != 0 {
		t.Errorf("after REPORT LUNS: %v", got)
	}
	if err := s.RemoveUnit(iqn, 1); err != nil {
		t.Fatal(err)
	}
	// REQUEST SENSE reports it as data and clears it.
	if d := i.good([]byte{0x03, 0, 0, 0, 18, 0}, nil, 18).data; d[2]&0xf != keyUnitAttention || d[12] != 0x3f || d[13] != 0x0e {
		t.Errorf("REQUEST SENSE gives %x", d)
	}
	if got := i.attentions(); len(got) != 0 {
		t.Errorf("after REQUEST SENSE: %v", got)
	}
}

func TestResetsAreToldToEveryNexus(t *testing.T) {
	for f, want := range map[byte]sense{iscsi.TMFLUNReset: attnLUNReset, iscsi.TMFTargetWarmReset: attnTargetReset} {
		t.Run(tmfName(f), func(t *testing.T) {
			_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)}, Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)})
			a, b := host(t, addr, nameA), host(t, addr, nameB)
			a.pr(prRegister, 0, 0, 0xa, 0)
			a.pr(prReserve, typeWriteExclusive, 0xa, 0, 0)
			a.tmf(f, 0)
			if p := a.recv(); p.Response() != iscsi.TMFComplete {
				t.Fatalf("response %d", p.Response())
			}
			for _, i := range []*initiator{a, b} {
				if got := i.attentions(); !slices.Equal(got, []sense{want}) {
					t.Errorf("%v, want %v", got, want)
				}
			}
			// Nothing of this changes persistent reservations (SPC-4 5.12.1).
			if key, kind := b.reservation(); key != 0xa || kind != typeWriteExclusive {
				t.Errorf("key %x type %d", key, kind)
			}
			b.lun = 1
			other := []sense{attnPowerOn}
			if got := b.attentions(); !slices.Equal(got, other) {
				t.Errorf("the other unit: %v, want %v", got, other)
			}
		})
	}
}

func TestColdResetIsToldToSessionsThatReturn(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	a.tmf(iscsi.TMFTargetColdReset, 0)
	a.recv()
	a.expectClosed()
	b.expectClosed()
	waitFor(t, "the sessions' end", func() bool { return len(s.Sessions(iqn)) == 0 })
	for _, name := range []string{nameA, nameB} {
		i := enter(t, addr, name)
		if got := i.attentions(); !slices.Equal(got, []sense{attnTargetReset}) {
			t.Errorf("%s finds %v", name, got)
		}
	}
}

func TestLUNChangesAreAnnouncedAtOnce(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 3, Device: newMemory(512, 64)})
	i, status := tryLogin(t, addr, loginOptions{name: nameA})
	if status != 0 {
		t.Fatal(status)
	}
	i.lun = 3
	i.do(tur, nil, 0) // from its answer on the session is in full feature phase on both sides
	if err := s.AddUnit(Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)}); err != nil {
		t.Fatal(err)
	}
	p := i.recv() // without any request
	if p.Opcode() != iscsi.OpAsync || p.AsyncEvent() != iscsi.AsyncSCSI || p.ITT() != iscsi.NoTag {
		t.Fatalf("%v event %d", p.Opcode(), p.AsyncEvent())
	}
	want := append([]byte{0, 18}, attnLUNsChanged.fixed()...)
	if !slices.Equal(p.data, want) {
		t.Errorf("data %x, want %x", p.data, want)
	}
	if field, _ := iscsi.EncodeLUN(3); p.LUN() != field {
		t.Errorf("LUN %x", p.LUN())
	}
	// It has a StatSN of its own.
	sn := p.StatSN()
	h := i.command(tur, 0, 0)
	i.start(h, nil)
	if p := i.recv(); p.StatSN() != sn+1 || p.ITT() != h.ITT() {
		t.Errorf("StatSN %d after %d", p.StatSN(), sn)
	}
}

func TestAnnouncementsWaitForNobody(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 1<<12)})
	stalling(t, s, addr)
	other := host(t, addr, nameB)
	for n := range 50 {
		if err := s.AddUnit(Unit{IQN: iqn, LUN: 1 + uint64(n), Device: newMemory(512, 64)}); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, "REPORT LUNS with all of them", func() bool {
		return len(other.good([]byte{0xa0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0}, nil, 1024).data) == 8+51*8
	})
}

// counted counts the reads that are answered on the spot.
type counted struct {
	quick
	tries atomic.Int64
}

func (c *counted) TryReadAt(p []byte, start lun.LBA) (bool, error) {
	c.tries.Add(1)
	return c.quick.TryReadAt(p, start)
}

// atOnce sees that reads of the unit are answered on the spot.
func (c *counted) atOnce(i *initiator, when string) {
	i.t.Helper()
	before := c.tries.Load()
	for range 3 {
		i.good(rw16(0x88, 0, 1), nil, 512)
	}
	if n := c.tries.Load() - before; n != 3 {
		i.t.Errorf("%s: %d of 3 reads are answered on the spot", when, n)
	}
}

func TestAttentionOfAnotherUnitDoesNotSlowReadsDown(t *testing.T) {
	d := &counted{quick: quick{newMemory(512, 64)}}
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: d}, Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)})
	i := host(t, addr, nameA)
	d.atOnce(i, "while LUN 1 has a power on to report")
	i.lun = 1
	if got := i.attentions(); !slices.Equal(got, []sense{attnPowerOn}) {
		t.Errorf("LUN 1 reports %v", got)
	}
}

func TestSessionHasNoAttentionsOfUnitsThatItDoesNotSee(t *testing.T) {
	d := &counted{quick: quick{newMemory(512, 64)}}
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: d},
		Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64), Initiators: []Initiator{{Name: nameA}}},
		Unit{IQN: iqn, LUN: 2, Device: newMemory(512, 64)})
	waiting := func(name string) (all map[uint64][]sense) {
		for _, c := range s.sessions(iqn) {
			c.mu.Lock()
			if c.initiator == name {
				all = maps.Clone(c.attention)
			}
			c.mu.Unlock()
		}
		return all
	}
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	a.lun = 1
	a.attentions()
	ref := a.tmf(iscsi.TMFLUNReset, iscsi.NoTag)
	if p := a.recv(); p.ITT() != ref || p.Response() != iscsi.TMFComplete {
		t.Fatalf("%v, response %d", p.Opcode(), p.Response())
	}
	if got := waiting(nameA)[1]; !slices.Equal(got, []sense{attnLUNReset}) {
		t.Errorf("who sees the unit that was reset finds %v", got)
	}
	if got, there := waiting(nameB)[1]; there {
		t.Errorf("who does not see the unit that was reset has %v", got)
	}
	if waiting(nameB)[2] == nil {
		t.Fatal("LUN 2 has nothing to report")
	}
	if err := s.RemoveUnit(iqn, 2); err != nil {
		t.Fatal(err)
	}
	if got, there := waiting(nameB)[2]; there {
		t.Errorf("a unit that was taken off leaves %v", got)
	}
	if got := b.attentions(); !slices.Equal(got, []sense{attnLUNsChanged}) {
		t.Errorf("LUN 0 reports %v", got)
	}
	d.atOnce(b, "after all of it")
}
