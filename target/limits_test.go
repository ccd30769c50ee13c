package target

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"lunshift/iscsi"
)

// dialFrom connects from an address of the loopback network.
func dialFrom(t testing.TB, from, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	nc, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return nc
}

// loginFrom logs in from an address, with an ISID that ends in n.
func loginFrom(t testing.TB, from, addr string, n byte) (*initiator, uint16) {
	t.Helper()
	i := over(t, dialFrom(t, from, addr))
	return i, i.tryLogin(loginOptions{isid: iscsi.ISID{5: n}})
}

// ended tells whether the other end closed the connection.
func ended(nc net.Conn) bool {
	nc.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := nc.Read(make([]byte, 1))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

func TestLoginsOfAnAddressThatFailedTooOftenAreRefusedUnheard(t *testing.T) {
	log, text := records()
	s, addr := begin(t, Config{Log: log, LoginFailures: 3}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: admitted()})
	good := proof{own: hostCredentials, algorithm: 5}
	wrong := proof{own: iscsi.Credentials{Name: "alice", Secret: "a wrong guess"}, algorithm: 5}
	for range 3 {
		if st := dial(t, addr).prove(wrong); st != iscsi.LoginAuthFailed {
			t.Fatalf("login status %04Xh", st)
		}
	}
	for _, p := range []proof{wrong, good} {
		if st := dial(t, addr).prove(p); st != iscsi.LoginServiceUnavailable {
			t.Errorf("login status %04Xh", st)
		}
	}
	if st := over(t, dialFrom(t, "127.0.0.2", addr)).prove(good); st != 0 {
		t.Errorf("another address: %04Xh", st)
	}
	s.Close()
	if got := text(); !strings.Contains(got, "too many logins") || strings.Contains(got, hostSecret) {
		t.Errorf("the log tells:\n%s", got)
	}
}

func TestManyGuessesAtATimeAreNoMoreThanOneAfterTheOther(t *testing.T) {
	_, addr := begin(t, Config{LoginFailures: 5}, Unit{IQN: iqn, Device: newMemory(512, 64), Initiators: admitted()})
	var wg sync.WaitGroup
	var mu sync.Mutex
	var ready sync.WaitGroup
	statuses := map[uint16]int{}
	const many = 40
	ready.Add(many)
	for range many {
		i := dial(t, addr)
		wg.Go(func() {
			st := i.prove(proof{own: iscsi.Credentials{Name: "alice", Secret: "guess"}, algorithm: 5, change: func(_, a []iscsi.Pair) []iscsi.Pair {
				ready.Done()
				ready.Wait() // all have their challenge
				return a
			}})
			mu.Lock()
			statuses[st]++
			mu.Unlock()
		})
	}
	wg.Wait()
	if statuses[iscsi.LoginAuthFailed] != 5 || statuses[iscsi.LoginServiceUnavailable] != many-5 {
		t.Errorf("login statuses: %v", statuses)
	}
}

func TestFailuresAreForgottenAndBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFailures(2)
		a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")
		f.note(a)
		if f.blocked(a) {
			t.Error("blocked after one")
		}
		time.Sleep(30 * time.Second)
		f.note(a)
		if !f.blocked(a) || f.blocked(b) || f.attempt(a) {
			t.Error("two failures do not block, or block another")
		}
		time.Sleep(30 * time.Second)
		if f.blocked(a) || !f.attempt(a) || f.order.Len() != 1 {
			t.Error("the minute does not end")
		}
		f.succeeded(a)
		if f.order.Len() != 0 || len(f.failed) != 0 {
			t.Error("a success leaves something")
		}
		for k := range 3 * mostAddresses {
			f.note(netip.AddrFrom4([4]byte{10, byte(k >> 16), byte(k >> 8), byte(k)}))
		}
		if f.order.Len() > mostAddresses || len(f.failed) != f.order.Len() {
			t.Errorf("%d addresses are kept", len(f.failed))
		}
		time.Sleep(time.Minute)
		if f.blocked(b); f.order.Len() != 0 || len(f.failed) != 0 {
			t.Errorf("%d addresses are kept after a minute", len(f.failed))
		}
	})
}

