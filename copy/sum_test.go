package copier

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

// sumLedger flags what it is told at once; before is called when a slice is locked.
type sumLedger struct {
	blocks, region uint64
	before         func(lun.Extent)

	mu    sync.Mutex
	valid map[lun.LBA]bool
}

func (l *sumLedger) NextPartial(uint64) (uint64, bool) { return 0, false }
func (l *sumLedger) NextMissing(from uint64) (uint64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for at := from * l.region; at < l.blocks; at++ {
		if !l.valid[lun.LBA(at)] {
			return at / l.region, true
		}
	}
	return 0, false
}
func (l *sumLedger) Begin(lun.Extent) uint64 { return 0 }
func (l *sumLedger) Invalid(e lun.Extent) (runs []lun.Extent, _ error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for at := e.Start; at < e.End(); at++ {
		if !l.valid[at] {
			runs = lun.Join(runs, lun.Extent{Start: at, Blocks: 1})
		}
	}
	return runs, nil
}
func (l *sumLedger) Exclude(_ context.Context, e lun.Extent) (func(), error) {
	if l.before != nil {
		l.before(e)
	}
	return func() {}, nil
}
func (l *sumLedger) TryExclude(lun.Extent) (func(), bool) { return func() {}, true }
func (l *sumLedger) Commit(_ context.Context, done []Copied) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range done {
		for at := d.Start; at < d.End(); at++ {
			l.valid[at] = true
		}
	}
	return nil
}
func (l *sumLedger) Unreadable(context.Context, lun.Extent, []lun.Extent) {}

// bent is a Device whose reads and writes a test bends.
type bent struct {
	*luntest.Memory
	read  func(p []byte)
	write func(p []byte, start lun.LBA) []byte
}

func (b *bent) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	err := b.Memory.ReadAt(ctx, p, start)
	if b.read != nil {
		b.read(p)
	}
	return err
}

func (b *bent) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	if b.write != nil {
		p = b.write(p, start)
	}
	return b.Memory.WriteAt(ctx, p, start)
}

// sumWorld is a source full of data but for a hole, and a blank destination.
type sumWorld struct {
	depth               int // 0 is 2
	compare             bool
	t                   *testing.T
	source, destination *bent
	ledger              *sumLedger
	content             []byte
	faults              chan error
}

