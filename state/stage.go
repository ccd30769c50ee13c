package state

import (
	"maps"
	"math/bits"
	"slices"
)

const (
	// chunkRegions is how many regions' all bits one key holds: 8 GiB of a volume
	// in regions of 1 MiB, 1 KiB of value.
	chunkRegions = 8192
	chunkWords   = chunkRegions / 64
)

// stage works out what a batch makes of one volume's flags: what is visible plus
// what the batch sets. Nothing is visible before publish. Only the committer uses
// it, so that what is visible does not change under it.
type stage struct {
	f *Flags
	// chunks holds new all bits by chunk, regions new bitmaps by region, nil where
	// the batch leaves the kind alone.
	chunks  map[uint64]*[kindCount][chunkWords]uint64
	regions map[uint64]*stagedRegion
	blocks  [kindCount]uint64 // newly set
	err     error             // why the batch cannot be worked out
}

// stagedRegion is a region that a batch changes.
type stagedRegion struct {
	old, fresh regionBitmaps
	pinned     bool // old is
}

func newStage(f *Flags) *stage {
	return &stage{
		f:       f,
		chunks:  map[uint64]*[kindCount][chunkWords]uint64{},
		regions: map[uint64]*stagedRegion{},
	}
}

// set adds the kinds in k to the blocks of r, which lies within the volume.
func (s *stage) set(k Kinds, r Run) {
	f := s.f
	for i := range f.kinds {
		if k&(1<<i) == 0 {
			continue
		}
		for at := r.Start; at < r.end(); {
			g := at >> f.shift
			lo := at - g<<f.shift
			if whole := s.wholeUntil(r); lo == 0 && whole > g {
				s.setAll(i, g, whole)
				at = min(whole<<f.shift, r.end())
				continue
			}
			n := min(r.end()-at, f.geo.RegionBlocks-lo)
			s.setPart(i, g, lo, n)
			at += n
		}
	}
}

// wholeUntil is the first region that r, if it held every block before its end,
// would not hold as a whole.
func (s *stage) wholeUntil(r Run) uint64 {
	if r.end() == s.f.geo.Blocks {
		return s.f.regions
	}
	return r.end() >> s.f.shift
}

// setAll makes the regions from g up to end all.
func (s *stage) setAll(i int, g, end uint64) {
	for g < end {
		c := g / chunkRegions
		stop := min(end, (c+1)*chunkRegions)
		if s.f.nextNotAll(i, g, stop) < stop {
			setBits(s.chunk(c)[i][:], g%chunkRegions, stop-g)
		}
		g = stop
	}
}

// setPart sets n bits from lo on of region g.
func (s *stage) setPart(i int, g, lo, n uint64) {
	if s.isAll(i, g) {
		return
	}
	r := s.region(g)
	if r.fresh[i] == nil {
		r.fresh[i] = make([]uint64, s.f.words)
		copy(r.fresh[i], r.old[i])
	}
	setBits(r.fresh[i], lo, n)
	if countBits(r.fresh[i]) == s.f.regionBlocks(g) {
		s.setAll(i, g, g+1)
	}
}

// isAll tells whether region g is all, with the batch.
func (s *stage) isAll(i int, g uint64) bool {
	if s.f.isAll(i, g) {
		return true
	}
	c := s.chunks[g/chunkRegions]
	return c != nil && c[i][g%chunkRegions/64]>>(g%64)&1 != 0
}

func (s *stage) chunk(c uint64) *[kindCount][chunkWords]uint64 {
	p := s.chunks[c]
	if p == nil {
		p = new([kindCount][chunkWords]uint64)
		for i := range p {
			for w := range p[i] {
				p[i][w] = s.f.kinds[i].all[c*chunkWords+uint64(w)].Load()
			}
		}
		s.chunks[c] = p
	}
	return p
}

