package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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

// follower takes what volumes come to, for the audit trail and for the hooks that follow on it.
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
			s.followPhases(f, e)
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
			s.followPhases(f, e)
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

// followed is what was done about the phases that a hook follows on; At names the time the
// volume came there. Kept with the volume, so that it is done once, over restarts too.
type followed struct {
	Synced     followedPhase `json:"synced"`
	RolledBack followedPhase `json:"rolled_back"`
	Cutover    followedPhase `json:"cutover"`
}

type followedPhase struct {
	At time.Time `json:"at"`
	// Hook is true once its hook has ended. A hook that the service's end cut off runs again.
	Hook bool `json:"hook"`
	// Failure is why the hook ended badly, empty where it did not.
	Failure string `json:"failure,omitempty"`
}

// of is nil for phases that no hook follows on.
func (x *followed) of(p proxy.Phase) *followedPhase {
	switch p {
	case proxy.Synced:
		return &x.Synced
	case proxy.RolledBack:
		return &x.RolledBack
	case proxy.Cutover:
		return &x.Cutover
	}
	return nil
}

// cameTo is when the volume came to a phase that a hook follows on; nil where it did not.
func cameTo(status proxy.Status, p proxy.Phase) *time.Time {
	switch p {
	case proxy.Synced:
		return status.SyncedAt
	case proxy.RolledBack:
		return status.RolledBackAt
	case proxy.Cutover:
		return status.CutoverAt
	}
	return nil
}

// followPhases does what follows on the phases that a volume came to, unless it is done.
func (s *Service) followPhases(f *follower, e *entry) {
	for _, step := range []string{"start", "rollback", "cutover"} {
		c := changes[step]
		if c.atOnce() && !e.stepping.try() {
			f.behind.Store(true) // the step does it itself, unless something keeps it from that
			continue
		}
		at, due := s.due(f, e, c.comes)
		if c.atOnce() {
			e.stepping.give()
		}
		if due {
			f.work.Go(func() { s.followTo(f, e, c, at, s.groupOf(e.name, step)) })
		}
	}
}

// followNow is what a step does about the phase that it brought a volume to. The caller has
// e.stepping.
func (s *Service) followNow(e *entry, c change, group string) {
	if at, due := s.due(s.follower, e, c.comes); due {
		s.followTo(s.follower, e, c, at, group)
	}
}

// groupOf is the group that a volume was last stepped with; empty where it was alone.
func (s *Service) groupOf(volume, step string) string {
	events, err := s.store.History(volume)
	if err != nil {
		s.log.WithError(err).Errorf("volume %s: it is not known with which group it was stepped", volume)
	}
	for _, e := range slices.Backward(events) {
		if e.What == step && e.Result != resultRefused {
			return e.Group
		}
	}
	return ""
}

