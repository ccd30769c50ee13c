package target

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"lunshift/iscsi"
)

const (
	hostName    = "iqn.2026-11.net.example:host"
	hostSecret  = "correct horse battery"
	arraySecret = "staple of the array"
)

var (
	hostCredentials  = iscsi.Credentials{Name: "alice", Secret: hostSecret}
	arrayCredentials = iscsi.Credentials{Name: "array", Secret: arraySecret}
)

// admitted is a list of one rule that asks any initiator for alice's secret.
func admitted() []Initiator {
	return []Initiator{{Name: "*", Authentication: &Authentication{Initiator: hostCredentials, Target: arrayCredentials}}}
}

// loginRequest sends one login request and gives the answer.
func (i *initiator) loginRequest(flags byte, csg, nsg int, pairs ...iscsi.Pair) (pduIn, []iscsi.Pair) {
	i.t.Helper()
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpLoginRequest)
	h.SetImmediate()
	h.SetFlags(flags | byte(csg<<2|nsg))
	h.SetISID(i.isid)
	h.SetCmdSN(i.cmdSN)
	h.SetExpStatSN(i.expSN)
	i.send(&h, iscsi.AppendText(nil, pairs...))
	p := i.recv()
	if p.Opcode() != iscsi.OpLoginResponse {
		i.t.Fatalf("login answered by %v", p.Opcode())
	}
	got, err := iscsi.ParseText(p.data)
	if err != nil {
		i.t.Fatal(err)
	}
	return p, got
}

// names are the keys of the first request.
func names(discovery bool) []iscsi.Pair {
	p := []iscsi.Pair{{Key: "InitiatorName", Value: hostName}}
	if discovery {
		return append(p, iscsi.Pair{Key: "SessionType", Value: "Discovery"})
	}
	return append(p, iscsi.Pair{Key: "TargetName", Value: iqn})
}

// proof is how an initiator authenticates in a test.
type proof struct {
	own       iscsi.Credentials
	target    iscsi.Credentials // with a Secret: mutual
	algorithm int
	discovery bool
	name      string // the initiator's; empty is hostName
	// change alters the answer to the challenge before it is sent.
	change func(challenge, answer []iscsi.Pair) []iscsi.Pair
}

// prove logs in with CHAP over all stages and gives the login status.
func (i *initiator) prove(x proof) uint16 {
	i.t.Helper()
	const operational, full = iscsi.StageOperational, iscsi.StageFullFeature
	who := names(x.discovery)
	for k := range who {
		if who[k].Key == "InitiatorName" && x.name != "" {
			who[k].Value = x.name
		}
	}
	p, got := i.loginRequest(0, 0, 0, append(who, iscsi.Pair{Key: "AuthMethod", Value: "CHAP,None"})...)
	if s := p.LoginStatus(); s != 0 {
		return s
	}
	if m, _ := iscsi.Lookup(got, "AuthMethod"); m != "CHAP" {
		i.t.Fatalf("AuthMethod is %q", m)
	}
	p, challenge := i.loginRequest(0, 0, 0, iscsi.Pair{Key: "CHAP_A", Value: fmt.Sprint(x.algorithm)})
	if s := p.LoginStatus(); s != 0 {
		return s
	}
	chap := iscsi.CHAPInitiator{Own: x.own, Target: x.target}
	answer, err := chap.Answer(challenge)
	if err != nil {
		i.t.Fatal(err)
	}
	if x.change != nil {
		answer = x.change(challenge, answer)
	}
	p, got = i.loginRequest(iscsi.FlagTransit, 0, operational, answer...)
	if s := p.LoginStatus(); s != 0 {
		return s
	}
	if x.target.Secret != "" {
		if err := chap.Check(got); err != nil {
			i.t.Fatalf("the target's proof: %v", err)
		}
	}
	if p.NSG() != operational || p.Flags()&iscsi.FlagTransit == 0 {
		i.t.Fatal("no transit after the proof")
	}
	want := iscsi.DefaultParams()
	want.MaxRecv = 1 << 18
	neg := iscsi.NewNegotiation(want)
	neg.Discovery = x.discovery
	p, got = i.loginRequest(iscsi.FlagTransit, operational, full, neg.Offer()...)
	for _, g := range got {
		if _, err := neg.Apply(g); err != nil {
			i.t.Fatal(err)
		}
	}
	neg.Finish()
	i.params = neg.Params
	return p.LoginStatus()
}

