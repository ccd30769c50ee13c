// Package copier moves the content of a source logical unit to a destination while
// initiators go on writing to the destination.
//
// It reads allocated blocks that are not yet valid on the destination, writes them
// there in slices, each under an exclusive lock on just that slice, and has the
// blocks flagged once the destination holds them on stable storage. It never
// overwrites a block that became valid meanwhile, and it leaves
// the destination thin: what is unallocated or zero is not written. Where the destination
// holds most of the data already it compares and writes only what differs (compare.go).
//
// The package keeps no state of its own over a restart; what is done is what the
// Ledger says. Between the read of the source and the write of the destination each
// block is guarded by a checksum (sum.go), with Readback up to what the destination
// gives back. The folder is copy/, the package copier, so that Go's builtin copy
// stays in sight.
package copier

import (
	"cmp"
	"context"
	"sync"
	"sync/atomic"
	"time"

	"lunshift/lun"
)

const (
	// sliceBytes is the most that is written under one lock, so the longest that
	// a write of an initiator waits for the copier.
	sliceBytes = 256 << 10
	// holeSpanRegions is how many wholly unallocated regions are one job.
	holeSpanRegions = 4096
	// comparedSpanRegions is the same where the destination is compared: parts of the job may
	// have to be read.
	comparedSpanRegions = 256
	// readGapBytes is the longest run of blocks nobody needs that is read along, to
	// make one read of two.
	readGapBytes = 64 << 10
	// backlog is how many finished jobs may wait for their flags.
	backlog = 256

	firstRetry = 100 * time.Millisecond
	lastRetry  = 10 * time.Second
	// unreadableRest is the time between attempts at blocks that the source has but
	// cannot read.
	unreadableRest = 5 * time.Minute
)

// Ledger knows what is valid on the destination. The volume implements it; all
// methods may be called concurrently.
type Ledger interface {
	// NextPartial is the first region from from on of which some blocks are valid
	// and some are not.
	NextPartial(from uint64) (region uint64, ok bool)
	// NextMissing is the first region from from on of which not all blocks are
	// valid.
	NextMissing(from uint64) (region uint64, ok bool)
	// Begin is called before anything of e is read or looked at. The era it gives
	// goes with what is copied then.
	Begin(e lun.Extent) (era uint64)
	// Invalid gives the runs of e that are not valid, in rising order; all of them, or
	// an error.
	Invalid(e lun.Extent) ([]lun.Extent, error)
	// Exclude keeps initiators' writes out of e until release is called.
	Exclude(ctx context.Context, e lun.Extent) (release func(), err error)
	// TryExclude is Exclude where no write to e is under way; otherwise it reports
	// false at once.
	TryExclude(e lun.Extent) (release func(), ok bool)
	// Commit flushes the destination and flags the blocks; when it returns nil
	// they are valid and that is on stable storage, but for those of an era in
	// which the destination lost its cache: they stay as they are.
	Commit(ctx context.Context, done []Copied) error
	// Unreadable tells which blocks of e the source cannot read (MEDIUM ERROR); all
	// others of e were read just now or need not be.
	Unreadable(ctx context.Context, e lun.Extent, bad []lun.Extent)
}

// Copied is an extent that the destination holds, but for the flush.
type Copied struct {
	lun.Extent
	Era uint64
}

// Options is what a Copier works on. Which unit is source and which destination is for
// the caller to say; nothing here hangs on it.
type Options struct {
	Source, Destination lun.Device
	Ledger              Ledger
	// Volume is the extent to copy; it starts at 0.
	Volume lun.Extent
	// RegionBlocks is the unit of copying, in blocks.
	RegionBlocks uint64
	// Depth is how many regions are copied at once, at least 1; SetDepth changes it.
	Depth int
	// Readback reads what was written back from the destination and compares it before
	// it is flagged; SetReadback changes it.
	Readback bool
	// Compare reads both sides and writes only what differs, for a destination that holds
	// most of the data already; SetCompare changes it.
	Compare bool
	// From and To are what errors call Source and Destination; empty is "source" and
	// "destination".
	From, To string
	// Throttle limits the bytes read from the source per second; with Compare, those
	// looked at, be it on the destination alone.
	Throttle *Throttle
	// Shared limits all copiers that have it together, besides; nil is no limit.
	Shared *Throttle
	// Survey tells what of the source is to be read; what it calls unallocated reads as zeroes
	// on the destination afterwards. seen is to be told how many allocated blocks were found so
	// far. nil is the Survey of Source.
	Survey func(ctx context.Context, seen func(blocks uint64)) (*AllocationMap, error)
	// Fault is told of each failed step, and nil when steps succeed again. The
	// copier goes on by itself.
	Fault func(error)
}

