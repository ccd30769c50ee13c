package target

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"lunshift/iscsi"
)

// own gives a unit that the host of the tests alone may use.
func own() Unit {
	rule := Initiator{Name: hostName, Authentication: admitted()[0].Authentication}
	return Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: []Initiator{rule}}
}

// hostFrom logs the host in from an address and gives the login status.
func hostFrom(t *testing.T, from, addr string) uint16 {
	t.Helper()
	return over(t, dialFrom(t, from, addr)).prove(proof{own: hostCredentials, algorithm: 8})
}

// loggingIn is how many places to log in are taken.
func (s *Server) loggingIn() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.places.loggingIn.Len()
}

func TestDiscoverySessionsTakeNoPlacesOfSessions(t *testing.T) {
	s, addr := begin(t, Config{MaxConnections: 2, ConnectionsPerAddress: 4, ConnectionsLoggingIn: 8}, own())
	for k := range 8 {
		i := over(t, dialFrom(t, fmt.Sprintf("127.0.0.%d", 8+k/4), addr))
		if st := i.tryLogin(loginOptions{name: "iqn.stranger:x", discovery: true, isid: iscsi.ISID{5: byte(k)}}); st != 0 {
			t.Fatalf("discovery session %d: %04Xh", k, st)
		}
	}
	if n := s.loggingIn(); n != 8 {
		t.Fatalf("%d places to log in are taken", n)
	}
	if st := hostFrom(t, "127.0.0.1", addr); st != 0 {
		t.Errorf("the admitted initiator: login status %04Xh", st)
	}
}

func TestDiscoverySessionLastsOneLoginTimeout(t *testing.T) {
	log, text := records()
	s, addr := begin(t, Config{Log: log, LoginTimeout: time.Second}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	session := login(t, addr, loginOptions{})
	i := login(t, addr, loginOptions{discovery: true})
	if got := i.sendTargets(); !strings.Contains(got, iqn) {
		t.Errorf("discovery lists %q", got)
	}
	i.expectClosed()
	waitFor(t, "its place to be free", func() bool { return s.loggingIn() == 0 })
	session.good(rw16(0x88, 0, 1), nil, 512)
	waitFor(t, "the log", func() bool { return strings.Contains(text(), "discovery session ended") })
}

func TestDiscoverySessionGivesItsAddressNoPreference(t *testing.T) {
	s, addr := begin(t, Config{ConnectionsLoggingIn: 2}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: []Initiator{{Name: hostName}}})
	i := over(t, dialFrom(t, "127.0.0.66", addr))
	if st := i.tryLogin(loginOptions{name: "iqn.stranger:x", discovery: true}); st != 0 {
		t.Fatalf("login status %04Xh", st)
	}
	honest := dialFrom(t, "127.0.0.1", addr)
	waitFor(t, "both places to be taken", func() bool { return s.loggingIn() == 2 })
	over(t, dialFrom(t, "127.0.0.66", addr)).refused()
	if ended(honest) {
		t.Error("the host's one connection gave its place to an address with a discovery session")
	}
}

func TestSilentConnectionOfEachAddressKeepsNoNewcomerOut(t *testing.T) {
	s, addr := begin(t, Config{ConnectionsLoggingIn: 8}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	var silent []net.Conn
	for k := range 8 {
		silent = append(silent, dialFrom(t, fmt.Sprintf("127.0.0.%d", 10+k), addr))
		waitFor(t, "a place", func() bool { return s.loggingIn() == k+1 })
	}
	if _, st := loginFrom(t, "127.0.0.2", addr, 1); st != 0 {
		t.Errorf("newcomer: login status %04Xh", st)
	}
	waitFor(t, "the oldest to be displaced", func() bool { return ended(silent[0]) })
	if ended(silent[7]) {
		t.Error("the latest went before the oldest")
	}
}

func TestAddressesOfNamedNetworksComeBeforeStrangers(t *testing.T) {
	u := own()
	u.Initiators[0].Networks = []netip.Prefix{netip.MustParsePrefix("127.0.1.0/24")}
	s, addr := begin(t, Config{ConnectionsLoggingIn: 2}, u)
	first := dialFrom(t, "127.0.1.1", addr)
	waitFor(t, "its place", func() bool { return s.loggingIn() == 1 })
	second := dialFrom(t, "127.0.0.9", addr)
	waitFor(t, "its place", func() bool { return s.loggingIn() == 2 })
	dialFrom(t, "127.0.1.2", addr)
	waitFor(t, "the stranger to be displaced", func() bool { return ended(second) })
	over(t, dialFrom(t, "127.0.0.9", addr)).refused()
	if ended(first) {
		t.Error("an address of the network gave its place to a stranger")
	}
	// The network goes with the unit.
	if err := s.RemoveUnit(iqn, 0); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.networks) != 0 {
		t.Errorf("left: %v", s.networks)
	}
}