func TestCHAPAdmitsWhoKnowsTheSecretByEveryAlgorithm(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: admitted()})
	for algorithm, name := range map[int]string{5: "MD5", 6: "SHA1", 7: "SHA-256", 8: "SHA3-256"} {
		for _, target := range []iscsi.Credentials{{}, arrayCredentials} {
			t.Run(fmt.Sprintf("%s/mutual=%v", name, target.Secret != ""), func(t *testing.T) {
				i := dial(t, addr)
				if s := i.prove(proof{own: hostCredentials, target: target, algorithm: algorithm}); s != 0 {
					t.Fatalf("login status %04Xh", s)
				}
				i.do(tur, nil, 0) // a unit attention
				i.good(rw16(0x88, 0, 1), nil, 512)
			})
		}
	}
}

func TestCHAPKeepsOthersOutAndTheLogHoldsNoSecret(t *testing.T) {
	log, text := records()
	log.(*logrus.Logger).SetLevel(logrus.DebugLevel)
	s, addr := begin(t, Config{Log: log, LoginFailures: 1000}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: admitted()},
		Unit{IQN: iqn + ":one-way", Device: newMemory(512, 64), Initiators: []Initiator{{Name: "*", Authentication: &Authentication{Initiator: hostCredentials}}}})
	good := proof{own: hostCredentials, algorithm: 7}
	with := func(f func(*proof)) proof { p := good; f(&p); return p }
	set := func(key, value string) proof {
		return with(func(p *proof) {
			p.change = func(_, a []iscsi.Pair) []iscsi.Pair {
				a = slices.DeleteFunc(a, func(x iscsi.Pair) bool { return x.Key == key })
				if value != "-" {
					a = append(a, iscsi.Pair{Key: key, Value: value})
				}
				return a
			}
		})
	}
	var replay []iscsi.Pair
	i := dial(t, addr)
	record := with(func(p *proof) {
		p.change = func(_, a []iscsi.Pair) []iscsi.Pair { replay = slices.Clone(a); return a }
	})
	if st := i.prove(record); st != 0 {
		t.Fatalf("login status %04Xh", st)
	}
	i.logout()
	// A challenge that is open on another connection.
	other := dial(t, addr)
	other.loginRequest(0, 0, 0, append(names(false), iscsi.Pair{Key: "AuthMethod", Value: "CHAP"})...)
	_, elsewhere := other.loginRequest(0, 0, 0, iscsi.Pair{Key: "CHAP_A", Value: "7"})
	foreign, _ := iscsi.Lookup(elsewhere, "CHAP_C")
	reflect := func(challenge string) proof {
		return with(func(p *proof) {
			p.change = func(c, a []iscsi.Pair) []iscsi.Pair {
				v := challenge
				if v == "" {
					v, _ = iscsi.Lookup(c, "CHAP_C")
				}
				return append(a, iscsi.Pair{Key: "CHAP_I", Value: "1"}, iscsi.Pair{Key: "CHAP_C", Value: v})
			}
		})
	}
	for what, x := range map[string]proof{
		"wrong secret":                        with(func(p *proof) { p.own.Secret = "wrong secret, long enough" }),
		"unknown name":                        with(func(p *proof) { p.own.Name = "mallory" }),
		"the target's own secret":             with(func(p *proof) { p.own = arrayCredentials }),
		"the name of the initiator":           with(func(p *proof) { p.own.Name = hostName }),
		"no name":                             set("CHAP_N", "-"),
		"no response":                         set("CHAP_R", "-"),
		"empty response":                      set("CHAP_R", "0x"),
		"response of zeroes":                  set("CHAP_R", "0x"+strings.Repeat("00", 32)),
		"response that is no number":          set("CHAP_R", hostSecret),
		"response of an earlier login":        with(func(p *proof) { p.change = func(_, a []iscsi.Pair) []iscsi.Pair { return replay } }),
		"algorithm nobody knows":              with(func(p *proof) { p.algorithm = 99 }),
		"its own challenge sent back":         reflect(""),
		"the challenge of another connection": reflect(foreign),
		"the same in capitals":                reflect(strings.ToUpper(foreign[2:])),
		"the same in other digits":            reflect("0X" + strings.ToUpper(foreign[2:])),
		"challenge without identifier": with(func(p *proof) {
			p.change = func(_, a []iscsi.Pair) []iscsi.Pair { return append(a, iscsi.Pair{Key: "CHAP_C", Value: "0x1234"}) }
		}),
		"response that is sent twice in one go": with(func(p *proof) { p.change = func(_, a []iscsi.Pair) []iscsi.Pair { return append(a, a[len(a)-1]) } }),
	} {
		t.Run(what, func(t *testing.T) {
			i := dial(t, addr)
			if st := i.prove(x); st != iscsi.LoginAuthFailed && !(strings.Contains(what, "twice") && st == iscsi.LoginInitiatorError) {
				t.Errorf("login status %04Xh", st)
			}
			i.expectClosed()
		})
	}
	t.Run("mutual where the target has no secret", func(t *testing.T) {
		i := dial(t, addr)
		first := names(false)
		first[1].Value = iqn + ":one-way"
		i.loginRequest(0, 0, 0, append(first, iscsi.Pair{Key: "AuthMethod", Value: "CHAP"})...)
		_, c := i.loginRequest(0, 0, 0, iscsi.Pair{Key: "CHAP_A", Value: "7"})
		chap := iscsi.CHAPInitiator{Own: hostCredentials, Target: arrayCredentials}
		a, err := chap.Answer(c)
		if err != nil {
			t.Fatal(err)
		}
		if p, _ := i.loginRequest(iscsi.FlagTransit, 0, 1, a...); p.LoginStatus() != iscsi.LoginAuthFailed {
			t.Errorf("login status %04Xh", p.LoginStatus())
		}
	})
	// Ways around the proof.
	none := iscsi.Pair{Key: "AuthMethod", Value: "None"}
	both := iscsi.Pair{Key: "AuthMethod", Value: "None,CHAP"}
	for what, f := range map[string]func(i *initiator) pduIn{
		"None alone":                        func(i *initiator) pduIn { p, _ := i.loginRequest(0, 0, 0, append(names(false), none)...); return p },
		"no AuthMethod":                     func(i *initiator) pduIn { p, _ := i.loginRequest(iscsi.FlagTransit, 0, 1, names(false)...); return p },
		"straight to the end":               func(i *initiator) pduIn { p, _ := i.loginRequest(iscsi.FlagTransit, 0, 3, names(false)...); return p },
		"security stage skipped":            func(i *initiator) pduIn { p, _ := i.loginRequest(0, 1, 1, names(false)...); return p },
		"security stage skipped to the end": func(i *initiator) pduIn { p, _ := i.loginRequest(iscsi.FlagTransit, 1, 3, names(false)...); return p },
	} {
		t.Run(what, func(t *testing.T) {
			i := dial(t, addr)
			if p := f(i); p.LoginStatus() != iscsi.LoginAuthFailed {
				t.Errorf("login status %04Xh", p.LoginStatus())
			}
			i.expectClosed()
		})
	}
	t.Run("transit is not granted before the proof", func(t *testing.T) {
		i := dial(t, addr)
		p, got := i.loginRequest(iscsi.FlagTransit, 0, 3, append(names(false), both)...)
		if m, _ := iscsi.Lookup(got, "AuthMethod"); p.LoginStatus() != 0 || p.Flags()&iscsi.FlagTransit != 0 || m != "CHAP" {
			t.Fatalf("status %04Xh flags %02X %v", p.LoginStatus(), p.Flags(), got)
		}
		if p, _ = i.loginRequest(iscsi.FlagTransit, 0, 3); p.LoginStatus() != 0 || p.Flags()&iscsi.FlagTransit != 0 {
			t.Fatalf("status %04Xh flags %02X", p.LoginStatus(), p.Flags())
		}
		if p, _ = i.loginRequest(0, 0, 0, both); p.LoginStatus() != iscsi.LoginInitiatorError {
			t.Errorf("AuthMethod again: %04Xh", p.LoginStatus())
		}
	})
	t.Run("response before the challenge", func(t *testing.T) {
		i := dial(t, addr)
		i.loginRequest(0, 0, 0, append(names(false), both)...)
		if p, _ := i.loginRequest(iscsi.FlagTransit, 0, 1, replay...); p.LoginStatus() != iscsi.LoginAuthFailed {
			t.Errorf("login status %04Xh", p.LoginStatus())
		}
	})
	if got := s.Sessions(iqn); len(got) > 0 {
		t.Errorf("sessions: %v", got)
	}
	other.nc.Close()
	s.Close()
	got := text()
	for _, secret := range []string{hostSecret, arraySecret, "wrong secret, long enough"} {
		if strings.Contains(got, secret) {
			t.Errorf("the log holds a secret:\n%s", got)
		}
	}
	if n := strings.Count(got, "authentication failed"); n < 20 {
		t.Errorf("%d failures in the log:\n%s", n, got)
	}
	for line := range strings.Lines(got) {
		if strings.Contains(line, "authentication failed") && !(strings.Contains(line, hostName) && strings.Contains(line, "127.0.0.1:")) {
			t.Errorf("without name or address: %s", line)
		}
	}
	if n := len(s.challenges.open); n != 0 {
		t.Errorf("%d challenges are remembered", n)
	}
	for _, v := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(v, *admitted()[0].Authentication); strings.Contains(got, hostSecret) || strings.Contains(got, arraySecret) {
			t.Errorf("printed by %s: %s", v, got)
		}
	}
}

