package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"lunshift/lun"
)

// arrayIdentity is the identity of a unit of an array: designators of every kind, with a
// serial number that no text would survive.
func arrayIdentity() *lun.Identity {
	id := &lun.Identity{Standard: []byte("ACME    Array 9\x00\x80       1.2 "), Serial: []byte("  S-0042 \x00\xff")}
	id.Designators = designator(id.Designators, 0x01, 0x03, []byte{0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
	id.Designators = designator(id.Designators, 0x02, 0x01, []byte("ACME    lun 0042"))
	id.Designators = designator(id.Designators, 0x03, 0x08, []byte("naa.60010203\x00\x00\x00\x00"))
	return id
}

func inquiryOf(i *initiator, evpd, page byte) []byte {
	i.t.Helper()
	r := i.do([]byte{0x12, evpd, page, 0x10, 0, 0}, nil, 4096)
	if r.status != 0 {
		i.t.Fatalf("INQUIRY of page %02Xh: %+v", page, r)
	}
	return r.data
}

// portOf is the relative target port identifier and the target port group of page 83h.
func portOf(t *testing.T, page []byte) (port, group uint16) {
	t.Helper()
	for d := page[4:]; len(d) >= 4; d = d[4+int(d[3]):] {
		switch d[1] {
		case 0x94:
			port = binary.BigEndian.Uint16(d[6:])
		case 0x95:
			group = binary.BigEndian.Uint16(d[6:])
		}
	}
	if port == 0 || group == 0 {
		t.Fatalf("no relative target port or no target port group in % x", page)
	}
	return port, group
}

// Caught: designators of the array's ports taken over with those of the unit; the serial
// number trimmed; vendor and product swapped by one byte.
func TestUnitAnswersForTheOneWhoseIdentityItHas(t *testing.T) {
	id := arrayIdentity()
	s, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: newMemory(512, 64), Vendor: "OTHER", Serial: "other", NAA: 7, Identity: id},
		Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	i.lun = 0
	if b := inquiryOf(i, 0, 0); !bytes.Equal(b[8:36], id.Standard) || b[5]&0x30 != 0x10 {
		t.Errorf("standard data: % x", b)
	}
	if b := inquiryOf(i, 1, 0x80); !bytes.Equal(b[4:], id.Serial) || int(b[3]) != len(id.Serial) {
		t.Errorf("page 80h: % x", b)
	}
	b := inquiryOf(i, 1, 0x83)
	if !bytes.HasPrefix(b[4:], id.Designators) {
		t.Errorf("page 83h: % x", b)
	}
	for d := b[4+len(id.Designators):]; len(d) > 0; d = d[4+int(d[3]):] {
		if d[1]>>4&3 != 1 {
			t.Errorf("a designator that is neither the identity's nor of the port: % x", d[:4+int(d[3])])
		}
	}
	if port, group := portOf(t, b); port != foreignPort|1 || group != targetPortGroup {
		t.Errorf("port %04Xh of group %04Xh", port, group)
	}
	if r := i.do(tur, nil, 0); r.status != 0 {
		t.Errorf("TEST UNIT READY: %+v", r)
	}
	i.lun = 1 // of its own
	if b := inquiryOf(i, 0, 0); !bytes.Equal(b[8:36], []byte("LUNSHIFTVIRTUAL-DISK    1   ")) {
		t.Errorf("standard data of a unit of its own: % x", b)
	}
	if port, _ := portOf(t, inquiryOf(i, 1, 0x83)); port != 1 {
		t.Errorf("port %04Xh of a unit of its own", port)
	}

	bare := *id
	bare.Serial = nil
	if err := s.SetIdentity(iqn, 0, &bare); err != nil {
		t.Fatal(err)
	}
	i.lun = 0
	if b := inquiryOf(i, 1, 0); slices.Contains(b[4:], 0x80) {
		t.Errorf("pages of a unit without a serial number: % x", b)
	}
	if r := i.do([]byte{0x12, 1, 0x80, 0, 255, 0}, nil, 255); r.status != 2 || r.key != keyIllegalRequest {
		t.Errorf("page 80h of a unit without a serial number: %+v", r)
	}
}

// What hosts know of a unit of its own stays: names are what they mount by.
func TestOwnIdentityIsWhatItAlwaysWas(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: newMemory(512, 64), Vendor: "LUNSHIFT", Product: "VOLUME", Serial: "0123456789abcdef", NAA: 0x3123456789abcdef})
	i := login(t, addr, loginOptions{})
	if b := inquiryOf(i, 0, 0); string(b[8:36]) != "LUNSHIFTVOLUME          1   " {
		t.Errorf("standard data: %q", b[8:36])
	}
	if b := inquiryOf(i, 1, 0x80); string(b) != "\x00\x80\x00\x100123456789abcdef" {
		t.Errorf("page 80h: %q", b)
	}
	want := "\x01\x03\x00\x08\x31\x23\x45\x67\x89\xab\xcd\xef" + "\x02\x01\x00\x18LUNSHIFT0123456789abcdef" + "\x51\x94\x00\x04\x00\x00\x00\x01"
	if b := inquiryOf(i, 1, 0x83); string(b[4:4+len(want)]) != want {
		t.Errorf("page 83h: %q", b)
	}
}

