package state

import (
	"context"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
)

// Kinds is a set of the flags that a logical block can have.
type Kinds uint8

const (
	// Valid: the destination holds the current content of the block.
	Valid Kinds = 1 << iota
	// Dirty: the initiators wrote the block since the start.
	Dirty
)

const kindCount = 2

// index is the place of a single kind; ok is false for none or several.
func (k Kinds) index() (i int, ok bool) {
	switch k {
	case Valid:
		return 0, true
	case Dirty:
		return 1, true
	}
	return 0, false
}

// Geometry is what the flags of a volume are kept for.
type Geometry struct {
	// Blocks is the volume's capacity in logical blocks, at least 1.
	Blocks uint64
	// RegionBlocks is the length of a region in logical blocks, a power of two up
	// to 1 Mi. The last region may be shorter. At most 2³² regions.
	RegionBlocks uint64
}

func (g Geometry) check() error {
	switch {
	case g.Blocks == 0:
		return fmt.Errorf("0 blocks: want at least 1")
	case g.RegionBlocks == 0 || g.RegionBlocks&(g.RegionBlocks-1) != 0 || g.RegionBlocks > 1<<20:
		return fmt.Errorf("regions of %d blocks: want a power of two up to %d", g.RegionBlocks, 1<<20)
	case (g.Blocks-1)/g.RegionBlocks >= 1<<32:
		return fmt.Errorf("%d blocks in regions of %d: want at most %d regions", g.Blocks, g.RegionBlocks, uint64(1)<<32)
	}
	return nil
}

// Run is a run of consecutive logical blocks, counted from 0.
type Run struct {
	Start, Blocks uint64
}

func (r Run) end() uint64 { return r.Start + r.Blocks }

// Flags says of each logical block of one volume which kinds it has. What
// readers see is on stable storage. A flag, once set, stays; so reads that run
// beside a Set see each block as before or as after it, and never go back.
//
// All methods may be called concurrently.
type Flags struct {
	store   *Store
	volume  string
	gen     uint64 // distinguishes this volume's keys from those of its forgotten namesakes
	geo     Geometry
	shift   uint   // log2 of RegionBlocks
	regions uint64 // ⌈Blocks / RegionBlocks⌉
	words   int    // of a partial region's bitmap

	kinds  [kindCount]levels
	shards [shardCount]shard
	gone   atomic.Bool // Forget was committed
}

// levels is one kind's upper level, one bit for each region. Only the committer
// writes it. A region goes from partial to all by setting its bit in all first and
// clearing it in partial last, so that a reader that finds neither looks at all
// once more.
type levels struct {
	all     []atomic.Uint64
	partial []atomic.Uint64
	blocks  atomic.Uint64 // that have the flag
}

// Set gives the blocks of the runs the kinds in k. It returns once that is on
// stable storage and visible to readers. Calls that arrive while a transaction
// is being synced go into the next one together, those of other volumes too.
//
// On an error none of this call's flags is visible; after a power loss they may
// be. If ctx ends before the committer took the call up it is withdrawn; if
// later, Set waits for the outcome. ErrRange, ErrNoSpace, ErrFailed, ErrForgotten,
// ErrClosed.
func (f *Flags) Set(ctx context.Context, k Kinds, runs ...Run) error {
	if k == 0 || k >= 1<<kindCount {
		return fmt.Errorf("volume %s: set flags: no such kinds %#x", f.volume, uint8(k))
	}
	visible := true
	for _, r := range runs {
		if !f.holds(r) {
			return fmt.Errorf("volume %s: set flags of blocks %d+%d of %d: %w", f.volume, r.Start, r.Blocks, f.geo.Blocks, ErrRange)
		}
		visible = visible && f.All(k, r)
	}
	if visible && !f.gone.Load() {
		return nil
	}
	return f.store.submit(ctx, &request{flags: f, kinds: k, runs: runs})
}

