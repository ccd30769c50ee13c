package state

import (
	"context"
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// model is the plain truth that Flags is held against.
type model [kindCount][]bool

func (m *model) set(k Kinds, r Run) {
	for i := range m {
		if k&(1<<i) != 0 {
			for b := r.Start; b < r.end(); b++ {
				m[i][b] = true
			}
		}
	}
}

func (m *model) is(i int, r Run, all bool) bool {
	for b := r.Start; b < r.end(); b++ {
		if m[i][b] != all {
			return !all
		}
	}
	return all
}

func drawRun(t *rapid.T, blocks uint64) Run {
	start := rapid.Uint64Range(0, blocks).Draw(t, "start")
	return Run{start, rapid.Uint64Range(0, blocks-start).Draw(t, "blocks")}
}

// checkAgainst compares everything that readers can ask with the model.
func checkAgainst(t *rapid.T, f *Flags, m *model, asked Run) {
	checkBlocks(t, f, m, asked)
	g := f.Geometry()
	for i := range m {
		k := Kinds(1 << i)
		var count uint64
		for _, set := range m[i] {
			if set {
				count++
			}
		}
		if got := f.Count(k); got != count {
			t.Fatalf("Count(%d) = %d, want %d", k, got, count)
		}
		var missing, partial []uint64
		for at := uint64(0); ; {
			region, part, ok := f.Missing(k, at)
			if !ok {
				break
			}
			missing = append(missing, region)
			if part {
				partial = append(partial, region)
			}
			at = region + 1
		}
		var wantMissing, wantPartial []uint64
		for region := range f.Regions() {
			start := region * g.RegionBlocks
			r := Run{start, min(g.RegionBlocks, g.Blocks-start)}
			if !m.is(i, r, true) {
				wantMissing = append(wantMissing, region)
				if m.is(i, r, false) {
					wantPartial = append(wantPartial, region)
				}
			}
		}
		if fmt.Sprint(missing) != fmt.Sprint(wantMissing) || fmt.Sprint(partial) != fmt.Sprint(wantPartial) {
			t.Fatalf("Missing(%d): %v, partial %v; want %v, partial %v", k, missing, partial, wantMissing, wantPartial)
		}
		partial = nil
		for at := uint64(0); ; {
			region, ok := f.NextPartial(k, at)
			if !ok {
				break
			}
			partial = append(partial, region)
			at = region + 1
		}
		if fmt.Sprint(partial) != fmt.Sprint(wantPartial) {
			t.Fatalf("NextPartial(%d): %v, want %v", k, partial, wantPartial)
		}
	}
}

// checkBlocks compares what readers can ask of blocks, which is right whether or not
// the flags are settled.
func checkBlocks(t *rapid.T, f *Flags, m *model, asked Run) {
	for i := range m {
		k := Kinds(1 << i)
		if got, want := f.All(k, asked), m.is(i, asked, true); got != want {
			t.Fatalf("All(%d, %v) = %v", k, asked, got)
		}
		if got, want := f.Any(k, asked), m.is(i, asked, false); got != want {
			t.Fatalf("Any(%d, %v) = %v", k, asked, got)
		}
		at, first, before := asked.Start, true, false
		err := f.Runs(k, asked, func(r Run, set bool) bool {
			if r.Start != at || r.Blocks == 0 || r.end() > asked.end() || !first && set == before {
				t.Fatalf("Runs(%d, %v): %v %v after block %d", k, asked, r, set, at)
			}
			for b := r.Start; b < r.end(); b++ {
				if m[i][b] != set {
					t.Fatalf("Runs(%d, %v): block %d is %v in %v %v", k, asked, b, m[i][b], r, set)
				}
			}
			at, first, before = r.end(), false, set
			return true
		})
		if err != nil || at != asked.end() {
			t.Fatalf("Runs(%d, %v): %v, ends at block %d", k, asked, err, at)
		}
	}
	both := m.is(0, asked, true) && m.is(1, asked, true)
	if got := f.All(Valid|Dirty, asked); got != both {
		t.Fatalf("All(Valid|Dirty, %v) = %v", asked, got)
	}
}

// keep intends a write of the runs and says that it was made.
func keep(ctx context.Context, f *Flags, runs []Run) error {
	sums := make([]Sum, len(runs))
	for i, r := range runs {
		sums[i] = Sum{r, 7}
	}
	i, err := f.Intend(ctx, sums...)
	if err == nil {
		i.Keep()
	}
	return err
}

func TestFlagsAnswerLikePlainArraysAcrossReopens(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, n := open(t, t.TempDir()), 0
	dir := s.dir
	defer func() { s.Close() }()
	rapid.Check(t, func(t *rapid.T) {
		var err error
		n++
		volume := fmt.Sprintf("v%d", n)
		g := Geometry{
			Blocks:       rapid.Uint64Range(1, 3000).Draw(t, "volume blocks"),
			RegionBlocks: 1 << rapid.IntRange(0, 9).Draw(t, "region bits"),
		}
		f, err := s.Flags(volume, g)
		if err != nil {
			t.Fatal(err)
		}
		m := model{make([]bool, g.Blocks), make([]bool, g.Blocks)}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			k := Kinds(rapid.IntRange(1, 3).Draw(t, "kinds"))
			runs := make([]Run, rapid.IntRange(1, 3).Draw(t, "runs"))
			for i := range runs {
				runs[i] = drawRun(t, g.Blocks)
				m.set(k, runs[i])
			}
			switch rapid.IntRange(0, 2).Draw(t, "way") {
			case 0:
				err = f.Set(ctx, k, runs...)
			case 1:
				err = f.Note(ctx, k, runs...)
				checkBlocks(t, f, &m, runs[0])
				if err == nil {
					err = f.Await(ctx, Run{Blocks: g.Blocks})
				}
			case 2:
				err = keep(ctx, f, runs)
				for _, r := range runs {
					m.set(Valid|Dirty, r)
				}
				checkBlocks(t, f, &m, drawRun(t, g.Blocks))
				if err == nil {
					err = f.Await(ctx, Run{Blocks: g.Blocks})
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			if rapid.IntRange(0, 49).Draw(t, "reopen") == 49 {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				// With 1 byte of memory nearly every bitmap is read from the database.
				memory := rapid.Uint64Range(0, 1).Draw(t, "memory")
				if s, err = Open(dir, Options{BitmapMemory: memory}); err != nil {
					t.Fatal(err)
				}
				if f, err = s.Flags(volume, g); err != nil {
					t.Fatal(err)
				}
			}
			checkAgainst(t, f, &m, drawRun(t, g.Blocks))
		}
		checkAgainst(t, f, &m, Run{0, g.Blocks})
	})
}