func TestSessionsPastALimitAreRefusedAndOthersGoOn(t *testing.T) {
	for name, tc := range map[string]struct {
		cfg       Config
		elsewhere uint16 // what another address gets when the limit is reached
	}{
		"MaxConnections":        {Config{MaxConnections: 2}, iscsi.LoginOutOfResources},
		"ConnectionsPerAddress": {Config{ConnectionsPerAddress: 2}, 0},
		"SessionsPerUnit":       {Config{SessionsPerUnit: 2}, iscsi.LoginOutOfResources},
	} {
		t.Run(name, func(t *testing.T) {
			s, addr := begin(t, tc.cfg, Unit{IQN: iqn, Device: newMemory(512, 64)})
			var all []*initiator
			for k := range byte(2) {
				i, st := loginFrom(t, "127.0.0.1", addr, k)
				if st != 0 {
					t.Fatalf("login status %04Xh", st)
				}
				i.do(tur, nil, 0)
				all = append(all, i)
			}
			i, st := loginFrom(t, "127.0.0.1", addr, 9)
			if st != iscsi.LoginOutOfResources {
				t.Errorf("one too many: %04Xh", st)
			}
			i.expectClosed()
			if _, st := loginFrom(t, "127.0.0.2", addr, 8); st != tc.elsewhere {
				t.Errorf("from elsewhere: %04Xh", st)
			}
			for _, i := range all {
				i.good(rw16(0x88, 0, 1), nil, 512)
			}
			// Reinstatement needs no room.
			again, st := loginFrom(t, "127.0.0.1", addr, 0)
			if st != 0 {
				t.Errorf("reinstatement: %04Xh", st)
			}
			all[0].expectClosed()
			again.do(tur, nil, 0)
			again.logout()
			waitFor(t, "the end of the session", func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return s.places.of(netip.MustParseAddr("127.0.0.1")).sessions == 1
			})
			if tc.elsewhere != 0 {
				if _, st := loginFrom(t, "127.0.0.2", addr, 7); st != 0 {
					t.Errorf("a place became free: %04Xh", st)
				}
			}
		})
	}
}

func TestConnectionsThatDoNotLogInTakeNobodysPlace(t *testing.T) {
	s, addr := begin(t, Config{ConnectionsLoggingIn: 4, MaxConnections: 4}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	session, st := loginFrom(t, "127.0.0.1", addr, 1)
	if st != 0 {
		t.Fatalf("login status %04Xh", st)
	}
	session.do(tur, nil, 0)
	var idle []net.Conn
	for range 4 {
		nc := dialFrom(t, "127.0.0.9", addr)
		nc.Write([]byte{byte(iscsi.OpLoginRequest) | iscsi.FlagImmediate}) // half a login
		idle = append(idle, nc)
	}
	taken := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.places.loggingIn.Len()
	}
	waitFor(t, "the places to be taken", func() bool { return taken() == 4 })
	// The address that took them all gets no more, and is told.
	over(t, dialFrom(t, "127.0.0.9", addr)).refused()
	// Others get one of its places: an address with sessions and one without.
	for _, from := range []string{"127.0.0.1", "127.0.0.2"} {
		if _, st := loginFrom(t, from, addr, 2); st != 0 {
			t.Errorf("from %s: %04Xh", from, st)
		}
	}
	waitFor(t, "the first to be displaced", func() bool { return ended(idle[0]) })
	if ended(idle[3]) {
		t.Error("the last came before the first")
	}
	session.good(rw16(0x88, 0, 1), nil, 512)
}

// refused sends a login request and takes the refusal of a connection too many.
func (i *initiator) refused() {
	i.t.Helper()
	if p, _ := i.loginRequest(iscsi.FlagTransit, 0, 1, names(false)...); p.LoginStatus() != iscsi.LoginOutOfResources {
		i.t.Errorf("login status %04Xh", p.LoginStatus())
	}
	i.expectClosed()
}