func TestNetworksAreFoundByTheirAddresses(t *testing.T) {
	w := networks{}
	rules := []Initiator{{Networks: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/16"), netip.MustParsePrefix("2001:db8::/33")}}}
	w.count(rules, 1)
	w.count(rules, 1)
	w.count(rules, -1)
	for a, want := range map[string]bool{"10.1.255.255": true, "10.2.0.0": false, "2001:db8:7fff::1": true, "2001:db8:8000::": false, "::1": false} {
		if w.contains(netip.MustParseAddr(a)) != want {
			t.Errorf("%s: %v", a, !want)
		}
	}
	w.count(rules, -1)
	if w.count(nil, 1); !w.contains(netip.MustParseAddr("::1")) || !w.contains(netip.MustParseAddr("127.9.9.9")) || len(w) != 2 {
		t.Errorf("%v", w)
	}
	if w.contains(netip.Addr{}) {
		t.Error("no address is in a network")
	}
}

// Strangers at 60 addresses open connections, and discovery sessions, as fast as they can.
func TestFloodFromManyAddressesKeepsNobodyOut(t *testing.T) {
	u := own()
	u.Initiators[0].Name = "iqn.2026-11.net.example:*"
	_, addr := begin(t, Config{ConnectionsPerAddress: 16, ConnectionsLoggingIn: 64, MaxConnections: 8}, u)
	session := over(t, dialFrom(t, "127.0.0.1", addr))
	if st := session.prove(proof{own: hostCredentials, algorithm: 8}); st != 0 {
		t.Fatalf("login status %04Xh", st)
	}
	session.do(tur, nil, 0)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	opened := make([]int, 3)
	for k := range opened {
		flood.Go(func() {
			var open []net.Conn
			defer func() {
				for _, nc := range open {
					nc.Close()
				}
			}()
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 2, byte(k*20+n%20))}}
				nc, err := d.Dial("tcp", addr)
				if err != nil {
					continue
				}
				opened[k]++
				if k == 0 { // the request alone: discovery begins, its answer is not taken
					var h iscsi.BHS
					h.SetOpcode(iscsi.OpLoginRequest)
					h.SetImmediate()
					h.SetFlags(iscsi.FlagTransit | 3)
					data := iscsi.AppendText(nil, iscsi.Pair{Key: "InitiatorName", Value: "iqn.stranger:x"}, iscsi.Pair{Key: "SessionType", Value: "Discovery"})
					h.SetDataLength(len(data))
					nc.Write(append(append(h[:], data...), make([]byte, -len(data)&3)...))
				}
				if open = append(open, nc); len(open) > 100 {
					open[0].Close()
					open = open[1:]
				}
			}
		})
	}
	for k := range 100 {
		session.good(rw16(0x88, 0, 1), nil, 512)
		if k%20 == 0 {
			i := over(t, dialFrom(t, "127.0.0.3", addr))
			if st := i.prove(proof{own: hostCredentials, algorithm: 8, name: fmt.Sprint("iqn.2026-11.net.example:", k)}); st != 0 {
				t.Errorf("login %d: status %04Xh", k, st)
			}
			i.nc.Close()
			time.Sleep(20 * time.Millisecond) // lets the flood fill the places again
		}
	}
	close(stop)
	flood.Wait()
	for k, n := range opened {
		if n < 64/3 {
			t.Errorf("stranger %d opened %d connections: that is no flood", k, n)
		}
	}
}