// All tells whether every block of r has every kind in k. It is true for an empty
// r and false for one beyond the volume. It does not allocate.
func (f *Flags) All(k Kinds, r Run) bool {
	if !f.holds(r) {
		return false
	}
	if r.Blocks == 0 {
		return true
	}
	first, last := r.Start>>f.shift, (r.end()-1)>>f.shift
	for i := range f.kinds {
		if k&(1<<i) == 0 {
			continue
		}
		for g := first; ; g++ {
			if !f.isAll(i, g) {
				if g = f.nextNotAll(i, g, last+1); g > last {
					break
				}
				if lo, n := f.within(g, r); !f.partialAll(i, g, lo, n) {
					return false
				}
			}
			if g >= last {
				break
			}
		}
	}
	return true
}

// Any tells whether a block of r has one of the kinds in k. It does not allocate.
func (f *Flags) Any(k Kinds, r Run) bool {
	if !f.holds(r) || r.Blocks == 0 {
		return false
	}
	first, last := r.Start>>f.shift, (r.end()-1)>>f.shift
	for i := range f.kinds {
		if k&(1<<i) == 0 {
			continue
		}
		for g := first; g <= last; g++ {
			if g = f.nextSome(i, g, last+1); g > last {
				break
			}
			if lo, n := f.within(g, r); f.isAll(i, g) || f.partialAny(i, g, lo, n) {
				return true
			}
		}
	}
	return false
}

// Runs calls yield for consecutive runs that together are r, in order, each as
// long as possible; set tells whether its blocks have the kind k, one kind. It
// stops when yield returns false. A run beyond the volume, or a k of none or
// several kinds, gives no call.
func (f *Flags) Runs(k Kinds, r Run, yield func(r Run, set bool) bool) {
	i, ok := k.index()
	if !ok || !f.holds(r) || r.Blocks == 0 {
		return
	}
	var run Run // not yet yielded
	var isSet bool
	add := func(blocks uint64, set bool) bool {
		if run.Blocks > 0 && set != isSet {
			if !yield(run, isSet) {
				return false
			}
			run = Run{Start: run.end()}
		} else if run.Blocks == 0 {
			run.Start = r.Start
		}
		isSet = set
		run.Blocks += blocks
		return true
	}
	var buf [32]uint64
	last := (r.end() - 1) >> f.shift
	for at := r.Start; at < r.end(); {
		g := at >> f.shift
		next, set := g, true
		if f.isAll(i, g) {
			next = f.nextNotAll(i, g, last+1)
		} else if next = f.nextSome(i, g, last+1); next > g {
			set = false
		}
		if next > g {
			end := min(next<<f.shift, r.end())
			if !add(end-at, set) {
				return
			}
			at = end
			continue
		}
		end := min((g+1)<<f.shift, r.end())
		for at < end {
			lo := at - g<<f.shift
			n := min(end-at, 64*uint64(len(buf))-lo%64)
			f.partialRead(i, g, lo/64, buf[:(lo%64+n+63)/64])
			for bit := lo % 64; n > 0; {
				same := runLength(buf[:], bit, n)
				if !add(same, buf[bit/64]>>(bit%64)&1 != 0) {
					return
				}
				bit, n, at = bit+same, n-same, at+same
			}
		}
	}
	yield(run, isSet)
}

// Count is how many blocks have the kind k, one kind.
func (f *Flags) Count(k Kinds) uint64 {
	if i, ok := k.index(); ok {
		return f.kinds[i].blocks.Load()
	}
	return 0
}

// Missing is the first region at or after from in which a block lacks the kind k,
// and whether another block of it has it. ok is false where there is none.
func (f *Flags) Missing(k Kinds, from uint64) (region uint64, partial bool, ok bool) {
	i, one := k.index()
	if !one || from >= f.regions {
		return 0, false, false
	}
	region = f.nextNotAll(i, from, f.regions)
	if region >= f.regions {
		return 0, false, false
	}
	return region, f.kinds[i].partial[region/64].Load()>>(region%64)&1 != 0, true
}

