package e2e

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lunshift/tests/peer"
)

// refused serves the volume and wants check and start to refuse it, each with
// the words.
func refused(t *testing.T, v volume, words ...string) {
	t.Helper()
	s := newService(t, v)
	check := func(when string) {
		t.Helper()
		r := s.try("check")
		if r.code != failed {
			t.Errorf("check %s: exit code %d, want %d: %s%s", when, r.code, failed, r.stdout, r.stderr)
		}
		for _, w := range words {
			if !strings.Contains(r.stdout+r.stderr, w) {
				t.Errorf("check %s lacks %q: %s%s", when, w, r.stdout, r.stderr)
			}
		}
	}
	check("before serve")
	s.start()
	check("beside serve")
	s.fails(failed, append(words, v.name), "start", v.name)
	if st := s.status(v.name); st.Phase != "ready" && st.Phase != "unknown" {
		t.Errorf("refused, and yet in phase %s", st.Phase)
	}
	s.stop()
}

func TestMigrationThatCannotBeRightIsRefused(t *testing.T) {
	needTools(t)
	dir := t.TempDir()
	const size = 16 * mib
	old := newArray(t, "old",
		peer.Unit{Path: sparseFile(t, dir, "a.img", size, 0.4, 1), Thin: true},
		peer.Unit{Path: sparseFile(t, dir, "b.img", size, 0.4, 2), Thin: true, ID: "ONE-AND-THE-SAME", Serial: "SAME"})
	late := emptyFile(t, dir, "late.img", size)
	f, err := os.OpenFile(late, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte{1}, size-1)
	must(t, err)
	must(t, f.Close())
	to := newArray(t, "new",
		peer.Unit{Path: emptyFile(t, dir, "small.img", size-mib), Thin: true},
		peer.Unit{Path: emptyFile(t, dir, "large-blocks.img", size), BlockSize: 4096},
		peer.Unit{Path: sparseFile(t, dir, "used.img", size, 0.4, 3), Thin: true},
		peer.Unit{Path: late, Thin: true},
		peer.Unit{Path: emptyFile(t, dir, "path2.img", size), ID: "ONE-AND-THE-SAME", Serial: "SAME"})
	source := old.unit(1).URL()
	for _, c := range []struct {
		name                string
		source, destination string
		words               []string
	}{
		{"destination smaller", source, to.unit(1).URL(), []string{"smaller"}},
		{"block sizes differ", source, to.unit(2).URL(), []string{"block size", "512", "4096"}},
		{"destination not blank", source, to.unit(3).URL(), []string{"not blank", "overwrite"}},
		{"destination not blank in its last block", source, to.unit(4).URL(), []string{"not blank"}},
		{"two paths to one device", old.unit(2).URL(), to.unit(5).URL(), []string{"same device"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			refused(t, volume{name: "db01", source: c.source, destination: c.destination}, c.words...)
		})
	}
	t.Run("two names of one file", func(t *testing.T) {
		path := sparseFile(t, t.TempDir(), "x.img", size, 0.1, 1)
		other := path + ".link"
		must(t, os.Link(path, other))
		s := newService(t, volume{name: "db01", source: path, destination: other})
		r := s.try("check")
		if r.code != failed || !strings.Contains(r.stdout+r.stderr, "same") {
			t.Errorf("check: exit code %d: %s%s", r.code, r.stdout, r.stderr)
		}
	})
	t.Run("overwrite allows it", func(t *testing.T) {
		s := newService(t, volume{name: "db01", source: source, destination: to.unit(3).URL(), more: "overwrite = true\n"})
		s.start()
		s.run("adopt", "db01", "--new")
		s.run("check")
		s.run("start", "db01")
		s.run("cutover", "db01", "--wait")
		s.stop()
		must(t, to.unit(3).Compare(t.Context(), filepath.Join(dir, "a.img")))
	})
}

func TestStateOfAnotherPairIsRefused(t *testing.T) {
	needTools(t)
	dir := t.TempDir()
	const size = 8 * mib
	a := newArray(t, "old", peer.Unit{Path: sparseFile(t, dir, "a.img", size, 0.4, 1)}, peer.Unit{Path: sparseFile(t, dir, "b.img", size, 0.4, 2)})
	b := newArray(t, "new", peer.Unit{Path: emptyFile(t, dir, "c.img", size), Thin: true})
	s := newService(t, volume{name: "db01", source: a.unit(1).URL(), destination: b.unit(1).URL()})
	s.start()
	s.run("throttle", "db01", "--rate", "64KiB")
	s.run("start", "db01")
	s.stop()
	s.volumes[0].source = a.unit(2).URL()
	s.configure()
	s.serveFails("db01")
	// The right pair goes on where it was.
	s.volumes[0].source = a.unit(1).URL()
	s.configure()
	s.start()
	if st := s.status("db01"); st.Phase != "migrating" {
		t.Errorf("after the detour: %+v", st)
	}
	s.stop()
}

