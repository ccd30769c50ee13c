package e2e

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"lunshift/tests/peer"
)

const (
	appName   = "iqn.2026-11.net.example:app1"
	otherName = "iqn.2026-11.net.example:app2"
)

func needInitiators(t *testing.T) {
	t.Helper()
	peer.Need(t, "qemu-io", "iscsi-inq", "iscsi-ls", "iscsi-readcapacity16")
}

// as is a LUN as an initiator of that name meets it.
func as(l peer.LUN, name string) peer.LUN {
	l.Initiator = name
	return l
}

func proving(l peer.LUN, user, secret string) peer.LUN {
	l.User, l.Secret = user, secret
	return l
}

// freePort6 is freePort on ::1.
func freePort6(t *testing.T) string {
	t.Helper()
	for range 1000 {
		address := fmt.Sprintf("[::1]:%d", 20000+rand.IntN(10000))
		if l, err := net.Listen("tcp", address); err == nil {
			l.Close()
			return address
		}
	}
	t.Fatal("no free port on ::1")
	return ""
}

// enters logs in with tools of both kinds and reads and writes.
func (s *service) enters(l peer.LUN) {
	s.t.Helper()
	if out, err := l.Inquiry(s.t.Context(), -1); err != nil || !strings.Contains(out, "LUNSHIFT") {
		s.t.Errorf("iscsi-inq of %s as %s: %v: %s", l.URL(), l.Initiator, err, out)
	}
	if l.TargetUser != "" {
		return // QEMU asks for no proof of the target
	}
	if _, err := l.QemuIO(s.t.Context(), peer.Write(0x5a, 0, 64*kib), peer.Read(0x5a, 0, 64*kib)); err != nil {
		s.t.Errorf("qemu-io on %s as %s: %v", l.URL(), l.Initiator, err)
	}
}

// isRefused wants the login to fail.
func (s *service) isRefused(l peer.LUN, why string) {
	s.t.Helper()
	if out, err := l.Inquiry(s.t.Context(), -1); err == nil {
		s.t.Errorf("%s: iscsi-inq logged in to %s as %s: %s", why, l.URL(), l.Initiator, out)
	}
	if out, err := l.QemuIO(s.t.Context(), peer.Read(0, 0, 512)); err == nil {
		s.t.Errorf("%s: qemu-io logged in to %s as %s: %s", why, l.URL(), l.Initiator, out)
	}
}

// sees gives the portals that discovery tells for the volume's target, sorted; ok is
// false where it does not name it.
func (s *service) sees(l peer.LUN) (portals []string, ok bool) {
	s.t.Helper()
	out, err := l.Discover(s.t.Context())
	for _, m := range regexp.MustCompile(`Target:(\S+) Portal:(\S+)`).FindAllStringSubmatch(out, -1) {
		if m[1] == l.IQN {
			portals = append(portals, m[2])
		}
	}
	if err == nil && len(portals) == 0 && strings.Contains(out, l.IQN) {
		s.t.Errorf("what iscsi-ls says is not understood: %s", out)
	}
	slices.Sort(portals)
	return portals, len(portals) > 0
}

// hides wants none of the secrets in anything that people see, nor on the service's
// command line.
func (s *service) hides(secrets ...string) {
	s.t.Helper()
	read := func(path string) string {
		b, err := os.ReadFile(path)
		must(s.t, err)
		return string(b)
	}
	shown := map[string]string{
		"the log":          read(s.log.Name()),
		"the command line": read(fmt.Sprintf("/proc/%d/cmdline", s.cmd.Process.Pid)),
	}
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"status", "db01"}, {"status", "db01", "--json"}, {"check"}, {"check", "--json"}} {
		r := s.try(args...)
		shown[strings.Join(args, " ")] = r.stdout + r.stderr
	}
	for where, text := range shown {
		for _, secret := range secrets {
			if strings.Contains(text, secret) {
				s.t.Errorf("%s shows a secret", where)
			}
		}
	}
}

// secret makes a secret file in the service's directory.
func (s *service) secret(name, secret string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	must(s.t, os.WriteFile(path, []byte(secret+"\n"), 0o600))
	return path
}

// admitting gives the volume a list of who may come in, and writes the configuration.
func (s *service) admitting(lines string) {
	s.t.Helper()
	s.volumes[0].more = lines
	s.configure()
}