func TestIPv6NetworkCountsAsOneAddress(t *testing.T) {
	f := newFailures(20)
	p := places{}
	n := 0
	for k := range 1000 {
		b := netip.MustParseAddr("2001:db8::").As16()
		b[14], b[15] = byte(k>>8), byte(k)
		a := netip.AddrFrom16(b)
		p.add(a, 1, 1)
		if f.attempt(a) {
			n++
		}
	}
	if n != 20 || f.order.Len() != 1 || !f.blocked(netip.MustParseAddr("2001:db8::ffff:0:0:1")) {
		t.Errorf("%d guesses from one network within a minute", n)
	}
	if other := netip.MustParseAddr("2001:db8:0:1::1"); f.blocked(other) || p.of(other) != (presence{}) {
		t.Error("the network beside it counts as well")
	}
	if got := p.of(netip.MustParseAddr("2001:db8::9")); got != (presence{1000, 1000}) {
		t.Errorf("the network has %v", got)
	}
}

func TestSendTargetsIsAnsweredOnceInAnExchange(t *testing.T) {
	s, addr := begin(t, Config{})
	for k := range 100 {
		if err := s.AddUnit(Unit{IQN: fmt.Sprintf("%s.%0150d", iqn, k), Device: newMemory(512, 64)}); err != nil {
			t.Fatal(err)
		}
	}
	i := login(t, addr, loginOptions{discovery: true})
	once := i.sendTargets()
	request := "SendTargets=All\x00"
	var got strings.Builder
	ttt := uint32(iscsi.NoTag)
	for range 1000 {
		p := i.textPDU(iscsi.FlagFinal, 9, ttt, request)
		got.Write(p.data)
		if ttt = p.TTT(); p.Final() {
			break
		}
		request = ""
	}
	request = strings.Repeat("SendTargets=All\x00", 128)
	var many strings.Builder
	ttt = iscsi.NoTag
	for range 1000 {
		p := i.textPDU(iscsi.FlagFinal, 10, ttt, request)
		many.Write(p.data)
		if ttt = p.TTT(); p.Final() {
			break
		}
		request = ""
	}
	if got.String() != once {
		t.Errorf("asked once: %d bytes, then %d", len(once), got.Len())
	}
	if want := once + strings.Repeat("SendTargets=Reject\x00", 127); many.String() != want {
		t.Errorf("asked 128 times: %d bytes, want %d", many.Len(), len(want))
	}
}

func TestDiscoveryGoesOnWhileTargetsComeAndGo(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{discovery: true})
	stop := make(chan struct{})
	var w sync.WaitGroup
	w.Go(func() {
		other := iqn + ".other"
		for {
			select {
			case <-stop:
				return
			default:
			}
			err := s.AddUnit(Unit{IQN: other, Device: newMemory(512, 64), Initiators: []Initiator{{Name: "*"}}})
			if err == nil {
				err = s.Redirect(other, Redirection{Address: "10.0.0.9:3260"})
			}
			if err == nil {
				err = s.RemoveUnit(other, 0)
			}
			s.StopRedirect(other)
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 200 {
		got := i.sendTargets()
		if len(addresses(got, iqn)) != 1 || len(addresses(got, iqn+".other")) > 1 {
			t.Fatalf("discovery lists %q", got)
		}
	}
	close(stop)
	w.Wait()
}

func TestTSIHsAreUniqueAndMayRunOut(t *testing.T) {
	p := places{}
	for range mostHandles {
		p.handle()
	}
	if h := p.handle(); h != 0 || len(p.handles) != mostHandles {
		t.Errorf("TSIH %d, %d taken", h, len(p.handles))
	}
	p.leave(&conn{tsih: 77})
	if h := p.handle(); h != 77 {
		t.Errorf("TSIH %d is free, %d was given", 77, h)
	}
	if _, err := New(Config{MaxConnections: mostHandles + 1}); err == nil {
		t.Error("more sessions are allowed than there are TSIHs")
	}
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	s.mu.Lock()
	s.places.handles = p.handles
	s.mu.Unlock()
	for _, discovery := range []bool{false, true} {
		if _, st := tryLogin(t, addr, loginOptions{discovery: discovery}); st != iscsi.LoginOutOfResources {
			t.Errorf("login status %04Xh", st)
		}
	}
}

func TestReinstatementIsForWhoProvesTheSameSecret(t *testing.T) {
	other := iscsi.Credentials{Name: hostCredentials.Name, Secret: "another secret altogether"}
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: []Initiator{
		{Name: hostName[:len(hostName)-1] + "*", Networks: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, Authentication: admitted()[0].Authentication},
		{Name: "*", Authentication: &Authentication{Initiator: other}},
	}})
	i := over(t, dialFrom(t, "127.0.0.1", addr))
	if st := i.prove(proof{own: hostCredentials, algorithm: 8}); st != 0 {
		t.Fatalf("login status %04Xh", st)
	}
	i.do(tur, nil, 0)
	if st := over(t, dialFrom(t, "127.0.0.2", addr)).prove(proof{own: other, algorithm: 8}); st != iscsi.LoginAuthFailed {
		t.Errorf("who knows another secret of that CHAP name: %04Xh", st)
	}
	i.good(rw16(0x88, 0, 1), nil, 512)
	if st := hostFrom(t, "127.0.0.1", addr); st != 0 {
		t.Errorf("the initiator itself: %04Xh", st)
	}
	i.expectClosed()
}