func TestBadIdentityIsRefused(t *testing.T) {
	s, _ := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	for name, spoil := range map[string]func(*lun.Identity){
		"short names":            func(i *lun.Identity) { i.Standard = i.Standard[:27] },
		"no designator":          func(i *lun.Identity) { i.Designators = nil },
		"a designator cut off":   func(i *lun.Identity) { i.Designators = i.Designators[:len(i.Designators)-1] },
		"a designator of a port": func(i *lun.Identity) { i.Designators[1] |= 0x10 },
		"too many designators":   func(i *lun.Identity) { i.Designators = bytes.Repeat(i.Designators, 100) },
		"a serial without end":   func(i *lun.Identity) { i.Serial = make([]byte, 5000) },
	} {
		id := arrayIdentity()
		spoil(id)
		if err := s.SetIdentity(iqn, 0, id); err == nil || !strings.Contains(err.Error(), iqn) {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.AddUnit(Unit{IQN: iqn, LUN: 3, Device: newMemory(512, 64), Identity: id}); err == nil {
			t.Errorf("%s: added", name)
		}
	}
	high, err := New(Config{Portals: []Portal{{Address: "127.0.0.1:0", Group: 0x8001}}})
	if err != nil {
		t.Fatal(err)
	}
	defer high.Close()
	if err := high.AddUnit(Unit{IQN: iqn, Device: newMemory(512, 64), Identity: arrayIdentity()}); err == nil || !strings.Contains(err.Error(), "portal group 32769") {
		t.Errorf("a portal group that would be the port of another: %v", err)
	}
	if err := high.AddUnit(Unit{IQN: iqn, Device: newMemory(512, 64)}); err != nil {
		t.Errorf("a unit of its own there: %v", err)
	}
}

// portGroups asks by REPORT TARGET PORT GROUPS and gives the states by group, with the
// ports of each.
func portGroups(t *testing.T, i *initiator, extended bool) (states map[uint16]byte, ports map[uint16][]uint16) {
	t.Helper()
	cdb := []byte{0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}
	header := 4
	if extended {
		cdb[1] |= 0x20
		header = 8
	}
	r := i.do(cdb, nil, 256)
	if r.status != 0 || len(r.data) < header || int(binary.BigEndian.Uint32(r.data)) != len(r.data)-4 {
		t.Fatalf("REPORT TARGET PORT GROUPS: %+v", r)
	}
	if extended && r.data[4] != 0x10 {
		t.Errorf("extended header: % x", r.data[:8])
	}
	states, ports = map[uint16]byte{}, map[uint16][]uint16{}
	for d := r.data[header:]; len(d) > 0; {
		g := binary.BigEndian.Uint16(d[2:])
		states[g] = d[0]
		n := int(d[7])
		for k := range n {
			ports[g] = append(ports[g], binary.BigEndian.Uint16(d[8+4*k+2:]))
		}
		d = d[8+4*n:]
	}
	return states, ports
}

// Caught: the state left as it was; the unit attention only on the session that asks first;
// nothing for an initiator that is away.
func TestEveryInitiatorIsToldOfAnotherAccessState(t *testing.T) {
	s, addrs := beginAt(t, Config{}, []Portal{{Address: "127.0.0.1:0"}, {Address: "127.0.0.1:0", Group: 2}},
		Unit{IQN: iqn, Device: newMemory(512, 64), Identity: arrayIdentity(), Access: ActiveNonOptimized})
	one := login(t, addrs[0], loginOptions{})
	two := login(t, addrs[1], loginOptions{name: "iqn.2026-11.net.example:second"})
	away := login(t, addrs[0], loginOptions{name: "iqn.2026-11.net.example:away"})
	away.logout()
	waitFor(t, "the end of the session", func() bool { return len(s.Sessions(iqn)) == 2 })

	for _, i := range []*initiator{one, two} {
		for _, extended := range []bool{false, true} {
			states, ports := portGroups(t, i, extended)
			if len(states) != 1 || states[targetPortGroup] != 0x01 {
				t.Errorf("states: %v", states)
			}
			if !slices.Equal(ports[targetPortGroup], []uint16{foreignPort | 1, foreignPort | 2}) {
				t.Errorf("ports: %04X", ports)
			}
		}
		port, group := portOf(t, inquiryOf(i, 1, 0x83))
		if _, ports := portGroups(t, i, false); !slices.Contains(ports[group], port) {
			t.Errorf("port %04Xh of group %04Xh is not among %04X", port, group, ports)
		}
	}
	if r := one.do([]byte{0xa3, 0x4a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, nil, 256); r.status != 2 || r.key != keyIllegalRequest || r.asc != 0x24 {
		t.Errorf("a parameter data format that does not exist: %+v", r)
	}

	for range 2 { // the second time it is no news
		if err := s.SetAccess(iqn, 0, ActiveOptimized); err != nil {
			t.Fatal(err)
		}
	}
	away = login(t, addrs[0], loginOptions{name: "iqn.2026-11.net.example:away"}) // and takes I_T NEXUS LOSS
	for k, i := range []*initiator{one, two, away} {
		if told := i.attentions(); !slices.Equal(told, []sense{attnAccessChanged}) {
			t.Errorf("initiator %d is told %v", k, told)
		}
		if states, _ := portGroups(t, i, false); states[targetPortGroup] != 0x80 {
			t.Errorf("initiator %d finds %v", k, states)
		}
	}
}

// Caught: INQUIRY answered from before with the unit attention already given.
func TestEveryInitiatorIsToldOfAnotherIdentity(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	one, two := login(t, addr, loginOptions{}), login(t, addr, loginOptions{name: "iqn.2026-11.net.example:second"})
	own := inquiryOf(one, 1, 0x83)
	told := func(want ...sense) {
		t.Helper()
		for _, i := range []*initiator{one, two} {
			if got := i.attentions(); !slices.Equal(got, want) {
				t.Errorf("told %v, not %v", got, want)
			}
		}
	}
	for _, id := range []*lun.Identity{arrayIdentity(), nil} {
		if err := s.SetIdentity(iqn, 0, id); err != nil {
			t.Fatal(err)
		}
		told(attnInquiryChanged)
		if err := s.SetIdentity(iqn, 0, id); err != nil {
			t.Fatal(err)
		}
		told()
		if id != nil && !bytes.HasPrefix(inquiryOf(two, 1, 0x83)[4:], id.Designators) {
			t.Error("the designators are those from before")
		}
	}
	if b := inquiryOf(one, 1, 0x83); !bytes.Equal(b, own) {
		t.Errorf("its own again: % x", b)
	}
}

// An initiator that has other ways to the unit takes one of these when this one is closed
// for good, and waits here when it is not.
// Caught: BECOMING READY in both cases; REPORT TARGET PORT GROUPS refused.
func TestRetiredUnitSaysWhetherToWaitOrToGoElsewhere(t *testing.T) {
	for _, elsewhere := range []bool{false, true} {
		s, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: newMemory(512, 64), Identity: arrayIdentity()},
			Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64)}) // which keeps the session
		i := login(t, addr, loginOptions{})
		if elsewhere {
			if err := s.SetAccess(iqn, 0, Unavailable); err != nil {
				t.Fatal(err)
			}
			i.attentions()
		}
		if err := s.Retire(context.Background(), iqn, 0); err != nil {
			t.Fatal(err)
		}
		want := senseBecomingReady
		if elsewhere {
			want = senseUnavailable
		}
		if r := i.do(tur, nil, 0); !r.is(want) {
			t.Errorf("elsewhere %v: %+v", elsewhere, r)
		}
		// It is by this that it learns of the state (SPC-4 5.15.2).
		if states, _ := portGroups(t, i, false); elsewhere && states[targetPortGroup]&0xf != byte(Unavailable) {
			t.Errorf("its state is %#x", states[targetPortGroup])
		}
		if b := inquiryOf(i, 1, 0x83); !bytes.HasPrefix(b[4:], arrayIdentity().Designators) {
			t.Errorf("INQUIRY: % x", b)
		}
	}
}