func TestFloodOfConnectionsFromOneAddressDisturbsNobody(t *testing.T) {
	log, text := records()
	s, addr := begin(t, Config{Log: log, ConnectionsPerAddress: 16, ConnectionsLoggingIn: 32}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	session, st := loginFrom(t, "127.0.0.1", addr, 1)
	if st != 0 {
		t.Fatalf("login status %04Xh", st)
	}
	session.do(tur, nil, 0)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	for range 4 {
		flood.Go(func() {
			var open []net.Conn
			defer func() {
				for _, nc := range open {
					nc.Close()
				}
			}()
			for {
				select {
				case <-stop:
					return
				default:
				}
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.66")}}
				nc, err := d.Dial("tcp", addr)
				if err != nil {
					continue
				}
				if open = append(open, nc); len(open) > 50 {
					open[0].Close()
					open = open[1:]
				}
			}
		})
	}
	most := 0 // places that the flood had
	for k := range 100 {
		session.good(rw16(0x88, 0, 1), nil, 512)
		s.mu.Lock()
		most = max(most, s.places.of(netip.MustParseAddr("127.0.0.66")).loggingIn)
		s.mu.Unlock()
		if k%20 == 0 {
			i, st := loginFrom(t, "127.0.0.2", addr, byte(k))
			if st != 0 {
				t.Errorf("login %d: status %04Xh", k, st)
			}
			i.nc.Close()
		}
	}
	close(stop)
	flood.Wait()
	if most == 0 || most > 16 {
		t.Errorf("the flood had %d places", most)
	}
	waitFor(t, "the flood to be gone", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.places.loggingIn.Len() == 0
	})
	if got := text(); strings.Count(got, "refused: ") == 0 || strings.Count(got, "\n") > 200 {
		t.Errorf("the log tells:\n%s", got)
	}
}

func TestRefusedConnectionsAreBoundedThemselves(t *testing.T) {
	s, addr := begin(t, Config{ConnectionsLoggingIn: 1}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	dialFrom(t, "127.0.0.9", addr)
	waitFor(t, "the place to be taken", func() bool { return s.loggingIn() == 1 })
	for range mostRefusals {
		s.refusals <- struct{}{} // as many as are being told
	}
	nc := dialFrom(t, "127.0.0.9", addr)
	if got, err := io.ReadAll(nc); len(got) > 0 {
		t.Errorf("one more is told: %d bytes, %v", len(got), err)
	}
	<-s.refusals
	silent := dialFrom(t, "127.0.0.9", addr)
	waitFor(t, "a silent one to be closed", func() bool { return ended(silent) })
	waitFor(t, "its room", func() bool { return len(s.refusals) == mostRefusals-1 })
	over(t, dialFrom(t, "127.0.0.9", addr)).refused()
}

func TestLoginMayComeByteByByteWithinItsTime(t *testing.T) {
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpLoginRequest)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagTransit | 3)
	data := iscsi.AppendText(nil, names(false)...)
	h.SetDataLength(len(data))
	all := append(h[:], data...)
	for len(all)%4 != 0 {
		all = append(all, 0)
	}
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := dial(t, addr)
	for k := range all {
		if _, err := i.nc.Write(all[k : k+1]); err != nil {
			t.Fatal(err)
		}
	}
	if p := i.recv(); p.LoginStatus() != 0 {
		t.Errorf("login status %04Xh", p.LoginStatus())
	}
	// One that goes on and on is dropped, however busy it is.
	_, addr = begin(t, Config{LoginTimeout: 200 * time.Millisecond}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	for name, part := range map[string][]byte{"a header": all[:1], "text with the C bit": nil} {
		nc := dialFrom(t, "127.0.0.1", addr)
		began := time.Now()
		var err error
		for err == nil && time.Since(began) < 20*time.Second {
			if part == nil {
				var c iscsi.BHS
				c.SetOpcode(iscsi.OpLoginRequest)
				c.SetImmediate()
				c.SetFlags(iscsi.FlagContinue)
				_, err = nc.Write(c[:])
			} else {
				_, err = nc.Write(part)
				part = []byte{0}
			}
			if err == nil && ended(nc) && part != nil {
				err = io.EOF
			}
		}
		if err == nil {
			t.Errorf("%s: after %v it is still there", name, time.Since(began))
		}
	}
}

func TestNoticesDoNotFillTheLog(t *testing.T) {
	log, text := records()
	synctest.Test(t, func(t *testing.T) {
		n := newNotices()
		for k := range 1000 {
			n.tell(log, fmt.Sprint("notice ", k))
		}
		time.Sleep(time.Second)
		n.tell(log, "last")
	})
	if got := text(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "last (and 999 more") {
		t.Errorf("the log tells:\n%s", got)
	}
}
