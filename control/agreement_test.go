package control

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"lunshift/conf"
	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

// Before a step everybody is asked, and all who are not ready are named at once; nothing is done
// then, and no hook has run.
//
// Caught: the first who is not ready alone; hooks that are not asked; a hook that runs although
// somebody else is not ready; the hook of a phase that follows left out.
func TestAllWhoAreNotReadyAreNamedAndNothingIsDone(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "touch $HERE/ran")
	gone := t.TempDir() + "/gone"
	notExecutable := t.TempDir() + "/plain"
	if err := os.WriteFile(notExecutable, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a, b, c := newFake("a"), newFake("b"), newFake("c")
	client, s := serveFakes(t, a, b, c)
	s.cfg.Groups = []conf.Group{{Name: "erp", Volumes: []string{"a", "b", "c"}}}
	hooks := []conf.Hooks{{BeforeStart: []string{path}, AfterSynced: []string{gone}}, {BeforeStart: []string{path}}, {BeforeStart: []string{notExecutable}}}
	for i, e := range s.entries {
		e.conf.Hooks = hooks[i]
		e.conf.Hooks.Timeout = time.Minute
	}
	b.set(func(s *proxy.Status) { s.Phase = proxy.RollingBack })
	for _, v := range []*fakeVolume{a, b, c} {
		v.during = func() { t.Error("the step was begun") }
	}
	_, err := client.StartGroup(ctx, "erp", proxy.StartOptions{})
	if err == nil || strings.Contains(err.Error(), "\n") {
		t.Fatalf("start: %v", err)
	}
	for _, words := range []string{"group erp: start not begun: ",
		"volume a: hook after_synced " + gone + ": not ready for the start: no such file or directory",
		"volume b: start is not allowed in phase rolling-back",
		"volume c: hook before_start " + notExecutable + ": not ready for the start: it cannot be executed"} {
		if !strings.Contains(err.Error(), words) {
			t.Errorf("%q is not in %q", words, err)
		}
	}
	if _, err := os.Stat(here + "/ran"); !os.IsNotExist(err) {
		t.Errorf("a hook ran: %v", err)
	}
	for _, name := range []string{"a", "b", "c"} {
		_, lines := historyOf(t, client, name)
		sameLines(t, name, lines, "start (group erp) refused")
	}
}

// Of a group are named as well those that the service does not have, or not yet, beside the others.
// Caught: those alone; the others alone.
func TestVolumesThatAreNotServedAreNamedWithThoseThatAreNotReady(t *testing.T) {
	a, b, c := newFake("a"), newFake("b"), newFake("c")
	client, s := serveFakes(t, a, b, c)
	s.cfg.Groups = []conf.Group{{Name: "erp", Volumes: []string{"a", "b", "c", "d"}}}
	a.set(func(s *proxy.Status) { s.Phase = proxy.Migrating })
	s.entries[1].volume, s.entries[1].failure = nil, errors.New("volume b: source: no route")
	s.entries[2].removed, s.entries[2].unsure = true, true
	_, err := client.CutoverGroup(t.Context(), "erp", proxy.CutoverOptions{})
	for _, words := range []string{"group erp: cutover not begun: volume a: cutover is not allowed in phase migrating", "not served yet: volume b: source: no route",
		"volume c: not ready for the cutover: the service does not have it", "volume d: not ready for the cutover: the service does not have it"} {
		if err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%q is not in %v", words, err)
		}
	}
}

