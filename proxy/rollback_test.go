package proxy

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// A migration that is half done goes back: the source has what initiators wrote before the
// start, since, and while it went back; also over a restart in the middle. Then it can be
// started again. Caught: a rollback that copies nothing back; a copier that takes the
// source's map of what is allocated for the destination's.
func TestRollbackLeavesEverythingOnTheSource(t *testing.T) {
	const blocks = 40 * testRegion / testBlock
	ctx := t.Context()
	r := newRig(t, blocks)
	r.cfg.Overwrite = true
	all := lun.Extent{Blocks: blocks}
	fill(t, r.source, lun.Extent{Blocks: blocks / 2}, 1) // the rest is a hole
	must(t, r.source.Flush(ctx))
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Throttle(ctx, testRegion))
	must(t, v.Start(ctx))
	want := make([]uint64, blocks)
	for at := range blocks / 2 {
		want[at] = 1
	}
	write := func(v *Volume, start, n, version uint64) {
		t.Helper()
		fill(t, v, lun.Extent{Start: lun.LBA(start), Blocks: n}, version)
		for at := start; at < start+n; at++ {
			want[at] = version
		}
	}
	check := func(dev lun.Device) {
		t.Helper()
		for at, version := range want {
			expect(t, dev, lun.Extent{Start: lun.LBA(at), Blocks: 1}, version)
		}
	}
	write(v, 100, 300, 2)
	write(v, blocks-200, 130, 3)
	must(t, v.Unmap(ctx, lun.Extent{Start: 150, Blocks: 64}))
	for at := 150; at < 214; at++ {
		want[at] = 0
	}
	if _, err := r.source.Extents(ctx, all); err != nil {
		t.Fatal(err)
	}
	must(t, v.Rollback(ctx, RollbackOptions{}))
	write(v, 120, 10, 4)          // on the destination alone
	write(v, blocks/2+700, 20, 5) // on neither
	write(v, 4000, 8, 6)          // on both, or the source
	check(v)
	if p := v.Phase(); p != RollingBack {
		t.Fatalf("phase %s", p)
	}
	r.close(t)
	v = r.open(t)
	check(v)
	if p := v.Phase(); p != RollingBack && p != RolledBack {
		t.Fatalf("phase %s after a restart", p)
	}
	must(t, v.Throttle(ctx, 0))
	waitFor(t, v, RolledBack)
	must(t, v.Rollback(ctx, RollbackOptions{}))
	check(v)
	check(r.source)
	writes := r.destination.Count(luntest.Write)
	write(v, 77, 5, 7)
	if n := r.destination.Count(luntest.Write); n != writes {
		t.Error("the destination is written after the rollback")
	}
	if err := v.Wait(ctx, Synced); !errors.Is(err, ErrPhase) {
		t.Errorf("waiting for %s of what was rolled back: %v", Synced, err)
	}
	r.close(t)
	v = r.open(t)
	if p := v.Phase(); p != RolledBack {
		t.Fatalf("phase %s after a restart", p)
	}
	must(t, v.Start(ctx, StartOptions{Reuse: true}))
	waitFor(t, v, Synced)
	write(v, 5, 9, 8)
	must(t, v.Cutover(ctx, CutoverOptions{}))
	check(r.destination)
}