func TestCHAPThatNobodyAsksForIsNotDone(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := dial(t, addr)
	p, got := i.loginRequest(iscsi.FlagTransit, 0, 1, append(names(false), iscsi.Pair{Key: "AuthMethod", Value: "CHAP,None"})...)
	if m, _ := iscsi.Lookup(got, "AuthMethod"); p.LoginStatus() != 0 || m != iscsi.None {
		t.Errorf("status %04Xh, AuthMethod %q", p.LoginStatus(), m)
	}
	i = dial(t, addr)
	if p, _ = i.loginRequest(0, 0, 0, append(names(false), iscsi.Pair{Key: "AuthMethod", Value: "CHAP"})...); p.LoginStatus() != iscsi.LoginAuthFailed {
		t.Errorf("CHAP alone: %04Xh", p.LoginStatus())
	}
}

func TestStrangerCannotTellATargetThatIsThereFromOneThatIsNot(t *testing.T) {
	rule := []Initiator{{Name: "iqn.2026-11.net.example:else*"}}
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: rule},
		Unit{IQN: iqn + "gone", Device: newMemory(512, 64), Initiators: rule})
	if err := s.Retire(t.Context(), iqn+"gone", 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Redirect(iqn+"moved", Redirection{Address: "192.0.2.1:3260", Initiators: rule}); err != nil {
		t.Fatal(err)
	}
	answer := func(target, name string) []byte {
		i := dial(t, addr)
		p, _ := i.loginRequest(iscsi.FlagTransit, 0, 1, iscsi.Pair{Key: "InitiatorName", Value: name}, iscsi.Pair{Key: "TargetName", Value: target},
			iscsi.Pair{Key: "AuthMethod", Value: "CHAP,None"})
		if p.LoginStatus() != 0 {
			i.expectClosed()
		}
		return append(p.BHS[:], p.data...)
	}
	nothing := answer(iqn+"nothing", hostName)
	for _, target := range []string{iqn, iqn + "gone", iqn + "moved"} {
		if got := answer(target, hostName); !bytes.Equal(got, nothing) {
			t.Errorf("%s: %x, want %x", target, got, nothing)
		}
		if got := answer(target, "iqn.2026-11.net.example:elsewhere"); bytes.Equal(got, nothing) {
			t.Errorf("%s: who is admitted gets the same", target)
		}
	}
	if got := login(t, addr, loginOptions{discovery: true}).sendTargets(); got != "" {
		t.Errorf("discovery lists %q", got)
	}
	if got := login(t, addr, loginOptions{discovery: true, name: "iqn.2026-11.net.example:elsewhere"}).sendTargets(); strings.Count(got, "TargetName") != 2 {
		t.Errorf("discovery lists %q", got)
	}
}

