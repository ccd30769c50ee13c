package target

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"lunshift/iscsi"
)

// A host that is not admitted any more does not keep a unit by a RESERVE, whether its session ends by
// that or goes on with another unit. Caught: a session that releases what it sees alone.
func TestAReserveEndsWhereItsHostIsNotAdmittedAnyMore(t *testing.T) {
	for _, other := range []bool{false, true} {
		units := []Unit{{IQN: iqn, Device: newMemory(512, 64), Initiators: []Initiator{{Name: nameA}, {Name: nameB}}}}
		if other {
			units = append(units, Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64), Initiators: []Initiator{{Name: nameA}}})
		}
		s, addr := begin(t, Config{}, units...)
		a, b := host(t, addr, nameA), host(t, addr, nameB)
		a.good([]byte{0x16, 0, 0, 0, 0, 0}, nil, 0)
		b.wants("a write beside the RESERVE", b.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), conflict)
		if err := s.Admit(iqn, 0, []Initiator{{Name: nameB}}, nil); err != nil {
			t.Fatal(err)
		}
		if n := len(s.Sessions(iqn)); other && n != 2 {
			t.Fatalf("%d sessions", n)
		}
		b.wants("the write after it", b.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), good)
	}
}

// A RESERVE that runs while another host resets the unit is done before it, or not at all. Caught: a release
// before what runs is aborted.
func TestAReserveThatAResetAbortedIsNotInForce(t *testing.T) {
	for range 10 {
		s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
		a, b := host(t, addr, nameA), host(t, addr, nameB)
		_, u, err := s.mapped(iqn, 0)
		if err != nil {
			t.Fatal(err)
		}
		of := s.sessions(iqn)
		ca := of[slices.IndexFunc(of, func(c *conn) bool { return c.initiator == nameA })]
		u.reserved.turn <- struct{}{} // as by a PERSISTENT RESERVE OUT that is being saved
		a.start(a.command([]byte{0x16, 0, 0, 0, 0, 0}, 0, 0), nil)
		waitFor(t, "the RESERVE to come", func() bool {
			ca.mu.Lock()
			defer ca.mu.Unlock()
			return len(ca.tasks) == 1
		})
		ca.mu.Lock() // the reset comes as far as this session
		ref := b.tmf(iscsi.TMFLUNReset, 0)
		time.Sleep(2 * time.Millisecond)
		<-u.reserved.turn
		time.Sleep(2 * time.Millisecond)
		ca.mu.Unlock()
		if p := b.recv(); p.ITT() != ref || p.Response() != iscsi.TMFComplete {
			t.Fatalf("%v answers the reset", p.Opcode())
		}
		if i, err := s.Reservation(iqn, 0); err != nil || i.Type != "" {
			t.Fatalf("after the reset: %v, %+v", err, i)
		}
		s.Close()
	}
}

// Names do not differ by their capitals, in TransportIDs neither (RFC 7143 4.2.7.2). Caught: a reservation that
// moves to a name which no session can have.
func TestAReservationMovesToANameWithCapitals(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	const upper = "iqn.2026-11.net.example:B"
	a := host(t, addr, nameA)
	b := login(t, addr, loginOptions{name: upper, isid: isidOf(nameB)})
	b.do(tur, nil, 0)
	a.pr(prRegister, 0, 0, 0xa, 0)
	a.pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
	id := testID(upper, isidOf(nameB))
	p := prList(0xa, 7, 0)
	p[17] = 2 // UNREG
	binary.BigEndian.PutUint16(p[18:], 1)
	binary.BigEndian.PutUint32(p[20:], uint32(len(id)))
	p = append(p, id...)
	a.wants("the move", a.do(prOutCDB(prRegisterAndMove, typeExclusiveAccess, len(p)), p, 0), good)
	b.wants("a write of the new holder", b.do(rw16(0x8a, 0, 1), pattern(512, 1), 0), good)
	b.wants("its release", b.prOut(prRelease, typeExclusiveAccess, 7, 0, 0), good)
}