// With a mirror the source follows every write, so that going back is over at once; what was
// written while the source was gone is caught up. Caught: a mirror that is not caught up, and
// one that fails writes when the source is gone.
func TestMirrorFollowsAndIsCaughtUp(t *testing.T) {
	const blocks = 20 * testRegion / testBlock
	ctx := t.Context()
	r := newRig(t, blocks)
	fill(t, r.source, lun.Extent{Blocks: blocks}, 1)
	must(t, r.source.Flush(ctx))
	var gone atomic.Bool
	r.source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if gone.Load() && (op == luntest.Write || op == luntest.Flush) {
			return lun.ErrUnavailable
		}
		return nil
	})
	r.cfg.Mirror = true
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Start(ctx))
	fill(t, v, lun.Extent{Start: 30, Blocks: 50}, 2)
	waitFor(t, v, Synced)
	fill(t, v, lun.Extent{Start: 70, Blocks: 50}, 3)
	mirror := func(state string) func(Status) bool {
		return func(s Status) bool { return s.Mirror != nil && s.Mirror.State == state }
	}
	eventually(t, v, "the mirror is whole", mirror("whole"))
	expect(t, r.source, lun.Extent{Start: 70, Blocks: 50}, 3)

	gone.Store(true)
	fill(t, v, lun.Extent{Start: 200, Blocks: 300}, 4)
	eventually(t, v, "the mirror is broken", mirror("broken"))
	if s := v.Status(); !s.Degraded || s.Mirror.Behind < 300*testBlock {
		t.Errorf("degraded %v, behind %d", s.Degraded, s.Mirror.Behind)
	}
	if err := v.Rollback(ctx, RollbackOptions{}); err == nil {
		t.Fatal("it goes back to a source that is gone")
	}
	fill(t, v, lun.Extent{Start: 250, Blocks: 20}, 5)
	gone.Store(false)
	eventually(t, v, "the mirror is whole again", mirror("whole"))
	expect(t, r.source, lun.Extent{Start: 250, Blocks: 20}, 5)
	expect(t, r.source, lun.Extent{Start: 270, Blocks: 230}, 4)
	eventually(t, v, "what is alike is noted", func(Status) bool { return v.raw().Count(state.Dirty) == 0 })

	fill(t, v, lun.Extent{Start: 900, Blocks: 100}, 6)
	began := time.Now()
	must(t, v.Rollback(ctx, RollbackOptions{}))
	waitFor(t, v, RolledBack)
	t.Logf("rolled back within %v", time.Since(began))
	if back := v.Status().CopiedBack; back > 350*testBlock {
		t.Errorf("%d bytes were copied back", back)
	}
	expect(t, r.source, lun.Extent{Start: 900, Blocks: 100}, 6)
	expect(t, r.source, lun.Extent{Start: 30, Blocks: 40}, 2)
}

// Steps of several volumes change all or none: one that is not ready keeps the others where
// they are, and commands go on. Caught: a step that leaves out who is not ready.
func TestStepsTogetherChangeAllOrNone(t *testing.T) {
	ctx := t.Context()
	pair := newPair(t, 256)
	a, b := pair[0].vol, pair[1].vol
	for _, r := range pair {
		fill(t, r.source, lun.Extent{Blocks: 256}, 1)
	}
	must(t, a.Start(ctx))
	waitFor(t, a, Synced)
	err := Do(ctx, CutoverStep(CutoverOptions{NoVerify: true}), Together{}, a, b)
	if !errors.Is(err, ErrPhase) || a.Phase() != Synced || b.Phase() != Ready {
		t.Fatalf("cutover of one that is not synced: %v; phases %s and %s", err, a.Phase(), b.Phase())
	}
	must(t, b.Start(ctx))
	waitFor(t, b, Synced)
	fill(t, a, lun.Extent{Blocks: 4}, 2)
	fill(t, b, lun.Extent{Blocks: 4}, 2)

	// One that hangs past the limit keeps both.
	release := make(chan struct{})
	entered := make(chan struct{}, 1)
	pair[1].destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Write && e.Start == 99 {
			entered <- struct{}{}
			<-release
		}
		return nil
	})
	written := make(chan error, 1)
	go func() { written <- b.WriteAt(ctx, stamp(99, 3), 99) }()
	<-entered
	began := time.Now()
	err = Do(ctx, RollbackStep(RollbackOptions{}), Together{HoldLimit: 200 * time.Millisecond}, a, b)
	if err == nil || a.Phase() != Synced || b.Phase() != Synced {
		t.Fatalf("rollback beside a write that hangs: %v; phases %s and %s", err, a.Phase(), b.Phase())
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("undone after %v", took)
	}
	fill(t, a, lun.Extent{Start: 8, Blocks: 4}, 3) // not held any more
	close(release)
	must(t, <-written)
	must(t, Do(ctx, RollbackStep(RollbackOptions{}), Together{}, a, b))
	waitFor(t, a, RolledBack)
	waitFor(t, b, RolledBack)
	for i, r := range pair {
		expect(t, r.source, lun.Extent{Blocks: 4}, 2)
		if i == 1 {
			expect(t, r.source, lun.Extent{Start: 99, Blocks: 1}, 3)
		}
	}
}