// due writes down that the volume came to a phase, and tells whether its hook is to be run now,
// which followTo ends. It is not where the volume went on from there before this service was
// started: then there is nothing to follow.
func (s *Service) due(f *follower, e *entry, p proxy.Phase) (at time.Time, is bool) {
	f.keeping.Lock()
	defer f.keeping.Unlock()
	status := e.status()
	came := cameTo(status, p)
	if came == nil {
		return at, false
	}
	at = *came
	x, err := s.followed(e.name)
	if err != nil {
		f.fails(s.log, err)
		return at, false
	}
	known := x.of(p)
	fresh := !known.At.Equal(at)
	if !fresh && (known.Hook || s.running.Err() != nil) {
		return at, false
	}
	e.mu.Lock()
	running := e.following[p]
	e.mu.Unlock()
	if running {
		if fresh {
			f.behind.Store(true) // the hook is that of a migration before
		}
		return at, false
	}
	if fresh {
		*known = followedPhase{At: at, Hook: status.Phase != p && at.Before(s.since)}
		var events []state.Event
		if p != proxy.Cutover { // that one is in the trail as a step
			events = append(events, state.Event{Volume: e.name, At: at, Who: itself, What: string(p), Result: resultNoted})
		}
		if err := s.putFollowed(e.name, x, events...); err != nil {
			f.fails(s.log, err)
			return at, false
		}
		s.logReport(e.name)
		if known.Hook || s.running.Err() != nil {
			return at, false
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.following == nil {
		e.following = map[proxy.Phase]bool{}
	}
	e.following[p] = true
	return at, true
}

// followTo runs the hook that is due.
func (s *Service) followTo(f *follower, e *entry, c change, at time.Time, group string) {
	ran, err := s.runHook(s.running, e, group, string(c.comes), c.follows)
	if ran {
		s.keep(f, e, c.comes, at, followedPhase{At: at, Hook: true, Failure: failureText(err)})
	} else {
		f.behind.Store(true)
	}
	e.mu.Lock()
	delete(e.following, c.comes)
	e.mu.Unlock()
}

func failureText(err error) string {
	if err == nil {
		return ""
	}
	return clean(oneLine(err), mostText)
}

// keep writes down what became of the hook after a phase.
func (s *Service) keep(f *follower, e *entry, p proxy.Phase, at time.Time, became followedPhase) {
	f.keeping.Lock()
	defer f.keeping.Unlock()
	s.keepHeld(e, p, func(known *followedPhase) bool {
		same := known.At.Equal(at)
		if same {
			*known = became
		}
		return same
	})
}

// keepHeld changes what is known of the hook after a phase, where change says so; keeping is held.
func (s *Service) keepHeld(e *entry, p proxy.Phase, change func(*followedPhase) bool) (changed bool) {
	x, err := s.followed(e.name)
	if err == nil && change(x.of(p)) {
		err = s.putFollowed(e.name, x)
		changed = err == nil
	}
	if err != nil {
		s.log.WithError(err).Errorf("volume %s: what became of the hook after phase %s could not be written down: it may run again", e.name, p)
	}
	return changed
}

// recall shows a failure of a hook again that was shown before a restart.
func (s *Service) recall(e *entry) {
	status := e.status()
	came := cameTo(status, status.Phase)
	if came == nil {
		return
	}
	x, err := s.followed(e.name)
	if err != nil {
		s.log.WithError(err).Errorf("volume %s: it is not known how the hook after phase %s ended", e.name, status.Phase)
		return
	}
	for _, c := range changes {
		if c.comes != status.Phase || len(hookOf(e.settings().Hooks, c.follows)) == 0 {
			continue
		}
		if known := x.of(c.comes); known.At.Equal(*came) && known.Failure != "" {
			e.fail(c.follows, errors.New(known.Failure))
		}
	}
}

// followAgain has a hook that failed run again, as its step is asked for again. It tells whether
// there was one.
func (s *Service) followAgain(e *entry, c change, group string) bool {
	status := e.status()
	came := cameTo(status, c.comes)
	if status.Phase != c.comes || came == nil || !s.failedBefore(e, c.comes, *came) {
		return false
	}
	if c.atOnce() {
		s.followNow(e, c, group)
	} else {
		s.follower.happened(proxy.Happening{Volume: e.name, Phase: c.comes})
	}
	return true
}

// failedBefore has the hook after a phase count as one that has not run, where it failed.
func (s *Service) failedBefore(e *entry, p proxy.Phase, at time.Time) bool {
	s.follower.keeping.Lock()
	defer s.follower.keeping.Unlock()
	e.mu.Lock()
	running := e.following[p]
	e.mu.Unlock()
	return !running && s.keepHeld(e, p, func(known *followedPhase) bool {
		failed := known.At.Equal(at) && known.Failure != ""
		if failed {
			known.Hook = false
		}
		return failed
	})
}

func (s *Service) putFollowed(volume string, x followed, events ...state.Event) error {
	text, err := json.Marshal(x)
	if err != nil {
		return err
	}
	return s.store.AppendFollowed(context.Background(), volume, text, events...)
}

func (s *Service) followed(volume string) (x followed, err error) {
	text, err := s.store.Attached(volume, state.Followed)
	if err == nil && text != nil {
		err = json.Unmarshal(text, &x)
	}
	return x, err
}
