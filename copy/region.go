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
	d := done{job: j, era: c.Ledger.Begin(e), compare: c.compare.Load()}
	blank, err := c.blank(ctx, e)
	switch {
	case err != nil:
	case j.hole:
		err = c.copyHole(ctx, e, blank, &d)
	default:
		err = c.copyRegion(ctx, e, blank, &d)
	}
	return d, err
}

// copyRegion copies e, a region at the most; blank is what of it is blank on the
// destination.
func (c *Copier) copyRegion(ctx context.Context, e lun.Extent, blank []lun.Extent, d *done) error {
	need, err := c.Ledger.Invalid(e)
	if err != nil || len(need) == 0 {
		return err
	}
	buf := c.pool.Get().(*buffer)
	defer c.pool.Put(buf)
	buf.of = e
	var there *held // nil: nothing is compared
	var bad []lun.Extent
	if d.compare {
		there = c.held.Get().(*held)
		defer c.held.Put(there)
		bad, err = c.readBoth(ctx, buf, there, need, blank)
	} else {
		bad, err = c.read(ctx, buf, need)
	}
	if err != nil {
		return err
	}
	c.Ledger.Unreadable(ctx, e, bad)
	if len(bad) > 0 {
		d.unreadable = fmt.Errorf("the %s cannot read %v and %d other runs of blocks near it", c.from(), bad[0], len(bad)-1)
		need = without(need, bad)
	}
	for _, run := range need {
		for !run.Empty() {
			slice := run
			slice.Blocks = min(slice.Blocks, sliceBytes/uint64(c.info.BlockSize))
			run.Start, run.Blocks = slice.End(), run.Blocks-slice.Blocks
			if err := c.writeSlice(ctx, buf, there, slice, blank, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// read fills buf with what the source has for the runs in need; unallocated blocks are
// zeroes without being read. It gives the runs that the source cannot read.
func (c *Copier) read(ctx context.Context, buf *buffer, need []lun.Extent) (bad []lun.Extent, err error) {
	read := func(e lun.Extent) error { return c.readRun(ctx, buf, e) }
	at := buf.of.Start
	for _, r := range c.together(c.stored(need)) {
		c.clear(buf, lun.Extent{Start: at, Blocks: uint64(r.whole.Start - at)})
		err := read(r.whole)
		if err != nil && (len(r.parts) > 1 || lun.MediumError(err)) && ctx.Err() == nil {
			// What nobody needs may be what cannot be read. What lies between the parts has no
			// storage, and is not in the buffer now.
			err = nil
			c.clear(buf, r.whole)
			for _, part := range r.parts {
				var lost []lun.Extent
				if lost, err = salvage(part, read); err != nil {
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

// stored gives what of the runs the source has storage for.
func (c *Copier) stored(runs []lun.Extent) (in []lun.Extent) {
	for _, run := range runs {
		in = append(in, c.allocation.Load().Within(run)...)
	}
	return in
}

// reading is a run that is read as one for the sake of its parts.
type reading struct {
	whole lun.Extent
	parts []lun.Extent
}

// together makes one reading of runs that lie close together; they are in rising order.
func (c *Copier) together(runs []lun.Extent) (reads []reading) {
	gap := uint64(readGapBytes) / uint64(c.info.BlockSize)
	for _, run := range runs {
		if n := len(reads); n > 0 && uint64(run.Start-reads[n-1].whole.End()) <= gap {
			last := &reads[n-1]
			last.whole.Blocks = uint64(run.End() - last.whole.Start)
			last.parts = append(last.parts, run)
		} else {
			reads = append(reads, reading{run, []lun.Extent{run}})
		}
	}
	return reads
}

// salvage reads what can be read of run, and gives the blocks that cannot.
func salvage(run lun.Extent, read func(lun.Extent) error) (bad []lun.Extent, err error) {
	err = read(run)
	switch {
	case err == nil || !lun.MediumError(err):
		return nil, err
	case run.Blocks == 1:
		return []lun.Extent{run}, nil
	}
	half := lun.Extent{Start: run.Start, Blocks: run.Blocks / 2}
	rest := lun.Extent{Start: half.End(), Blocks: run.Blocks - half.Blocks}
	for _, part := range [...]lun.Extent{half, rest} {
		lost, err := salvage(part, read)
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
	if err := c.allow(ctx, len(p)); err != nil {
		return err
	}
	if err := c.Source.ReadAt(ctx, p, e.Start); err != nil {
		return fmt.Errorf("read %v of the %s: %w", e, c.from(), err)
	}
	c.seal(buf, e)
	c.bytesRead.Add(uint64(len(p)))
	return nil
}

// writeSlice writes those blocks of slice that are still not valid and that the destination
// is not known to hold already, with initiators' writes to the slice kept out, and reads
// them back where that is asked for.
func (c *Copier) writeSlice(ctx context.Context, buf *buffer, there *held, slice lun.Extent, blank []lun.Extent, d *done) error {
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
	write := func(p []byte, e lun.Extent, zero bool) error {
		nothing := zero && inside(blank, e)
		if zero {
			d.skipped += uint64(len(p))
		} else {
			d.copied += uint64(len(p))
		}
		if !nothing {
			written = lun.Join(written, e)
		}
		put := func() error {
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
			if err := put(); err != nil {
				return fmt.Errorf("write %v of the %s: %w", e, c.to(), err)
			}
			return nil
		})
		return nil
	}
	for _, run := range still {
		d.compared += there.compared(run) * uint64(c.info.BlockSize)
		err = there.split(run, func(e lun.Extent, f finding) error {
			switch f {
			case equal:
				d.equal += c.info.Bytes(e)
			case empty:
				d.skipped += c.info.Bytes(e)
			default:
				return splitZeroes(c.part(buf, e), e, c.info.BlockSize, write)
			}
			return c.check(buf, e) // it is the source's content that is there
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
// destination; blank is where they do.
func (c *Copier) copyHole(ctx context.Context, e lun.Extent, blank []lun.Extent, d *done) error {
	slice := uint64(sliceBytes) / uint64(c.info.BlockSize)
	info := c.Destination.Info()
	transfers := !info.Thin || !info.UnmapZeroes
	for !e.Empty() {
		part := e
		if d.compare && !inside(blank, e) {
			part.Blocks = min(e.Blocks, c.RegionBlocks)
			if !inside(blank, part) {
				if err := c.copyRegion(ctx, part, blank, d); err != nil {
					return err
				}
				e.Start, e.Blocks = part.End(), e.Blocks-part.Blocks
				continue
			}
		}
		release, locked, err := func() {}, false, error(nil)
		if inside(blank, part) {
			// Nothing is to be written, so the lock is held for an instant,
			// however long the extent is. It must not be waited for: writes
			// that come later would wait as well.
			release, locked = c.Ledger.TryExclude(part)
		}
		if !locked {
			part.Blocks = min(part.Blocks, slice)
			if transfers && !inside(blank, part) {
				if err := c.allow(ctx, int(c.info.Bytes(part))); err != nil {
					return err
				}
			}
			if release, err = c.Ledger.Exclude(ctx, part); err != nil {
				return err
			}
		}
		err = c.zeroPart(ctx, part, blank, d)
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
				return fmt.Errorf("zero %v of the %s: %w", run, c.to(), err)
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

// tellsBlank tells whether the destination says which of its blocks have no storage, and
// these read as zeroes.
func tellsBlank(info lun.Info) bool { return info.ReportsAllocation && info.UnmapZeroes }

// blank gives the runs of e that the destination has no storage for and that read
// as zeroes there, in rising order.
func (c *Copier) blank(ctx context.Context, e lun.Extent) ([]lun.Extent, error) {
	if !tellsBlank(c.Destination.Info()) {
		return nil, nil
	}
	var blank []lun.Extent
	for !e.Empty() {
		list, err := c.Destination.Extents(ctx, e)
		if cannotTell(err) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the allocation of %v of the %s: %w", e, c.to(), err)
		}
		if len(list) == 0 {
			return nil, fmt.Errorf("read the allocation of %v of the %s: no answer", e, c.to())
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