// NextPartial is the first region at or after from of which some blocks have the
// kind k and some lack it. ok is false where there is none.
func (f *Flags) NextPartial(k Kinds, from uint64) (region uint64, ok bool) {
	i, one := k.index()
	if !one || from >= f.regions {
		return 0, false
	}
	l := &f.kinds[i]
	mask := ^uint64(0) << (from % 64)
	for w := from / 64; w < uint64(len(l.partial)); w++ {
		if m := l.partial[w].Load() &^ l.all[w].Load() & mask; m != 0 {
			return w*64 + uint64(bits.TrailingZeros64(m)), true
		}
		mask = ^uint64(0)
	}
	return 0, false
}

// Regions is how many regions the volume has.
func (f *Flags) Regions() uint64 { return f.regions }

// Geometry is what the flags are kept for.
func (f *Flags) Geometry() Geometry { return f.geo }

// Memory is about how many bytes the flags hold.
func (f *Flags) Memory() uint64 {
	n := uint64(len(f.kinds[0].all)) * 8 * 2 * kindCount
	for i := range f.shards {
		n += f.shards[i].memory()
	}
	return n
}

func (f *Flags) holds(r Run) bool {
	return r.Blocks <= f.geo.Blocks && r.Start <= f.geo.Blocks-r.Blocks
}

// within is the part of r that lies in region g, as bits of g's bitmap.
func (f *Flags) within(g uint64, r Run) (lo, n uint64) {
	start := max(r.Start, g<<f.shift)
	end := min(r.end(), (g+1)<<f.shift)
	return start - g<<f.shift, end - start
}

// regionBlocks is the length of region g; the last may be short.
func (f *Flags) regionBlocks(g uint64) uint64 {
	return min(f.geo.RegionBlocks, f.geo.Blocks-g<<f.shift)
}

func (f *Flags) isAll(i int, g uint64) bool {
	return f.kinds[i].all[g/64].Load()>>(g%64)&1 != 0
}

// nextNotAll is the first region from g on that is not all, or end.
func (f *Flags) nextNotAll(i int, g, end uint64) uint64 {
	l := &f.kinds[i]
	for g < end {
		if w := ^l.all[g/64].Load() >> (g % 64); w != 0 {
			return min(g+uint64(bits.TrailingZeros64(w)), end)
		}
		g = g&^63 + 64
	}
	return end
}

// nextSome is the first region from g on that is partial or all, or end.
func (f *Flags) nextSome(i int, g, end uint64) uint64 {
	l := &f.kinds[i]
	for g < end {
		w := l.all[g/64].Load()
		w |= l.partial[g/64].Load()
		w |= l.all[g/64].Load() // what left partial meanwhile is all
		if w >>= g % 64; w != 0 {
			return min(g+uint64(bits.TrailingZeros64(w)), end)
		}
		g = g&^63 + 64
	}
	return end
}

// partialAll tells whether n bits from lo on of region g, which was not all a
// moment ago, are set.
func (f *Flags) partialAll(i int, g, lo, n uint64) bool {
	if f.kinds[i].partial[g/64].Load()>>(g%64)&1 == 0 {
		return f.isAll(i, g)
	}
	s := &f.shards[g%shardCount]
	s.mu.RLock()
	defer s.mu.RUnlock()
	if slot := s.slots[g][i]; slot != 0 {
		return allBits(s.slab.at(slot, f.words), lo, n)
	}
	return f.isAll(i, g)
}

// partialAny is partialAll for one bit of the n.
func (f *Flags) partialAny(i int, g, lo, n uint64) bool {
	s := &f.shards[g%shardCount]
	s.mu.RLock()
	defer s.mu.RUnlock()
	if slot := s.slots[g][i]; slot != 0 {
		return anyBit(s.slab.at(slot, f.words), lo, n)
	}
	return f.isAll(i, g)
}

// partialRead copies region g's bitmap from word from on to buf.
func (f *Flags) partialRead(i int, g, from uint64, buf []uint64) {
	s := &f.shards[g%shardCount]
	s.mu.RLock()
	defer s.mu.RUnlock()
	if slot := s.slots[g][i]; slot != 0 {
		copy(buf, s.slab.at(slot, f.words)[from:])
		return
	}
	var w uint64
	if f.isAll(i, g) {
		w = ^w
	}
	for j := range buf {
		buf[j] = w
	}
}

