package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"time"

	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

const (
	// mirrorRound is the time between looks at what both sides hold alike, and at a source
	// that is gone.
	mirrorRound = time.Second
	// mirrorCalm is how long a mirror that was mended must not break for it to be tried again at
	// once then; else it rests twice as long as the time before, up to mostRest.
	mirrorCalm = time.Minute
	mostRest   = 30 * time.Second
	// goneLimit is how long a write waits for a source that is gone, and goneEvery how often
	// one that takes longer asks whether it is.
	goneLimit = 2 * time.Second
	goneEvery = 100 * time.Millisecond
)

// mirror has every write go to the source as well, in phases migrating and synced, so that
// to go back costs nothing.
//
// Its intent log are the dirty flags: a block is dirty, durably, before it is written on
// either side (the write rule), and is cleared of that some time after both have it and
// were flushed. So after a crash what was in flight is dirty, the destination counts, and the
// source gets a copy of it: pass back works on what is dirty and not known to be equal.
// Both writes are made under one lock of their range, so that they come in one order.
//
// Where the source fails the mirror is broken: writes go on, on the destination alone, and
// stay dirty. Once the source answers again it is caught up, while new writes go to both.
type mirror struct {
	v    *Volume
	back *pass

	copying, clearing *activity // guarded by v.step
	wake              chan struct{}
	most              int // of equal

	mu     sync.Mutex // guards what follows; before v.mu
	broken error      // why nothing is written to the source
	breaks chan struct{}
	equal  map[uint64][]*equal // by region
	count  int
}

// wantsMirror tells whether writes are to go to both sides.
func (v *Volume) wantsMirror(r state.Record) bool {
	if r.Mirror != nil {
		return *r.Mirror
	}
	return v.set().Mirror
}

// makeMirror has writes go to both sides where that is wanted. No command is under way or could
// be.
func (v *Volume) makeMirror() {
	if !v.wantsMirror(v.current()) || v.mirror.Load() != nil {
		return
	}
	v.mirror.Store(&mirror{
		v: v, back: v.ways.Load().back, wake: make(chan struct{}, 1), most: cmp.Or(v.cfg.mostEqual, mostEqual),
		breaks: make(chan struct{}), equal: make(map[uint64][]*equal),
	})
}

// workMirror begins what a mirror does in the background, where there is one; the caller holds
// step.
func (v *Volume) workMirror() {
	m := v.mirror.Load()
	if m == nil {
		return
	}
	m.copying, m.clearing = begin(m.catchUp), begin(m.clear)
}

// stopMirror ends that; writes go to both sides still. The caller holds step.
func (v *Volume) stopMirror(ctx context.Context) error {
	m := v.mirror.Load()
	if m == nil {
		return nil
	}
	if err := errors.Join(m.copying.end(ctx), m.clearing.end(ctx)); err != nil {
		return v.errorf("the mirror did not stop: %w", err)
	}
	m.copying, m.clearing = nil, nil
	return nil
}

// write has do change e on both sides, on the destination by the write rule.
func (m *mirror) write(ctx context.Context, e lun.Extent, content []byte, do doer) error {
	if err := m.back.mark(ctx, e); err != nil {
		return err
	}
	defer m.back.unmark(e)
	m.forget(e)
	v := m.v
	w := v.way()
	as := equal{source: v.source.Resets(), destination: v.destination.Resets()}
	var mirrored error
	var err error
	if _, broken := m.state(); broken != nil {
		mirrored = broken
		err = w.write(ctx, e, content, do)
	} else if w.flags.All(state.Valid, run(e)) {
		// By the time it is called the blocks are dirty.
		err = w.write(ctx, e, content, func(ctx context.Context, u *unit) error {
			wrote := make(chan error, 1)
			go func() {
				err := m.writeSource(ctx, do)
				failpoint.Here("mirror.source")
				wrote <- err
			}()
			err := do(ctx, u)
			failpoint.Here("mirror.destination")
			mirrored = <-wrote
			return err
		})
	} else if err = w.write(ctx, e, content, do); err == nil {
		// While a block is not valid the source alone has it: it must not get what the
		// destination failed to take.
		mirrored = m.writeSource(ctx, do)
	}
	if err == nil && mirrored == nil {
		as.at = time.Now()
		m.note(e, as)
	} else {
		m.back.suspect(e) // before it is unmarked
	}
	return err
}

