package lun_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// BenchmarkISCSI runs random I/O against tgtd; the target's processor time is
// reported beside our own.
func BenchmarkISCSI(b *testing.B) {
	d, err := peer.NewTgtd(b.Context(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	if err := d.AddTarget(b.Context(), testIQN, []peer.Unit{{Path: sparseFile(b, 256<<20)}}); err != nil {
		b.Fatal(err)
	}
	dev := openPath(b, d.LUN(testIQN, 1).URL(), lun.Options{})
	fill := make([]byte, 1<<20)
	for n := range 256 {
		if err := dev.WriteAt(b.Context(), fill, lun.LBA(n*2048)); err != nil {
			b.Fatal(err)
		}
	}
	for _, size := range []int{4096, 256 << 10} {
		for _, depth := range []int{1, 32} {
			for _, write := range []bool{false, true} {
				name := fmt.Sprintf("read%dKiB/depth%d", size>>10, depth)
				if write {
					name = fmt.Sprintf("write%dKiB/depth%d", size>>10, depth)
				}
				b.Run(name, func(b *testing.B) { load(b, d, dev, size, depth, write) })
			}
		}
	}
}

func load(b *testing.B, d *peer.Tgtd, dev lun.Device, size, depth int, write bool) {
	b.ReportAllocs()
	b.SetBytes(int64(size))
	target, err := peer.CPUTime(d.PID())
	if err != nil {
		b.Fatal(err)
	}
	self, err := selfCPU()
	if err != nil {
		b.Fatal(err)
	}
	calls := ioCalls()
	var next atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	for w := range depth {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(w)))
			p := make([]byte, size)
			blocks := uint64(size / 512)
			for next.Add(1) <= int64(b.N) {
				at := lun.LBA(rnd.Uint64N(dev.Info().Blocks/blocks) * blocks)
				var err error
				if write {
					err = dev.WriteAt(b.Context(), p, at)
				} else {
					err = dev.ReadAt(b.Context(), p, at)
				}
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	target2, _ := peer.CPUTime(d.PID())
	self2, _ := selfCPU()
	b.ReportMetric(float64((target2-target).Nanoseconds())/float64(b.N), "target-cpu-ns/op")
	calls2 := ioCalls()
	b.ReportMetric(float64(calls2-calls)/float64(b.N), "io-syscalls/op")
	b.ReportMetric(float64((self2-self).Nanoseconds())/float64(b.N), "own-cpu-ns/op")
}
