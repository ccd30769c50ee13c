package proxy

import (
	"context"
	"slices"
	"sync/atomic"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/state"
)

// mostSuspects bounds the extents that are suspect one by one.
const mostSuspects = 256

// pass is one direction in which blocks move: from the side that has them to the one
// that is to have them. A volume has two. Forward, to the destination, is that of phases
// migrating and synced; back, to the source, that of rolling-back, and of a mirror that is
// behind. All that writes, routes and copies is in terms of a pass, so that it is the same
// in both.
//
// It implements copier.Ledger for the copier that works in its direction.
type pass struct {
	v        *Volume
	from, to *unit
	// fromFlush and toFlush flush the two.
	fromFlush, toFlush *flusher
	// flags are as this direction sees them. Valid: to holds the current content. Dirty:
	// it was written since, so from is stale.
	flags  flags
	copier *copier.Copier
	kind   string // of the faults of its copy

	// What follows is guarded by v.mu.
	suspects []lun.Extent // blocks that were not valid when a write to them failed, see suspect
	doubts   uint64       // how often there were too many of them
	writing  []lun.Extent // where writes to blocks that are not valid are under way
	// committing are the copied blocks that are being flagged; committed is closed when
	// they are.
	committing []lun.Extent
	committed  chan struct{}
	unsure     error // why it is not known what of them is flagged; then no block is made valid any more
}

// ways are the two passes of a migration, made anew with its flags.
type ways struct {
	flags         flags
	forward, back *pass
	// backward says that commands are routed by back.
	backward atomic.Bool
	// before is what earlier runs of the service copied forward, beforeBack what they
	// copied back, in bytes.
	before     copier.Progress
	beforeBack uint64
}

// newWays makes the passes of a migration with these flags.
func (v *Volume) newWays(f flags, backward bool) *ways {
	w := &ways{flags: f}
	w.backward.Store(backward)
	w.forward = &pass{
		v: v, from: v.source, to: v.destination, fromFlush: v.sourceFlush, toFlush: v.destinationFlush, flags: f, kind: "copy",
	}
	w.back = &pass{
		v: v, from: v.destination, to: v.source, fromFlush: v.destinationFlush, toFlush: v.sourceFlush, flags: reversed{f, v.info.Blocks}, kind: copyBack,
	}
	set := v.set()
	for _, p := range []*pass{w.forward, w.back} {
		o := copier.Options{
			Source: p.from, Destination: p.to, From: p.from.role, To: p.to.role, Ledger: p,
			Volume: v.info.All(), RegionBlocks: v.record.RegionBlocks, Depth: set.CopyDepth,
			Throttle: v.throttle, Shared: v.cfg.CopyRateOfAll, Readback: set.Readback, Compare: p == w.forward && v.record.Compare,
			Fault: func(err error) { v.fault(p.kind, err) },
		}
		if p == w.forward {
			o.Survey = v.survey
		} else {
			// What is to be brought back may have come to be after the map was read.
			o.Source = unmapped{p.from}
		}
		p.copier = copier.New(o)
	}
	w.count()
	return w
}

// count takes up what earlier runs of the service copied.
func (w *ways) count() {
	v := w.forward.v
	w.before = copier.Progress{
		Copied: v.record.CopiedBytes, Skipped: v.record.SkippedBytes,
		Compared: v.record.ComparedBytes, Equal: v.record.EqualBytes,
	}
	w.beforeBack = v.record.CopiedBackBytes
	if v.record.AllocatedBytes != nil {
		w.before.Allocated, w.before.Surveyed = *v.record.AllocatedBytes, true
	}
	if p := Phase(v.record.Phase); p != Migrating && p != Synced || v.wantsMirror(v.record) || v.record.Mirrored {
		return
	}
	// What is valid and was never written by an initiator came from the copier, also
	// where a crash kept it from being counted: as what most of it is.
	brought := (w.flags.Count(state.Valid) - w.flags.Count(state.Dirty)) * uint64(v.info.BlockSize)
	counted := w.before.Copied + w.before.Skipped + w.before.Equal
	switch {
	case brought <= counted:
	case v.record.Compare:
		w.before.Compared += brought - counted
		w.before.Equal += brought - counted
	default:
		w.before.Copied += brought - counted
	}
}

// copyBack is the kind of the faults of a copy to the source.
const copyBack = "copy back"

// unmapped is a unit that does not tell what is allocated.
type unmapped struct{ *unit }

// Info implements lun.Device.
func (u unmapped) Info() lun.Info {
	info := u.unit.Info()
	info.ReportsAllocation = false
	return info
}