func TestRulesMatchNamesAndNetworks(t *testing.T) {
	u, list := &unit{}, []Initiator{
		{Name: "iqn.a:exact", Networks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("2001:db8::/64")}},
		{Name: "iqn.b:*"},
	}
	u.rules.Store(&rules{list, []uint16{2}})
	for _, tc := range []struct {
		name, from string
		group      uint16
		want       int
	}{
		{"iqn.a:exact", "10.0.0.9", 2, 0},
		{"iqn.a:exact", "2001:db8::1", 2, 0},
		{"iqn.a:exact", "10.0.1.9", 2, -1},
		{"iqn.a:exact", "10.0.0.9", 1, -1},
		{"iqn.a:exact.more", "10.0.0.9", 2, -1},
		{"iqn.a:exac", "10.0.0.9", 2, -1},
		{"iqn.b:", "192.0.2.1", 2, 1},
		{"iqn.b:x", "::1", 2, 1},
		{"iqn.c:x", "127.0.0.1", 2, -1},
	} {
		got := u.entry(tc.name, netip.MustParseAddr(tc.from), tc.group)
		if (got == nil) != (tc.want < 0) || got != nil && got != &list[tc.want] {
			t.Errorf("%+v: %+v", tc, got)
		}
	}
	u.rules.Store(&rules{})
	if u.entry("iqn.a:b", netip.MustParseAddr("192.0.2.1"), 1) != nil || u.entry("iqn.a:b", netip.MustParseAddr("127.3.2.1"), 1) == nil ||
		u.entry("iqn.a:b", netip.MustParseAddr("::1"), 1) == nil || u.entry("iqn.a:b", netip.Addr{}, 1) != nil {
		t.Error("a unit without a list is not that of the loopback alone")
	}
	if a := remote(fakeConn{remote: &net.TCPAddr{IP: net.ParseIP("::ffff:10.0.0.9"), Zone: ""}}); a != netip.MustParseAddr("10.0.0.9") {
		t.Errorf("mapped address: %v", a)
	}
	if a := remote(fakeConn{remote: &net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0"}}); a != netip.MustParseAddr("fe80::1") {
		t.Errorf("address with a zone: %v", a)
	}
}

