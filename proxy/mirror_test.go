package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// whole is a volume of 2,560 blocks in phase synced whose mirror is whole.
func whole(t *testing.T) (*rig, *Volume) {
	t.Helper()
	r := newRig(t, 20*testRegion/testBlock)
	r.cfg.Mirror = true
	v := r.open(t)
	t.Cleanup(func() { r.close(t) })
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	eventually(t, v, "the mirror is whole", func(s Status) bool { return s.Mirror != nil && s.Mirror.State == "whole" })
	return r, v
}

// What is being written needs no copy: under load there is always something of it, and looking for what
// is missing took more processor time than the writes. Caught: a write in flight that is
// copied, or counts as behind.
func TestWritesInFlightAreNotCopiedByTheMirror(t *testing.T) {
	r, v := whole(t)
	entered, release := make(chan struct{}), make(chan struct{})
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Write && e.Start == 99 {
			close(entered)
			<-release
		}
		return nil
	})
	written := make(chan error, 1)
	go func() { written <- v.WriteAt(t.Context(), stamp(99, 3), 99) }()
	<-entered
	if s := v.Status().Mirror; s.State != "whole" || s.Behind != 0 {
		t.Errorf("with a write in flight the mirror is %+v", *s)
	}
	reads := r.destination.Count(luntest.Read)
	for range 3 { // rounds
		fill(t, v, lun.Extent{Start: 500, Blocks: 4}, 4)
		eventually(t, v, "a round is over", func(Status) bool { return v.raw().Count(state.Dirty) == 1 })
	}
	if n := r.destination.Count(luntest.Read) - reads; n != 0 {
		t.Errorf("%d reads for copies", n)
	}
	close(release)
	must(t, <-written)
	expect(t, r.source, lun.Extent{Start: 99, Blocks: 1}, 3)
	eventually(t, v, "what is alike is noted", func(Status) bool { return v.raw().Count(state.Dirty) == 0 })
}

// A mirror that is broken for long takes no memory for each write, and a copy that was begun
// before is not taken for the content that was written since. Caught: suspects without a
// bound; doubts that do not count.
func TestManySuspectsAreOneDoubt(t *testing.T) {
	r, v := whole(t)
	var gone atomic.Bool
	r.source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if gone.Load() && (op == luntest.Write || op == luntest.Flush) {
			return lun.ErrUnavailable
		}
		return nil
	})
	gone.Store(true)
	back := v.ways.Load().back
	e := lun.Extent{Start: 7, Blocks: 1}
	before := back.Begin(e)
	fill(t, v, e, 5)
	for i := range 2 * mostSuspects {
		fill(t, v, lun.Extent{Start: lun.LBA(20 + 2*i), Blocks: 1}, 5)
	}
	v.mu.Lock()
	n := len(back.suspects)
	v.mu.Unlock()
	if n > mostSuspects {
		t.Errorf("%d suspects", n)
	}
	missing := func() bool {
		left, err := back.Invalid(e)
		must(t, err)
		return len(left) > 0
	}
	gone.Store(false)
	must(t, v.stopMirror(t.Context()))
	must(t, back.Commit(t.Context(), []copier.Copied{{Extent: e, Era: before}}))
	if !missing() {
		t.Error("a copy counts that was begun before the write")
	}
	v.workMirror()
	eventually(t, v, "the mirror is whole again", func(s Status) bool { return s.Mirror.State == "whole" })
	expect(t, r.source, e, 5)
	expect(t, r.source, lun.Extent{Start: 20, Blocks: 1}, 5)
}

// Caught: a record of phase ready that is made anew without it.
func TestAMirrorThatIsSwitchedOnIsKeptUntilTheStart(t *testing.T) {
	r := newRig(t, 2048)
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.SetMirror(t.Context(), true))
	if !v.Status().Mirrored {
		t.Fatal("not mirrored before")
	}
	r.close(t)
	v = r.open(t)
	if !v.Status().Mirrored {
		t.Error("it is forgotten")
	}
}

// onLine does something as a line is logged.
type onLine struct {
	text string
	do   func()
}

func (h *onLine) Levels() []logrus.Level { return logrus.AllLevels }
func (h *onLine) Fire(e *logrus.Entry) error {
	if strings.Contains(e.Message, h.text) {
		h.do()
	}
	return nil
}

