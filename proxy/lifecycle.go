package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

// The lifecycle of a volume. All of it is in this file and in together.go; nothing else
// assigns the phase.
//
//	ready ──start──▶ migrating ──all valid──▶ synced ──cutover──▶ cutover
//	  ▲               ▲      │                  │
//	  │               └ pause, resume           │
//	  │                      └────rollback──────┴──▶ rolling-back ──none dirty──▶ rolled-back
//	  └───────────────────────────────start──────────────────────────────────────────┘
//
// ready: the source takes writes and serves reads; the destination is
// untouched. On disk: the record. A crash means nothing.
//
// migrating: the destination takes writes, and with a mirror the source does too; reads
// come from the destination where a block is valid, else from the source. On
// disk: the record, and the flags of every acknowledged write and every committed
// copy. After a crash the copy goes on from the flags. Pause stops the
// copier, never the initiators.
//
// synced: as migrating with every block valid, so the destination serves
// everything. After a crash it still does.
//
// cutover: nobody's I/O passes; the destination stands alone, and initiators meet it
// without lunshift. On disk: the record, until Remove. After a crash the volume is
// not served and its units are not opened.
//
// rolling-back: migrating with the ends exchanged. The source takes writes; reads come from
// the destination where a block is dirty, else from the source. On disk: the record, and the
// flags, which are cleared as blocks come to the source. After a crash the copy goes on.
//
// rolled-back: as ready, but for the record. The destination is of no more use.

// next holds the transitions that are allowed.
var next = map[Phase][]Phase{
	Ready: {Migrating}, Migrating: {Synced, RollingBack}, Synced: {Cutover, RollingBack},
	RollingBack: {RolledBack}, RolledBack: {Ready},
}

// Times that bound the steps.
const (
	// holdLimit is how long initiators' commands may be held at a change of phase; past
	// it the step is undone.
	holdLimit = 10 * time.Second
	// logoutLimit is how long sessions may take to leave after a cutover before they
	// are dropped, where they could not be asked to before it.
	logoutLimit = 10 * time.Second
	// sampleEvery and samplesKept make the window over which the rate is measured.
	sampleEvery = time.Second
	samplesKept = 11
	// progressEvery is how often the progress counters are written down.
	progressEvery = 5 * time.Second
)

// Phase is where the volume stands.
func (v *Volume) Phase() Phase { return v.phase.Load().(Phase) }

// advance takes the volume to the next phase: it writes the record as edit leaves
// it, then takes the phase and wakes those who wait for it.
func (v *Volume) advance(ctx context.Context, to Phase, edit func(*state.Record)) error {
	return advance(ctx, change{v: v, to: to, edit: edit})
}

// resumePhase goes on with what the phase asks for.
func (v *Volume) resumePhase() {
	v.step.Lock()
	defer v.step.Unlock()
	switch v.Phase() {
	case Migrating:
		v.runGuard()
		v.log.Infof("takes up the migration: %d of %d blocks are valid", v.raw().Count(state.Valid), v.info.Blocks)
		v.workMirror()
		if !v.paused() {
			v.runCopier()
		}
	case Synced:
		v.runGuard()
		v.workMirror()
	case RolledBack:
		if v.current().Fenced {
			v.runGuard() // which gives the fences up
		}
	case RollingBack:
		v.runGuard()
		v.log.Infof("takes up the rollback: %d of %d blocks are still on the destination alone", v.raw().Count(state.Dirty), v.info.Blocks)
		if !v.paused() {
			v.runCopier()
		}
	}
}

// StartOptions say what a start puts up with.
type StartOptions struct {
	// IgnoreRegistrations starts although other initiators are registered on the source
	// or the destination: they can go on writing there.
	IgnoreRegistrations bool `json:"ignore_registrations"`
	// Reuse takes a destination that holds data, compares it with the source and writes only
	// what differs, as Settings.Seeded does.
	Reuse bool `json:"reuse"`
}

