package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
)

// unitFile makes a sparse file of size bytes with data in its first bytes.
func unitFile(t *testing.T, dir, name string, size, data int64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Truncate(size), writeAll(f, bytes.Repeat([]byte{0xa5}, int(data)))); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeAll(w io.Writer, p []byte) error {
	_, err := w.Write(p)
	return err
}

// configFor writes a configuration with one volume from source to destination.
func configFor(t *testing.T, dir, source, destination, more string) *conf.Config {
	t.Helper()
	path := filepath.Join(dir, "lunshift.toml")
	text := fmt.Sprintf(`
[service]
portals = ["127.0.0.1:0"]
control = %q
state = %q
http = "127.0.0.1:0"
[[volume]]
name = "db01"
iqn = "iqn.2026-11.net.example:db01"
source = %q
destination = %q
%s`, filepath.Join(dir, "c.sock"), filepath.Join(dir, "state"), source, destination, more)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func quiet() *logrus.Logger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func TestCheckTellsWhatTheUnitsAre(t *testing.T) {
	dir := t.TempDir()
	source := unitFile(t, dir, "old", 64<<20, 10<<20)
	cfg := configFor(t, dir, source, unitFile(t, dir, "new", 64<<20, 0), `copy = { rate = "2MiB" }`)
	cfg.Service.Copy.Rate = 1 << 20
	report, err := Check(t.Context(), cfg, quiet())
	if err != nil || report.Refused() != nil {
		t.Fatalf("%v, refused: %v", err, report.Refused())
	}
	v := report.Volumes[0]
	if report.Running || v.Source.Size != 64<<20 || v.Source.BlockSize != 512 || !v.Source.Thin || v.Source.ID == "" ||
		v.Allocated != 10<<20 || !v.AllocatedKnown || !v.RateLimited || v.Rate != 1<<20 || v.Estimate == nil || *v.Estimate != 10 {
		t.Errorf("report: %+v", v)
	}
	if _, err := os.Stat(cfg.Service.State); !os.IsNotExist(err) {
		t.Errorf("check made a state directory: %v", err)
	}
	var out bytes.Buffer
	if err := WriteCheck(&out, report); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{source, "64 MiB (67108864 bytes)", "10 MiB of 64 MiB", "10s at 1.0 MiB/s, the limit in copy.rate", "nothing would be refused"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("missing %q in\n%s", want, out.String())
		}
	}
}

// Caught: what may be written to by its permissions taken for a place of files.
func TestCheckRefusesAStateThatCannotBeMade(t *testing.T) {
	for _, dir := range []string{"/proc/lunshift", "/sys/lunshift/state", "/dev/null/state"} {
		if err := checkCreatable(dir); err == nil {
			t.Errorf("%s is taken for a place of a state", dir)
		}
	}
	if err := checkCreatable(filepath.Join(t.TempDir(), "a", "b")); err != nil {
		t.Error(err)
	}
}

func TestCheckNamesWhatWouldBeRefused(t *testing.T) {
	for _, tc := range []struct {
		name        string
		size, data  int64
		destination string
		more        string
		want        string
	}{
		{name: "smaller", size: 32 << 20, want: "volume db01: destination is smaller"},
		{name: "not blank", size: 64 << 20, data: 4096, want: "volume db01: destination "},
		// What serve would say of a volume that the state does not know, overwrite or not.
		{name: "not blank and overwrite", size: 64 << 20, data: 4096, more: "overwrite = true", want: "volume db01: destination "},
		{name: "not blank and seeded", size: 64 << 20, data: 4096, more: "seeded = true", want: "volume db01: destination "},
		{name: "missing", destination: "/nonexistent/unit", want: "volume db01: destination: open"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			if tc.destination == "" {
				tc.destination = unitFile(t, dir, "new", tc.size, tc.data)
			}
			cfg := configFor(t, dir, unitFile(t, dir, "old", 64<<20, 1<<20), tc.destination, tc.more)
			report, err := Check(t.Context(), cfg, quiet())
			if err != nil {
				t.Fatal(err)
			}
			refused := report.Refused()
			if refused != nil && tc.data > 0 && !strings.Contains(refused.Error(), "lunshift adopt db01 --new") {
				t.Errorf("refused %v: how to go on is missing", refused)
			}
			if refused == nil || !strings.HasPrefix(refused.Error(), tc.want) || strings.Contains(refused.Error(), "\n") {
				t.Errorf("refused %v, want %q", refused, tc.want)
			}
		})
	}
}