// A volume that is opened while the target serves already, as after an array was away: the first
// command comes as soon as the unit is there, and its write is on both sides or not clean. Caught: a
// mirror that begins after the unit is on the target.
func TestAMirrorIsThereBeforeTheFirstCommand(t *testing.T) {
	ctx := context.Background()
	var at atomic.Value // address
	dir := t.TempDir()
	source, destination := luntest.NewThinMemory(testBlock, 2048), luntest.NewThinMemory(testBlock, 2048)
	fill(t, source, lun.Extent{Blocks: 2048}, 1)
	var failing atomic.Bool
	source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if failing.Load() && op != luntest.Read {
			return lun.ErrUnavailable
		}
		return nil
	})
	open := func(log logrus.FieldLogger) (*Volume, *state.Store, *target.Server) {
		store, err := state.Open(dir, state.Options{Log: quiet()})
		must(t, err)
		tgt, err := target.New(target.Config{Log: quiet(), Portals: []target.Portal{{Address: "127.0.0.1:0"}}})
		must(t, err)
		must(t, tgt.Listen())
		go func() { _ = tgt.Serve(ctx) }()
		// as of a volume that is opened later than others (Service.reopen)
		iqn := "iqn.2026-11.net.example:vol"
		addr := fmt.Sprintf("iscsi://%s/%s/0", tgt.Addrs()[0], iqn)
		at.Store(addr)
		v, err := Open(ctx, Config{
			Name: "vol", IQN: iqn, Source: source, Destination: destination, Mirror: true,
			RegionSize: testRegion, CopyDepth: 4, Store: store, Target: tgt, Log: log,
		})
		must(t, err)
		return v, store, tgt
	}
	v, store, tgt := open(quiet())
	must(t, v.Throttle(ctx, 1))
	must(t, v.Start(ctx))
	must(t, v.Pause(ctx))
	must(t, v.Throttle(ctx, 0))
	failing.Store(true)
	fill(t, v, lun.Extent{Start: 5, Blocks: 1}, 2) // on the destination alone, dirty: as after a kill or an outage of the source
	must(t, v.Shutdown(ctx))
	tgt.Close()
	must(t, store.Close())
	failing.Store(false)

	var entered sync.Once
	in, copied := make(chan struct{}), make(chan struct{})
	var copiedOnce sync.Once
	var ourWrite atomic.Bool
	destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if e.Start <= 5 && e.End() > 5 {
			switch {
			case op == luntest.Write && ourWrite.Load():
				entered.Do(func() { close(in) })
				select {
				case <-copied:
					time.Sleep(100 * time.Millisecond) // a write that takes 0.1 s longer than the read of the copier
				case <-time.After(time.Second):
				}
			case op == luntest.Read && ourWrite.Load():
				time.AfterFunc(50*time.Millisecond, func() { copiedOnce.Do(func() { close(copied) }) })
			}
		}
		return nil
	})
	written := make(chan error, 1)
	log := logrus.New()
	log.SetOutput(io.Discard)
	log.AddHook(&onLine{"takes up the migration", func() {
		go func() {
			dev, err := lun.Open(ctx, at.Load().(string), lun.Options{InitiatorName: "iqn.2026-11.net.example:host"})
			if err != nil {
				written <- err
				return
			}
			defer dev.Close()
			ourWrite.Store(true)
			written <- dev.WriteAt(ctx, stamp(5, 3), 5)
		}()
		select {
		case <-in:
		case err := <-written:
			written <- err
		case <-time.After(time.Second):
		}
	}})
	v, store, tgt = open(log)
	must(t, <-written)
	expect(t, v, lun.Extent{Start: 5, Blocks: 1}, 3)
	eventually(t, v, "whole", func(s Status) bool { return s.Mirror != nil && s.Mirror.State == "whole" })
	eventually(t, v, "clean", func(Status) bool { return v.raw().Count(state.Dirty) == 0 })
	must(t, v.Rollback(ctx, RollbackOptions{}))
	waitFor(t, v, RolledBack)
	t.Cleanup(func() { must(t, v.Shutdown(ctx)); tgt.Close(); must(t, store.Close()) })
	expect(t, v, lun.Extent{Start: 5, Blocks: 1}, 3) // acknowledged
}

// Caught: a flush, or a write, that waits as long as the array's time-out.
type gone struct {
	*luntest.Memory
	is atomic.Bool
}

func (g *gone) Unreachable() error {
	if g.is.Load() {
		return lun.ErrUnavailable
	}
	return nil
}

