package control

import (
	"cmp"
	"context"
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
	// refuse, unless nil, says why it is not begun at all.
	refuse func() error
	// do does it. text says more of a step that was done, for the audit trail.
	do func(ctx context.Context) (text string, err error)
}

// change is a step that changes who serves what: it has hooks.
type change struct {
	before, after string // hooks; empty for none
	// from tells whether a volume that is so changes by it, to is where it comes to.
	from func(v proxy.Status, options any) bool
	to   proxy.Phase
}

// changes are those steps by their names. What follows on phases that a volume comes to by itself
// is in follow.go.
var changes = map[string]change{
	"start": {before: beforeStart, to: proxy.Migrating, from: func(v proxy.Status, _ any) bool { return idle(v.Phase) }},
	"cutover": {before: beforeCutover, after: afterCutover, to: proxy.Cutover, from: func(v proxy.Status, options any) bool {
		o, _ := options.(proxy.CutoverOptions)
		lost := o.AcceptUnreadable && v.Phase == proxy.Migrating && v.Unreadable > 0 && v.Remaining == v.Unreadable
		return v.Phase == proxy.Synced || lost
	}},
	"rollback": {before: beforeRollback, to: proxy.RollingBack, from: func(v proxy.Status, _ any) bool {
		return v.Phase == proxy.Migrating || v.Phase == proxy.Synced
	}},
}

// at tells how a volume stands to the change: it would change, or it has done so already.
func (c change) at(v proxy.Status, options any) (changes, done bool) {
	if c.from == nil {
		return false, false
	}
	if changes = c.from(v, options); changes {
		return true, false
	}
	done, _ = proxy.Reached(v.Phase, c.to)
	return false, done
}

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
	if err != nil {
		return err
	}
	text, err := s.take(ctx, st, entries)
	a.ends(text, err)
	if err == nil && st.name == "start" {
		for _, e := range entries {
			e.fail("start", nil)
		}
	}
	return err
}

func (s *Service) take(ctx context.Context, st step, entries []*entry) (text string, err error) {
	if st.refuse != nil {
		if err := st.refuse(); err != nil {
			return "", refusal{err}
		}
	}
	c, hooked := changes[st.name]
	if !hooked {
		return st.do(ctx)
	}
	// One such step at a time, so that what a hook was told holds when the step is taken.
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
	for _, e := range entries {
		e.fail("hook", nil)
	}
	// Where one of them cannot be stepped no hook of any is of use: the step refuses.
	var moving []*entry
	able := true
	for _, e := range entries {
		_, closed := e.open()
		changes, done := c.at(e.status(), st.options)
		able = able && closed == nil && (changes || done)
		if changes {
			moving = append(moving, e)
		}
	}
	if able {
		for _, e := range moving {
			if _, err := s.runHook(ctx, e, st.group, st.name, c.before); err != nil {
				return "", refusal{notBegun(e, st.name, err)}
			}
		}
	}
	if text, err = st.do(ctx); err == nil && len(moving) == 0 && text == "" {
		text = "nothing to do"
	}
	for _, e := range moving {
		if _, done := c.at(e.status(), st.options); done {
			// The step is taken, whatever becomes of the hook, which keeps its failure itself.
			_, _ = s.runHook(ctx, e, st.group, st.name, c.after)
		}
	}
	return text, err
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

// give is for who took it.
func (t *turn) give() { <-t.held }
