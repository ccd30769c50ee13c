package proxy

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"lunshift/lun"
)

// The places of a destination that are looked at before a migration overwrites it.
const (
	blankEdge    = 1 << 20   // bytes at its beginning and at its end
	blankSample  = 64 << 10  // bytes at each place between
	blankSamples = 128       // evenly spaced places between
	blankStep    = 256 << 10 // bytes a read
	blankExtents = 128       // allocated extents, of devices that tell, at whose beginning
)

// Check gives every reason for which a migration from source to destination is
// refused, each one line; none means that Start goes ahead. With overwrite the
// destination may hold data. It reads both devices and writes nothing. An error is returned only when a device cannot be read.
func Check(ctx context.Context, source, destination lun.Device, overwrite bool) ([]error, error) {
	var refused []error
	refuse := func(format string, args ...any) {
		refused = append(refused, &Refusal{fmt.Sprintf(format, args...)})
	}
	s, d := source.Info(), destination.Info()
	if s.ID == d.ID {
		refuse("source and destination are the same device (%s): name two different LUNs", s.ID)
		return refused, nil // anything else follows from this
	}
	if s.BlockSize != d.BlockSize {
		refuse("block sizes differ: source %d bytes, destination %d: make the destination LUN with %d-byte blocks", s.BlockSize, d.BlockSize, s.BlockSize)
	} else if d.Blocks < s.Blocks {
		refuse("destination is smaller than the source: %d of %d bytes: make the destination LUN at least as large", d.Size(), s.Size())
	}
	if overwrite {
		return refused, nil
	}
	at, dirty, err := findData(ctx, destination)
	if err != nil {
		return refused, fmt.Errorf("look whether the destination is blank: %w", err)
	}
	if dirty {
		refuse("destination is not blank: it holds data near byte %d (LBA %d): name a blank LUN, set overwrite = true if its content may go, or seeded = true (lunshift start --reuse) if it has most of the data; if a migration was begun and its state is lost, see lunshift adopt --rebuild",
			uint64(at)*uint64(d.BlockSize), at)
	}
	return refused, nil
}

// findData looks for a block that is not zero at the edges of dev and at evenly
// spaced places between, and tells where it found one.
func findData(ctx context.Context, dev lun.Device) (at lun.LBA, found bool, err error) {
	info := dev.Info()
	size, bs := info.Size(), uint64(info.BlockSize)
	look := func(ctx context.Context, from, length uint64) error {
		from -= from % bs
		for end := min(from+length, size); from < end; from += blankStep {
			p := make([]byte, min(blankStep, end-from)/bs*bs)
			if err := dev.ReadAt(ctx, p, lun.LBA(from/bs)); err != nil {
				return err
			}
			for i, b := range p {
				if b != 0 {
					return dataAt(lun.LBA((from + uint64(i)) / bs))
				}
			}
		}
		return nil
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	g.Go(func() error { return look(gctx, 0, blankEdge) })
	g.Go(func() error { return look(gctx, size-min(size, blankEdge), blankEdge) })
	for i := range uint64(blankSamples) {
		g.Go(func() error { return look(gctx, size/(blankSamples+1)*(i+1), blankSample) })
	}
	g.Go(func() error { return eachAllocated(gctx, dev, look) })
	err = g.Wait()
	if at, ok := err.(dataAt); ok {
		return lun.LBA(at), true, nil
	}
	return 0, false, err
}

// eachAllocated has look read the beginning of the first extents that dev has storage for,
// where it tells.
func eachAllocated(ctx context.Context, dev lun.Device, look func(ctx context.Context, from, length uint64) error) error {
	info := dev.Info()
	if !info.ReportsAllocation {
		return nil
	}
	looked := 0
	for at, asked := lun.LBA(0), 0; uint64(at) < info.Blocks && looked < blankExtents && asked < 8*blankExtents; asked++ {
		extents, err := dev.Extents(ctx, lun.Extent{Start: at, Blocks: info.Blocks - uint64(at)})
		if err != nil {
			return err
		}
		next := at
		for _, e := range extents {
			if next = e.End(); e.Allocated && looked < blankExtents {
				looked++
				if err := look(ctx, uint64(e.Start)*uint64(info.BlockSize), min(info.Bytes(e.Extent), blankSample)); err != nil {
					return err
				}
			}
		}
		if next <= at {
			return nil
		}
		at = next
	}
	return nil
}

// dataAt is where data was found; it travels as an error so that the other
// looks end.
type dataAt lun.LBA

func (d dataAt) Error() string { return fmt.Sprintf("data at LBA %d", uint64(d)) }