// newPair are two volumes of one service.
func newPair(t *testing.T, blocks uint64) []*rig {
	t.Helper()
	store, err := state.Open(t.TempDir(), state.Options{Log: quiet()})
	must(t, err)
	tgt, err := target.New(target.Config{Log: quiet()})
	must(t, err)
	var pair []*rig
	for _, name := range []string{"a", "b"} {
		r := &rig{source: luntest.NewThinMemory(testBlock, blocks), destination: luntest.NewThinMemory(testBlock, blocks)}
		r.vol, err = Open(t.Context(), Config{
			Name: name, IQN: "iqn.2026-11.net.example:" + name, Source: r.source, Destination: r.destination,
			RegionSize: testRegion, CopyDepth: copyDepth, Store: store, Target: tgt, Log: quiet(),
		})
		must(t, err)
		pair = append(pair, r)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, r := range pair {
			must(t, r.vol.Shutdown(ctx))
		}
		must(t, store.Close())
	})
	return pair
}

// Caught: a new record before it is known that the start goes on.
func TestARefusedStartLeavesWhatWasRolledBack(t *testing.T) {
	r := newRig(t, 2048)
	fill(t, r.source, lun.Extent{Blocks: 2048}, 1)
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	must(t, v.Rollback(t.Context(), RollbackOptions{}))
	waitFor(t, v, RolledBack)
	err := v.Start(t.Context())
	if s := v.Status(); err == nil || s.Phase != RolledBack || s.RolledBackAt == nil {
		t.Errorf("%v, phase %s, rolled back at %v", err, s.Phase, s.RolledBackAt)
	}
}

// Caught: a hold that was measured before the record was written.
func TestTheHoldThatIsShownIsAllOfIt(t *testing.T) {
	r := newRig(t, 2048)
	fill(t, r.source, lun.Extent{Blocks: 2048}, 1)
	r.cfg.Mirror = true
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	eventually(t, v, "whole", func(s Status) bool { return s.Mirror != nil && s.Mirror.State == "whole" })
	var slow atomic.Bool
	r.source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush && slow.Load() {
			time.Sleep(400 * time.Millisecond)
		}
		return nil
	})
	stop := make(chan struct{})
	longest := make(chan time.Duration)
	go func() {
		var most time.Duration
		for at := uint64(0); ; at++ {
			select {
			case <-stop:
				longest <- most
				return
			default:
			}
			began := time.Now()
			if err := v.WriteAt(context.Background(), stamp(lun.LBA(at%2000), 2), lun.LBA(at%2000)); err != nil {
				t.Error(err)
			}
			most = max(most, time.Since(began))
			time.Sleep(time.Millisecond)
		}
	}()
	time.Sleep(300 * time.Millisecond)
	slow.Store(true)
	must(t, v.Rollback(t.Context(), RollbackOptions{}))
	close(stop)
	most := <-longest
	shown := time.Duration(*v.Status().Hold * float64(time.Millisecond))
	if most > shown+250*time.Millisecond {
		t.Errorf("a write was held for %v, shown are %v", most, shown)
	}
	slow.Store(false)
	waitFor(t, v, RolledBack)
}