// A dry run tells whether the sessions are asked to leave: not while another volume stays on their target.
// Of a volume that is removed it tells what a cutover does: nothing. Caught: a volume of the same
// cutover, or one that is over, taken for one that stays; a removed one that is not known.
func TestDryRunTellsWhetherTheSessionsAreToLeave(t *testing.T) {
	a, b := newFake("a"), newFake("b")
	client, s := serveFakes(t, a, b)
	s.cfg.Groups = []conf.Group{{Name: "erp", Volumes: []string{"a", "b"}}}
	for i, v := range []*fakeVolume{a, b} {
		s.entries[i].conf.IQN = "iqn.2026-11.net.example:both"
		v.set(func(s *proxy.Status) { s.Phase = proxy.Synced })
	}
	wants := func(what string, dry func() (DryRun, error), staying ...string) (r DryRun) {
		t.Helper()
		r, err := dry()
		if err != nil || !r.Ready || !slices.Equal(r.Volumes[0].Staying, staying) {
			t.Errorf("%s: %v, %+v", what, err, r)
		}
		var out strings.Builder
		if err := WriteDryRun(&out, r, time.Now()); err != nil {
			t.Fatal(err)
		}
		if stays := strings.Contains(out.String(), "0, not asked to log out, nor sent elsewhere, while b stays on this target"); stays != (len(staying) > 0) {
			t.Errorf("%s:\n%s", what, out.String())
		}
		return r
	}
	client.Alone = true
	alone := func() (DryRun, error) { return client.CutoverDryRun(t.Context(), "a", proxy.CutoverOptions{}) }
	wants("alone", alone, "b")
	wants("together", func() (DryRun, error) { return client.CutoverGroupDryRun(t.Context(), "erp", proxy.CutoverOptions{}) })
	b.set(func(s *proxy.Status) { s.Phase = proxy.Cutover })
	wants("the last", alone)
	s.entries[0].removed = true
	if r := wants("removed", alone); !r.Done {
		t.Errorf("removed: %+v", r)
	}
}

