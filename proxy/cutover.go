package proxy

import (
	"context"
	"fmt"
	"time"

	"lunshift/lun"
	"lunshift/state"
)

// CutoverOptions say what a cutover does besides.
type CutoverOptions struct {
	// AcceptUnreadable gives up blocks that the source cannot read, where they are all
	// that is left to copy: they read as zeroes on the destination from then on.
	AcceptUnreadable bool `json:"accept_unreadable"`
	// NoVerify leaves out the comparison of a sample.
	NoVerify bool `json:"no_verify"`
	// Force drops sessions that do not log out when they are asked to. Without it the
	// cutover is undone then.
	Force bool `json:"force"`
}

// Cutover ends the migration: synced → cutover. A sample of source and destination is
// compared first. The initiators are asked to log out, and where one does not the step ends
// with a StayedError and nothing has changed. Then commands are held, those in flight
// end, the destination is flushed and the record written. From its return on
// no command passes. Done already, it does nothing.
func (v *Volume) Cutover(ctx context.Context, o CutoverOptions) error {
	return Do(ctx, CutoverStep(o), Together{}, v)
}

// CutoverStep is Cutover as a step of several volumes.
func CutoverStep(o CutoverOptions) Step { return cutover{o} }

type cutover struct{ o CutoverOptions }

func (cutover) Name() string { return "cutover" }

func (s cutover) allowed(v *Volume) (done bool, err error) {
	switch phase := v.Phase(); {
	case phase == Cutover:
		return true, nil
	case v.closed:
		return false, v.errorf("cutover: %w", lun.ErrClosed)
	case phase == Synced, phase == Migrating && s.o.AcceptUnreadable && v.onlyUnreadable():
		return false, nil
	}
	return false, v.notAllowed("cutover", v.untilSynced())
}

// samples tells whether source and destination are compared first.
func (s cutover) samples(v *Volume) bool { return v.set().VerifySample > 0 && !s.o.NoVerify }

// needs the source only to compare it: the old array may be gone by now.
func (s cutover) needs(v *Volume) []need {
	destination := need{v.destination, true}
	if s.samples(v) {
		return []need{{v.source, false}, destination}
	}
	return []need{destination}
}

func (s cutover) look(_ context.Context, v *Volume) error {
	if s.o.NoVerify {
		return nil
	}
	if v.verifying.Load() != nil {
		return fmt.Errorf("a comparison is under way: wait for its end (lunshift status %s), or leave the one before the cutover out (--no-verify)", v.cfg.Name)
	}
	return v.difference()
}

func (cutover) final(v *Volume) bool { return v.Phase() == Migrating }

func (s cutover) prepare(ctx context.Context, v *Volume) (skip bool, err error) {
	if done, err := s.allowed(v); done || err != nil {
		return done, err
	}
	if v.Phase() == Migrating {
		if err := v.becomeSyncedWithout(ctx); err != nil {
			return false, err
		}
	}
	if err := v.stopCopier(ctx); err != nil {
		return false, err
	}
	if s.samples(v) {
		if err := v.verifySample(ctx); err != nil {
			return false, v.errorf("cutover not begun: %w", err)
		}
	}
	if err := v.stopMirror(ctx); err != nil {
		s.undo(v)
		return false, err
	}
	// Most of what the destination has in its cache is flushed before commands are held.
	if err := v.destinationFlush.Flush(ctx); err != nil {
		s.undo(v)
		return false, v.errorf("cutover not begun: %w", err)
	}
	return false, nil
}

// untilSynced says what to do about a volume that is not synced.
func (v *Volume) untilSynced() string {
	switch phase := v.Phase(); {
	case phase == Ready || phase == RolledBack:
		return fmt.Sprintf("start it first (lunshift start %s)", v.cfg.Name)
	case phase == RollingBack:
		return "it goes back to the source"
	case phase == Migrating && v.onlyUnreadable():
		_, size := v.shown(v.unreadable())
		return fmt.Sprintf("the source cannot read the last %d bytes (lunshift status %s shows where): mend it, or give them up with --accept-unreadable; they then read as zeroes", size, v.cfg.Name)
	}
	return fmt.Sprintf("wait for phase %s (lunshift wait %s --for %s)", Synced, v.cfg.Name, Synced)
}

// gather asks the initiators to leave.
func (s cutover) gather(ctx context.Context, volumes []*Volume) (gathering, error) {
	h, err := askToLeave(ctx, volumes, s.o.Force)
	if err != nil {
		return nil, err
	}
	return h, nil
}

func (cutover) undo(v *Volume) {
	if v.mirror.Load() != nil {
		v.workMirror()
	}
}

// settle leaves a mirror as it is where it can: the source then holds what the destination
// does at this instant. It is no reason not to cut over.
func (cutover) settle(ctx context.Context, v *Volume) error {
	return v.destinationFlush.Flush(ctx)
}

func (cutover) after(context.Context, *Volume) {}

func (cutover) change(v *Volume, held time.Duration) change {
	now := time.Now()
	return change{v: v, to: Cutover, edit: func(r *state.Record) { r.CutoverAt, r.Hold = &now, &held }}
}

func (cutover) finish(ctx context.Context, v *Volume) error {
	v.mirror.Store(nil)
	v.showDifference()
	if err := v.stopGuard(ctx); err != nil {
		return v.errorf("cut over, but the fences stay until the service is started again: %w", err)
	}
	released := v.release(ctx)
	defer func() { <-released }() // as far as it can be reached
	v.showAccess()
	if v.cfg.CutOver != nil {
		v.cfg.CutOver()
	}
	ctx, cancel := context.WithTimeout(ctx, logoutLimit)
	defer cancel()
	if err := v.cfg.Target.Retire(ctx, v.cfg.IQN, v.cfg.LUN); err != nil && ctx.Err() == nil {
		return v.errorf("cut over, but the target did not let go: %w", err)
	}
	return nil
}
