package proxy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// whole is a volume of 2,560 blocks in phase synced whose mirror is whole.
func whole(t *testing.T) (*rig, *Volume) {
	t.Helper()
	r := newRig(t, 20*testRegion/testBlock)
	r.cfg.Mirror = true
	v := r.open(t)
	t.Cleanup(func() { r.close(t) })
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	eventually(t, v, "the mirror is whole", func(s Status) bool { return s.Mirror != nil && s.Mirror.State == "whole" })
	return r, v
}

// What is being written needs no copy: under load there is always something of it, and looking for what
// is missing took more processor time than the writes. Caught: a write in flight that is
// copied, or counts as behind.
func TestWritesInFlightAreNotCopiedByTheMirror(t *testing.T) {
	r, v := whole(t)
	entered, release := make(chan struct{}), make(chan struct{})
	r.source.Before = func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Write && e.Start == 99 {
			close(entered)
			<-release
		}
		return nil
	}
	written := make(chan error, 1)
	go func() { written <- v.WriteAt(t.Context(), stamp(99, 3), 99) }()
	<-entered
	if s := v.Status().Mirror; s.State != "whole" || s.Behind != 0 {
		t.Errorf("with a write in flight the mirror is %+v", *s)
	}
	reads := r.destination.Count(luntest.Read)
	for range 3 { // rounds
		fill(t, v, lun.Extent{Start: 500, Blocks: 4}, 4)
		eventually(t, v, "a round is over", func(Status) bool { return v.raw().Count(state.Dirty) == 1 })
	}
	if n := r.destination.Count(luntest.Read) - reads; n != 0 {
		t.Errorf("%d reads for copies", n)
	}
	close(release)
	must(t, <-written)
	expect(t, r.source, lun.Extent{Start: 99, Blocks: 1}, 3)
	eventually(t, v, "what is alike is noted", func(Status) bool { return v.raw().Count(state.Dirty) == 0 })
}

// A mirror that is broken for long takes no memory for each write, and a copy that was begun
// before is not taken for the content that was written since. Caught: suspects without a
// bound; doubts that do not count.
func TestManySuspectsAreOneDoubt(t *testing.T) {
	r, v := whole(t)
	var gone atomic.Bool
	r.source.Before = func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if gone.Load() && (op == luntest.Write || op == luntest.Flush) {
			return lun.ErrUnavailable
		}
		return nil
	}
	gone.Store(true)
	back := v.ways.Load().back
	e := lun.Extent{Start: 7, Blocks: 1}
	before := back.Begin(e)
	fill(t, v, e, 5)
	for i := range 2 * mostSuspects {
		fill(t, v, lun.Extent{Start: lun.LBA(20 + 2*i), Blocks: 1}, 5)
	}
	v.mu.Lock()
	n := len(back.suspects)
	v.mu.Unlock()
	if n > mostSuspects {
		t.Errorf("%d suspects", n)
	}
	missing := func() bool {
		left, err := back.Invalid(e)
		must(t, err)
		return len(left) > 0
	}
	gone.Store(false)
	must(t, v.stopMirror(t.Context()))
	must(t, back.Commit(t.Context(), []copier.Copied{{Extent: e, Era: before}}))
	if !missing() {
		t.Error("a copy counts that was begun before the write")
	}
	v.workMirror()
	eventually(t, v, "the mirror is whole again", func(s Status) bool { return s.Mirror.State == "whole" })
	expect(t, r.source, e, 5)
	expect(t, r.source, lun.Extent{Start: 20, Blocks: 1}, 5)
}

// BenchmarkMirror is writes of 4 KiB at random, in phase synced, by 32 writers onto LUNs in memory,
// with a mirror and without one.
func BenchmarkMirror(b *testing.B) {
	for _, mib := range []uint64{4, 256} {
		for _, on := range []bool{false, true} {
			b.Run(fmt.Sprintf("within=%dMiB/mirror=%v", mib, on), func(b *testing.B) { benchmarkMirror(b, mib<<8, on) })
		}
	}
}

func benchmarkMirror(b *testing.B, within uint64, on bool) {
	ctx := context.Background()
	const blocks = 256 << 8
	store, err := state.Open(filepath.Join(b.TempDir(), "state"), state.Options{Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	tgt, err := target.New(target.Config{Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	v, err := Open(ctx, Config{
		Name: "vol", IQN: "iqn.2026-11.net.example:vol",
		Source: luntest.NewThinMemory(4096, blocks), Destination: luntest.NewThinMemory(4096, blocks),
		RegionSize: 1 << 20, CopyDepth: 8, Store: store, Target: tgt, Log: quiet(),
	})
	if err != nil {
		b.Fatal(err)
	}
	defer v.Close()
	if err := v.Start(ctx); err != nil {
		b.Fatal(err)
	}
	for v.Phase() != Synced {
		time.Sleep(time.Millisecond)
	}
	if err := v.SetMirror(ctx, on); err != nil {
		b.Fatal(err)
	}
	const depth = 32
	took := make([][]time.Duration, depth)
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	var wg sync.WaitGroup
	for w := range depth {
		p := make([]byte, 4096)
		p[0] = byte(w + 1)
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				began := time.Now()
				if err := v.WriteAt(ctx, p, lun.LBA(rand.Uint64N(within))); err != nil {
					b.Error(err)
					return
				}
				took[w] = append(took[w], time.Since(began))
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	all := slices.Concat(took...)
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-p50")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "µs-p99")
}
