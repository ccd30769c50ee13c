package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"lunshift/conf"
	"lunshift/proxy"
	"lunshift/state"
)

// script makes a program of the shell's and gives its path. In it $HERE is a directory of its own.
func script(t *testing.T, text string) (path, here string) {
	t.Helper()
	here = t.TempDir()
	path = filepath.Join(here, "hook")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nHERE="+here+"\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path, here
}

// hooked serves a fake volume in phase synced with those hooks.
func hooked(t *testing.T, h conf.Hooks) (*Client, *Service, *fakeVolume) {
	v := newFake("db01")
	v.status.Phase = proxy.Synced
	client, s := serveFakes(t, v)
	if h.Timeout == 0 {
		h.Timeout = time.Minute
	}
	s.entries[0].conf.Hooks = h
	return client, s, v
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

// eventually waits for something that comes soon.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// Caught: a failure that is logged alone; a hook that runs after the step.
func TestHookThatFailsBeforeAStepStopsIt(t *testing.T) {
	ctx := t.Context()
	path, _ := script(t, "echo looks; echo 'no: \033[2Jit is Friday' >&2; exit 3")
	client, _, v := hooked(t, conf.Hooks{BeforeCutover: []string{path}, AfterCutover: []string{path, "after"}})
	v.during = func() { t.Error("the step was begun") }
	_, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{})
	if err == nil || KindOf(err) != Failed || !strings.Contains(err.Error(), "volume db01: cutover not begun: hook before_cutover ("+path+") ended with exit code 3: no:  [2Jit is Friday") {
		t.Errorf("cutover: %v", err)
	}
	if v.Status().Phase != proxy.Synced {
		t.Errorf("phase %s", v.Status().Phase)
	}
	events, lines := historyOf(t, client, "db01")
	sameLines(t, "stopped", lines, "cutover refused", "hook before_cutover failed")
	if !events[1].Who.Service || strings.Count(events[1].Text, "it is Friday") != 1 || !strings.Contains(events[1].Text, "looks") || !strings.Contains(string(events[1].Options), path) || events[1].Took == nil {
		t.Errorf("hook: %+v", events[1])
	}
	if s, err := client.Status(ctx, "db01"); err != nil || !s.Degraded || !strings.Contains(s.DegradedReason, "exit code 3") {
		t.Errorf("status: %v, %q", err, s.DegradedReason)
	}
	for text, h := range map[string]conf.Hooks{
		"hook before_cutover /nowhere/hook: not ready for the cutover: no such file": {BeforeCutover: []string{"/nowhere/hook"}},
		"it cannot be executed: permission denied":                                   {BeforeCutover: []string{"/etc/passwd"}},
		"was ended by a signal":                                                      {BeforeCutover: []string{"/bin/sh", "-c", "kill -9 $$"}},
	} {
		client, _, v := hooked(t, h)
		if _, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{}); err == nil || !strings.Contains(err.Error(), text) || v.Status().Phase != proxy.Synced {
			t.Errorf("want %q: %v", text, err)
		}
	}
}

