package proxy

import (
	"context"
	"sync/atomic"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
)

// TestACopiedBlockIsDirtyBeforeItIsWritten: a crash between the write of a block that
// was copied before and its flag would leave other content than the source's with nothing
// that says so. A comparison would then call the copy wrong and refuse the cutover. It
// failed while flag and data went side by side.
func TestACopiedBlockIsDirtyBeforeItIsWritten(t *testing.T) {
	r := newRig(t, 1024)
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	v := r.open(t)
	defer r.close(t)
	ctx := context.Background()
	must(t, v.Start(ctx))
	must(t, v.Wait(ctx, Synced))
	var written, clean atomic.Int64
	r.destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Write || op == luntest.Zero || op == luntest.Unmap {
			written.Add(1)
			if !v.raw().All(state.Dirty, run(e)) {
				clean.Add(1)
			}
		}
		return nil
	})
	for at := range lun.LBA(64) {
		must(t, v.WriteAt(ctx, stamp(at*8, 2), at*8))
		must(t, v.Unmap(ctx, lun.Extent{Start: at*8 + 2, Blocks: 2}))
	}
	if written.Load() < 128 || clean.Load() > 0 {
		t.Errorf("%d of %d changes reached the destination before their blocks were dirty", clean.Load(), written.Load())
	}
}

// TestOnlyTheCopiedPartOfAWriteIsDirtyBefore: a write over blocks that were copied and
// blocks that were not keeps the order of the write rule for the latter.
func TestOnlyTheCopiedPartOfAWriteIsDirtyBefore(t *testing.T) {
	r := newRig(t, 1024)
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	v := r.open(t)
	defer r.close(t)
	ctx := context.Background()
	must(t, v.Throttle(ctx, 1))
	must(t, v.Start(ctx))
	must(t, v.Pause(ctx))
	// The last region is not copied; of this extent half is called so.
	e := lun.Extent{Start: 1000, Blocks: 16}
	must(t, v.raw().Set(ctx, state.Valid, state.Run{Start: 1000, Blocks: 8}))
	r.destination.Intercept(func(_ context.Context, op luntest.Op, at lun.Extent) error {
		if op != luntest.Write {
			return nil
		}
		if !v.raw().All(state.Dirty, state.Run{Start: 1000, Blocks: 8}) {
			t.Error("what was copied is written before it is dirty")
		}
		if v.raw().Any(state.Valid|state.Dirty, state.Run{Start: 1008, Blocks: 8}) {
			t.Error("what was not copied is flagged before it is written")
		}
		return nil
	})
	p := make([]byte, 16*testBlock)
	must(t, v.WriteAt(ctx, p, e.Start))
	if !v.raw().All(state.Valid|state.Dirty, run(e)) {
		t.Error("an acknowledged write is not flagged")
	}
}

// replaceFlags has all of v see other flags. Nothing is under way.
func replaceFlags(v *Volume, f flags) {
	w := v.ways.Load()
	w.flags, w.forward.flags, w.back.flags = f, f, reversed{f, v.info.Blocks}
}
