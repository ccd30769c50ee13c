package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"lunshift/state"
)

// A whole migration whose steps ask a site's script: it refuses the start at first, is under way
// when the service is killed, and agrees in the end. Initiators write all the while. The audit trail has all of it,
// after the kill and after the volume is removed.
//
// Caught, at the first run: a step that goes on though its hook refuses; a hook that follows on a phase
// once more after a restart; a step that a kill cut off and that looks as if it were under way.
func TestHooksAndTheTrailOfAWholeMigration(t *testing.T) {
	needTools(t)
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 16 * mib}.make(t)
	hook := filepath.Join(t.TempDir(), "hook")
	must(t, os.WriteFile(hook, []byte(`#!/bin/sh
cat > "$0.$LUNSHIFT_HOOK.json"
echo "$LUNSHIFT_HOOK" >> "$0.ran"
while [ -e "$0.$LUNSHIFT_HOOK.wait" ]; do sleep 0.02; done
[ ! -e "$0.$LUNSHIFT_HOOK.deny" ] || { echo "no change ticket for $LUNSHIFT_VOLUME"; exit 7; }
`), 0o700))
	have := func(name string) string { return hook + "." + name }
	touch := func(name string) { must(t, os.WriteFile(have(name), nil, 0o600)) }
	ran := func(name string) int {
		b, _ := os.ReadFile(have("ran")) // not before the first
		return strings.Count(string(b), name+"\n")
	}
	untilRan := func(name string, times int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ran(name) < times; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("hook %s did not run", name)
			}
		}
	}
	told := func(name string) (st status) {
		t.Helper()
		b, err := os.ReadFile(have(name + ".json"))
		must(t, err)
		must(t, json.Unmarshal(b, &st))
		return st
	}

	v := p.volume("db01")
	s := newService(t, v)
	s.more = "[hooks]\n"
	for _, name := range []string{"before_start", "after_synced", "before_cutover", "after_cutover"} {
		s.more += fmt.Sprintf("%s = [%q]\n", name, hook)
	}
	s.configure()
	s.start()

	touch("before_start.deny")
	s.fails(1, []string{"volume db01", "start not begun", "before_start", "exit code 7", "no change ticket for db01"}, "start", "db01")
	if phase := s.status("db01").Phase; phase != "ready" {
		t.Fatalf("phase %s after a hook refused the start", phase)
	}
	must(t, os.Remove(have("before_start.deny")))
	l := newLoad(s, p)
	l.during(func() {
		s.run("start", "db01")
		s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
		untilRan("after_synced", 1)
		touch("before_cutover.wait")
		cmd := exec.Command(binary, "--config", s.config(), "cutover", "db01")
		must(t, cmd.Start())
		untilRan("before_cutover", 1)
		l.more(100) // nothing is held while a hook runs
		s.kill()
		if cmd.Wait() == nil {
			t.Error("a cutover that was cut off is done")
		}
	})
	must(t, os.Remove(have("before_cutover.wait"))) // what is left of the hook ends
	s.start()
	if phase := s.status("db01").Phase; phase != "synced" {
		t.Fatalf("phase %s after a kill beside a hook", phase)
	}
	l.readBack()
	s.run("cutover", "db01")
	l.holds(p.destinationPath)
	if b, a := told("before_cutover"), told("after_cutover"); b.Phase != "synced" || a.Phase != "cutover" || a.Name != "db01" {
		t.Errorf("the hooks were told phases %s and %s", b.Phase, a.Phase)
	}
	if n := ran("after_synced"); n != 1 {
		t.Errorf("the hook after synced ran %d times", n)
	}
	s.run("remove", "db01")
	s.stop()
	s.volumes = []volume{files(t)}
	s.volumes[0].name = "other"
	s.configure()
	s.start()

	var events []state.Event
	must(t, json.Unmarshal([]byte(s.run("history", "db01", "--json")), &events))
	var got []string
	for _, e := range events {
		if e.Who.Service {
			continue
		}
		got = append(got, e.What+" "+e.Result)
		if e.Who.UID == nil || *e.Who.UID != uint32(os.Getuid()) || e.Who.PID == 0 {
			t.Errorf("%s was asked for by %+v", e.What, e.Who)
		}
	}
	if want := []string{"start refused", "start done", "cutover unknown", "cutover done", "remove done"}; !slices.Equal(got, want) {
		t.Errorf("the trail has %q, want %q", got, want)
	}
	text := s.run("history", "db01")
	for _, words := range []string{"no change ticket for db01", "synced", "hook before_cutover", "unknown: the service ended"} {
		if !strings.Contains(text, words) {
			t.Errorf("history does not say %q:\n%s", words, text)
		}
	}
	s.fails(1, []string{"nobody"}, "history", "nobody")
}
