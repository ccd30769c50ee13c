package state

import (
	"context"
	"fmt"
	"math/bits"
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

// Flags says of each logical block of one volume which kinds it has. What readers see
// outlives a crash: it is on stable storage, or, of a kept intent, the destination and the
// journal together tell it again (Unproven). A flag, once set, stays; so reads that run
// beside a Set see each block as before or as after it, and never go back.
//
// Which regions are none, partial or all is in memory; the bitmaps of partial ones
// are as far as Options.BitmapMemory goes, and are read from the database else. That
// can fail, by damage or after Close. Then Set fails and Runs tells the error; All says
// no and Any says yes, as of a block that nothing is known of.
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

	// compact says that bitmaps may be stored as runs (headerSchema 2).
	compact bool

	kinds [kindCount]levels
	early early       // what the journal has and the database has not
	gone  atomic.Bool // Forget was committed

	// Entries of a journal that the database kept, and their keys; of Store.Flags and
	// Prove alone.
	kept    []entry
	entries [][]byte
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
	if err := f.checkRuns(k, runs); err != nil {
		return err
	}
	visible := true
	for _, r := range runs {
		visible = visible && f.settledAll(k, r)
	}
	if visible && !f.gone.Load() {
		return nil
	}
	return f.store.submit(ctx, &request{flags: f, kinds: k, runs: runs})
}

// All tells whether every block of r is known to have every kind in k. It is true for an
// empty r and false for one beyond the volume. It allocates nothing unless it has to
// read the database.
func (f *Flags) All(k Kinds, r Run) bool {
	if !f.holds(r) {
		return false
	}
	if f.early.count.Load() == 0 {
		return f.settledAll(k, r)
	}
	// First what is early and then what is settled, as notes go that way.
	for i := range f.kinds {
		kind := Kinds(1) << i
		if k&kind == 0 {
			continue
		}
		at := r.Start
		for _, n := range f.early.within(kind, r) {
			if !f.settledAll(kind, Run{at, n.Start - at}) {
				return false
			}
			at = n.end()
		}
		if !f.settledAll(kind, Run{at, r.end() - at}) {
			return false
		}
	}
	return true
}

