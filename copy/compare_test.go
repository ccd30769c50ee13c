package copier

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

// seededWorld is a sumWorld whose destination holds what the source does, but for what a
// test changes there.
func seededWorld(t *testing.T, thick bool) *sumWorld {
	w := newSumWorld(t)
	w.compare = true
	if thick {
		w.destination = &bent{Memory: luntest.NewMemory(lun.Info{BlockSize: 512, Blocks: w.ledger.blocks, VolatileCache: true})}
	}
	for _, e := range []lun.Extent{{Blocks: w.ledger.region}, {Start: lun.LBA(2 * w.ledger.region), Blocks: 2 * w.ledger.region}} {
		w.holds(e, w.content[e.Start*512:e.End()*512])
	}
	return w
}

// holds puts p onto the destination.
func (w *sumWorld) holds(e lun.Extent, p []byte) {
	w.t.Helper()
	if err := w.destination.Memory.WriteAt(w.t.Context(), p, e.Start); err != nil {
		w.t.Fatal(err)
	}
}

// The counts tell what was found: here 3 runs of data and one of a hole differ.
//
// Caught: holes taken for zero, so that the old content stays; whole runs written.
func TestComparingWritesOnlyWhatDiffers(t *testing.T) {
	for _, thick := range []bool{false, true} {
		t.Run(fmt.Sprintf("thick %v", thick), func(t *testing.T) {
			w := seededWorld(t, thick)
			old := bytes.Repeat([]byte{0xa5}, 16*512)
			w.holds(lun.Extent{Start: 10, Blocks: 1}, old[:512])
			w.holds(lun.Extent{Start: 2000, Blocks: 16}, old) // a hole of the source
			w.holds(lun.Extent{Start: 3000, Blocks: 2}, old[:1024])
			w.holds(lun.Extent{Start: 4095, Blocks: 1}, old[:512])
			writes, zeroes := w.destination.Count(luntest.Write), w.destination.Count(luntest.Zero)
			p := w.run(true)
			writes, zeroes = w.destination.Count(luntest.Write)-writes, w.destination.Count(luntest.Zero)-zeroes
			if p.Copied != 4*512 || writes != 3 || zeroes != 1 {
				t.Errorf("%d bytes copied by %d writes, %d of zeroes", p.Copied, writes, zeroes)
			}
			if p.Compared != p.Equal+(4+16)*512 || p.Copied+p.Skipped+p.Equal != 4096*512 {
				t.Errorf("progress %+v", p)
			}
			if least := uint64(3 * 1024 * 512); p.Equal < least-4*512 || thick && p.Compared != 4096*512 {
				t.Errorf("progress %+v", p)
			}
		})
	}
}

// A destination that cannot read what it holds is written.
//
// Caught: what could not be read counted as compared, or taken for equal.
func TestWhatTheDestinationCannotReadIsWritten(t *testing.T) {
	w := seededWorld(t, true)
	bad := lun.Extent{Start: 2500, Blocks: 3}
	var mended atomic.Bool
	w.destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		switch {
		case op == luntest.Write && e == bad:
			mended.Store(true)
		case op == luntest.Read && e.Overlaps(bad) && !mended.Load():
			return &lun.SenseError{Key: 0x3, ASC: 0x11}
		}
		return nil
	})
	if p := w.run(false); p.Copied != 3*512 || p.Compared != 4093*512 || p.Equal != p.Compared {
		t.Errorf("progress %+v", p)
	}
	if len(w.faults) > 0 {
		t.Errorf("fault: %v", <-w.faults)
	}
}

// Both sides are read at a time, as many regions as the depth says; those of a hole too, of
// which nothing is read from the source.
//
// Caught: one side read after the other; the regions of a hole one by one.
func TestBothSidesAreReadAtOnce(t *testing.T) {
	const depth = 4
	for _, c := range []struct {
		name   string
		reads  int
		source *luntest.Memory // nil is one with a region of four that is a hole
	}{{"data", 2*depth - 1, nil}, {"a hole", depth, luntest.NewThinMemory(512, 4096)}} {
		t.Run(c.name, func(t *testing.T) {
			w := seededWorld(t, true)
			if c.source != nil {
				w.source.Memory = c.source
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			var mu sync.Mutex
			reads, all := 0, make(chan struct{})
			wait := func(ctx context.Context, op luntest.Op, _ lun.Extent) error {
				if op != luntest.Read {
					return nil
				}
				mu.Lock()
				if reads++; reads == c.reads {
					close(all)
				}
				mu.Unlock()
				select {
				case <-all:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			w.source.Intercept(wait)
			w.destination.Intercept(wait)
			copier := New(Options{Source: w.source, Destination: w.destination, Ledger: w.ledger,
				Volume: lun.Extent{Blocks: w.ledger.blocks}, RegionBlocks: w.ledger.region, Depth: depth, Compare: true,
				Throttle: NewThrottle(0), Fault: func(error) {}})
			if err := copier.Run(ctx); err != nil {
				t.Fatalf("%d of %d reads were under way at once: %v", reads, c.reads, err)
			}
		})
	}
}

func TestOutsideGivesWhatIsInNoneOfTheOthers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 40
		draw := func(name string) (runs []lun.Extent, in [blocks]bool) {
			for at := range blocks {
				if in[at] = rapid.Bool().Draw(t, name); in[at] {
					runs = lun.Join(runs, lun.Extent{Start: lun.LBA(at), Blocks: 1})
				}
			}
			return runs, in
		}
		runs, in := draw("runs")
		others, out := draw("others")
		var got [blocks]bool
		for _, e := range lun.Without(runs, others) {
			if e.Empty() {
				t.Fatalf("an empty run at %d", e.Start)
			}
			for at := e.Start; at < e.End(); at++ {
				got[at] = true
			}
		}
		for at := range blocks {
			if got[at] != (in[at] && !out[at]) {
				t.Fatalf("block %d: %v; runs %v, others %v", at, got[at], runs, others)
			}
		}
	})
}
