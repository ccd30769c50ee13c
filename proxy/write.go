package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

// mostRepeats is how often one write is done again because the destination lost its
// cache.
const mostRepeats = 5

// write has do change e on the side that takes writes, and returns nil only when
// the write rule allows it to be acknowledged. content is what e holds afterwards, nil for
// zeroes. The caller is inside the gate and holds e.
func (v *Volume) write(ctx context.Context, e lun.Extent, content []byte, do func(*unit) error) error {
	switch v.Phase() {
	case Ready:
		if !v.usage.wrote.Load() {
			v.usage.wrote.Store(true)
		}
		return do(v.source)
	case Cutover:
		return errRetired
	}
	r := run(e)
	if !v.flags.Unsettled(r) && v.flags.All(state.Valid|state.Dirty, r) {
		return do(v.destination)
	}
	// What was intended of an earlier write must be settled before its content changes.
	if err := v.flags.Await(ctx, r); err != nil {
		return v.stateError(ctx, err)
	}
	fresh, copied, err := v.standing(r)
	if err == nil && len(fresh) > 0 {
		if err = v.mark(ctx, e); err == nil {
			defer v.unmark(e)
			fresh, copied, err = v.standing(r) // a copy may have been flagged until now
		}
	}
	if err != nil {
		return err
	}
	// Dirty before written: a valid block that a crash left written and not dirty would
	// be taken for a wrong copy of the source.
	if len(copied) > 0 {
		if err := v.stateError(ctx, v.flags.Note(ctx, state.Dirty, copied...)); err != nil {
			return err
		}
		failpoint.Here("write.dirty")
	}
	switch {
	case len(fresh) == 0:
		return v.writeStable(ctx, false, do)
	case content == nil || len(fresh) > state.MostSums:
		if err = v.writeStable(ctx, true, do); err == nil {
			failpoint.Here("write.stable")
			err = v.stateError(ctx, v.flags.Note(ctx, state.Valid|state.Dirty, r))
		}
	default:
		err = v.writeIntended(ctx, e, fresh, content, do)
	}
	failpoint.Here("write.flagged")
	if err != nil {
		v.suspect(fresh)
	}
	return err
}

// standing tells which blocks of r are not valid, and which are and not dirty. Only the
// holder of the range or the copier's commit makes blocks valid, so what is valid here
// stays so; what is not may become so by a commit meanwhile, but for what is marked.
func (v *Volume) standing(r state.Run) (fresh, copied []state.Run, err error) {
	err = v.flags.Runs(state.Valid, r, func(r state.Run, valid bool) bool {
		if !valid {
			fresh = append(fresh, r)
		} else if !v.flags.All(state.Dirty, r) {
			copied = append(copied, r)
		}
		return true
	})
	if err != nil {
		err = v.unknown(err)
	}
	return fresh, copied, err
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
func (v *Volume) writeIntended(ctx context.Context, e lun.Extent, fresh []state.Run, content []byte, do func(*unit) error) error {
	bs := uint64(v.info.BlockSize)
	sums := make([]state.Sum, len(fresh))
	for i, r := range fresh {
		at := (r.Start - uint64(e.Start)) * bs
		sums[i] = state.SumOf(r, content[at:at+r.Blocks*bs])
	}
	var made intent
	var refused error
	intend := func() {
		made, refused = v.flags.Intend(ctx, sums...)
		failpoint.Here("write.intended")
	}
	var intending sync.WaitGroup
	if v.destination.Info().VolatileCache {
		intending.Go(intend)
	} else if intend(); refused != nil { // to write takes less than to hand this over
		return v.stateError(ctx, refused)
	}
	err := v.writeStable(ctx, true, do)
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
func (v *Volume) writeStable(ctx context.Context, stable bool, do func(*unit) error) error {
	stable = stable && v.destination.Info().VolatileCache
	for range mostRepeats {
		era := v.destination.Resets()
		if err := do(v.destination); err != nil || !stable {
			return err
		}
		failpoint.Here("write.unflushed")
		if err := v.destinationFlush.Flush(ctx); err != nil {
			return err
		}
		if v.destination.Resets() == era {
			return nil
		}
	}
	return fmt.Errorf("destination: lost its cache %d times during one write: %w", mostRepeats, lun.ErrUnavailable)
}

// mark keeps copies of e that were made before from being flagged: their blocks are about
// to be written. It waits for a commit that flags them just now, and fails once the outcome
// of one is not known: what is written then might be valid and not dirty after a restart.
func (v *Volume) mark(ctx context.Context, e lun.Extent) error {
	for {
		v.mu.Lock()
		if err := v.unsure; err != nil {
			v.mu.Unlock()
			return err
		}
		if !slices.ContainsFunc(v.committing, func(c lun.Extent) bool { return !c.Intersect(e).Empty() }) {
			v.writing = append(v.writing, e)
			v.mu.Unlock()
			return nil
		}
		committed := v.committed
		v.mu.Unlock()
		select {
		case <-committed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (v *Volume) unmark(e lun.Extent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	i := slices.Index(v.writing, e) // the holder of the range is alone with it
	v.writing = slices.Delete(v.writing, i, i+1)
}

// suspect keeps blocks whose write failed from being flagged by a copy made before
// it: the destination may hold what was never acknowledged. The copier
// takes them again. They are marked until they are suspects.
func (v *Volume) suspect(fresh []state.Run) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, r := range fresh {
		v.suspects = append(lun.Subtract(v.suspects, extent(r)), extent(r))
	}
}
