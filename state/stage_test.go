package state

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

// Whatever part of a batch that sets and clears a crash lets through, each region is as
// before the batch or as after it, in all of its kinds, and loads. Caught: units that end
// without the all bits of their regions, units that have those of later regions too, a
// bitmap that stays where its region becomes all or none, and an all region that is cleared
// in part and loses the rest.
func TestEachRegionIsAsBeforeOrAfterABatchThatIsCutOff(t *testing.T) {
	t.Parallel()
	s, n := open(t, t.TempDir()), 0
	cutOff := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		g := Geometry{Blocks: rapid.Uint64Range(1, 2000).Draw(t, "blocks"), RegionBlocks: 1 << rapid.IntRange(0, 7).Draw(t, "bits")}
		f, err := s.Flags(fmt.Sprintf("v%d", n), g)
		if err != nil {
			t.Fatal(err)
		}
		m := model{make([]bool, g.Blocks), make([]bool, g.Blocks)}
		// stored is what the database holds.
		stored := map[string][]byte{}
		for round := range rapid.IntRange(1, 4).Draw(t, "batches") {
			st := newStage(f)
			st.unit = rapid.IntRange(1, 3000).Draw(t, "unit")
			before := model{slices.Clone(m[0]), slices.Clone(m[1])}
			for range rapid.IntRange(1, 8).Draw(t, "changes") {
				k := Kinds(rapid.IntRange(1, 3).Draw(t, "kinds"))
				r, away := drawRun(t, g.Blocks), round > 0 && rapid.Bool().Draw(t, "clear")
				st.apply(k, r, away)
				m.set(k, r, !away)
			}
			units, err := st.finish()
			if err != nil {
				t.Fatal(err)
			}
			cut := rapid.IntRange(0, len(units)).Draw(t, "cut")
			for i, unit := range units {
				if i == cut {
					checkCut(t, stored, f, before, m)
					cutOff++
				}
				for _, o := range unit {
					if o.value == nil {
						delete(stored, string(o.key))
					} else {
						stored[string(o.key)] = o.value
					}
				}
			}
			checkCut(t, stored, f, m, m)
			// What the committer does.
			if err := s.submit(t.Context(), &request{records: slices.Concat(units...)}); err != nil {
				t.Fatal(err)
			}
			st.publish()
			checkAgainst(t, f, &m, drawRun(t, g.Blocks))
		}
	})
	if cutOff == 0 {
		t.Fatal("no batch was cut off: the test shows nothing")
	}
}

