package target

import (
	"context"
	"strings"
	"testing"
	"time"

	"lunshift/iscsi"
)

// loginLater logs in beside the test; the status comes when the login was answered.
func loginLater(t testing.TB, addr string, o loginOptions) <-chan uint16 {
	i := dial(t, addr)
	status := make(chan uint16, 1)
	go func() { status <- i.tryLogin(o) }()
	return status
}

// Caught: logins that are let in during the departure; that are not let in after it; that
// go on with what was true before it.
func TestWhoLeftWaitsUntilItIsDecidedWhereToGo(t *testing.T) {
	for _, moved := range []bool{false, true} {
		s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
		i := login(t, addr, loginOptions{})
		d, err := s.Depart(Place{strings.ToUpper(iqn), 0})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Depart(Place{iqn, 0}); err == nil {
			t.Error("a second departure at the same time")
		}
		left := make(chan []SessionInfo, 1)
		go func() { left <- d.Wait(t.Context()) }()
		if p := i.recv(); p.Opcode() != iscsi.OpAsync || p.AsyncEvent() != iscsi.AsyncLogoutRequest {
			t.Fatalf("got %v", p.Opcode())
		}
		i.good(rw16(0x88, 0, 1), nil, 512) // who stays is served on
		i.logout()
		if stayed := <-left; len(stayed) > 0 {
			t.Errorf("still there: %v", stayed)
		}
		again := loginLater(t, addr, loginOptions{})
		select {
		case st := <-again:
			t.Fatalf("answered with %04Xh before it was decided", st)
		case <-time.After(50 * time.Millisecond):
		}
		want := uint16(0)
		if moved {
			want = iscsi.LoginMovedTemporarily
			if err := s.Redirect(iqn, Redirection{Address: "192.0.2.1:3260", Initiators: []Initiator{{Name: "*"}}}); err != nil {
				t.Fatal(err)
			}
			if err := s.Retire(t.Context(), iqn, 0); err != nil {
				t.Fatal(err)
			}
		}
		d.End()
		d.End()
		if st := <-again; st != want {
			t.Errorf("moved=%v: status %04Xh", moved, st)
		}
		if d, err = s.Depart(Place{iqn, 0}); err != nil {
			t.Errorf("another departure: %v", err)
		} else {
			d.End()
		}
	}
}

// Caught: a login that waits without end; one that counts as a failure of its address.
func TestLoginDuringADepartureIsRefusedAsBusyBeforeItsInitiatorGivesUp(t *testing.T) {
	s, addr := begin(t, Config{LoginTimeout: 200 * time.Millisecond, LoginFailures: 1}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	d, err := s.Depart(Place{iqn, 0})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, st := tryLogin(t, addr, loginOptions{}); st != iscsi.LoginServiceUnavailable {
			t.Errorf("status %04Xh", st)
		}
	}
	d.End()
	login(t, addr, loginOptions{})
}

// Caught: a drop of nobody; sessions that are named after they left.
func TestWhoStaysIsNamedAndServedAndDroppedOnlyWhenTold(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	stays := login(t, addr, loginOptions{name: nameA})
	leaves := login(t, addr, loginOptions{name: nameB})
	d, err := s.Depart(Place{iqn, 0})
	if err != nil {
		t.Fatal(err)
	}
	defer d.End()
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan []SessionInfo, 1)
	go func() { left <- d.Wait(ctx) }()
	leaves.logout()
	for end := deadline(); len(s.Sessions(iqn)) > 1 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	cancel()
	stayed := <-left
	if len(stayed) != 1 || stayed[0].Initiator != nameA || stayed[0].Address != stays.nc.LocalAddr().String() {
		t.Errorf("stayed: %+v", stayed)
	}
	stays.good(rw16(0x8a, 0, 1), pattern(512, 1), 0)
	d.Drop()
	stays.expectClosed()
	if n := s.Sessions(iqn); len(n) > 0 {
		t.Errorf("left: %v", n)
	}
}

// A session is with all units of its target: while one of them stays, nobody is asked to go.
// Caught: others asked although a unit of theirs stays; nobody asked although all go.
func TestInitiatorsOfATargetLeaveWithItsLastUnit(t *testing.T) {
	m := newMemory(512, 64)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m}, Unit{IQN: iqn, LUN: 1, Device: m}, Unit{IQN: iqn + ".other", Device: m})
	other := login(t, addr, loginOptions{target: iqn + ".other"})
	i := login(t, addr, loginOptions{})
	d, err := s.Depart(Place{iqn, 1})
	if err != nil {
		t.Fatal(err)
	}
	if stayed := d.Wait(t.Context()); len(stayed) > 0 {
		t.Errorf("asked to leave: %v", stayed)
	}
	j := login(t, addr, loginOptions{isid: iscsi.ISID{7}}) // nobody is kept out either
	j.logout()
	d.End()
	both, err := s.Depart(Place{iqn, 0}, Place{iqn, 1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if stayed := both.Wait(ctx); len(stayed) != 1 {
		t.Errorf("of both units: %v", stayed)
	}
	both.End()
	if err := s.Retire(t.Context(), iqn, 0); err != nil {
		t.Fatal(err)
	}
	last, err := s.Depart(Place{iqn, 1})
	if err != nil {
		t.Fatal(err)
	}
	defer last.End()
	left := make(chan []SessionInfo, 1)
	go func() { left <- last.Wait(t.Context()) }()
	i.logout()
	if stayed := <-left; len(stayed) > 0 {
		t.Errorf("of the last unit: %v", stayed)
	}
	other.good(rw16(0x88, 0, 1), nil, 512)
	if len(other.events) > 0 {
		t.Error("another target's session was asked to leave")
	}
	if _, err := s.Depart(Place{iqn, 9}); err == nil {
		t.Error("a departure of a unit that is not there")
	}
}

// Caught: a redirection that never ends; one that is over from its beginning.
func TestRedirectionEndsInARefusalWithItsReason(t *testing.T) {
	for _, units := range [][]Unit{nil, {{IQN: iqn, Device: newMemory(512, 64)}}} {
		s, addr := begin(t, Config{LoginFailures: 1}, units...)
		all := []Initiator{{Name: "*"}}
		for _, tc := range []struct {
			name   string
			r      Redirection
			want   uint16
			listed bool
		}{
			{"to come", Redirection{Address: "192.0.2.1:3260", Until: time.Now().Add(time.Hour)}, iscsi.LoginMovedTemporarily, true},
			{"over", Redirection{Address: "192.0.2.1:3260", Until: time.Now().Add(-time.Second)}, iscsi.LoginTargetRemoved, false},
			{"nowhere", Redirection{Removed: true}, iscsi.LoginTargetRemoved, false},
		} {
			tc.r.Initiators = all
			if err := s.Redirect(iqn, tc.r); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if _, st := tryLogin(t, addr, loginOptions{}); st != tc.want {
					t.Errorf("%s: status %04Xh", tc.name, st)
				}
			}
			if got := login(t, addr, loginOptions{discovery: true}).sendTargets(); strings.Contains(got, iqn) != tc.listed {
				t.Errorf("%s: discovery lists %q", tc.name, got)
			}
		}
		if _, st := tryLogin(t, addr, loginOptions{target: iqn + ".none"}); st != iscsi.LoginNotFound {
			t.Errorf("another target: %04Xh", st)
		}
	}
}
