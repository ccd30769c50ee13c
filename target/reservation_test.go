package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"lunshift/iscsi"
)

// keeper is a ReservationStore in memory.
type keeper struct {
	mu    sync.Mutex // protects what follows
	data  []byte
	saves int
	fail  error
}

// serve begins a server of a unit whose reservations k keeps: another one each time.
func (k *keeper) serve(t *testing.T) (*Server, string) {
	return begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Reservations: k})
}

func (k *keeper) Load() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.data, k.fail
}

func (k *keeper) Save(_ context.Context, data []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	k.data = bytes.Clone(data)
	k.saves++
	return nil
}

func (k *keeper) set(fail error) {
	k.mu.Lock()
	k.fail = fail
	k.mu.Unlock()
}

const (
	nameA = "iqn.2026-11.net.example:a"
	nameB = "iqn.2026-11.net.example:b"
	nameC = "iqn.2026-11.net.example:c"
	nameD = "iqn.2026-11.net.example:d"

	flagAPTPL  = 0x01
	flagAllTG  = 0x04
	flagSpecIP = 0x08
)

func prOutCDB(action, kind byte, length int) []byte {
	cdb := []byte{0x5f, action, kind, 0, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(cdb[5:], uint32(length))
	return cdb
}

func prList(key, newKey uint64, flags byte, more ...byte) []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint64(b, key)
	binary.BigEndian.PutUint64(b[8:], newKey)
	b[20] = flags
	return append(b, more...)
}

func (i *initiator) prOut(action, kind byte, key, newKey uint64, flags byte, more ...byte) result {
	i.t.Helper()
	list := prList(key, newKey, flags, more...)
	return i.do(prOutCDB(action, kind, len(list)), list, 0)
}

// pr is prOut that must end GOOD.
func (i *initiator) pr(action, kind byte, key, newKey uint64, flags byte) {
	i.t.Helper()
	if r := i.prOut(action, kind, key, newKey, flags); r.status != iscsi.StatusGood {
		i.t.Fatalf("PERSISTENT RESERVE OUT action %d type %d: %v", action, kind, r)
	}
}

func (i *initiator) prIn(action byte) []byte {
	i.t.Helper()
	return i.good([]byte{0x5e, action, 0, 0, 0, 0, 0, 0xff, 0xff, 0}, nil, 0xffff).data
}

func (i *initiator) keys() (generation uint32, keys []uint64) {
	i.t.Helper()
	b := i.prIn(prReadKeys)
	for at := 8; at < len(b); at += 8 {
		keys = append(keys, binary.BigEndian.Uint64(b[at:]))
	}
	if n := binary.BigEndian.Uint32(b[4:]); int(n) != len(b)-8 {
		i.t.Fatalf("additional length %d in %x", n, b)
	}
	return binary.BigEndian.Uint32(b), keys
}

// reservation is what READ RESERVATION tells; kind 0 for none.
func (i *initiator) reservation() (key uint64, kind byte) {
	i.t.Helper()
	b := i.prIn(prReadReservation)
	if len(b) == 8 {
		return 0, 0
	}
	return binary.BigEndian.Uint64(b[8:]), b[21]
}

func (i *initiator) wants(what string, r result, want any) {
	i.t.Helper()
	ok := false
	switch w := want.(type) {
	case sense:
		ok = r.is(w)
	case byte:
		ok = r.status == w
	}
	if !ok {
		i.t.Fatalf("%s: %v, want %v", what, r, want)
	}
}

const (
	good     = byte(iscsi.StatusGood)
	conflict = byte(iscsi.StatusReservationConflict)
)

func host(t testing.TB, addr, name string) *initiator {
	t.Helper()
	return login(t, addr, loginOptions{name: name, isid: isidOf(name)})
}

func isidOf(name string) iscsi.ISID { return iscsi.ISID{0x80, 1, 2, 3, 4, name[len(name)-1]} }

