package target

import (
	"net/netip"
	"sync"
	"testing"
	"time"
)

func (i *initiator) named(t *testing.T, addr, name string, isid byte) *initiator {
	t.Helper()
	o := loginOptions{name: name, target: iqn}
	o.isid[5] = isid
	i, status := tryLogin(t, addr, o)
	if status != 0 {
		t.Fatalf("%s: login status %04Xh", name, status)
	}
	return i
}

// Caught at the first run each: with the rules replaced and the sessions not made to look
// again, one that was shut out of a unit goes on with it; with nobody dropped, who is not
// admitted to any unit keeps the session.
func TestAdmitChangesWhoSeesAUnitAndDisturbsNobodyElse(t *testing.T) {
	const stays, leaves, comes = "iqn.2026-11.net.example:stays", "iqn.2026-11.net.example:leaves", "iqn.2026-11.net.example:comes"
	list := func(names ...string) (all []Initiator) {
		for _, n := range names {
			all = append(all, Initiator{Name: n, Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}})
		}
		return all
	}
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: list(stays, leaves)},
		Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64), Initiators: list(stays)})
	var none *initiator
	a, b := none.named(t, addr, stays, 1), none.named(t, addr, leaves, 2)
	for _, i := range []*initiator{a, b} {
		i.do(tur, nil, 0) // a unit attention
		i.good(tur, nil, 0)
	}
	a.lun = 1
	a.do(tur, nil, 0)
	a.good(tur, nil, 0)
	a.lun = 0
	if _, status := tryLogin(t, addr, loginOptions{name: comes, target: iqn}); status == 0 {
		t.Fatal("a stranger came in")
	}

	if err := s.Admit(iqn, 0, list(stays, comes), nil); err != nil {
		t.Fatal(err)
	}
	// Not even a unit attention.
	for lun := range uint64(2) {
		a.lun = lun
		a.good(tur, nil, 0)
	}
	b.expectClosed()
	if _, status := tryLogin(t, addr, loginOptions{name: leaves, target: iqn}); status == 0 {
		t.Error("who is not admitted any more came in again")
	}
	none.named(t, addr, comes, 3)

	// A session that keeps one unit of the target stays, and is told of the other.
	if err := s.Admit(iqn, 1, list(comes), nil); err != nil {
		t.Fatal(err)
	}
	a.lun = 0
	if r := a.do(tur, nil, 0); !r.is(attnLUNsChanged) {
		t.Errorf("the session that lost a unit is told %v", r)
	}
	a.good(tur, nil, 0)
	a.lun = 1
	for range 2 { // the first might be a unit attention
		if r := a.do(tur, nil, 0); r.status == 0 {
			t.Error("a unit that admits the session no more takes its command")
		}
	}
	for _, bad := range []error{
		s.Admit(iqn, 9, nil, nil), s.Admit(iqn, 0, nil, []uint16{0}), s.Admit(iqn, 0, []Initiator{{Name: ""}}, nil),
	} {
		if bad == nil {
			t.Error("a wrong rule was taken")
		}
	}
	// Portal groups count as at AddUnit.
	if err := s.Admit(iqn, 0, list(stays), []uint16{2}); err != nil {
		t.Fatal(err)
	}
	a.expectClosed()
}

func TestAdmitRacesCommandsLoginsAndOtherAdmits(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	var none *initiator
	i := none.named(t, addr, hostName, 1)
	i.do(tur, nil, 0)
	end := time.Now().Add(300 * time.Millisecond)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for n := 0; time.Now().Before(end); n++ {
				rules := []Initiator{{Name: "*"}, {Name: "iqn.2026-11.net.example:other"}}[:1+n%2]
				if err := s.Admit(iqn, 0, rules, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for time.Now().Before(end) {
			j, status := tryLogin(t, addr, loginOptions{name: hostName, target: iqn, discovery: false, isid: [6]byte{0, 0, 0, 0, 0, 9}})
			if status != 0 {
				t.Errorf("login status %04Xh", status)
			}
			j.nc.Close()
		}
	})
	for time.Now().Before(end) {
		i.good(tur, nil, 0)
	}
	wg.Wait()
}