func TestOnlyInitiatorsOfTheListComeInAndSeeTheTarget(t *testing.T) {
	needInitiators(t)
	s := newService(t, files(t))
	six := freePort6(t)
	s.portals = []string{six}
	s.admitting(`
[[volume.initiator]]
name = "` + appName + `"
networks = ["127.0.0.0/8"]
[[volume.initiator]]
name = "iqn.1994-05.com.example:*"
`)
	s.start()
	four := s.front("db01")
	bySix := four
	bySix.Portal = six

	s.enters(as(four, appName))
	s.enters(as(four, "iqn.1994-05.com.example:host9"))
	s.enters(as(bySix, "iqn.1994-05.com.example:host9"))
	for _, stranger := range []peer.LUN{
		as(four, otherName), as(four, appName+"1"), as(four, strings.TrimSuffix(appName, "1")),
		as(four, "iqn.1994-05.com.exampl"), as(bySix, appName), // who comes from ::1
	} {
		s.isRefused(stranger, "not in the list")
		if at, ok := s.sees(stranger); ok {
			t.Errorf("%s from outside the list sees the target at %v", stranger.Initiator, at)
		}
	}
	if at, ok := s.sees(as(four, appName)); !ok {
		t.Errorf("an initiator of the list does not see the target: %v", at)
	}
	s.untilLog(otherName, 1)
	s.stop()
}

func TestWithoutAListThisHostAloneComesInAndCheckSaysSo(t *testing.T) {
	needInitiators(t)
	s := newService(t, files(t))
	out := s.run("check")
	if !strings.Contains(out, "loopback only") || !strings.Contains(out, "[[volume.initiator]]") {
		t.Errorf("check: %s", out)
	}
	s.start()
	if out := s.run("check"); !strings.Contains(out, "loopback only") || strings.Contains(out, "warning") {
		t.Errorf("check beside the service: %s", out)
	}
	s.enters(s.front("db01"))
	s.admitting("[[volume.initiator]]\nname = \"*\"\n")
	if out := s.run("check"); !strings.Contains(out, "any initiator from anywhere, without authentication") ||
		!strings.Contains(out, "needs no authentication: ") || !strings.Contains(out, "the running service lets others in than the file says") {
		t.Errorf("check of a list for everybody: %s", out)
	}
	s.stop()
}

func TestInitiatorsProveThemselvesByCHAP(t *testing.T) {
	needInitiators(t)
	const secret, wrong, own = "app1-secret-4711", "app1-secret-0815", "gateway-secret-42"
	s := newService(t, files(t))
	s.more = "[service.limits]\nlogin_failures = 1000\n"
	s.admitting(`
[[volume.initiator]]
name = "` + appName + `"
chap_user = "app1"
chap_secret_file = "` + s.secret("app1.secret", secret) + `"
target_user = "gw"
target_secret_file = "` + s.secret("gw.secret", own) + `"
[[volume.initiator]]
name = "` + otherName + `"
networks = ["127.0.0.1"]
chap_user = "app2"
`)
	s.env = []string{"LUNSHIFT_SECRET_DB01_INITIATOR_APP2=" + wrong}
	out := s.run("check")
	for _, want := range []string{appName + " from anywhere, mutual CHAP", otherName + " from 127.0.0.1/32, CHAP"} {
		if !strings.Contains(out, want) {
			t.Errorf("check lacks %q: %s", want, out)
		}
	}
	if strings.Contains(out, "warning") {
		t.Errorf("check warns: %s", out)
	}
	s.start()
	front := s.front("db01")

	s.enters(proving(as(front, appName), "app1", secret))
	s.enters(proving(as(front, otherName), "app2", wrong))
	host := shell(t, proving(as(front, appName), "app1", secret))
	if sessions := s.status("db01").Sessions; len(sessions) != 1 || sessions[0].CHAPUser != "app1" || sessions[0].Initiator != appName || sessions[0].Group != 1 {
		t.Errorf("sessions: %+v", sessions)
	}
	if out := s.run("status", "db01"); !strings.Contains(out, "CHAP user app1") {
		t.Errorf("status: %s", out)
	}
	for why, l := range map[string]peer.LUN{
		"no proof":              as(front, appName),
		"wrong secret":          proving(as(front, appName), "app1", wrong),
		"wrong user":            proving(as(front, appName), "app9", secret),
		"another's user":        proving(as(front, appName), "app2", wrong),
		"another's name":        proving(as(front, otherName), "app1", secret),
		"the target's":          proving(as(front, appName), "gw", own),
		"not in the list":       proving(as(front, appName+"x"), "app1", secret),
		"another's, not proven": as(front, otherName),
	} {
		s.isRefused(l, why)
	}
	// The session that there was is disturbed by none of them.
	if _, err := host.Do(t.Context(), peer.Write(0x77, 0, 4*kib)); err != nil {
		t.Errorf("a session beside refused ones: %v", err)
	}
	must(t, host.Close())

	// Mutual CHAP: the initiator refuses a target that does not know its secret.
	mutual := proving(as(front, appName), "app1", secret)
	mutual.TargetUser, mutual.TargetSecret = "gw", own
	s.enters(mutual)
	mutual.TargetSecret = wrong
	s.isRefusedByInitiator(mutual)
	mutual.TargetUser, mutual.TargetSecret = "someone", own
	s.isRefusedByInitiator(mutual)
	unable := proving(as(front, otherName), "app2", wrong)
	unable.TargetUser, unable.TargetSecret = "gw", own
	s.isRefusedByInitiator(unable) // whose entry has no secret for the target

	// Who must prove itself sees the target in discovery once it did.
	if at, ok := s.sees(as(front, appName)); ok {
		t.Errorf("the target is seen without a proof, at %v", at)
	}
	if _, ok := s.sees(proving(as(front, appName), "app1", secret)); !ok {
		t.Error("the target is not seen with the proof")
	}
	s.untilLog(appName, 1)
	s.untilLog("127.0.0.1", 1)
	s.hides(secret, wrong, own)
	s.stop()
}

