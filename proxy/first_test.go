package proxy

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lunshift/lun"
	"lunshift/state"
	"lunshift/target"
)

// steady is a device whose cache survives a loss of power.
type steady struct{ lun.Device }

func (s steady) Info() lun.Info {
	i := s.Device.Info()
	i.VolatileCache = false
	return i
}

// BenchmarkFirstWrites is writes of 4 KiB, each to blocks that are not valid (first) or that
// were written before (again), onto a file, as it is (volatile) and as an array with a
// cache that lasts would be (steady), by so many writers.
func BenchmarkFirstWrites(b *testing.B) {
	for _, volatile := range []bool{false, true} {
		for _, first := range []bool{true, false} {
			for _, depth := range []int{1, 8, 32, 128} {
				name := fmt.Sprintf("%s/%s/depth=%d", map[bool]string{true: "volatile", false: "steady"}[volatile], map[bool]string{true: "first", false: "again"}[first], depth)
				b.Run(name, func(b *testing.B) { benchmarkFirstWrites(b, volatile, first, depth) })
			}
		}
	}
}

func benchmarkFirstWrites(b *testing.B, volatile, first bool, depth int) {
	ctx := context.Background()
	dir := b.TempDir()
	open := func(name string) lun.Device {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			b.Fatal(err)
		}
		if err := os.Truncate(path, 64<<30); err != nil {
			b.Fatal(err)
		}
		d, err := lun.Open(ctx, path, lun.Options{BlockSize: 4096, Log: quiet()})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { d.Close() })
		return d
	}
	destination := open("destination")
	if !volatile {
		destination = steady{destination}
	}
	store, err := state.Open(filepath.Join(dir, "state"), state.Options{Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	tgt, err := target.New(target.Config{Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	if err := store.PutRecords(ctx, state.Record{Volume: "vol", Phase: string(Ready), Paused: true}); err != nil {
		b.Fatal(err)
	}
	v, err := Open(ctx, Config{
		Name: "vol", IQN: "iqn.2026-11.net.example:vol", Source: open("source"), Destination: destination,
		RegionSize: 1 << 20, CopyDepth: 1, Store: store, Target: tgt, Log: quiet(),
	})
	if err != nil {
		b.Fatal(err)
	}
	defer v.Close()
	if err := v.Start(ctx); err != nil {
		b.Fatal(err)
	}
	var n atomic.Uint64
	blocks := v.Info().Blocks
	at := func() lun.LBA {
		i := n.Add(1)
		if !first {
			i %= 4096
		}
		return lun.LBA(i * 0x9E3779B1 % blocks) // an odd factor: no block comes twice
	}
	p := make([]byte, 4096)
	if !first {
		for range 4096 {
			if err := v.WriteAt(ctx, p, at()); err != nil {
				b.Fatal(err)
			}
		}
	}
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
				if err := v.WriteAt(ctx, p, at()); err != nil {
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
	if len(all) > 0 {
		b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-p50")
		b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "µs-p99")
	}
}

// BenchmarkOneFdatasync is what a first write at depth 1 is held against.
func BenchmarkOneFdatasync(b *testing.B) {
	file, err := os.Create(filepath.Join(b.TempDir(), "f"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	p := make([]byte, 4096)
	var took []time.Duration
	for b.Loop() {
		began := time.Now()
		if _, err := file.WriteAt(p, int64(len(took)%4096)*4096); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs-p50")
}