// region takes g into the batch. What it holds until now stays pinned, so that no
// reader looks for it in the database while the batch is written there.
func (s *stage) region(g uint64) *stagedRegion {
	r := s.regions[g]
	if r != nil {
		return r
	}
	r = new(stagedRegion)
	s.regions[g] = r
	if s.f.isPartial(g) && s.err == nil {
		r.old, s.err = s.f.store.bitmaps.find(s.f, g, true)
		r.pinned = !r.old.empty()
		for i := range r.old {
			if s.f.isAll(i, g) {
				r.old[i] = nil
			}
		}
	}
	return r
}

// finish appends to ops what is to be written, or fails where a bitmap cannot be read.
// The chunks come first: if the ops are split and only a part is written, a region is
// all before its bitmap goes.
func (s *stage) finish(ops []op) ([]op, error) {
	f := s.f
	for _, c := range slices.Sorted(maps.Keys(s.chunks)) {
		for i, words := range s.chunks[c] {
			changed := false
			for w, word := range words {
				at := c*chunkWords + uint64(w)
				fresh := word &^ f.kinds[i].all[at].Load()
				if fresh == 0 {
					continue
				}
				changed = true
				s.blocks[i] += uint64(bits.OnesCount64(fresh)) * f.geo.RegionBlocks
				if last := f.regions - 1; at == last/64 && fresh>>(last%64)&1 != 0 {
					s.blocks[i] -= f.geo.RegionBlocks - f.regionBlocks(last)
				}
				// Regions that have a bitmap lose this kind's.
				for m := fresh & f.kinds[i].partial[at].Load(); m != 0; m &= m - 1 {
					g := at*64 + uint64(bits.TrailingZeros64(m))
					s.blocks[i] -= countBits(s.region(g).old[i])
				}
			}
			if changed {
				ops = append(ops, op{chunkKey(f.gen, i, c), encodeWords(words[:])})
			}
		}
	}
	if s.err != nil {
		return nil, s.err
	}
	for _, g := range slices.Sorted(maps.Keys(s.regions)) {
		r := s.regions[g]
		changed := false
		for i := range r.fresh {
			switch {
			case s.isAll(i, g):
				r.fresh[i] = nil
				changed = changed || r.old[i] != nil
			case r.fresh[i] == nil:
				r.fresh[i] = r.old[i]
			default:
				n := countBits(r.fresh[i]) - countBits(r.old[i])
				s.blocks[i] += n
				changed = changed || n > 0
			}
		}
		// Equal ones share their words: until the copier comes by, what is valid in
		// a region is what the initiators wrote.
		if r.fresh[0] != nil && r.fresh[1] != nil && equalWords(r.fresh[0], r.fresh[1]) {
			r.fresh[1] = r.fresh[0]
		}
		switch {
		case !changed:
			s.unpin(g, r)
			delete(s.regions, g)
		case r.fresh.empty() && !r.old.empty():
			ops = append(ops, op{key: regionKey(f.gen, g)})
		case !r.fresh.empty():
			ops = append(ops, op{regionKey(f.gen, g), encodeRegion(r.fresh, f.compact)})
		}
	}
	return ops, nil
}

// publish makes what finish worked out visible and tells how many flags are new.
func (s *stage) publish() (set uint64) {
	s.f.early.mu.Lock() // for Count
	defer s.f.early.mu.Unlock()
	for c, chunk := range s.chunks {
		for i, words := range chunk {
			for w, word := range words {
				if all := &s.f.kinds[i].all[c*chunkWords+uint64(w)]; all.Load() != word {
					all.Store(word)
				}
			}
		}
	}
	for g, r := range s.regions {
		s.f.putPartial(g, r.fresh)
	}
	for i, n := range s.blocks {
		s.f.kinds[i].blocks.Add(n)
		set += n
	}
	return set
}

// drop lets go of a batch of which nothing was written.
func (s *stage) drop() {
	for g, r := range s.regions {
		s.unpin(g, r)
	}
}

func (s *stage) unpin(g uint64, r *stagedRegion) {
	if r.pinned {
		s.f.store.bitmaps.unpin(s.f, g)
	}
}