// The port that READ FULL STATUS names is the port of page 83h, and what REGISTER AND MOVE
// takes.
// Caught: the portal group tag in either.
func TestReservationsNameThePortsThatInquiryNames(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Identity: arrayIdentity()})
	i := login(t, addr, loginOptions{})
	port, _ := portOf(t, inquiryOf(i, 1, 0x83))
	i.pr(prRegister, 0, 0, 1, 0)
	i.pr(prReserve, typeWriteExclusive, 1, 0, 0)
	if all := i.fullStatus(); len(all) != 1 || all[0].port != port {
		t.Errorf("READ FULL STATUS: %+v", all)
	}
	name := []byte("iqn.2026-11.net.example:other,i,0x800000000001\x00\x00")
	id := append([]byte{0x45, 0, 0, byte(len(name))}, name...)
	move := func(port uint16) result {
		list := prList(1, 2, 0, id...)
		binary.BigEndian.PutUint16(list[18:], port)
		list[23] = byte(len(id))
		return i.do(prOutCDB(prRegisterAndMove, typeWriteExclusive, len(list)), list, 0)
	}
	if r := move(1); !r.is(senseParamField) {
		t.Errorf("REGISTER AND MOVE to port 1: %+v", r)
	}
	if r := move(port); r.status != 0 {
		t.Errorf("REGISTER AND MOVE to port %04Xh: %+v", port, r)
	}
}