func TestReservationTypesKeepOutWhomTheyMust(t *testing.T) {
	read, write := rw16(0x88, 0, 1), rw16(0x8a, 0, 1)
	for _, c := range []struct {
		kind                              byte
		registeredReads, registeredWrites byte
		otherReads, otherWrites           byte
	}{
		{typeWriteExclusive, good, conflict, good, conflict},
		{typeExclusiveAccess, conflict, conflict, conflict, conflict},
		{typeWriteRegistrantsOnly, good, good, good, conflict},
		{typeAccessRegistrantsOnly, good, good, conflict, conflict},
		{typeWriteAllRegistrants, good, good, good, conflict},
		{typeAccessAllRegistrants, good, good, conflict, conflict},
	} {
		for _, prober := range []bool{false, true} { // through check, and through readNow
			t.Run(fmt.Sprintf("type %d prober %v", c.kind, prober), func(t *testing.T) {
				m := newMemory(512, 64)
				u := Unit{IQN: iqn, Device: m}
				if prober {
					u.Device = quick{m}
				}
				_, addr := begin(t, Config{}, u)
				a, b, o := host(t, addr, nameA), host(t, addr, nameB), host(t, addr, nameC)
				a.pr(prRegister, 0, 0, 0xa, 0)
				b.pr(prRegister, 0, 0, 0xb, 0)
				a.pr(prReserve, c.kind, 0xa, 0, 0)
				key, kind := a.reservation()
				if want := uint64(0xa); kind != c.kind || key != want && !allRegistrants(kind) || key != 0 && allRegistrants(kind) {
					t.Fatalf("READ RESERVATION: key %x type %d", key, kind)
				}
				a.wants("the holder writes", a.do(write, pattern(512, 1), 0), good)
				a.wants("the holder reads", a.do(read, nil, 512), good)
				b.wants("a registrant reads", b.do(read, nil, 512), c.registeredReads)
				b.wants("a registrant writes", b.do(write, pattern(512, 2), 0), c.registeredWrites)
				o.wants("another reads", o.do(read, nil, 512), c.otherReads)
				o.wants("another reads 10", o.do([]byte{0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0}, nil, 512), c.otherReads)
				o.wants("another writes", o.do(write, pattern(512, 3), 0), c.otherWrites)
				o.wants("another unmaps", o.do([]byte{0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0}, make([]byte, 24), 0), conflict)
				o.wants("another compares and writes", o.do(caw(0), pattern(1024, 3), 0), conflict)
				o.wants("another writes the same", o.do([]byte{0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0}, pattern(512, 3), 0), conflict)
				o.wants("another verifies", o.do([]byte{0x2f, 0, 0, 0, 0, 0, 0, 0, 1, 0}, nil, 0), c.otherReads)
				o.wants("another flushes", o.do([]byte{0x35, 0, 0, 0, 0, 0, 0, 0, 1, 0}, nil, 0), conflict)
				o.wants("another senses modes", o.do([]byte{0x1a, 0, 0x3f, 0, 255, 0}, nil, 255), c.otherReads)
				for _, cdb := range [][]byte{tur, {0x12, 0, 0, 0, 96, 0}, {0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0}, {0x03, 0, 0, 0, 18, 0}} {
					o.wants(fmt.Sprintf("another's %02Xh", cdb[0]), o.do(cdb, nil, 96), good)
				}
				// What the device holds is what those wrote who might.
				seed := byte(1)
				if c.registeredWrites == good {
					seed = 2
				}
				if !bytes.Equal(m.bytes()[:512], pattern(512, seed)) {
					t.Error("the device has the data of a write that conflicted")
				}
				a.wants("release of another type", a.prOut(prRelease, c.kind^2, 0xa, 0, 0), senseInvalidRelease)
				a.pr(prRelease, c.kind, 0xa, 0, 0)
				if registrants(c.kind) {
					b.wants("after the release", b.do(tur, nil, 0), attnReservationsReleased)
				}
				b.wants("after the release", b.do(tur, nil, 0), good)
				o.wants("another writes after the release", o.do(write, pattern(512, 3), 0), good)
			})
		}
	}
}

func caw(lba uint64) []byte {
	b := make([]byte, 16)
	b[0], b[13] = 0x89, 1
	binary.BigEndian.PutUint64(b[2:], lba)
	return b
}