// checkCut loads what is stored and wants each region as in a or as in b.
func checkCut(t *rapid.T, stored map[string][]byte, of *Flags, a, b model) {
	f := newFlags(of.store, of.volume, of.gen, of.geo)
	f.compact = of.compact
	got := model{make([]bool, f.geo.Blocks), make([]bool, f.geo.Blocks)}
	for _, key := range slices.Sorted(maps.Keys(stored)) { // chunks first
		value, err := stored[key], error(nil)
		switch key = key[genSize:]; key[0] {
		case chunkMark:
			err = f.loadChunk(int(key[1]), bigEndian(key[2:]), value)
		case regionMark:
			g := bigEndian(key[1:])
			var bitmaps regionBitmaps
			if bitmaps, err = f.decodeRegion(g, value, nil); err == nil {
				err = f.loadRegion(g, value, nil)
			}
			for i, words := range bitmaps {
				for n := range f.regionBlocks(g) {
					got[i][g<<f.shift+n] = words != nil && words[n/64]>>(n%64)&1 != 0
				}
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(f.leftover) > 0 {
		t.Fatalf("bitmaps beside all bits: %x", f.leftover)
	}
	for i := range got {
		for n := range f.geo.Blocks {
			got[i][n] = got[i][n] || f.isAll(i, n>>f.shift)
		}
	}
	for g := range f.regions {
		lo, hi := g<<f.shift, g<<f.shift+f.regionBlocks(g)
		same := func(m model) bool {
			return slices.Equal(got[0][lo:hi], m[0][lo:hi]) && slices.Equal(got[1][lo:hi], m[1][lo:hi])
		}
		if !same(a) && !same(b) {
			t.Fatalf("region %d: %v, neither as before: %v, %v, nor as after: %v, %v", g, got, a[0][lo:hi], a[1][lo:hi], b[0][lo:hi], b[1][lo:hi])
		}
	}
}

func bigEndian(key string) (n uint64) {
	for _, b := range []byte(key) {
		n = n<<8 | uint64(b)
	}
	return n
}

// Blocks that nobody touches keep their flags for every reader while the rest of their
// regions goes from all to partial and back. Caught: all bits that are cleared before the
// bitmap is there; and, with pauses of up to 2 ms put between the looks of a reader, each of
// the two that do not look at falls, in every run.
func TestReadersSeeWhatStaysWhileItsRegionIsClearedAndSet(t *testing.T) {
	t.Parallel()
	for _, memory := range []uint64{0, 1} { // all bitmaps in memory, and next to none
		s := openBounded(t, t.TempDir(), memory)
		g := Geometry{Blocks: 1 << 14, RegionBlocks: 128}
		f, err := s.Flags("v", g)
		if err != nil {
			t.Fatal(err)
		}
		// The first half of each region stays dirty, the second of every other stays clean.
		if err := f.Set(t.Context(), Dirty, Run{0, g.Blocks}); err != nil {
			t.Fatal(err)
		}
		if err := f.Clear(t.Context(), Dirty, Run{192, 64}); err != nil {
			t.Fatal(err)
		}
		clean := Run{192, 32}
		var looks atomic.Uint64
		done := make(chan struct{})
		var readers, writers sync.WaitGroup
		for range 2 {
			readers.Go(func() {
				for at := uint64(0); ; at = (at + 128) % g.Blocks {
					select {
					case <-done:
						return
					default:
					}
					stays := Run{at, 64}
					if !f.All(Dirty, stays) || !f.Any(Dirty, stays) {
						t.Errorf("%v is not dirty for All or Any", stays)
						return
					}
					if f.Any(Dirty, clean) || f.All(Dirty, clean) {
						t.Errorf("%v is dirty for All or Any", clean)
						return
					}
					first := true
					err := f.Runs(Dirty, Run{at, 128}, func(r Run, set bool) bool {
						if first && (!set || r.Blocks < 64) {
							t.Errorf("%v is not dirty for Runs: %v %v", stays, r, set)
						}
						first = false
						return true
					})
					if err != nil {
						t.Error(err)
						return
					}
					if next, ok := f.Next(Dirty, at/128); !ok || next != at/128 {
						t.Errorf("the first dirty region from %d on is %d", at/128, next)
						return
					}
					// Region 1 is partial all the time.
					missing, partial, ok := f.Missing(Dirty, 1)
					if p, some := f.NextPartial(Dirty, 1); !ok || !partial || missing != 1 || !some || p != 1 {
						t.Errorf("region 1: missing %d, partial %v, next partial %d", missing, partial, p)
						return
					}
					looks.Add(1)
				}
			})
		}
		for w := range uint64(2) {
			writers.Go(func() {
				for i := range uint64(150) {
					var runs []Run
					for region := (i + w) % 2; region < 32; region += 2 {
						runs = append(runs, Run{region*128 + 64, 64})
					}
					runs = slices.DeleteFunc(runs, func(r Run) bool { return r.Start == 192 })
					change := f.Clear
					if i%2 == 1 {
						change = f.Set
					}
					if err := change(t.Context(), Dirty, runs...); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		writers.Wait()
		close(done)
		readers.Wait()
		if looks.Load() == 0 {
			t.Error("nobody looked: the test shows nothing")
		}
	}
}

// A reader that saw a region partial long ago finds nothing in the database of a commit
// that is not synced. Caught: a region without bitmaps that is not pinned.
func TestALateReaderFindsNoBitmapBeforeItsSync(t *testing.T) {
	s := openBounded(t, t.TempDir(), 1)
	f, err := s.Flags("v", Geometry{Blocks: 1 << 22, RegionBlocks: 2048})
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []func() error{
		func() error { return f.Set(t.Context(), Dirty, Run{0, 8}) },
		func() error { return f.Clear(t.Context(), Dirty, Run{0, 8}) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
	}
	syncs := 0
	s.syncer.synced = func(string) {
		syncs++
		if m, err := s.bitmaps.find(f, 0, false); err != nil || !m.empty() {
			t.Errorf("found %v, %v", m, err)
		}
	}
	if err := f.Set(t.Context(), Dirty, Run{64, 8}); err != nil {
		t.Fatal(err)
	}
	if syncs != 1 || f.Any(Dirty, Run{0, 64}) || !f.All(Dirty, Run{64, 8}) {
		t.Fatalf("%d syncs", syncs)
	}
}

// Nothing to clear costs no commit, and a clear of all regions that are all costs no bitmap.
// Caught: regions that are taken into the batch one by one, and a Clear of what is clear
// that goes to the committer.
func TestClearOfSixtyFourTebibytesCostsItsChunks(t *testing.T) {
	s := open(t, t.TempDir())
	g := largeGeometry
	if raceEnabled {
		g.Blocks /= 32
	}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	all := Run{Blocks: g.Blocks}
	if err := f.Set(t.Context(), Valid|Dirty, all); err != nil {
		t.Fatal(err)
	}
	if err := s.Turn(t.Context(), []Turning{{f, true}}); err != nil {
		t.Fatal(err)
	}
	used := cpuTime(t)
	st := newStage(f)
	st.apply(Valid|Dirty, all, true)
	if n := len(st.regions); n > 0 {
		t.Fatalf("%d regions are taken one by one", n)
	}
	if err := f.Clear(t.Context(), Valid|Dirty, all); err != nil {
		t.Fatal(err)
	}
	if used = cpuTime(t) - used; used > 4e9 {
		t.Errorf("%v of the processors", used)
	}
	t.Logf("%v of the processors", used)
	if _, ok := f.Next(Valid|Dirty, 0); ok || f.Count(Valid) != 0 || f.Any(Valid|Dirty, all) {
		t.Fatal("not all is clear")
	}
	before := s.Stats()
	if err := f.Clear(t.Context(), Valid|Dirty, all); err != nil || s.Stats().Commits != before.Commits || s.Stats().Requests != before.Requests {
		t.Fatal("nothing to clear, and the committer has work: ", err)
	}
}
