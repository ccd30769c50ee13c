package lun

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"
)

func smallExtent(t *rapid.T, label string) Extent {
	return Extent{
		Start:  LBA(rapid.IntRange(0, 12).Draw(t, label+" start")),
		Blocks: uint64(rapid.IntRange(0, 6).Draw(t, label+" blocks")),
	}
}

func blocksOf(e Extent) []LBA {
	var all []LBA
	for l := e.Start; l < e.End(); l++ {
		all = append(all, l)
	}
	return all
}

func TestExtentAlgebraIsThatOfSetsOfBlocks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := smallExtent(t, "a"), smallExtent(t, "b")
		var both []LBA
		for _, l := range blocksOf(a) {
			if slices.Contains(blocksOf(b), l) {
				both = append(both, l)
			}
		}
		if got := a.Overlaps(b); got != (len(both) > 0) {
			t.Fatalf("%v overlaps %v: %v", a, b, got)
		}
		if got := blocksOf(a.Intersect(b)); !slices.Equal(got, both) {
			t.Fatalf("%v and %v share %v, not %v", a, b, both, got)
		}
		if a.Empty() != (len(blocksOf(a)) == 0) {
			t.Fatalf("%v empty: %v", a, a.Empty())
		}
	})
}

func TestCheckAcceptsExactlyTheExtentsWithinTheDevice(t *testing.T) {
	edge := rapid.OneOf(rapid.Uint64Range(0, 40), rapid.Uint64Range(math.MaxUint64-40, math.MaxUint64))
	rapid.Check(t, func(t *rapid.T) {
		i := Info{Blocks: edge.Draw(t, "capacity")}
		start, n := edge.Draw(t, "start"), edge.Draw(t, "blocks")
		within := start <= i.Blocks && n <= i.Blocks && start <= i.Blocks-n
		if err := i.Check(Extent{LBA(start), n}); (err == nil) != within || err != nil && !errors.Is(err, ErrOutOfRange) {
			t.Fatalf("start %d, %d blocks of %d: %v", start, n, i.Blocks, err)
		}
	})
}

// TestRangeLockServesInOrder runs Lock, Unlock and ends of contexts against a
// model: a request holds its extent when no earlier one that overlaps is left.
func TestRangeLockServesInOrder(t *testing.T) {
	type request struct {
		extent Extent
		cancel context.CancelFunc
		held   atomic.Pointer[Held]
		failed atomic.Bool
	}
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			var l RangeLock
			var wg sync.WaitGroup
			var live []*request
			grant := func() {
				synctest.Wait()
				for n, r := range live {
					want := true
					for _, earlier := range live[:n] {
						want = want && !earlier.extent.Overlaps(r.extent)
					}
					if got := r.held.Load() != nil; got != want {
						rt.Fatalf("%v behind %d others: held %v, want %v", r.extent, n, got, want)
					}
				}
			}
			for range rapid.IntRange(1, 30).Draw(rt, "steps") {
				switch op := rapid.IntRange(0, 2).Draw(rt, "op"); {
				case op == 0 || len(live) == 0:
					ctx, cancel := context.WithCancel(context.Background())
					r := &request{extent: smallExtent(rt, "lock"), cancel: cancel}
					live = append(live, r)
					wg.Go(func() {
						if h, err := l.Lock(ctx, r.extent); err == nil {
							r.held.Store(h)
						} else {
							r.failed.Store(true)
						}
					})
				default:
					n := rapid.IntRange(0, len(live)-1).Draw(rt, "which")
					r := live[n]
					if h := r.held.Load(); h != nil {
						l.Unlock(h)
					} else {
						r.cancel()
						synctest.Wait()
						if !r.failed.Load() {
							rt.Fatalf("%v: Lock did not end with its context", r.extent)
						}
					}
					r.cancel()
					live = slices.Delete(live, n, n+1)
				}
				grant()
			}
			for _, r := range slices.Clone(live) {
				grant()
				l.Unlock(live[0].held.Load())
				r.cancel()
				live = live[1:]
			}
			wg.Wait()
			if l.head != nil || l.tail != nil {
				rt.Fatal("an entry is left")
			}
		})
	})
}

func TestHoldersOfOverlappingRangesExcludeEachOther(t *testing.T) {
	var l RangeLock
	var owner [64]atomic.Int32
	var wg sync.WaitGroup
	for w := range int32(8) {
		wg.Go(func() {
			for n := range 400 {
				e := Extent{LBA((int(w)*13 + n*7) % 50), uint64(1 + n%9)}
				ctx, cancel := context.WithCancel(t.Context())
				if n%5 == 0 {
					go cancel()
				}
				h, err := l.Lock(ctx, e)
				if err != nil {
					cancel()
					continue
				}
				for _, b := range blocksOf(e) {
					if !owner[b].CompareAndSwap(0, w+1) {
						t.Errorf("LBA %d is held twice", b)
					}
				}
				for _, b := range blocksOf(e) {
					owner[b].Store(0)
				}
				l.Unlock(h)
				cancel()
			}
		})
	}
	wg.Wait()
}
