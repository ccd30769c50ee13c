package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"

	"lunshift/proxy"
	"lunshift/state"
)

// step is what is done with one volume, or with those of a group at one instant. All steps that
// are asked for pass Service.step: the audit trail and the hooks are there and nowhere else.
type step struct {
	// name is as in the commands; options are what goes into the audit trail, without secrets.
	name    string
	options any
	// group is what the volumes are stepped as; empty for a volume alone.
	group string
	// missing are volumes of the group that the service does not have.
	missing []string
	// refuse, unless nil, says why what all agreed to and would change something is not begun.
	refuse func() error
	// unwritten is set for a step that is taken though it cannot be written down.
	unwritten bool
	// question is set for a step that changes who serves what: everybody is asked first.
	question proxy.Question
	// do does it. text says more of a step that was done, for the audit trail.
	do func(ctx context.Context) (text string, err error)
}

// change is a step that changes who serves what.
type change struct {
	before  string      // the hook before it
	to      proxy.Phase // where it brings the volume
	comes   proxy.Phase // where the volume comes to afterwards, by itself unless that is the same
	follows string      // the hook that follows on comes
}

// changes are those steps that have hooks, by their names. What follows on phases is in follow.go.
var changes = map[string]change{
	"start":    {beforeStart, proxy.Migrating, proxy.Synced, afterSynced},
	"cutover":  {beforeCutover, proxy.Cutover, proxy.Cutover, afterCutover},
	"rollback": {beforeRollback, proxy.RollingBack, proxy.RolledBack, afterRollback},
}

// hooks are those that run because of the step; none of other steps.
func (c change) hooks() []string {
	if c.before == "" {
		return nil
	}
	return []string{c.before, c.follows}
}

// atOnce tells whether the step itself runs the hook that follows, before it is answered.
func (c change) atOnce() bool { return c.comes == c.to }

// ask is step for a request.
func (s *Service) ask(r *http.Request, st step, entries ...*entry) error {
	return s.step(s.running, asker(r), st, entries...)
}

// step takes a step with all of the volumes: it is written down as begun, then come the hooks
// before it, the step, the hooks after it, and how it ended. A hook before it that fails stops
// it; one that fails after it is a fault of its volume. No command of an initiator is held
// while a hook runs.
func (s *Service) step(ctx context.Context, who state.Who, st step, entries ...*entry) error {
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.name
	}
	a, err := s.asks(ctx, who, st.group, st.name, st.options, names...)
	switch {
	case err != nil && st.unwritten:
		s.log.WithError(errors.Unwrap(err)).Errorf("%s is not in the audit trail, and is done all the same", st.name)
		a = &asked{s: s}
	case err != nil:
		return err
	}
	text, err := s.take(ctx, st, entries)
	a.ends(text, err)
	if outcome(err) != resultRefused {
		for _, e := range entries {
			s.logReport(e.name)
		}
	}
	if err == nil && st.name == "start" {
		for _, e := range entries {
			e.fail("start", nil)
		}
	}
	return err
}

func (s *Service) take(ctx context.Context, st step, entries []*entry) (text string, err error) {
	if st.question == nil {
		return st.do(ctx)
	}
	// One such step at a time, so that what was asked and what a hook was told holds when the
	// step is taken.
	ordered := slices.SortedFunc(slices.Values(entries), func(a, b *entry) int { return cmp.Compare(a.name, b.name) })
	for i, e := range ordered {
		if err := e.stepping.take(ctx); err != nil {
			for _, taken := range ordered[:i] {
				taken.stepping.give()
			}
			return "", refusal{err}
		}
	}
	defer func() {
		for _, e := range ordered {
			e.stepping.give()
		}
	}()
	c := changes[st.name]
	answers, moving := s.agreement(ctx, st.question, entries, st.missing...)
	if err := proxy.Disagreement(answers); err != nil {
		if st.group != "" {
			err = groupError(st.group, st.name, "not begun", err)
		}
		return "", refusal{err}
	}
	if st.refuse != nil && len(moving) > 0 {
		if err := st.refuse(); err != nil {
			return "", refusal{err}
		}
	}
	again := false
	for _, e := range entries {
		if !slices.Contains(moving, e) && s.followAgain(e, c, st.group) {
			again = true
		}
	}
	if c.before != "" {
		for _, e := range moving {
			e.mu.Lock()
			e.forgetHooks()
			e.mu.Unlock()
			if _, err := s.runHook(ctx, e, st.group, st.name, c.before); err != nil {
				return "", refusal{notBegun(e, st.name, err)}
			}
		}
	}
	if text, err = st.do(ctx); err == nil && len(moving) == 0 && text == "" {
		if text = "nothing to do"; again {
			text = "nothing to do but the hook that had failed"
		}
	}
	for _, e := range moving {
		// The step is taken, whatever becomes of the hook, which keeps its failure itself.
		if c.atOnce() && e.status().Phase == c.comes {
			s.followNow(e, c, st.group)
		}
	}
	return text, err
}

// agreement asks everybody about a step: the volumes, what they need, and the hooks. Volumes that
// are missing are not ready. moving are the volumes that it would change.
func (s *Service) agreement(ctx context.Context, q proxy.Question, entries []*entry, missing ...string) (answers []proxy.Answer, moving []*entry) {
	said := make([][]proxy.Answer, len(entries))
	moves := make([]bool, len(entries))
	var asking sync.WaitGroup
	for i, e := range entries {
		asking.Go(func() {
			if e.isRemoved() {
				said[i] = []proxy.Answer{notThere(q, e.name)}
				return
			}
			v, err := e.open()
			if err != nil {
				a := proxy.NewAnswer("volume "+e.name, q.Name(), err)
				a.Err = err // it names the volume
				said[i] = []proxy.Answer{a}
				return
			}
			done := false
			if said[i], done = v.Ask(ctx, q); done {
				return
			}
			moves[i] = true
			hooks := e.settings().Hooks
			for _, hook := range changes[q.Name()].hooks() {
				if command := hookOf(hooks, hook); len(command) > 0 {
					party := fmt.Sprintf("volume %s: hook %s %s", e.name, hook, command[0])
					said[i] = append(said[i], proxy.NewAnswer(party, q.Name(), hookFault(command)))
				}
			}
		})
	}
	asking.Wait()
	for _, name := range missing {
		said = append(said, []proxy.Answer{notThere(q, name)})
	}
	for i, e := range entries {
		if moves[i] {
			moving = append(moving, e)
		}
	}
	return slices.Concat(said...), moving
}

// notThere answers for a volume of a group that the service does not have.
func notThere(q proxy.Question, volume string) proxy.Answer {
	return proxy.NewAnswer("volume "+volume, q.Name(), errors.New("the service does not have it"))
}

// turn is a lock that can be waited for as long as a context.
type turn struct {
	once sync.Once
	held chan struct{} // has an element while it is
}

func (t *turn) take(ctx context.Context) error {
	t.once.Do(func() { t.held = make(chan struct{}, 1) })
	select {
	case t.held <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// try takes it where nobody has it.
func (t *turn) try() bool {
	t.once.Do(func() { t.held = make(chan struct{}, 1) })
	select {
	case t.held <- struct{}{}:
		return true
	default:
		return false
	}
}

// give is for who took it.
func (t *turn) give() { <-t.held }
