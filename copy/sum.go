package copier

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"

	"lunshift/lun"
)

// ErrChecksum marks blocks that are not what was read from the source: they changed in
// memory before they were written, or the destination gave back something else. They are
// not flagged, and their region is copied again.
var ErrChecksum = errors.New("wrong checksum")

// castagnoli is CRC32C's table; constant.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sum(block []byte) uint32 { return crc32.Checksum(block, castagnoli) }

// buffer holds the content of an extent on its way, with a checksum for each block: what
// is still to be written when the slice is locked may be any of the blocks.
type buffer struct {
	of   lun.Extent
	data []byte
	sums []uint32 // of the blocks of of, as they came from the source
}

// part is where buf holds e.
func (c *Copier) part(buf *buffer, e lun.Extent) []byte {
	at := uint64(e.Start-buf.of.Start) * uint64(c.info.BlockSize)
	return buf.data[at : at+c.info.Bytes(e)]
}

// seal takes the checksums of e, which was read just now.
func (c *Copier) seal(buf *buffer, e lun.Extent) {
	p, bs := c.part(buf, e), int(c.info.BlockSize)
	sums := buf.sums[e.Start-buf.of.Start:]
	for i := range int(e.Blocks) {
		sums[i] = sum(p[i*bs : (i+1)*bs])
	}
}

// clear makes e zeroes.
func (c *Copier) clear(buf *buffer, e lun.Extent) {
	clear(c.part(buf, e))
	for at := e.Start; at < e.End(); at++ {
		buf.sums[at-buf.of.Start] = c.zero
	}
}

// check fails with an ErrChecksum where buf does not hold e as it was read.
func (c *Copier) check(buf *buffer, e lun.Extent) error {
	n, first := c.differing(c.part(buf, e), e, func(at lun.LBA) uint32 { return buf.sums[at-buf.of.Start] })
	if n == 0 {
		return nil
	}
	c.scribbled.Add(n)
	return fmt.Errorf("%d block(s) from LBA %d on changed in memory after they were read from the source: %w", n, first, ErrChecksum)
}

// readBack reads the runs from the destination and fails with an ErrChecksum where they are
// not what want says; initiators' writes to them are kept out. It shows that the destination
// took the right data and gives it; whether the data is on the medium is the flush's to
// see to, as a destination may answer from its cache.
func (c *Copier) readBack(ctx context.Context, runs []lun.Extent, want func(lun.LBA) uint32) error {
	p := c.back.Get().(*[]byte)
	defer c.back.Put(p)
	most := uint64(len(*p)) / uint64(c.info.BlockSize)
	for _, run := range runs {
		for !run.Empty() {
			e := lun.Extent{Start: run.Start, Blocks: min(run.Blocks, most)}
			run.Start, run.Blocks = e.End(), run.Blocks-e.Blocks
			q := (*p)[:c.info.Bytes(e)]
			if err := c.Destination.ReadAt(ctx, q, e.Start); err != nil {
				return fmt.Errorf("read %v back from the destination: %w", e, err)
			}
			if n, first := c.differing(q, e, want); n > 0 {
				c.misread.Add(n)
				return fmt.Errorf("the destination gives %d block(s) from LBA %d on otherwise than they were written; they are copied again: %w", n, first, ErrChecksum)
			}
		}
	}
	return nil
}

// differing counts the blocks of p, the content of e, whose checksum is not what want says,
// and names the first.
func (c *Copier) differing(p []byte, e lun.Extent, want func(lun.LBA) uint32) (n uint64, first lun.LBA) {
	bs := int(c.info.BlockSize)
	for i := range int(e.Blocks) {
		at := e.Start + lun.LBA(i)
		if sum(p[i*bs:(i+1)*bs]) == want(at) {
			continue
		}
		if n == 0 {
			first = at
		}
		n++
	}
	return n, first
}
