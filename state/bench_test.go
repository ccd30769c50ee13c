package state

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

func BenchmarkAll(b *testing.B) {
	s := open(b, b.TempDir())
	g := Geometry{Blocks: 1 << 31, RegionBlocks: 2048} // 1 TiB in blocks of 512 bytes
	f, err := s.Flags("v", g)
	if err != nil {
		b.Fatal(err)
	}
	if err := f.Set(context.Background(), Valid, Run{0, 1 << 30}, Run{1<<30 + 5, 64}); err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name string
		run  Run
	}{
		{"all", Run{12345678, 8}},
		{"partial", Run{1<<30 + 5, 8}},
		{"none", Run{1<<30 + 1<<20, 8}},
		{"all1MiB", Run{12345678, 2048}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					f.All(Valid, c.run)
				}
			})
		})
		b.Run("runs/"+c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f.Runs(Valid, c.run, func(Run, bool) bool { return true })
			}
		})
	}
}

func BenchmarkSet(b *testing.B) {
	for _, callers := range []int{1, 4, 16, 64, 256} {
		b.Run(fmt.Sprint("callers=", callers), func(b *testing.B) {
			s := open(b, b.TempDir())
			f, err := s.Flags("v", Geometry{Blocks: 1 << 31, RegionBlocks: 2048})
			if err != nil {
				b.Fatal(err)
			}
			before := s.Stats()
			b.ReportAllocs()
			b.ResetTimer()
			var wg sync.WaitGroup
			var n atomic.Int64
			for range callers {
				wg.Go(func() {
					for n.Add(1) <= int64(b.N) {
						if err := f.Set(context.Background(), Valid|Dirty, Run{rand.Uint64N(1<<28) * 8, 8}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			after := s.Stats()
			commits := max(after.Commits-before.Commits, 1)
			b.ReportMetric(float64(b.N)/float64(commits), "calls/commit")
			b.ReportMetric(float64((after.Latency.Sum-before.Latency.Sum).Microseconds())/float64(commits), "µs/commit")
		})
	}
}

// BenchmarkOpen is the flags of 64 TiB in regions of 1 MiB, 1 % of them partial,
// taken up after a restart: at 4 KiB written in each, and with bitmaps that cannot be
// stored any shorter.
func BenchmarkOpen(b *testing.B) {
	for _, c := range []struct {
		name   string
		bitmap func(words []uint64)
	}{
		{"one-4KiB", func(words []uint64) { words[0] = 0xff }},
		{"random", func(words []uint64) {
			for i := range words {
				words[i] = rand.Uint64()
			}
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			dir := b.TempDir()
			fill(b, dir, largeGeometry, 100, c.bitmap)
			b.ReportMetric(float64(size(b, dir))/(1<<20), "MiB-disk")
			for b.Loop() {
				o := measureOpen(b, dir, largeGeometry)
				b.ReportMetric(o.store.Seconds(), "s/store")
				b.ReportMetric(o.both.Seconds(), "s/both")
				b.ReportMetric(o.heap/(1<<20), "MiB-heap")
			}
		})
	}
}
