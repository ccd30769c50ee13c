package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
)

// fileOf is a configuration that a test rewrites.
type fileOf struct {
	t       *testing.T
	dir     string
	service string            // further lines of [service]
	volumes map[string]string // further lines of each, by name
}

func newFile(t *testing.T, names ...string) *fileOf {
	f := &fileOf{t: t, dir: t.TempDir(), volumes: map[string]string{}}
	for _, n := range names {
		f.add(n, "")
	}
	return f
}

// add makes a volume with files of its own.
func (f *fileOf) add(name, more string) {
	f.t.Helper()
	if _, err := os.Stat(filepath.Join(f.dir, name+".old")); err != nil {
		unitFile(f.t, f.dir, name+".old", 8<<20, 4<<20)
		unitFile(f.t, f.dir, name+".new", 8<<20, 0)
	}
	f.volumes[name] = more
}

func (f *fileOf) write() string {
	f.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "[service]\nportals = [\"127.0.0.1:0\"]\ncontrol = %q\nstate = %q\nhttp = \"\"\n%s", filepath.Join(f.dir, "c.sock"), filepath.Join(f.dir, "state"), f.service)
	names := make([]string, 0, len(f.volumes))
	for n := range f.volumes {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		fmt.Fprintf(&b, "\n[[volume]]\nname = %q\niqn = \"iqn.2026-11.net.example:%s\"\nsource = %q\ndestination = %q\n%s",
			n, n, filepath.Join(f.dir, n+".old"), filepath.Join(f.dir, n+".new"), f.volumes[n])
	}
	path := filepath.Join(f.dir, "lunshift.toml")
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		f.t.Fatal(err)
	}
	return path
}

func (f *fileOf) start() *running {
	f.t.Helper()
	cfg, err := LoadConfig(f.write())
	if err != nil {
		f.t.Fatal(err)
	}
	return start(f.t, cfg)
}

