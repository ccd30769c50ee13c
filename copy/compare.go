package copier

import (
	"bytes"
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"lunshift/lun"
)

// A destination that holds most of the data already is compared: what it holds is read
// beside the source, and only blocks that differ are written. Nobody is kept out of the
// blocks while they are read. Once they are, those that are still not valid hold what was
// read: a write of an initiator would have made them valid, and one that failed has the
// Ledger leave them out of the Commit. So an equal block is flagged as a copied one is, in
// the same era and after the same flush, which makes stable what was read from a cache.

// finding is what is known of a block of the destination.
type finding byte

const (
	unknown   finding = iota // not read
	differing                // read, and not what the source holds
	equal                    // read, and what the source holds
	empty                    // not read: zeroes on the source, and blank
)

// held is what the destination holds of an extent.
type held struct {
	of    lun.Extent
	data  []byte
	found []finding // of the blocks of of
}

// readBoth fills buf from the source and there from the destination, at the same time, as
// read does, and compares them. Blank blocks of the destination are not read: the device says
// what they hold. So are those that it cannot read, which a write may mend.
func (c *Copier) readBoth(ctx context.Context, buf *buffer, there *held, need, blank []lun.Extent) (bad []lun.Extent, err error) {
	there.of = buf.of
	clear(there.found)
	sides, sctx := errgroup.WithContext(ctx)
	sides.Go(func() (err error) {
		bad, err = c.read(sctx, buf, need)
		return err
	})
	sides.Go(func() error { return c.readThere(sctx, there, lun.Without(need, blank)) })
	if err := sides.Wait(); err != nil {
		return nil, err
	}
	bs := int(c.info.BlockSize)
	for i := range there.found {
		if there.found[i] == differing && bytes.Equal(buf.data[i*bs:(i+1)*bs], there.data[i*bs:(i+1)*bs]) {
			there.found[i] = equal
		}
	}
	for _, e := range blank {
		for at, end := max(e.Start, buf.of.Start), min(e.End(), buf.of.End()); at < end; at++ {
			i := int(at - buf.of.Start)
			if isZero(buf.data[i*bs : (i+1)*bs]) {
				there.found[i] = empty
			}
		}
	}
	return bad, nil
}

// readThere reads the runs from the destination and marks what could be read.
func (c *Copier) readThere(ctx context.Context, there *held, runs []lun.Extent) error {
	// The rest is waited for by the read of the source.
	if alone := c.bytes(runs) - c.bytes(c.stored(runs)); alone > 0 {
		if err := c.allow(ctx, int(alone)); err != nil {
			return err
		}
	}
	read := func(e lun.Extent) error {
		at := uint64(e.Start-there.of.Start) * uint64(c.info.BlockSize)
		if err := c.Destination.ReadAt(ctx, there.data[at:at+c.info.Bytes(e)], e.Start); err != nil {
			return fmt.Errorf("read %v of the %s: %w", e, c.to(), err)
		}
		return nil
	}
	for _, r := range c.together(runs) {
		err := read(r.whole)
		switch {
		case err == nil:
			for _, part := range r.parts {
				there.mark(part, differing)
			}
		case !lun.MediumError(err):
			return err
		default:
			for _, part := range r.parts {
				bad, err := salvage(part, read)
				if err != nil {
					return err
				}
				there.mark(part, differing)
				for _, e := range bad {
					there.mark(e, unknown)
				}
			}
		}
	}
	return nil
}

func (h *held) mark(e lun.Extent, f finding) {
	for at := e.Start; at < e.End(); at++ {
		h.found[at-h.of.Start] = f
	}
}

// compared is how many blocks of e were read; none of a nil held.
func (h *held) compared(e lun.Extent) (n uint64) {
	if h == nil {
		return 0
	}
	for _, f := range h.found[e.Start-h.of.Start : e.End()-h.of.Start] {
		if f == equal || f == differing {
			n++
		}
	}
	return n
}

// split cuts e into runs that are equal, empty or to be written, and hands each to yield
// until it returns an error. Of a nil held everything is to be written.
func (h *held) split(e lun.Extent, yield func(e lun.Extent, f finding) error) error {
	if h == nil {
		return yield(e, unknown)
	}
	is := func(at lun.LBA) finding {
		if f := h.found[at-h.of.Start]; f != differing {
			return f
		}
		return unknown
	}
	for !e.Empty() {
		run := lun.Extent{Start: e.Start, Blocks: 1}
		for run.Blocks < e.Blocks && is(run.End()) == is(run.Start) {
			run.Blocks++
		}
		if err := yield(run, is(run.Start)); err != nil {
			return err
		}
		e.Start, e.Blocks = run.End(), e.Blocks-run.Blocks
	}
	return nil
}