func (s *service) isRefusedByInitiator(l peer.LUN) {
	s.t.Helper()
	if out, err := l.Inquiry(s.t.Context(), -1); err == nil {
		s.t.Errorf("iscsi-inq took a target that does not prove itself as %s: %s", l.TargetUser, out)
	}
}

func TestDiscoveryAsksForAProofWhereItIsToldTo(t *testing.T) {
	needInitiators(t)
	const secret, wrong = "discovery-secret", "another-secret-1"
	s := newService(t, files(t))
	s.more = "[service.discovery]\nchap_user = \"disc\"\nchap_secret_file = \"" + s.secret("disc.secret", secret) + "\"\n"
	s.admitting("[[volume.initiator]]\nname = \"" + appName + "\"\nnetworks = [\"127.0.0.0/8\"]\n")
	if out := s.run("check"); !strings.Contains(out, "discovery needs CHAP") {
		t.Errorf("check: %s", out)
	}
	s.start()
	front := s.front("db01")
	if at, ok := s.sees(proving(as(front, appName), "disc", secret)); !ok || len(at) != 1 || at[0] != s.portal+",1" {
		t.Errorf("with the proof: %v", at)
	}
	for why, l := range map[string]peer.LUN{
		"no proof":     as(front, appName),
		"wrong secret": proving(as(front, appName), "disc", wrong),
		"wrong user":   proving(as(front, appName), "app1", secret),
		"not its own":  proving(as(front, otherName), "disc", secret), // with the proof, and nothing to see
	} {
		if at, ok := s.sees(l); ok {
			t.Errorf("%s: the target is seen at %v", why, at)
		}
	}
	s.enters(as(front, appName)) // discovery's proof is not the volume's
	s.hides(secret, wrong)
	s.stop()
}

func TestPortalGroupsLeadToTheirVolumes(t *testing.T) {
	needInitiators(t)
	one, two := files(t), files(t)
	two.name = "db02"
	one.more, two.more = "portal_groups = [2]\n", ""
	s := newService(t, one, two)
	second, six := peer.FreePort(t), freePort6(t)
	s.portals = []string{second + ",2", six + ",3"}
	s.configure()
	s.start()
	at := func(name, portal string) peer.LUN {
		l := s.front(name)
		l.Portal = portal
		return l
	}
	for _, portal := range []string{s.portal, second, six} {
		if got, ok := s.sees(at("db01", portal)); !ok || len(got) != 1 || got[0] != second+",2" {
			t.Errorf("discovery at %s tells of db01: %v", portal, got)
		}
		got, _ := s.sees(at("db02", portal))
		want := []string{s.portal + ",1", second + ",2", six + ",3"}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("discovery at %s tells of db02: %v, want %v", portal, got, want)
		}
		s.enters(at("db02", portal))
	}
	s.enters(at("db01", second))
	s.isRefused(at("db01", s.portal), "portal of another group")
	s.isRefused(at("db01", six), "portal of another group")
	host := shell(t, at("db02", six))
	if got := s.status("db02").Sessions; len(got) != 1 || got[0].Group != 3 {
		t.Errorf("sessions: %+v", got)
	}
	must(t, host.Close())
	s.stop()
}