// reload writes the file and has it read again.
func (f *fileOf) reload(r *running) ReloadReport {
	f.t.Helper()
	f.write()
	report, err := r.client.Reload(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	return report
}

func (r *running) phases(t *testing.T) string {
	t.Helper()
	all, err := r.client.Statuses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, s := range all {
		text = append(text, s.Name+" "+string(s.Phase))
	}
	return strings.Join(text, ", ")
}

// Caught: with a migrating volume dropped like one in ready, at the first run.
func TestReloadTakesUpVolumesAndSettingsAndSaysSo(t *testing.T) {
	ctx := t.Context()
	f := newFile(t, "a", "b", "c")
	f.add("c", "copy = { rate = \"1KiB\" }\n")
	r := f.start()
	if report := f.reload(r); report.Err() != nil || len(report.lines()) != 1 || report.lines()[0].text != "nothing changed" {
		t.Errorf("nothing changed, but: %+v", report)
	}
	if _, err := r.client.Start(ctx, "c"); err != nil {
		t.Fatal(err)
	}

	// Settings, now and later.
	f.service = "log_level = \"debug\"\nshutdown_timeout = \"20s\"\nio_timeout = \"2m\"\n[service.limits]\nconnections = 7\n"
	f.add("a", "overwrite = true\nseeded = true\nsessions = 2\nverify = \"readback\"\ncopy = { depth = 3, rate = \"3MiB\" }\nportal_groups = [1]\n[[volume.initiator]]\nname = \"*\"\nnetworks = [\"127.0.0.0/8\"]\n")
	report := f.reload(r)
	want := []string{"service.log_level", "service.shutdown_timeout", "volume[a].copy.depth", "volume[a].copy.rate", "volume[a].initiator",
		"volume[a].overwrite", "volume[a].portal_groups", "volume[a].seeded", "volume[a].verify"}
	slices.Sort(report.Changed)
	if !slices.Equal(report.Changed, want) {
		t.Errorf("changed %v, want %v", report.Changed, want)
	}
	slices.Sort(report.Restart)
	if want := []string{"service.io_timeout", "service.limits.connections", "volume[a].sessions"}; !slices.Equal(report.Restart, want) {
		t.Errorf("needs a restart: %v, want %v", report.Restart, want)
	}
	if ExitCode(report.Err()) != ExitRestart {
		t.Errorf("exit code %d", ExitCode(report.Err()))
	}
	if s, err := r.client.Status(ctx, "a"); err != nil || s.RateLimit != 3<<20 || !s.Readback {
		t.Errorf("the settings do not count: %+v, %v", s, err)
	}
	// What needs a restart is told again, what was taken up is not.
	if report = f.reload(r); len(report.Changed) != 0 || len(report.Restart) != 3 {
		t.Errorf("again: %+v", report)
	}

	// Volumes come and go; one that migrates does not.
	delete(f.volumes, "b")
	delete(f.volumes, "c")
	f.add("d", "autostart = true\n")
	report = f.reload(r)
	if !slices.Equal(report.Added, []string{"d"}) || !slices.Equal(report.Dropped, []string{"b"}) || len(report.Kept) != 1 || report.Kept[0] != (KeptVolume{"c", proxy.Migrating}) {
		t.Errorf("report %+v", report)
	}
	if ExitCode(report.Err()) != ExitPhase {
		t.Errorf("exit code %d", ExitCode(report.Err()))
	}
	if _, err := r.client.Wait(ctx, "d", proxy.Synced, 30*time.Second); err != nil {
		t.Error(err)
	}
	if got := r.phases(t); got != "a ready, d synced, c migrating" {
		t.Errorf("volumes: %s", got)
	}
	// Its files are free again, and may be another's.
	f.add("b", "")
	if report = f.reload(r); !slices.Equal(report.Added, []string{"b"}) || len(report.Failed) != 0 {
		t.Errorf("report %+v", report)
	}
	// Cut over, it may go.
	delete(f.volumes, "d")
	if _, err := r.client.Cutover(ctx, "d", proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	if report = f.reload(r); !slices.Equal(report.Dropped, []string{"d"}) {
		t.Errorf("report %+v", report)
	}
	var text bytes.Buffer
	if err := WriteReload(&text, report); err != nil || !strings.Contains(text.String(), "volume d: dropped\n") || !strings.Contains(text.String(), "volume c is migrating and stays served") {
		t.Errorf("%v: %s", err, &text)
	}
}

func TestReloadWithFaultsChangesNothing(t *testing.T) {
	f := newFile(t, "a", "b")
	r := f.start()
	delete(f.volumes, "b")
	f.add("c", "sessions = 99\n")
	f.add("a", "copy = { depth = 0, rate = \"1MiB\" }\n")
	f.write()
	_, err := r.client.Reload(t.Context())
	if n := strings.Count(r.log.String(), "volume[c].sessions"); n != 1 {
		t.Errorf("logged %d times: %s", n, r.log)
	}
	if KindOf(err) != Configuration || ExitCode(err) != ExitUsage || strings.Count(err.Error(), "\n") != 1 ||
		!strings.Contains(err.Error(), "volume[c].sessions") || !strings.Contains(err.Error(), "volume[a].copy.depth") {
		t.Errorf("want both faults, have %v", err)
	}
	if got := r.phases(t); got != "a ready, b ready" {
		t.Errorf("volumes: %s", got)
	}
	if s, err := r.client.Status(t.Context(), "a"); err != nil || s.RateLimit != 0 {
		t.Errorf("a part of the file was taken up: %+v, %v", s, err)
	}
}

func TestReloadGoesOnWithoutAVolumeThatCannotBeOpened(t *testing.T) {
	f := newFile(t, "a")
	r := f.start()
	f.add("b", "")
	f.add("c", "")
	if err := os.Remove(filepath.Join(f.dir, "b.new")); err != nil {
		t.Fatal(err)
	}
	report := f.reload(r)
	if !slices.Equal(report.Added, []string{"c"}) || len(report.Failed) != 1 || !strings.Contains(report.Failed[0], "volume b: destination") || ExitCode(report.Err()) != ExitFailed {
		t.Errorf("report %+v", report)
	}
	if got := r.phases(t); got != "a ready, c ready" {
		t.Errorf("volumes: %s", got)
	}
	unitFile(t, f.dir, "b.new", 8<<20, 0)
	if report = f.reload(r); !slices.Equal(report.Added, []string{"b"}) || report.Err() != nil {
		t.Errorf("report %+v", report)
	}
	// One that nobody knows is there to be adopted.
	f.add("e", "")
	unitFile(t, f.dir, "e.new", 8<<20, 1<<20)
	if report = f.reload(r); len(report.Added) != 0 || len(report.Failed) != 1 || !strings.Contains(r.phases(t), "e unknown") {
		t.Errorf("report %+v, volumes %s", report, r.phases(t))
	}
	f.add("e", "copy = { depth = 2 }\n")
	if report = f.reload(r); !slices.Equal(report.Changed, []string{"volume[e].copy.depth"}) || len(report.Failed) != 1 {
		t.Errorf("report %+v", report)
	}
}

// Caught: with every volume dropped and opened anew the session is another one, at the first
// run.
func TestReloadLeavesSessionsOfOtherVolumesAlone(t *testing.T) {
	f := newFile(t, "db01", "b", "c")
	r := f.start()
	dev := r.initiator(t)
	defer dev.Close()
	before, err := r.client.Status(t.Context(), "db01")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var n int
	wg.Go(func() {
		p := make([]byte, 4096)
		for ; ctx.Err() == nil; n++ {
			if err := dev.WriteAt(t.Context(), p, lun.LBA(8*(n%100))); err != nil {
				t.Errorf("write %d: %v", n, err)
				return
			}
		}
	})
	for i := range 6 {
		delete(f.volumes, "c")
		if i%2 == 0 {
			f.add("c", "")
		}
		f.add("b", fmt.Sprintf("copy = { depth = %d }\n", i+1))
		// Its own settings, but for who comes in, touch no session either.
		f.add("db01", fmt.Sprintf("copy = { rate = \"%dMiB\" }\n[[volume.initiator]]\nname = \"*\"\nnetworks = [\"127.0.0.0/%d\"]\n", i+1, 8+i))
		f.reload(r)
	}
	cancel()
	wg.Wait()
	after, err := r.client.Status(t.Context(), "db01")
	if err != nil || len(before.Sessions) != 1 || len(after.Sessions) != 1 || before.Sessions[0] != after.Sessions[0] || n == 0 {
		t.Errorf("%d writes; sessions before %+v, after %+v, %v", n, before.Sessions, after.Sessions, err)
	}
}

// Steps, looks, reloads and a stop at any instant: nothing races, hangs or is left open.
// Caught: with the list of volumes read without its lock, by the race detector at the first
// run.
func TestReloadRacesEverythingElse(t *testing.T) {
	f := newFile(t, "a", "b", "c")
	r := f.start()
	config := f.write()
	withC, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	delete(f.volumes, "c")
	f.add("b", "copy = { depth = 2 }\noverwrite = true\n")
	f.write()
	without, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	// A file is replaced at once, as administrators' tools do.
	put := func(i int) {
		path := fmt.Sprintf("%s.%d", config, i)
		if err := errors.Join(os.WriteFile(path, [][]byte{withC, without}[i%2], 0o600), os.Rename(path, config)); err != nil {
			t.Error(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	// Refusals are what these may meet; the phases at the end are what counts.
	often := func(do func(i int)) {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				do(i)
			}
		})
	}
	often(func(i int) { put(2 * i); _, _ = r.client.Reload(ctx) })
	often(func(i int) { put(2*i + 1); _, _ = r.client.Reload(ctx) })
	often(func(int) { _, _ = r.client.Statuses(ctx) })
	often(func(int) { _, _ = r.client.Status(ctx, "c") })
	often(func(int) { _, _ = r.client.Wait(ctx, "c", proxy.Synced, time.Millisecond) })
	often(func(i int) { _, _ = r.client.Throttle(ctx, "b", uint64(i)) })
	wg.Go(func() {
		time.Sleep(300 * time.Millisecond)
		_, _ = r.client.Start(ctx, "b")
		_, _ = r.client.Start(ctx, "c")
	})
	wg.Wait()
	put(0)
	if _, err := r.client.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	all, err := r.client.Statuses(t.Context())
	if err != nil || len(all) != 3 {
		t.Fatalf("volumes %s, %v", r.phases(t), err)
	}
	for _, s := range all {
		if s.Degraded {
			t.Errorf("volume %s: %s", s.Name, s.DegradedReason)
		}
	}
	// And a stop in the middle of one.
	for i := range 3 {
		wg.Go(func() { put(i); _, _ = r.client.Reload(context.Background()) })
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

func TestCheckTellsWhereTheDestinationSaysAnotherCache(t *testing.T) {
	dir := t.TempDir()
	source, destination := unitFile(t, dir, "old", 8<<20, 0), unitFile(t, dir, "new", 8<<20, 0)
	for cache, warned := range map[string]bool{conf.CacheAuto: false, conf.CacheVolatile: false, conf.CacheNonvolatile: true} {
		cfg := configFor(t, dir, source, destination, fmt.Sprintf("destination_cache = %q", cache))
		report, err := Check(t.Context(), cfg, quiet())
		if err != nil || report.Refused() != nil {
			t.Fatal(err, report.Refused())
		}
		if text := strings.Join(report.Volumes[0].Warnings, "\n"); strings.Contains(text, "destination_cache") != warned {
			t.Errorf("%s: warnings %q", cache, text)
		}
	}
}