func TestKeysDecideWhoMayChangeReservations(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Reservations: &keeper{}})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	a.wants("a key of nobody", a.prOut(prRegister, 0, 9, 0xa, 0), conflict)
	a.wants("no key for nothing", a.prOut(prRegister, 0, 0, 0, 0), good)
	if gen, keys := a.keys(); gen != 0 || len(keys) != 0 {
		t.Fatalf("generation %d, keys %x", gen, keys)
	}
	for _, action := range []byte{prReserve, prRelease, prClear, prPreempt, prPreemptAbort} {
		a.wants(fmt.Sprintf("action %d unregistered", action), a.prOut(action, typeWriteExclusive, 0, 1, 0), conflict)
	}
	a.pr(prRegister, 0, 0, 0xa, 0)
	a.wants("the wrong key", a.prOut(prRegister, 0, 9, 0xaa, 0), conflict)
	a.pr(prRegister, 0, 0xa, 0xaa, 0)
	a.pr(prRegisterAnyhow, 0, 12345, 0xaaa, 0)
	b.pr(prRegisterAnyhow, 0, 0, 0xb, 0)
	if gen, keys := b.keys(); gen != 4 || !slices.Equal(keys, []uint64{0xaaa, 0xb}) {
		t.Fatalf("generation %d, keys %x", gen, keys)
	}
	a.wants("an old key", a.prOut(prReserve, typeWriteExclusive, 0xa, 0, 0), conflict)
	a.pr(prReserve, typeWriteExclusive, 0xaaa, 0, 0)
	a.pr(prReserve, typeWriteExclusive, 0xaaa, 0, 0)
	a.wants("another type", a.prOut(prReserve, typeExclusiveAccess, 0xaaa, 0, 0), conflict)
	b.wants("a second reservation", b.prOut(prReserve, typeWriteExclusive, 0xb, 0, 0), conflict)
	b.pr(prRelease, typeWriteExclusive, 0xb, 0, 0) // of no effect
	if key, kind := b.reservation(); key != 0xaaa || kind != typeWriteExclusive {
		t.Fatalf("key %x type %d", key, kind)
	}
	if gen, _ := b.keys(); gen != 4 {
		t.Fatalf("generation %d after RESERVE and RELEASE", gen)
	}
	// The reservation goes with the registration of its holder.
	a.pr(prRegister, 0, 0xaaa, 0, 0)
	if key, kind := b.reservation(); kind != 0 {
		t.Fatalf("key %x type %d", key, kind)
	}
	b.pr(prReserve, typeWriteAllRegistrants, 0xb, 0, 0)
	a.pr(prRegister, 0, 0, 0xa, 0)
	a.pr(prReserve, typeWriteAllRegistrants, 0xa, 0, 0)
	b.pr(prRegister, 0, 0xb, 0, 0)
	if _, kind := b.reservation(); kind != typeWriteAllRegistrants {
		t.Fatal("the reservation went with one of two holders")
	}
	a.pr(prRegister, 0, 0xa, 0, 0)
	if _, kind := b.reservation(); kind != 0 {
		t.Fatal("the reservation outlived its last holder")
	}
}

func TestMalformedReserveOutIsRefusedAndChangesNothing(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a := host(t, addr, nameA)
	a.pr(prRegister, 0, 0, 0xa, 0)
	short := func(n int) result {
		list := make([]byte, max(n, 1))
		return a.do(prOutCDB(prRegister, 0, n), list[:n], 0)
	}
	id := testID(nameB, isidOf(nameB))
	withLength := func(n int, ids ...byte) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(n)), ids...)
	}
	for _, c := range []struct {
		what string
		got  func() result
		want sense
	}{
		{"no list", func() result { return short(0) }, senseParamLength},
		{"short list", func() result { return short(20) }, senseParamLength},
		{"long list", func() result { return a.prOut(prRegister, 0, 0xa, 1, 0, 0, 0, 0, 0) }, senseParamLength},
		{"huge list", func() result { return a.do(prOutCDB(prRegister, 0, 1<<20), make([]byte, 24), 0) }, senseParamLength},
		{"scope", func() result { return a.prOut(prReserve, 0x21, 0xa, 0, 0) }, senseInvalidField},
		{"type 0", func() result { return a.prOut(prReserve, 0, 0xa, 0, 0) }, senseInvalidField},
		{"type 2", func() result { return a.prOut(prReserve, 2, 0xa, 0, 0) }, senseInvalidField},
		{"type 9", func() result { return a.prOut(prReserve, 9, 0xa, 0, 0) }, senseInvalidField},
		{"action 8", func() result { return a.prOut(8, 1, 0xa, 0, 0) }, senseInvalidField},
		{"action 31", func() result { return a.prOut(31, 1, 0xa, 0, 0) }, senseInvalidField},
		{"preempt of nobody's key 0", func() result { return a.prOut(prPreempt, 1, 0xa, 0, 0) }, senseParamField},
		{"APTPL without a store", func() result { return a.prOut(prRegister, 0, 0xa, 0xa, flagAPTPL) }, senseParamField},
		{"SPEC_I_PT of RESERVE", func() result { return a.prOut(prReserve, 1, 0xa, 0, flagSpecIP) }, senseParamField},
		{"SPEC_I_PT of REGISTER AND IGNORE", func() result { return a.prOut(prRegisterAnyhow, 0, 0, 1, flagSpecIP) }, senseParamField},
		{"SPEC_I_PT without a length", func() result { return a.prOut(prRegister, 0, 0xa, 1, flagSpecIP) }, senseParamLength},
		{"SPEC_I_PT with a wrong length", func() result { return a.prOut(prRegister, 0, 0xa, 1, flagSpecIP, withLength(4, id...)...) }, senseParamLength},
		{"SPEC_I_PT when registered", func() result { return a.prOut(prRegister, 0, 0xa, 1, flagSpecIP, withLength(len(id), id...)...) }, senseInvalidField},
		{"TransportID of another protocol", func() result {
			bad := bytes.Clone(id)
			bad[0] = 0x46
			return a.prOut(prRegister, 0, 0xa, 1, flagSpecIP, withLength(len(bad), bad...)...)
		}, senseParamField},
		{"TransportID without an ISID", func() result {
			bad := append([]byte{5, 0, 0, 20}, make([]byte, 20)...)
			copy(bad[4:], "iqn.2026-11.a:b")
			return a.prOut(prRegister, 0, 0xa, 1, flagSpecIP, withLength(len(bad), bad...)...)
		}, senseParamField},
		{"TransportID that is cut off", func() result {
			bad := id[:len(id)-4]
			return a.prOut(prRegister, 0, 0xa, 1, flagSpecIP, withLength(len(bad), bad...)...)
		}, senseParamField},
		{"TransportID without an end", func() result {
			bad := append([]byte{0x45, 0, 0, 20}, "iqn.2026-11.a:b,i,0x"...)
			return a.prOut(prRegister, 0, 0xa, 1, flagSpecIP, withLength(len(bad), bad...)...)
		}, senseParamField},
		{"move to nowhere", func() result { return a.prOut(prRegisterAndMove, 0, 0xa, 1, 0) }, senseParamField},
	} {
		if r := c.got(); !r.is(c.want) {
			t.Errorf("%s: %v, want %v", c.what, r, c.want)
		}
	}
	if gen, keys := a.keys(); gen != 1 || !slices.Equal(keys, []uint64{0xa}) {
		t.Errorf("generation %d, keys %x", gen, keys)
	}
	if r := a.do([]byte{0x5e, 4, 0, 0, 0, 0, 0, 0, 64, 0}, nil, 64); !r.is(senseInvalidField) {
		t.Errorf("PERSISTENT RESERVE IN action 4: %v", r)
	}
}