// Caught: the environment of the service passed on, which has the secrets; a status of
// before the step given to the hook after it.
func TestHookGetsTheStatusAndNoSecrets(t *testing.T) {
	t.Setenv("LUNSHIFT_SECRET_DB01_SOURCE", "it is secret")
	text := "cat >$HERE/$LUNSHIFT_HOOK.in; env >$HERE/$LUNSHIFT_HOOK.env; echo \"$@\" >$HERE/$LUNSHIFT_HOOK.args; pwd >$HERE/pwd"
	path, here := script(t, text)
	h := conf.Hooks{BeforeCutover: []string{path, "a b", "$HOME"}, AfterCutover: []string{path}}
	client, _, _ := hooked(t, h)
	if _, err := client.Cutover(t.Context(), "db01", proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, phase := range map[string]proxy.Phase{"before_cutover": proxy.Synced, "after_cutover": proxy.Cutover} {
		var status proxy.Status
		if err := json.Unmarshal([]byte(read(t, filepath.Join(here, name+".in"))), &status); err != nil || status.Name != "db01" || status.Phase != phase {
			t.Errorf("%s: input %+v, %v", name, status, err)
		}
		var has []string
		for _, line := range strings.Fields(read(t, filepath.Join(here, name+".env"))) {
			if key, _, _ := strings.Cut(line, "="); key != "PWD" && key != "_" && key != "SHLVL" && key != "OLDPWD" { // the shell's own
				has = append(has, line)
			}
		}
		slices.Sort(has)
		if want := []string{"LUNSHIFT_HOOK=" + name, "LUNSHIFT_STEP=cutover", "LUNSHIFT_VOLUME=db01", "PATH=" + hookPath}; !slices.Equal(has, want) {
			t.Errorf("%s: environment %v, want %v", name, has, want)
		}
	}
	if args := read(t, filepath.Join(here, "before_cutover.args")); args != "a b $HOME\n" {
		t.Errorf("arguments: %q", args)
	}
	if pwd := read(t, filepath.Join(here, "pwd")); pwd != "/\n" {
		t.Errorf("directory: %q", pwd)
	}
	_, lines := historyOf(t, client, "db01")
	sameLines(t, "both", lines, "cutover done", "hook before_cutover done", "hook after_cutover done")
}

// Caught: the program killed alone, while what it started goes on; a wait for its output that
// has no end.
func TestHookThatHangsIsKilledWithItsProcessGroup(t *testing.T) {
	path, here := script(t, "echo begins; sleep 1000 & echo $! >$HERE/pid; wait")
	client, _, v := hooked(t, conf.Hooks{BeforeCutover: []string{path}, Timeout: time.Second})
	began := time.Now()
	_, err := client.Cutover(t.Context(), "db01", proxy.CutoverOptions{})
	if err == nil || !strings.Contains(err.Error(), "did not end within 1s and was killed (hooks.timeout): begins") || v.Status().Phase != proxy.Synced {
		t.Errorf("cutover: %v", err)
	}
	if took := time.Since(began); took < time.Second || took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(read(t, filepath.Join(here, "pid"))))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child of the hook ends", func() bool {
		stat := read(t, fmt.Sprintf("/proc/%d/stat", pid))
		return stat == "" || strings.Contains(stat, ") Z ") || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	})

	// What a hook leaves behind on purpose is not waited for.
	path, here = script(t, "echo well; sleep 1000 & echo $! >$HERE/pid")
	client, _, v = hooked(t, conf.Hooks{BeforeCutover: []string{path}})
	if _, err := client.Cutover(t.Context(), "db01", proxy.CutoverOptions{}); err != nil || v.Status().Phase != proxy.Cutover {
		t.Errorf("with a child left behind: %v", err)
	}
	pid, err = strconv.Atoi(strings.TrimSpace(read(t, filepath.Join(here, "pid"))))
	if err != nil || syscall.Kill(pid, syscall.SIGKILL) != nil {
		t.Errorf("the child is not there: %v", err)
	}
}

// Caught: an output kept whole.
func TestHookThatFloodsIsBounded(t *testing.T) {
	path, _ := script(t, "echo the beginning; head -c 30000000 /dev/zero | tr '\\0' x; printf '\\377\\033 the end'")
	client, _, _ := hooked(t, conf.Hooks{BeforeCutover: []string{path}})
	if _, err := client.Cutover(t.Context(), "db01", proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	events, _ := historyOf(t, client, "db01")
	text := events[1].Text
	if len(text) > mostOutput+100 || !strings.HasPrefix(text, "the beginning\nxxx") || !strings.HasSuffix(text, " the end") || !strings.Contains(text, "bytes left out]") || strings.ContainsRune(text, '\033') {
		t.Errorf("%d bytes: %.40q … %q", len(text), text, text[max(0, len(text)-40):])
	}
}

// Caught: a hook after the step that undoes it or is not shown; a fault that stays.
func TestHookThatFailsAfterAStepIsShown(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "test -e $HERE/mended")
	client, _, v := hooked(t, conf.Hooks{AfterCutover: []string{path}})
	s, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{})
	if err != nil || s.Phase != proxy.Cutover || !s.Degraded || !strings.Contains(s.DegradedReason, "hook after_cutover ("+path+") ended with exit code 1") {
		t.Errorf("cutover: %v, %+v", err, s)
	}
	_, lines := historyOf(t, client, "db01")
	sameLines(t, "after", lines, "cutover done", "hook after_cutover failed")
	if err := os.WriteFile(filepath.Join(here, "mended"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	v.set(func(s *proxy.Status) { s.Phase = proxy.Synced })
	if s, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{}); err != nil || s.Degraded {
		t.Errorf("again: %v, %q", err, s.DegradedReason)
	}
}