// Progress counts what a Copier did since it was made, in bytes.
type Progress struct {
	// Copied was written to the destination as data. What had to be copied again
	// counts again.
	Copied uint64
	// Skipped needed no data: unallocated, or zeroes. What is Equal is not in it.
	Skipped uint64
	// Compared was read from the destination as well, and compared; Equal is what of it was
	// there already. Both are 0 without Compare.
	Compared, Equal uint64
	// Allocated is the storage of the source in all, as far as the survey has come;
	// Surveyed tells whether it has come to the end.
	Allocated uint64
	Surveyed  bool
	// Read was read from the source; Left is what is still to be read, at the most.
	Read, Left uint64
	// ChecksumErrors counts blocks that changed in memory between the source and the
	// destination, ReadbackErrors those that the destination gave back otherwise than they
	// were written. Both were copied again.
	ChecksumErrors, ReadbackErrors uint64
}

// Copier copies one volume. Run may be called again after it returned; calls to Run
// must not overlap.
type Copier struct {
	Options
	info lun.Info  // of the source
	pool sync.Pool // of *buffer, each as long as a region
	back sync.Pool // of *[]byte, each as long as a slice
	held sync.Pool // of *held, each as long as a region
	zero uint32    // the checksum of a block of zeroes

	copied, skipped, allocated, bytesRead, left atomic.Uint64
	scribbled, misread                          atomic.Uint64 // blocks
	compared, equal                             atomic.Uint64 // bytes
	readback, compare                           atomic.Bool
	allocation                                  atomic.Pointer[AllocationMap]

	mu       sync.Mutex // protects the fields below
	cond     *sync.Cond // signalled when a region may be free, or Run ends
	inFlight map[uint64]struct{}
	failing  map[uint64]failure // by region
	partial  uint64             // where to look for the next partial region
	missing  uint64             // and for the next of the others
	depth    int                // workers that there should be
	workers  int                // workers that there are; 0 while Run does not run
	hire     func()             // begins one more; usable while there are workers
}

// failure is a region whose copy failed; it rests for a while, and the others go on.
type failure struct {
	until time.Time
	wait  time.Duration
}

// job is a run of regions that one worker deals with. Hole jobs hold no allocated
// block.
type job struct {
	first, count uint64
	hole         bool
}

// done is a job whose blocks the destination holds, but for the flush.
type done struct {
	job
	era             uint64
	compare         bool
	extents         []lun.Extent
	copied, skipped uint64
	compared, equal uint64
	unreadable      error // a part of the job cannot be read; it is not in extents
}

// New makes a Copier; nothing happens before Run.
func New(o Options) *Copier {
	c := &Copier{Options: o, info: o.Source.Info(), inFlight: make(map[uint64]struct{}), failing: make(map[uint64]failure)}
	c.cond = sync.NewCond(&c.mu)
	if c.Survey == nil {
		c.Survey = func(ctx context.Context, seen func(uint64)) (*AllocationMap, error) {
			return Survey(ctx, c.Source, c.Volume, seen)
		}
	}
	c.depth = max(1, o.Depth)
	c.readback.Store(o.Readback)
	c.compare.Store(o.Compare)
	c.pool.New = func() any {
		return &buffer{data: make([]byte, o.RegionBlocks*uint64(c.info.BlockSize)), sums: make([]uint32, o.RegionBlocks)}
	}
	c.back.New = func() any {
		p := make([]byte, max(sliceBytes, int(c.info.BlockSize)))
		return &p
	}
	c.held.New = func() any {
		return &held{data: make([]byte, o.RegionBlocks*uint64(c.info.BlockSize)), found: make([]finding, o.RegionBlocks)}
	}
	c.zero = sum(make([]byte, c.info.BlockSize))
	return c
}

// SetDepth changes how many regions are copied at once, at least 1. Regions under way
// end first where there are to be fewer.
func (c *Copier) SetDepth(depth int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.depth = max(1, depth)
	for c.workers > 0 && c.workers < c.depth {
		c.workers++
		c.hire()
	}
	c.cond.Broadcast() // those too many leave
}

// SetReadback changes whether slices that are written from now on are read back.
func (c *Copier) SetReadback(on bool) { c.readback.Store(on) }

// SetCompare changes whether regions that are begun from now on are compared.
func (c *Copier) SetCompare(on bool) { c.compare.Store(on) }

// Progress is a snapshot.
func (c *Copier) Progress() Progress {
	return Progress{
		Copied:    c.copied.Load(),
		Skipped:   c.skipped.Load(),
		Compared:  c.compared.Load(),
		Equal:     c.equal.Load(),
		Allocated: c.allocated.Load(),
		Surveyed:  c.allocation.Load() != nil,
		Read:      c.bytesRead.Load(),
		Left:      c.left.Load(),

		ChecksumErrors: c.scribbled.Load(),
		ReadbackErrors: c.misread.Load(),
	}
}