func testID(name string, isid iscsi.ISID) []byte {
	return transportID(&unit{}, nexus{name: name, isid: isid})
}

func TestPreemptTakesOverAndTellsWhomItConcerns(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a, b, c, d := host(t, addr, nameA), host(t, addr, nameB), host(t, addr, nameC), host(t, addr, nameD)
	all := []*initiator{a, b, c, d}
	quiet := func() {
		t.Helper()
		for n, i := range all {
			if r := i.do(tur, nil, 0); r.status != good {
				t.Fatalf("host %d: %v", n, r)
			}
		}
	}
	register := func() {
		t.Helper()
		for n, i := range []*initiator{a, b, c} {
			i.pr(prRegisterAnyhow, 0, 0, uint64(0xa+n), 0)
		}
	}
	register()
	a.pr(prReserve, typeWriteExclusive, 0xa, 0, 0)
	b.wants("a key of nobody", b.prOut(prPreempt, typeWriteExclusive, 0xb, 77, 0), conflict)

	// Registrations only.
	b.pr(prPreempt, 0, 0xb, 0xc, 0)
	c.wants("who lost its registration", c.do(tur, nil, 0), attnRegistrationsPreempted)
	quiet()
	if key, kind := d.reservation(); key != 0xa || kind != typeWriteExclusive {
		t.Fatalf("key %x type %d", key, kind)
	}

	// The reservation, with another type.
	register()
	gen, _ := d.keys()
	b.pr(prPreempt, typeAccessRegistrantsOnly, 0xb, 0xa, 0)
	a.wants("who lost the reservation", a.do(tur, nil, 0), attnRegistrationsPreempted)
	c.wants("who is still registered", c.do(tur, nil, 0), attnReservationsReleased)
	quiet()
	now, keys := d.keys()
	if key, kind := d.reservation(); key != 0xb || kind != typeAccessRegistrantsOnly || !slices.Equal(keys, []uint64{0xb, 0xc}) || now != gen+1 {
		t.Fatalf("key %x type %d keys %x generation %d after %d", key, kind, keys, now, gen)
	}
	c.wants("a registrant's write", c.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), good)
	a.wants("a preempted one's write", a.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), conflict)

	// All registrants: key 0 is everybody.
	b.pr(prRelease, typeAccessRegistrantsOnly, 0xb, 0, 0)
	c.wants("the release", c.do(tur, nil, 0), attnReservationsReleased)
	register()
	a.pr(prReserve, typeAccessAllRegistrants, 0xa, 0, 0)
	b.pr(prPreempt, typeAccessAllRegistrants, 0xb, 0xc, 0)
	c.wants("one of the holders", c.do(tur, nil, 0), attnRegistrationsPreempted)
	if _, kind := d.reservation(); kind != typeAccessAllRegistrants {
		t.Fatalf("type %d", kind)
	}
	b.pr(prPreempt, typeWriteExclusive, 0xb, 0, 0)
	a.wants("the other holder", a.do(tur, nil, 0), attnRegistrationsPreempted)
	quiet()
	_, keys = d.keys()
	if key, kind := d.reservation(); key != 0xb || kind != typeWriteExclusive || !slices.Equal(keys, []uint64{0xb}) {
		t.Fatalf("key %x type %d keys %x", key, kind, keys)
	}

	// One's own reservation, to change its type without a gap.
	register()
	b.pr(prPreempt, typeExclusiveAccess, 0xb, 0xb, 0)
	for _, i := range []*initiator{a, c} {
		i.wants("the other registrants", i.do(tur, nil, 0), attnReservationsReleased)
	}
	if key, kind := d.reservation(); key != 0xb || kind != typeExclusiveAccess {
		t.Fatalf("key %x type %d", key, kind)
	}

	// CLEAR ends everything.
	c.pr(prClear, 0, 0xc, 0, 0)
	for _, i := range []*initiator{a, b} {
		i.wants("after CLEAR", i.do(tur, nil, 0), attnReservationsPreempted)
	}
	quiet()
	_, keys = d.keys()
	if _, kind := d.reservation(); kind != 0 || len(keys) != 0 {
		t.Fatalf("type %d keys %x", kind, keys)
	}
}