// serveFails wants serve to end by itself with exit code 1 and one line that
// begins with "lunshift: ", among what it logs, with the words.
func (s *service) serveFails(words ...string) {
	s.t.Helper()
	began := time.Now()
	r := s.try("serve")
	if r.code != failed {
		s.t.Errorf("serve: exit code %d after %v, want %d: %s", r.code, time.Since(began), failed, r.stderr)
		return
	}
	var lines []string
	for line := range strings.Lines(r.stderr) {
		if strings.HasPrefix(line, "lunshift: ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	if len(lines) != 1 {
		s.t.Errorf("serve: want one line, have %q in %s", lines, r.stderr)
		return
	}
	for _, w := range words {
		if !strings.Contains(lines[0], w) {
			s.t.Errorf("serve: the line lacks %q: %s", w, lines[0])
		}
	}
}

// files is a volume of two files, which needs no array.
func files(t *testing.T) volume {
	dir := t.TempDir()
	return volume{name: "db01", source: sparseFile(t, dir, "old.img", 8*mib, 0.4, 1), destination: emptyFile(t, dir, "new.img", 8*mib)}
}

func TestPortalInUseIsRefused(t *testing.T) {
	s := newService(t, files(t))
	l, err := net.Listen("tcp", s.portal)
	must(t, err)
	defer l.Close()
	s.serveFails(s.portal, "in use")
}

func TestPortalsListenOnExactlyTheirAddresses(t *testing.T) {
	s := newService(t, files(t))
	s.start()
	_, port, err := net.SplitHostPort(s.portal)
	must(t, err)
	other := net.JoinHostPort("127.0.0.2", port)
	if c, err := net.Dial("tcp", other); err == nil {
		c.Close()
		t.Errorf("%s answers though the portal is %s", other, s.portal)
	}
	c, err := net.Dial("tcp", s.portal)
	must(t, err)
	c.Close()
	s.stop()
}

func TestLockedStateDirectoryIsRefused(t *testing.T) {
	s := newService(t, files(t))
	s.start()
	other := newService(t, files(t))
	other.state = s.state
	other.configure()
	other.serveFails(s.state)
	s.stop()
}

func TestFileThatAnotherServiceHoldsIsRefused(t *testing.T) {
	v := files(t)
	s := newService(t, v)
	s.start()
	v.destination = emptyFile(t, t.TempDir(), "other.img", 8*mib)
	other := newService(t, v)
	other.serveFails("in use", v.source)
	s.stop()
}

func TestSecondServiceOnOneSocketIsRefused(t *testing.T) {
	s := newService(t, files(t))
	s.start()
	other := newService(t, files(t))
	other.dir = s.dir
	other.configure() // the socket of the first, with other files
	other.serveFails("running")
	s.run("status")
	s.stop()
}

func TestUnreachableLUNIsRefused(t *testing.T) {
	v := files(t)
	v.destination = "iscsi://" + peer.FreePort(t) + "/iqn.2001-04.com.example:new/1"
	s := newService(t, v)
	r := s.try("check")
	if r.code != failed || !strings.Contains(r.stdout+r.stderr, v.destination) && !strings.Contains(r.stdout+r.stderr, strings.Split(v.destination, "/")[2]) {
		t.Errorf("check: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	s.serveFails("db01")
}

func TestLUNThatIsNotThereIsRefused(t *testing.T) {
	needTools(t)
	v := files(t)
	a := newArray(t, "new", peer.Unit{Path: emptyFile(t, t.TempDir(), "new.img", 8*mib)})
	v.destination = a.unit(9).URL()
	newService(t, v).serveFails("db01")
	missing := a.unit(1)
	missing.IQN += ".missing"
	v.destination = missing.URL()
	newService(t, v).serveFails("db01")
}

func TestWrongSecretIsRefusedAndNeverShown(t *testing.T) {
	needTools(t)
	const right, wrong = "right-secret-12", "wrong-secret-34"
	v := files(t)
	d := peer.StartTgtd(t)
	path := emptyFile(t, t.TempDir(), "new.img", 8*mib)
	iqn := "iqn.2001-04.com.example:new"
	must(t, d.AddTarget(t.Context(), iqn, []peer.Unit{{Path: path, Thin: true}}, peer.Account{User: "migrate", Secret: right}))
	unit := d.LUN(iqn, 1)
	unit.User = "migrate"
	v.destination = unit.URL()

	s := newService(t, v)
	s.env = []string{"LUNSHIFT_SECRET_DB01_DESTINATION=" + wrong}
	r := s.try("check")
	if r.code != failed || !strings.Contains(r.stdout+r.stderr, "secret") && !strings.Contains(r.stdout+r.stderr, "authentication") {
		t.Errorf("check: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	if strings.Contains(r.stdout+r.stderr, wrong) {
		t.Error("check shows the secret")
	}
	s.serveFails("db01")

	file := filepath.Join(s.dir, "secret")
	must(t, os.WriteFile(file, []byte(right+"\n"), 0o600))
	s.env = nil
	s.volumes[0].more = "destination_secret_file = \"" + file + "\"\n"
	s.configure()
	s.start()
	s.run("start", "db01")
	s.run("cutover", "db01", "--wait")
	s.stop()
	if at, same := sameImages(t, v.source, path, 8*mib); !same {
		t.Errorf("wrong content at byte %d", at)
	}
	for _, secret := range []string{right, wrong} {
		log, err := os.ReadFile(s.log.Name())
		must(t, err)
		if strings.Contains(string(log), secret) {
			t.Error("the log shows a secret")
		}
	}

	must(t, os.Chmod(file, 0o644))
	if r := s.try("check"); r.code == done || !strings.Contains(r.stderr, file) {
		t.Errorf("a secret that all may read: exit code %d: %s", r.code, r.stderr)
	}
}
