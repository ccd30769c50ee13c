package control

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/proxy"
	"lunshift/state"
)

const (
	// mostHappenings bounds what happened and is not written down yet. Volumes never wait for
	// it: what is beyond it is counted.
	mostHappenings = 1024
	// followInterval is the time between attempts to write down what could not be.
	followInterval = 5 * time.Second
)

// follower takes what volumes come to by themselves, for the audit trail and for the hooks that
// follow on it.
type follower struct {
	queue chan proxy.Happening
	lost  atomic.Uint64
	// behind is set where the volumes are to be looked at again.
	behind atomic.Bool
	// failing is set while nothing can be written down. Of the loop alone.
	failing bool

	keeping sync.Mutex // held while what was followed is changed
	closing sync.Once
	stop    chan struct{}
	done    chan struct{}
	work    sync.WaitGroup // hooks that run, and starts
}

// newFollower runs the loop until close.
func (s *Service) newFollower() *follower {
	f := &follower{queue: make(chan proxy.Happening, mostHappenings), stop: make(chan struct{}), done: make(chan struct{})}
	go s.follow(f)
	return f
}

// happened is told by volumes, and does not wait.
func (f *follower) happened(h proxy.Happening) {
	select {
	case f.queue <- h:
	default:
		f.lost.Add(1)
	}
}

// close ends the loop once the volumes have come to rest, and waits for hooks, which end with
// the service.
func (f *follower) close(ctx context.Context) error {
	f.closing.Do(func() { close(f.stop) })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-f.done
		f.work.Wait()
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("what happened last is not in the audit trail: %w", ctx.Err())
	}
}

func (s *Service) follow(f *follower) {
	defer close(f.done)
	again := time.NewTicker(followInterval)
	defer again.Stop()
	for {
		select {
		case h := <-f.queue:
			s.followOne(f, h)
		case <-again.C:
			s.catchUp(f)
		case <-f.stop:
			for {
				select {
				case h := <-f.queue:
					s.followOne(f, h)
				default:
					s.catchUp(f)
					return
				}
			}
		}
	}
}

// followOne writes one happening down.
func (s *Service) followOne(f *follower, h proxy.Happening) {
	if h.Phase != "" {
		if e, err := s.entry(h.Volume); err == nil {
			s.followPhase(f, e)
		} else {
			f.behind.Store(true) // it is being taken up
		}
		return
	}
	event := state.Event{Volume: h.Volume, At: h.At, What: "fault", Text: h.Text}
	if h.Text == "" {
		event.What, event.Text = "fault over", h.Fault
	}
	if err := s.note(context.Background(), event); err != nil {
		f.fails(s.log, err)
		f.lost.Add(1)
	}
}

// catchUp does what could not be done before.
func (s *Service) catchUp(f *follower) {
	n := f.lost.Load()
	if n == 0 && !f.behind.Swap(false) {
		return
	}
	if n > 0 {
		event := state.Event{What: "lost", Text: fmt.Sprintf("%d faults of volumes that began or ended are not in the audit trail", n)}
		if err := s.note(context.Background(), event); err != nil {
			f.fails(s.log, err)
			return
		}
		f.lost.Add(-n)
	}
	f.failing = false
	for _, e := range s.list() {
		if _, err := e.open(); err == nil && !e.isRemoved() {
			s.followPhase(f, e)
		}
	}
}

// fails logs the first of several failures.
func (f *follower) fails(log logrus.FieldLogger, err error) {
	if !f.failing {
		log.WithError(err).Error("what happened to a volume cannot be written down; tried again")
	}
	f.failing = true
	f.behind.Store(true)
}

// followed is what was done about a phase that a volume came to by itself; At names the time it
// came there. Kept with the volume, so that it is done once, over restarts too.
type followed struct {
	Synced     followedPhase `json:"synced"`
	RolledBack followedPhase `json:"rolled_back"`
}

type followedPhase struct {
	At time.Time `json:"at"`
	// Hook is true once its hook has ended. A hook that the service's end cut off runs again.
	Hook bool `json:"hook"`
}

func (x *followed) of(p proxy.Phase) *followedPhase {
	if p == proxy.Synced {
		return &x.Synced
	}
	return &x.RolledBack
}

// followPhase does what follows on the phases that a volume came to, unless it is done.
func (s *Service) followPhase(f *follower, e *entry) {
	status := e.status()
	for _, x := range []struct {
		phase proxy.Phase
		at    *time.Time
		hook  string
	}{{proxy.Synced, status.SyncedAt, afterSynced}, {proxy.RolledBack, status.RolledBackAt, afterRollback}} {
		if x.at != nil {
			s.followTo(f, e, x.phase, *x.at, x.hook, status.Phase == x.phase)
		}
	}
}

// followTo writes down that the volume came to a phase at that time, and runs the hook, unless
// the volume went on from there before this service was started: then there is nothing
// to follow.
func (s *Service) followTo(f *follower, e *entry, p proxy.Phase, at time.Time, hook string, there bool) {
	f.keeping.Lock()
	defer f.keeping.Unlock()
	x, err := s.followed(e.name)
	if err != nil {
		f.fails(s.log, err)
		return
	}
	known := x.of(p)
	fresh := !known.At.Equal(at)
	if !fresh && known.Hook || s.running.Err() != nil && !fresh {
		return
	}
	e.mu.Lock()
	running := e.following[p]
	e.mu.Unlock()
	if running {
		if fresh {
			f.behind.Store(true) // the hook is that of a migration before
		}
		return
	}
	if fresh {
		*known = followedPhase{At: at, Hook: !there && at.Before(s.since)}
		text, err := json.Marshal(x)
		if err == nil {
			event := state.Event{Volume: e.name, At: at, Who: itself, What: string(p), Result: resultNoted}
			err = s.store.AppendFollowed(context.Background(), e.name, text, event)
		}
		if err == nil {
			s.logReport(e.name)
		}
		if err != nil {
			f.fails(s.log, err)
			return
		}
		if known.Hook || s.running.Err() != nil {
			return
		}
	}
	e.mu.Lock()
	if e.following == nil {
		e.following = map[proxy.Phase]bool{}
	}
	e.following[p] = true
	e.mu.Unlock()
	f.work.Go(func() {
		ran, _ := s.runHook(s.running, e, "", string(p), hook) // it keeps its failure itself
		if ran {
			s.endFollow(f, e, p, at)
		} else {
			f.behind.Store(true)
		}
		e.mu.Lock()
		delete(e.following, p)
		e.mu.Unlock()
	})
}

// endFollow writes down that the hook after a phase has ended.
func (s *Service) endFollow(f *follower, e *entry, p proxy.Phase, at time.Time) {
	f.keeping.Lock()
	defer f.keeping.Unlock()
	x, err := s.followed(e.name)
	if err == nil && x.of(p).At.Equal(at) {
		x.of(p).Hook = true
		var text []byte
		if text, err = json.Marshal(x); err == nil {
			err = s.store.Attach(context.Background(), e.name, state.Followed, text)
		}
	}
	if err != nil {
		s.log.WithError(err).Errorf("volume %s: that the hook after phase %s ran could not be written down: it runs again", e.name, p)
	}
}

func (s *Service) followed(volume string) (x followed, err error) {
	text, err := s.store.Attached(volume, state.Followed)
	if err == nil && text != nil {
		err = json.Unmarshal(text, &x)
	}
	return x, err
}
