package proxy

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"lunshift/lun"
	"lunshift/state"
)

// splitDepth is how many parts of one command that spans both sides are under way
// at a time.
const splitDepth = 16

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
	case phase == Ready || phase == RolledBack:
		return v.source.TryReadAt(p, start)
	case phase == Cutover:
		return false, nil
	}
	if w := v.way(); w.flags.All(state.Valid, run(e)) || v.hasWhole() {
		return w.to.TryReadAt(p, start)
	}
	return false, nil
}

// WriteAt implements lun.Device by the write rule.
func (v *Volume) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	e := lun.Extent{Start: start, Blocks: uint64(len(p)) / uint64(v.info.BlockSize)}
	return v.change(ctx, e, p, func(ctx context.Context, u *unit) error { return u.WriteAt(ctx, p, start) })
}

// Unmap implements lun.Device. The blocks read as zeroes afterwards.
func (v *Volume) Unmap(ctx context.Context, e lun.Extent) error {
	if !v.info.Thin {
		return lun.ErrUnsupported
	}
	return v.change(ctx, e, nil, func(ctx context.Context, u *unit) error { return u.discard(ctx, e) })
}

// WriteZeroes implements lun.Device.
func (v *Volume) WriteZeroes(ctx context.Context, e lun.Extent) error {
	return v.change(ctx, e, nil, func(ctx context.Context, u *unit) error { return u.WriteZeroes(ctx, e) })
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
	if v.shared() {
		return v.updateShared(ctx, e, modify)
	}
	p := make([]byte, v.info.Bytes(e))
	if err := v.read(ctx, p, e); err != nil {
		return err
	}
	if err := modify(p); err != nil {
		return err
	}
	return v.write(ctx, e, p, func(ctx context.Context, u *unit) error { return u.WriteAt(ctx, p, e.Start) })
}

// Flush implements lun.Device. From the start on no write goes to the source, and from a
// rollback on none to the destination; the step itself flushed that side. Only where the
// state failed, so that nobody knew whether the step was recorded, did writes go there until
// the service was started again: the first flush of one that takes the volume up is of both, be a
// mirror broken or not, unless the destination has everything.
func (v *Volume) Flush(ctx context.Context) error {
	if err := v.enter(ctx, lun.Extent{}); err != nil {
		return err
	}
	defer v.gate.leave()
	switch v.Phase() {
	case Ready, RolledBack:
		return v.source.Flush(ctx)
	case Cutover:
		return errRetired
	}
	w := v.way()
	if v.Phase() != Synced {
		if err := w.flushFrom(ctx); err != nil {
			return err
		}
	}
	if m := v.mirror.Load(); m != nil {
		return m.flush(ctx)
	}
	return w.toFlush.Flush(ctx)
}

// Resets implements lun.Resetter: it counts the losses of either side's cache.
func (v *Volume) Resets() uint64 {
	if v.source == nil {
		return 0
	}
	return v.source.Resets() + v.destination.Resets()
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
	case Ready, RolledBack:
		return v.source.Extents(ctx, e)
	case Cutover:
		return nil, errRetired
	}
	w := v.way()
	side := w.from
	err := w.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		e = extent(r)
		if valid {
			side = w.to
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

// read fills p with e; the caller is inside the gate. It takes no lock: the side that is
// copied from does not change but by writes of a mirror, which readFrom looks after.
func (v *Volume) read(ctx context.Context, p []byte, e lun.Extent) error {
	switch v.Phase() {
	case Ready, RolledBack:
		return v.source.ReadAt(ctx, p, e.Start)
	case Cutover:
		return errRetired
	}
	w := v.way()
	if w.flags.All(state.Valid, run(e)) || v.hasWhole() {
		return w.to.ReadAt(ctx, p, e.Start)
	}
	if !w.flags.Any(state.Valid, run(e)) {
		return v.readFrom(ctx, w, p, e)
	}
	parts, gctx := errgroup.WithContext(ctx)
	parts.SetLimit(splitDepth)
	err := w.flags.Runs(state.Valid, run(e), func(r state.Run, valid bool) bool {
		part := extent(r)
		from := uint64(part.Start-e.Start) * uint64(v.info.BlockSize)
		q := p[from : from+v.info.Bytes(part)]
		parts.Go(func() error {
			if valid {
				return w.to.ReadAt(gctx, q, part.Start)
			}
			return v.readFrom(gctx, w, q, part)
		})
		return true
	})
	if err != nil {
		err = v.unknown(err)
	}
	return errors.Join(err, parts.Wait())
}

// hasWhole tells whether the source has everything though the volume is still rolling back, as the state
// could not be written.
func (v *Volume) hasWhole() bool { return v.Phase() == RollingBack && v.whole.Load() }

// readFrom fills p with e, which was not valid a moment ago. A mirror writes blocks that are valid to
// both sides at once. So what was read here of one that became valid meanwhile may be of a write
// that the other side does not have: who reads next, or after a crash, would see what was before
// it. Such a block is read there instead. A first write gets here only once the other side has it.
func (v *Volume) readFrom(ctx context.Context, w *pass, p []byte, e lun.Extent) error {
	err := w.from.ReadAt(ctx, p, e.Start)
	if err == nil && v.mirror.Load() == nil || !w.flags.Any(state.Valid, run(e)) {
		return err
	}
	return v.read(ctx, p, e)
}

// unknown marks the volume as degraded because flags cannot be read. Blocks of which
// it is not known where they are are neither read nor written nor copied.
func (v *Volume) unknown(err error) error {
	v.fault("state", err)
	return err
}

// change passes the gate, keeps other changes of e out and makes this one. content is
// what the blocks hold afterwards, nil for zeroes.
func (v *Volume) change(ctx context.Context, e lun.Extent, content []byte, do doer) error {
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
	return v.write(ctx, e, content, do)
}

func run(e lun.Extent) state.Run { return state.Run{Start: uint64(e.Start), Blocks: e.Blocks} }

func extent(r state.Run) lun.Extent { return lun.Extent{Start: lun.LBA(r.Start), Blocks: r.Blocks} }
