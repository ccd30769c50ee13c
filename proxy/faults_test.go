package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// eventually waits until the volume's status is as it should be.
func eventually(t *testing.T, v *Volume, what string, is func(Status) bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(v.Status()); {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s; status %+v", what, v.Status())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// openWith opens a volume over devices that a rig does not have.
func openWith(t *testing.T, source, destination lun.Device) *Volume {
	t.Helper()
	store, err := state.Open(t.TempDir(), state.Options{Log: quiet()})
	must(t, err)
	tgt, err := target.New(target.Config{Log: quiet()})
	must(t, err)
	v, err := Open(context.Background(), Config{
		Name: "vol", IQN: "iqn.2026-11.net.example:vol", Source: source, Destination: destination,
		RegionSize: testRegion, CopyDepth: 4, Store: store, Target: tgt, Log: quiet(),
	})
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		if err := errors.Join(v.Shutdown(ctx), store.Close()); err != nil {
			t.Error(err)
		}
	})
	return v
}

// One unreadable block in a partial region.
func TestOneBadBlockInAPartialRegionHoldsUpNoOther(t *testing.T) {
	const blocks = 128 * 400
	r := newRig(t, blocks)
	fill(t, r.source, lun.Extent{Blocks: blocks}, 1)
	var bad atomic.Int32
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Overlaps(lun.Extent{Start: 5, Blocks: 1}) {
			bad.Add(1)
			return &lun.SenseError{Key: 3, ASC: 0x11}
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Throttle(context.Background(), 1))
	must(t, v.Start(context.Background()))
	must(t, v.Pause(context.Background()))
	fill(t, v, lun.Extent{Start: 100, Blocks: 2}, 2) // region 0 is partial now
	must(t, v.Throttle(context.Background(), 0))
	must(t, v.Resume(context.Background()))
	eventually(t, v, "all but the bad region is copied", func(s Status) bool { return s.Remaining <= testRegion })
	if s := v.Status(); s.Phase != Migrating || !s.Degraded {
		t.Fatalf("with a block that was not copied: %+v", s)
	}
}