// writeSource has do change the source. It ends when the source has been gone for
// goneLimit, and breaks the mirror where that or anything else fails.
func (m *mirror) writeSource(ctx context.Context, do doer) error {
	source := m.v.source
	sctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if d, remote := source.Device.(lun.Reachable); remote {
		watch := time.AfterFunc(goneLimit, func() { m.watch(sctx, d, cancel) })
		defer watch.Stop()
	}
	err := do(sctx, source)
	if err != nil && ctx.Err() == nil {
		if cause := context.Cause(sctx); cause != nil {
			err = cause
		}
		m.fail(err)
	}
	return err
}

// watch cancels a write to a source that cannot be reached.
func (m *mirror) watch(ctx context.Context, d lun.Reachable, cancel context.CancelCauseFunc) {
	look := time.NewTicker(goneEvery)
	defer look.Stop()
	for {
		if err := d.Unreachable(); err != nil {
			cancel(fmt.Errorf("source: %w", err))
			return
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
}

// state gives a channel that is closed when the mirror breaks, and why it is broken.
func (m *mirror) state() (<-chan struct{}, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.breaks, m.broken
}

// fail breaks the mirror.
func (m *mirror) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return
	}
	m.broken = err
	close(m.breaks)
	m.v.fault("mirror", fmt.Errorf("broken, writes go to the destination alone: %w", err))
}

// mend has writes go to the source again.
func (m *mirror) mend() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.broken, m.breaks = nil, make(chan struct{})
	m.v.fault("mirror", nil)
}

// flush is that of an initiator, of the source as well while it takes writes.
func (m *mirror) flush(ctx context.Context) error {
	flushed := make(chan error, 1)
	_, broken := m.state()
	if broken == nil {
		go func() {
			flushed <- m.writeSource(ctx, func(ctx context.Context, _ *unit) error { return m.v.sourceFlush.Flush(ctx) })
		}()
	}
	err := m.v.destinationFlush.Flush(ctx)
	if broken == nil {
		<-flushed // a failure broke the mirror
	}
	return err
}

func (m *mirror) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// clear clears flags by and by. What was written again meanwhile stays dirty, so that it costs
// no commit to write it again.
func (m *mirror) clear(ctx context.Context) {
	round := time.NewTicker(mirrorRound)
	defer round.Stop()
	for {
		then := time.Now()
		select {
		case <-ctx.Done():
			return
		case <-round.C:
			then = then.Add(-mirrorRound)
		case <-m.wake:
			then = time.Now()
		}
		if _, broken := m.state(); broken == nil {
			_ = m.settle(ctx, then, false) // shown as a fault, and tried again
		}
	}
}

// catchUp brings the source what is dirty and not equal, and mends the mirror: one that breaks
// again soon after rests longer each time.
func (m *mirror) catchUp(ctx context.Context) {
	round := time.NewTicker(mirrorRound)
	defer round.Stop()
	rest := mirrorRound
	var mended, until time.Time // until is zero while the mirror is not known to be broken
	for ctx.Err() == nil {
		gone, broken := m.state()
		if broken != nil {
			switch now := time.Now(); {
			case !until.IsZero():
			case now.Sub(mended) < mirrorCalm:
				rest = min(2*rest, mostRest)
				until = now.Add(rest)
			default:
				rest, until = mirrorRound, now
			}
			if !time.Now().Before(until) && m.sourceIsBack(ctx) {
				m.mend()
				mended, until = time.Now(), time.Time{}
				continue
			}
		} else if _, missing := m.back.NextMissing(0); missing {
			run, stop := context.WithCancel(ctx)
			go func() {
				select {
				case <-gone:
					stop()
				case <-run.Done():
				}
			}()
			_ = m.back.copier.Run(run) // it ends with ctx, the mirror, or the last block
			stop()
		}
		select {
		case <-round.C:
		case <-ctx.Done():
		}
	}
}

// sourceIsBack tells whether the source takes commands.
func (m *mirror) sourceIsBack(ctx context.Context) bool {
	if d, ok := m.v.source.Device.(lun.Reachable); ok && d.Unreachable() != nil {
		return false
	}
	return m.sourceWrites(ctx) == nil && m.v.sourceFlush.Flush(ctx) == nil
}

