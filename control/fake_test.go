package control

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

// fakeVolume goes through the phases at a word, so that the tests of this package
// need no copy to end.
type fakeVolume struct {
	mu      sync.Mutex
	status  proxy.Status
	changed chan struct{}
	// fail is what the next steps return; during is called before.
	fail   error
	during func()
	// report is what a comparison gives; asked is how it was asked for.
	report proxy.VerifyReport
	asked  any
}

func newFake(name string) *fakeVolume {
	return &fakeVolume{changed: make(chan struct{}), status: proxy.Status{
		Name: name, IQN: "iqn.2026-11.net.example:" + name, Phase: proxy.Ready, Size: 1 << 30, BlockSize: 512,
		Sessions: []target.SessionInfo{},
		Source:   proxy.UnitStatus{Address: "/srv/old", State: "online"}, Destination: proxy.UnitStatus{Address: "/srv/new", State: "online"},
	}}
}

func (f *fakeVolume) set(change func(*proxy.Status)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.status)
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeVolume) step(allowed proxy.Phase, name string, change func(*proxy.Status)) error {
	f.mu.Lock()
	fail, phase, during := f.fail, f.status.Phase, f.during
	f.mu.Unlock()
	if during != nil {
		during()
	}
	if fail != nil {
		return fail
	}
	if allowed != "" && phase != allowed {
		return &proxy.PhaseError{Volume: f.status.Name, Step: name, Phase: phase, Hint: "do something else"}
	}
	f.set(change)
	return nil
}

func (f *fakeVolume) Name() string { return f.status.Name }
func (f *fakeVolume) Status() proxy.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// Ask answers as a volume in that phase does.
func (f *fakeVolume) Ask(_ context.Context, q proxy.Question) ([]proxy.Answer, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	party, phase := "volume "+f.status.Name, f.status.Phase
	type phases = []proxy.Phase
	of := map[string]struct{ allowed, done phases }{
		"start":    {phases{proxy.Ready, proxy.RolledBack}, phases{proxy.Migrating, proxy.Synced}},
		"cutover":  {phases{proxy.Synced}, phases{proxy.Cutover}},
		"rollback": {phases{proxy.Migrating, proxy.Synced}, phases{proxy.RollingBack, proxy.RolledBack}},
		"mirror":   {phases{proxy.Ready, proxy.Migrating, proxy.Synced}, nil},
	}[q.Name()]
	lost := q == proxy.Question(proxy.CutoverStep(proxy.CutoverOptions{AcceptUnreadable: true})) &&
		phase == proxy.Migrating && f.status.Unreadable > 0 && f.status.Remaining == f.status.Unreadable
	switch {
	case slices.Contains(of.done, phase):
		return []proxy.Answer{proxy.NewAnswer(party, q.Name(), nil)}, true
	case slices.Contains(of.allowed, phase) || lost:
		return []proxy.Answer{proxy.NewAnswer(party, q.Name(), nil)}, false
	}
	a := proxy.NewAnswer(party, q.Name(), &proxy.PhaseError{Volume: f.status.Name, Step: q.Name(), Phase: phase, Hint: "do something else"})
	a.Err = errors.Unwrap(a.Err)
	return []proxy.Answer{a}, false
}

func (f *fakeVolume) BreakFence(context.Context, lun.Device, lun.Device) (proxy.Broken, error) {
	return proxy.Broken{}, nil
}
func (f *fakeVolume) Start(context.Context, ...proxy.StartOptions) error {
	return f.step("", "start", func(s *proxy.Status) { s.Phase = proxy.Migrating; s.Remaining = s.Size / 2 })
}
func (f *fakeVolume) Pause(context.Context) error {
	return f.step("", "pause", func(s *proxy.Status) { s.Paused = true })
}
func (f *fakeVolume) Resume(context.Context) error {
	return f.step("", "resume", func(s *proxy.Status) { s.Paused = false })
}
func (f *fakeVolume) Throttle(_ context.Context, rate uint64) error {
	return f.step("", "throttle", func(s *proxy.Status) { s.RateLimit = rate })
}
func (f *fakeVolume) Verify(_ context.Context, o proxy.VerifyOptions) (proxy.VerifyReport, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = o
	return f.report, nil
}

func (f *fakeVolume) Cutover(_ context.Context, o proxy.CutoverOptions) error {
	f.mu.Lock()
	f.asked = o
	f.mu.Unlock()
	now := time.Now()
	return f.step(proxy.Synced, "cutover", func(s *proxy.Status) { s.Phase, s.CutoverAt = proxy.Cutover, &now })
}
func (f *fakeVolume) Rollback(_ context.Context, o proxy.RollbackOptions) error {
	f.mu.Lock()
	f.asked = o
	f.mu.Unlock()
	return f.step("", "rollback", func(s *proxy.Status) { s.Phase = proxy.RollingBack })
}
func (f *fakeVolume) SetMirror(_ context.Context, on bool) error {
	return f.step("", "mirror", func(s *proxy.Status) { s.Mirrored = on })
}
func (f *fakeVolume) Remove(context.Context, ...state.Record) error {
	return f.step(proxy.Cutover, "remove", func(*proxy.Status) {})
}
func (f *fakeVolume) Set(proxy.Settings) error { return nil }
func (f *fakeVolume) Withdraw(context.Context) error {
	return f.step("", "to drop it", func(*proxy.Status) {})
}
func (f *fakeVolume) Shutdown(context.Context) error { return nil }
func (f *fakeVolume) Wait(ctx context.Context, p proxy.Phase) error {
	for {
		f.mu.Lock()
		changed, phase := f.changed, f.status.Phase
		f.mu.Unlock()
		if phase == p {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// serveFakes serves the control interface for the volumes and gives its client.
func serveFakes(t testing.TB, volumes ...*fakeVolume) (*Client, *Service) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	s := &Service{cfg: &conf.Config{}, log: log, follower: &follower{queue: make(chan proxy.Happening, mostHappenings)}}
	store, err := state.Open(t.TempDir(), state.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s.store = store
	s.running, s.stop = context.WithCancel(context.Background())
	for _, v := range volumes {
		e := newEntry(conf.Volume{Name: v.status.Name})
		e.volume = v
		s.entries = append(s.entries, e)
	}
	path := filepath.Join(t.TempDir(), "c.sock")
	socket, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	server := s.controlServer()
	done := make(chan error, 1)
	go func() { done <- server.Serve(socket) }()
	t.Cleanup(func() {
		s.stop()
		if err := errors.Join(server.Shutdown(context.Background()), ignoreClosed(socket.Close())); err != nil {
			t.Error(err)
		}
		<-done
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return NewClient(path), s
}