// settledAll is All by the database alone.
func (f *Flags) settledAll(k Kinds, r Run) bool {
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

// Any tells whether a block of r has one of the kinds in k, or that is not known. It
// allocates nothing unless it has to read the database.
func (f *Flags) Any(k Kinds, r Run) bool {
	if !f.holds(r) || r.Blocks == 0 {
		return false
	}
	if len(f.early.within(k, r)) > 0 {
		return true
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
// stops when yield returns false. An error says that a part of r behind what was
// yielded is not known: its flags cannot be read, or it is beyond the volume
// (ErrRange).
func (f *Flags) Runs(k Kinds, r Run, yield func(r Run, set bool) bool) error {
	i, ok := k.index()
	if !ok {
		return fmt.Errorf("volume %s: runs: want one kind, not %#x", f.volume, uint8(k))
	}
	if !f.holds(r) {
		return fmt.Errorf("volume %s: flags of blocks %d+%d of %d: %w", f.volume, r.Start, r.Blocks, f.geo.Blocks, ErrRange)
	}
	if r.Blocks == 0 {
		return nil
	}
	y := yielder{run: Run{Start: r.Start}, yield: yield}
	at := r.Start
	for _, n := range f.early.within(k, r) {
		if err := f.settledRuns(i, Run{at, n.Start - at}, &y); err != nil {
			return err
		}
		y.add(n.Blocks, true)
		at = n.end()
	}
	if err := f.settledRuns(i, Run{at, r.end() - at}, &y); err != nil {
		return err
	}
	if !y.over {
		yield(y.run, y.set)
	}
	return nil
}

// yielder joins runs that are alike before it yields them.
type yielder struct {
	run   Run // not yet yielded
	set   bool
	over  bool // nothing more is wanted
	yield func(Run, bool) bool
}

func (y *yielder) add(blocks uint64, set bool) {
	if blocks == 0 || y.over {
		return
	}
	if y.run.Blocks > 0 && set != y.set {
		y.over = !y.yield(y.run, y.set)
		y.run = Run{Start: y.run.end()}
	}
	y.set = set
	y.run.Blocks += blocks
}

// settledRuns adds the runs of r by the database alone.
func (f *Flags) settledRuns(i int, r Run, y *yielder) error {
	if r.Blocks == 0 {
		return nil
	}
	last := (r.end() - 1) >> f.shift
	for at := r.Start; at < r.end() && !y.over; {
		g := at >> f.shift
		next, set := g, true
		if f.isAll(i, g) {
			next = f.nextNotAll(i, g, last+1)
		} else if next = f.nextSome(i, g, last+1); next > g {
			set = false
		}
		if next > g {
			end := min(next<<f.shift, r.end())
			y.add(end-at, set)
			at = end
			continue
		}
		end := min((g+1)<<f.shift, r.end())
		bitmap, all, err := f.partial(i, g)
		if err != nil {
			return wrap(f.volume, "read flags", err)
		}
		if bitmap == nil {
			y.add(end-at, all)
			at = end
			continue
		}
		for lo := at - g<<f.shift; at < end; {
			same := runLength(bitmap, lo, end-at)
			y.add(same, bitmap[lo/64]>>(lo%64)&1 != 0)
			lo, at = lo+same, at+same
		}
	}
	return nil
}

// Count is how many blocks have the kind k, one kind.
func (f *Flags) Count(k Kinds) uint64 {
	i, ok := k.index()
	if !ok {
		return 0
	}
	// Nothing is published meanwhile, so that no block counts twice or not at all.
	f.early.mu.RLock()
	defer f.early.mu.RUnlock()
	var early uint64
	for _, r := range f.early.joined(k, Run{Blocks: f.geo.Blocks}) {
		y := yielder{run: Run{Start: r.Start}}
		y.yield = func(r Run, set bool) bool {
			if !set {
				early += r.Blocks
			}
			return true
		}
		if f.settledRuns(i, r, &y) == nil {
			y.yield(y.run, y.set)
		}
	}
	return early + f.kinds[i].blocks.Load()
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

// Memory is about how many bytes the flags hold besides bitmaps, which all volumes share
// (Stats.BitmapBytes): a bit for each kind, region and level.
func (f *Flags) Memory() uint64 {
	return uint64(len(f.kinds[0].all)) * 8 * 2 * kindCount
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

// isPartial tells whether region g is partial of a kind.
func (f *Flags) isPartial(g uint64) bool {
	for i := range f.kinds {
		if f.kinds[i].partial[g/64].Load()>>(g%64)&1 != 0 {
			return true
		}
	}
	return false
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

// partial gives kind i's bitmap of region g, which was partial a moment ago; nil where
// it is all or none by now, and then all tells which.
func (f *Flags) partial(i int, g uint64) (bitmap []uint64, all bool, err error) {
	m, err := f.store.bitmaps.find(f, g, false)
	if m[i] != nil || err != nil {
		return m[i], false, err
	}
	return nil, f.isAll(i, g), nil
}

// partialAll tells whether n bits from lo on of region g, which was not all a
// moment ago, are known to be set.
func (f *Flags) partialAll(i int, g, lo, n uint64) bool {
	if f.kinds[i].partial[g/64].Load()>>(g%64)&1 == 0 {
		return f.isAll(i, g)
	}
	bitmap, all, err := f.partial(i, g)
	switch {
	case err != nil:
		return false
	case bitmap != nil:
		return allBits(bitmap, lo, n)
	}
	return all
}

// partialAny tells whether one of n bits from lo on of region g is not known to be
// clear.
func (f *Flags) partialAny(i int, g, lo, n uint64) bool {
	bitmap, all, err := f.partial(i, g)
	switch {
	case err != nil:
		return true
	case bitmap != nil:
		return anyBit(bitmap, lo, n)
	}
	return all
}

// putPartial publishes m as region g's bitmaps. The all bits must have been set
// before.
func (f *Flags) putPartial(g uint64, m regionBitmaps) {
	f.store.bitmaps.publish(f, g, m)
	f.markPartial(g, m)
}

// markPartial notes of which kinds region g is partial.
func (f *Flags) markPartial(g uint64, m regionBitmaps) {
	for i, b := range m {
		if b != nil {
			orWord(&f.kinds[i].partial[g/64], 1<<(g%64))
		} else {
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

func equalWords(a, b []uint64) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
