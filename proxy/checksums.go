package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"time"

	"lunshift/lun"
	"lunshift/state"
)

const (
	// mostChecksums bounds the checksums of one volume: they are kept as one value of at most
	// state.MostAttached, and people read them.
	mostChecksums = 1024
	// leastChecksum is the shortest extent that has a checksum of its own, in bytes.
	leastChecksum = 1 << 20
)

// Why an extent has no checksum. The content of such blocks was not compared, or is not what it
// was then, so nobody could make the sum again.
const (
	// UncoveredWritten: initiators wrote in it since the start.
	UncoveredWritten = "written by initiators"
	// UncoveredFree: blocks of it were free in a file system and not copied.
	UncoveredFree = "left out as free"
	// UncoveredUnreadable: the source could not read blocks of it, and they were given up.
	UncoveredUnreadable = "given up as unreadable"
	// UncoveredDifferent: source and destination differed in it.
	UncoveredDifferent = "different"
)

// Checksums are those of the extents of a volume whose content a comparison of everything found
// equal on source and destination. A checksum is the SHA-256 of all bytes of its extent in
// the order of the blocks; what had storage on neither side counts as zeroes, as it is read.
type Checksums struct {
	// At is when the comparison ended.
	At time.Time `json:"at"`
	// ExtentBytes is the length of an extent, a power of two from 1 MiB on; the last one may be
	// shorter.
	ExtentBytes uint64 `json:"extent_bytes"`
	// Withheld says why there are none; Extents is empty then.
	Withheld string     `json:"withheld,omitempty"`
	Extents  []Checksum `json:"extents"`
}

// Checksum is one extent of Checksums.
type Checksum struct {
	LBA    uint64 `json:"lba"`
	Blocks uint64 `json:"blocks"`
	// SHA256 is in hexadecimal; empty where Uncovered says why there is none.
	SHA256    string `json:"sha256,omitempty"`
	Uncovered string `json:"uncovered,omitempty"`
}

// ReadChecksums gives the checksums of the last full comparison of a volume as far as they hold by
// now: an extent that an initiator wrote in since has none any more. nil where there was no such
// comparison, or the state was forgotten. It is for a volume that is served and for one
// that is not.
func ReadChecksums(store *state.Store, volume string) (*Checksums, error) {
	r, found, err := store.Record(volume)
	if err != nil || !found {
		return nil, err
	}
	data, err := store.Attached(volume, state.Checksums)
	if err != nil || data == nil {
		return nil, err
	}
	c := &Checksums{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("volume %s: its checksums are not readable: %w", volume, err)
	}
	if r.StartedAt == nil || c.At.Before(*r.StartedAt) {
		return nil, nil
	}
	// Only in one direction and without a mirror a block that was written stays dirty.
	switch {
	case r.RollbackAt != nil:
		c.Withheld = "the volume was rolled back after the comparison"
	case r.Mirrored:
		c.Withheld = "writes went to both sides (mirror), after which it is not known any more which blocks initiators wrote"
	}
	if c.Withheld != "" {
		c.Extents = []Checksum{}
		return c, nil
	}
	flags, err := store.Flags(volume, state.Geometry{Blocks: r.Blocks, RegionBlocks: r.RegionBlocks})
	if err != nil {
		return nil, err
	}
	c.drop(flags.Any)
	return c, nil
}

// drop takes the sums of extents away in which there is a dirty block.
func (c *Checksums) drop(dirty func(state.Kinds, state.Run) bool) {
	for i := range c.Extents {
		if x := &c.Extents[i]; x.SHA256 != "" && dirty(state.Dirty, state.Run{Start: x.LBA, Blocks: x.Blocks}) {
			x.SHA256, x.Uncovered = "", UncoveredWritten
		}
	}
}

// summing makes the checksums of a comparison. It is given what was compared in the order of the
// blocks, one call at a time.
type summing struct {
	info   lun.Info
	blocks uint64 // of an extent
	list   []Checksum
	at     lun.LBA // all before it is in
	sum    hash.Hash
	zeroes []byte
	zero   string // the sum of a whole extent of zeroes, once it is known
}

