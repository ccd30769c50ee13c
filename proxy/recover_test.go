package proxy

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// stillRig is a rig whose copier stands still, and whose volume has started.
func stillRig(t *testing.T) (*rig, *Volume) {
	r := newRig(t, 1024)
	r.settleDelay = time.Hour // so that the journal has what a kill leaves
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	must(t, r.source.Flush(t.Context()))
	var still atomic.Int32
	r.hold = func(ctx context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Blocks > 16 { // the copier's
			still.Add(1)
			<-ctx.Done()
		}
		return ctx.Err()
	}
	r.source.Intercept(r.hold)
	v := r.open(t)
	must(t, v.Start(t.Context()))
	for end := time.Now().Add(30 * time.Second); still.Load() < copyDepth; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the copier does not read")
		}
	}
	return r, v
}

// killed gives the rig as it is after the service was killed now; the old one goes on, on
// devices of its own.
func (r *rig) killed(t *testing.T) *rig {
	t.Helper()
	to := filepath.Join(t.TempDir(), "state")
	if out, err := exec.Command("cp", "-r", "--sparse=always", r.dir, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	os.Remove(filepath.Join(to, "badger", "LOCK"))
	after := &rig{dir: to, source: r.source.Clone(), destination: r.destination.Clone(), settleDelay: r.settleDelay, hold: r.hold}
	after.source.Intercept(r.hold)
	return after
}

// journaled waits until the state has taken n entries into its journal since before.
func (r *rig) journaled(t *testing.T, before, n uint64) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); r.store.Stats().Journaled < before+n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing was journaled")
		}
	}
}

// At each instant of a first write a kill leaves the block as it was or as it was written,
// and what was acknowledged stays. Caught: believing every intent shows garbage before the
// write; believing none loses what was acknowledged; and without the flush of what is believed
// it goes with the next loss of power.
func TestAKillAtEachInstantOfAFirstWrite(t *testing.T) {
	e := lun.Extent{Start: 500, Blocks: 3}
	dirty := func(v *Volume) bool { return v.raw().All(state.Valid|state.Dirty, run(e)) }
	for _, c := range []struct {
		name   string
		at     luntest.Op // where the kill comes; "" is after the answer
		power  bool       // the destination loses its cache with it
		expect uint64
	}{
		{"before the destination has it", luntest.Write, false, 1},
		{"before it is flushed", luntest.Flush, false, 2},
		{"before it is flushed, and the destination's power fails", luntest.Flush, true, 1},
		{"after the answer", "", false, 2},
		{"after the answer, and the destination's power fails", "", true, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, v := stillRig(t)
			defer r.close(t)
			var after *rig
			var armed atomic.Bool
			before := r.store.Stats().Journaled
			r.destination.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
				if op == c.at && armed.CompareAndSwap(true, false) {
					r.journaled(t, before, 1)
					after = r.killed(t)
				}
				return nil
			})
			armed.Store(c.at != "")
			fill(t, v, e, 2)
			if c.at == "" {
				after = r.killed(t)
			}
			if c.power {
				after.destination.PowerLoss()
			}
			w := after.open(t)
			defer after.close(t)
			expect(t, w, e, c.expect)
			after.destination.PowerLoss() // what was shown once stays
			expect(t, w, e, c.expect)
			if dirty(w) != (c.expect == 2) {
				t.Fatalf("valid and dirty: %v", dirty(w))
			}
			expect(t, w, lun.Extent{Start: 497, Blocks: 3}, 1)
			fill(t, w, e, 3)
			after = after.killed(t)
			w = after.open(t)
			defer after.close(t)
			expect(t, w, e, 3)
		})
	}
}

// Caught: without the wait for the flags of the first write its intent no longer matches
// after the kill, and the acknowledged rewrite is gone.
func TestARewriteRightAfterAFirstWriteSurvivesAKill(t *testing.T) {
	r, v := stillRig(t)
	defer r.close(t)
	for i := range lun.LBA(20) {
		fill(t, v, lun.Extent{Start: 100 + 8*i, Blocks: 8}, 2)
		fill(t, v, lun.Extent{Start: 102 + 8*i, Blocks: 2}, 3)
	}
	after := r.killed(t)
	w := after.open(t)
	defer after.close(t)
	for i := range lun.LBA(20) {
		expect(t, w, lun.Extent{Start: 100 + 8*i, Blocks: 2}, 2)
		expect(t, w, lun.Extent{Start: 102 + 8*i, Blocks: 2}, 3)
		expect(t, w, lun.Extent{Start: 104 + 8*i, Blocks: 4}, 2)
	}
}