func TestPortalOnAllAddressesKeepsToItsVersionOfIP(t *testing.T) {
	needInitiators(t)
	s := newService(t, files(t))
	_, port, err := net.SplitHostPort(s.portal)
	must(t, err)
	four, six := net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)
	s.portal = "0.0.0.0:" + port
	s.configure()
	s.start()
	if c, err := net.Dial("tcp", six); err == nil {
		c.Close()
		t.Errorf("%s answers though the portal is %s", six, s.portal)
	}
	s.stop()
	s.portals = []string{"[::]:" + port + ",2"}
	s.configure()
	s.start()
	for portal, want := range map[string]string{four: four + ",1", six: six + ",2"} {
		l := s.front("db01")
		l.Portal = portal
		s.enters(l)
		if got, _ := s.sees(l); len(got) != 1 || got[0] != want {
			t.Errorf("discovery at %s: %v, want %s", portal, got, want)
		}
	}
	s.stop()
}

func TestLimitsRefuseOneAddressAndServeTheOthers(t *testing.T) {
	needInitiators(t)
	s := newService(t, files(t))
	six := freePort6(t)
	s.portals = []string{six}
	s.more = "[service.limits]\nconnections_per_address = 2\nsessions_per_volume = 3\n"
	s.configure()
	s.start()
	front := s.front("db01")
	other := front
	other.Portal = six
	name := func(n int) string { return fmt.Sprintf("iqn.2026-11.net.example:host%d", n) }
	first, second := shell(t, as(front, name(1))), shell(t, as(front, name(2)))
	s.isRefused(as(front, name(3)), "a third session of one address")
	third := shell(t, as(other, name(4))) // of another address
	s.isRefused(as(other, name(5)), "a fourth session of the volume")
	for i, host := range []*peer.QemuShell{first, second, third} {
		if _, err := host.Do(t.Context(), peer.Write(byte(i), 0, 64*kib)); err != nil {
			t.Errorf("session %d beside refused ones: %v", i, err)
		}
	}
	must(t, second.Close())
	s.until("db01", "without the session that ended", func(st status) bool { return len(st.Sessions) == 2 })
	s.enters(as(front, name(3)))
	must(t, first.Close())
	must(t, third.Close())
	s.stop()
}

func TestConnectionsThatDoNotLogInAreClosedInTime(t *testing.T) {
	needInitiators(t)
	s := newService(t, files(t))
	s.more = "[service.limits]\nconnections_logging_in = 4\ninitiator_login_timeout = \"1s\"\n"
	s.configure()
	s.start()
	var idle []net.Conn
	for range 4 {
		c, err := net.Dial("tcp", s.portal)
		must(t, err)
		defer c.Close()
		_, err = c.Write([]byte{0x43}) // a login request begins so, and goes on no further
		must(t, err)
		idle = append(idle, c)
	}
	for _, c := range idle {
		must(t, c.SetReadDeadline(time.Now().Add(30*time.Second)))
		if _, err := io.Copy(io.Discard, c); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection that does not log in is still there after 30 s")
		}
	}
	s.enters(s.front("db01"))
	s.stop()
}