func TestNobodyWaitsForASourceThatIsGone(t *testing.T) {
	source := &gone{Memory: luntest.NewThinMemory(testBlock, 2048)}
	fill(t, source, lun.Extent{Blocks: 2048}, 1)
	destination := luntest.NewThinMemory(testBlock, 2048)
	v := openWith(t, source, destination)
	must(t, v.SetMirror(t.Context(), true))
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	eventually(t, v, "whole", func(s Status) bool { return s.Mirror != nil && s.Mirror.State == "whole" })
	const ioTimeout = 6 * time.Second
	source.Intercept(func(ctx context.Context, op luntest.Op, _ lun.Extent) error {
		if source.is.Load() && (op == luntest.Flush || op == luntest.Write) {
			select {
			case <-time.After(ioTimeout):
				return lun.ErrUnavailable
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	source.is.Store(true)
	began := time.Now()
	done := make(chan struct{})
	go func() { // another initiator writes: the mirror breaks after 2 s
		defer close(done)
		time.Sleep(100 * time.Millisecond)
		fill(t, v, lun.Extent{Start: 9, Blocks: 1}, 3)
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("a write took %v", took)
		}
	}()
	must(t, v.Flush(t.Context()))
	took := time.Since(began)
	<-done
	if took > 4*time.Second {
		t.Errorf("a flush took %v", took)
	}
	source.is.Store(false)
}

// A source that takes flushes and fails writes is not tried once a second, each time with a
// warning and two events in the audit trail. Caught: a flush for all that is asked of it.
func TestAMirrorRestsWhereTheSourceTakesNoWrites(t *testing.T) {
	r := newRig(t, 2048)
	fill(t, r.source, lun.Extent{Blocks: 2048}, 1)
	var full atomic.Bool
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if full.Load() && op == luntest.Write && e.Start <= 5 && e.End() > 5 {
			return errors.New("space allocation failed")
		}
		return nil
	})
	r.cfg.Mirror = true
	var told atomic.Int64
	r.cfg.Happened = func(h Happening) {
		if h.Fault != "" {
			told.Add(1)
		}
	}
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	eventually(t, v, "whole", func(s Status) bool { return s.Mirror != nil && s.Mirror.State == "whole" })
	full.Store(true)
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		fill(t, v, lun.Extent{Start: 5, Blocks: 1}, 2)
		time.Sleep(50 * time.Millisecond)
	}
	if n := told.Load(); n != 1 {
		t.Errorf("%d faults began or ended", n)
	}
	full.Store(false)
	eventually(t, v, "whole again", func(s Status) bool { return s.Mirror.State == "whole" })
}

// Caught: a fault of the way back that is one of the copy forward, and stays.
func TestFaultsOfACatchUpEndWithTheMirror(t *testing.T) {
	r := newRig(t, 2048)
	fill(t, r.source, lun.Extent{Blocks: 2048}, 1)
	var full atomic.Bool
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if full.Load() && op == luntest.Write {
			return errors.New("space allocation failed")
		}
		return nil
	})
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	fill(t, v, lun.Extent{Start: 5, Blocks: 1}, 2)
	full.Store(true)
	must(t, v.SetMirror(t.Context(), true))
	eventually(t, v, "copy fault", func(s Status) bool { return s.Degraded })
	must(t, v.SetMirror(t.Context(), false))
	if s := v.Status(); s.Degraded {
		t.Error(s.DegradedReason)
	}
}

// Caught: dirty blocks alone; what was cleared taken for what was copied, after a restart.
func TestWhatInitiatorsWroteCountsWithAMirrorToo(t *testing.T) {
	r := newRig(t, 2048)
	fill(t, r.source, lun.Extent{Blocks: 128}, 1)
	r.cfg.Mirror = true
	v := r.open(t)
	defer func() { r.close(t) }()
	must(t, v.Start(t.Context()))
	waitFor(t, v, Synced)
	fill(t, v, lun.Extent{Blocks: 1024}, 2)
	eventually(t, v, "clean", func(Status) bool { return v.raw().Count(state.Dirty) == 0 })
	wants := func() {
		t.Helper()
		if s := v.Status(); s.InitiatorWritten != 1024*testBlock || s.Copied != 128*testBlock {
			t.Errorf("%d bytes written, %d copied", s.InitiatorWritten, s.Copied)
		}
	}
	wants()
	must(t, v.SetMirror(t.Context(), false))
	r.cfg.Mirror = false
	r.close(t)
	v = r.open(t)
	wants()
}

// BenchmarkMirror is writes of 4 KiB at random, in phase synced, by 32 writers onto LUNs in memory,
// with a mirror and without one.
func BenchmarkMirror(b *testing.B) {
	for _, mib := range []uint64{4, 256} {
		for _, on := range []bool{false, true} {
			b.Run(fmt.Sprintf("within=%dMiB/mirror=%v", mib, on), func(b *testing.B) { benchmarkMirror(b, mib<<8, on) })
		}
	}
}