func newSumWorld(t *testing.T) *sumWorld {
	const blocks, region = 4096, 1024
	w := &sumWorld{t: t, content: make([]byte, blocks*512), faults: make(chan error, 1024),
		source:      &bent{Memory: luntest.NewThinMemory(512, blocks)},
		destination: &bent{Memory: luntest.NewThinMemory(512, blocks)},
		ledger:      &sumLedger{blocks: blocks, region: region, valid: map[lun.LBA]bool{}},
	}
	_, _ = rand.NewChaCha8([32]byte{7}).Read(w.content)
	clear(w.content[100*512 : 400*512])
	clear(w.content[region*512 : 2*region*512])
	for _, e := range []lun.Extent{{Blocks: region}, {Start: 2 * region, Blocks: 2 * region}} {
		if err := w.source.WriteAt(t.Context(), w.content[e.Start*512:e.End()*512], e.Start); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// run copies to the end and wants every block right.
func (w *sumWorld) run(readback bool) Progress {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	c := New(Options{Source: w.source, Destination: w.destination, Ledger: w.ledger,
		Volume: lun.Extent{Blocks: w.ledger.blocks}, RegionBlocks: w.ledger.region, Depth: cmp.Or(w.depth, 2), Readback: readback, Compare: w.compare,
		Throttle: NewThrottle(0), Fault: func(err error) {
			if err != nil {
				w.faults <- err
			}
		}})
	if err := c.Run(ctx); err != nil {
		w.t.Fatal(err)
	}
	w.destination.read = nil
	got := make([]byte, len(w.content))
	if err := w.destination.ReadAt(ctx, got, 0); err != nil {
		w.t.Fatal(err)
	}
	if !bytes.Equal(got, w.content) {
		w.t.Error("the destination does not hold what the source does")
	}
	return c.Progress()
}

// faulted wants a fault of a checksum.
func (w *sumWorld) faulted() {
	w.t.Helper()
	select {
	case err := <-w.faults:
		if !errors.Is(err, ErrChecksum) {
			w.t.Errorf("the fault is %v", err)
		}
	default:
		w.t.Error("no fault was told")
	}
}

// Caught: without the check before the write the destination holds the scribble, and as well
// where the checksums are taken at the write and not at the read: at the first run each. The
// same where blocks that are equal are not held against their checksums.
func TestABufferScribbledBetweenReadAndWriteIsCopiedAgain(t *testing.T) {
	for how := range 4 {
		data := how%2 == 0
		w := newSumWorld(t)
		if how >= 2 {
			w = seededWorld(t, how == 3)
		}
		w.depth = 1 // what another worker has just read, and not summed yet, stays as it is
		var mu sync.Mutex
		var kept [][]byte
		w.source.read = func(p []byte) {
			mu.Lock()
			defer mu.Unlock()
			kept = append(kept, p)
		}
		var once sync.Once
		w.ledger.before = func(lun.Extent) {
			once.Do(func() {
				mu.Lock()
				defer mu.Unlock()
				for _, p := range kept {
					if data {
						p[len(p)/2] ^= 1
					} else {
						clear(p) // zeroes are not written, and are checked all the same
					}
				}
			})
		}
		if p := w.run(false); p.ChecksumErrors == 0 || p.ReadbackErrors != 0 {
			t.Errorf("progress %+v", p)
		}
		w.faulted()
	}
}

// Caught: without the comparison of what was read back, at the first run.
func TestReadbackCatchesAWriteThatTheDestinationSpoils(t *testing.T) {
	w := newSumWorld(t)
	var spoilt atomic.Bool
	w.destination.write = func(p []byte, _ lun.LBA) []byte {
		if spoilt.Swap(true) {
			return p
		}
		p = bytes.Clone(p)
		p[len(p)/3] ^= 0x80
		return p
	}
	if p := w.run(true); p.ReadbackErrors != 1 || p.ChecksumErrors != 0 {
		t.Errorf("progress %+v", p)
	}
	w.faulted()
}

// Caught: without reading zeroes back, at the first run.
func TestReadbackCatchesZeroesThatAreNotThere(t *testing.T) {
	w := newSumWorld(t)
	// What is there must go: a hole of the source, and zeroes inside of data.
	if err := w.destination.WriteAt(t.Context(), bytes.Repeat([]byte{0xee}, len(w.content)), 0); err != nil {
		t.Fatal(err)
	}
	var dropped atomic.Int32
	ignoring := &ignoreZeroes{bent: w.destination, left: &dropped}
	dropped.Store(2)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c := New(Options{Source: w.source, Destination: ignoring, Ledger: w.ledger,
		Volume: lun.Extent{Blocks: w.ledger.blocks}, RegionBlocks: w.ledger.region, Depth: 1, Readback: true,
		Throttle: NewThrottle(0), Fault: func(error) {}})
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(w.content))
	if err := w.destination.ReadAt(ctx, got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, w.content) || c.Progress().ReadbackErrors == 0 {
		t.Errorf("content right: %v, progress %+v", bytes.Equal(got, w.content), c.Progress())
	}
}

// ignoreZeroes answers some WriteZeroes without doing them.
type ignoreZeroes struct {
	*bent
	left *atomic.Int32
}

func (d *ignoreZeroes) WriteZeroes(ctx context.Context, e lun.Extent) error {
	if d.left.Add(-1) >= 0 {
		return nil
	}
	return d.bent.WriteZeroes(ctx, e)
}

func TestDepthChangesWhileTheCopyRuns(t *testing.T) {
	w := newSumWorld(t)
	var most, now atomic.Int32
	reached := make(chan struct{})
	gate := make(chan struct{})
	w.source.Intercept(func(ctx context.Context, op luntest.Op, _ lun.Extent) error {
		if op != luntest.Read {
			return nil
		}
		n := now.Add(1)
		defer now.Add(-1)
		if n > most.Load() {
			most.Store(n)
		}
		if n == 3 {
			close(reached)
		}
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c := New(Options{Source: w.source, Destination: w.destination, Ledger: w.ledger,
		Volume: lun.Extent{Blocks: w.ledger.blocks}, RegionBlocks: w.ledger.region, Depth: 1,
		Throttle: NewThrottle(0), Fault: func(error) {}})
	c.SetDepth(2) // before it runs
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	for now.Load() != 2 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	c.SetDepth(3)
	select {
	case <-reached:
	case <-ctx.Done():
		t.Fatal("a third region is not begun")
	}
	c.SetDepth(1)
	close(gate)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.workers != 0 {
		t.Errorf("%d workers left", c.workers)
	}
}

// BenchmarkChecksum is what the guard costs for each MiB: sealed, then checked.
func BenchmarkChecksum(b *testing.B) {
	c := New(Options{Source: luntest.NewThinMemory(512, 2048), RegionBlocks: 2048})
	buf := c.pool.Get().(*buffer)
	buf.of = lun.Extent{Blocks: 2048}
	b.SetBytes(1 << 20)
	for b.Loop() {
		c.seal(buf, buf.of)
		if err := c.check(buf, buf.of); err != nil {
			b.Fatal(err)
		}
	}
}