func TestNameThatIsListedInFullIsNobodyElses(t *testing.T) {
	other := iscsi.Credentials{Name: "bob", Secret: "another secret altogether"}
	here := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	listed := Initiator{Name: hostName, Networks: here, Authentication: admitted()[0].Authentication}
	anybody := Initiator{Name: "*", Authentication: &Authentication{Initiator: other}}
	m := newMemory(512, 64)
	for _, order := range [][]Initiator{{listed, anybody}, {anybody, listed}} {
		_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m, Initiators: order})
		if st := over(t, dialFrom(t, "127.0.0.2", addr)).prove(proof{own: other, algorithm: 8}); st != iscsi.LoginNotFound {
			t.Errorf("somebody with the host's name: %04Xh", st)
		}
		if st := over(t, dialFrom(t, "127.0.0.2", addr)).prove(proof{own: other, algorithm: 8, name: "iqn.other:x"}); st != 0 {
			t.Errorf("somebody with a name of its own: %04Xh", st)
		}
		if st := hostFrom(t, "127.0.0.1", addr); st != 0 {
			t.Errorf("the host: %04Xh", st)
		}
	}
	// Another unit of the target admits anybody: there the host takes its name back.
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m, Initiators: []Initiator{listed}}, Unit{IQN: iqn, LUN: 1, Device: m, Initiators: []Initiator{anybody}})
	taker := over(t, dialFrom(t, "127.0.0.2", addr))
	if st := taker.prove(proof{own: other, algorithm: 8}); st != 0 {
		t.Fatalf("LUN 1 alone: %04Xh", st)
	}
	if st := hostFrom(t, "127.0.0.1", addr); st != 0 {
		t.Errorf("the host: %04Xh", st)
	}
	taker.expectClosed()
	if st := over(t, dialFrom(t, "127.0.0.2", addr)).prove(proof{own: other, algorithm: 8}); st != iscsi.LoginAuthFailed {
		t.Errorf("the host's place again: %04Xh", st)
	}
}

