package proxy

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// config is a Config with a new store in the rig's directory.
func (r *rig) config(t *testing.T) Config {
	t.Helper()
	store, err := state.Open(r.dir, state.Options{Log: quiet()})
	must(t, err)
	t.Cleanup(func() { store.Close() })
	tgt, err := target.New(target.Config{Log: quiet()})
	must(t, err)
	return Config{
		Name: "vol", IQN: "iqn.2026-11.net.example:vol", Source: r.source, Destination: r.destination,
		RegionSize: testRegion, CopyDepth: 4, Store: store, Target: tgt, Log: quiet(),
	}
}

const (
	lostSize    = 1024
	lostWritten = lun.LBA(700) // one of those that initiators wrote
)

// lostMigration is a volume in the midst of its migration whose state is gone: blocks up to
// 600 were copied, those up to 800 were written by initiators, and the destination has zeroes
// in the others.
func lostMigration(t *testing.T) *rig {
	r := newRig(t, lostSize)
	fill(t, r.source, lun.Extent{Blocks: lostSize}, 1)
	v := r.open(t)
	must(t, v.Start(context.Background()))
	must(t, v.Pause(context.Background()))
	r.close(t)
	// Whatever was copied so far: from here on each block is what the test says.
	for at := lun.LBA(0); at < lostSize; at++ {
		switch {
		case at < 600:
			must(t, r.destination.WriteAt(context.Background(), stamp(at, 1), at))
		case at < 800:
			must(t, r.destination.WriteAt(context.Background(), stamp(at, 2), at))
		default:
			must(t, r.destination.WriteZeroes(context.Background(), lun.Extent{Start: at, Blocks: 1}))
		}
	}
	must(t, os.RemoveAll(r.dir))
	return r
}

// A volume without a record is not known while its destination holds data, and a blank
// destination needs no words.
//
// Caught: data looked for at the edges and samples alone, on a device that says where it
// has some.
func TestVolumeWhoseStateIsLostIsUnknown(t *testing.T) {
	ctx := t.Context()
	r := lostMigration(t)
	cfg := r.config(t)
	var unknown *UnknownError
	if err := Unknown(ctx, cfg.Store, r.dir, "vol", "new", r.destination); !errors.As(err, &unknown) {
		t.Errorf("with data on the destination: %v", err)
	}
	blank := luntest.NewThinMemory(testBlock, 1<<20)
	if err := Unknown(ctx, cfg.Store, r.dir, "vol", "new", blank); err != nil {
		t.Errorf("with a blank destination: %v", err)
	}
	must(t, blank.WriteAt(ctx, stamp(77777, 1), 77777))
	if err := Unknown(ctx, cfg.Store, r.dir, "vol", "new", blank); !errors.As(err, &unknown) {
		t.Errorf("with one block on a thin destination: %v", err)
	}
}

// A rebuild takes each block from the side that holds its newest content as far as that can
// be told, and the side that the operator chose else. Every block is read back through
// the volume, and on the destination at its end.
//
// Caught: different blocks left to the source; blocks of zeroes taken for written although the
// source was chosen.
func TestRebuildFindsEachBlocksSide(t *testing.T) {
	for _, zeroes := range []Side{SideSource, SideDestination} {
		t.Run(string(zeroes), func(t *testing.T) {
			ctx := t.Context()
			r := lostMigration(t)
			cfg := r.config(t)
			report, err := Rebuild(ctx, cfg, AdoptOptions{Rebuild: true, Zeroes: zeroes, Different: SideDestination}, nil)
			must(t, err)
			if report.Equal != 600 || report.Different != 200 || report.Zeroes != 224 || report.Undecided != "" || report.Blocks != lostSize {
				t.Errorf("report: %+v", report)
			}
			v, err := Open(ctx, cfg)
			must(t, err)
			if v.Phase() == Ready {
				t.Error("the volume is ready")
			}
			check := func(when string, dev lun.Device) {
				t.Helper()
				for at := lun.LBA(0); at < lostSize; at++ {
					want := stamp(at, 1)
					switch {
					case at >= 800 && zeroes == SideDestination:
						clear(want)
					case at >= 600 && at < 800:
						want = stamp(at, 2)
					}
					p := make([]byte, testBlock)
					must(t, dev.ReadAt(ctx, p, at))
					if !bytes.Equal(p, want) {
						t.Fatalf("%s: block %d holds %x…, want %x…", when, at, p[:16], want[:16])
					}
				}
			}
			check("through the volume", v)
			waitFor(t, v, Synced)
			check("synced", r.destination)
			if dirty := v.raw().Count(state.Dirty); zeroes == SideSource && dirty != 200 || zeroes == SideDestination && dirty != 424 {
				t.Errorf("%d blocks are dirty", dirty)
			}
			must(t, v.Shutdown(ctx))
		})
	}
}