func TestPreemptAndAbortEndsTheCommandsOfThePreempted(t *testing.T) {
	d := newDeaf(t)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: d})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	a.pr(prRegister, 0, 0, 0xa, 0)
	b.pr(prRegister, 0, 0, 0xb, 0)
	a.pr(prReserve, typeWriteRegistrantsOnly, 0xa, 0, 0)
	w := a.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
	a.start(w, pattern(512, 9))
	<-d.began
	list := prList(0xb, 0xa, 0)
	h := b.command(prOutCDB(prPreemptAbort, typeWriteExclusive, len(list)), iscsi.FlagWrite, len(list))
	b.start(h, list)
	b.ping() // comes back before the command: its device still works on the write
	waitFor(t, "the reservation, before the aborted command ends", func() bool { key, _ := b.reservation(); return key == 0xb })
	close(d.release)
	b.wants("PREEMPT AND ABORT", b.finish(h.ITT(), list), good)
	a.wants("who was preempted", a.do(tur, nil, 0), attnRegistrationsPreempted)
	a.wants("whose command was cleared", a.do(tur, nil, 0), attnCleared)
	a.wants("its next write", a.do(rw16(0x8a, 0, 1), pattern(512, 9), 0), conflict)
	if d.bytes()[0] != 0 {
		t.Error("the aborted write was done")
	}
}

func TestCommandsThatArePreemptedWithoutAbortEndAsTheyBegan(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	b.pr(prRegister, 0, 0, 0xb, 0)
	hold := make(chan struct{})
	m.set(hold, nil)
	w := a.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
	a.start(w, pattern(512, 9))
	<-m.entered
	b.pr(prReserve, typeExclusiveAccess, 0xb, 0, 0)
	m.set(nil, nil)
	close(hold)
	a.wants("the write from before", a.finish(w.ITT(), pattern(512, 9)), good)
	a.wants("the write from after", a.do(rw16(0x8a, 1, 1), pattern(512, 9), 0), conflict)
	if got := m.bytes(); !bytes.Equal(got[:512], pattern(512, 9)) || got[512] != 0 {
		t.Error("the device has something else")
	}
}

// two serves a unit through two portal groups.
func two(t *testing.T, u Unit) (*Server, [2]string) {
	t.Helper()
	s, at := beginAt(t, Config{}, []Portal{{"127.0.0.1:0", 1}, {"127.0.0.1:0", 2}}, u)
	return s, [2]string(at)
}

func TestRegistrationsAreThoseOfAnITNexus(t *testing.T) {
	_, addrs := two(t, Unit{IQN: iqn, Device: newMemory(512, 64)})
	one, other := host(t, addrs[0], nameA), host(t, addrs[1], nameA)
	one.pr(prRegister, 0, 0, 0xa, 0)
	one.pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
	other.wants("the same initiator port at another target port", other.do(rw16(0x88, 0, 1), nil, 512), conflict)
	one.pr(prRegister, 0, 0xa, 0, 0)

	// ALL_TG_PT registers it at both.
	one.pr(prRegister, 0, 0, 0xaa, flagAllTG)
	if _, keys := one.keys(); !slices.Equal(keys, []uint64{0xaa, 0xaa}) {
		t.Fatalf("keys %x", keys)
	}
	other.pr(prReserve, typeExclusiveAccess, 0xaa, 0, 0)
	want := []fullStatus{{0xaa, false, 0, 1, nameA, isidOf(nameA)}, {0xaa, true, typeExclusiveAccess, 2, nameA, isidOf(nameA)}}
	if got := one.fullStatus(); !slices.Equal(got, want) {
		t.Errorf("READ FULL STATUS: %v, want %v", got, want)
	}
	other.pr(prRegister, 0, 0xaa, 0, flagAllTG)
	if _, keys := one.keys(); len(keys) != 0 {
		t.Errorf("keys %x", keys)
	}
}

type fullStatus struct {
	key    uint64
	holder bool
	kind   byte
	port   uint16
	name   string
	isid   iscsi.ISID
}