// Caught: hooks that run before a step that is refused, or is done already.
func TestHooksRunOnlyWhereTheStepChangesSomething(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "echo $LUNSHIFT_HOOK >>$HERE/ran")
	all := []string{path}
	client, s, v := hooked(t, conf.Hooks{BeforeStart: all, BeforeCutover: all, AfterCutover: all, BeforeRollback: all})
	ran := func(when, want string) {
		t.Helper()
		file := filepath.Join(here, "ran")
		if text := strings.Join(strings.Fields(read(t, file)), " "); text != want {
			t.Errorf("%s: ran %q, want %q", when, text, want)
		}
		_ = os.Remove(file)
	}
	is := func(p proxy.Phase, remaining, unreadable uint64) {
		v.set(func(s *proxy.Status) { s.Phase, s.Remaining, s.Unreadable = p, remaining, unreadable })
	}
	lossy := proxy.CutoverOptions{AcceptUnreadable: true}
	is(proxy.Migrating, 5, 0)
	_, _ = client.Cutover(ctx, "db01", lossy)
	ran("cutover while it migrates", "")
	_, _ = client.Start(ctx, "db01")
	ran("start while it migrates", "")
	is(proxy.Migrating, 5, 5)
	_, _ = client.Cutover(ctx, "db01", proxy.CutoverOptions{})
	ran("cutover with unreadable blocks", "")
	_, _ = client.Cutover(ctx, "db01", lossy) // which the fake refuses
	ran("cutover without unreadable blocks", "before_cutover")
	is(proxy.RolledBack, 0, 0)
	_, _ = client.Rollback(ctx, "db01", proxy.RollbackOptions{})
	ran("rollback of what is rolled back", "")
	is(proxy.RolledBack, 0, 0)
	_, _ = client.Start(ctx, "db01")
	ran("start anew", "before_start")
	is(proxy.Synced, 0, 0)
	_, _ = client.Cutover(ctx, "db01", proxy.CutoverOptions{})
	ran("cutover", "before_cutover after_cutover")
	_, _ = client.Rollback(ctx, "db01", proxy.RollbackOptions{})
	ran("rollback after the cutover", "")
	is(proxy.Synced, 0, 0)
	_, _ = client.Pause(ctx, "db01")
	_, _ = client.Verify(ctx, "db01", proxy.VerifyOptions{})
	ran("pause and verify", "")
	_, _ = client.Rollback(ctx, "db01", proxy.RollbackOptions{})
	ran("rollback", "before_rollback")

	is(proxy.Synced, 0, 0)
	s.cfg.Groups = []conf.Group{{Name: "erp", Volumes: []string{"db01", "db02"}}}
	other := newEntry(conf.Volume{Name: "db02", Hooks: conf.Hooks{BeforeCutover: all, Timeout: time.Minute}})
	other.volume = newFake("db02")
	s.entries = append(s.entries, other)
	_, _ = client.CutoverGroup(ctx, "erp", proxy.CutoverOptions{})
	ran("cutover of a group of which one is not started", "")
	_, _ = client.Cutover(ctx, "db01", proxy.CutoverOptions{})
	ran("cutover of one of a group", "")
}