// Without a decision that is needed nothing is believed, as after a rebuild that was cut
// short: the volume stays unknown, and taken for new it has no flags.
//
// Caught: flags of a rebuild that was cut short kept for the volume that is taken for new.
func TestRebuildThatDidNotEndIsNotBelieved(t *testing.T) {
	ctx := t.Context()
	r := lostMigration(t)
	cfg := r.config(t)
	unknown := func(when string) {
		t.Helper()
		if _, found, err := cfg.Store.Record("vol"); err != nil || found {
			t.Errorf("%s: the state knows the volume (%v)", when, err)
		}
	}
	report, err := Rebuild(ctx, cfg, AdoptOptions{Rebuild: true}, nil)
	must(t, err)
	if report.Undecided == "" || report.Zeroes != 224 || len(report.ZeroesExtents) == 0 || report.ZeroesExtents[0].LBA != 800 {
		t.Errorf("nothing decided: %+v", report)
	}
	unknown("nothing decided")
	report, err = Rebuild(ctx, cfg, AdoptOptions{Rebuild: true, Zeroes: SideSource}, nil)
	must(t, err)
	if report.Undecided == "" || report.Different != 200 {
		t.Errorf("what differs not decided: %+v", report)
	}
	unknown("what differs not decided")

	// A kill in the midst: flags without a record.
	broken := errors.New("gone")
	r.destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Flush {
			return broken
		}
		return nil
	})
	if _, err := Rebuild(ctx, cfg, AdoptOptions{Rebuild: true, WasSynced: true}, nil); !errors.Is(err, broken) {
		t.Errorf("a flush that failed: %v", err)
	}
	unknown("the flush failed")
	r.destination.Intercept(nil)
	flags, err := cfg.Store.Flags("vol", state.Geometry{Blocks: lostSize, RegionBlocks: testRegion / testBlock})
	must(t, err)
	must(t, flags.Set(ctx, state.Valid, state.Run{Blocks: lostSize}))
	v, err := Open(ctx, cfg)
	must(t, err)
	if v.Phase() != Ready || v.raw().Count(state.Valid) != 0 {
		t.Errorf("taken for new: phase %s with %d valid blocks", v.Phase(), v.raw().Count(state.Valid))
	}
	must(t, v.Shutdown(ctx))
}

func TestRebuildOfASyncedMigrationTakesTheDestination(t *testing.T) {
	ctx := t.Context()
	r := lostMigration(t)
	cfg := r.config(t)
	before := r.destination.Clone()
	_, err := Rebuild(ctx, cfg, AdoptOptions{Rebuild: true, WasSynced: true}, nil)
	must(t, err)
	v, err := Open(ctx, cfg)
	must(t, err)
	waitFor(t, v, Synced)
	p, q := make([]byte, lostSize*testBlock), make([]byte, lostSize*testBlock)
	must(t, r.destination.ReadAt(ctx, p, 0))
	must(t, before.ReadAt(ctx, q, 0))
	if !bytes.Equal(p, q) {
		t.Error("the destination changed")
	}
	must(t, v.Shutdown(ctx))
}

// A source block that cannot be read is no reason to lose what is on the destination.
func TestRebuildGoesPastUnreadableSourceBlocks(t *testing.T) {
	ctx := t.Context()
	r := lostMigration(t)
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && !e.Intersect(lun.Extent{Start: lostWritten, Blocks: 1}).Empty() {
			return &lun.SenseError{Key: 0x3, ASC: 0x11}
		}
		return nil
	})
	cfg := r.config(t)
	report, err := Rebuild(ctx, cfg, AdoptOptions{Rebuild: true, Zeroes: SideSource, Different: SideDestination}, nil)
	must(t, err)
	if report.Unreadable != 1 || report.Different != 200 || report.Equal != 600 {
		t.Errorf("%+v", report)
	}
}

func TestRebuildOfAVolumeThatTheStateKnowsIsRefused(t *testing.T) {
	r := newRig(t, lostSize)
	v := r.open(t)
	defer r.close(t)
	if _, err := Rebuild(t.Context(), v.cfg, AdoptOptions{Rebuild: true, WasSynced: true}, nil); err == nil {
		t.Error("done")
	}
	if _, err := os.Stat(filepath.Join(r.dir, "HEAD")); err != nil {
		t.Error(err)
	}
}

// Chunks end in any order; the places are in rising order all the same, joined over the ends of
// chunks, and the first ones are kept.
//
// Caught: runs appended as their chunks end.
func TestPlacesOfARebuildAreJoinedAndTheFirst(t *testing.T) {
	const step = 8
	for range 50 {
		x := &rebuild{}
		var runs []state.Run
		// One place over three chunks, then more than are listed.
		for at := uint64(0); at < 3*step; at += step {
			runs = append(runs, state.Run{Start: at, Blocks: step})
		}
		for i := range uint64(2 * mostDifferences) {
			runs = append(runs, state.Run{Start: 100 + 2*step*i, Blocks: 3})
		}
		for window := range slices.Chunk(runs, 16) { // so far may they be out of order
			rand.Shuffle(len(window), func(i, j int) { window[i], window[j] = window[j], window[i] })
		}
		for _, r := range runs {
			x.note(different, r)
		}
		list := x.report.DifferentExtents
		if x.report.Different != 3*step+6*mostDifferences || !x.report.More || len(list) != mostDifferences || list[0] != (BlockRun{LBA: 0, Blocks: 3 * step}) {
			t.Fatalf("%d blocks, %d places, more %v: %v", x.report.Different, len(list), x.report.More, list[:min(len(list), 3)])
		}
		for i, e := range list[1:] {
			if e != (BlockRun{LBA: 100 + 2*step*uint64(i), Blocks: 3}) {
				t.Fatalf("place %d is %v", i+1, e)
			}
		}
	}
}
