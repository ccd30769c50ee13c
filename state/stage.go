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
	// unitBytes is about how much goes into one unit, well below what a transaction takes,
	// which is 15 % of memTableSize. A single region adds up to 256 KiB.
	unitBytes = 512 << 10
	// perKey is about what a key costs in a transaction beside its value.
	perKey = 64
)

// stage works out what a batch makes of one volume's flags: what is visible and then
// what the batch sets and clears, in its order. Nothing is visible before publish. Only
// the committer uses it, so that what is visible does not change under it.
type stage struct {
	f *Flags
	// chunks holds new all bits by chunk, regions new bitmaps by region.
	chunks  map[uint64]*chunk
	regions map[uint64]*stagedRegion
	blocks  [kindCount]int64 // that gain the flag, less those that lose it
	unit    int              // unitBytes, less in tests
	err     error            // why the batch cannot be worked out
}

// chunk is the all bits of chunkRegions regions.
type chunk [kindCount][chunkWords]uint64

// stagedRegion is a region of which a batch changes more than its all bits.
type stagedRegion struct {
	old, fresh regionBitmaps
	own        [kindCount]bool // fresh is not old's
}

func newStage(f *Flags) *stage {
	return &stage{
		f:       f,
		chunks:  map[uint64]*chunk{},
		regions: map[uint64]*stagedRegion{},
		unit:    unitBytes,
	}
}

