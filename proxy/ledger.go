package proxy

import (
	"context"
	"slices"

	copier "lunshift/copy"
	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

// ledger is the volume as the copier sees it.
type ledger Volume

func (l *ledger) NextPartial(from uint64) (uint64, bool) {
	return l.flags.NextPartial(state.Valid, from)
}

func (l *ledger) NextMissing(from uint64) (uint64, bool) {
	region, _, ok := l.flags.Missing(state.Valid, from)
	return region, ok
}

// Begin clears the suspicion of e: what is copied from here on is newer than the
// write that failed.
func (l *ledger) Begin(e lun.Extent) (era uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.suspects = lun.Subtract(l.suspects, e)
	return l.destination.Resets()
}

func (l *ledger) Invalid(e lun.Extent) ([]lun.Extent, error) {
	// Regions count by what is settled. Without this one that writes have just filled
	// would be handed out again and again. It takes milliseconds, or fails.
	if err := l.flags.Await(context.Background(), run(e)); err != nil {
		return nil, err
	}
	var runs []lun.Extent
	err := l.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		if !valid {
			runs = append(runs, extent(r))
		}
		return true
	})
	if err != nil {
		return nil, (*Volume)(l).unknown(err)
	}
	return runs, nil
}

func (l *ledger) Exclude(ctx context.Context, e lun.Extent) (func(), error) {
	held, err := l.writes.Lock(ctx, e)
	if err != nil {
		return nil, err
	}
	return func() { l.writes.Unlock(held) }, nil
}

func (l *ledger) TryExclude(e lun.Extent) (func(), bool) {
	held, ok := l.writes.TryLock(e)
	if !ok {
		return nil, false
	}
	return func() { l.writes.Unlock(held) }, true
}

// Commit flags copied blocks in the order of the write rule.
func (l *ledger) Commit(ctx context.Context, copied []copier.Copied) error {
	if len(copied) == 0 {
		return nil
	}
	failpoint.Here("copy.written")
	volatile := l.destination.Info().VolatileCache
	if volatile {
		if err := l.destinationFlush.Flush(ctx); err != nil {
			return err
		}
	}
	era := l.destination.Resets()
	var done []lun.Extent
	for _, c := range copied {
		if !volatile || c.Era == era {
			done = append(done, c.Extent)
		}
	}
	if err := l.commits.take(ctx); err != nil {
		return err
	}
	defer l.commits.give()
	l.mu.Lock()
	for _, e := range slices.Concat(l.suspects, l.writing) {
		done = lun.Subtract(done, e)
	}
	l.committing, l.committed = done, make(chan struct{})
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.committing = nil
		close(l.committed)
	}()
	runs := make([]state.Run, len(done))
	for i, e := range done {
		runs[i] = run(e)
	}
	failpoint.Here("copy.stable")
	err := l.flags.Set(ctx, state.Valid, runs...)
	failpoint.Here("copy.flagged")
	return err
}
