package target

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"lunshift/iscsi"
	"lunshift/lun"
)

// beginAt is begin with portals of the test's choice; it gives their addresses.
func beginAt(t testing.TB, cfg Config, portals []Portal, units ...Unit) (*Server, []string) {
	t.Helper()
	cfg.Portals = portals
	if cfg.Log == nil {
		cfg.Log = logTo(t)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range units {
		if err := s.AddUnit(u); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background()) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != ErrClosed {
			t.Errorf("Serve gave %v", err)
		}
	})
	waitFor(t, "the server", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.serving
	})
	var at []string
	for _, a := range s.Addrs() {
		at = append(at, a.String())
	}
	return s, at
}

func needIPv6(t testing.TB) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("this host has no IPv6 loopback: %v", err)
	}
	l.Close()
}

// addresses are the lines of a SendTargets answer that follow a target's name.
func addresses(text, target string) (out []string) {
	mine := false
	for line := range strings.SplitSeq(text, "\x00") {
		if v, ok := strings.CutPrefix(line, "TargetName="); ok {
			mine = v == target
		} else if v, ok := strings.CutPrefix(line, "TargetAddress="); ok && mine {
			out = append(out, v)
		}
	}
	return out
}

func TestPortalsLeadToTheUnitsOfTheirGroupAndNoOther(t *testing.T) {
	needIPv6(t)
	m := newMemory(512, 64)
	one, two := iqn+".one", iqn+".two"
	_, at := beginAt(t, Config{}, []Portal{{Address: "127.0.0.1:0", Group: 1}, {Address: "127.0.0.2:0", Group: 2}, {Address: "[::1]:0", Group: 2}},
		Unit{IQN: one, Device: m, PortalGroups: []uint16{1}},
		Unit{IQN: two, Device: m, PortalGroups: []uint16{2}},
		Unit{IQN: iqn, LUN: 0, Device: m, PortalGroups: []uint16{1}}, Unit{IQN: iqn, LUN: 1, Device: m})
	for k, group := range []string{"1", "2", "2"} {
		got := login(t, at[k], loginOptions{discovery: true}).sendTargets()
		for target, want := range map[string]string{
			one: fmt.Sprint([]string{at[0] + ",1"}),
			two: fmt.Sprint([]string{at[1] + ",2", at[2] + ",2"}),
			iqn: fmt.Sprint([]string{at[0] + ",1", at[1] + ",2", at[2] + ",2"}),
		} {
			if a := fmt.Sprint(addresses(got, target)); a != want {
				t.Errorf("at %s %s has %s, want %s", at[k], target, a, want)
			}
		}
		i := dial(t, at[k])
		p, keys := i.loginRequest(iscsi.FlagTransit, 0, 1, names(false)...)
		if g, _ := iscsi.Lookup(keys, "TargetPortalGroupTag"); p.LoginStatus() != 0 || g != group {
			t.Errorf("at %s: status %04Xh, TargetPortalGroupTag %q", at[k], p.LoginStatus(), g)
		}
		for target, groups := range map[string]string{one: "1", two: "2"} {
			want := uint16(0)
			if group != groups {
				want = iscsi.LoginNotFound
			}
			if _, st := tryLogin(t, at[k], loginOptions{target: target}); st != want {
				t.Errorf("at %s %s: status %04Xh", at[k], target, st)
			}
		}
	}
	// LUN 0 of the shared target is in group 1 alone.
	i := login(t, at[2], loginOptions{})
	if r := i.do(rw16(0x88, 0, 1), nil, 512); !r.is(senseNoUnit) {
		t.Errorf("LUN 0 in group 2: %v", r)
	}
	i.lun = 1
	i.do(tur, nil, 0)
	i.good(rw16(0x88, 0, 1), nil, 512)
}