// Who sees a unit again learns what became of its registration meanwhile. Caught: POWER ON alone.
func TestWhoSeesAUnitAgainLearnsOfItsRegistration(t *testing.T) {
	both := []Initiator{{Name: nameA}, {Name: nameB}}
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: both},
		Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64), Initiators: both[:1]})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	admit := func(who []Initiator) {
		t.Helper()
		if err := s.Admit(iqn, 0, who, nil); err != nil {
			t.Fatal(err)
		}
	}
	a.pr(prRegister, 0, 0, 0xa, 0)
	b.pr(prRegister, 0, 0, 0xb, 0)
	b.pr(prReserve, typeWriteRegistrantsOnly, 0xb, 0, 0)
	b.pr(prRelease, typeWriteRegistrantsOnly, 0xb, 0, 0) // a is to be told, and sees the unit no more
	admit(both[1:])
	b.pr(prPreempt, 0, 0xb, 0xa, 0)
	admit(both)
	if got, want := a.attentions(), []sense{attnPowerOn, attnReservationsReleased, attnRegistrationsPreempted}; !slices.Equal(got, want) {
		t.Errorf("it finds %v, not %v", got, want)
	}
}

// To a registrant that was away over a restart the restart comes first. Caught: I_T NEXUS LOSS, as of a session that
// this start never had.
func TestARegistrantThatWasAwayOverARestartLearnsOfIt(t *testing.T) {
	k := &keeper{}
	s, addr := k.serve(t)
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	a.pr(prRegister, 0, 0, 0xa, flagAPTPL)
	b.pr(prRegister, 0, 0, 0xb, flagAPTPL)
	b.pr(prReserve, typeWriteRegistrantsOnly, 0xb, 0, 0)
	s.Close()
	_, addr = k.serve(t)
	b = host(t, addr, nameB)
	b.pr(prRelease, typeWriteRegistrantsOnly, 0xb, 0, 0)
	a = enter(t, addr, nameA)
	if got, want := a.attentions(), []sense{attnPowerOn, attnReservationsReleased}; !slices.Equal(got, want) {
		t.Errorf("it finds %v, not %v", got, want)
	}
}

// SPEC_I_PT is for who registers itself with it (SPC-4 5.12.7), whomever the list names. Caught: a list that is
// empty, or has the sender alone, taken for none.
func TestWhoIsRegisteredSpecifiesNobody(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a := host(t, addr, nameA)
	a.pr(prRegister, 0, 0, 0xa, 0)
	for _, ids := range [][]byte{nil, testID(nameA, isidOf(nameA)), testID(nameB, isidOf(nameB))} {
		list := append(binary.BigEndian.AppendUint32(nil, uint32(len(ids))), ids...)
		if r := a.prOut(prRegister, 0, 0xa, 0xb, flagSpecIP, list...); !r.is(senseInvalidField) {
			t.Errorf("with %d bytes: %v", len(ids), r)
		}
	}
}

// A list of as many TransportIDs as fit, for many portals, is refused before they are all told apart, which takes
// the square of them. Caught: that, by 64 portals and half a minute.
func TestTooManyTransportIDsAreRefusedEarly(t *testing.T) {
	var portals []Portal
	for g := range 64 {
		portals = append(portals, Portal{"127.0.0.1:0", uint16(g + 1)})
	}
	_, at := beginAt(t, Config{}, portals, Unit{IQN: iqn, Device: newMemory(512, 64)})
	a := host(t, at[0], nameA)
	var ids []byte
	for n := 0; len(ids) < 65000; n++ {
		ids = append(ids, testID(fmt.Sprintf("i%04d", n), iscsi.ISID{1})...)
	}
	list := append(binary.BigEndian.AppendUint32(nil, uint32(len(ids))), ids...)
	began := time.Now()
	if r := a.prOut(prRegister, 0, 0, 1, flagSpecIP|flagAllTG, list...); !r.is(senseNoRegistrations) || time.Since(began) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(began), r)
	}
}