// fakeConn has a remote address and nothing else.
type fakeConn struct {
	net.Conn
	remote net.Addr
}

func (c fakeConn) RemoteAddr() net.Addr { return c.remote }

func TestSessionSeesTheUnitsOfTheIdentityItProved(t *testing.T) {
	bob := iscsi.Credentials{Name: "bob", Secret: "another secret of bob"}
	chap := func(c iscsi.Credentials) []Initiator {
		return []Initiator{{Name: "*", Authentication: &Authentication{Initiator: c}}}
	}
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 1, Device: m, Initiators: chap(hostCredentials)},
		Unit{IQN: iqn, LUN: 2, Device: m, Initiators: chap(bob)}, Unit{IQN: iqn, LUN: 3, Device: m},
		Unit{IQN: iqn, LUN: 4, Device: m, Initiators: []Initiator{{Name: "iqn.2026-11.net.example:nobody"}}},
		Unit{IQN: iqn, LUN: 5, Device: m, Initiators: chap(hostCredentials), PortalGroups: []uint16{7}})
	luns := func(i *initiator) (out []byte) {
		i.lun = 3
		i.do(tur, nil, 0)
		r := i.good([]byte{0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, nil, 256)
		for k := 8; k < len(r.data); k += 8 {
			out = append(out, r.data[k+1])
		}
		return out
	}
	for _, tc := range []struct {
		who  iscsi.Credentials
		want []byte
	}{{hostCredentials, []byte{1, 3}}, {bob, []byte{2, 3}}} {
		i := dial(t, addr)
		i.isid = iscsi.ISID{tc.want[0]}
		if s := i.prove(proof{own: tc.who, algorithm: 8}); s != 0 {
			t.Fatalf("login status %04Xh", s)
		}
		if got := luns(i); !bytes.Equal(got, tc.want) {
			t.Errorf("%s sees %v, want %v", tc.who.Name, got, tc.want)
		}
		i.lun = uint64(3 - tc.want[0])
		if r := i.do(rw16(0x88, 0, 1), nil, 512); !r.is(senseNoUnit) {
			t.Errorf("%s reads another's unit: %v", tc.who.Name, r)
		}
	}
	i := dial(t, addr)
	if p, _ := i.loginRequest(iscsi.FlagTransit, 0, 3, append(names(false), iscsi.Pair{Key: "AuthMethod", Value: "None"})...); p.LoginStatus() != 0 {
		t.Fatalf("login status %04Xh", p.LoginStatus())
	}
	i.params = iscsi.DefaultParams()
	if got := luns(i); !bytes.Equal(got, []byte{3}) {
		t.Errorf("who proves nothing sees %v", got)
	}
}

