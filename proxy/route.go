package proxy

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	copier "lunshift/copy"
	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

// splitDepth is how many parts of one command that spans both sides are under way
// at a time.
const splitDepth = 16

// mostRepeats is how often one write is done again because the destination lost its
// cache.
const mostRepeats = 5

// errRetired is what a command gets that meets a volume that is cut over. It makes
// initiators try again, by then on the path to the destination.
var errRetired = fmt.Errorf("the volume is cut over: %w", lun.ErrUnavailable)

// Info implements lun.Device. It is the same in every phase.
func (v *Volume) Info() lun.Info { return v.info }

// ReadAt implements lun.Device: what is valid comes from the destination, the
// rest from the source.
func (v *Volume) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	e := lun.Extent{Start: start, Blocks: uint64(len(p)) / uint64(v.info.BlockSize)}
	if err := v.enter(ctx, e); err != nil {
		return err
	}
	defer v.gate.leave()
	return v.read(ctx, p, e)
}

// TryReadAt implements lun.Prober.
func (v *Volume) TryReadAt(p []byte, start lun.LBA) (bool, error) {
	e := lun.Extent{Start: start, Blocks: uint64(len(p)) / uint64(v.info.BlockSize)}
	if err := v.info.Check(e); err != nil {
		return false, err
	}
	if !v.gate.tryEnter() {
		return false, nil
	}
	defer v.gate.leave()
	switch phase := v.Phase(); {
	case phase == Ready:
		return v.source.TryReadAt(p, start)
	case phase != Cutover && v.flags.All(state.Valid, run(e)):
		return v.destination.TryReadAt(p, start)
	}
	return false, nil
}

// WriteAt implements lun.Device by the write rule.
func (v *Volume) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	e := lun.Extent{Start: start, Blocks: uint64(len(p)) / uint64(v.info.BlockSize)}
	return v.change(ctx, e, func(u *unit) error { return u.WriteAt(ctx, p, start) })
}

// Unmap implements lun.Device. The blocks read as zeroes afterwards.
func (v *Volume) Unmap(ctx context.Context, e lun.Extent) error {
	if !v.info.Thin {
		return lun.ErrUnsupported
	}
	return v.change(ctx, e, func(u *unit) error { return u.discard(ctx, e) })
}

// WriteZeroes implements lun.Device.
func (v *Volume) WriteZeroes(ctx context.Context, e lun.Extent) error {
	return v.change(ctx, e, func(u *unit) error { return u.WriteZeroes(ctx, e) })
}

// Update implements lun.Updater.
func (v *Volume) Update(ctx context.Context, e lun.Extent, modify func([]byte) error) error {
	if err := v.enter(ctx, e); err != nil {
		return err
	}
	defer v.gate.leave()
	held, err := v.writes.Lock(ctx, e)
	if err != nil {
		return err
	}
	defer v.writes.Unlock(held)
	p := make([]byte, v.info.Bytes(e))
	if err := v.read(ctx, p, e); err != nil {
		return err
	}
	if err := modify(p); err != nil {
		return err
	}
	return v.write(ctx, e, func(u *unit) error { return u.WriteAt(ctx, p, e.Start) })
}

// Flush implements lun.Device. From the start on no write goes to the source, and
// the start itself flushed it.
func (v *Volume) Flush(ctx context.Context) error {
	if err := v.enter(ctx, lun.Extent{}); err != nil {
		return err
	}
	defer v.gate.leave()
	switch v.Phase() {
	case Ready:
		return v.source.Flush(ctx)
	case Cutover:
		return errRetired
	}
	return v.destinationFlush.Flush(ctx)
}

// Extents implements lun.Device: each block's status is that of the side it is
// read from.
func (v *Volume) Extents(ctx context.Context, e lun.Extent) ([]lun.Allocation, error) {
	if err := v.enter(ctx, e); err != nil {
		return nil, err
	}
	defer v.gate.leave()
	if e.Empty() {
		return nil, nil
	}
	switch v.Phase() {
	case Ready:
		return v.source.Extents(ctx, e)
	case Cutover:
		return nil, errRetired
	}
	side := v.source
	err := v.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		e = extent(r)
		if valid {
			side = v.destination
		}
		return false // the first run alone; the caller asks again for the rest
	})
	if err != nil {
		return nil, v.unknown(err)
	}
	return side.Extents(ctx, e)
}

// enter checks the extent and passes the gate.
func (v *Volume) enter(ctx context.Context, e lun.Extent) error {
	if err := v.info.Check(e); err != nil {
		return err
	}
	return v.gate.enter(ctx)
}

