package proxy

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"lunshift/state"
)

// The engine's state and the real one give the same answers to the same calls, also after
// a kill.
func TestEngineStoreKeepsTheContractOfTheState(t *testing.T) {
	const blocks = 3 * 8 * 2
	geometry := state.Geometry{Blocks: blocks, RegionBlocks: 8}
	ctx := context.Background()
	for seed := range uint64(3) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		dir := t.TempDir()
		open := func() *state.Store {
			s, err := state.Open(dir, state.Options{Log: quiet(), SettleDelay: time.Hour})
			must(t, err)
			return s
		}
		disk := open()
		model := &engineState{}
		stores := func() [2]store { return [2]store{stored{disk}, model} }
		take := func() (f [2]flags) {
			for i, s := range stores() {
				var err error
				f[i], err = s.Flags("vol", geometry)
				must(t, err)
			}
			return f
		}
		var f [2]flags
		look := func(step int, what string) {
			t.Helper()
			var answers [2]string
			for i := range f {
				var text []byte
				for _, k := range []state.Kinds{state.Valid, state.Dirty} {
					text = fmt.Appendln(text, f[i].Count(k))
					must(t, f[i].Runs(k, state.Run{Blocks: blocks}, func(r state.Run, set bool) bool {
						text = fmt.Append(text, r, set)
						return true
					}))
					for g := range uint64(7) {
						m, missing := f[i].Missing(k, g)
						p, ok := f[i].NextPartial(k, g)
						s, some := f[i].Next(k, g)
						if !some {
							s = 0
						}
						text = fmt.Append(text, m, missing, s, some, p, ok)
					}
				}
				for b := range uint64(blocks) {
					r := state.Run{Start: b, Blocks: min(3, blocks-b)}
					text = fmt.Append(text, f[i].All(state.Valid, r), f[i].All(state.Valid|state.Dirty, r), f[i].Any(state.Dirty, r), f[i].Unsettled(r))
				}
				unproven := f[i].Unproven()
				slices.SortFunc(unproven, func(a, b state.Sum) int { return int(a.Start) - int(b.Start) })
				answers[i] = string(fmt.Append(text, unproven))
			}
			if answers[0] != answers[1] {
				t.Fatalf("seed %d, step %d, %s: the state says\n%s\nthe engine's\n%s", seed, step, what, answers[0], answers[1])
			}
		}
		must(t, disk.PutRecords(ctx, state.Record{Volume: "vol", Phase: string(Ready)}))
		must(t, model.PutRecords(ctx, state.Record{Volume: "vol", Phase: string(Ready)}))
		f = take()
		var under [2][]intent
		backward := false
		for step := range 100 {
			if step == 60 {
				// The second part is after a rollback.
				for i := range f {
					for _, n := range under[i] {
						must(t, n.Withdraw())
					}
					must(t, f[i].Await(ctx, state.Run{Blocks: blocks}))
				}
				backward = true
				r := state.Record{Volume: "vol", Phase: string(RollingBack)}
				must(t, stored{disk}.Turn(ctx, []turning{{f[0], true}}, r))
				must(t, model.Turn(ctx, []turning{{f[1], true}}, r))
				look(step, "a turn")
			}
			start := rnd.Uint64N(blocks)
			r := state.Run{Start: start, Blocks: 1 + rnd.Uint64N(min(12, blocks-start))}
			kinds := state.Kinds(1 + rnd.IntN(3))
			kind := rnd.IntN(7)
			has := f[0].Any(state.Valid|state.Dirty, r)
			if backward {
				has = !f[0].All(state.Valid|state.Dirty, r)
			}
			for i := range f {
				switch kind {
				case 0:
					if backward {
						must(t, f[i].Clear(ctx, kinds, r))
					} else {
						must(t, f[i].Set(ctx, kinds, r))
					}
				case 1, 2:
					must(t, f[i].Note(ctx, kinds, r))
				case 3, 4, 5:
					if !has && len(f[i].Unproven()) == 0 {
						n, err := f[i].Intend(ctx, state.SumOf(r, []byte{byte(step)}))
						must(t, err)
						switch step % 3 {
						case 0:
							n.Keep()
						case 1:
							must(t, n.Withdraw())
						default:
							under[i] = append(under[i], n)
						}
					}
				case 6:
					must(t, f[i].Await(ctx, state.Run{Blocks: blocks}))
				}
			}
			look(step, fmt.Sprint(kind, kinds, r))
			if step%20 == 19 {
				// What a kill leaves is what the files hold while they are open.
				from, left := dir, disk
				dir, under = t.TempDir(), [2][]intent{}
				snapshot(t, dir, from)
				disk, model = open(), model.reopen()
				must(t, left.Close())
				f = take()
				look(step, "opened again")
				proven := []state.Run{}
				for _, s := range f[0].Unproven() {
					if s.Start%2 == 0 {
						proven = append(proven, s.Run)
					}
				}
				for i := range f {
					must(t, f[i].Prove(ctx, proven...))
				}
				look(step, "proved")
			}
		}
		must(t, disk.Close())
	}
}

// snapshot copies a state that is open. Its database removes files of its own accord, so a
// copy during which it did is made again.
func snapshot(t *testing.T, to, from string) {
	names := func(dir string) (list []string) {
		must(t, fs.WalkDir(os.DirFS(dir), ".", func(path string, _ fs.DirEntry, _ error) error {
			list = append(list, path)
			return nil
		}))
		return list
	}
	for {
		must(t, os.RemoveAll(to))
		before := names(from)
		if err := os.CopyFS(to, os.DirFS(from)); err == nil && slices.Equal(before, names(to)) && slices.Equal(before, names(from)) {
			return
		}
	}
}