// Start begins the migration: ready or rolled-back → migrating. Where it is under way it
// does nothing. It fails with a Refusal where Check refuses, and with a FencedError where
// others have reserved a unit or, unless told to ignore them, are registered there.
func (v *Volume) Start(ctx context.Context, o ...StartOptions) error {
	v.step.Lock()
	defer v.step.Unlock()
	s := start{append(o, StartOptions{})[0]}
	if done, err := s.allowed(v); done || err != nil {
		return err
	}
	return v.becomeMigrating(ctx, s)
}

// StartStep is Start, to ask about it.
func StartStep(o StartOptions) Question { return start{o} }

type start struct{ o StartOptions }

func (start) Name() string { return "start" }

func (start) allowed(v *Volume) (done bool, err error) {
	if v.closed {
		return false, v.errorf("start: %w", lun.ErrClosed)
	}
	switch v.Phase() {
	case Migrating, Synced:
		return true, nil
	case RollingBack:
		return false, v.notAllowed("start", fmt.Sprintf("wait until it is rolled back (lunshift wait %s --for %s)", v.cfg.Name, RolledBack))
	case Cutover:
		return false, v.notAllowed("start", "it is done; remove the volume to use its name again")
	}
	return false, nil
}

func (start) needs(v *Volume) []need { return []need{{v.source, true}, {v.destination, true}} }

func (s start) look(ctx context.Context, v *Volume) error {
	refused, err := Check(ctx, v.cfg.Source, v.cfg.Destination, v.set().Overwrite || s.compares(v))
	if err == nil && len(refused) > 0 {
		err = oneLine(refused)
	}
	return err
}

// compares tells whether both sides are compared, and only what differs is written.
func (s start) compares(v *Volume) bool { return s.o.Reuse || v.set().Seeded }

// becomeMigrating changes which side takes writes at an instant at which none is
// under way: a write still on its way to the source would otherwise be missed by the
// copy.
func (v *Volume) becomeMigrating(ctx context.Context, s start) error {
	if err := agree(ctx, s, v); err != nil {
		return err
	}
	compare := s.compares(v)
	accepted, err := v.checkOthers(ctx, s.o.IgnoreRegistrations)
	if err != nil {
		return err
	}
	if v.Phase() == RolledBack {
		if err := v.becomeReady(ctx); err != nil {
			return err
		}
	}
	// Most of what the source has in its cache is flushed before commands are held.
	if err := v.source.Flush(ctx); err != nil {
		return v.errorf("start: %w", err)
	}
	if err := v.fence(ctx); err != nil {
		return v.giveBack(ctx, err)
	}
	_, err = v.held(ctx, func(ctx context.Context) error {
		if err := v.source.Flush(ctx); err != nil {
			return err
		}
		v.fromFlushed.Store(true)
		v.sourceIdle()
		now := time.Now()
		err := v.advance(ctx, Migrating, func(r *state.Record) {
			r.StartedAt, r.Fenced, r.Compare, r.AcceptedKeys = &now, true, compare, accepted
			r.Mirrored = v.wantsMirror(*r)
		})
		if err == nil {
			v.makeMirror()
		}
		return err
	})
	if err != nil {
		// Where it is not known whether the start was recorded, the fences stay until the
		// state tells.
		if !errors.Is(err, state.ErrFailed) {
			err = v.giveBack(ctx, err)
		}
		return v.errorf("start: %w", err)
	}
	v.ways.Load().forward.copier.SetCompare(compare)
	v.runGuard()
	v.workMirror()
	if !v.paused() {
		v.runCopier()
	}
	return nil
}

