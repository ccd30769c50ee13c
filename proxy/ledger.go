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
	return (*Volume)(l).invalid(e)
}

// invalid gives the runs of e that are not valid, in rising order.
func (v *Volume) invalid(e lun.Extent) ([]lun.Extent, error) {
	var runs []lun.Extent
	err := v.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		if !valid {
			runs = append(runs, extent(r))
		}
		return true
	})
	if err != nil {
		return nil, v.unknown(err)
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
	failpoint.Here("copy.stable")
	err := l.flags.Set(ctx, state.Valid, runs(done)...)
	failpoint.Here("copy.flagged")
	if errors.Is(err, state.ErrFailed) {
		// The database may have them all the same, and show it after a restart.
		l.mu.Lock()
		l.unsure = err
		l.mu.Unlock()
	}
	return err
}