func TestPortalOnAllAddressesIsTheOneTheInitiatorCameTo(t *testing.T) {
	needIPv6(t)
	_, at := beginAt(t, Config{}, []Portal{{Address: "[::]:0"}, {Address: "0.0.0.0:0"}}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	_, six, _ := net.SplitHostPort(at[0])
	_, four, _ := net.SplitHostPort(at[1])
	for from, want := range map[string]string{
		"127.0.0.1:" + four: fmt.Sprint([]string{"127.0.0.1:" + four + ",1"}),
		"127.0.0.5:" + four: fmt.Sprint([]string{"127.0.0.5:" + four + ",1"}),
		"[::1]:" + six:      fmt.Sprint([]string{"[::1]:" + six + ",1"}),
	} {
		got := login(t, from, loginOptions{discovery: true}).sendTargets()
		if a := fmt.Sprint(addresses(got, iqn)); a != want {
			t.Errorf("at %s: %s, want %s", from, a, want)
		}
	}
	mustTool(t, "iscsi-inq", "iscsi://[::1]:"+six+"/"+iqn+"/0")
}

func TestAnotherHostIsNotSentToLoopback(t *testing.T) {
	tcp := func(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
	for _, tc := range []struct{ portal, local, from, want string }{
		{"127.0.0.1:3260", "10.0.0.1:3260", "10.0.0.9", ""},
		{"[::1]:3260", "10.0.0.1:3260", "10.0.0.9", ""},
		{"10.0.0.1:3260", "10.0.0.1:3260", "10.0.0.9", "10.0.0.1:3260"},
		{"0.0.0.0:3261", "10.0.0.1:3260", "10.0.0.9", "10.0.0.1:3261"},
		{"0.0.0.0:3260", "[2001:db8::1]:3260", "2001:db8::9", ""},
		{"[::]:3260", "[2001:db8::1]:3260", "2001:db8::9", "[2001:db8::1]:3260"},
		{"[::]:3260", "10.0.0.1:3260", "10.0.0.9", ""},
		{"0.0.0.0:3260", "[::ffff:10.0.0.1]:3260", "10.0.0.9", "10.0.0.1:3260"},
		{"127.0.0.1:3260", "127.0.0.1:3260", "127.0.0.1", "127.0.0.1:3260"},
		{"10.0.0.1:3260", "127.0.0.1:3260", "127.0.0.1", "10.0.0.1:3260"},
	} {
		got, ok := portalAddress(tcp(tc.portal), tcp(tc.local), netip.MustParseAddr(tc.from))
		if got != tc.want || ok != (tc.want != "") {
			t.Errorf("%+v: %q %v", tc, got, ok)
		}
	}
}

// Initiator name, ISID and portal group make a nexus (RFC 7143 4.4.1).
func TestSameISIDAtAnotherPortalGroupIsAnotherSession(t *testing.T) {
	s, at := beginAt(t, Config{}, []Portal{{Address: "127.0.0.1:0", Group: 1}, {Address: "127.0.0.1:0", Group: 2}, {Address: "127.0.0.1:0", Group: 2}},
		Unit{IQN: iqn, Device: newMemory(512, 64)})
	i, j := login(t, at[0], loginOptions{}), login(t, at[1], loginOptions{})
	i.good(rw16(0x88, 0, 1), nil, 512)
	j.good(rw16(0x88, 0, 1), nil, 512)
	if got := s.Sessions(iqn); len(got) != 2 {
		t.Errorf("sessions: %v", got)
	}
	k := login(t, at[2], loginOptions{}) // the same group
	j.expectClosed()
	i.good(rw16(0x88, 0, 1), nil, 512)
	k.good(rw16(0x88, 0, 1), nil, 512)
}

func TestRedirectedInitiatorsFindTheirUnitElsewhere(t *testing.T) {
	m := newMemory(512, 64)
	_, there := begin(t, Config{}, Unit{IQN: iqn, Device: m, Vendor: "ELSEWHER"})
	login(t, there, loginOptions{}).good(rw16(0x8a, 0, 1), pattern(512, 9), 0)
	for _, units := range [][]Unit{nil, {{IQN: iqn, Device: newMemory(512, 64)}}} {
		for _, permanent := range []bool{false, true} {
			t.Run(fmt.Sprintf("units=%d/permanent=%v", len(units), permanent), func(t *testing.T) {
				s, here := begin(t, Config{}, units...)
				if err := s.Redirect(iqn, Redirection{Address: there, Group: 4, Permanent: permanent}); err != nil {
					t.Fatal(err)
				}
				i := dial(t, here)
				p, keys := i.loginRequest(iscsi.FlagTransit, 0, 1, names(false)...)
				want := uint16(iscsi.LoginMovedTemporarily)
				if permanent {
					want = iscsi.LoginMovedPermanently
				}
				if a, _ := iscsi.Lookup(keys, "TargetAddress"); p.LoginStatus() != want || a != there {
					t.Errorf("status %04Xh, TargetAddress %q", p.LoginStatus(), a)
				}
				i.expectClosed()
				if got := login(t, here, loginOptions{discovery: true}).sendTargets(); fmt.Sprint(addresses(got, iqn)) != "["+there+",4]" {
					t.Errorf("discovery lists %q", got)
				}
				if !permanent { // libiscsi follows 0101h alone
					if out := mustTool(t, "iscsi-inq", url(here, 0)); !strings.Contains(out, "ELSEWHER") {
						t.Errorf("iscsi-inq: %s", out)
					}
				}
				d, err := lun.Open(t.Context(), url(here, 0), lun.Options{InitiatorName: hostName})
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				b := make([]byte, 512)
				if err := d.ReadAt(t.Context(), b, 0); err != nil || string(b) != string(pattern(512, 9)) {
					t.Errorf("read: %v", err)
				}
				s.StopRedirect(iqn)
				want = iscsi.LoginNotFound
				if len(units) > 0 {
					want = 0
				}
				if _, st := tryLogin(t, here, loginOptions{}); st != want {
					t.Errorf("without redirection: %04Xh", st)
				}
			})
		}
	}
}

func TestRedirectionIsToldToThoseOnlyWhoAreAdmitted(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: admitted()})
	if err := s.Redirect(iqn, Redirection{Address: "[2001:db8::1]:3260"}); err != nil {
		t.Fatal(err)
	}
	i := dial(t, addr)
	if p, keys := i.loginRequest(iscsi.FlagTransit, 0, 1, names(false)...); p.LoginStatus() != iscsi.LoginAuthFailed || len(keys) > 0 {
		t.Errorf("without a proof: %04Xh %v", p.LoginStatus(), keys)
	}
	i = dial(t, addr)
	if st := i.prove(proof{own: hostCredentials, algorithm: 8}); st != iscsi.LoginMovedTemporarily {
		t.Errorf("with a proof: %04Xh", st)
	}
	// A retired target sends its initiators on all the same.
	if err := s.Retire(t.Context(), iqn, 0); err != nil {
		t.Fatal(err)
	}
	i = dial(t, addr)
	if st := i.prove(proof{own: hostCredentials, algorithm: 8}); st != iscsi.LoginMovedTemporarily {
		t.Errorf("retired: %04Xh", st)
	}
	for _, bad := range []string{"", "host", "host:0", "host:70000", ":3260", "host:3260,1", "a b:3260", "2001:db8::1:3260"} {
		if err := s.Redirect(iqn, Redirection{Address: bad}); err == nil {
			t.Errorf("address %q was taken", bad)
		}
	}
}

