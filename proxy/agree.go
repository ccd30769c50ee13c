package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"lunshift/lun"
	"lunshift/state"
)

// Before a step that changes who serves what, everybody whom it concerns is asked whether they
// are ready for it: each volume, those of its logical units that the step needs, and the state.
// Asking changes nothing. The step begins where all are ready; else all who are not are named,
// each with the reason.

// askLimit is how long somebody may take to answer; who takes longer is not ready.
const askLimit = 10 * time.Second

// Question is a step that is asked about: StartStep, CutoverStep, RollbackStep or MirrorStep.
type Question interface {
	// Name is that of the command.
	Name() string
	// allowed fails where the volume may not take the step as it is; done tells that there is
	// nothing to do.
	allowed(v *Volume) (done bool, err error)
	// needs are the logical units without which the volume cannot take it.
	needs(v *Volume) []need
	// look fails where something else speaks against it. It is called once those units answered.
	look(ctx context.Context, v *Volume) error
}

// need is a logical unit that a step cannot do without.
type need struct {
	u *unit
	// written: it is to take writes. Of the others it is enough that they can be read.
	written bool
}

// Answer is what somebody said who was asked about a step.
type Answer struct {
	// Party is who was asked, such as "volume db01: source iscsi://10.0.0.5/…".
	Party string `json:"party"`
	Ready bool   `json:"ready"`
	// Reason says in one line why they are not ready.
	Reason string `json:"reason,omitempty"`
	// Err is Reason for who does not see Party; nil where they are ready.
	Err error `json:"-"`
}

// NewAnswer is the answer of a party about the step of that name; err is nil where it is ready.
func NewAnswer(party, step string, err error) Answer {
	a := Answer{Party: party, Ready: err == nil}
	if err != nil {
		a.Reason = inOneLine(err)
		a.Err = fmt.Errorf("%s: not ready for the %s: %w", party, step, err)
	}
	return a
}

// Disagreement fails with all who are not ready, on one line; it is nil where everybody is.
func Disagreement(answers []Answer) error {
	var all disagreement
	for _, a := range answers {
		if !a.Ready {
			all = append(all, a.Err)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all
}

type disagreement []error

func (d disagreement) Error() string {
	texts := make([]string, len(d))
	for i, err := range d {
		texts[i] = inOneLine(err)
	}
	return strings.Join(texts, "; ")
}

func (d disagreement) Unwrap() []error { return d }

func inOneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// Ask asks the volume, its logical units and the state about a step, and waits for one that is
// under way. done is true where there is nothing to do.
func (v *Volume) Ask(ctx context.Context, q Question) (answers []Answer, done bool) {
	v.step.Lock()
	defer v.step.Unlock()
	return v.ask(ctx, q)
}

// agree fails, with all who are not ready, unless everybody is. The caller holds the step of
// each volume.
func agree(ctx context.Context, q Question, volumes ...*Volume) error {
	said := make([][]Answer, len(volumes))
	var asking sync.WaitGroup
	for i, v := range volumes {
		asking.Go(func() { said[i], _ = v.ask(ctx, q) })
	}
	asking.Wait()
	return Disagreement(slices.Concat(said...))
}

// party is somebody beside the volume itself.
type party interface {
	name() string
	// ready says why it is not. It changes nothing.
	ready(ctx context.Context) error
}

// answer is what p says within limit.
func answer(ctx context.Context, q Question, p party, limit time.Duration) Answer {
	within, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := p.ready(within)
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %s", limit)
	}
	return NewAnswer(p.name(), q.Name(), err)
}

// ask gives the answers of the volume and of those it needs. Where it may not take the step, or
// has, nobody else is asked. The caller holds step.
func (v *Volume) ask(ctx context.Context, q Question) (answers []Answer, done bool) {
	own := NewAnswer("volume "+v.cfg.Name, q.Name(), nil)
	refused := func(err error) { // err names the volume and the step
		own.Ready, own.Reason, own.Err = false, inOneLine(err), err
	}
	done, err := q.allowed(v)
	if err != nil {
		refused(err)
	}
	if err != nil || done {
		return []Answer{own}, done
	}
	parties := []party{stateParty{v}}
	for _, n := range q.needs(v) {
		parties = append(parties, side{v, n.u, n.written, q})
	}
	others := make([]Answer, len(parties))
	var each sync.WaitGroup
	for i, p := range parties {
		each.Go(func() { others[i] = answer(ctx, q, p, cmp.Or(v.cfg.askLimit, askLimit)) })
	}
	each.Wait()
	for i, a := range others {
		var fenced *FencedError
		if errors.As(a.Err, &fenced) { // it names the unit
			others[i].Err = v.errorf("%s refused: %w", q.Name(), fenced)
		}
	}
	if Disagreement(others) == nil {
		if err := q.look(ctx, v); err != nil {
			refused(v.errorf("%s refused: %w", q.Name(), err))
		}
	}
	return append([]Answer{own}, others...), false
}

// stateParty is where the step is to be recorded.
type stateParty struct{ v *Volume }

func (p stateParty) name() string { return "volume " + p.v.cfg.Name + ": state" }

// ready implements party: it writes what the state has, once more.
func (p stateParty) ready(ctx context.Context) error {
	return p.v.save(ctx, func(*state.Record) {})
}

// side is a logical unit that the step needs.
type side struct {
	v *Volume
	u *unit
	// written is as in need.
	written bool
	q       Question
}

func (p side) name() string {
	return "volume " + p.v.cfg.Name + ": " + p.u.role + " " + p.u.address
}

// ready implements party: nobody else has reserved what is to be written, and a block can be
// read.
func (p side) ready(ctx context.Context) error {
	if d, ok := p.u.Device.(lun.Reachable); ok {
		if err := d.Unreachable(); err != nil {
			return err // nobody waits for an array that is gone
		}
	}
	if p.written {
		if err := p.fence(ctx); err != nil {
			return err
		}
	}
	err := p.u.ReadAt(ctx, make([]byte, p.v.info.BlockSize), 0)
	var named *unitError
	switch {
	case lun.MediumError(err): // it answers; what it cannot read is another matter
		return nil
	case errors.As(err, &named): // as is the party
		return named.err
	}
	return err
}

// fence fails where somebody else has reserved the unit; before a start also where others may
// write.
func (p side) fence(ctx context.Context) error {
	v, u := p.v, p.u
	s, starts := p.q.(start)
	refused, _, err := CheckFence(ctx, v.cfg.Name, u.role, u.address, u.Device, v.key, starts && !s.o.IgnoreRegistrations)
	switch {
	case errors.Is(err, lun.ErrUnsupported):
		return nil
	case err != nil:
		return fmt.Errorf("ask for reservations: %w", err)
	case len(refused) > 0:
		return &FencedError{oneLine(refused).Error(), lun.ErrConflict}
	}
	return nil
}