// fullStatus reads READ FULL STATUS by the standard, apart from the code that makes it.
func (i *initiator) fullStatus() (all []fullStatus) {
	i.t.Helper()
	b := i.prIn(prReadFullStatus)
	if n := binary.BigEndian.Uint32(b[4:]); int(n) != len(b)-8 {
		i.t.Fatalf("additional length %d of %d", n, len(b))
	}
	for b = b[8:]; len(b) > 0; {
		s := fullStatus{key: binary.BigEndian.Uint64(b), holder: b[12]&1 != 0, kind: b[13], port: binary.BigEndian.Uint16(b[18:])}
		n := int(binary.BigEndian.Uint32(b[20:]))
		id := b[24 : 24+n]
		if n%4 != 0 || n < 24 || int(binary.BigEndian.Uint16(id[2:])) != n-4 || id[0]&0xf != 5 || id[n-1] != 0 {
			i.t.Fatalf("TransportID %x", id)
		}
		text := strings.TrimRight(string(id[4:]), "\x00")
		if id[0]>>6 == 1 {
			name, digits, found := strings.Cut(text, ",i,0x")
			if !found || len(digits) != 12 {
				i.t.Fatalf("TransportID %q", text)
			}
			var v uint64
			fmt.Sscanf(digits, "%x", &v)
			for n := range s.isid {
				s.isid[n] = byte(v >> (40 - 8*n))
			}
			text = name
		}
		s.name = text
		all = append(all, s)
		b = b[24+n:]
	}
	return all
}

func TestOneInitiatorRegistersAndMovesForOthers(t *testing.T) {
	k := &keeper{}
	_, addr := k.serve(t)
	a, b, c := host(t, addr, nameA), host(t, addr, nameB), host(t, addr, nameC)
	ids := append(testID(nameB, isidOf(nameB)), testID(nameC, isidOf(nameC))...)
	ids = append(ids, testID(nameA, isidOf(nameA))...) // the sender itself does no harm
	list := append(binary.BigEndian.AppendUint32(nil, uint32(len(ids))), ids...)
	a.wants("SPEC_I_PT", a.prOut(prRegister, 0, 0, 0x5, flagSpecIP|flagAPTPL, list...), good)
	if gen, keys := a.keys(); gen != 1 || !slices.Equal(keys, []uint64{5, 5, 5}) {
		t.Fatalf("generation %d keys %x", gen, keys)
	}
	b.pr(prReserve, typeWriteRegistrantsOnly, 5, 0, 0)

	moveTo := func(i *initiator, key, newKey uint64, flags byte, port uint16, id []byte) result {
		p := prList(key, newKey, 0)
		p[17] = flags
		binary.BigEndian.PutUint16(p[18:], port)
		binary.BigEndian.PutUint32(p[20:], uint32(len(id)))
		p = append(p, id...)
		return i.do(prOutCDB(prRegisterAndMove, typeWriteRegistrantsOnly, len(p)), p, 0)
	}
	d := testID(nameD, isidOf(nameD))
	a.wants("a move by who does not hold", moveTo(a, 5, 7, 0, 1, d), conflict)
	b.wants("a move with the wrong key", moveTo(b, 6, 7, 0, 1, d), conflict)
	b.wants("a move with key 0", moveTo(b, 5, 0, 0, 1, d), senseParamField)
	b.wants("a move to a port that is not there", moveTo(b, 5, 7, 0, 9, d), senseParamField)
	b.wants("a move to oneself", moveTo(b, 5, 7, 0, 1, testID(nameB, isidOf(nameB))), senseParamField)
	b.wants("a move", moveTo(b, 5, 7, 3, 1, d), good) // UNREG and APTPL
	if key, kind := a.reservation(); key != 7 || kind != typeWriteRegistrantsOnly {
		t.Fatalf("key %x type %d", key, kind)
	}
	b.wants("who moved it away", b.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), conflict)
	c.wants("another registrant", c.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), good)
	n := host(t, addr, nameD)
	n.wants("the new holder", n.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), good)
	n.pr(prRelease, typeWriteRegistrantsOnly, 7, 0, 0)
	for _, i := range []*initiator{a, c} {
		i.wants("the other registrants", i.do(tur, nil, 0), attnReservationsReleased)
	}
	b.wants("who is not one any more", b.do(tur, nil, 0), good)
}