func TestLibiscsiAndQEMUAuthenticate(t *testing.T) {
	mutual := []Initiator{{Name: "*", Authentication: &Authentication{Initiator: iscsi.Credentials{Name: "alice", Secret: "alice1secret2"}, Target: iscsi.Credentials{Name: "array", Secret: "array3secret4"}}}}
	_, addr := begin(t, Config{LoginFailures: 1000}, Unit{IQN: iqn, Device: newMemory(512, 1<<11), Initiators: mutual})
	at := func(who, args string) string { return "iscsi://" + who + "@" + addr + "/" + iqn + "/0" + args }
	both := "?target_user=array&target_password=array3secret4"
	for _, args := range []string{"", both} {
		if out := mustTool(t, "iscsi-inq", at("alice%alice1secret2", args)); !strings.Contains(out, "LUNSHIFT") {
			t.Errorf("iscsi-inq: %s", out)
		}
		if out := mustTool(t, "qemu-img", "info", "-f", "raw", at("alice%alice1secret2", args)); !strings.Contains(out, "1 MiB") {
			t.Errorf("qemu-img: %s", out)
		}
	}
	for _, who := range []string{"alice%alice1secret3", "bob%alice1secret2", ""} {
		u := at(who, "")
		if who == "" {
			u = url(addr, 0)
		}
		if out, err := tool(t, "iscsi-inq", u); err == nil {
			t.Errorf("%q gets in: %s", who, out)
		}
	}
	if out, err := tool(t, "iscsi-inq", at("alice%alice1secret2", "?target_user=array&target_password=array3secret5")); err == nil {
		t.Errorf("a target that does not prove itself is taken: %s", out)
	}
	if out := mustTool(t, "iscsi-ls", "-s", "iscsi://alice%alice1secret2@"+addr); !strings.Contains(out, iqn) {
		t.Errorf("iscsi-ls: %s", out)
	}
	if out, _ := tool(t, "iscsi-ls", "iscsi://"+addr); strings.Contains(out, iqn) {
		t.Errorf("iscsi-ls without a secret: %s", out)
	}
}

