package target

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"lunshift/iscsi"
)

// unsure is a store whose Saves fail as long as lost is set, and keep what they were given
// all the same.
type unsure struct {
	keeper
	lost bool // under keeper.mu
}

func (u *unsure) Save(ctx context.Context, data []byte) error {
	err := u.keeper.Save(ctx, data)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.lost {
		return errors.New("the outcome is unknown")
	}
	return err
}

func (u *unsure) set(lost bool) {
	u.mu.Lock()
	u.lost = lost
	u.mu.Unlock()
}

func TestWhatIsAcknowledgedAfterAnUnknownOutcomeIsKept(t *testing.T) {
	k := &unsure{}
	unit := Unit{IQN: iqn, Device: newMemory(512, 64), Reservations: k}
	s, addr := begin(t, Config{}, unit)
	a := host(t, addr, nameA)
	k.set(true)
	a.wants("REGISTER", a.prOut(prRegister, 0, 0, 0xa, flagAPTPL), senseInternal)
	k.set(false)
	a.pr(prRegister, 0, 0, 0xb, 0) // without APTPL a restart finds nothing
	if data, _ := k.Load(); len(data) != 0 {
		t.Errorf("the store still has %s", data)
	}

	// A command that changes nothing tells how things are, too.
	a.pr(prRegister, 0, 0xb, 0xa, flagAPTPL)
	a.pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
	k.set(true)
	a.wants("RELEASE", a.prOut(prRelease, typeExclusiveAccess, 0xa, 0, 0), senseInternal)
	a.wants("RESERVE", a.prOut(prReserve, typeExclusiveAccess, 0xa, 0, 0), senseInternal)
	k.set(false)
	a.pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
	s.Close()
	_, addr = begin(t, Config{}, unit)
	if key, kind := host(t, addr, nameA).reservation(); key != 0xa || kind != typeExclusiveAccess {
		t.Errorf("after a restart key %x holds type %d", key, kind)
	}
}

// stale is a table full of registrations of one name, key 1 and on.
func stale(name string, n int) *persistent {
	p := &persistent{aptpl: true, byNexus: map[nexus]int{}}
	for i := range n {
		x := nexus{name: name, isid: iscsi.ISID{0xff, 0xff, 0xff, 0xff, byte(i >> 8), byte(i)}, group: 0xffff}
		p.byNexus[x] = i
		p.regs = append(p.regs, registration{nexus: x, key: 1<<64 - 1 - uint64(i)})
	}
	return p
}

func TestFullTableFitsTheStore(t *testing.T) {
	for _, c := range []string{"x", "<", "\xff"} {
		p := stale(strings.Repeat(c, longestName), mostRegistrations)
		p.kind, p.regs[0].holder = typeExclusiveAccess, true
		data, err := encodeReservations(p)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > MostReservationData {
			t.Errorf("%d registrations take %d bytes, at most %d are kept", len(p.regs), len(data), MostReservationData)
		}
		back, err := decodeReservations(&unit{}, data)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(back.regs, p.regs) || back.kind != p.kind {
			t.Errorf("names of %q come back as others", c)
		}
	}
}

// As docs/reservations.md says.
func TestFullTableOfInitiatorsThatAreGoneCanBeEmptied(t *testing.T) {
	data, err := encodeReservations(stale(nameA, sharedRegistrations))
	if err != nil {
		t.Fatal(err)
	}
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Reservations: &keeper{data: data}})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	a.wants("one more of the name", a.prOut(prRegister, 0, 0, 0xa, 0), senseNoRegistrations)
	b.pr(prRegister, 0, 0, 0xb, flagAPTPL)
	other := login(t, addr, loginOptions{name: nameB, isid: iscsi.ISID{0x80, 9}})
	other.wants("another of a name that has one", other.prOut(prRegister, 0, 0, 0xb, 0), senseNoRegistrations)
	b.pr(prPreempt, typeWriteExclusive, 0xb, 1<<64-1, 0)
	if _, keys := b.keys(); len(keys) != sharedRegistrations {
		t.Errorf("%d registrations", len(keys))
	}
	b.pr(prClear, 0, 0xb, 0, 0)
	a.pr(prRegister, 0, 0, 0xa, 0)
	if _, keys := b.keys(); !slices.Equal(keys, []uint64{0xa}) {
		t.Errorf("keys %x", keys)
	}
}

func TestRegistrationsAreBounded(t *testing.T) {
	p := &persistent{}
	register := func(q *prRequest) error {
		q.action, q.newKey = prRegister, 1
		out, err := p.serve(q)
		if err == nil {
			p = out.persistent
		}
		return err
	}
	full := error(senseNoRegistrations)
	for n := range sharedRegistrations {
		if err := register(&prRequest{from: nexus{name: nameA, group: uint16(n)}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := register(&prRequest{from: nexus{name: nameA, group: sharedRegistrations}}); err != full {
		t.Errorf("one more of a name: %v", err)
	}
	// Room that is for those who register themselves is not given to whom they name.
	other := &prRequest{from: nexus{name: nameB, group: 1}}
	other.specified = []nexus{{name: nameC, group: 1}}
	if err := register(other); err != full || len(p.regs) != sharedRegistrations {
		t.Errorf("one and another that it names: %v, %d registrations", err, len(p.regs))
	}
	for n := sharedRegistrations; n <= mostRegistrations; n++ {
		err := register(&prRequest{from: nexus{name: fmt.Sprint(n), group: 1}})
		if n < mostRegistrations && err != nil || n == mostRegistrations && err != full {
			t.Fatalf("registration %d, of a name that has none: %v", n, err)
		}
	}
	if err := consistent(p); err != nil {
		t.Error(err)
	}
}
