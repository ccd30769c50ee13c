package copier

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

func TestAllocationMapNeverMissesAnAllocatedBlock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 2000
		dev := luntest.NewThinMemory(512, blocks)
		allocated := make([]bool, blocks)
		for range rapid.IntRange(0, 60).Draw(t, "extents") {
			start := rapid.IntRange(0, blocks-1).Draw(t, "start")
			n := rapid.IntRange(1, min(40, blocks-start)).Draw(t, "blocks")
			if err := dev.WriteAt(context.Background(), make([]byte, n*512), lun.LBA(start)); err != nil {
				t.Fatal(err)
			}
			for i := start; i < start+n; i++ {
				allocated[i] = true
			}
		}
		limit := rapid.SampledFrom([]int{1, 2, 5, 1000}).Draw(t, "limit")
		m, err := survey(context.Background(), dev, lun.Extent{Blocks: blocks}, nil, limit)
		if err != nil {
			t.Fatal(err)
		}
		if len(m.runs) > limit {
			t.Fatalf("%d runs, limit %d", len(m.runs), limit)
		}
		in := make([]bool, blocks)
		count := uint64(0)
		for _, e := range m.Within(lun.Extent{Blocks: blocks}) {
			for at := e.Start; at < e.End(); at++ {
				in[at] = true
				count++
			}
		}
		if count != m.Allocated() {
			t.Fatalf("Allocated is %d, the runs hold %d", m.Allocated(), count)
		}
		for at := range allocated {
			if allocated[at] && !in[at] {
				t.Fatalf("LBA %d is allocated, the map says not", at)
			}
			if limit == 1000 && in[at] != allocated[at] {
				t.Fatalf("LBA %d: the map should be exact", at)
			}
		}
		from := rapid.IntRange(0, blocks-1).Draw(t, "from")
		want, found := 0, false
		for at := from; at < blocks && !found; at++ {
			want, found = at, in[at]
		}
		if got, ok := m.NextAllocated(lun.LBA(from)); ok != found || ok && got != lun.LBA(want) {
			t.Fatalf("NextAllocated(%d) = %d %v, want %d %v", from, got, ok, want, found)
		}
	})
}

func TestSplitZeroesKeepsEveryByteAndCutsOnlyZeroes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bs := rapid.SampledFrom([]uint32{512, 4096}).Draw(t, "block size")
		var p []byte
		for range rapid.IntRange(1, 6).Draw(t, "runs") {
			n := rapid.IntRange(1, 40).Draw(t, "blocks") * int(bs)
			run := make([]byte, n)
			if rapid.Bool().Draw(t, "data") {
				for i := 0; i < n; i += int(bs) {
					run[i+rand.IntN(int(bs))] = 1
				}
			}
			p = append(p, run...)
		}
		whole := lun.Extent{Start: 77, Blocks: uint64(len(p)) / uint64(bs)}
		at := whole.Start
		var back []byte
		err := splitZeroes(p, whole, bs, func(q []byte, e lun.Extent, zero bool) error {
			if e.Start != at || e.Blocks*uint64(bs) != uint64(len(q)) {
				t.Fatalf("run %v with %d bytes, want it to begin at %d", e, len(q), at)
			}
			if zero && !isZero(q) {
				t.Fatal("data taken for zeroes")
			}
			at = e.End()
			back = append(back, q...)
			return nil
		})
		if err != nil || at != whole.End() || !bytes.Equal(back, p) {
			t.Fatalf("the runs do not make up the whole: end %d of %d, %v", at, whole.End(), err)
		}
	})
}

func TestLongZeroesAreCutOut(t *testing.T) {
	p := make([]byte, 1<<20)
	p[0], p[512<<10], p[1<<20-1] = 1, 1, 1
	var zero int
	if err := splitZeroes(p, lun.Extent{Blocks: 2048}, 512, func(q []byte, _ lun.Extent, z bool) error {
		if z {
			zero += len(q)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if want := 1<<20 - 3*zeroGrain; zero != want {
		t.Errorf("%d bytes of zeroes cut out, want %d", zero, want)
	}
}

func TestThrottleKeepsToItsRate(t *testing.T) {
	th := NewThrottle(4 << 20)
	if th.Rate() != 4<<20 {
		t.Errorf("rate %d", th.Rate())
	}
	ctx := context.Background()
	began := time.Now()
	for range 6 {
		if err := th.Wait(ctx, 256<<10); err != nil {
			t.Fatal(err)
		}
	}
	// A tenth of a second's worth goes at once; the other 1.1 MiB take their time.
	if took := time.Since(began); took < 250*time.Millisecond {
		t.Errorf("1.5 MiB at 4 MiB/s took %v", took)
	}
	th.Set(0)
	began = time.Now()
	if err := th.Wait(ctx, 1<<30); err != nil || time.Since(began) > time.Second || th.Rate() != 0 {
		t.Errorf("no limit: %v after %v, rate %d", err, time.Since(began), th.Rate())
	}
}

func TestARaisedLimitFreesThoseWhoWait(t *testing.T) {
	th := NewThrottle(1)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- th.Wait(ctx, 1<<20) }()
	select {
	case err := <-done:
		t.Fatalf("a MiB went at a byte a second: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	th.Set(0)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// Caught: a copier that does not ask the shared limit, for a read or for what it compares on the
// destination alone.
func TestCopiersKeepToTheRateTheyShare(t *testing.T) {
	for _, compare := range []bool{false, true} {
		shared := NewThrottle(8 << 20)
		began := time.Now()
		var running sync.WaitGroup
		for i := range 2 {
			const blocks = 6 << 11 // 6 MiB
			source, destination := luntest.NewThinMemory(512, blocks), luntest.NewThinMemory(512, blocks)
			from := source
			if compare && i == 1 {
				from = destination // the source has nothing there
			}
			content := make([]byte, blocks*512)
			_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(content)
			if err := from.WriteAt(t.Context(), content, 0); err != nil {
				t.Fatal(err)
			}
			c := New(Options{
				Source: source, Destination: destination, Ledger: &sumLedger{blocks: blocks, region: 128, valid: map[lun.LBA]bool{}}, Volume: lun.Extent{Blocks: blocks},
				RegionBlocks: 128, Depth: 4, Throttle: NewThrottle(0), Shared: shared, Compare: compare,
				Fault: func(err error) {
					if err != nil {
						t.Error(err)
					}
				},
			})
			running.Go(func() {
				if err := c.Run(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		running.Wait()
		// All but a tenth of a second's worth takes its time.
		if took := time.Since(began); took < 1200*time.Millisecond {
			t.Errorf("compare %v: 12 MiB at 8 MiB/s took %v", compare, took)
		}
	}
}