// Caught: the source called the destination.
func TestACopyBackNamesTheSidesAsTheyAre(t *testing.T) {
	r := newRig(t, 2048)
	fill(t, r.source, lun.Extent{Blocks: 2048}, 1)
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	fill(t, v, lun.Extent{Start: 5, Blocks: 1}, 2)
	var bad atomic.Bool
	bad.Store(true)
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if bad.Load() && op == luntest.Write {
			return errors.New("write protected")
		}
		return nil
	})
	must(t, v.Rollback(t.Context(), RollbackOptions{}))
	eventually(t, v, "degraded", func(s Status) bool { return s.Degraded })
	if why := v.Status().DegradedReason; !strings.Contains(why, "copy back: write LBA 5+1 of the source: ") {
		t.Error(why)
	}
	bad.Store(false)
	waitFor(t, v, RolledBack)
}

// Caught: blocks given up in the order of the volumes.
func TestBlocksAreGivenUpOnceAllOthersAreReady(t *testing.T) {
	pair := newPair(t, 256)
	a, b := pair[0].vol, pair[1].vol
	fill(t, pair[0].source, lun.Extent{Blocks: 256}, 1)
	pair[0].source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Start <= 7 && e.End() > 7 {
			return &lun.SenseError{Key: 3, ASC: 0x11, LBA: 7, Valid: true}
		}
		return nil
	})
	for _, v := range []*Volume{a, b} {
		must(t, v.Start(t.Context()))
	}
	waitFor(t, b, Synced)
	eventually(t, a, "unreadable", func(s Status) bool { return s.Unreadable > 0 && s.Unreadable == s.Remaining })
	var fails atomic.Bool
	fails.Store(true)
	pair[1].destination.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush && fails.Load() {
			return lun.ErrUnavailable
		}
		return nil
	})
	cut := CutoverStep(CutoverOptions{NoVerify: true, AcceptUnreadable: true})
	if err := Do(t.Context(), cut, Together{}, a, b); err == nil || a.Phase() != Migrating || a.Status().AcceptedUnreadable != 0 {
		t.Errorf("%v; a is %s, %d bytes given up", err, a.Phase(), a.Status().AcceptedUnreadable)
	}
	fails.Store(false)
	must(t, Do(t.Context(), cut, Together{}, a, b))
	if a.Phase() != Cutover || b.Phase() != Cutover {
		t.Errorf("phases %s and %s", a.Phase(), b.Phase())
	}
}

// Nobody wrote since the start, so nothing is on the destination alone, and it may be gone.
// Caught: a destination that is needed all the same.
func TestARollbackOfWhatNobodyWroteNeedsNoDestination(t *testing.T) {
	r := newRig(t, 2048)
	r.cfg.CopyRate = 1
	fill(t, r.source, lun.Extent{Blocks: 2048}, 1)
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(t.Context()))
	r.destination.Intercept(func(context.Context, luntest.Op, lun.Extent) error { return lun.ErrUnavailable })
	must(t, v.Rollback(t.Context(), RollbackOptions{}))
	waitFor(t, v, RolledBack)
	expect(t, v, lun.Extent{Blocks: 2048}, 1)
}

// What an initiator read where the destination had fallen back to after a loss of its cache stays so over a
// rollback, though the source has what was written last. Caught: a mirror taken for whole by what the source
// lost alone (first run).
func TestWhatWasReadAfterALossOfCacheStaysOverARollback(t *testing.T) {
	r, v := whole(t)
	e := lun.Extent{Start: 40, Blocks: 1}
	fill(t, v, e, 1)
	must(t, v.Flush(t.Context()))
	fill(t, v, e, 2)
	r.destination.PowerLoss()
	p := make([]byte, testBlock)
	must(t, v.ReadAt(t.Context(), p, e.Start))
	var failed atomic.Bool
	r.source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush && failed.CompareAndSwap(false, true) {
			return lun.ErrUnavailable // and nobody looks at what was lost
		}
		return nil
	})
	must(t, v.Rollback(t.Context(), RollbackOptions{}))
	again := func(when string) {
		t.Helper()
		after := make([]byte, testBlock)
		if must(t, v.ReadAt(t.Context(), after, e.Start)); !bytes.Equal(p, after) {
			t.Fatalf("%s: version %d was read before, %d after", when, p[15], after[15])
		}
	}
	again("at once")
	waitFor(t, v, RolledBack)
	again("in the end")
}