// newSumming begins the checksums of a volume. Extents with a block in one of the uncovered runs
// have none, for the reason that is the key.
func newSumming(info lun.Info, dirty func(state.Kinds, state.Run) bool, free, unreadable []lun.Extent) *summing {
	size := uint64(leastChecksum)
	for (info.Size()+size-1)/size > mostChecksums {
		size *= 2
	}
	s := &summing{info: info, blocks: size / uint64(info.BlockSize), sum: sha256.New(), zeroes: make([]byte, verifyChunk)}
	for at := uint64(0); at < info.Blocks; at += s.blocks {
		s.list = append(s.list, Checksum{LBA: at, Blocks: min(s.blocks, info.Blocks-at)})
	}
	for _, e := range unreadable {
		s.uncover(e, UncoveredUnreadable)
	}
	for _, e := range free {
		s.uncover(e, UncoveredFree)
	}
	// It saves the time to sum up what is dropped in the end anyway.
	for i := range s.list {
		if x := &s.list[i]; x.Uncovered == "" && dirty(state.Dirty, state.Run{Start: x.LBA, Blocks: x.Blocks}) {
			x.Uncovered = UncoveredWritten
		}
	}
	return s
}

// uncover says of the extents in which e lies why they have no checksum; the first reason stays.
func (s *summing) uncover(e lun.Extent, why string) {
	if e.Empty() {
		return
	}
	for i := uint64(e.Start) / s.blocks; i <= (uint64(e.End())-1)/s.blocks; i++ {
		if s.list[i].Uncovered == "" {
			s.list[i].Uncovered = why
		}
	}
}

// add takes the content of e up, which lies after all that was added before; what lies between is
// zeroes. Where uncovered says why, there is no content that counts.
func (s *summing) add(e lun.Extent, content []byte, uncovered string) {
	s.fill(lun.Extent{Start: s.at, Blocks: uint64(e.Start - s.at)}, nil)
	if uncovered != "" {
		s.uncover(e, uncovered)
	}
	s.fill(e, content)
}

// fill sums e up, which begins where all before ends; a nil content is zeroes.
func (s *summing) fill(e lun.Extent, content []byte) {
	bs := uint64(s.info.BlockSize)
	for !e.Empty() {
		x := &s.list[uint64(e.Start)/s.blocks]
		end := lun.LBA(x.LBA + x.Blocks)
		n := min(e.Blocks, uint64(end-e.Start))
		whole := content == nil && n == s.blocks
		switch {
		case x.Uncovered != "":
		case content != nil:
			s.sum.Write(content[:n*bs])
		case whole && s.zero != "":
			x.SHA256 = s.zero
		default:
			for left := n * bs; left > 0; {
				part := min(left, uint64(len(s.zeroes)))
				s.sum.Write(s.zeroes[:part])
				left -= part
			}
		}
		if content != nil {
			content = content[n*bs:]
		}
		e.Start, e.Blocks = e.Start+lun.LBA(n), e.Blocks-n
		s.at = e.Start
		if s.at != end {
			continue
		}
		if x.Uncovered == "" && x.SHA256 == "" {
			x.SHA256 = hex.EncodeToString(s.sum.Sum(nil))
		}
		if whole && x.Uncovered == "" {
			s.zero = x.SHA256
		}
		s.sum.Reset()
	}
}

// keepChecksums writes down what the comparison of everything summed up; ReadChecksums knows what of
// it initiators wrote meanwhile.
func (x *verification) keepChecksums(ctx context.Context) error {
	s := x.sums
	s.fill(lun.Extent{Start: s.at, Blocks: s.info.Blocks - uint64(s.at)}, nil)
	c := Checksums{At: x.report.EndedAt, ExtentBytes: s.blocks * uint64(s.info.BlockSize), Extents: s.list}
	data, err := json.Marshal(c)
	if err != nil {
		return x.v.errorf("encode its checksums: %w", err)
	}
	if err := x.v.store.Attach(ctx, x.v.cfg.Name, state.Checksums, data); err != nil {
		return x.v.errorf("keep its checksums: %w", err)
	}
	return nil
}
