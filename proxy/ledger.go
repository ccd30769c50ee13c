package proxy

import (
	"context"
	"errors"
	"slices"

	copier "lunshift/copy"
	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

// What follows is the pass as its copier sees it.

// NextPartial implements copier.Ledger.
func (w *pass) NextPartial(from uint64) (uint64, bool) {
	return w.next(from, w.flags.NextPartial)
}

// NextMissing implements copier.Ledger.
func (w *pass) NextMissing(from uint64) (uint64, bool) {
	return w.next(from, w.flags.Missing)
}

// next is the first region from from on that find gives and of which something is to be
// copied.
func (w *pass) next(from uint64, find func(state.Kinds, uint64) (uint64, bool)) (uint64, bool) {
	for region, ok := find(state.Valid, from); ok; region, ok = find(state.Valid, region+1) {
		if w.mirroring() == nil {
			return region, true
		}
		// An error is met again by the copier, which shows it.
		if left, err := w.invalid(w.v.region(region)); err != nil || len(left) > 0 {
			return region, true
		}
	}
	return 0, false
}

// Begin clears the suspicion of e: what is copied from here on is newer than the
// write that failed.
func (w *pass) Begin(e lun.Extent) (era uint64) {
	w.v.mu.Lock()
	defer w.v.mu.Unlock()
	w.suspects = lun.Subtract(w.suspects, e)
	return w.era()
}

func (w *pass) Invalid(e lun.Extent) ([]lun.Extent, error) {
	// Regions count by what is settled. Without this one that writes have just filled
	// would be handed out again and again. It takes milliseconds, or fails.
	if err := w.flags.Await(context.Background(), run(e)); err != nil {
		return nil, err
	}
	return w.invalid(e)
}

// invalid gives the runs of e that are to be copied, in rising order. Of a mirror these are not
// what is being written: it is alike afterwards, or a suspect.
func (w *pass) invalid(e lun.Extent) ([]lun.Extent, error) {
	m := w.mirroring()
	var written []lun.Extent
	if m != nil {
		written = w.underWay(e) // before alike: a write that ends meanwhile is in one of them
	}
	var runs []lun.Extent
	err := w.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		if !valid {
			runs = append(runs, extent(r))
		}
		return true
	})
	if err != nil {
		return nil, w.v.unknown(err)
	}
	if m != nil && len(runs) > 0 {
		runs = lun.Without(lun.Without(runs, m.alike(e)), written)
	}
	return runs, nil
}

// underWay gives where in e writes are under way, in rising order.
func (w *pass) underWay(e lun.Extent) (list []lun.Extent) {
	w.v.mu.Lock()
	for _, x := range w.writing {
		if x.Overlaps(e) {
			list = append(list, x)
		}
	}
	w.v.mu.Unlock()
	slices.SortFunc(list, byStart)
	return list
}

func (w *pass) Exclude(ctx context.Context, e lun.Extent) (func(), error) {
	held, err := w.v.writes.Lock(ctx, e)
	if err != nil {
		return nil, err
	}
	return func() { w.v.writes.Unlock(held) }, nil
}

func (w *pass) TryExclude(e lun.Extent) (func(), bool) {
	held, ok := w.v.writes.TryLock(e)
	if !ok {
		return nil, false
	}
	return func() { w.v.writes.Unlock(held) }, true
}

// Commit flags copied blocks in the order of the write rule.
func (w *pass) Commit(ctx context.Context, copied []copier.Copied) error {
	if len(copied) == 0 {
		return nil
	}
	failpoint.Here("copy.written")
	if err := w.flush(ctx); err != nil {
		return err
	}
	if err := w.v.commits.take(ctx); err != nil {
		return err
	}
	defer w.v.commits.give()
	var done []lun.Extent
	w.v.mu.Lock()
	era := w.era() // after the flush
	for _, c := range copied {
		if c.Era == era {
			done = append(done, c.Extent)
		}
	}
	slices.SortFunc(done, byStart)
	for _, e := range slices.Concat(w.suspects, w.writing) {
		done = lun.Subtract(done, e)
	}
	w.committing, w.committed = done, make(chan struct{})
	w.v.mu.Unlock()
	// Of a mirror, what was written to both sides since, and perhaps after the flush. Whoever
	// writes there now waits.
	if m := w.mirroring(); m != nil {
		for _, c := range copied {
			done = lun.Without(done, m.alike(c.Extent))
		}
	}
	defer func() {
		w.v.mu.Lock()
		defer w.v.mu.Unlock()
		w.committing = nil
		close(w.committed)
	}()
	failpoint.Here("copy.stable")
	err := w.flags.Set(ctx, state.Valid, runs(done)...)
	failpoint.Here("copy.flagged")
	if errors.Is(err, state.ErrFailed) {
		// The database may have them all the same, and show it after a restart.
		w.v.mu.Lock()
		w.unsure = err
		w.v.mu.Unlock()
	}
	return err
}
