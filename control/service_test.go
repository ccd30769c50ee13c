package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
)

// listenTCP takes a port for the length of the test.
func listenTCP(t *testing.T) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String(), nil
}

// freeTCP is an address that nobody listens on.
func freeTCP(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// running is a service that runs until stop, or the end of the test.
type running struct {
	client *Client
	info   ServiceInfo
	stop   func() error
	log    *logText
	// service is what runs.
	service *Service
}

// logText takes a log, and may be read meanwhile.
type logText struct {
	mu sync.Mutex // protects b
	b  bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t *testing.T, cfg *conf.Config) *running {
	t.Helper()
	log := quiet()
	text := &logText{}
	log.SetOutput(text)
	service, err := New(t.Context(), cfg, Options{Version: "test", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	stopped := false
	r := &running{client: NewClient(cfg.Service.Control), log: text, service: service}
	r.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	if r.info, err = r.client.Info(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

// initiator logs in to the volume db01 of a service.
func (r *running) initiator(t *testing.T) lun.Device {
	t.Helper()
	dev, err := lun.Open(t.Context(), "iscsi://"+r.info.Portals[0]+"/iqn.2026-11.net.example:db01/0", lun.Options{IOTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

func TestServiceMovesAVolumeFromStartToCutover(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	const size = 32 << 20
	source, destination := unitFile(t, dir, "old", size, 0), unitFile(t, dir, "new", size, 0)
	content := make([]byte, size/4)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	want := make([]byte, size)
	copy(want[size/2:], content)
	if err := os.WriteFile(source, want, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := configFor(t, dir, source, destination, "")
	service := start(t, cfg)
	dev := service.initiator(t)
	written := bytes.Repeat([]byte{0x5a}, 64<<10)
	write := func(offset int) {
		t.Helper()
		copy(want[offset:], written)
		if err := dev.WriteAt(ctx, written, lun.LBA(offset/512)); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	if s, err := service.client.Status(ctx, "db01"); err != nil || s.Phase != proxy.Ready || len(s.Sessions) != 1 {
		t.Fatalf("before: %+v, %v", s, err)
	}
	report, err := Check(ctx, cfg, quiet())
	if err != nil || !report.Running || report.Refused() != nil || !report.Volumes[0].Source.Open {
		t.Errorf("check while it runs: %+v, %v", report, err)
	}
	if _, err := service.client.Throttle(ctx, "db01", 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := service.client.Start(ctx, "db01"); err != nil {
			t.Fatal(err)
		}
	}
	write(size/2 + 4096)
	if s, err := service.client.Wait(ctx, "db01", proxy.Synced, 20*time.Second); err != nil || s.Phase != proxy.Synced || s.Remaining != 0 {
		t.Fatalf("synced: %+v, %v", s, err)
	}
	write(size - 64<<10)
	metrics(t, service, `lunshift_volume_phase{phase="synced",volume="db01"} 1`)
	for range 2 {
		if s, err := service.client.CutoverWhenSynced(ctx, "db01", 0, proxy.CutoverOptions{}); err != nil || s.Phase != proxy.Cutover {
			t.Fatalf("cutover: %+v, %v", s, err)
		}
	}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := dev.WriteAt(short, written, 0); err == nil {
		t.Error("a write was taken after the cutover")
	}
	_ = dev.Close() // its session is gone
	if got, err := os.ReadFile(destination); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the destination differs from what was written (%v)", err)
	}
	for range 2 {
		if _, err := service.client.Remove(ctx, "db01"); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	if err := service.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	if _, err := os.Stat(cfg.Service.Control); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func metrics(t *testing.T, r *running, want string) {
	t.Helper()
	response, err := http.Get("http://" + r.info.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || !strings.Contains(string(text), want) {
		t.Errorf("metrics lack %s (%v):\n%s", want, err, text)
	}
}

func TestServiceGoesOnAfterARestart(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	cfg := configFor(t, dir, unitFile(t, dir, "old", 64<<20, 48<<20), unitFile(t, dir, "new", 64<<20, 0), `copy = { rate = "8MiB" }`)
	first := start(t, cfg)
	if _, err := first.client.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	for copied := uint64(0); copied == 0; {
		s, err := first.client.Status(ctx, "db01")
		if err != nil {
			t.Fatal(err)
		}
		copied = s.Copied
	}
	if _, err := first.client.Pause(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	second := start(t, cfg)
	s, err := second.client.Status(ctx, "db01")
	if err != nil || s.Phase != proxy.Migrating || !s.Paused || s.Copied == 0 || s.Remaining == 0 {
		t.Errorf("after the restart: %+v, %v", s, err)
	}
	if _, err := second.client.Throttle(ctx, "db01", 0); err != nil {
		t.Error(err)
	}
	if _, err := second.client.Resume(ctx, "db01"); err != nil {
		t.Error(err)
	}
	if _, err := second.client.CutoverWhenSynced(ctx, "db01", 0, proxy.CutoverOptions{}); err != nil {
		t.Error(err)
	}
	if err := second.stop(); err != nil {
		t.Fatal(err)
	}
	// Cut over, the service needs neither unit.
	for _, name := range []string{"old", "new"} {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".gone")); err != nil {
			t.Fatal(err)
		}
	}
	third := start(t, cfg)
	if s, err := third.client.Status(ctx, "db01"); err != nil || s.Phase != proxy.Cutover {
		t.Errorf("after the cutover: %+v, %v", s, err)
	}
	// Not even in the configuration must it be, to be removed.
	if err := third.stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Volumes[0].Name = "db02"
	cfg.Volumes[0].Source.Address = unitFile(t, dir, "other", 1<<20, 0)
	cfg.Volumes[0].Destination.Address = unitFile(t, dir, "another", 1<<20, 0)
	fourth := start(t, cfg)
	for _, first := range []bool{true, false} {
		if r, err := fourth.client.Remove(ctx, "db01"); err != nil || r.Removed != first {
			t.Errorf("remove: %+v, %v", r, err)
		}
	}
}

func TestServiceThatCannotStartSaysWhyAndLetsGo(t *testing.T) {
	dir := t.TempDir()
	source, destination := unitFile(t, dir, "old", 1<<20, 0), unitFile(t, dir, "new", 1<<20, 0)
	good := configFor(t, dir, source, destination, "")
	taken, err := listenTCP(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*conf.Config)
		want   string
	}{
		{"portal", func(c *conf.Config) { c.Service.Portals = []conf.Portal{{Address: taken}} }, taken},
		{"metrics", func(c *conf.Config) { c.Service.HTTP = taken }, "metrics address " + taken},
		{"source", func(c *conf.Config) { c.Volumes[0].Source.Address = "/nonexistent" }, "volume db01: source: open"},
		{"array", func(c *conf.Config) {
			c.Volumes[0].Source.Address = "iscsi://127.0.0.1:1/iqn.2001-04.com.example:old/1"
			c.Service.LoginTimeout = time.Second
		}, "volume db01: source: "},
		{"control", func(c *conf.Config) { c.Service.Control = source }, "control socket " + source},
		{"state", func(c *conf.Config) { c.Service.State = source }, source},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := *good
			cfg.Volumes = append([]conf.Volume(nil), good.Volumes...)
			tc.change(&cfg)
			_, err := New(t.Context(), &cfg, Options{Log: quiet()})
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, tc.want)
			}
		})
	}
	// What failed holds nothing: a good configuration of the same parts starts.
	service := start(t, good)
	if _, err := New(t.Context(), good, Options{Log: quiet()}); err == nil || !strings.Contains(err.Error(), "already running") {
		t.Errorf("second service: %v", err)
	}
	if _, err := service.client.Status(t.Context(), "db01"); err != nil {
		t.Errorf("the first service was disturbed: %v", err)
	}
}

// With autostart and overwrite a removed volume that began anew would copy the stale
// source over the destination that its initiators use by then.
func TestRemovedVolumeDoesNotBeginAnew(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	destination := unitFile(t, dir, "new", 4<<20, 0)
	cfg := configFor(t, dir, unitFile(t, dir, "old", 4<<20, 4<<20), destination, "autostart = true\noverwrite = true")
	first := start(t, cfg)
	if _, err := first.client.CutoverWhenSynced(ctx, "db01", 0, proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := first.client.Remove(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	inUse := bytes.Repeat([]byte{0x77}, 4<<20)
	if err := os.WriteFile(destination, inUse, 0o600); err != nil {
		t.Fatal(err)
	}

	if report, err := Check(ctx, cfg, quiet()); err != nil || report.Refused() == nil || !strings.Contains(report.Refused().Error(), "delete its [[volume]]") {
		t.Errorf("check: %v, %v", report.Refused(), err)
	}
	second := start(t, cfg)
	if all, err := second.client.Statuses(ctx); err != nil || len(all) != 0 {
		t.Errorf("served: %+v, %v", all, err)
	}
	if _, err := lun.Open(ctx, "iscsi://"+second.info.Portals[0]+"/iqn.2026-11.net.example:db01/0", lun.Options{LoginTimeout: time.Second}); err == nil {
		t.Error("initiators find the removed volume")
	}
	if s, err := second.client.CutoverWhenSynced(ctx, "db01", time.Second, proxy.CutoverOptions{}); err != nil || s.Phase != proxy.Cutover {
		t.Errorf("cutover of a removed volume: %+v, %v", s, err)
	}
	if err := second.stop(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(destination); err != nil || !bytes.Equal(got, inUse) {
		t.Errorf("the destination was overwritten (%v)", err)
	}

	// With neither unit there, nobody can tell whether the name is used anew.
	for _, from := range []string{"old", "new"} {
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, from+".away")); err != nil {
			t.Fatal(err)
		}
	}
	unsure := start(t, cfg)
	if _, err := unsure.client.CutoverWhenSynced(ctx, "db01", time.Second, proxy.CutoverOptions{}); KindOf(err) != Unknown {
		t.Errorf("cutover of what may be another pair: %v", err)
	}
	if report, err := Check(ctx, cfg, quiet()); err != nil || report.Refused() == nil || !strings.Contains(report.Refused().Error(), "another pair is served once they can") {
		t.Errorf("check: %v, %v", report.Refused(), err)
	}
	for _, from := range []string{"old", "new"} {
		unitFile(t, dir, from+"3", 4<<20, 0)
		if err := os.Rename(filepath.Join(dir, from+"3"), filepath.Join(dir, from)); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		// It is there a moment before it is started.
		if all, err := unsure.client.Statuses(ctx); err == nil && len(all) == 1 && all[0].Phase != proxy.Ready {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("another pair that came later is not served")
		}
	}
	if _, err := unsure.client.CutoverWhenSynced(ctx, "db01", 20*time.Second, proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := unsure.client.Remove(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	if err := unsure.stop(); err != nil {
		t.Fatal(err)
	}

	// The name is free for another pair.
	cfg.Volumes[0].Source.Address = unitFile(t, dir, "old2", 4<<20, 0)
	cfg.Volumes[0].Destination.Address = unitFile(t, dir, "new2", 4<<20, 0)
	third := start(t, cfg)
	if _, err := third.client.Wait(ctx, "db01", proxy.Synced, 20*time.Second); err != nil {
		t.Errorf("another pair: %v", err)
	}
}

func TestUnitUnderTwoAddressesBelongsToOneVolume(t *testing.T) {
	dir := t.TempDir()
	shared := unitFile(t, dir, "shared", 1<<20, 0)
	second := filepath.Join(dir, "second")
	if err := os.Link(shared, second); err != nil {
		t.Fatal(err)
	}
	cfg := configFor(t, dir, unitFile(t, dir, "old", 1<<20, 0), shared, `
[[volume]]
name = "db02"
iqn = "iqn.2026-11.net.example:db02"
source = "`+second+`"
destination = "`+unitFile(t, dir, "new", 1<<20, 0)+`"
`)
	if _, err := New(t.Context(), cfg, Options{Log: quiet()}); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("files: %v", err)
	}
	// Arrays do not say that a unit is in use, so the identities are compared.
	var c claims
	if err := c.take("db01", "naa.1", "naa.2"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.take("db02", "naa.2", "naa.3"); err == nil || !strings.Contains(err.Error(), "volume db02: source is the destination of volume db01") {
			t.Errorf("taken: %v", err)
		}
	}
	if err := c.take("db01", "naa.1", "naa.2"); err != nil {
		t.Errorf("again: %v", err)
	}
	c.release("db01")
	if err := c.take("db02", "naa.2", "naa.3"); err != nil {
		t.Errorf("released: %v", err)
	}
}

func TestRenamedVolumeDoesNotBeginAnew(t *testing.T) {
	dir := t.TempDir()
	old, moved := unitFile(t, dir, "old", 1<<20, 4096), unitFile(t, dir, "new", 1<<20, 0)
	cfg := configFor(t, dir, old, moved, "overwrite = true")
	first := start(t, cfg)
	if _, err := first.client.Start(t.Context(), "db01"); err != nil {
		t.Fatal(err)
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Volumes[0].Name = "db02"
	refused := func(want string) {
		t.Helper()
		_, err := New(t.Context(), cfg, Options{Log: quiet()})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want one line with %q", err, want)
		}
		report, err := Check(t.Context(), cfg, quiet())
		if err != nil || report.Refused() == nil || !strings.Contains(report.Refused().Error(), want) {
			t.Errorf("check: %v, %v, want %q", report.Refused(), err, want)
		}
	}
	refused("the state has volume db01 with these logical units in phase")
	cfg.Volumes[0].Source.Address, cfg.Volumes[0].Destination.Address = moved, old
	refused("give the volume its name back")

	// What is in mid-migration is not forgotten, even where nothing serves it.
	cfg.Volumes[0].Source.Address, cfg.Volumes[0].Destination.Address = unitFile(t, dir, "a", 1<<20, 0), unitFile(t, dir, "b", 1<<20, 0)
	other := start(t, cfg)
	if _, err := other.client.Remove(t.Context(), "db01"); KindOf(err) != WrongPhase {
		t.Errorf("remove in mid-migration: %v", err)
	}
	if err := other.stop(); err != nil {
		t.Fatal(err)
	}

	cfg.Volumes[0].Name = "db01"
	cfg.Volumes[0].Source.Address, cfg.Volumes[0].Destination.Address = old, moved
	again := start(t, cfg)
	if _, err := again.client.CutoverWhenSynced(t.Context(), "db01", 0, proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := again.stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Volumes[0].Name = "db03"
	refused("lunshift remove db01")
	cfg.Volumes[0].Source.Address, cfg.Volumes[0].Destination.Address = moved, unitFile(t, dir, "third", 1<<20, 0)
	if _, err := start(t, cfg).client.CutoverWhenSynced(t.Context(), "db03", 0, proxy.CutoverOptions{}); KindOf(err) != WrongPhase {
		t.Errorf("the destination moves on: %v", err)
	}
}

func TestVolumeThatIsNotServedShowsWhatIsKnownOfItsProgress(t *testing.T) {
	_, s := serveFakes(t)
	v := conf.Volume{Name: "db01", Copy: conf.Copy{Rate: 5 << 20}}
	if got := s.knownOf(v, errors.New("away")); got.RateLimit != 5<<20 || got.Phase != proxy.Ready {
		t.Errorf("nothing recorded: %+v", got)
	}
	flags, err := s.store.Flags("db01", state.Geometry{Blocks: 4096, RegionBlocks: 2048})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(flags.Set(t.Context(), state.Valid, state.Run{Blocks: 1024}), flags.Set(t.Context(), state.Dirty, state.Run{Blocks: 8})); err != nil {
		t.Fatal(err)
	}
	allocated, rate := uint64(1<<20), uint64(3<<20)
	record := state.Record{Volume: "db01", BlockSize: 512, Blocks: 4096, RegionBlocks: 2048, Phase: string(proxy.Migrating), Paused: true,
		AllocatedBytes: &allocated, RateLimit: &rate, CopiedBytes: 7, InitiatorWrittenBytes: 512}
	for _, tc := range []struct {
		phase              proxy.Phase
		remaining, written uint64
	}{{proxy.Ready, 2 << 20, 512}, {proxy.Migrating, 3 << 19, 4096}, {proxy.Synced, 0, 512}} {
		record.Phase = string(tc.phase)
		if err := s.store.PutRecords(t.Context(), record); err != nil {
			t.Fatal(err)
		}
		got := s.knownOf(v, errors.New("away"))
		if got.Phase != tc.phase || got.Size != 2<<20 || got.Remaining != tc.remaining || got.InitiatorWritten != tc.written ||
			got.RateLimit != rate || got.Allocated != allocated || !got.AllocatedKnown || got.Copied != 7 || !got.Degraded {
			t.Errorf("%s: %+v", tc.phase, got)
		}
	}
}

func TestOnlyOpenVolumesCountAsServed(t *testing.T) {
	over := newFake("db02")
	over.status.Phase = proxy.Cutover
	_, s := serveFakes(t, newFake("db01"), over)
	s.entries = append(s.entries, &entry{failure: errors.New("no route")})
	if n := s.served(); n != 1 {
		t.Errorf("%d volumes, want 1", n)
	}
}

func TestUnreachableArrayKeepsOnlyItsOwnVolumeDown(t *testing.T) {
	dir := t.TempDir()
	back := configFor(t, t.TempDir(), unitFile(t, dir, "a", 1<<20, 0), unitFile(t, dir, "b", 1<<20, 0), "")
	array := start(t, back)
	portal := array.info.Portals[0]
	source := "iscsi://" + portal + "/iqn.2026-11.net.example:db01/0"
	cfg := configFor(t, dir, source, unitFile(t, dir, "new", 1<<20, 0), `
[[volume]]
name = "db02"
iqn = "iqn.2026-11.net.example:db02"
source = "`+unitFile(t, dir, "old2", 1<<20, 0)+`"
destination = "`+unitFile(t, dir, "new2", 1<<20, 0)+`"
`)
	cfg.Service.LoginTimeout, cfg.Service.IOTimeout = time.Second, time.Second
	if err := start(t, cfg).stop(); err != nil {
		t.Fatal(err)
	}
	if err := array.stop(); err != nil {
		t.Fatal(err)
	}
	service := start(t, cfg)
	all, err := service.client.Statuses(t.Context())
	if err != nil || len(all) != 2 || !all[0].Degraded || all[1].Degraded {
		t.Fatalf("statuses: %+v, %v", all, err)
	}
	if _, err := service.client.Start(t.Context(), "db01"); err == nil || !strings.Contains(err.Error(), "not served yet") {
		t.Errorf("start: %v", err)
	}
	if _, err := service.client.Start(t.Context(), "db02"); err != nil {
		t.Error(err)
	}
	deadline, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	started := make(chan error, 1)
	go func() {
		_, err := service.client.Wait(deadline, "db01", proxy.Migrating, 0)
		started <- err
	}()
	back.Service.Portals = []conf.Portal{{Address: portal}}
	start(t, back)
	for {
		s, err := service.client.Status(deadline, "db01")
		if err != nil {
			t.Fatal(err)
		}
		if !s.Degraded {
			break
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-deadline.Done():
			t.Fatal("the volume did not come back")
		}
	}
	if _, err := service.client.Start(t.Context(), "db01"); err != nil && !errors.Is(err, proxy.ErrPhase) {
		t.Error(err)
	}
	if err := <-started; err != nil {
		t.Errorf("wait that began while the array was away: %v", err)
	}
}
