package proxy

import (
	"context"
	"fmt"
	"time"

	"lunshift/lun"
	"lunshift/state"
)

// RollbackOptions say what a rollback does besides.
type RollbackOptions struct {
	// AcceptUnreadable gives up blocks that the destination cannot read, where they are all
	// that is left to copy back: they read as zeroes on the source from then on.
	AcceptUnreadable bool `json:"accept_unreadable"`
}

// Rollback goes back to the source: migrating or synced → rolling-back → rolled-back. From
// its return on the source takes all writes; what initiators wrote since the start is
// copied back in the background, and is served meanwhile. Initiators stay. Under way or done
// already, it does nothing.
func (v *Volume) Rollback(ctx context.Context, o RollbackOptions) error {
	return Do(ctx, RollbackStep(o), Together{}, v)
}

// RollbackStep is Rollback as a step of several volumes.
func RollbackStep(o RollbackOptions) Step { return rollback{o} }

type rollback struct{ o RollbackOptions }

func (rollback) Name() string { return "rollback" }

func (s rollback) allowed(v *Volume) (done bool, err error) {
	switch v.Phase() {
	case RolledBack, RollingBack:
		return true, nil
	case Ready:
		return false, v.notAllowed("rollback", "nothing was moved")
	case Cutover:
		return false, v.notAllowed("rollback", "initiators use the destination without lunshift; move it back as a new volume with source and destination exchanged (lunshift start --reuse copies only what differs)")
	}
	if v.closed {
		return false, v.errorf("rollback: %w", lun.ErrClosed)
	}
	return false, nil
}

// needs the destination only where it alone has blocks: of a mirror it may be gone.
func (rollback) needs(v *Volume) []need {
	source, destination := need{v.source, true}, need{v.destination, false}
	// What is written just now counts once it is settled, which takes milliseconds or fails.
	if err := v.raw().Await(context.Background(), run(v.info.All())); err != nil {
		return []need{source, destination}
	}
	if v.needsDestination() {
		return []need{source, destination}
	}
	return []need{source}
}

// needsDestination tells whether the destination may have blocks that the source has not: what a
// mirror took to be on both is not, where one of them lost its cache.
func (v *Volume) needsDestination() bool {
	_, missing := v.ways.Load().back.NextMissing(0)
	m := v.mirror.Load()
	return missing || m != nil && m.lost()
}

func (rollback) look(context.Context, *Volume) error { return nil }

func (s rollback) final(v *Volume) bool { return v.Phase() == RollingBack && s.o.AcceptUnreadable }

func (s rollback) prepare(ctx context.Context, v *Volume) (skip bool, err error) {
	done, err := s.allowed(v)
	switch {
	case err != nil:
		return false, err
	case done && v.Phase() == RollingBack && s.o.AcceptUnreadable && !v.closed && v.onlyUnreadable():
		return true, v.becomeRolledBackWithout(ctx)
	case done:
		return true, nil
	}
	if err := v.stopCopier(ctx); err != nil {
		return false, err
	}
	if err := v.stopMirror(ctx); err != nil {
		s.undo(v)
		return false, err
	}
	if err := s.ready(ctx, v); err != nil {
		s.undo(v)
		return false, v.errorf("rollback not begun: %w", err)
	}
	return false, nil
}

// ready does before commands are held what would take long while they are.
func (s rollback) ready(ctx context.Context, v *Volume) error {
	if m := v.mirror.Load(); m != nil {
		_ = m.settle(ctx, time.Now(), false) // what is left is dealt with in after
	}
	return s.settle(ctx, v)
}

// settle makes durable what the source has, and what the destination alone has.
func (rollback) settle(ctx context.Context, v *Volume) error {
	if err := v.sourceFlush.Flush(ctx); err != nil {
		return err
	}
	if err := v.raw().Await(ctx, run(v.info.All())); err != nil {
		return v.stateError(ctx, err)
	}
	// Where it has nothing alone, as nobody wrote or a mirror is whole, the destination may be gone.
	v.whole.Store(!v.needsDestination())
	if err := v.destinationFlush.Flush(ctx); err != nil && !v.whole.Load() {
		return fmt.Errorf("blocks are on the destination alone: %w", err)
	}
	return nil
}

// after ends a rollback that needs no destination: nothing is to be copied back, whatever is dirty, and
// nothing may be, as a mirror's destination may have lost it with its cache. That is recorded only now: had the
// turn failed in a way that leaves open whether it was recorded, the destination would have gone on serving. Of
// a mirror that is behind it clears what both sides had alike. If a crash comes first, the destination has it as well.
func (rollback) after(ctx context.Context, v *Volume) {
	m := v.left
	v.left = nil
	switch {
	case v.whole.Load():
		if err := v.rolledBack(ctx); err != nil {
			v.fault(copyBack, err) // the copier tries again
		}
	case m != nil:
		_ = m.settle(ctx, time.Now(), true) // what stays dirty is copied back
	}
}

func (rollback) gather(context.Context, []*Volume) (gathering, error) { return nobody{}, nil }

func (rollback) undo(v *Volume) {
	if v.mirror.Load() != nil {
		v.workMirror()
	}
	if v.Phase() == Migrating && !v.paused() {
		v.runCopier()
	}
}

func (rollback) change(v *Volume, held time.Duration) change {
	now := time.Now()
	return change{v: v, to: RollingBack, back: true, edit: func(r *state.Record) {
		r.RollbackAt, r.Hold, r.Paused, r.Unreadable = &now, &held, false, nil
	}}
}

func (rollback) finish(_ context.Context, v *Volume) error {
	v.fromFlushed.Store(true)
	v.fault("mirror", nil)
	v.showDifference()
	if v.Phase() == RollingBack {
		v.runCopier()
	}
	return nil
}

// becomeRolledBack follows from the source having every block; nothing changes for
// initiators.
func (v *Volume) becomeRolledBack(ctx context.Context) error {
	if err := v.complete(ctx, v.way()); err != nil {
		return err
	}
	return v.rolledBack(ctx)
}

// rolledBack is becomeRolledBack where that is known.
func (v *Volume) rolledBack(ctx context.Context) error {
	now := time.Now()
	v.fault(copyBack, nil)
	return v.advance(ctx, RolledBack, func(r *state.Record) { r.RolledBackAt, r.Paused = &now, false })
}

// becomeRolledBackWithout gives up what the destination cannot read, which is all that is
// left. The caller holds step.
func (v *Volume) becomeRolledBackWithout(ctx context.Context) error {
	return v.without(ctx, v.becomeRolledBack)
}