// Caught: without the withdrawal the write that was answered with an error shows after the
// restart.
func TestAFirstWriteThatFailedDoesNotShowAfterAKill(t *testing.T) {
	r, v := stillRig(t)
	defer r.close(t)
	broken := errors.New("flush broken")
	var failing atomic.Bool
	failing.Store(true)
	r.destination.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush && failing.Load() {
			return broken
		}
		return nil
	})
	e := lun.Extent{Start: 300, Blocks: 2}
	if err := v.WriteAt(t.Context(), stamps(e, 2), e.Start); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	failing.Store(false)
	expect(t, v, e, 1)
	after := r.killed(t)
	w := after.open(t)
	defer after.close(t)
	expect(t, w, e, 1)
}

// Nobody can tell whether a write was finished while the destination cannot be read there.
func TestAVolumeIsNotServedWhileItsLastWritesCannotBeRead(t *testing.T) {
	r, v := stillRig(t)
	defer r.close(t)
	e := lun.Extent{Start: 300, Blocks: 2}
	fill(t, v, e, 2)
	fill(t, v, lun.Extent{Start: 700, Blocks: 2}, 2)
	after := r.killed(t)
	bad := &lun.SenseError{Key: 0x3, ASC: 0x11, LBA: 301, Valid: true}
	after.destination.Intercept(func(_ context.Context, op luntest.Op, b lun.Extent) error {
		if op == luntest.Read && !b.Intersect(e).Empty() {
			return bad
		}
		return nil
	})
	store, err := state.Open(after.dir, state.Options{Log: quiet()})
	must(t, err)
	front, err := target.New(target.Config{Log: quiet()})
	must(t, err)
	cfg := v.cfg
	cfg.Source, cfg.Destination, cfg.Store, cfg.Target = after.source, after.destination, store, front
	if _, err := Open(t.Context(), cfg); !errors.Is(err, lun.ErrUnavailable) || !errors.Is(err, bad) {
		t.Fatal(err)
	}
	must(t, store.Close())
	again := after.killed(t)
	after.destination.Intercept(nil)
	w := after.open(t)
	expect(t, w, e, 2)
	after.close(t)

	// Where it stays so for good it can be told that these writes may be lost, and those alone.
	store, err = state.Open(again.dir, state.Options{Log: quiet()})
	must(t, err)
	cfg.Source, cfg.Destination, cfg.Store = again.source, again.destination, store
	var withdrawn []BlockRun
	cfg.Withdraw = func(r BlockRun) { withdrawn = append(withdrawn, r) }
	refuse := func(with error) {
		again.destination.Intercept(func(_ context.Context, op luntest.Op, b lun.Extent) error {
			if op == luntest.Read && !b.Intersect(e).Empty() {
				return with
			}
			return nil
		})
	}
	refuse(lun.ErrUnavailable) // that is not for good
	if _, err := Open(t.Context(), cfg); !errors.Is(err, lun.ErrUnavailable) || len(withdrawn) > 0 {
		t.Fatalf("%v, withdrawn %v", err, withdrawn)
	}
	refuse(bad)
	w, err = Open(t.Context(), cfg)
	must(t, err)
	if len(withdrawn) != 1 || withdrawn[0] != (BlockRun{LBA: 300, Blocks: 2}) {
		t.Errorf("withdrawn: %v", withdrawn)
	}
	expect(t, w, e, 1)
	expect(t, w, lun.Extent{Start: 700, Blocks: 2}, 2)
	must(t, w.Shutdown(t.Context()))
	must(t, store.Close())
	// It stays so, and is not asked again.
	again.destination.Intercept(nil)
	w = again.open(t)
	expect(t, w, lun.Extent{Start: 700, Blocks: 2}, 2)
	expect(t, w, e, 1)
	again.close(t)
}

