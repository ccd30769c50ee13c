package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"lunshift/failpoint"
	"lunshift/state"
)

// Steps of several volumes at one instant: commands to all of them are held, those in flight
// end, one transaction changes all records, and commands go on. A write that an initiator
// began after another one, to whichever of the volumes, was answered, is so never on the far
// side of the step alone. A step of one volume is the same with one.

// change is what becomes of one volume's record.
type change struct {
	v    *Volume
	to   Phase // empty leaves the phase
	edit func(*state.Record)
	// back exchanges the ends: from then on the source takes the writes.
	back bool
}

// lockSteps takes the step of each volume, so that no two steps wait for each other, and gives
// what releases them.
func lockSteps(volumes []*Volume) (unlock func()) {
	volumes = slices.SortedFunc(slices.Values(volumes), func(a, b *Volume) int { return cmp.Compare(a.cfg.Name, b.cfg.Name) })
	for _, v := range volumes {
		v.step.Lock()
	}
	return func() {
		for _, v := range volumes {
			v.step.Unlock()
		}
	}
}

// each has do run for all volumes at the same time and gives what went wrong with any.
func each(ctx context.Context, volumes []*Volume, do func(context.Context, *Volume) error) error {
	errs := make([]error, len(volumes))
	var all errgroup.Group
	for i, v := range volumes {
		all.Go(func() error {
			errs[i] = do(ctx, v)
			return nil
		})
	}
	_ = all.Wait() // each error is in errs
	return errors.Join(errs...)
}

// heldAll runs do while no command of an initiator to any of the volumes is under way and new
// ones wait, and tells how long they waited. Past limit it is given up. The caller holds the
// step of each.
func heldAll(ctx context.Context, limit time.Duration, volumes []*Volume, do func(context.Context) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	held := make([]bool, len(volumes))
	defer func() {
		for i, v := range volumes {
			if held[i] {
				v.gate.release()
			}
		}
	}()
	var all errgroup.Group
	for i, v := range volumes {
		all.Go(func() error {
			if err := v.gate.hold(ctx); err != nil {
				return v.errorf("commands in flight did not end within %v: %w", limit, err)
			}
			held[i] = true
			return nil
		})
	}
	if err := all.Wait(); err != nil {
		return time.Since(began), err
	}
	err := do(ctx)
	if err != nil && ctx.Err() == context.DeadlineExceeded {
		err = fmt.Errorf("not done within %v: %w", limit, err)
	}
	return time.Since(began), err
}

// save writes the records of all volumes as edit leaves each, in one transaction, and
// keeps them once they are on stable storage.
func save(ctx context.Context, changes ...change) error {
	// One save of a volume at a time, so that the last one on disk is the last one made.
	ordered := slices.SortedFunc(slices.Values(changes), func(a, b change) int { return cmp.Compare(a.v.cfg.Name, b.v.cfg.Name) })
	for i, c := range ordered {
		if err := c.v.commits.take(ctx); err != nil {
			for _, taken := range ordered[:i] {
				taken.v.commits.give()
			}
			return err
		}
	}
	defer func() {
		for _, c := range ordered {
			c.v.commits.give()
		}
	}()
	var turns []turning
	records := make([]state.Record, len(changes))
	for i, c := range changes {
		records[i] = c.v.tally()
		if c.to != "" {
			records[i].Phase = string(c.to)
		}
		c.edit(&records[i])
		if c.back {
			turns = append(turns, turning{c.v.raw(), true})
		}
	}
	store := changes[0].v.store
	var err error
	if len(turns) > 0 {
		err = store.Turn(ctx, turns, records...)
	} else {
		err = store.PutRecords(ctx, records...)
	}
	for i, c := range changes {
		switch {
		case err == nil:
			c.v.fault("state", nil)
			c.v.mu.Lock()
			c.v.record = records[i]
			c.v.mu.Unlock()
		case ctx.Err() == nil:
			c.v.fault("state", err)
		}
	}
	if err != nil && len(changes) == 1 {
		return changes[0].v.errorf("write its state: %w", err)
	}
	return err
}

// advance takes volumes to their next phases at once: it writes the records, then takes the
// phases.
func advance(ctx context.Context, changes ...change) error {
	for _, c := range changes {
		if !slices.Contains(next[c.v.Phase()], c.to) {
			return c.v.notAllowed("the step to "+string(c.to), "")
		}
		failpoint.Here("phase.leaving." + string(c.v.Phase()))
	}
	if err := save(ctx, changes...); err != nil {
		return err
	}
	for _, c := range changes {
		failpoint.Here("phase.saved." + string(c.to))
		if c.back {
			c.v.left = c.v.mirror.Swap(nil)
			c.v.ways.Load().backward.Store(true)
		}
		c.v.take(c.to)
	}
	return nil
}