// partialCopy is region g's bitmap as a copy; nil where the region is none or all.
func (f *Flags) partialCopy(i int, g uint64) []uint64 {
	s := &f.shards[g%shardCount]
	s.mu.RLock()
	defer s.mu.RUnlock()
	if slot := s.slots[g][i]; slot != 0 {
		return append([]uint64(nil), s.slab.at(slot, f.words)...)
	}
	return nil
}

// putPartial makes bitmaps the partial bitmaps of region g, nil for none. The
// all bits must have been set before.
func (f *Flags) putPartial(g uint64, bitmaps [kindCount][]uint64) {
	s := &f.shards[g%shardCount]
	for i, b := range bitmaps {
		if b != nil {
			orWord(&f.kinds[i].partial[g/64], 1<<(g%64))
		}
	}
	s.mu.Lock()
	s.put(g, bitmaps, f.words)
	s.mu.Unlock()
	for i, b := range bitmaps {
		if b == nil {
			clearWord(&f.kinds[i].partial[g/64], 1<<(g%64))
		}
	}
}

func orWord(w *atomic.Uint64, m uint64) {
	if v := w.Load(); v&m != m {
		w.Or(m)
	}
}

func clearWord(w *atomic.Uint64, m uint64) {
	if w.Load()&m != 0 {
		w.And(^m)
	}
}

const (
	shardCount = 64
	// slabBytes is how much a shard takes at once for bitmaps.
	slabBytes = 16 << 10
)

// shard holds the bitmaps of the partial regions g with the same g % shardCount.
type shard struct {
	mu    sync.RWMutex // guards all below, the bitmaps' content too
	slots map[uint64][kindCount]uint32
	slab  slab
}

// put replaces region g's bitmaps. Equal ones share a slot: until the copier
// comes by, what is valid in a region is what the initiators wrote.
func (s *shard) put(g uint64, bitmaps [kindCount][]uint64, words int) {
	old := s.slots[g]
	if old[0] != 0 {
		s.slab.release(old[0])
	}
	if old[1] != 0 && old[1] != old[0] {
		s.slab.release(old[1])
	}
	var slots [kindCount]uint32
	for i, b := range bitmaps {
		if i > 0 && b != nil && bitmaps[0] != nil && equalWords(b, bitmaps[0]) {
			slots[i] = slots[0]
		} else if b != nil {
			slots[i] = s.slab.take(words)
			copy(s.slab.at(slots[i], words), b)
		}
	}
	if slots != [kindCount]uint32{} {
		if s.slots == nil {
			s.slots = map[uint64][kindCount]uint32{}
		}
		s.slots[g] = slots
		return
	}
	delete(s.slots, g)
	if len(s.slots) == 0 {
		s.slots, s.slab = nil, slab{}
	}
}

func (s *shard) memory() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := uint64(len(s.slots)) * 28 // a map entry with its share of free room
	for _, p := range s.slab.pages {
		n += uint64(len(p)) * 8
	}
	return n + uint64(cap(s.slab.free))*4
}

// slab hands out bitmaps of one length by number, from 1 on, so that a partial
// region costs neither a pointer nor a header.
type slab struct {
	pages [][]uint64
	free  []uint32
}

// perPage is how many bitmaps of that many words a page holds.
func perPage(words int) int { return max(1, slabBytes/8/words) }

func (s *slab) at(slot uint32, words int) []uint64 {
	per := perPage(words)
	page, n := int(slot-1)/per, int(slot-1)%per
	return s.pages[page][n*words : (n+1)*words]
}

func (s *slab) take(words int) uint32 {
	if len(s.free) == 0 {
		per := perPage(words)
		s.pages = append(s.pages, make([]uint64, per*words))
		for n := len(s.pages) * per; n > (len(s.pages)-1)*per; n-- {
			s.free = append(s.free, uint32(n))
		}
	}
	slot := s.free[len(s.free)-1]
	s.free = s.free[:len(s.free)-1]
	return slot
}

func (s *slab) release(slot uint32) { s.free = append(s.free, slot) }

func equalWords(a, b []uint64) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
