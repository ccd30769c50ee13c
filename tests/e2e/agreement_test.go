package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lunshift/tests/peer"
)

// A cutover of a group whose parties are not all ready changes nothing, be it asked for dry or not, and
// names all who are not: an array that is away, a hook that is not there, a volume that is not
// copied. Initiators of the others go on writing. Once all are ready it is done.
func TestACutoverOfAGroupNamesAllWhoAreNotReady(t *testing.T) {
	needTools(t)
	const size = 16 * mib
	dir := t.TempDir()
	s := newService(t)
	s.ioTimeout = "5s"
	hook := filepath.Join(dir, "hook")
	var news []*array
	for i, name := range []string{"a", "b", "c"} {
		unit := peer.Unit{Path: emptyFile(t, dir, name+".new", size), BlockSize: 512, Thin: true}
		to := newArray(t, "new-"+name, unit)
		news = append(news, to)
		s.volumes = append(s.volumes, volume{name: name, source: sparseFile(t, dir, name+".old", size, 0.5, uint64(i)), destination: to.unit(1).URL()})
	}
	s.volumes[0].more = "verify_sample = \"0\"\nhooks.before_cutover = [\"" + hook + "\"]\n"
	s.volumes[1].more = "verify_sample = \"0\"\n"
	s.volumes[2].more = "copy = { rate = \"128KiB\" }\n[[group]]\nname = \"erp\"\nvolumes = [\"a\", \"b\", \"c\"]\n"
	must(t, os.WriteFile(hook, []byte("#!/bin/sh\n"), 0o700))
	s.configure()
	s.start()
	s.run("start", "erp")
	for _, name := range []string{"a", "b"} {
		s.run("wait", name, "--for", "synced", "--timeout", "60s")
	}
	s.run("pause", "c")
	if r := s.try("wait", "erp", "--for", "synced", "--timeout", "1s"); r.code != failed || strings.Count(r.stderr, "is paused") != 1 ||
		!strings.Contains(r.stderr, "volume c is paused; resume it with: lunshift resume c\n") || !strings.Contains(r.stderr, "volume c: still migrating after ") {
		t.Errorf("wait for a group of which one is paused: %+v", r)
	}
	s.run("resume", "c")
	m := newModel(t, filepath.Join(dir, "a.old"), 512)
	host := shell(t, s.front("a"))
	defer host.Close()

	must(t, os.Remove(hook))
	portal := news[1].Portal()
	must(t, news[1].Kill())
	s.until("b", "without its destination", func(st status) bool { return st.Destination.State != "online" })
	// Somebody writes all the while, and is not held.
	asked, longest := make(chan struct{}), make(chan time.Duration, 1)
	go func() {
		worst := time.Duration(0)
		for i := 0; ; i++ {
			select {
			case <-asked:
				longest <- worst
				return
			default:
			}
			began := time.Now()
			if _, err := host.Do(t.Context(), peer.Write(byte(i), 0, 64*kib)); err != nil {
				t.Error(err)
			}
			worst = max(worst, time.Since(began))
		}
	}()
	missing := []string{"volume a: hook before_cutover " + hook, "volume b: destination iscsi://" + portal, "volume c: cutover is not allowed in phase migrating"}
	s.fails(wrongPhase, append(missing, "group erp: cutover not begun"), "cutover", "erp")
	s.fails(wrongPhase, append(missing, "erp: the cutover would not begin"), "cutover", "erp", "--dry-run")
	var r struct {
		Ready   bool
		Parties []struct {
			Party string
			Ready bool
		}
	}
	out := s.try("cutover", "erp", "--dry-run", "--json")
	must(t, json.Unmarshal([]byte(out.stdout), &r))
	refusing := 0
	for _, p := range r.Parties {
		if !p.Ready {
			refusing++
		}
	}
	if out.code != wrongPhase || r.Ready || refusing != len(missing) {
		t.Errorf("dry run: %+v", out)
	}
	close(asked)
	if took := <-longest; took > 2*time.Second {
		t.Errorf("a write took %v", took)
	}
	m.write(0x5a, 0, 64*kib)
	if _, err := host.Do(t.Context(), peer.Write(0x5a, 0, 64*kib)); err != nil {
		t.Fatal(err)
	}
	for name, phase := range map[string]string{"a": "synced", "b": "synced", "c": "migrating"} {
		if st := s.status(name); st.Phase != phase {
			t.Errorf("volume %s is %s", name, st.Phase)
		}
	}

	must(t, os.WriteFile(hook, []byte("#!/bin/sh\n"), 0o700))
	must(t, news[1].Start(t.Context()))
	s.run("throttle", "c", "--rate", "0")
	s.run("wait", "erp", "--for", "synced", "--timeout", "60s")
	s.until("b", "with its destination", func(st status) bool { return st.Destination.State == "online" })
	if text := s.run("cutover", "erp", "--dry-run"); !strings.Contains(text, "erp: the cutover would begin\n") {
		t.Errorf("dry run:\n%s", text)
	}
	must(t, host.Close())
	s.run("cutover", "erp")
	m.sameAs(filepath.Join(dir, "a.new"))
	s.stop()
}