// Run copies until every block is valid, then returns nil; or until ctx ends, then
// returns ctx's error. What fails is told to Fault and tried again.
func (c *Copier) Run(ctx context.Context) error {
	if err := c.survey(ctx); err != nil {
		return err
	}
	// The workers' results go to one finisher, so that a flush and a flag commit
	// serve all that became due during the last one.
	finished := make(chan done, backlog)
	finisher := make(chan struct{})
	go func() {
		defer close(finisher)
		c.finish(ctx, finished)
	}()
	stop := context.AfterFunc(ctx, c.wake)
	defer stop()
	// An initiator may write what cannot be copied, and so end the wait for it.
	look := time.NewTicker(lastRetry)
	defer look.Stop()
	looking := make(chan struct{})
	defer close(looking)
	go func() {
		for {
			select {
			case <-look.C:
				c.wake()
			case <-looking:
				return
			}
		}
	}()

	var workers sync.WaitGroup
	c.mu.Lock()
	c.hire = func() { workers.Go(func() { c.work(ctx, finished) }) }
	for c.workers < c.depth {
		c.workers++
		c.hire()
	}
	c.mu.Unlock()
	workers.Wait()
	close(finished)
	<-finisher
	return ctx.Err()
}

func (c *Copier) survey(ctx context.Context) error {
	if c.allocation.Load() != nil {
		return nil
	}
	wait := firstRetry
	for {
		m, err := c.Survey(ctx, func(blocks uint64) {
			c.allocated.Store(blocks * uint64(c.info.BlockSize))
		})
		if err == nil {
			c.allocated.Store(m.Allocated() * uint64(c.info.BlockSize))
			c.measure(m)
			c.allocation.Store(m)
			c.Fault(nil)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.Fault(err)
		if err := c.rest(ctx, &wait); err != nil {
			return err
		}
	}
}

// measure counts what is left to read: what is allocated in regions that are not
// valid as a whole.
func (c *Copier) measure(m *AllocationMap) {
	var left uint64
	for at, ok := m.NextAllocated(0); ok; {
		r, missing := c.Ledger.NextMissing(uint64(at) / c.RegionBlocks)
		if !missing {
			break
		}
		left += c.bytes(m.Within(c.extent(job{first: r, count: 1})))
		at, ok = m.NextAllocated(lun.LBA((r + 1) * c.RegionBlocks))
	}
	c.left.Store(left)
}

func (c *Copier) from() string { return cmp.Or(c.From, "source") }
func (c *Copier) to() string   { return cmp.Or(c.To, "destination") }

// allow returns when n more bytes may be read, or with ctx's error when that ends.
func (c *Copier) allow(ctx context.Context, n int) error {
	if err := c.Throttle.Wait(ctx, n); err != nil || c.Shared == nil {
		return err
	}
	return c.Shared.Wait(ctx, n)
}

func (c *Copier) bytes(runs []lun.Extent) (n uint64) {
	for _, e := range runs {
		n += c.info.Bytes(e)
	}
	return n
}

// rest waits before another attempt, each time longer; it returns ctx's error when
// that ends.
func (c *Copier) rest(ctx context.Context, wait *time.Duration) error {
	t := time.NewTimer(*wait)
	defer t.Stop()
	*wait = min(2**wait, lastRetry)
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *Copier) work(ctx context.Context, finished chan<- done) {
	wait := firstRetry
	for {
		j, ok := c.take(ctx)
		if !ok {
			return
		}
		d, err := c.copy(ctx, j)
		if err != nil {
			c.release(ctx, j, err, firstRetry)
			_ = c.rest(ctx, &wait) // take sees that ctx ended
			continue
		}
		wait = firstRetry
		finished <- d
	}
}

// take hands out the next job: partial regions first, then in rising order, and
// round again for what failed. It waits while all that is left is in flight or
// rests after a failure; false means that nothing is left, ctx ended or there are too
// many workers, and that the caller is none any more.
func (c *Copier) take(ctx context.Context) (job, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for ctx.Err() == nil && c.workers <= c.depth {
		if r, ok := c.free(c.Ledger.NextPartial, &c.partial); ok {
			return c.claim(r, 1, false), true
		}
		if r, ok := c.free(c.Ledger.NextMissing, &c.missing); ok {
			count, hole := c.holeSpan(r)
			c.missing = r + count
			return c.claim(r, count, hole), true
		}
		if _, any := c.Ledger.NextMissing(0); !any && len(c.inFlight) == 0 {
			break
		}
		c.cond.Wait()
	}
	c.workers--
	return job{}, false
}

// free is the next region that next gives and that may be worked on, from cursor on
// and then from the beginning; the cursor moves past it.
func (c *Copier) free(next func(uint64) (uint64, bool), cursor *uint64) (uint64, bool) {
	for _, from := range [...]uint64{*cursor, 0} {
		for r, ok := next(from); ok; r, ok = next(r + 1) {
			if c.mayCopy(r) {
				*cursor = r + 1
				return r, true
			}
		}
	}
	return 0, false
}

// mayCopy tells whether nobody works on the region and it does not rest.
func (c *Copier) mayCopy(r uint64) bool {
	if _, busy := c.inFlight[r]; busy {
		return false
	}
	f, failed := c.failing[r]
	return !failed || !time.Now().Before(f.until)
}

// holeSpan is how many regions from r on hold no allocated block, and whether r is
// one of them; the span ends at regions in flight or valid.
func (c *Copier) holeSpan(r uint64) (count uint64, hole bool) {
	next, ok := c.allocation.Load().NextAllocated(lun.LBA(r * c.RegionBlocks))
	end := (c.Volume.Blocks + c.RegionBlocks - 1) / c.RegionBlocks
	if ok {
		end = uint64(next) / c.RegionBlocks
	}
	if end <= r {
		return 1, false
	}
	for most := c.mostHoles(); count < most && r+count < end; {
		if m, ok := c.Ledger.NextMissing(r + count); !ok || m != r+count || !c.mayCopy(m) {
			break
		}
		count++
	}
	return max(1, count), true
}

// mostHoles is how many wholly unallocated regions may be one job.
func (c *Copier) mostHoles() uint64 {
	switch info := c.Destination.Info(); {
	case !c.compare.Load():
		return holeSpanRegions
	case tellsBlank(info):
		return comparedSpanRegions
	}
	return 1 // each is read from the destination
}

func (c *Copier) claim(first, count uint64, hole bool) job {
	for r := first; r < first+count; r++ {
		c.inFlight[r] = struct{}{}
	}
	return job{first, count, hole}
}

// release gives a job's regions back; err is why it failed, nil if it did not. The
// regions of a job that failed rest, at least for rest, each time longer; once there
// are none the fault is over.
func (c *Copier) release(ctx context.Context, j job, err error, rest time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.cond.Broadcast()
	failed := len(c.failing) > 0
	for r := j.first; r < j.first+j.count; r++ {
		delete(c.inFlight, r)
		if err == nil {
			delete(c.failing, r)
		}
	}
	switch {
	case ctx.Err() != nil: // stopped, which is no fault of the region
	case err != nil:
		f := failure{wait: max(min(2*c.failing[j.first].wait, lastRetry), rest)}
		f.until = time.Now().Add(f.wait)
		for r := j.first; r < j.first+j.count; r++ {
			c.failing[r] = f
		}
		time.AfterFunc(f.wait, c.wake)
		c.Fault(err)
	case failed && len(c.failing) == 0:
		c.Fault(nil)
	}
}

func (c *Copier) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cond.Broadcast()
}