// A bad source block that the initiator has rewritten is read along and fails for ever.
func TestABadSourceBlockThatWasRewrittenIsNotNeeded(t *testing.T) {
	r := newRig(t, 1024)
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Overlaps(lun.Extent{Start: 50, Blocks: 1}) {
			return &lun.SenseError{Key: 3, ASC: 0x11}
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	fill(t, v, lun.Extent{Start: 50, Blocks: 1}, 2)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := v.Wait(ctx, Synced); err != nil {
		t.Fatalf("never synced: %d bytes left, %s", v.Status().Remaining, v.Status().DegradedReason)
	}
}

// A write beside an ongoing write must not wait because the copier wants a whole hole.
func TestAHoleBeingCopiedQueuesNoWriteBehindAnother(t *testing.T) {
	r := newRig(t, 65536)
	surveyed, stuck, proceed := make(chan struct{}), make(chan struct{}), make(chan struct{})
	r.source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Extents {
			<-surveyed
		}
		return nil
	})
	var once sync.Once
	r.destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Write && e.Start == 0 {
			once.Do(func() { close(stuck); <-proceed })
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	slow := make(chan error, 1)
	go func() { slow <- v.WriteAt(context.Background(), stamp(0, 1), 0) }()
	<-stuck
	close(surveyed)
	time.Sleep(500 * time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	err := v.WriteAt(ctx, stamp(60000, 1), 60000)
	close(proceed)
	must(t, <-slow)
	if err != nil {
		t.Fatalf("a write 30 MB away from the slow one waited behind the copier's lock: %v", err)
	}
}

func TestAFaultThatIsOverIsNotShown(t *testing.T) {
	r := newRig(t, 4096)
	fill(t, r.source, lun.Extent{Blocks: 4096}, 1)
	var once sync.Once
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) (err error) {
		if op == luntest.Read && e.End() == 4096 {
			once.Do(func() { err = fmt.Errorf("hiccup: %w", lun.ErrUnavailable) })
		}
		return err
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	waitFor(t, v, Synced)
	eventually(t, v, "not degraded", func(s Status) bool { return !s.Degraded })
}

func TestACallerWhoLeavesDegradesNothing(t *testing.T) {
	r := newRig(t, 1024)
	v := r.open(t)
	defer r.close(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	v.Throttle(ctx, 5)
	if s := v.Status(); s.Degraded {
		t.Fatalf("degraded by a caller that went away: %s", s.DegradedReason)
	}
}

func TestRateAndETAAreKnownOverZeroes(t *testing.T) {
	const blocks = 65536                                                  // 32 MiB
	source := luntest.NewMemory(lun.Info{BlockSize: 512, Blocks: blocks}) // thick: all counts as allocated
	destination := luntest.NewThinMemory(512, blocks)
	v := openWith(t, source, destination)
	must(t, v.Throttle(context.Background(), 4<<20))
	must(t, v.Start(context.Background()))
	eventually(t, v, "rate and ETA are known", func(s Status) bool { return s.Phase == Migrating && s.Rate > 0 && s.ETA != nil })
}

func TestHalfASurveyIsNotTheAllocation(t *testing.T) {
	r := newRig(t, 4096)
	for at := lun.LBA(0); at < 4096; at += 8 {
		fill(t, r.source, lun.Extent{Start: at, Blocks: 4}, 1)
	}
	var calls atomic.Int32
	r.source.Intercept(func(ctx context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Extents && calls.Add(1) > 3 {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	v := r.open(t)
	must(t, v.Start(context.Background()))
	for calls.Load() < 4 {
		time.Sleep(time.Millisecond)
	}
	must(t, v.Pause(context.Background()))
	a := v.Status()
	r.close(t)
	v = r.open(t)
	defer r.close(t)
	b := v.Status()
	if b.AllocatedKnown && b.Allocated != 2048*512 {
		t.Fatalf("before: %d known %v; after the restart: %d known %v, true: %d", a.Allocated, a.AllocatedKnown, b.Allocated, b.AllocatedKnown, 2048*512)
	}
}

func TestNothingStartsAfterShutdown(t *testing.T) {
	r := newRig(t, 1024)
	v := r.open(t)
	must(t, v.Shutdown(context.Background()))
	err := v.Start(context.Background())
	v.step.Lock()
	running := v.copying != nil
	v.step.Unlock()
	r.store.Close()
	if err == nil || running {
		t.Fatalf("started after Shutdown: %v, copier %v", err, running)
	}
}

func TestShutdownKeepsItsLimitWhileAFlushHangs(t *testing.T) {
	r := newRig(t, 128)
	fill(t, r.source, lun.Extent{Blocks: 128}, 1)
	hung, done := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.destination.Intercept(func(ctx context.Context, op luntest.Op, e lun.Extent) (err error) {
		if op == luntest.Flush {
			once.Do(func() {
				close(hung)
				select {
				case <-ctx.Done():
					err = ctx.Err()
				case <-done:
				}
			})
		}
		return err
	})
	v := r.open(t)
	must(t, v.Start(context.Background()))
	<-hung
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	ended := make(chan struct{})
	go func() { v.Shutdown(ctx); close(ended) }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("Shutdown with a limit of 0.3 s has not returned after 4 s")
	}
	close(done)
	<-ended
	r.store.Close()
}

func TestAnAbortedFirstWriteEndsWhileAFlushHangs(t *testing.T) {
	r := newRig(t, 1024)
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	done := make(chan struct{})
	var arm atomic.Bool
	r.destination.Intercept(func(ctx context.Context, op luntest.Op, e lun.Extent) (err error) {
		if op == luntest.Flush && arm.Load() {
			select {
			case <-ctx.Done():
				err = ctx.Err()
			case <-done:
			}
		}
		return err
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Throttle(context.Background(), 1))
	must(t, v.Start(context.Background()))
	time.Sleep(200 * time.Millisecond)
	arm.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- v.WriteAt(ctx, stamp(1000, 2), 1000) }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("a cancelled WriteAt has not returned after 4 s (lun.Device: ends when ctx ends)")
	}
	close(done)
	arm.Store(false)
}

func TestThrottleHoldsForZeroingAThickDestination(t *testing.T) {
	const blocks = 65536
	source := luntest.NewThinMemory(512, blocks)
	destination := luntest.NewMemory(lun.Info{BlockSize: 512, Blocks: blocks})
	v := openWith(t, source, destination)
	must(t, v.Throttle(context.Background(), 1<<20))
	must(t, v.Start(context.Background()))
	time.Sleep(2 * time.Second)
	if s := v.Status(); s.Size-s.Remaining > 8<<20 {
		t.Fatalf("%d bytes of the destination were zeroed in 2 s at a limit of 1 MiB/s", s.Size-s.Remaining)
	}
}

func TestTwoRefusalsAreOneLine(t *testing.T) {
	source, destination := luntest.NewThinMemory(512, 4096), luntest.NewThinMemory(512, 2048)
	fill(t, destination, lun.Extent{Blocks: 1}, 1)
	v := openWith(t, source, destination)
	err := v.Start(context.Background())
	if err == nil || strings.Contains(err.Error(), "\n") {
		t.Fatalf("%q", err)
	}
}

func TestManyFailedWritesToOneBlockAreOneSuspect(t *testing.T) {
	r := newRig(t, 1024)
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	var failing atomic.Bool
	r.destination.Intercept(func(ctx context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Write && failing.Load() {
			return errors.New("gone")
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Throttle(context.Background(), 1))
	must(t, v.Start(context.Background()))
	must(t, v.Pause(context.Background()))
	failing.Store(true)
	for range 1000 {
		v.WriteAt(context.Background(), stamp(1000, 2), 1000)
	}
	if n := len(v.way().suspects); n > 10 {
		t.Fatalf("%d suspects for one block", n)
	}
}

func TestASourceThatRefusesToTellItsAllocationIsCopiedWhole(t *testing.T) {
	r := newRig(t, 1024)
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Extents {
			return &lun.SenseError{Key: 5, ASC: 0x20}
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := v.Wait(ctx, Synced); err != nil {
		t.Fatal(v.Status().DegradedReason)
	}
}

func TestWaitForNoSuchPhaseFails(t *testing.T) {
	r := newRig(t, 128)
	v := r.open(t)
	defer r.close(t)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if v.Wait(ctx, "nonsense") == nil {
		t.Fatal("returned nil")
	}
}

// Without its flags on stable storage a write is not acknowledged; reads go on, and the
// volume says what is wrong.
//
// Caught: the error of the journal dropped.
func TestWriteFailsWhenTheStateCannotBeWritten(t *testing.T) {
	r := newRig(t, 1024)
	fill(t, r.source, lun.Extent{Blocks: 1024}, 1)
	v := r.open(t)
	ctx := context.Background()
	must(t, v.Throttle(ctx, 1))
	must(t, v.Start(ctx))
	fill(t, v, lun.Extent{Start: 900, Blocks: 4}, 2)
	must(t, v.Pause(ctx))
	must(t, r.store.Close()) // from here on no flag can be written
	if err := v.WriteAt(ctx, stamp(1000, 3), 1000); err == nil {
		t.Error("a write was acknowledged without its flag")
	}
	expect(t, v, lun.Extent{Start: 1000, Blocks: 1}, 1)
	fill(t, v, lun.Extent{Start: 900, Blocks: 4}, 4) // valid and dirty: needs no flag
	expect(t, v, lun.Extent{Start: 900, Blocks: 4}, 4)
	if s := v.Status(); !s.Degraded || !strings.Contains(s.DegradedReason, "state") {
		t.Errorf("degraded %v: %q", s.Degraded, s.DegradedReason)
	}
	if err := v.Cutover(ctx, CutoverOptions{}); err == nil {
		t.Error("cut over without a record")
	}
}

// A cutover whose flush fails is undone: commands that were held go on.
func TestCutoverThatFailsIsUndone(t *testing.T) {
	r := newRig(t, 1024)
	var flushes atomic.Int32
	flushes.Store(-1)
	broken := errors.New("flush broken")
	r.destination.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush && flushes.Load() >= 0 && flushes.Add(1) == 2 {
			return broken // the second is the one under the hold
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	ctx := context.Background()
	must(t, v.Start(ctx))
	waitFor(t, v, Synced)
	flushes.Store(0)
	if err := v.Cutover(ctx, CutoverOptions{}); !errors.Is(err, broken) || !strings.Contains(err.Error(), "still synced") {
		t.Fatalf("cutover: %v", err)
	}
	fill(t, v, lun.Extent{Start: 7, Blocks: 3}, 5)
	expect(t, v, lun.Extent{Start: 7, Blocks: 3}, 5)
	must(t, v.Cutover(ctx, CutoverOptions{}))
}

// A destination that is thick, whose blocks are of 4096 bytes and hold old data, is
// brought to the source's content all the same.
func TestThickDestinationOfLargeBlocksIsOverwrittenWhole(t *testing.T) {
	const bs, blocks = 4096, 512
	pattern := func(version byte) []byte {
		p := make([]byte, bs)
		for i := range p {
			p[i] = version + byte(i)
		}
		return p
	}
	ctx := context.Background()
	source := luntest.NewThinMemory(bs, blocks)
	destination := luntest.NewMemory(lun.Info{BlockSize: bs, Blocks: blocks, VolatileCache: true})
	for at := lun.LBA(0); at < blocks; at++ {
		must(t, destination.WriteAt(ctx, pattern(9), at))
		if at%3 == 0 {
			must(t, source.WriteAt(ctx, pattern(1), at))
		}
	}
	v := openWith(t, source, destination)
	v.settings.Overwrite = true
	must(t, v.Start(ctx))
	must(t, v.WriteAt(ctx, pattern(5), 100))
	waitFor(t, v, Synced)
	p := make([]byte, bs)
	for at := lun.LBA(0); at < blocks; at++ {
		want := make([]byte, bs)
		switch {
		case at == 100:
			want = pattern(5)
		case at%3 == 0:
			want = pattern(1)
		}
		must(t, destination.ReadAt(ctx, p, at))
		if !bytes.Equal(p, want) {
			t.Fatalf("LBA %d of the destination is wrong", at)
		}
	}
}

// Data anywhere that is looked at makes a destination not blank, also between its edges.
func TestDataAtASampledPlaceIsFound(t *testing.T) {
	const blocks = 1 << 17 // 64 MiB
	destination := luntest.NewThinMemory(512, blocks)
	at := lun.LBA(uint64(blocks) * 512 / (blankSamples + 1) * 40 / 512)
	fill(t, destination, lun.Extent{Start: at + 5, Blocks: 1}, 1)
	refused, err := Check(context.Background(), luntest.NewThinMemory(512, blocks), destination, false)
	must(t, err)
	if len(refused) != 1 || !strings.Contains(refused[0].Error(), "not blank") {
		t.Fatalf("refused: %v", refused)
	}
}

// The gate lets nobody in while it is held, and everybody when the hold is given up.
func TestGateHoldsAndReleases(t *testing.T) {
	var g gate
	ctx := context.Background()
	must(t, g.enter(ctx))
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := g.hold(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("hold with a command inside: %v", err)
	}
	must(t, g.enter(ctx)) // the hold was given up
	g.leave()
	g.leave()
	must(t, g.hold(ctx))
	if g.tryEnter() {
		t.Fatal("entered a held gate")
	}
	if err := g.enter(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("enter while held: %v", err)
	}
	entered := make(chan error, 1)
	go func() { entered <- g.enter(ctx) }()
	g.release()
	must(t, <-entered)
	g.leave()
	g.close()
	if err := g.enter(ctx); !errors.Is(err, lun.ErrClosed) {
		t.Fatalf("enter a closed gate: %v", err)
	}
}

// lost is a device that knows by itself that it cannot be reached.
type lost struct {
	*luntest.Memory
	gone atomic.Bool
}

func (l *lost) Unreachable() error {
	if l.gone.Load() {
		return errors.New("session lost")
	}
	return nil
}

func TestAUnitThatIsGoneIsShownBeforeACommandFails(t *testing.T) {
	destination := &lost{Memory: luntest.NewThinMemory(512, 1024)}
	v := openWith(t, luntest.NewThinMemory(512, 1024), destination)
	must(t, v.Start(context.Background()))
	waitFor(t, v, Synced)
	if s := v.Status(); s.Degraded || s.Destination.State != "online" {
		t.Fatalf("before: %+v", s)
	}
	destination.gone.Store(true)
	if s := v.Status(); !s.Degraded || s.Destination.State != "unavailable" || s.Destination.Reason != "session lost" {
		t.Fatalf("gone: %+v", s)
	}
	destination.gone.Store(false)
	if s := v.Status(); s.Degraded || s.Destination.State != "online" {
		t.Fatalf("back: %+v", s)
	}
}