// A copy waits for its flags while an initiator writes one of its blocks: a crash between
// the two would leave that block valid, not dirty, and with what the initiator wrote. Caught:
// a commit that does not look at the writes under way.
func TestACopyIsNotFlaggedWhereAFirstWriteIsUnderWay(t *testing.T) {
	const blocks, at = 128, 77
	r := newRig(t, blocks)
	fill(t, r.source, lun.Extent{Blocks: blocks}, 1)
	must(t, r.source.Flush(t.Context()))
	copied, proceed := make(chan struct{}), make(chan struct{})
	under, write := make(chan struct{}), make(chan struct{})
	var flushes atomic.Int32
	r.destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		switch {
		case op == luntest.Flush && flushes.Add(1) == 1:
			close(copied)
			<-proceed
		case op == luntest.Write && e == lun.Extent{Start: at, Blocks: 1}:
			close(under)
			<-write
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(t.Context()))
	<-copied
	written := make(chan error)
	go func() { written <- v.WriteAt(context.Background(), stamp(at, 2), at) }()
	<-under
	close(proceed)
	for end := time.Now().Add(30 * time.Second); v.raw().Count(state.Valid) < blocks-1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the copy was not flagged")
		}
	}
	if v.raw().Any(state.Valid, state.Run{Start: at, Blocks: 1}) {
		t.Error("the block that is being written is valid")
	}
	close(write)
	must(t, <-written)
	waitFor(t, v, Synced)
	expect(t, v, lun.Extent{Start: at, Blocks: 1}, 2)
}

// unsure is flags whose transactions have an outcome that nobody knows.
type unsure struct{ flags }

func (u unsure) Set(context.Context, state.Kinds, ...state.Run) error { return state.ErrFailed }

// Once it is not known whether a copy was flagged, none of its blocks is written: after a
// restart it might be valid, not dirty, and with what a failed write left. Caught: a mark that
// does not ask.
func TestNoFirstWriteTouchesTheDestinationAfterACommitOfUnknownOutcome(t *testing.T) {
	r := newRig(t, 128)
	fill(t, r.source, lun.Extent{Blocks: 128}, 1)
	must(t, r.source.Flush(t.Context()))
	v := r.open(t)
	replaceFlags(v, unsure{v.raw()})
	must(t, v.Start(t.Context()))
	eventually(t, v, "the copy could not be flagged", func(s Status) bool { return s.Degraded })
	must(t, v.Pause(t.Context()))
	writes := r.destination.Count(luntest.Write)
	if err := v.WriteAt(t.Context(), stamp(77, 2), 77); !errors.Is(err, state.ErrFailed) {
		t.Fatal(err)
	}
	if n := r.destination.Count(luntest.Write) - writes; n > 0 {
		t.Fatalf("%d writes reached the destination", n)
	}
	expect(t, v, lun.Extent{Start: 77, Blocks: 1}, 1)
	r.close(t)
}

// unsureStore writes the record of a start and does not know it.
type unsureStore struct{ store }

func (u unsureStore) PutRecords(ctx context.Context, records ...state.Record) error {
	if records[0].Phase != string(Migrating) {
		return u.store.PutRecords(ctx, records...)
	}
	return errors.Join(state.ErrFailed, u.store.PutRecords(ctx, records...))
}

// A start that was recorded without anybody knowing leaves a volume that writes to its source
// for as long as the service goes on. The first SYNCHRONIZE CACHE after the restart is of these
// writes too. Caught: a first flush of the destination alone.
func TestFirstFlushAfterAnUncertainStartIsOfTheSource(t *testing.T) {
	r := newRig(t, 128)
	fill(t, r.source, lun.Extent{Blocks: 128}, 1)
	must(t, r.source.Flush(t.Context()))
	v := r.open(t)
	sure := v.store
	v.store = unsureStore{sure}
	if err := v.Start(t.Context()); !errors.Is(err, state.ErrFailed) {
		t.Fatalf("the start: %v", err)
	}
	fill(t, v, lun.Extent{Start: 77, Blocks: 1}, 2)
	after := r.killed(t)
	v.store = sure
	r.close(t)
	after.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Blocks > 16 {
			return lun.ErrUnavailable // nothing is copied
		}
		return nil
	})
	w := after.open(t)
	if w.Phase() != Migrating {
		t.Fatalf("phase %s: the start was not recorded", w.Phase())
	}
	must(t, w.Flush(t.Context()))
	after.source.PowerLoss()
	expect(t, w, lun.Extent{Start: 77, Blocks: 1}, 2)
	after.close(t)
}