func (c *Copier) extent(j job) lun.Extent {
	return lun.Extent{Start: lun.LBA(j.first * c.RegionBlocks), Blocks: j.count * c.RegionBlocks}.Intersect(c.Volume)
}

// finish has the blocks of finished jobs flagged, many jobs at a time.
func (c *Copier) finish(ctx context.Context, finished <-chan done) {
	wait := firstRetry
	for d := range finished {
		batch := []done{d}
		for more := true; more && len(batch) < backlog; {
			select {
			case d, ok := <-finished:
				if more = ok; ok {
					batch = append(batch, d)
				}
			default:
				more = false
			}
		}
		var copied []Copied
		for _, d := range batch {
			for _, e := range d.extents {
				copied = append(copied, Copied{e, d.era})
			}
		}
		err := c.Ledger.Commit(ctx, copied)
		for _, d := range batch {
			switch {
			case err != nil:
				c.release(ctx, d.job, err, firstRetry)
			case d.unreadable != nil:
				c.account(d)
				c.release(ctx, d.job, d.unreadable, unreadableRest)
			default:
				c.account(d)
				c.release(ctx, d.job, nil, 0)
			}
		}
		if err == nil {
			wait = firstRetry
		} else if c.rest(ctx, &wait) != nil {
			continue // the workers may still hold results to take
		}
	}
}

// account counts a job whose blocks are valid.
func (c *Copier) account(d done) {
	c.copied.Add(d.copied)
	c.skipped.Add(d.skipped)
	c.compared.Add(d.compared)
	c.equal.Add(d.equal)
	if d.hole {
		return
	}
	if r, ok := c.Ledger.NextMissing(d.first); ok && r == d.first {
		return // something of it was left out and comes again
	}
	n := c.bytes(c.allocation.Load().Within(c.extent(d.job)))
	c.left.Add(-min(n, c.left.Load()))
}