// Extents implements lun.Device: all counts as allocated.
func (u unmapped) Extents(_ context.Context, e lun.Extent) ([]lun.Allocation, error) {
	return []lun.Allocation{{Extent: e, Allocated: true}}, nil
}

// way is the pass by which commands are routed in phases migrating, synced and
// rolling-back.
func (v *Volume) way() *pass {
	w := v.ways.Load()
	if w.backward.Load() {
		return w.back
	}
	return w.forward
}

// raw are the flags as the state has them: valid on the destination, and dirty.
func (v *Volume) raw() flags { return v.ways.Load().flags }

// region is the extent of a region.
func (v *Volume) region(number uint64) lun.Extent {
	size := v.ways.Load().forward.copier.RegionBlocks
	return lun.Extent{Start: lun.LBA(number * size), Blocks: size}.Intersect(v.info.All())
}

// mark keeps copies of e that were made before from being flagged: their blocks are about
// to be written. It waits for a commit that flags them just now, and fails once the outcome
// of one is not known: what is written then might be valid and not dirty after a restart.
func (w *pass) mark(ctx context.Context, e lun.Extent) error {
	for {
		w.v.mu.Lock()
		if err := w.unsure; err != nil {
			w.v.mu.Unlock()
			return err
		}
		if !slices.ContainsFunc(w.committing, func(c lun.Extent) bool { return c.Overlaps(e) }) {
			w.writing = append(w.writing, e)
			w.v.mu.Unlock()
			return nil
		}
		committed := w.committed
		w.v.mu.Unlock()
		select {
		case <-committed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (w *pass) unmark(e lun.Extent) {
	w.v.mu.Lock()
	defer w.v.mu.Unlock()
	i := slices.Index(w.writing, e) // the holder of the range is alone with it
	w.writing = slices.Delete(w.writing, i, i+1)
}

// suspect keeps blocks from being flagged by a copy made before: their write failed, so to
// may hold what was never acknowledged, or it went past this copier. The copier takes them
// again. They are marked until they are suspects. Where they are too many, no copy
// that was begun by now is flagged.
func (w *pass) suspect(blocks ...lun.Extent) {
	w.v.mu.Lock()
	defer w.v.mu.Unlock()
	for _, e := range blocks {
		if w.suspects = append(lun.Subtract(w.suspects, e), e); len(w.suspects) > mostSuspects {
			w.suspects, w.doubts = nil, w.doubts+1
		}
	}
}

// standing tells which blocks of r are not valid, and which are and not dirty. Only the
// holder of the range or the copier's commit makes blocks valid, so what is valid here
// stays so; what is not may become so by a commit meanwhile, but for what is marked.
func (w *pass) standing(r state.Run) (fresh, copied []state.Run, err error) {
	err = w.flags.Runs(state.Valid, r, func(r state.Run, valid bool) bool {
		if !valid {
			fresh = append(fresh, r)
		} else if !w.flags.All(state.Dirty, r) {
			copied = append(copied, r)
		}
		return true
	})
	if err != nil {
		err = w.v.unknown(err)
	}
	return fresh, copied, err
}

// mirroring is the mirror that this pass keeps whole; nil where it does not.
func (w *pass) mirroring() *mirror {
	if m := w.v.mirror.Load(); m != nil && m.back == w {
		return m
	}
	return nil
}

// era changes when what was copied may be lost, or is in doubt: with to's cache, and where
// from goes on to take writes with its cache as well, which had what was read. The caller
// holds v.mu.
func (w *pass) era() uint64 {
	era := w.doubts
	for _, u := range w.flushed() {
		era += u.Resets()
	}
	return era
}

// flushed are the units that have to be flushed before what was copied outlives any loss
// of power.
func (w *pass) flushed() (units []*unit) {
	if w.to.Info().VolatileCache {
		units = append(units, w.to)
	}
	if w.mirroring() != nil && w.from.Info().VolatileCache {
		units = append(units, w.from)
	}
	return units
}

// flushFrom flushes the side that takes no writes, unless it was since the volume was taken up.
func (w *pass) flushFrom(ctx context.Context) error {
	if w.v.fromFlushed.Load() {
		return nil
	}
	err := w.fromFlush.Flush(ctx)
	if err == nil {
		w.v.fromFlushed.Store(true)
	}
	return err
}

// flush makes what was copied outlive any loss of power.
func (w *pass) flush(ctx context.Context) error {
	for _, u := range w.flushed() {
		f := w.toFlush
		if u == w.from {
			f = w.fromFlush
		}
		if err := f.Flush(ctx); err != nil {
			return err
		}
	}
	return nil
}