func benchmarkMirror(b *testing.B, within uint64, on bool) {
	ctx := context.Background()
	const blocks = 256 << 8
	store, err := state.Open(filepath.Join(b.TempDir(), "state"), state.Options{Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	tgt, err := target.New(target.Config{Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	v, err := Open(ctx, Config{
		Name: "vol", IQN: "iqn.2026-11.net.example:vol",
		Source: luntest.NewThinMemory(4096, blocks), Destination: luntest.NewThinMemory(4096, blocks),
		RegionSize: 1 << 20, CopyDepth: 8, Store: store, Target: tgt, Log: quiet(),
	})
	if err != nil {
		b.Fatal(err)
	}
	defer v.Close()
	if err := v.Start(ctx); err != nil {
		b.Fatal(err)
	}
	for v.Phase() != Synced {
		time.Sleep(time.Millisecond)
	}
	if err := v.SetMirror(ctx, on); err != nil {
		b.Fatal(err)
	}
	const depth = 32
	took := make([][]time.Duration, depth)
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	var wg sync.WaitGroup
	for w := range depth {
		p := make([]byte, 4096)
		p[0] = byte(w + 1)
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				began := time.Now()
				if err := v.WriteAt(ctx, p, lun.LBA(rand.Uint64N(within))); err != nil {
					b.Error(err)
					return
				}
				took[w] = append(took[w], time.Since(began))
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	all := slices.Concat(took...)
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-p50")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "µs-p99")
}

// A read that went to the source while its block was not valid yet, and took long, meets a write of
// the mirror there that the destination does not have yet. Who reads afterwards must not see
// what was before it. Caught: a read that is not routed again.
func TestAReadBesideAMirrorSeesNothingThatIsUndoneLater(t *testing.T) {
	r := newRig(t, 20*testRegion/testBlock)
	r.cfg.Mirror = true
	e := lun.Extent{Start: 5, Blocks: 3}
	at := lun.Extent{Start: 6, Blocks: 1}
	reading, read := make(chan struct{}), make(chan struct{})
	writing, write := make(chan struct{}), make(chan struct{})
	var once, armed atomic.Bool
	copies := make(chan struct{})
	r.source.Intercept(func(ctx context.Context, op luntest.Op, x lun.Extent) error {
		switch {
		case op == luntest.Read && x == e && once.CompareAndSwap(false, true):
			close(reading)
			<-read
		case op == luntest.Read && x.Blocks > e.Blocks && x.Start <= e.Start: // of the copier
			select {
			case <-copies:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	r.destination.Intercept(func(_ context.Context, op luntest.Op, x lun.Extent) error {
		if op == luntest.Write && x == at && armed.CompareAndSwap(true, false) {
			close(writing)
			<-write
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(t.Context()))
	defer close(copies)
	p := make([]byte, e.Blocks*testBlock)
	done := make(chan error, 2)
	go func() { done <- v.ReadAt(t.Context(), p, e.Start) }()
	<-reading
	must(t, v.WriteAt(t.Context(), stamp(at.Start, 7), at.Start)) // from now on it is valid
	armed.Store(true)
	go func() { done <- v.WriteAt(t.Context(), stamp(at.Start, 8), at.Start) }()
	<-writing
	eventually(t, v, "the write is at the source", func(Status) bool {
		b := make([]byte, testBlock)
		must(t, r.source.ReadAt(t.Context(), b, at.Start))
		return string(b) == string(stamp(at.Start, 8))
	})
	close(read)
	must(t, <-done)
	if !slices.Equal(p[testBlock:2*testBlock], stamp(at.Start, 7)) {
		t.Error("the read saw what the destination does not have")
	}
	close(write)
	must(t, <-done)
	expect(t, v, at, 8)
}

// What went to the source while nobody knew of the start is in its cache, whatever became of the
// mirror since. Caught: a broken mirror that has the destination alone flushed.
func TestTheFirstFlushIsOfTheSourceThoughTheMirrorIsBroken(t *testing.T) {
	r := newRig(t, 20*testRegion/testBlock)
	r.cfg.Mirror, r.cfg.CopyRate = true, 1
	fill(t, r.source, lun.Extent{Blocks: 2048}, 1)
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(t.Context()))
	must(t, v.Pause(t.Context()))
	r.close(t)
	v = r.open(t)
	if p := v.Phase(); p != Migrating {
		t.Fatalf("phase %s", p)
	}
	var gone atomic.Bool
	r.source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Write || op == luntest.Flush && gone.Load() {
			return lun.ErrUnavailable
		}
		return nil
	})
	fill(t, v, lun.Extent{Start: 7, Blocks: 1}, 5)
	eventually(t, v, "the mirror is broken", func(s Status) bool { return s.Mirror.State == "broken" })
	gone.Store(true)
	if err := v.Flush(t.Context()); err == nil {
		t.Error("a flush is GOOD though the source, which has blocks alone, was not flushed")
	}
	gone.Store(false)
	flushes := r.source.Count(luntest.Flush)
	must(t, v.Flush(t.Context()))
	if r.source.Count(luntest.Flush) == flushes {
		t.Error("the source is not flushed")
	}
	gone.Store(true)
	must(t, v.Flush(t.Context())) // from now on it has nothing in its cache
}