func TestWithAPTPLReservationsSurviveAndWithoutTheyDoNot(t *testing.T) {
	for _, aptpl := range []byte{flagAPTPL, 0} {
		t.Run(fmt.Sprint(aptpl), func(t *testing.T) {
			k := &keeper{}
			s, addr := k.serve(t)
			a, b := host(t, addr, nameA), host(t, addr, nameB)
			a.pr(prRegister, 0, 0, 0xa, flagAPTPL)
			b.pr(prRegister, 0, 0, 0xb, flagAPTPL)
			a.pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
			b.pr(prRegister, 0, 0xb, 0xbb, aptpl) // the last one counts
			before := b.fullStatus()
			if got := b.prIn(prCapabilities); !bytes.Equal(got, []byte{0, 8, 0x1d, 0xb0 | aptpl, 0xea, 0x01, 0, 0}) {
				t.Errorf("REPORT CAPABILITIES %x", got)
			}
			s.Close()
			_, addr = k.serve(t)
			a, b = host(t, addr, nameA), host(t, addr, nameB)
			after := b.fullStatus()
			if gen, _ := b.keys(); gen != 0 {
				t.Errorf("generation %d after the start", gen)
			}
			want := conflict
			if aptpl == 0 {
				before, want = nil, good
			}
			if !slices.Equal(before, after) {
				t.Errorf("%v became %v", before, after)
			}
			b.wants("who does not hold", b.do(rw16(0x88, 0, 1), nil, 512), want)
			a.wants("who does", a.do(rw16(0x88, 0, 1), nil, 512), good)
			if aptpl != 0 {
				a.pr(prRelease, typeExclusiveAccess, 0xa, 0, 0)
			}
		})
	}
}

func TestWhatCannotBeSavedDidNotHappen(t *testing.T) {
	k := &keeper{}
	_, addr := k.serve(t)
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	a.pr(prRegister, 0, 0, 0xa, flagAPTPL)
	b.pr(prRegister, 0, 0, 0xb, flagAPTPL)
	k.set(errors.New("disk full"))
	gen, _ := a.keys()
	a.wants("RESERVE", a.prOut(prReserve, typeExclusiveAccess, 0xa, 0, 0), senseInternal)
	a.wants("REGISTER", a.prOut(prRegister, 0, 0xa, 0xaa, 0), senseInternal)
	a.wants("CLEAR", a.prOut(prClear, 0, 0xa, 0, 0), senseInternal)
	a.wants("PREEMPT", a.prOut(prPreempt, 0, 0xa, 0xb, 0), senseInternal)
	if now, keys := a.keys(); now != gen || !slices.Equal(keys, []uint64{0xa, 0xb}) {
		t.Errorf("generation %d after %d, keys %x", now, gen, keys)
	}
	b.wants("another's read", b.do(rw16(0x88, 0, 1), nil, 512), good)
	b.wants("no attention", b.do(tur, nil, 0), good)
	k.set(nil)
	a.pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
	b.wants("another's read", b.do(rw16(0x88, 0, 1), nil, 512), conflict)
}

func TestUnreadableReservationsAreNotTakenForNone(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, data := range []string{"{", `{"schema":1}`, `{"schema":3}`, `{"schema":2,"type":2}`, `{"schema":2,"type":1}`,
		`{"schema":2,"type":1,"registrations":[{"name":"YQ==","key":1}]}`, `{"schema":2,"registrations":[{"name":"YQ=="}]}`,
		`{"schema":2,"registrations":[{"name":"iqn.a","key":1}]}`} {
		err := s.AddUnit(Unit{IQN: iqn, Device: newMemory(512, 64), Reservations: &keeper{data: []byte(data)}})
		if err == nil || !strings.Contains(err.Error(), iqn) {
			t.Errorf("%s: %v", data, err)
		}
	}
	if err := s.AddUnit(Unit{IQN: iqn, Device: newMemory(512, 64), Reservations: &keeper{fail: errors.New("no")}}); err == nil {
		t.Error("a store that does not load is taken for an empty one")
	}
}

func TestNewISIDMeansANewRegistrantUnlessNamesCount(t *testing.T) {
	for _, byName := range []bool{false, true} {
		t.Run(fmt.Sprintf("by name %v", byName), func(t *testing.T) {
			k := &keeper{}
			serve := func() (*Server, string) {
				return begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Reservations: k, ReservationsByName: byName})
			}
			s, addr := serve()
			first := login(t, addr, loginOptions{name: nameA, isid: iscsi.ISID{1}})
			first.pr(prRegister, 0, 0, 0xa, flagAPTPL)
			first.pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
			first.nc.Close()
			access := func(addr string, isid iscsi.ISID) byte {
				t.Helper()
				i := login(t, addr, loginOptions{name: nameA, isid: isid})
				defer i.nc.Close()
				return i.do(rw16(0x88, 0, 1), nil, 512).status
			}
			changed := conflict
			if byName {
				changed = good
			}
			if got := access(addr, iscsi.ISID{1}); got != good {
				t.Errorf("the same ISID: status %02Xh", got)
			}
			if got := access(addr, iscsi.ISID{2}); got != changed {
				t.Errorf("another ISID: status %02Xh, want %02Xh", got, changed)
			}
			o := host(t, addr, nameB)
			if got := o.do(rw16(0x88, 0, 1), nil, 512).status; got != conflict {
				t.Errorf("another name: status %02Xh", got)
			}
			want := fullStatus{0xa, true, typeExclusiveAccess, 1, nameA, iscsi.ISID{1}}
			if byName {
				want.isid = iscsi.ISID{} // the TransportID names the initiator, not a port of it
			}
			if got := o.fullStatus(); !slices.Equal(got, []fullStatus{want}) {
				t.Errorf("READ FULL STATUS %v, want %v", got, want)
			}
			s.Close()
			_, addr = serve()
			if got := access(addr, iscsi.ISID{3}); got != changed {
				t.Errorf("another ISID after a restart: status %02Xh, want %02Xh", got, changed)
			}
		})
	}
}