// A stranger that knows name and ISID of a session must not end it.
func TestSessionThatProvedItselfIsEndedOnlyByTheSameIdentity(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: m, Initiators: admitted()}, Unit{IQN: iqn, LUN: 1, Device: m})
	i := dial(t, addr)
	if s := i.prove(proof{own: hostCredentials, algorithm: 8}); s != 0 {
		t.Fatalf("login status %04Xh", s)
	}
	o := dial(t, addr)
	if p, _ := o.loginRequest(iscsi.FlagTransit, 0, 3, names(false)...); p.LoginStatus() != iscsi.LoginAuthFailed {
		t.Errorf("login status %04Xh", p.LoginStatus())
	}
	i.do(tur, nil, 0)
	i.good(rw16(0x88, 0, 1), nil, 512)
	o = dial(t, addr)
	if s := o.prove(proof{own: hostCredentials, algorithm: 8}); s != 0 {
		t.Errorf("login status %04Xh", s)
	}
	i.expectClosed()
}

func TestDiscoveryAsksForItsOwnProof(t *testing.T) {
	d := iscsi.Credentials{Name: "finder", Secret: "secret of discovery"}
	_, addr := begin(t, Config{Discovery: &Authentication{Initiator: d, Target: arrayCredentials}},
		Unit{IQN: iqn, Device: newMemory(512, 64)}, Unit{IQN: iqn + ".chap", Device: newMemory(512, 64), Initiators: admitted()},
		Unit{IQN: iqn + ".other", Device: newMemory(512, 64), Initiators: []Initiator{{Name: "iqn.x:y"}}})
	i := dial(t, addr)
	if p, _ := i.loginRequest(iscsi.FlagTransit, 0, 3, append(names(true), iscsi.Pair{Key: "AuthMethod", Value: "None"})...); p.LoginStatus() != iscsi.LoginAuthFailed {
		t.Errorf("without a proof: %04Xh", p.LoginStatus())
	}
	i = dial(t, addr)
	if s := i.prove(proof{own: hostCredentials, algorithm: 6, discovery: true}); s != iscsi.LoginAuthFailed {
		t.Errorf("with another proof: %04Xh", s)
	}
	i = dial(t, addr)
	if s := i.prove(proof{own: d, target: arrayCredentials, algorithm: 6, discovery: true}); s != 0 {
		t.Fatalf("login status %04Xh", s)
	}
	if got := i.sendTargets(); strings.Count(got, "TargetName=") != 2 || strings.Contains(got, ".other") {
		t.Errorf("lists %q", got)
	}
}

func TestDiscoveryListsWhatTheProvenIdentityMayUse(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)},
		Unit{IQN: iqn + ".chap", Device: newMemory(512, 64), Initiators: admitted()},
		Unit{IQN: iqn + ".bob", Device: newMemory(512, 64), Initiators: []Initiator{{Name: "*", Authentication: &Authentication{Initiator: iscsi.Credentials{Name: "bob", Secret: "bob's secret"}}}}})
	i := dial(t, addr)
	if p, _ := i.loginRequest(iscsi.FlagTransit, 0, 3, names(true)...); p.LoginStatus() != 0 {
		t.Fatalf("login status %04Xh", p.LoginStatus())
	}
	i.params = iscsi.DefaultParams()
	if got := i.sendTargets(); strings.Count(got, "TargetName=") != 1 {
		t.Errorf("who proves nothing finds %q", got)
	}
	i = dial(t, addr)
	if s := i.prove(proof{own: hostCredentials, algorithm: 5, discovery: true}); s != 0 {
		t.Fatalf("login status %04Xh", s)
	}
	if got := i.sendTargets(); strings.Count(got, "TargetName=") != 2 || !strings.Contains(got, iqn+".chap") {
		t.Errorf("finds %q", got)
	}
}

func TestRulesThatCannotBeProvenAreRefused(t *testing.T) {
	s, _ := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	for what, a := range map[string]Authentication{
		"no secret":   {Initiator: iscsi.Credentials{Name: "x"}},
		"same secret": {Initiator: hostCredentials, Target: iscsi.Credentials{Name: "array", Secret: hostSecret}},
	} {
		rule := []Initiator{{Name: "*", Authentication: &a}}
		err := s.AddUnit(Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 64), Initiators: rule})
		if err == nil || strings.Contains(err.Error(), hostSecret) {
			t.Errorf("%s: AddUnit gave %v", what, err)
		}
		if err := s.Redirect(iqn, Redirection{Address: "192.0.2.1:1", Initiators: rule}); err == nil {
			t.Errorf("%s: Redirect took it", what)
		}
		if _, err := New(Config{Discovery: &a}); err == nil {
			t.Errorf("%s: New took it", what)
		}
	}
}
