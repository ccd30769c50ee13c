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
// journal together tell it again (Unproven). Reads that run beside a Set or a Clear see each
// block as before or as after it, and never go back.
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

	// turn counts the turns, backward is the direction of the present one. Both change
	// while open is turning.
	turn     atomic.Uint64
	backward atomic.Bool
	open     atomic.Int64 // what keeps the present turn: calls, notes, intents, unproven ones as one

	// Entries of a journal that the database kept, and their keys; of Store.Flags and
	// Prove alone. leftover is of Store.Flags: what to remove that counts for nothing.
	kept     []entry
	entries  [][]byte
	leftover []op
}

// Set gives the blocks of the runs the kinds in k. It returns once that is on
// stable storage and visible to readers. Calls that arrive while a transaction
// is being synced go into the next one together, those of other volumes too.
//
// On an error none of this call's flags is visible; after a power loss they may
// be, of each block all of k or none. If ctx ends before the committer took the call up it
// is withdrawn; if later, Set waits for the outcome. ErrRange, ErrNoSpace, ErrFailed,
// ErrForgotten, ErrClosed. It is refused in a backward turn, in which the journal may clear
// after a crash what is set.
func (f *Flags) Set(ctx context.Context, k Kinds, runs ...Run) error {
	return f.change(ctx, k, false, runs)
}

// Clear takes the kinds in k from the blocks of the runs, as Set gives them. In a forward
// turn that is Dirty alone, and the caller sees to it that nothing is noted or intended of
// the blocks meanwhile and has awaited what was (Await).
func (f *Flags) Clear(ctx context.Context, k Kinds, runs ...Run) error {
	return f.change(ctx, k, true, runs)
}

func (f *Flags) change(ctx context.Context, k Kinds, clear bool, runs []Run) error {
	r := &request{flags: f, kinds: k, runs: runs, clear: clear}
	if err := f.checkRuns(k, runs); err != nil {
		return err
	}
	if err := f.enter(); err != nil {
		return wrap(f.volume, r.what(), err)
	}
	defer f.leave()
	switch backward := f.Backward(); {
	case backward && !clear:
		return fmt.Errorf("volume %s: set flags: not in a backward turn", f.volume)
	case !backward && clear && k&Valid != 0:
		return fmt.Errorf("volume %s: clear flags: valid stays in a forward turn", f.volume)
	}
	visible := true
	for _, run := range runs {
		if clear {
			visible = visible && !f.settledAny(k, run)
		} else {
			visible = visible && f.settledAll(k, run)
		}
	}
	if visible && !f.gone.Load() {
		return nil
	}
	return f.store.submit(ctx, r)
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
		notes, clear := f.early.within(kind, r)
		if clear && len(notes) > 0 {
			return false
		}
		for _, n := range notes {
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
	if f.early.count.Load() == 0 {
		return f.settledAny(k, r)
	}
	for i := range f.kinds {
		kind := Kinds(1) << i
		if k&kind == 0 {
			continue
		}
		at := r.Start
		notes, clear := f.early.within(kind, r)
		if !clear && len(notes) > 0 {
			return true
		}
		for _, n := range notes {
			if f.settledAny(kind, Run{at, n.Start - at}) {
				return true
			}
			at = n.end()
		}
		if f.settledAny(kind, Run{at, r.end() - at}) {
			return true
		}
	}
	return false
}

// settledAny is Any by the database alone.
func (f *Flags) settledAny(k Kinds, r Run) bool {
	if r.Blocks == 0 {
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
			if lo, n := f.within(g, r); f.partialAny(i, g, lo, n) {
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
	notes, clear := f.early.within(k, r)
	for _, n := range notes {
		if err := f.settledRuns(i, Run{at, n.Start - at}, &y); err != nil {
			return err
		}
		y.add(n.Blocks, !clear)
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
		bitmap, all, err := f.bitmap(i, g)
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
	count := f.kinds[i].blocks.Load()
	for _, r := range f.early.joined(k, Run{Blocks: f.geo.Blocks}) {
		y := yielder{run: Run{Start: r.Start}}
		y.yield = func(r Run, set bool) bool {
			switch {
			case f.early.clear && set:
				count -= r.Blocks
			case !f.early.clear && !set:
				count += r.Blocks
			}
			return true
		}
		if f.settledRuns(i, r, &y) == nil {
			y.yield(y.run, y.set)
		}
	}
	return count
}

// Missing is the first region at or after from in which a block lacks the kind k,
// and whether another block of it has it. ok is false where there is none. As NextPartial
// and Next, it does not know of what is noted and not settled yet.
func (f *Flags) Missing(k Kinds, from uint64) (region uint64, partial bool, ok bool) {
	i, one := k.index()
	if !one || from >= f.regions {
		return 0, false, false
	}
	region = f.nextNotAll(i, from, f.regions)
	if region >= f.regions {
		return 0, false, false
	}
	return region, f.isPartialOf(i, region), true
}

// Next is the first region at or after from of which a block has one of the kinds in k. ok
// is false where there is none.
func (f *Flags) Next(k Kinds, from uint64) (region uint64, ok bool) {
	region = f.regions
	for i := range f.kinds {
		if k&(1<<i) != 0 && from < region {
			region = f.nextSome(i, from, region)
		}
	}
	return region, region < f.regions
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