// becomeReady begins a migration anew that was rolled back: with new flags.
func (v *Volume) becomeReady(ctx context.Context) error {
	if err := errors.Join(v.stopCopier(ctx), v.stopGuard(ctx)); err != nil {
		return err
	}
	v.mu.Lock()
	old := v.record
	v.mu.Unlock()
	r := state.Record{
		Volume: v.cfg.Name, SourceID: old.SourceID, DestinationID: old.DestinationID,
		BlockSize: old.BlockSize, Blocks: old.Blocks, RegionBlocks: max(1, v.cfg.RegionSize/uint64(old.BlockSize)),
		Phase: string(Ready), RateLimit: old.RateLimit, Mirror: old.Mirror, CreatedAt: time.Now(),
		Presented: old.Presented,
	}
	if err := v.store.Renew(v.cfg.Name, r); err != nil {
		return v.errorf("start: renew its state: %w", err)
	}
	flags, err := v.store.Flags(v.cfg.Name, state.Geometry{Blocks: r.Blocks, RegionBlocks: r.RegionBlocks})
	if err != nil {
		return v.errorf("start: %w", err)
	}
	v.mu.Lock()
	v.record = r
	v.mu.Unlock()
	v.cleared.Store(0)
	v.ways.Store(v.newWays(flags, false))
	v.usage.left.Store(nil)
	v.usage.wrote.Store(true)
	v.take(Ready)
	return nil
}

// take makes p the phase, for those as well who wait for it.
func (v *Volume) take(p Phase) {
	v.phase.Store(p)
	if p != Cutover { // then once the fences are released
		v.showAccess()
	}
	v.mu.Lock()
	close(v.changed)
	v.changed = make(chan struct{})
	if v.cfg.Happened != nil {
		v.cfg.Happened(Happening{Volume: v.cfg.Name, At: time.Now(), Phase: p})
	}
	v.mu.Unlock()
	v.log.Infof("phase %s", p)
	failpoint.Here("phase.taken." + string(p))
}

// held is heldAll of one volume.
func (v *Volume) held(ctx context.Context, do func(context.Context) error) (time.Duration, error) {
	return heldAll(ctx, holdLimit, []*Volume{v}, do)
}

// oneLine joins the reasons of a refusal.
func oneLine(refused []error) error {
	texts := make([]string, len(refused))
	for i, r := range refused {
		texts[i] = r.Error()
	}
	return &Refusal{strings.Join(texts, "; ")}
}

// runCopier starts the copier; the caller holds step.
func (v *Volume) runCopier() { v.copying = begin(v.copy) }

// stopCopier ends the copier and waits for it, or returns ctx's error when that ends
// first; the caller holds step.
func (v *Volume) stopCopier(ctx context.Context) error {
	if err := v.copying.end(ctx); err != nil {
		return v.errorf("the copier did not stop: %w", err)
	}
	v.copying = nil
	return nil
}

// copy runs the copier to its end and then makes the volume synced, or rolled back.
func (v *Volume) copy(ctx context.Context) {
	var end func(context.Context) error
	whole := false
	switch v.Phase() {
	case Migrating:
		end = v.becomeSynced
	case RollingBack:
		if end, whole = v.becomeRolledBack, v.whole.Load(); whole {
			end = v.rolledBack
		}
	default:
		return // an earlier one has just come to the end
	}
	var err error
	if w := v.way(); !whole {
		if err = v.flushFrom(ctx, w); err == nil {
			err = v.copyInTurn(ctx, w)
		}
	}
	for err == nil {
		if err = end(ctx); err == nil {
			return
		}
		// The state could not be written; the fault is shown, and all is valid
		// and stays so.
		select {
		case <-ctx.Done():
		case <-time.After(sampleEvery):
			err = nil
		}
	}
}

// flushFrom is pass.flushFrom until it comes to its end, or ctx: what the copier read there and a cache
// lost afterwards must not become the current content.
func (v *Volume) flushFrom(ctx context.Context, w *pass) error {
	for {
		err := w.flushFrom(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		v.fault(w.kind, fmt.Errorf("%s: flush before the copy: %w", w.from.role, err))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(sampleEvery):
		}
	}
}