func TestDiscoveryTakesEverySecretOfACHAPName(t *testing.T) {
	other := iscsi.Credentials{Name: hostCredentials.Name, Secret: "another secret altogether"}
	_, addr := begin(t, Config{},
		Unit{IQN: iqn + ".a", Device: newMemory(512, 64), Initiators: admitted()},
		Unit{IQN: iqn + ".b", Device: newMemory(512, 64), Initiators: []Initiator{{Name: "*", Authentication: &Authentication{Initiator: other}}}})
	for target, c := range map[string]iscsi.Credentials{iqn + ".a": hostCredentials, iqn + ".b": other} {
		i := dial(t, addr)
		if st := i.prove(proof{own: c, algorithm: 8, discovery: true}); st != 0 {
			t.Errorf("%s: login status %04Xh", target, st)
			continue
		}
		if got := i.sendTargets(); len(addresses(got, target)) != 1 || strings.Count(got, "TargetName=") != 1 {
			t.Errorf("%s: discovery lists %q", target, got)
		}
	}
	if st := dial(t, addr).prove(proof{own: iscsi.Credentials{Name: other.Name, Secret: "neither of them"}, algorithm: 8, discovery: true}); st != iscsi.LoginAuthFailed {
		t.Errorf("a wrong secret: %04Xh", st)
	}
}

func TestNamesHoldNoCharactersThatTurnOrHideText(t *testing.T) {
	_, addr := begin(t, Config{LoginFailures: 100}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	for _, odd := range []string{"\u009b2J", "\u202e", "\u2066", "\u200b", "\u0085", "\u2028", "\u00a0", "\xff"} {
		if _, st := tryLogin(t, addr, loginOptions{name: "iqn.x:" + odd}); st != iscsi.LoginInitiatorError {
			t.Errorf("%q: login status %04Xh", odd, st)
		}
	}
	if _, st := tryLogin(t, addr, loginOptions{name: "iqn.x:bücher"}); st != 0 {
		t.Errorf("letters: %04Xh", st)
	}
}

func TestNamesAreComparedWithoutCase(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: strings.ToUpper(iqn), Device: newMemory(512, 64), Initiators: []Initiator{{Name: strings.ToUpper(hostName)}}})
	for k, name := range []string{hostName, strings.ToUpper(hostName)} {
		for n, target := range []string{iqn, strings.ToUpper(iqn)} {
			i, st := tryLogin(t, addr, loginOptions{name: name, target: target, isid: iscsi.ISID{5: 7}})
			if st != 0 {
				t.Errorf("%s at %s: %04Xh", name, target, st)
				continue
			}
			// Each takes the place of the one before: they are one initiator.
			if got := s.Sessions(strings.ToUpper(iqn)); len(got) != 1 || got[0].Initiator != strings.ToLower(hostName) {
				t.Errorf("%d %d: sessions %v", k, n, got)
			}
			i.do(tur, nil, 0)
		}
	}
	if err := s.Redirect(strings.ToUpper(iqn), Redirection{Address: "10.0.0.9:3260"}); err != nil {
		t.Fatal(err)
	}
	if _, st := tryLogin(t, addr, loginOptions{}); st != iscsi.LoginMovedTemporarily {
		t.Errorf("redirected: %04Xh", st)
	}
	s.StopRedirect(iqn)
	if err := s.RemoveUnit(iqn, 0); err != nil {
		t.Error(err)
	}
}

func TestRedirectionIsToldAtThePortalsOfItsGroupsAlone(t *testing.T) {
	s, at := beginAt(t, Config{}, []Portal{{Address: "127.0.0.1:0", Group: 1}, {Address: "127.0.0.1:0", Group: 2}},
		Unit{IQN: iqn, Device: newMemory(512, 64), PortalGroups: []uint16{2}})
	for _, r := range []Redirection{
		{Address: "10.0.0.9:3260"},
		{Address: "10.0.0.9:3260", Initiators: []Initiator{{Name: "*"}}, PortalGroups: []uint16{2}},
	} {
		if err := s.Redirect(iqn, r); err != nil {
			t.Fatal(err)
		}
		for k, want := range []uint16{iscsi.LoginNotFound, iscsi.LoginMovedTemporarily} {
			if _, st := tryLogin(t, at[k], loginOptions{}); st != want {
				t.Errorf("at portal group %d: %04Xh", k+1, st)
			}
			// Discovery tells of all portals at each.
			if got := addresses(login(t, at[k], loginOptions{discovery: true}).sendTargets(), iqn); fmt.Sprint(got) != "[10.0.0.9:3260,1]" {
				t.Errorf("at portal group %d discovery lists %v", k+1, got)
			}
		}
	}
}