// sourceWrites fails where the source does not take a block that it is behind with: one that fails
// writes alone would break the mirror again at once.
func (m *mirror) sourceWrites(ctx context.Context) error {
	region, missing := m.back.NextMissing(0)
	if !missing {
		return nil
	}
	release, err := m.back.Exclude(ctx, m.v.region(region))
	if err != nil {
		return err
	}
	defer release()
	left, err := m.back.Invalid(m.v.region(region))
	if err != nil || len(left) == 0 {
		return err
	}
	// It stays dirty, and comes again with the others.
	p := make([]byte, m.v.info.BlockSize)
	if err := m.v.destination.ReadAt(ctx, p, left[0].Start); err != nil {
		return nil // that is another matter
	}
	return m.v.source.WriteAt(ctx, p, left[0].Start)
}

// MirrorStep is SetMirror, to ask about it.
func MirrorStep(on bool) Question { return mirroring{on} }

type mirroring struct{ on bool }

func (mirroring) Name() string { return "mirror" }

func (mirroring) allowed(v *Volume) (done bool, err error) {
	switch v.Phase() {
	case Ready, Migrating, Synced:
	default:
		return false, v.notAllowed("mirror", "it is switched in phase ready, migrating or synced")
	}
	if v.closed {
		return false, v.errorf("mirror: %w", lun.ErrClosed)
	}
	return false, nil
}

// needs the source where it is to take writes from now on; a mirror that is broken may be
// switched off.
func (m mirroring) needs(v *Volume) []need {
	if m.on && v.Phase().Moving() && v.mirror.Load() == nil {
		return []need{{v.source, true}}
	}
	return nil
}

func (mirroring) look(context.Context, *Volume) error { return nil }

// SetMirror switches the mirror on or off. It is kept over restarts, and wins over the
// configuration.
func (v *Volume) SetMirror(ctx context.Context, on bool) error {
	v.step.Lock()
	defer v.step.Unlock()
	if err := agree(ctx, MirrorStep(on), v); err != nil {
		return err
	}
	remember := func(r *state.Record) {
		r.Mirror = &on
		r.Mirrored = r.Mirrored || on && Phase(r.Phase) != Ready
	}
	if v.Phase() == Ready {
		return v.save(ctx, remember)
	}
	if err := v.stopMirror(ctx); err != nil {
		return err
	}
	_, err := v.held(ctx, func(ctx context.Context) error {
		if err := v.save(ctx, remember); err != nil {
			return err
		}
		if on {
			v.makeMirror()
		} else if m := v.mirror.Swap(nil); m != nil {
			v.fromFlushed.Store(false)
			v.fault("mirror", nil)
			v.fault(copyBack, nil)
		}
		return nil
	})
	if m := v.mirror.Load(); m != nil && m.copying == nil {
		v.workMirror()
	}
	if err != nil {
		return v.errorf("mirror: %w", err)
	}
	return nil
}

// MirrorStatus is how far the source follows.
type MirrorStatus struct {
	// State is "whole": both sides are the same but for writes in flight; "behind": the
	// source is being caught up; or "broken": it fails, and writes go to the destination
	// alone, because of Reason.
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
	// Behind is what the source is still to get, in bytes.
	Behind uint64 `json:"behind_bytes"`
	// Marked is what a crash would have brought over once more, in bytes: what is behind, in
	// flight, or was written in the last seconds.
	Marked uint64 `json:"marked_bytes"`
}

// mirrorStatus is nil where there is no mirror.
func (v *Volume) mirrorStatus() *MirrorStatus {
	m := v.mirror.Load()
	if m == nil {
		return nil
	}
	bs := uint64(v.info.BlockSize)
	writing := m.back.underWay(v.info.All())
	s := &MirrorStatus{State: "whole", Marked: v.raw().Count(state.Dirty) * bs}
	s.Behind = s.Marked
	// The counts are of different instants: whole is what has nothing to be copied.
	_, missing := m.back.NextMissing(0)
	for _, e := range writing {
		_ = v.raw().Runs(state.Dirty, run(e), func(r state.Run, dirty bool) bool { // an error has its own fault
			if dirty {
				s.Behind -= min(s.Behind, r.Blocks*bs)
			}
			return true
		})
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	lost := m.losses()
	for _, list := range m.equal {
		for _, x := range list {
			i := sort.Search(len(writing), func(i int) bool { return writing[i].End() > x.Start })
			counted := i < len(writing) && writing[i].Overlaps(x.Extent)
			if !counted && !lost(x) { // else it is going to be copied
				s.Behind -= min(s.Behind, x.Blocks*bs)
			}
		}
	}
	switch {
	case m.broken != nil:
		s.State, s.Reason = "broken", m.broken.Error()
	case s.Behind > 0 || missing:
		s.State = "behind"
	}
	return s
}
