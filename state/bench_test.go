package state

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// BenchmarkSet is first writes of 4 KiB by so many writers. flags/s counts their
// 512-byte blocks, valid and dirty once each.
func BenchmarkSet(b *testing.B) {
	for _, writers := range []int{1, 2, 8, 32, 128} {
		b.Run(fmt.Sprint("writers=", writers), func(b *testing.B) {
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
			took := make([][]time.Duration, writers)
			for w := range writers {
				wg.Go(func() {
					for n.Add(1) <= int64(b.N) {
						begin := time.Now()
						if err := f.Set(context.Background(), Valid|Dirty, Run{rand.Uint64N(1<<28) * 8, 8}); err != nil {
							b.Error(err)
							return
						}
						took[w] = append(took[w], time.Since(begin))
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			after := s.Stats()
			commits := max(after.Commits-before.Commits, 1)
			b.ReportMetric(float64(b.N)/float64(commits), "calls/commit")
			b.ReportMetric(float64((after.Latency.Sum-before.Latency.Sum).Microseconds())/float64(commits), "µs/commit")
			b.ReportMetric(float64(after.FlagsSet-before.FlagsSet)/b.Elapsed().Seconds(), "flags/s")
			reportLatency(b, slices.Concat(took...))
		})
	}
}

// BenchmarkFdatasync is what one commit is held against: 400 bytes appended to a file of
// the same disk and synced, by one caller.
func BenchmarkFdatasync(b *testing.B) {
	file, err := os.Create(filepath.Join(b.TempDir(), "log"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(2 * memTableSize); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 400)
	var took []time.Duration
	for b.Loop() {
		at := int64(len(took)*len(p)) % memTableSize
		begin := time.Now()
		if _, err := file.WriteAt(p, at); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
	}
	reportLatency(b, took)
}

func reportLatency(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	for _, p := range []int{50, 99} {
		b.ReportMetric(float64(took[(len(took)-1)*p/100].Nanoseconds())/1e3, fmt.Sprintf("µs-p%d", p))
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

// BenchmarkFragmented asks for flags of 1 TiB of which every other 4 KiB was written, at
// random, so that nearly every bitmap comes from the database, and in one place.
func BenchmarkFragmented(b *testing.B) {
	dir := b.TempDir()
	g := Geometry{Blocks: 1 << 31, RegionBlocks: 2048}
	fill(b, dir, g, 1, everyOther)
	disk := float64(size(b, dir)) / float64(g.Blocks/g.RegionBlocks)
	o := measureOpen(b, dir, g)
	s := openBounded(b, dir, 0)
	f, err := s.Flags("v", g)
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		blocks uint64
	}{
		{"all-over", g.Blocks},
		{"in-64GiB", 64 << 30 / 512},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if at := rand.Uint64N(c.blocks/16) * 16; !f.All(Valid|Dirty, Run{at, 8}) {
					b.Fatalf("block %d is not as it was written", at)
				}
			}
			b.ReportMetric(disk, "B-disk/region")
			b.ReportMetric(o.both.Seconds(), "s/open")
			b.ReportMetric(o.heap/(1<<20), "MiB-heap")
			b.ReportMetric(float64(s.Stats().BitmapBytes)/(1<<20), "MiB-bitmaps")
		})
	}
}