// read fills p with e; the caller is inside the gate. It takes no lock: the source
// does not change while a block is read from it, so a read that was routed there just
// before the block became valid is an ordinary read beside a write.
func (v *Volume) read(ctx context.Context, p []byte, e lun.Extent) error {
	switch v.Phase() {
	case Ready:
		return v.source.ReadAt(ctx, p, e.Start)
	case Cutover:
		return errRetired
	}
	if v.flags.All(state.Valid, run(e)) {
		return v.destination.ReadAt(ctx, p, e.Start)
	}
	if !v.flags.Any(state.Valid, run(e)) {
		return v.source.ReadAt(ctx, p, e.Start)
	}
	parts, gctx := errgroup.WithContext(ctx)
	parts.SetLimit(splitDepth)
	err := v.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		side, part := v.source, extent(r)
		if valid {
			side = v.destination
		}
		from := uint64(part.Start-e.Start) * uint64(v.info.BlockSize)
		q := p[from : from+v.info.Bytes(part)]
		parts.Go(func() error { return side.ReadAt(gctx, q, part.Start) })
		return true
	})
	if err != nil {
		err = v.unknown(err)
	}
	return errors.Join(err, parts.Wait())
}

// unknown marks the volume as degraded because flags cannot be read. Blocks of which
// it is not known where they are are neither read nor written nor copied.
func (v *Volume) unknown(err error) error {
	v.fault("state", err)
	return err
}

// change passes the gate, keeps other changes of e out and makes this one.
func (v *Volume) change(ctx context.Context, e lun.Extent, do func(*unit) error) error {
	if err := v.enter(ctx, e); err != nil {
		return err
	}
	defer v.gate.leave()
	if e.Empty() {
		return nil
	}
	held, err := v.writes.Lock(ctx, e)
	if err != nil {
		return err
	}
	defer v.writes.Unlock(held)
	return v.write(ctx, e, do)
}

// write has do change e on the side that takes writes, and returns nil only when
// the write rule allows it to be acknowledged. The caller is inside the gate and
// holds e.
func (v *Volume) write(ctx context.Context, e lun.Extent, do func(*unit) error) error {
	switch v.Phase() {
	case Ready:
		return do(v.source)
	case Cutover:
		return errRetired
	}
	if v.flags.All(state.Valid|state.Dirty, run(e)) {
		return do(v.destination)
	}
	// Only a holder of the range or the copier's commit makes blocks valid, so
	// what is valid here stays so; what is not may become so by a commit meanwhile.
	flag := func(kinds state.Kinds, runs ...state.Run) error {
		err := v.flags.Set(ctx, kinds, runs...)
		if ctx.Err() == nil {
			v.fault("state", err)
		}
		return err
	}
	// Dirty before written: a valid block that a crash left written and not dirty would
	// be taken for a wrong copy of the source.
	var copied []state.Run
	fresh := false
	err := v.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		if !valid {
			fresh = true
		} else if !v.flags.All(state.Dirty, r) {
			copied = append(copied, r)
		}
		return true
	})
	if err != nil {
		return err
	}
	if len(copied) > 0 {
		if err := flag(state.Dirty, copied...); err != nil {
			return err
		}
		failpoint.Here("write.dirty")
	}
	if !fresh {
		return v.writeStable(ctx, false, do)
	}
	err = v.writeStable(ctx, true, do)
	if err == nil {
		failpoint.Here("write.stable")
		err = flag(state.Valid|state.Dirty, run(e))
		failpoint.Here("write.flagged")
	}
	if err != nil {
		v.suspect(e)
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

// suspect keeps blocks whose write failed from being flagged by a copy made before
// it: the destination may hold what was never acknowledged. The copier
// takes them again.
func (v *Volume) suspect(e lun.Extent) {
	// With commits held no commit of copied blocks is under way: either it came
	// before, and then they are valid with what the destination holds now,
	// or it comes later and leaves these blocks out.
	v.commits.Lock()
	defer v.commits.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.suspects = append(lun.Subtract(v.suspects, e), e)
}

func run(e lun.Extent) state.Run { return state.Run{Start: uint64(e.Start), Blocks: e.Blocks} }

func extent(r state.Run) lun.Extent { return lun.Extent{Start: lun.LBA(r.Start), Blocks: r.Blocks} }

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
	l.commits.Lock()
	defer l.commits.Unlock()
	l.mu.Lock()
	for _, s := range l.suspects {
		done = lun.Subtract(done, s)
	}
	l.mu.Unlock()
	runs := make([]state.Run, len(done))
	for i, e := range done {
		runs[i] = run(e)
	}
	failpoint.Here("copy.stable")
	err := l.flags.Set(ctx, state.Valid, runs...)
	failpoint.Here("copy.flagged")
	return err
}
