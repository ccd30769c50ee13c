package state

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"
)

// model is the plain truth that Flags is held against.
type model [kindCount][]bool

func (m *model) set(k Kinds, r Run, to bool) {
	for i := range m {
		if k&(1<<i) != 0 {
			for b := r.Start; b < r.end(); b++ {
				m[i][b] = to
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
		var missing, partial, some []uint64
		for at := uint64(0); ; {
			region, ok := f.Next(k, at)
			if !ok {
				break
			}
			some = append(some, region)
			at = region + 1
		}
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
		var wantMissing, wantPartial, wantSome []uint64
		for region := range f.Regions() {
			start := region * g.RegionBlocks
			r := Run{start, min(g.RegionBlocks, g.Blocks-start)}
			if m.is(i, r, false) {
				wantSome = append(wantSome, region)
			}
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
		if fmt.Sprint(some) != fmt.Sprint(wantSome) {
			t.Fatalf("Next(%d): %v, want %v", k, some, wantSome)
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
		var count uint64
		for _, set := range m[i] {
			if set {
				count++
			}
		}
		if got := f.Count(k); got != count {
			t.Fatalf("Count(%d) = %d, want %d", k, got, count)
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
	var sums []Sum
	for _, r := range runs {
		if r.Blocks > 0 {
			sums = append(sums, Sum{r, 7})
		}
	}
	if len(sums) == 0 {
		return nil
	}
	i, err := f.Intend(ctx, sums...)
	if err == nil {
		i.Keep()
	}
	return err
}

// modelled is a volume's flags and the model that they are held against.
type modelled struct {
	s     *Store
	f     *Flags
	g     Geometry
	m     model
	again []bool // blocks of which the journal may still tell that they are dirty
}

// check compares all that is settled, and then what was noted as well.
func (v *modelled) check(t *rapid.T) {
	checkBlocks(t, v.f, &v.m, drawRun(t, v.g.Blocks))
	if v.f.Unsettled(Run{Blocks: v.g.Blocks}) && rapid.Bool().Draw(t, "leave unsettled") {
		return
	}
	v.settle(t)
	checkAgainst(t, v.f, &v.m, drawRun(t, v.g.Blocks))
}

func (v *modelled) settle(t *rapid.T) {
	if err := v.f.Await(context.Background(), Run{Blocks: v.g.Blocks}); err != nil {
		t.Fatal(err)
	}
}

// step makes one change of the flags that the present turn allows.
func (v *modelled) step(t *rapid.T) {
	ctx, back := context.Background(), v.f.Backward()
	k := Kinds(rapid.IntRange(1, 3).Draw(t, "kinds"))
	runs := make([]Run, rapid.IntRange(1, 3).Draw(t, "runs"))
	for i := range runs {
		runs[i] = drawRun(t, v.g.Blocks)
	}
	clear := back
	var err error
	switch rapid.IntRange(0, 4).Draw(t, "way") {
	case 0:
		if err = v.f.Set(ctx, k, runs...); back && err != nil {
			return
		} else if back {
			t.Fatal("set in a backward turn")
		}
	case 1:
		if clear = true; !back && k&Valid != 0 {
			if v.f.Clear(ctx, k, runs...) == nil {
				t.Fatal("cleared valid in a forward turn")
			}
			k = Dirty
		}
		if !back {
			v.settle(t)
		}
		err = v.f.Clear(ctx, k, runs...)
	case 2:
		err = v.f.Note(ctx, k, runs...)
		v.tell(k, runs)
	case 3:
		k = Valid | Dirty
		err = keep(ctx, v.f, runs)
		v.tell(k, runs)
	case 4:
		r := runs[0]
		if runs = nil; r.Blocks == 0 {
			break
		}
		var i *Intent
		if i, err = v.f.Intend(ctx, Sum{r, 8}); err == nil {
			if v.s.Turn(ctx, []Turning{{v.f, !back}}) == nil {
				t.Fatal("turned with a write under way")
			}
			err = i.Withdraw()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range runs {
		v.m.set(k, r, !clear)
	}
}

// tell remembers what the journal says is dirty.
func (v *modelled) tell(k Kinds, runs []Run) {
	for _, r := range runs {
		for b := r.Start; b < r.end() && k&Dirty != 0 && !v.f.Backward(); b++ {
			v.again[b] = true
		}
	}
}

// turn begins a turn.
func (v *modelled) turn(t *rapid.T) {
	if v.f.Unsettled(Run{Blocks: v.g.Blocks}) {
		if v.s.Turn(context.Background(), []Turning{{v.f, true}}) == nil && v.f.Unsettled(Run{Blocks: v.g.Blocks}) {
			t.Fatal("turned while something was unsettled")
		}
		v.settle(t)
	}
	back := rapid.Bool().Draw(t, "backward")
	if err := v.s.Turn(context.Background(), []Turning{{v.f, back}}); err != nil {
		t.Fatal(err)
	}
	if v.f.Backward() != back {
		t.Fatal("not the direction that was asked for")
	}
	clear(v.again)
}

// opened takes the flags up from s and tells that what was intended was written.
func (v *modelled) opened(t *rapid.T, s *Store, volume string) {
	var err error
	back := v.f.Backward()
	if v.f, err = s.Flags(volume, v.g); err != nil {
		t.Fatal(err)
	}
	v.s = s
	if v.f.Backward() != back {
		t.Fatalf("backward is %v after a restart", !back)
	}
	var written []Run
	for _, sum := range v.f.Unproven() {
		if sum.Hash != 7 {
			t.Fatalf("%v was withdrawn and is told", sum)
		}
		written = append(written, sum.Run)
	}
	if err := v.f.Prove(context.Background(), written...); err != nil {
		t.Fatal(err)
	}
	for b, again := range v.again {
		v.m[1][b] = v.m[1][b] || again && v.f.All(Dirty, Run{uint64(b), 1})
	}
}

// Caught: entries that name the generation alone, so that those of the turn before count after
// a crash; notes of a backward turn that read as set, that count as set, or that are
// settled by setting; bitmaps that stay where a whole region is cleared; a fast path of
// Clear that asks for all blocks; a Next that finds regions that are all.
func TestFlagsAnswerLikePlainArraysAcrossTurnsReopensAndCrashes(t *testing.T) {
	t.Parallel()
	s, n := open(t, t.TempDir()), 0
	dir := s.dir
	defer func() { s.Close() }()
	rapid.Check(t, func(t *rapid.T) {
		n++
		volume := fmt.Sprintf("v%d", n)
		v := &modelled{s: s, g: Geometry{
			Blocks:       rapid.Uint64Range(1, 3000).Draw(t, "volume blocks"),
			RegionBlocks: 1 << rapid.IntRange(0, 9).Draw(t, "region bits"),
		}}
		v.m, v.again = model{make([]bool, v.g.Blocks), make([]bool, v.g.Blocks)}, make([]bool, v.g.Blocks)
		var err error
		if v.f, err = s.Flags(volume, v.g); err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 16).Draw(t, "steps") {
			if rapid.IntRange(0, 3).Draw(t, "turn") == 0 {
				v.turn(t)
			} else {
				v.step(t)
			}
			if rapid.IntRange(0, 49).Draw(t, "end") == 49 {
				// With 1 byte of memory nearly every bitmap is read from the database.
				opts := Options{BitmapMemory: rapid.Uint64Range(0, 1).Draw(t, "memory")}
				if rapid.Bool().Draw(t, "crash") {
					to := dir + "x"
					crashed(t, dir, to)
					c, err := Open(to, opts)
					if err != nil {
						t.Fatal(err)
					}
					// The store goes on in the copy, the other one is given up.
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					s, dir = c, to
				} else {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					if s, err = Open(dir, opts); err != nil {
						t.Fatal(err)
					}
				}
				v.opened(t, s, volume)
			}
			v.check(t)
		}
		v.settle(t)
		checkAgainst(t, v.f, &v.m, Run{0, v.g.Blocks})
	})
}

// crashed copies a state as a crash leaves it.
func crashed(t *rapid.T, from, to string) {
	if out, err := exec.Command("cp", "-r", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Remove(filepath.Join(to, badgerDir, lockName)); err != nil {
		t.Fatal(err)
	}
}