func TestReserveLastsAsLongAsItsSession(t *testing.T) {
	for _, reserveCDB := range [][]byte{{0x16, 0, 0, 0, 0, 0}, {0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0}} {
		releaseCDB := bytes.Clone(reserveCDB)
		releaseCDB[0]++
		t.Run(fmt.Sprintf("%02Xh", reserveCDB[0]), func(t *testing.T) {
			_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
			a, b := host(t, addr, nameA), host(t, addr, nameB)
			a.good(reserveCDB, nil, 0)
			a.good(reserveCDB, nil, 0)
			b.wants("a second RESERVE", b.do(reserveCDB, nil, 0), conflict)
			b.good(releaseCDB, nil, 0) // of no effect
			b.wants("another's write", b.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), conflict)
			b.wants("another's read", b.do(rw16(0x88, 0, 1), nil, 512), conflict)
			b.wants("another's TEST UNIT READY", b.do(tur, nil, 0), conflict)
			b.good([]byte{0x12, 0, 0, 0, 96, 0}, nil, 96)
			for _, i := range []*initiator{a, b} {
				i.wants("PERSISTENT RESERVE OUT", i.prOut(prRegister, 0, 0, 1, 0), conflict)
				i.wants("PERSISTENT RESERVE IN", i.do([]byte{0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0}, nil, 8), conflict)
			}
			a.good(rw16(0x8a, 0, 1), pattern(512, 1), 0)
			a.good(releaseCDB, nil, 0)
			b.good(reserveCDB, nil, 0)
			b.good(releaseCDB, nil, 0)

			// Each of these ends it.
			for what, end := range map[string]func(i *initiator){
				"logout": func(i *initiator) { i.logout() },
				"loss":   func(i *initiator) { i.nc.Close() },
				"LUN reset": func(i *initiator) {
					i.tmf(iscsi.TMFLUNReset, 0)
					i.recv()
				},
				"warm reset": func(i *initiator) {
					i.tmf(iscsi.TMFTargetWarmReset, 0)
					i.recv()
				},
			} {
				x := host(t, addr, nameC)
				x.good(reserveCDB, nil, 0)
				end(x)
				waitFor(t, what, func() bool { return b.do(reserveCDB, nil, 0).status == good })
				b.good(releaseCDB, nil, 0)
				x.nc.Close()
			}
		})
	}
}

func TestReserveBesideRegistrations(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a, b, c := host(t, addr, nameA), host(t, addr, nameB), host(t, addr, nameC)
	reserve, release := []byte{0x16, 0, 0, 0, 0, 0}, []byte{0x17, 0, 0, 0, 0, 0}
	a.pr(prRegister, 0, 0, 0xa, 0)
	b.pr(prRegister, 0, 0, 0xb, 0)
	for _, i := range []*initiator{a, b, c} {
		i.wants("RESERVE beside registrations", i.do(reserve, nil, 0), conflict)
		i.wants("RELEASE beside registrations", i.do(release, nil, 0), conflict)
	}
	a.pr(prReserve, typeWriteExclusive, 0xa, 0, 0)
	for _, i := range []struct {
		*initiator
		want byte
	}{{a, good}, {b, conflict}, {c, conflict}} {
		i.wants("RESERVE beside Write Exclusive", i.do(reserve, nil, 0), i.want)
		i.wants("RELEASE beside Write Exclusive", i.do(release, nil, 0), i.want)
	}
	a.pr(prPreempt, typeAccessRegistrantsOnly, 0xa, 0xa, 0)
	b.wants("another type", b.do(tur, nil, 0), attnReservationsReleased)
	b.good(reserve, nil, 0)
	c.wants("RESERVE of a stranger", c.do(reserve, nil, 0), conflict)
	// They established nothing.
	a.good(rw16(0x8a, 0, 1), pattern(512, 1), 0)
	b.good(release, nil, 0)
	if key, kind := a.reservation(); key != 0xa || kind != typeAccessRegistrantsOnly {
		t.Fatalf("key %x type %d", key, kind)
	}
}