func TestCheckFindsWhatServeWouldRefuseOfTheService(t *testing.T) {
	dir := t.TempDir()
	good := configFor(t, dir, unitFile(t, dir, "old", 1<<20, 0), unitFile(t, dir, "new", 1<<20, 0), "")
	locked := filepath.Join(dir, "locked")
	store, err := state.Open(locked, state.Options{Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	file := unitFile(t, dir, "file", 1, 0)
	nowhere := filepath.Join(dir, "nowhere")
	if err := os.Symlink("/nonexistent/dir", nowhere); err != nil {
		t.Fatal(err)
	}
	taken, err := listenTCP(t)
	if err != nil {
		t.Fatal(err)
	}
	held, err := listenSocket(filepath.Join(dir, "held.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := os.Remove(filepath.Join(dir, "held.sock")); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*conf.Service)
		want   string
	}{
		{"portal", func(s *conf.Service) { s.Portals = []conf.Portal{{Address: taken}} }, taken},
		{"metrics in use", func(s *conf.Service) { s.HTTP = taken }, "metrics address " + taken},
		{"metrics not local", func(s *conf.Service) { s.HTTP = "192.0.2.1:9260" }, "metrics address 192.0.2.1:9260"},
		{"metrics on a portal", func(s *conf.Service) { s.HTTP = freeTCP(t); s.Portals = []conf.Portal{{Address: s.HTTP}} }, "metrics address "},
		{"control is a file", func(s *conf.Service) { s.Control = file }, "control socket " + file},
		{"control is a directory", func(s *conf.Service) { s.Control = dir }, "control socket " + dir},
		{"control below a file", func(s *conf.Service) { s.Control = file + "/c.sock" }, "control socket " + file},
		{"control cannot be made", func(s *conf.Service) { s.Control = nowhere + "/deep/c.sock" }, "control socket " + nowhere + "/deep"},
		{"control is locked", func(s *conf.Service) { s.Control = filepath.Join(dir, "held.sock") }, "already running"},
		{"state in use", func(s *conf.Service) { s.State = locked }, locked},
		{"state is a file", func(s *conf.Service) { s.State = file }, file},
		{"state below a file", func(s *conf.Service) { s.State = file + "/state" }, file},
		{"state cannot be made", func(s *conf.Service) { s.State = nowhere + "/state" }, "state directory " + nowhere},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := *good
			tc.change(&cfg.Service)
			report, err := Check(t.Context(), &cfg, quiet())
			if err != nil || len(report.Refusals) != 1 || !strings.Contains(report.Refusals[0], tc.want) || report.Refused() == nil {
				t.Fatalf("refusals %q, %v; want one with %q", report.Refusals, err, tc.want)
			}
			var out bytes.Buffer
			if err := WriteCheck(&out, report); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(out.String(), "\nrefused  "+report.Refusals[0]+"\n") || strings.Contains(out.String(), "result  nothing would be refused") {
				t.Errorf("the report does not say so:\n%s", out.String())
			}
			if _, err := New(t.Context(), &cfg, Options{Log: quiet()}); err == nil {
				t.Error("serve would not refuse it")
			}
		})
	}
	before, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if report, err := Check(t.Context(), good, quiet()); err != nil || report.Refused() != nil {
		t.Errorf("good: %v, %v", report.Refused(), err)
	}
	if after, err := os.ReadDir(dir); err != nil || len(after) != len(before) {
		t.Errorf("check left %v where there was %v (%v)", after, before, err)
	}
}

func TestCheckBesideTheServiceKnowsWhatTheStateKnows(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	source, destination := unitFile(t, dir, "old", 1<<20, 4096), unitFile(t, dir, "new", 1<<20, 0)
	cfg := configFor(t, dir, source, destination, "")
	service := start(t, cfg)
	if _, err := service.client.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	if _, err := service.client.CutoverWhenSynced(ctx, "db01", 0, proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	// It serves on without the units, which stand on their own from now on.
	if err := service.stop(); err != nil {
		t.Fatal(err)
	}
	service = start(t, cfg)
	check := func(cfg *conf.Config, want string) VolumeReport {
		t.Helper()
		report, err := Check(ctx, cfg, quiet())
		if err != nil || !report.Running {
			t.Fatalf("%+v, %v", report, err)
		}
		refused := ""
		if e := report.Refused(); e != nil {
			refused = e.Error()
		}
		if (want == "") != (refused == "") || !strings.Contains(refused, want) || strings.Contains(refused, "overwrite") {
			t.Errorf("refused %q, want %q", refused, want)
		}
		return report.Volumes[0]
	}
	renamed := *cfg
	renamed.Volumes = []conf.Volume{cfg.Volumes[0]}
	renamed.Volumes[0].Name, renamed.Volumes[0].Overwrite = "db02", true
	check(&renamed, "the state has volume db01 with these logical units in phase cutover")
	if _, err := service.client.Remove(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	check(cfg, "was cut over and removed; delete its [[volume]]")
	other := configFor(t, t.TempDir(), unitFile(t, dir, "old2", 1<<20, 0), unitFile(t, dir, "new2", 1<<20, 0), "")
	other.Service = cfg.Service
	if v := check(other, ""); v.Served || v.Phase != proxy.Ready {
		t.Errorf("another pair: %+v", v)
	}
	var out bytes.Buffer
	if err := WriteCheck(&out, CheckReport{Running: true, Volumes: []VolumeReport{{Name: "db09"}}}); err != nil || !strings.Contains(out.String(), "the running service does not have it") {
		t.Errorf("%v:\n%s", err, out.String())
	}
}

func TestCheckKnowsTheStateOfAnEarlierRun(t *testing.T) {
	dir := t.TempDir()
	cfg := configFor(t, dir, unitFile(t, dir, "old", 1<<20, 0), unitFile(t, dir, "new", 1<<20, 4096), "")
	put := func(phase proxy.Phase) {
		t.Helper()
		store, err := state.Open(cfg.Service.State, state.Options{Log: quiet()})
		if err != nil {
			t.Fatal(err)
		}
		record := state.Record{Volume: "db01", SourceID: "naa.1", DestinationID: "naa.2", BlockSize: 512, Blocks: 2048, RegionBlocks: 2048, Phase: string(phase)}
		if err := errors.Join(store.PutRecords(t.Context(), record), store.Close()); err != nil {
			t.Fatal(err)
		}
	}
	put(proxy.Migrating)
	report, err := Check(t.Context(), cfg, quiet())
	if err != nil || len(report.Volumes[0].Refusals) != 1 || !strings.Contains(report.Volumes[0].Refusals[0], "its state belongs to source naa.1") {
		t.Errorf("another pair: %q, %v", report.Volumes[0].Refusals, err)
	}
	put(proxy.Cutover)
	report, err = Check(t.Context(), cfg, quiet())
	if err != nil || report.Refused() != nil || report.Volumes[0].Phase != proxy.Cutover || report.Volumes[0].Source.Open {
		t.Errorf("cut over: %+v, %v", report.Volumes[0], err)
	}
}

// striped is a device with a run of two blocks in every four.
type striped struct {
	lun.Device
	info  lun.Info
	reads map[lun.LBA]bool
}

func (s *striped) Info() lun.Info { return s.info }
func (s *striped) Extents(_ context.Context, e lun.Extent) ([]lun.Allocation, error) {
	var runs []lun.Allocation
	for start := e.Start; start < e.End() && len(runs) < 100; {
		run := lun.Extent{Start: start, Blocks: 2 - uint64(start)%2}.Intersect(e)
		runs = append(runs, lun.Allocation{Extent: run, Allocated: start%4 < 2})
		start = run.End()
	}
	return runs, nil
}

func TestAllocationIsCountedAndSampledAllOver(t *testing.T) {
	const blocks = 100_000
	dev := &striped{info: lun.Info{BlockSize: 512, Blocks: blocks, ReportsAllocation: true}}
	bytes, known, some, err := allocated(t.Context(), dev, proxy.AllocationAuto, nil)
	if err != nil || !known || bytes != blocks/2*512 {
		t.Errorf("%d bytes, known %v, %v", bytes, known, err)
	}
	if n := len(some); n < sampleRuns/2 || n > sampleRuns || some[n-1].Start < blocks*9/10 || some[0].Start > blocks/10 {
		t.Errorf("%d runs from %v to %v", n, some[0], some[n-1])
	}
	for n := range uint64(len(some) * 2) {
		if e := at(some, n, 10); e.Empty() || e.Start%4 > 1 || e.Blocks > 2 {
			t.Fatalf("block %d of the runs: %v", n, e)
		}
	}

	// What file systems have free is taken off once, be it allocated or not.
	free := []lun.Extent{{Start: 1000, Blocks: 49_000}, {Start: 70_000, Blocks: 1}, {Start: 70_002, Blocks: 2}}
	whole := &striped{info: lun.Info{BlockSize: 512, Blocks: blocks}}
	for what, c := range map[string]struct {
		dev  lun.Device
		a    proxy.Allocation
		want uint64
	}{
		"both tell":        {dev, proxy.AllocationFileSystem, (blocks-49_000)/2 - 1},
		"file system":      {whole, proxy.AllocationAuto, blocks - 49_000 - 3},
		"neither is asked": {dev, proxy.AllocationAll, blocks},
	} {
		off := free
		if c.a == proxy.AllocationAll {
			off = nil
		}
		if bytes, known, some, err := allocated(t.Context(), c.dev, c.a, off); err != nil || !known || bytes != c.want*512 || len(lun.Without(some, off)) != len(some) {
			t.Errorf("%s: %d blocks, want %d, known %v, %v", what, bytes/512, c.want, known, err)
		}
	}
}