func TestFailedLoginsOfOneAddressAreLimited(t *testing.T) {
	needInitiators(t)
	const secret, wrong = "app1-secret-4711", "app1-secret-0815"
	s := newService(t, files(t))
	six := freePort6(t)
	s.portals = []string{six}
	s.more = "[service.limits]\nlogin_failures = 3\n"
	s.admitting("[[volume.initiator]]\nname = \"*\"\nchap_user = \"app1\"\nchap_secret_file = \"" + s.secret("app1.secret", secret) + "\"\n")
	s.start()
	front := s.front("db01")
	other := front
	other.Portal = six
	host := shell(t, proving(front, "app1", secret))
	for range 3 {
		if out, err := proving(front, "app1", wrong).Inquiry(t.Context(), -1); err == nil {
			t.Fatalf("a wrong secret passed: %s", out)
		}
	}
	if out, err := proving(front, "app1", secret).Inquiry(t.Context(), -1); err == nil {
		t.Errorf("an address that failed 3 times is heard: %s", out)
	}
	s.enters(proving(other, "app1", secret))
	if _, err := host.Do(t.Context(), peer.Write(1, 0, 4*kib)); err != nil {
		t.Errorf("a session of the address: %v", err)
	}
	must(t, host.Close())
	s.hides(secret, wrong)
	s.stop()
}

func TestFaultySecretsOfInitiatorsAreOneLineEach(t *testing.T) {
	s := newService(t, files(t))
	file := filepath.Join(s.dir, "app1.secret")
	s.admitting("[[volume.initiator]]\nname = \"*\"\nchap_user = \"app1\"\nchap_secret_file = \"" + file + "\"\n")
	for _, tc := range []struct {
		content string
		mode    os.FileMode
		want    string
	}{
		{"long enough secret\n", 0o644, "others can read " + file + " (mode 0644); chmod 600 it"},
		{"too short\n", 0o600, "the secret in " + file + " has 9 bytes; it is 12 to 255"},
		{"", 0o600, file + " holds no secret"},
		{"long enough secret\nand another\n", 0o600, file + " holds more than one line"},
		{"missing", 0, "cannot read " + file + ": no such file or directory"},
	} {
		must(t, os.RemoveAll(file))
		if tc.mode != 0 {
			must(t, os.WriteFile(file, []byte(tc.content), 0o600))
			must(t, os.Chmod(file, tc.mode))
		}
		for _, command := range []string{"check", "serve"} {
			r := s.try(command)
			if r.code == done || strings.Contains(r.stderr, "long enough") || strings.Contains(r.stderr, "too short\n") {
				t.Errorf("%s with %q: exit code %d: %s", command, tc.content, r.code, r.stderr)
			}
			s.oneLine(r.stderr, []string{s.config() + ":", "volume[db01].initiator[0].chap_secret_file: " + tc.want}, command)
		}
	}
}

// A host that stays logged in is sent to the new array by the cutover, and so is every
// later login, after a restart of lunshift too.
func TestLoginsAreSentToTheNewArrayAfterTheCutover(t *testing.T) {
	needTools(t)
	d := peer.StartTgtd(t)
	path := emptyFile(t, t.TempDir(), "new.img", 8*mib)
	must(t, d.AddTarget(t.Context(), frontIQN("db01"), []peer.Unit{{Path: path, Thin: true}}))
	direct := d.LUN(frontIQN("db01"), 1)
	v := files(t)
	v.lun, v.destination = 1, direct.URL()
	v.more = "redirect = \"" + direct.Portal + "\"\n"
	s := newService(t, v)
	s.start()
	front := s.front("db01")
	front.Number = 1
	host := shell(t, front)
	write := func(pattern byte) {
		t.Helper()
		if _, err := host.Do(t.Context(), peer.Write(pattern, 0, 64*kib)); err != nil {
			t.Fatal(err)
		}
	}
	write(1)
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "synced", "--timeout", "1m")
	write(2)
	if names, err := d.Initiators(t.Context(), frontIQN("db01")); err != nil || len(names) != 1 {
		t.Errorf("sessions at the new array before the cutover: %v, %v", names, err)
	}
	s.run("cutover", "db01")
	write(3)
	must(t, host.Close())
	check := func(pattern byte) {
		t.Helper()
		for _, l := range []peer.LUN{direct, front} {
			if _, err := l.QemuIO(t.Context(), peer.Read(pattern, 0, 64*kib)); err != nil {
				t.Errorf("at %s: %v", l.Portal, err)
			}
		}
		if got, _ := s.sees(front); len(got) != 1 || got[0] != direct.Portal+",1" {
			t.Errorf("discovery tells %v, want %s", got, direct.Portal)
		}
	}
	check(3)
	s.stop()
	s.start()
	check(3)
	s.run("remove", "db01")
	check(3)
	s.stop()
	s.start()
	check(3)
	s.stop()
}
