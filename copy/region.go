package copier

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"lunshift/lun"
)

// copy brings the blocks of a job that are not valid onto the destination.
func (c *Copier) copy(ctx context.Context, j job) (done, error) {
	e := c.extent(j)
	d := done{job: j, era: c.Ledger.Begin(e)}
	var err error
	if j.hole {
		err = c.copyHole(ctx, e, &d)
	} else {
		err = c.copyRegion(ctx, e, &d)
	}
	return d, err
}

func (c *Copier) copyRegion(ctx context.Context, e lun.Extent, d *done) error {
	need, err := c.Ledger.Invalid(e)
	if err != nil || len(need) == 0 {
		return err
	}
	blank, err := c.blank(ctx, e)
	if err != nil {
		return err
	}
	buf := c.pool.Get().(*buffer)
	defer c.pool.Put(buf)
	buf.of = e
	bad, err := c.read(ctx, buf, need)
	if err != nil {
		return err
	}
	c.Ledger.Unreadable(ctx, e, bad)
	if len(bad) > 0 {
		d.unreadable = fmt.Errorf("the source cannot read %v and %d other runs of blocks near it", bad[0], len(bad)-1)
		need = without(need, bad)
	}
	for _, run := range need {
		for !run.Empty() {
			slice := run
			slice.Blocks = min(slice.Blocks, sliceBytes/uint64(c.info.BlockSize))
			run.Start, run.Blocks = slice.End(), run.Blocks-slice.Blocks
			if err := c.writeSlice(ctx, buf, slice, blank, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// read fills buf with what the source has for the runs in need; unallocated blocks are
// zeroes without being read. It gives the runs that the source cannot read.
func (c *Copier) read(ctx context.Context, buf *buffer, need []lun.Extent) (bad []lun.Extent, err error) {
	// Runs that lie close together are read as one.
	type read struct {
		whole lun.Extent
		parts []lun.Extent
	}
	var reads []read
	gap := uint64(readGapBytes) / uint64(c.info.BlockSize)
	for _, run := range need {
		for _, a := range c.allocation.Load().Within(run) {
			if n := len(reads); n > 0 && uint64(a.Start-reads[n-1].whole.End()) <= gap {
				last := &reads[n-1]
				last.whole.Blocks = uint64(a.End() - last.whole.Start)
				last.parts = append(last.parts, a)
			} else {
				reads = append(reads, read{a, []lun.Extent{a}})
			}
		}
	}
	at := buf.of.Start
	for _, r := range reads {
		c.clear(buf, lun.Extent{Start: at, Blocks: uint64(r.whole.Start - at)})
		err := c.readRun(ctx, buf, r.whole)
		if err != nil && (len(r.parts) > 1 || lun.MediumError(err)) && ctx.Err() == nil {
			// What nobody needs may be what cannot be read. What lies between the parts has no
			// storage, and is not in the buffer now.
			err = nil
			c.clear(buf, r.whole)
			for _, part := range r.parts {
				var lost []lun.Extent
				if lost, err = c.salvage(ctx, buf, part); err != nil {
					break
				}
				bad = append(bad, lost...)
			}
		}
		if err != nil {
			return nil, err
		}
		at = r.whole.End()
	}
	c.clear(buf, lun.Extent{Start: at, Blocks: uint64(buf.of.End() - at)})
	return bad, nil
}

// salvage reads what can be read of run, and gives the blocks that cannot.
func (c *Copier) salvage(ctx context.Context, buf *buffer, run lun.Extent) (bad []lun.Extent, err error) {
	err = c.readRun(ctx, buf, run)
	switch {
	case err == nil || !lun.MediumError(err):
		return nil, err
	case run.Blocks == 1:
		return []lun.Extent{run}, nil
	}
	half := lun.Extent{Start: run.Start, Blocks: run.Blocks / 2}
	rest := lun.Extent{Start: half.End(), Blocks: run.Blocks - half.Blocks}
	for _, part := range [...]lun.Extent{half, rest} {
		lost, err := c.salvage(ctx, buf, part)
		if err != nil {
			return nil, err
		}
		for _, e := range lost {
			bad = lun.Join(bad, e)
		}
	}
	return bad, nil
}

// without gives the blocks of runs that are not in bad.
func without(runs, bad []lun.Extent) []lun.Extent {
	for _, b := range bad {
		runs = lun.Subtract(runs, b)
	}
	return runs
}

// readRun reads e from the source, and has its checksums at once.
func (c *Copier) readRun(ctx context.Context, buf *buffer, e lun.Extent) error {
	p := c.part(buf, e)
	if err := c.Throttle.Wait(ctx, len(p)); err != nil {
		return err
	}
	if err := c.Source.ReadAt(ctx, p, e.Start); err != nil {
		return fmt.Errorf("read %v of the source: %w", e, err)
	}
	c.seal(buf, e)
	c.bytesRead.Add(uint64(len(p)))
	return nil
}

// writeSlice writes those blocks of slice that are still not valid, with
// initiators' writes to the slice kept out, and reads them back where that is asked for.
func (c *Copier) writeSlice(ctx context.Context, buf *buffer, slice lun.Extent, blank []lun.Extent, d *done) error {
	release, err := c.Ledger.Exclude(ctx, slice)
	if err != nil {
		return err
	}
	defer release()
	var writes errgroup.Group
	writes.SetLimit(16)
	still, err := c.Ledger.Invalid(slice)
	if err != nil {
		return err
	}
	var written []lun.Extent
	for _, run := range still {
		err = splitZeroes(c.part(buf, run), run, c.info.BlockSize, func(p []byte, e lun.Extent, zero bool) error {
			nothing := zero && inside(blank, e)
			if zero {
				d.skipped += uint64(len(p))
			} else {
				d.copied += uint64(len(p))
			}
			if !nothing {
				written = lun.Join(written, e)
			}
			write := func() error {
				// As late as can be: what changes the buffer after this is for the readback
				// to find.
				if err := c.check(buf, e); err != nil {
					return err
				}
				switch {
				case nothing:
					return nil
				case zero:
					return c.Destination.WriteZeroes(ctx, e)
				}
				return c.Destination.WriteAt(ctx, p, e.Start)
			}
			writes.Go(func() error {
				if err := write(); err != nil {
					return fmt.Errorf("write %v of the destination: %w", e, err)
				}
				return nil
			})
			return nil
		})
		if err != nil {
			break
		}
	}
	// Every write has ended before the lock goes, whatever failed.
	err = errors.Join(err, writes.Wait())
	if err == nil && c.readback.Load() {
		err = c.readBack(ctx, written, func(at lun.LBA) uint32 { return buf.sums[at-buf.of.Start] })
	}
	if err == nil {
		d.extents = append(d.extents, still...)
	}
	return err
}

// copyHole makes the blocks of e that are not valid read as zeroes on the
// destination.
func (c *Copier) copyHole(ctx context.Context, e lun.Extent, d *done) error {
	blank, err := c.blank(ctx, e)
	if err != nil {
		return err
	}
	slice := uint64(sliceBytes) / uint64(c.info.BlockSize)
	info := c.Destination.Info()
	transfers := !info.Thin || !info.UnmapZeroes
	for !e.Empty() {
		part := e
		release, locked := func() {}, false
		if inside(blank, e) {
			// Nothing is to be written, so the lock is held for an instant,
			// however long the extent is. It must not be waited for: writes
			// that come later would wait as well.
			release, locked = c.Ledger.TryExclude(e)
		}
		if !locked {
			part.Blocks = min(part.Blocks, slice)
			if transfers && !inside(blank, part) {
				if err := c.Throttle.Wait(ctx, int(c.info.Bytes(part))); err != nil {
					return err
				}
			}
			if release, err = c.Ledger.Exclude(ctx, part); err != nil {
				return err
			}
		}
		err := c.zeroPart(ctx, part, blank, d)
		release()
		if err != nil {
			return err
		}
		e.Start, e.Blocks = part.End(), e.Blocks-part.Blocks
	}
	return nil
}

// zeroPart makes the blocks of part that are not valid read as zeroes on the
// destination; initiators' writes to it are kept out.
func (c *Copier) zeroPart(ctx context.Context, part lun.Extent, blank []lun.Extent, d *done) error {
	runs, err := c.Ledger.Invalid(part)
	if err != nil {
		return err
	}
	for _, run := range runs {
		if !inside(blank, run) {
			if err := c.Destination.WriteZeroes(ctx, run); err != nil {
				return fmt.Errorf("zero %v of the destination: %w", run, err)
			}
			if c.readback.Load() {
				if err := c.readBack(ctx, []lun.Extent{run}, func(lun.LBA) uint32 { return c.zero }); err != nil {
					return err
				}
			}
		}
		d.skipped += c.info.Bytes(run)
		d.extents = append(d.extents, run)
	}
	return nil
}

// blank gives the runs of e that the destination has no storage for and that read
// as zeroes there, in rising order.
func (c *Copier) blank(ctx context.Context, e lun.Extent) ([]lun.Extent, error) {
	info := c.Destination.Info()
	if !info.ReportsAllocation || !info.UnmapZeroes {
		return nil, nil
	}
	var blank []lun.Extent
	for !e.Empty() {
		list, err := c.Destination.Extents(ctx, e)
		if cannotTell(err) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the allocation of %v of the destination: %w", e, err)
		}
		if len(list) == 0 {
			return nil, fmt.Errorf("read the allocation of %v of the destination: no answer", e)
		}
		for _, a := range list {
			if !a.Allocated {
				blank = lun.Join(blank, a.Extent)
			}
		}
		at := list[len(list)-1].End()
		e.Start, e.Blocks = at, uint64(e.End()-at)
	}
	return blank, nil
}

// inside tells whether one of runs holds all of e.
func inside(runs []lun.Extent, e lun.Extent) bool {
	for _, r := range runs {
		if r.Start <= e.Start && e.End() <= r.End() {
			return true
		}
	}
	return false
}