// copyInTurn runs the copier to its end while it is the volume's turn, and waits while it is
// that of others.
func (v *Volume) copyInTurn(ctx context.Context, w *pass) error {
	seat := v.cfg.Seat
	for {
		turn, err := seat.Take(ctx, v.Phase() == RollingBack)
		if err != nil {
			return err
		}
		watching := make(chan struct{})
		wctx, stop := context.WithCancel(turn)
		go func() {
			defer close(watching)
			v.watch(wctx, w)
		}()
		err = w.copier.Run(turn)
		stop()
		<-watching
		seat.Give()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// becomeSynced follows from every block being valid; nothing changes for
// initiators.
func (v *Volume) becomeSynced(ctx context.Context) error {
	if err := v.complete(ctx, v.way()); err != nil {
		return err
	}
	now := time.Now()
	// Before the phase shows: whatever kept the copy from its end is over.
	v.fault("copy", nil)
	return v.advance(ctx, Synced, func(r *state.Record) { r.SyncedAt, r.Paused = &now, false })
}

// complete fails while to lacks a block, as far as the database has it.
func (v *Volume) complete(ctx context.Context, w *pass) error {
	if err := w.flags.Await(ctx, run(v.info.All())); err != nil {
		return v.stateError(ctx, err)
	}
	if region, missing := w.flags.Missing(state.Valid, 0); missing {
		return v.errorf("blocks of region %d are not on the %s", region, w.to.role)
	}
	return nil
}

// becomeSyncedWithout gives up what the source cannot read, which is all that is left.
func (v *Volume) becomeSyncedWithout(ctx context.Context) error {
	return v.without(ctx, v.becomeSynced)
}

// without gives up what cannot be read, which is all that is left, and goes on to the phase
// that follows.
func (v *Volume) without(ctx context.Context, follow func(context.Context) error) error {
	if err := v.stopCopier(ctx); err != nil {
		return err
	}
	err := v.acceptUnreadable(ctx)
	if err == nil {
		err = follow(ctx)
	}
	if err != nil && !v.paused() {
		v.runCopier()
	}
	return err
}

// watch measures the rate and writes down the progress until ctx ends.
func (v *Volume) watch(ctx context.Context, w *pass) {
	sampling, saving := time.NewTicker(sampleEvery), time.NewTicker(progressEvery)
	defer sampling.Stop()
	defer saving.Stop()
	take := func(now time.Time) {
		v.mu.Lock()
		v.samples = append(v.samples, sample{now, w.copier.Progress().Read})
		if len(v.samples) > samplesKept {
			v.samples = slices.Delete(v.samples, 0, 1)
		}
		v.mu.Unlock()
	}
	take(time.Now())
	for {
		select {
		case <-ctx.Done():
			v.mu.Lock()
			v.samples = nil
			v.mu.Unlock()
			return
		case now := <-sampling.C:
			take(now)
			v.cfg.Seat.Idle(v.stalled())
		case <-saving.C:
			if err := v.save(ctx, func(*state.Record) {}); err != nil {
				continue // shown as a fault, and tried again
			}
		}
	}
}

// Pause stops the copier, never the initiators. It is kept over restarts. In phase
// synced it does nothing.
func (v *Volume) Pause(ctx context.Context) error {
	return v.setPaused(ctx, true)
}

// Resume undoes Pause.
func (v *Volume) Resume(ctx context.Context) error {
	return v.setPaused(ctx, false)
}

func (v *Volume) setPaused(ctx context.Context, paused bool) error {
	v.step.Lock()
	defer v.step.Unlock()
	switch v.Phase() {
	case Ready, Cutover:
		return v.notAllowed(map[bool]string{true: "pause", false: "resume"}[paused], "nothing is being copied")
	case Synced, RolledBack: // done already
		return nil
	}
	if v.closed {
		return v.errorf("%w", lun.ErrClosed)
	}
	if err := v.save(ctx, func(r *state.Record) { r.Paused = paused }); err != nil {
		return err
	}
	if paused {
		err := v.stopCopier(ctx)
		v.fault("copy", nil)
		v.fault(copyBack, nil)
		return err
	}
	if v.copying != nil && v.copying.ending() {
		// A pause before gave up waiting for it.
		if err := v.stopCopier(ctx); err != nil {
			return err
		}
	}
	if v.copying == nil {
		v.runCopier()
	}
	return nil
}

// Throttle limits the copy to rate bytes per second, 0 for no limit. It is kept over
// restarts.
func (v *Volume) Throttle(ctx context.Context, rate uint64) error {
	v.step.Lock()
	defer v.step.Unlock()
	if v.Phase() == Cutover {
		return v.notAllowed("throttle", "nothing is being copied")
	}
	if err := v.save(ctx, func(r *state.Record) { r.RateLimit = &rate }); err != nil {
		return err
	}
	v.throttle.Set(rate)
	return nil
}

// Wait returns when the volume is in phase p or past it. It fails with a PhaseError where it
// cannot come there any more by itself.
func (v *Volume) Wait(ctx context.Context, p Phase) error {
	if !slices.Contains(Phases, p) {
		return v.errorf("there is no phase %q", p)
	}
	for {
		v.mu.Lock()
		changed := v.changed
		v.mu.Unlock()
		reached, possible := Reached(v.Phase(), p)
		if reached {
			return nil
		}
		if !possible {
			return v.notAllowed("to wait for phase "+string(p), "it does not come there any more by itself")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Remove forgets the state of a volume in phase cutover. The volume is of no use
// afterwards. The record instead, if given, takes the place of the volume's in the
// same transaction.
func (v *Volume) Remove(ctx context.Context, instead ...state.Record) error {
	v.step.Lock()
	defer v.step.Unlock()
	if v.Phase() != Cutover {
		return v.notAllowed("remove", "only a volume that is cut over can be forgotten")
	}
	if err := v.stopGuard(ctx); err != nil {
		return err
	}
	if err := v.store.Forget(v.cfg.Name, instead...); err != nil {
		return v.errorf("forget its state: %w", err)
	}
	return nil
}

// Close implements lun.Device: it is Shutdown without a limit of time.
func (v *Volume) Close() error { return v.Shutdown(context.Background()) }

// Shutdown takes the volume off the target, lets commands in flight end, stops the
// copier and writes the progress down. The state stays.
func (v *Volume) Shutdown(ctx context.Context) error {
	v.step.Lock()
	defer v.step.Unlock()
	return v.shutdown(ctx)
}

// Withdraw is Shutdown of a volume that nobody is to serve any more. While data is being
// moved it is refused: initiators would find the source, which is stale.
func (v *Volume) Withdraw(ctx context.Context) error {
	v.step.Lock()
	defer v.step.Unlock()
	if v.Phase().Moving() {
		return v.notAllowed("to drop it", "")
	}
	return v.shutdown(ctx)
}

// shutdown does what Shutdown says; the caller holds step.
func (v *Volume) shutdown(ctx context.Context) error {
	err := v.stopGuard(ctx) // the fences stay
	if v.Phase() == Cutover {
		return err
	}
	if v.closed {
		return nil
	}
	v.closed = true
	err = errors.Join(err, v.cfg.Target.RemoveUnit(v.cfg.IQN, v.cfg.LUN))
	err = errors.Join(err, v.stopCopier(ctx), v.stopMirror(ctx))
	v.gate.close()
	if held := v.gate.hold(ctx); held != nil {
		err = errors.Join(err, v.errorf("commands in flight did not end: %w", held))
	} else {
		v.gate.release()
	}
	err = errors.Join(err, v.destinationFlush.wait(ctx), v.sourceFlush.wait(ctx))
	// Written down even where the commands in flight used up the time.
	return errors.Join(err, v.save(context.WithoutCancel(ctx), func(*state.Record) {}))
}

func (v *Volume) notAllowed(step, hint string) error {
	return &PhaseError{Volume: v.cfg.Name, Step: step, Phase: v.Phase(), Hint: hint}
}