// apply gives the blocks of r, which lies within the volume, the kinds in k, or takes
// them away where clear is true.
func (s *stage) apply(k Kinds, r Run, clear bool) {
	f := s.f
	for i := range f.kinds {
		if k&(1<<i) == 0 {
			continue
		}
		for at := r.Start; at < r.end(); {
			g := at >> f.shift
			lo := at - g<<f.shift
			if whole := s.wholeUntil(r); lo == 0 && whole > g {
				s.wholes(i, g, whole, clear)
				at = min(whole<<f.shift, r.end())
				continue
			}
			n := min(r.end()-at, f.geo.RegionBlocks-lo)
			if clear {
				s.clearPart(i, g, lo, n)
			} else {
				s.setPart(i, g, lo, n)
			}
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

// wholes makes the regions from g up to end all, or none where clear is true.
func (s *stage) wholes(i int, g, end uint64, clear bool) {
	for at := g; at < end; {
		c := at / chunkRegions
		stop := min(end, (c+1)*chunkRegions)
		switch {
		case clear && (s.chunks[c] != nil || s.f.nextAll(i, at, stop) < stop):
			clearBits(s.chunk(c)[i][:], at%chunkRegions, stop-at)
		case !clear && (s.chunks[c] != nil || s.f.nextNotAll(i, at, stop) < stop):
			setBits(s.chunk(c)[i][:], at%chunkRegions, stop-at)
		}
		at = stop
	}
	// Regions that have a bitmap lose this kind's.
	for w := g / 64; w <= (end-1)/64; w++ {
		for m := s.f.kinds[i].partial[w].Load(); m != 0; m &= m - 1 {
			if at := w*64 + uint64(bits.TrailingZeros64(m)); at >= g && at < end {
				s.region(at)
			}
		}
	}
	if end-g < uint64(len(s.regions)) {
		for at := g; at < end; at++ {
			if r := s.regions[at]; r != nil {
				r.fresh[i] = nil
			}
		}
		return
	}
	for at, r := range s.regions {
		if at >= g && at < end {
			r.fresh[i] = nil
		}
	}
}

// setPart sets n bits from lo on of region g.
func (s *stage) setPart(i int, g, lo, n uint64) {
	if s.isAll(i, g) {
		return
	}
	r := s.region(g)
	setBits(s.own(r, i), lo, n)
	if countBits(r.fresh[i]) == s.f.regionBlocks(g) {
		setBits(s.chunk(g / chunkRegions)[i][:], g%chunkRegions, 1)
		r.fresh[i] = nil
	}
}

// clearPart clears n bits from lo on of region g.
func (s *stage) clearPart(i int, g, lo, n uint64) {
	all := s.isAll(i, g)
	r := s.regions[g]
	if !all && (r == nil && !s.f.isPartialOf(i, g) || r != nil && r.fresh[i] == nil) {
		return
	}
	r = s.region(g)
	words := s.own(r, i)
	if all {
		setBits(words, 0, s.f.regionBlocks(g))
		clearBits(s.chunk(g / chunkRegions)[i][:], g%chunkRegions, 1)
	}
	clearBits(words, lo, n)
	if countBits(words) == 0 {
		r.fresh[i] = nil
	}
}

// own gives r's bitmap of kind i to be changed, with no bit set where there is none yet.
func (s *stage) own(r *stagedRegion, i int) []uint64 {
	if r.fresh[i] == nil || !r.own[i] {
		words := make([]uint64, s.f.words)
		copy(words, r.fresh[i])
		r.fresh[i], r.own[i] = words, true
	}
	return r.fresh[i]
}

// isAll tells whether region g is all, with the batch.
func (s *stage) isAll(i int, g uint64) bool {
	if c := s.chunks[g/chunkRegions]; c != nil {
		return c[i][g%chunkRegions/64]>>(g%64)&1 != 0
	}
	return s.f.isAll(i, g)
}

func (s *stage) chunk(c uint64) *chunk {
	p := s.chunks[c]
	if p == nil {
		p = s.f.chunk(c)
		s.chunks[c] = p
	}
	return p
}

// chunk is what is visible of chunk c.
func (f *Flags) chunk(c uint64) *chunk {
	p := new(chunk)
	for i := range p {
		for w := range p[i] {
			p[i][w] = f.kinds[i].all[c*chunkWords+uint64(w)].Load()
		}
	}
	return p
}

// region takes g into the batch. What it holds until now stays pinned, so that no
// reader looks for it in the database from before the batch is written there until it is
// published.
func (s *stage) region(g uint64) *stagedRegion {
	r := s.regions[g]
	if r != nil {
		return r
	}
	r = new(stagedRegion)
	s.regions[g] = r
	var err error
	r.old, err = s.f.store.bitmaps.find(s.f, g, true)
	if err != nil && s.err == nil {
		s.err = err
	}
	r.fresh = r.old
	return r
}

// finish gives what is to be written, or fails where a bitmap cannot be read. Each
// unit goes into one transaction, and all that is known of a region lies in one unit: if a
// crash lets only some of them through, each region is as before the batch or as after it,
// in all of its kinds. All that a batch says was true of the devices before (they hold the
// content), block by block, so any part of it is right.
func (s *stage) finish() (units [][]op, err error) {
	if s.err != nil {
		return nil, s.err
	}
	byChunk := map[uint64][]uint64{} // regions of which a bitmap changes
	for g, r := range s.regions {
		changed := false
		for i := range r.fresh {
			s.blocks[i] += int64(countBits(r.fresh[i])) - int64(countBits(r.old[i]))
			changed = changed || (r.fresh[i] == nil) != (r.old[i] == nil) || r.fresh[i] != nil && !equalWords(r.fresh[i], r.old[i])
		}
		if !changed {
			s.f.store.bitmaps.unpin(s.f, g)
			delete(s.regions, g)
			continue
		}
		// Equal ones share their words: until the copier comes by, what is valid in
		// a region is what the initiators wrote.
		if r.fresh[0] != nil && r.fresh[1] != nil && equalWords(r.fresh[0], r.fresh[1]) {
			r.fresh[1] = r.fresh[0]
		}
		byChunk[g/chunkRegions] = append(byChunk[g/chunkRegions], g)
	}
	for c, fresh := range s.chunks {
		if s.count(c, fresh); byChunk[c] == nil {
			byChunk[c] = []uint64{}
		}
	}
	var unit []op
	size := 0
	add := func(o op) {
		unit = append(unit, o)
		size += len(o.value) + perKey
	}
	for _, c := range slices.Sorted(maps.Keys(byChunk)) {
		had, fresh := new(chunk), s.chunks[c]
		if fresh != nil {
			had = s.f.chunk(c)
		} else {
			fresh = had
		}
		// upTo writes the all bits of the regions before g.
		upTo := func(g uint64) {
			for i := range had {
				if replaceBits(had[i][:], fresh[i][:], g-c*chunkRegions) {
					add(op{chunkKey(s.f.gen, i, c), encodeWords(had[i][:])})
				}
			}
		}
		for _, g := range slices.Sorted(slices.Values(byChunk[c])) {
			if size >= s.unit {
				upTo(g)
				units, unit, size = append(units, unit), nil, 0
			}
			if r := s.regions[g]; r.fresh.empty() {
				add(op{key: regionKey(s.f.gen, g)})
			} else {
				add(op{regionKey(s.f.gen, g), encodeRegion(r.fresh, s.f.compact)})
			}
		}
		upTo((c + 1) * chunkRegions)
		if size >= s.unit {
			units, unit, size = append(units, unit), nil, 0
		}
	}
	if len(unit) > 0 {
		units = append(units, unit)
	}
	return units, nil
}

// count adds up the blocks of the regions that come to be all or stop being it.
func (s *stage) count(c uint64, fresh *chunk) {
	f := s.f
	last := f.regions - 1
	for i := range fresh {
		for w, word := range fresh[i] {
			at := c*chunkWords + uint64(w)
			had := f.kinds[i].all[at].Load()
			gain := int64(bits.OnesCount64(word)) - int64(bits.OnesCount64(had))
			s.blocks[i] += gain * int64(f.geo.RegionBlocks)
			if at == last/64 {
				gain := int64(word>>(last%64)&1) - int64(had>>(last%64)&1)
				s.blocks[i] -= gain * int64(f.geo.RegionBlocks-f.regionBlocks(last))
			}
		}
	}
}

// publish makes what finish worked out visible, in the order that levels asks for, and
// tells how many blocks gained a flag.
func (s *stage) publish() (set uint64) {
	f := s.f
	f.early.mu.Lock() // for Count
	defer f.early.mu.Unlock()
	var falls [kindCount]bool
	for c, fresh := range s.chunks {
		for i, words := range fresh {
			for w, word := range words {
				all := &f.kinds[i].all[c*chunkWords+uint64(w)]
				orWord(all, word)
				falls[i] = falls[i] || all.Load() != word
			}
		}
	}
	for g, r := range s.regions {
		f.store.bitmaps.publish(f, g, r.fresh)
		f.markPartial(g, r.fresh)
	}
	for i := range falls {
		if !falls[i] {
			continue
		}
		f.kinds[i].falls.Add(1)
		for c, fresh := range s.chunks {
			for w, word := range fresh[i] {
				if all := &f.kinds[i].all[c*chunkWords+uint64(w)]; all.Load() != word {
					all.Store(word)
				}
			}
		}
	}
	s.drop()
	for i, n := range s.blocks {
		f.kinds[i].blocks.Add(uint64(n))
		set += uint64(max(n, 0))
	}
	return set
}

// drop lets go of what the batch had pinned.
func (s *stage) drop() {
	for g := range s.regions {
		s.f.store.bitmaps.unpin(s.f, g)
	}
}
