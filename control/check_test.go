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
	cfg := configFor(t, dir, source, unitFile(t, dir, "new", 64<<20, 0), `copy = { rate = "1MiB" }`)
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

func TestCheckNamesWhatWouldBeRefused(t *testing.T) {
	for _, tc := range []struct {
		name        string
		size, data  int64
		destination string
		more        string
		want        string
	}{
		{name: "smaller", size: 32 << 20, want: "volume db01: destination is smaller"},
		{name: "not blank", size: 64 << 20, data: 4096, want: "volume db01: destination is not blank"},
		{name: "not blank but meant", size: 64 << 20, data: 4096, more: "overwrite = true"},
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
			if tc.want == "" {
				if refused != nil {
					t.Errorf("refused: %v", refused)
				}
				return
			}
			if refused == nil || !strings.HasPrefix(refused.Error(), tc.want) || strings.Contains(refused.Error(), "\n") {
				t.Errorf("refused %v, want %q", refused, tc.want)
			}
		})
	}
}

func TestCheckFindsAPortalAndAStateThatAreInUse(t *testing.T) {
	dir := t.TempDir()
	cfg := configFor(t, dir, unitFile(t, dir, "old", 1<<20, 0), unitFile(t, dir, "new", 1<<20, 0), "")
	store, err := state.Open(cfg.Service.State, state.Options{Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	taken, err := listenTCP(t)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Service.Portals = []string{taken}
	report, err := Check(t.Context(), cfg, quiet())
	if err != nil || len(report.Refusals) != 2 {
		t.Fatalf("refusals %q, %v", report.Refusals, err)
	}
	if !strings.Contains(report.Refusals[0], taken) || !strings.Contains(report.Refusals[1], cfg.Service.State) {
		t.Errorf("refusals %q", report.Refusals)
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
	bytes, known, some, err := allocated(t.Context(), dev)
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
}