// Caught: a lock of the volume held while its hook runs; a hook that goes on when the service
// stops.
func TestHooksOfOneVolumeComeOneByOneAndEndWithTheService(t *testing.T) {
	path, here := script(t, "echo x >>$HERE/$LUNSHIFT_HOOK; while ! test -e $HERE/go; do sleep 0.02; done")
	client, s, _ := hooked(t, conf.Hooks{BeforeCutover: []string{path}, BeforeRollback: []string{path}})
	ended := make(chan error, 2)
	go func() {
		_, err := client.Cutover(context.Background(), "db01", proxy.CutoverOptions{})
		ended <- err
	}()
	eventually(t, "the hook runs", func() bool { return read(t, filepath.Join(here, beforeCutover)) != "" })
	go func() {
		_, err := client.Rollback(context.Background(), "db01", proxy.RollbackOptions{})
		ended <- err
	}()
	if _, err := client.Pause(t.Context(), "db01"); err != nil { // goes on meanwhile
		t.Error(err)
	}
	eventually(t, "both are asked for", func() bool {
		_, lines := historyOf(t, client, "db01")
		return slices.Contains(lines, "rollback begun")
	})
	// The second one waits; there is nothing to see that it is past the point.
	for began := time.Now(); time.Since(began) < 300*time.Millisecond && read(t, filepath.Join(here, beforeRollback)) == ""; {
		time.Sleep(10 * time.Millisecond)
	}
	s.stop()
	for range 2 {
		select {
		case err := <-ended:
			if err == nil {
				t.Error("a step was done while the service stops")
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a hook does not end with the service")
		}
	}
	if read(t, filepath.Join(here, beforeRollback)) != "" {
		t.Error("a second step overtook the first one's hook")
	}
}

// Caught: commands held while a hook runs; after_synced that runs again at each start; a hook that
// was cut off and does not run again.
func TestHookAfterAPhaseRunsOnceOverRestarts(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "cat >>$HERE/in; echo $LUNSHIFT_HOOK $LUNSHIFT_STEP >>$HERE/ran; while test -e $HERE/hold; do sleep 0.02; done; echo $LUNSHIFT_HOOK >>$HERE/ended")
	f := newFile(t, "db01")
	f.add("db01", fmt.Sprintf("[volume.hooks]\nafter_synced = [%q]\nafter_rollback = [%q]\nbefore_rollback = [%q]\n", path, path, path))
	ran := func(file string) string { return strings.Join(strings.Fields(read(t, filepath.Join(here, file))), " ") }
	hold := func() {
		t.Helper()
		if err := os.WriteFile(filepath.Join(here, "hold"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hold()
	r := f.start()
	if _, err := r.client.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the hook runs", func() bool { return ran("ran") == "after_synced synced" })
	if err := r.stop(); err != nil { // which cuts it off
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(here, "hold")); err != nil {
		t.Fatal(err)
	}
	r = f.start()
	eventually(t, "the hook ran again", func() bool { return ran("ended") == "after_synced" })
	eventually(t, "it is written down", func() bool {
		_, lines := historyOf(t, r.client, "db01")
		return strings.Count(strings.Join(lines, "\n"), "after_synced done") == 1
	})
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains([]byte(read(t, filepath.Join(here, "in"))), []byte(`"phase":"synced"`)) {
		t.Error("the hook did not get the status")
	}
	r = f.start()
	_, lines := historyOf(t, r.client, "db01")
	sameLines(t, "once", lines, "start done", "synced noted", "hook after_synced interrupted", "hook after_synced done")

	// Initiators go on while a hook runs.
	dev := r.initiator(t)
	defer dev.Close()
	hold()
	done := make(chan error, 1)
	go func() {
		_, err := r.client.Rollback(context.Background(), "db01", proxy.RollbackOptions{})
		done <- err
	}()
	eventually(t, "the hook before the rollback runs", func() bool { return strings.Contains(ran("ran"), "before_rollback rollback") })
	short, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := dev.WriteAt(short, make([]byte, 4096), 0); err != nil {
		t.Errorf("a write while a hook runs: %v", err)
	}
	if err := os.Remove(filepath.Join(here, "hold")); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	eventually(t, "the hook after the rollback", func() bool { return strings.HasSuffix(ran("ended"), "after_rollback") })
	if n := strings.Count(ran("ran"), "after_synced"); n != 2 {
		t.Errorf("after_synced ran %d times: %s", n, ran("ran"))
	}
}

// The volumes of a group are cut over at one instant; the service stops, or dies, while the hook
// of the first one runs. Each has its hook run to the end once.
//
// Caught: a hook that only the step runs.
func TestHookAfterTheCutoverIsOwedUntilItEnded(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "echo $LUNSHIFT_VOLUME $LUNSHIFT_STEP >>$HERE/ran; while test -e $HERE/hold; do sleep 0.02; done; echo $LUNSHIFT_VOLUME of $LUNSHIFT_GROUP >>$HERE/ended")
	f := newFile(t)
	hooks := fmt.Sprintf("[volume.hooks]\nafter_cutover = [%q]\n", path)
	f.add("b", hooks)
	f.add("c", hooks)
	f.add("d", hooks+"\n[[group]]\nname = \"g\"\nvolumes = [\"b\", \"c\", \"d\"]\n")
	lines := func(file string) []string {
		lines := strings.Split(strings.TrimSpace(read(t, filepath.Join(here, file))), "\n")
		slices.Sort(lines)
		return lines
	}
	if err := os.WriteFile(filepath.Join(here, "hold"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := f.start()
	if _, err := r.client.StartGroup(ctx, "g", proxy.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.WaitGroup(ctx, "g", proxy.Synced, time.Minute, true); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := r.client.CutoverGroup(context.Background(), "g", proxy.CutoverOptions{})
		done <- err
	}()
	eventually(t, "a hook runs", func() bool { return lines("ran")[0] != "" })
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	<-done // the answer may be lost, the step is not
	if got := lines("ran"); len(got) != 1 || !strings.HasSuffix(got[0], " cutover") {
		t.Fatalf("ran: %q, want one at a time", got)
	}
	// A kill leaves nothing about what was not begun.
	store, err := state.Open(filepath.Join(f.dir, "state"), state.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(store.Attach(ctx, "d", state.Followed, []byte("{}")), store.Close(), os.Remove(filepath.Join(here, "hold"))); err != nil {
		t.Fatal(err)
	}
	all := []string{"b of g", "c of g", "d of g"}
	for range 2 {
		r = f.start()
		eventually(t, "each hook ended", func() bool { return slices.Equal(lines("ended"), all) })
		for _, name := range []string{"b", "c", "d"} {
			eventually(t, "it is written down", func() bool {
				_, lines := historyOf(t, r.client, name)
				return slices.Contains(lines, "hook after_cutover (group g) done")
			})
		}
		if err := r.stop(); err != nil { // after which no hook is begun
			t.Fatal(err)
		}
	}
	if got := lines("ended"); !slices.Equal(got, all) {
		t.Errorf("ended: %q", got)
	}
}

// Caught: a failure that a step which is refused, one that is done already or a restart takes away.
func TestFailureOfAHookIsShownUntilItSucceeds(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "echo x >>$HERE/ran; test -e $HERE/mended || { echo 'no ticket'; exit 7; }")
	f := newFile(t)
	f.add("db01", fmt.Sprintf("overwrite = true\n[volume.hooks]\nafter_synced = [%q]\nafter_cutover = [%q]\n", path, path))
	ran := func() int { return len(strings.Fields(read(t, filepath.Join(here, "ran")))) }
	r := f.start()
	shown := func(when, hook string) {
		t.Helper()
		s, err := r.client.Status(ctx, "db01")
		if text := "hook " + hook + " (" + path + ") ended with exit code 7: no ticket"; err != nil || s.Degraded != (hook != "") || hook != "" && !strings.Contains(s.DegradedReason, text) {
			t.Errorf("%s: %v, degraded %v: %q", when, err, s.Degraded, s.DegradedReason)
		}
	}
	if _, err := r.client.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	failed := func(hook string, times int) {
		t.Helper()
		eventually(t, "it failed", func() bool {
			_, lines := historyOf(t, r.client, "db01")
			return strings.Count(strings.Join(lines, "\n"), "hook "+hook+" failed") == times
		})
	}
	failed(afterSynced, 1)
	eventually(t, "it is shown", func() bool { s, err := r.client.Status(ctx, "db01"); return err == nil && s.Degraded })
	shown("at first", afterSynced)
	if _, err := r.client.Rollback(ctx, "db01", proxy.RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	shown("once another step began", "")
	if _, err := r.client.Wait(ctx, "db01", proxy.RolledBack, time.Minute); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	failed(afterSynced, 2)
	if _, err := r.client.Remove(ctx, "db01"); err == nil { // refused
		t.Error("removed while it is synced")
	}
	f.volumes["db01"] += "before_cutover = [\"/nowhere/hook\"]\n"
	f.reload(r)
	eventually(t, "a reload of the hooks lets it be forgotten", func() bool { s, err := r.client.Status(ctx, "db01"); return err == nil && !s.Degraded })
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = f.start()
	shown("after a restart", afterSynced)
	if _, err := r.client.Cutover(ctx, "db01", proxy.CutoverOptions{}); err == nil {
		t.Fatal("cut over though a hook is not there")
	}
	shown("after a step that was refused", afterSynced)
	before := ran()
	if _, err := r.client.Start(ctx, "db01"); err != nil { // done already: its hook runs again
		t.Fatal(err)
	}
	failed(afterSynced, 3)
	if n := ran(); n != before+1 {
		t.Errorf("ran %d times more", n-before)
	}
	shown("after it failed again", afterSynced)

	f.volumes["db01"] = strings.Replace(f.volumes["db01"], "before_cutover = [\"/nowhere/hook\"]\n", "", 1)
	f.reload(r)
	if s, err := r.client.Cutover(ctx, "db01", proxy.CutoverOptions{}); err != nil || !s.Degraded {
		t.Fatalf("cutover: %v, %+v", err, s)
	}
	shown("after the cutover", afterCutover)
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = f.start()
	shown("after a restart once more", afterCutover)
	if err := os.WriteFile(filepath.Join(here, "mended"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	before = ran()
	if s, err := r.client.Cutover(ctx, "db01", proxy.CutoverOptions{}); err != nil || s.Degraded || ran() != before+1 {
		t.Errorf("again: %v, %q, ran %d times more", err, s.DegradedReason, ran()-before)
	}
	if _, err := r.client.Cutover(ctx, "db01", proxy.CutoverOptions{}); err != nil || ran() != before+1 {
		t.Errorf("once more: %v, ran %d times", err, ran()-before)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = f.start()
	shown("at the end", "")
}

// Caught: the end of one hook that takes the failure of another away; a hook that the file has no more
// and whose failure comes back.
func TestFailureOfAHookIsItsOwn(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "case $LUNSHIFT_HOOK in after_synced) while test ! -e $HERE/go; do sleep 0.02; done;; *) exit 7;; esac")
	f := newFile(t)
	f.add("db01", fmt.Sprintf("[volume.hooks]\nafter_synced = [%q]\nafter_cutover = [%q]\n", path, path))
	r := f.start()
	if _, err := r.client.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.CutoverWhenSynced(ctx, "db01", time.Minute, proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(here, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other hook ends well", func() bool {
		_, lines := historyOf(t, r.client, "db01")
		return slices.Contains(lines, "hook after_synced done")
	})
	degraded := func() string { s, _ := r.client.Status(ctx, "db01"); return s.DegradedReason }
	if !strings.Contains(degraded(), "hook after_cutover") {
		t.Errorf("degraded: %q", degraded())
	}
	f.volumes["db01"] = ""
	f.reload(r)
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = f.start()
	if degraded() != "" {
		t.Errorf("without the hook: %q", degraded())
	}
}

// Caught: a start by itself that passes the hook by, or whose failure nobody sees.
func TestAutostartAsksTheHookAndIsInTheTrail(t *testing.T) {
	path, here := script(t, "test -e $HERE/mended || { echo not now; exit 1; }")
	f := newFile(t, "db01", "db02")
	f.add("db01", fmt.Sprintf("autostart = true\n[volume.hooks]\nbefore_start = [%q]\n", path))
	f.add("db02", "autostart = true\n")
	r := f.start()
	if _, err := r.client.Wait(t.Context(), "db02", proxy.Synced, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the failure is shown", func() bool {
		s, err := r.client.Status(t.Context(), "db01")
		return err == nil && s.Phase == proxy.Ready && s.Degraded && strings.Contains(s.DegradedReason, "start not begun: hook before_start") && strings.Contains(s.DegradedReason, "not now")
	})
	events, lines := historyOf(t, r.client, "db02")
	if lines[0] != "start done" || !events[0].Who.Service {
		t.Errorf("db02: %v", lines)
	}
	if err := os.WriteFile(filepath.Join(here, "mended"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := r.client.Start(t.Context(), "db01"); err != nil || s.Degraded {
		t.Errorf("started: %v, %q", err, s.DegradedReason)
	}
	_, lines = historyOf(t, r.client, "db01")
	sameLines(t, "db01", lines[:4], "start refused", "hook before_start failed", "start done", "hook before_start done")
}

func TestCheckNamesHooksThatCannotBeRun(t *testing.T) {
	f := newFile(t, "a", "b")
	f.add("a", "[volume.hooks]\nbefore_start = [\"/nowhere/hook\"]\nafter_synced = [\"/etc\"]\nafter_cutover = [\"/etc/passwd\"]\nbefore_cutover = [\"/bin/sh\"]\n")
	cfg, err := LoadConfig(f.write())
	if err != nil {
		t.Fatal(err)
	}
	report, err := Check(t.Context(), cfg, quiet())
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(report.Volumes[0].Refusals, "\n")
	for _, want := range []string{"volume a: hook before_start: /nowhere/hook: no such file", "hook after_synced: /etc: it is not a regular file", "hook after_cutover: /etc/passwd: it cannot be executed"} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks %q:\n%s", want, text)
		}
	}
	if len(report.Volumes[0].Refusals) != 3 || len(report.Volumes[1].Refusals) != 0 {
		t.Errorf("refusals: %v", report.Volumes)
	}
}