// Together are options of a step of several volumes.
type Together struct {
	// HoldLimit bounds how long commands are held; past it the step is undone. 0 is 10 s.
	HoldLimit time.Duration
}

func (t Together) limit() time.Duration { return cmp.Or(t.HoldLimit, holdLimit) }

// Step is what is done together.
type Step interface {
	Question
	// final tells whether prepare does something that undo does not take back: blocks are given
	// up. Such volumes come last, once all others are prepared.
	final(v *Volume) bool
	// prepare brings the volume as far as it comes without holding commands, and fails
	// where the step is not to be done. skip says that there is nothing to do. undo takes
	// back what it did.
	prepare(ctx context.Context, v *Volume) (skip bool, err error)
	undo(v *Volume)
	// gather is for what concerns all of the volumes, before commands are held.
	gather(ctx context.Context, volumes []*Volume) (gathering, error)
	// settle does what is needed while commands are held, and after what is to be done before
	// they go on, once the step is taken.
	settle(ctx context.Context, v *Volume) error
	after(ctx context.Context, v *Volume)
	change(v *Volume, held time.Duration) change
	// finish does what follows on the step.
	finish(ctx context.Context, v *Volume) error
}

// gathering is what a step holds on to: drop is called once it is taken, end at the end,
// whatever came of it.
type gathering interface {
	drop()
	end()
}

// Do takes a step with all of the volumes, or with none: where somebody is not ready for it, the
// error says so of each who is not, and nothing changes.
func Do(ctx context.Context, s Step, t Together, volumes ...*Volume) error {
	defer lockSteps(volumes)()
	if err := agree(ctx, s, volumes...); err != nil {
		return err
	}
	do := make([]*Volume, 0, len(volumes))
	var errs []error
	for _, final := range []bool{false, true} {
		for _, v := range volumes {
			if s.final(v) != final || final && len(errs) > 0 {
				continue
			}
			skip, err := s.prepare(ctx, v)
			switch {
			case err != nil:
				errs = append(errs, err)
			case !skip:
				do = append(do, v)
			}
		}
	}
	undo := func() {
		for _, v := range do {
			s.undo(v)
		}
	}
	if len(errs) > 0 || len(do) == 0 {
		undo()
		return errors.Join(errs...)
	}
	gathered, err := s.gather(ctx, do)
	if err != nil {
		undo()
		return err
	}
	defer gathered.end()
	failpoint.Here("step.ready")
	began := time.Now()
	held, err := heldAll(ctx, t.limit(), do, func(ctx context.Context) error {
		failpoint.Here("step.held")
		if err := each(ctx, do, s.settle); err != nil {
			return err
		}
		failpoint.Here("step.settled")
		changes := make([]change, len(do))
		for i, v := range do {
			changes[i] = s.change(v, time.Since(began)) // but for the writing of the records
		}
		if err := advance(ctx, changes...); err != nil {
			return err
		}
		return each(ctx, do, func(ctx context.Context, v *Volume) error {
			s.after(ctx, v)
			return nil
		})
	})
	if err != nil {
		undo()
		switch phase := do[0].Phase(); {
		case errors.Is(err, state.ErrFailed):
			err = fmt.Errorf("%s: whether it was recorded is not known; what serves goes on serving: restart the service, and look at the phase then: %w", s.Name(), err)
		case len(do) > 1: // which need not be in the same phase
			err = fmt.Errorf("%s undone: %w", s.Name(), err)
		default:
			err = fmt.Errorf("%s undone, still %s: %w", s.Name(), phase, err)
		}
		if len(do) > 1 {
			return err
		}
		return do[0].errorf("%w", err)
	}
	failpoint.Here("step.released")
	// All of it, with the writing of the record. A failure is shown by the volume.
	_ = each(ctx, do, func(ctx context.Context, v *Volume) error {
		return v.save(ctx, func(r *state.Record) { r.Hold = &held })
	})
	gathered.drop()
	return each(ctx, do, s.finish)
}

// nobody is gathered.
type nobody struct{}

func (nobody) drop() {}
func (nobody) end()  {}