func TestOurInitiatorAuthenticatesBothWays(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: admitted()})
	u := "iscsi://alice@" + addr + "/" + iqn + "/0"
	for what, o := range map[string]lun.Options{
		"one way": {Secret: hostSecret},
		"mutual":  {Secret: hostSecret, TargetUser: "array", TargetSecret: arraySecret},
	} {
		o.InitiatorName = hostName
		d, err := lun.Open(t.Context(), u, o)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if err := d.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		d.Close()
	}
	for what, o := range map[string]lun.Options{
		"wrong secret":               {Secret: "a wrong secret"},
		"no secret":                  {},
		"target with another secret": {Secret: hostSecret, TargetUser: "array", TargetSecret: "yet one of its own"},
	} {
		o.InitiatorName = hostName
		if d, err := lun.Open(t.Context(), u, o); err == nil {
			d.Close()
			t.Errorf("%s: it is in", what)
		} else if strings.Contains(err.Error(), hostSecret) || strings.Contains(err.Error(), arraySecret) ||
			o.Secret != "" && strings.Contains(err.Error(), o.Secret) || o.TargetSecret != "" && strings.Contains(err.Error(), o.TargetSecret) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// What README.md says of reservation_by = "initiator-name".
func TestRegistrationsOfANameAreThoseOfAPortalGroup(t *testing.T) {
	_, addrs := two(t, Unit{IQN: iqn, Device: newMemory(512, 64), ReservationsByName: true})
	var to []*initiator
	for n, addr := range []string{addrs[0], addrs[0], addrs[1]} {
		to = append(to, login(t, addr, loginOptions{name: nameA, isid: iscsi.ISID{byte(n + 1)}}))
	}
	to[0].pr(prRegister, 0, 0, 0xa, 0)
	to[0].pr(prReserve, typeExclusiveAccess, 0xa, 0, 0)
	to[1].good(rw16(0x88, 0, 1), nil, 512)
	if r := to[2].do(rw16(0x88, 0, 1), nil, 512); r.status != iscsi.StatusReservationConflict {
		t.Errorf("a path through another portal group: %v", r)
	}
}
