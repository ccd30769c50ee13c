package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

// mostRepeats is how often one write is done again because the destination lost its
// cache.
const mostRepeats = 5

// doer changes blocks of a unit.
type doer func(ctx context.Context, u *unit) error

// write has do change e on the side that takes writes, and returns nil only when
// the write rule allows it to be acknowledged. content is what e holds afterwards, nil for
// zeroes. The caller is inside the gate and holds e.
func (v *Volume) write(ctx context.Context, e lun.Extent, content []byte, do doer) error {
	switch v.Phase() {
	case Ready, RolledBack:
		if !v.usage.wrote.Load() {
			v.usage.wrote.Store(true)
		}
		return do(ctx, v.source)
	case Cutover:
		return errRetired
	}
	if m := v.mirror.Load(); m != nil {
		return m.write(ctx, e, content, do)
	}
	return v.way().write(ctx, e, content, do)
}

// write is Volume.write by the flags: to takes it.
func (w *pass) write(ctx context.Context, e lun.Extent, content []byte, do doer) error {
	v, r := w.v, run(e)
	if !w.flags.Unsettled(r) && w.flags.All(state.Valid|state.Dirty, r) {
		return do(ctx, w.to)
	}
	// What was intended of an earlier write must be settled before its content changes.
	if err := w.flags.Await(ctx, r); err != nil {
		return v.stateError(ctx, err)
	}
	fresh, copied, err := w.standing(r)
	if err == nil && len(fresh) > 0 {
		if err = w.mark(ctx, e); err == nil {
			defer w.unmark(e)
			fresh, copied, err = w.standing(r) // a copy may have been flagged until now
		}
	}
	if err != nil {
		return err
	}
	// Dirty before written: a valid block that a crash left written and not dirty would
	// be taken for a wrong copy of the source.
	if len(copied) > 0 {
		if err := v.stateError(ctx, w.flags.Note(ctx, state.Dirty, copied...)); err != nil {
			return err
		}
		failpoint.Here("write.dirty")
	}
	switch {
	case len(fresh) == 0:
		return w.writeStable(ctx, false, do)
	case content == nil || len(fresh) > state.MostSums:
		if err = w.writeStable(ctx, true, do); err == nil {
			failpoint.Here("write.stable")
			err = v.stateError(ctx, w.flags.Note(ctx, state.Valid|state.Dirty, r))
		}
	default:
		err = w.writeIntended(ctx, e, fresh, content, do)
	}
	failpoint.Here("write.flagged")
	if err != nil {
		w.suspect(extents(fresh)...)
	}
	return err
}

// stateError shows as a fault what the state could not do, and gives it back.
func (v *Volume) stateError(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		v.fault("state", err)
	}
	return err
}

// writeIntended is a first write that does not wait for its flags: what the fresh blocks
// are going to hold is made durable while they are written and flushed, or before where
// there is nothing to flush. After a crash the destination
// itself tells whether it has them (recover).
func (w *pass) writeIntended(ctx context.Context, e lun.Extent, fresh []state.Run, content []byte, do doer) error {
	v := w.v
	bs := uint64(v.info.BlockSize)
	sums := make([]state.Sum, len(fresh))
	for i, r := range fresh {
		at := (r.Start - uint64(e.Start)) * bs
		sums[i] = state.SumOf(r, content[at:at+r.Blocks*bs])
	}
	var made intent
	var refused error
	intend := func() {
		made, refused = w.flags.Intend(ctx, sums...)
		failpoint.Here("write.intended")
	}
	var intending sync.WaitGroup
	if w.to.Info().VolatileCache {
		intending.Go(intend)
	} else if intend(); refused != nil { // to write takes less than to hand this over
		return v.stateError(ctx, refused)
	}
	err := w.writeStable(ctx, true, do)
	if err == nil {
		failpoint.Here("write.stable")
	}
	intending.Wait()
	if err = errors.Join(err, v.stateError(ctx, refused)); err == nil {
		made.Keep()
		return nil
	}
	if made != nil {
		err = errors.Join(err, v.stateError(ctx, made.Withdraw()))
	}
	return err
}

// writeStable has do change the destination and, where stable asks for it and the
// destination's cache is volatile, flushes it. If the destination lost its cache
// between the two the flush proves nothing, and both are done again.
func (w *pass) writeStable(ctx context.Context, stable bool, do doer) error {
	stable = stable && w.to.Info().VolatileCache
	for range mostRepeats {
		era := w.to.Resets()
		if err := do(ctx, w.to); err != nil || !stable {
			return err
		}
		failpoint.Here("write.unflushed")
		if err := w.toFlush.Flush(ctx); err != nil {
			return err
		}
		if w.to.Resets() == era {
			return nil
		}
	}
	return fmt.Errorf("%s: lost its cache %d times during one write: %w", w.to.role, mostRepeats, lun.ErrUnavailable)
}
