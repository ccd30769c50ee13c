package control

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/proxy"
)

const erp = "[[group]]\nname = \"erp\"\nvolumes = [\"a\", \"b\", \"c\"]\nhold_limit = \"20s\"\n"

func (r *running) volume(t *testing.T, name string) lun.Device {
	t.Helper()
	dev, err := lun.Open(t.Context(), "iscsi://"+r.info.Portals[0]+"/iqn.2026-11.net.example:"+name+"/0", lun.Options{IOTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	return dev
}

// Caught: with the step taken of one volume after another, a and b are cut over although c is
// not started.
func TestGroupStepsWithAllOfItsVolumesOrWithNone(t *testing.T) {
	ctx := t.Context()
	f := newFile(t, "a", "b", "c")
	f.add("c", erp)
	r := f.start()
	group := func(what string, want string, g GroupStatus, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if g.Name != "erp" || len(g.Volumes) != 3 || g.HoldLimit != 20000 {
			t.Errorf("%s: %+v", what, g)
		}
		if got := r.phases(t); want != "" && got != want {
			t.Errorf("%s: volumes: %s, want %s", what, got, want)
		}
	}
	for _, name := range []string{"a", "b"} {
		if _, err := r.client.Start(ctx, name); err != nil {
			t.Fatal(err)
		}
		if _, err := r.client.Wait(ctx, name, proxy.Synced, 30*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	for what, do := range map[string]func() (GroupStatus, error){
		"cutover":  func() (GroupStatus, error) { return r.client.CutoverGroup(ctx, "erp", proxy.CutoverOptions{}) },
		"rollback": func() (GroupStatus, error) { return r.client.RollbackGroup(ctx, "erp", proxy.RollbackOptions{}) },
	} {
		_, err := do()
		if KindOf(err) != WrongPhase || !strings.Contains(err.Error(), "group erp: "+what+" not begun: volume c: "+what+" is not allowed in phase ready") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got := r.phases(t); got != "a synced, b synced, c ready" {
		t.Errorf("a step that is refused: %s", got)
	}
	// Nor is one taken apart from the others, unless that is said.
	for _, err := range []error{
		func() error { _, err := r.client.Cutover(ctx, "a", proxy.CutoverOptions{}); return err }(),
		func() error { _, err := r.client.Rollback(ctx, "a", proxy.RollbackOptions{}); return err }(),
	} {
		if KindOf(err) != Usage || !strings.Contains(err.Error(), "it is in group erp") {
			t.Errorf("a volume of a group: %v", err)
		}
	}
	for range 2 {
		g, err := r.client.StartGroup(ctx, "erp", proxy.StartOptions{})
		group("start", "", g, err)
	}
	g, err := r.client.WaitGroup(ctx, "erp", proxy.Synced, 30*time.Second, true)
	group("wait", "a synced, b synced, c synced", g, err)
	for range 2 {
		g, err = r.client.RollbackGroup(ctx, "erp", proxy.RollbackOptions{})
		group("rollback", "", g, err)
	}
	if g.Hold == nil || *g.Hold <= 0 || *g.Hold > 20000 {
		t.Errorf("held for %v ms", g.Hold)
	}
	g, err = r.client.WaitGroup(ctx, "erp", proxy.RolledBack, 30*time.Second, false)
	group("wait", "a rolled-back, b rolled-back, c rolled-back", g, err)

	// A start of all that one refuses says which, and what was done.
	_, err = r.client.StartGroup(ctx, "erp", proxy.StartOptions{})
	if err == nil || !strings.Contains(err.Error(), "group erp: start not begun: volume a: start refused") || !strings.Contains(err.Error(), "volume c: start refused") {
		t.Errorf("start over data: %v", err)
	}
	g, err = r.client.StartGroup(ctx, "erp", proxy.StartOptions{Reuse: true})
	group("start again", "", g, err)
	if _, err = r.client.WaitGroup(ctx, "erp", proxy.Synced, 30*time.Second, true); err != nil {
		t.Fatal(err)
	}
	r.client.Alone = true
	if s, err := r.client.Cutover(ctx, "b", proxy.CutoverOptions{}); err != nil || s.Phase != proxy.Cutover {
		t.Errorf("alone: %v, %v", s.Phase, err)
	}
	r.client.Alone = false
	if _, err := r.client.Rollback(ctx, "b", proxy.RollbackOptions{}); KindOf(err) != WrongPhase || strings.Contains(err.Error(), "group") {
		t.Errorf("rollback of one that is cut over: %v", err)
	}
	for range 2 {
		g, err = r.client.CutoverGroup(ctx, "erp", proxy.CutoverOptions{})
		group("cutover", "a cutover, b cutover, c cutover", g, err)
	}
	var text bytes.Buffer
	if err := ShowStatus(ctx, r.client, &text, View{Volume: "erp"}); err != nil || !strings.Contains(text.String(), "\nc ") || !strings.Contains(text.String(), "group erp: 3 volume(s), initiators are held for 20s at most, and were for") {
		t.Errorf("%v: %s", err, &text)
	}
	for _, err := range []error{
		func() error { _, err := r.client.Throttle(ctx, "erp", 1); return err }(),
		func() error { _, err := r.client.Status(ctx, "erp"); return err }(),
	} {
		if KindOf(err) != Unknown || !strings.Contains(err.Error(), `"erp" is a group, and this is for one volume: a, b, c`) {
			t.Errorf("a step that no group has: %v", err)
		}
	}
	// A cutover that is done can be repeated when one of them, or all, are removed; others miss it.
	if _, err := r.client.Remove(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	g, err = r.client.CutoverGroup(ctx, "erp", proxy.CutoverOptions{})
	group("cutover again", "a cutover, b cutover", g, err)
	if d, err := r.client.CutoverGroupDryRun(ctx, "erp", proxy.CutoverOptions{}); err != nil || !d.Done || !d.Ready {
		t.Errorf("dry run without c: %+v, %v", d, err)
	}
	if _, err := r.client.Remove(ctx, "erp"); KindOf(err) != Unknown || !strings.Contains(err.Error(), "is a group") {
		t.Errorf("remove of a group: %v", err)
	}
	if _, err := r.client.Remove(ctx, "typo"); KindOf(err) != Unknown {
		t.Errorf("remove of nothing: %v", err)
	}
	if _, err := r.client.PauseGroup(ctx, "erp"); err == nil || !strings.Contains(err.Error(), "pause not begun: volume c: the service does not have it") {
		t.Errorf("pause without c: %v", err)
	}
	for _, name := range []string{"a", "b"} {
		if _, err := r.client.Remove(ctx, name); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.client.CutoverGroup(ctx, "erp", proxy.CutoverOptions{}); err != nil {
		t.Errorf("cutover without any: %v", err)
	}
}

func TestReloadTakesGroupsUp(t *testing.T) {
	ctx := t.Context()
	f := newFile(t, "a", "b", "c")
	r := f.start()
	if _, err := r.client.Group(ctx, "erp"); KindOf(err) != Unknown {
		t.Errorf("before: %v", err)
	}
	f.add("c", "mirror = true\n"+erp)
	if report := f.reload(r); report.Err() != nil || strings.Join(report.Changed, " ") != "volume[c].mirror group[erp]" {
		t.Errorf("report %+v", report)
	}
	if g, err := r.client.StartGroup(ctx, "erp", proxy.StartOptions{}); err != nil || len(g.Volumes) != 3 || g.Volumes[0].Mirrored || !g.Volumes[2].Mirrored || g.Volumes[2].Mirror == nil {
		t.Errorf("after: %+v, %v", g, err)
	}
	// Of one that is started, the mirror is switched by a command.
	f.add("c", strings.Replace(erp, "20s", "3s", 1))
	report := f.reload(r)
	if ExitCode(report.Err()) != ExitRestart || strings.Join(report.Changed, " ") != "group[erp].hold_limit" || strings.Join(report.Restart, " ") != "volume[c].mirror" || len(report.Notes) != 1 {
		t.Errorf("report %+v", report)
	}
	if g, err := r.client.Group(ctx, "erp"); err != nil || g.HoldLimit != 3000 {
		t.Errorf("after: %+v, %v", g, err)
	}
}

// A group of which some volumes are further is paused and resumed, both ways.
func TestGroupsArePausedAndResumedBothWays(t *testing.T) {
	ctx := t.Context()
	f := newFile(t, "a", "b", "c")
	f.add("a", "copy = { rate = \"64KiB\" }\n")
	f.add("c", erp)
	r := f.start()
	_, err := r.client.StartGroup(ctx, "erp", proxy.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	both := func(phase string) {
		t.Helper()
		for _, paused := range []bool{true, false} {
			do := r.client.ResumeGroup
			if paused {
				do = r.client.PauseGroup
			}
			g, err := do(ctx, "erp")
			if err != nil || string(g.Volumes[0].Phase) != phase || g.Volumes[0].Paused != paused {
				t.Errorf("%s, paused %v: %+v, %v", phase, paused, g, err)
			}
		}
	}
	for _, name := range []string{"b", "c"} {
		if _, err := r.client.Wait(ctx, name, proxy.Synced, 30*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	both("migrating")
	dev := r.volume(t, "a")
	if err := dev.WriteAt(ctx, bytes.Repeat([]byte{7}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.RollbackGroup(ctx, "erp", proxy.RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"b", "c"} {
		if _, err := r.client.Wait(ctx, name, proxy.RolledBack, 30*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	both("rolling-back")
}

// The whole way there and back, with a restart in the middle.
func TestRolledBackSourceHoldsWhatInitiatorsWrote(t *testing.T) {
	ctx := t.Context()
	f := newFile(t, "a")
	f.add("a", "copy = { rate = \"1MiB\" }\n")
	r := f.start()
	if _, err := r.client.Rollback(ctx, "a", proxy.RollbackOptions{}); KindOf(err) != WrongPhase {
		t.Errorf("rollback in ready: %v", err)
	}
	if _, err := r.client.Mirror(ctx, "a", true); err != nil {
		t.Fatal(err)
	}
	if s, err := r.client.Mirror(ctx, "a", false); err != nil || s.Mirrored {
		t.Fatalf("mirror off: %+v, %v", s, err)
	}
	want := bytes.Repeat([]byte{0xa5}, 4<<20)
	want = append(want, make([]byte, 4<<20)...)
	write := func(dev lun.Device) {
		p := make([]byte, 8<<10)
		for range 50 {
			at := rand.IntN((len(want) - len(p)) / 512)
			for i := range p {
				p[i] = byte(rand.Uint32())
			}
			copy(want[at*512:], p)
			if err := dev.WriteAt(ctx, p, lun.LBA(at)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := r.client.Start(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	write(r.volume(t, "a"))
	if _, err := r.client.Throttle(ctx, "a", 1<<10); err != nil {
		t.Fatal(err)
	}
	s, err := r.client.Rollback(ctx, "a", proxy.RollbackOptions{})
	if err != nil || s.Phase != proxy.RollingBack || s.Remaining == 0 || s.RollbackAt == nil || s.Hold == nil {
		t.Fatalf("rollback: %+v, %v", s, err)
	}
	s, err = r.client.Pause(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if text := Stuck(s, proxy.RolledBack); !strings.Contains(text, "lunshift resume a") {
		t.Errorf("a paused rollback: %q", text)
	}
	for _, phase := range []proxy.Phase{proxy.Synced, proxy.Cutover} {
		if _, err := r.client.Wait(ctx, "a", phase, 0); ExitCode(err) != ExitPhase {
			t.Errorf("wait for %s: %v", phase, err)
		}
	}
	write(r.volume(t, "a"))
	// It must not be dropped, nor taken for one that can be.
	other := newFile(t, "z")
	f.volumes, other.volumes = other.volumes, f.volumes
	unitFile(t, f.dir, "z.old", 8<<20, 0)
	unitFile(t, f.dir, "z.new", 8<<20, 0)
	if report := f.reload(r); len(report.Kept) != 1 || report.Kept[0].Phase != proxy.RollingBack {
		t.Errorf("reload without it: %+v", report)
	}
	f.volumes = other.volumes
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = f.start()
	if s, err := r.client.Status(ctx, "a"); err != nil || s.Phase != proxy.RollingBack || !s.Paused || s.Remaining == 0 {
		t.Errorf("after the restart: %+v, %v", s, err)
	}
	if _, err := r.client.Throttle(ctx, "a", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Resume(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	s, err = r.client.RollbackAndWait(ctx, "a", 30*time.Second, proxy.RollbackOptions{})
	if err != nil || s.Phase != proxy.RolledBack || s.CopiedBack == 0 || s.Remaining != 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	got, err := os.ReadFile(filepath.Join(f.dir, "a.old"))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the source is not what was written (%v)", err)
	}
	report, err := r.client.Check(ctx, "a")
	if err != nil || len(report.Refusals) != 1 || !strings.Contains(report.Refusals[0], "--reuse") {
		t.Errorf("check: %v, %v", report.Refusals, err)
	}
	// Rolled back, it may go; its record is no reason to refuse its units to another.
	delete(f.volumes, "a")
	f.volumes["z"] = ""
	if report := f.reload(r); len(report.Dropped) != 1 || len(report.Kept) != 0 {
		t.Errorf("reload without it: %+v", report)
	}
}