// A dry run shows what there is to look at, does nothing, and says how it would go. Caught: a dry
// run that cuts over, or runs hooks; one that is ready though a hook is gone; a group's
// volume taken for one of its own.
func TestDryRunOfACutoverShowsAndDoesNothing(t *testing.T) {
	ctx := t.Context()
	path, here := script(t, "touch $HERE/ran")
	client, s, v := hooked(t, conf.Hooks{BeforeCutover: []string{path, "quick"}, AfterCutover: []string{path}})
	s.entries[0].conf.Redirect.Address = "10.0.0.9:3260"
	compared := time.Now().Add(-3 * time.Hour)
	v.set(func(st *proxy.Status) {
		st.Verify = &proxy.VerifyStatus{Last: &state.Verified{At: compared, ComparedBytes: 1 << 30}}
		st.Mirror = &proxy.MirrorStatus{State: "behind", Behind: 1 << 20}
		st.AcceptedUnreadable = 4096
		st.Sessions = []target.SessionInfo{{Initiator: "iqn.2026-11.net.example:host", Address: "10.0.0.1:4711"}}
		st.Reservation = target.ReservationInfo{Type: "Write Exclusive", Holders: []string{"iqn.2026-11.net.example:host"}}
	})
	v.during = func() { t.Error("it was cut over") }
	r, err := client.CutoverDryRun(ctx, "db01", proxy.CutoverOptions{})
	if err != nil || !r.Ready || r.Done || r.Err() != nil || len(r.Volumes) != 1 || len(r.Volumes[0].Hooks) != 2 || len(r.Parties) != 3 {
		t.Fatalf("%v, %+v", err, r)
	}
	var out strings.Builder
	if err := WriteDryRun(&out, r, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, words := range []string{"remaining    0 B", "no difference, 3h 00m ago", "behind, the source is 1.0 MiB behind", "4.0 KiB given up", "1, asked to log out",
		"sent to 10.0.0.9:3260", "iqn.2026-11.net.example:host from 10.0.0.1:4711", "Write Exclusive, held by iqn.2026-11.net.example:host",
		"before_cutover: [" + path + " quick]", "after_cutover: [" + path, "db01: the cutover would begin\n"} {
		if !strings.Contains(out.String(), words) {
			t.Errorf("%q is not in\n%s", words, out.String())
		}
	}
	if _, err := os.Stat(here + "/ran"); !os.IsNotExist(err) {
		t.Errorf("a hook ran: %v", err)
	}
	if _, lines := historyOf(t, client, "db01"); len(lines) > 0 {
		t.Errorf("history has %v", lines)
	}

	for what, c := range map[string]struct {
		v    proxy.VerifyStatus
		want []string
	}{
		"a sample after everything": {proxy.VerifyStatus{Last: &state.Verified{At: compared, Sample: true}, LastAll: &state.Verified{At: compared.Add(-time.Hour)}},
			[]string{"everything compared ", ": no difference, 4h 00m ago\n", "a sample compared ", ": no difference, 3h 00m ago\n"}},
		"a sample alone":               {proxy.VerifyStatus{Last: &state.Verified{At: compared, Sample: true, DifferentBytes: 512}}, []string{"never everything\n", "a sample compared ", "512 B differ, 3h 00m ago\n"}},
		"one under way after a sample": {proxy.VerifyStatus{Running: true, Total: 4, Done: 1, Last: &state.Verified{At: compared, Sample: true}}, []string{"under way, 25.0%\n", "a sample compared "}},
		"the first is under way":       {proxy.VerifyStatus{Running: true}, []string{"under way\n"}},
	} {
		out.Reset()
		if err := WriteDryRun(&out, DryRun{Volumes: []DryRunVolume{{Status: proxy.Status{Verify: &c.v}}}}, compared.Add(3*time.Hour)); err != nil {
			t.Fatal(err)
		}
		for _, words := range c.want {
			if !strings.Contains(out.String(), words) {
				t.Errorf("%s: %q is not in\n%s", what, words, out.String())
			}
		}
	}
	s.entries[0].conf.Hooks.BeforeCutover = []string{"/nowhere/hook"}
	v.set(func(st *proxy.Status) {
		st.Verify, st.Unreadable, st.UnreadableRuns = nil, 512, []proxy.BlockRun{{LBA: 1, Blocks: 1}}
	})
	r, err = client.CutoverDryRun(ctx, "db01", proxy.CutoverOptions{})
	if err != nil || r.Ready || ExitCode(r.Err()) != 3 || !strings.Contains(r.Reason, "hook before_cutover /nowhere/hook") {
		t.Errorf("%v, %+v", err, r)
	}
	out.Reset()
	if err := WriteDryRun(&out, r, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, words := range []string{"never compared", "512 B in 1 place(s)", "db01: the cutover would not begin\n  volume db01: hook before_cutover /nowhere/hook: no such file or directory\n"} {
		if !strings.Contains(out.String(), words) {
			t.Errorf("%q is not in\n%s", words, out.String())
		}
	}
	s.cfg.Groups = []conf.Group{{Name: "erp", Volumes: []string{"db01", "db02"}}}
	if r, err = client.CutoverDryRun(ctx, "db01", proxy.CutoverOptions{}); err != nil || r.Ready || !strings.Contains(r.Reason, "it is in group erp") {
		t.Errorf("a volume of a group: %v, %+v", err, r)
	}
	if r, err = client.CutoverGroupDryRun(ctx, "erp", proxy.CutoverOptions{}); err != nil || r.Ready || !strings.Contains(r.Reason, "hook before_cutover /nowhere/hook: not ready for the cutover: no such file or directory; volume db02: not ready for the cutover: the service does not have it") {
		t.Errorf("a group without one of its volumes: %v, %+v", err, r)
	}
	s.cfg.Groups, s.entries[0].conf.Hooks.BeforeCutover = nil, nil
	v.set(func(st *proxy.Status) { st.Phase = proxy.Cutover })
	if r, err = client.CutoverDryRun(ctx, "db01", proxy.CutoverOptions{}); err != nil || !r.Done || !r.Ready || len(r.Volumes[0].Hooks) > 0 {
		t.Errorf("done: %v, %+v", err, r)
	}
}
