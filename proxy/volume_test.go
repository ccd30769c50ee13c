package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"pgregory.net/rapid"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

const (
	testBlock  = 512
	testRegion = 64 << 10 // bytes
	copyDepth  = 4
)

// rig is a volume over two memory devices and a real store.
type rig struct {
	dir                 string
	source, destination *luntest.Memory
	cfg                 Config
	bitmapMemory        uint64        // state.Options.BitmapMemory
	settleDelay         time.Duration // state.Options.SettleDelay
	// hold intercepts the source in this rig and in what killed makes of it.
	hold  func(context.Context, luntest.Op, lun.Extent) error
	store *state.Store
	vol   *Volume
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

func newRig(t testing.TB, blocks uint64) *rig {
	return &rig{
		dir:         t.TempDir(),
		source:      luntest.NewThinMemory(testBlock, blocks),
		destination: luntest.NewThinMemory(testBlock, blocks),
	}
}

type fataler interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func (r *rig) open(t fataler) *Volume {
	t.Helper()
	store, err := state.Open(r.dir, state.Options{Log: quiet(), BitmapMemory: r.bitmapMemory, SettleDelay: r.settleDelay})
	if err != nil {
		t.Fatal(err)
	}
	tgt, err := target.New(target.Config{Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	r.store = store
	cfg := r.cfg
	cfg.Name, cfg.IQN = "vol", "iqn.2026-11.net.example:vol"
	cfg.Source, cfg.Destination = r.source, r.destination
	if cfg.RegionSize == 0 {
		cfg.RegionSize = testRegion
	}
	cfg.CopyDepth = copyDepth
	cfg.Store, cfg.Target, cfg.Log = store, tgt, quiet()
	if r.vol, err = Open(context.Background(), cfg); err != nil {
		store.Close()
		t.Fatal(err)
	}
	return r.vol
}

func (r *rig) close(t fataler) {
	t.Helper()
	if r.vol == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := r.vol.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.store.Close(); err != nil {
		t.Fatal(err)
	}
	r.vol = nil
}

// stamp is the content of one block: which block, which version.
func stamp(at lun.LBA, version uint64) []byte {
	p := make([]byte, testBlock)
	if version == 0 {
		return p
	}
	for i := 0; i < testBlock; i += 16 {
		binary.BigEndian.PutUint64(p[i:], uint64(at))
		binary.BigEndian.PutUint64(p[i+8:], version)
	}
	return p
}

func stamps(e lun.Extent, version uint64) []byte {
	var p []byte
	for at := e.Start; at < e.End(); at++ {
		p = append(p, stamp(at, version)...)
	}
	return p
}

func fill(t fataler, dev lun.Device, e lun.Extent, version uint64) {
	t.Helper()
	if err := dev.WriteAt(context.Background(), stamps(e, version), e.Start); err != nil {
		t.Fatal(err)
	}
}

func expect(t fataler, dev lun.Device, e lun.Extent, version uint64) {
	t.Helper()
	p := make([]byte, e.Blocks*testBlock)
	if err := dev.ReadAt(context.Background(), p, e.Start); err != nil {
		t.Fatal(err)
	}
	for i := range e.Blocks {
		at := e.Start + lun.LBA(i)
		if got := p[i*testBlock : (i+1)*testBlock]; !bytes.Equal(got, stamp(at, version)) {
			t.Fatalf("LBA %d: got block %d version %d, want version %d", at,
				binary.BigEndian.Uint64(got), binary.BigEndian.Uint64(got[8:]), version)
		}
	}
}

func must(t fataler, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func waitFor(t fataler, v *Volume, p Phase) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := v.Wait(ctx, p); err != nil {
		t.Fatalf("wait for %s: %v (status %+v)", p, err, v.Status())
	}
}

func TestVolumeKeepsTheDeviceContractInEveryPhase(t *testing.T) {
	for _, phase := range []Phase{Ready, Migrating, Synced} {
		t.Run(string(phase), func(t *testing.T) {
			luntest.Run(t, func(t *testing.T) lun.Device {
				r := newRig(t, 8192)
				// Half of the source is allocated, so that reads meet both sides.
				fill(t, r.source, lun.Extent{Start: 1000, Blocks: 4096}, 1)
				v := r.open(t)
				t.Cleanup(func() { r.close(t) })
				switch phase {
				case Migrating:
					must(t, v.Throttle(context.Background(), 1))
					must(t, v.Start(context.Background()))
				case Synced:
					must(t, v.Start(context.Background()))
					waitFor(t, v, Synced)
				}
				return v
			})
		})
	}
}

func TestMigrationMovesEveryBlockAndStaysThin(t *testing.T) {
	r := newRig(t, 8192)
	data := lun.Extent{Start: 104, Blocks: 1496} // whole grains of 4 KiB
	island := lun.Extent{Start: 6912, Blocks: 8}
	fill(t, r.source, data, 1)
	fill(t, r.source, island, 2)
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	waitFor(t, v, Synced)
	reads := r.source.Count(luntest.Read)
	expect(t, v, data, 1)
	expect(t, r.destination, data, 1)
	expect(t, r.destination, island, 2)
	expect(t, r.destination, lun.Extent{Start: 1600, Blocks: 5312}, 0)
	if n := r.source.Count(luntest.Read); n != reads {
		t.Errorf("%d reads went to the source after the volume was synced", n-reads)
	}
	if got := r.destination.Allocated(); got != r.source.Allocated() {
		t.Errorf("destination has %d blocks allocated, source %d", got, r.source.Allocated())
	}
	s := v.Status()
	if s.Remaining != 0 || s.Copied != (data.Blocks+island.Blocks)*testBlock || s.Copied+s.Skipped != s.Size {
		t.Errorf("status: %+v", s)
	}
}

func TestStaleDestinationContentIsZeroedWhereTheSourceHasNone(t *testing.T) {
	r := newRig(t, 4096)
	r.cfg.Overwrite = true
	fill(t, r.destination, lun.Extent{Start: 500, Blocks: 900}, 9)
	fill(t, r.source, lun.Extent{Start: 600, Blocks: 10}, 1)
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	waitFor(t, v, Synced)
	expect(t, r.destination, lun.Extent{Start: 0, Blocks: 600}, 0)
	expect(t, r.destination, lun.Extent{Start: 600, Blocks: 10}, 1)
	expect(t, r.destination, lun.Extent{Start: 610, Blocks: 4096 - 610}, 0)
}

// The order of the write rule: destination, its flush, the flags, the answer. It fails
// when Volume.write leaves out the flush, or sets the flags first.
func TestFirstWriteSurvivesPowerLossOfTheDestination(t *testing.T) {
	r := newRig(t, 1024)
	all := lun.Extent{Blocks: 1024}
	fill(t, r.source, all, 1)
	must(t, r.source.Flush(context.Background()))
	broken := errors.New("flush broken")
	var failing atomic.Bool
	r.destination.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush && failing.Load() {
			return broken
		}
		return nil
	})
	// The copier stands still at its first read, a region at the most.
	r.source.Intercept(func(ctx context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Blocks > 1 && e.Blocks <= testRegion/testBlock {
			<-ctx.Done()
		}
		return ctx.Err()
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	written := lun.Extent{Start: 900, Blocks: 7}
	fill(t, v, written, 2)
	r.destination.PowerLoss()
	expect(t, v, written, 2)
	expect(t, v, lun.Extent{Start: 0, Blocks: 900}, 1)

	// And with the flush failing: no acknowledgement, the old content stays.
	failing.Store(true)
	if err := v.WriteAt(context.Background(), stamp(950, 3), 950); !errors.Is(err, broken) {
		t.Fatalf("write with a failing flush: %v", err)
	}
	expect(t, v, lun.Extent{Start: 950, Blocks: 1}, 1)
	failing.Store(false)
}

// The destination restarts after it took a block and before it is flushed: the flush
// succeeds, and the block is gone. It fails when Resets is not looked at.
func TestCacheLostBetweenWriteAndFlushIsNoticed(t *testing.T) {
	r := newRig(t, 1024)
	all := lun.Extent{Blocks: 1024}
	fill(t, r.source, all, 1)
	var losses, after atomic.Int32
	after.Store(-1)
	r.destination.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush && after.Add(-1) == 0 {
			losses.Add(1)
			r.destination.PowerLoss()
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Throttle(context.Background(), 1))
	must(t, v.Start(context.Background()))
	after.Store(1)
	fill(t, v, lun.Extent{Start: 1000, Blocks: 4}, 2)
	if losses.Load() != 1 {
		t.Fatalf("%d losses before the write was acknowledged", losses.Load())
	}
	expect(t, v, lun.Extent{Start: 1000, Blocks: 4}, 2)
	after.Store(1) // the copier's commit
	must(t, v.Throttle(context.Background(), 0))
	waitFor(t, v, Synced)
	if losses.Load() != 2 {
		t.Fatalf("%d losses in all", losses.Load())
	}
	r.destination.PowerLoss()
	expect(t, v, lun.Extent{Blocks: 1000}, 1)
	expect(t, v, lun.Extent{Start: 1000, Blocks: 4}, 2)
}

// It fails when the start does not wait for the gate to drain.
func TestAWriteInFlightAtStartIsNotMissedByTheCopy(t *testing.T) {
	r := newRig(t, 1024)
	entered, proceed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.source.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Write {
			once.Do(func() { close(entered); <-proceed })
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	wrote, started := make(chan error, 1), make(chan error, 1)
	go func() { wrote <- v.WriteAt(context.Background(), stamp(5, 1), 5) }()
	<-entered
	go func() { started <- v.Start(context.Background()) }()
	select {
	case err := <-started:
		t.Fatalf("start returned %v with a write still on its way to the source", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(proceed)
	must(t, <-wrote)
	must(t, <-started)
	waitFor(t, v, Synced)
	expect(t, r.destination, lun.Extent{Start: 5, Blocks: 1}, 1)
}

// It fails when Volume.write does not suspect the blocks of a failed write, and when
// Commit leaves out the flush.
//
// A write that fails after it reached the destination must not show up later
// through the flags of a copy made before it.
//
// Caught: failed writes that are not kept from the commit of a copy.
func TestFailedWriteDoesNotSurfaceThroughAnEarlierCopy(t *testing.T) {
	r := newRig(t, 128) // one region
	all := lun.Extent{Blocks: 128}
	fill(t, r.source, all, 1)
	copied, proceed := make(chan struct{}), make(chan struct{})
	var flushes, fail atomic.Int32
	r.destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		switch {
		case op == luntest.Flush && flushes.Add(1) == 1: // of the copier's commit
			close(copied)
			<-proceed
		case op == luntest.Write && e.Blocks == 1 && fail.Load() == 1:
			return &luntest.ErrAfter{Err: &lun.SenseError{Key: 4, ASC: 0x44}}
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	select {
	case <-copied:
	case <-time.After(10 * time.Second):
		close(proceed)
		t.Fatal("the copy was not flushed before its flags")
	}
	fail.Store(1)
	if err := v.WriteAt(context.Background(), stamp(40, 2), 40); err == nil {
		t.Fatal("the write should have failed")
	}
	fail.Store(0)
	expect(t, v, all, 1)
	close(proceed)
	waitFor(t, v, Synced)
	expect(t, v, all, 1)
}

func TestWriteWaitsForNoMoreThanOneSlice(t *testing.T) {
	r := newRig(t, 8192)
	r.cfg.RegionSize = 4 << 20
	fill(t, r.source, lun.Extent{Blocks: 8192}, 1)
	stuck, proceed := make(chan lun.Extent, 1), make(chan struct{})
	var once sync.Once
	r.destination.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Write && e.Blocks > 8 {
			once.Do(func() { stuck <- e; <-proceed })
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	must(t, v.Start(context.Background()))
	slice := <-stuck
	if n := slice.Blocks * testBlock; n > 256<<10 {
		t.Errorf("the copier holds %d bytes under one lock", n)
	}
	// In the same region, beside the slice: no wait.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	beside := slice.End() + 8
	if slice.End() >= 8192-16 {
		beside = slice.Start - 8
	}
	must(t, v.WriteAt(ctx, stamp(beside, 2), beside))
	// In the slice: waits for it, and then wins.
	inside := make(chan error, 1)
	go func() { inside <- v.WriteAt(ctx, stamp(slice.Start, 2), slice.Start) }()
	select {
	case err := <-inside:
		t.Fatalf("a write passed the copier's lock: %v", err)
	case <-time.After(30 * time.Millisecond):
	}
	close(proceed)
	must(t, <-inside)
	waitFor(t, v, Synced)
	expect(t, r.destination, lun.Extent{Start: beside, Blocks: 1}, 2)
	expect(t, r.destination, lun.Extent{Start: slice.Start, Blocks: 1}, 2)
}

func TestRestartGoesOnFromTheFlags(t *testing.T) {
	r := newRig(t, 65536) // 32 MiB
	fill(t, r.source, lun.Extent{Blocks: 65536}, 1)
	v := r.open(t)
	must(t, v.Throttle(context.Background(), 8<<20))
	must(t, v.Start(context.Background()))
	for v.Status().Copied < 4<<20 {
		time.Sleep(5 * time.Millisecond)
	}
	fill(t, v, lun.Extent{Start: 60000, Blocks: 10}, 2)
	r.close(t)
	valid := v.Status().Copied
	before := r.source.Count(luntest.Read)

	v = r.open(t)
	defer r.close(t)
	if s := v.Status(); s.Phase != Migrating || s.Copied < valid || s.InitiatorWritten != 10*testBlock {
		t.Fatalf("after the restart: %+v", s)
	}
	must(t, v.Throttle(context.Background(), 0))
	waitFor(t, v, Synced)
	expect(t, r.destination, lun.Extent{Start: 0, Blocks: 60000}, 1)
	expect(t, r.destination, lun.Extent{Start: 60000, Blocks: 10}, 2)
	expect(t, r.destination, lun.Extent{Start: 60010, Blocks: 5526}, 1)
	again := uint64(r.source.Count(luntest.Read)-before) * testRegion
	if again > 32<<20-valid+testRegion {
		t.Errorf("%d bytes were read again though %d were done", again, valid)
	}
}

func TestPauseStopsTheCopierNotTheInitiators(t *testing.T) {
	r := newRig(t, 65536)
	fill(t, r.source, lun.Extent{Blocks: 65536}, 1)
	v := r.open(t)
	defer r.close(t)
	ctx := context.Background()
	must(t, v.Throttle(ctx, 4<<20))
	must(t, v.Start(ctx))
	must(t, v.Pause(ctx))
	must(t, v.Pause(ctx))
	at := r.source.Count(luntest.Read)
	fill(t, v, lun.Extent{Start: 3, Blocks: 4}, 2)
	expect(t, v, lun.Extent{Start: 3, Blocks: 4}, 2)
	if s := v.Status(); !s.Paused || s.ETA != nil {
		t.Errorf("status: %+v", s)
	}
	if n := r.source.Count(luntest.Read); n != at {
		t.Errorf("the copier read %d times while paused", n-at)
	}
	must(t, v.Throttle(ctx, 0))
	must(t, v.Resume(ctx))
	must(t, v.Resume(ctx))
	waitFor(t, v, Synced)
}

func TestFailingUnitsDelayTheCopyOnly(t *testing.T) {
	r := newRig(t, 4096)
	fill(t, r.source, lun.Extent{Blocks: 4096}, 1)
	var commands atomic.Int32
	var failing atomic.Bool
	flaky := func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if failing.Load() && commands.Add(1)%5 == 3 && commands.Load() < 60 {
			return fmt.Errorf("%s: %w", op, lun.ErrUnavailable)
		}
		return nil
	}
	r.source.Intercept(flaky)
	r.destination.Intercept(flaky)
	v := r.open(t)
	defer r.close(t)
	must(t, v.Throttle(context.Background(), 1))
	must(t, v.Start(context.Background()))
	failing.Store(true)
	must(t, v.Throttle(context.Background(), 0))
	waitFor(t, v, Synced)
	failing.Store(false)
	s := v.Status()
	if s.Source.Errors+s.Destination.Errors == 0 {
		t.Error("no command failed: the test shows nothing")
	}
	if s.Degraded {
		t.Errorf("still degraded after it went on: %s", s.DegradedReason)
	}
	expect(t, r.destination, lun.Extent{Blocks: 4096}, 1)
}

func TestCutoverEndsEveryCommandAndIsFinal(t *testing.T) {
	r := newRig(t, 1024)
	v := r.open(t)
	ctx := context.Background()
	var phase *PhaseError
	if err := v.Cutover(ctx, CutoverOptions{}); !errors.As(err, &phase) || !errors.Is(err, ErrPhase) {
		t.Fatalf("cutover in ready: %v", err)
	}
	must(t, v.Start(ctx))
	must(t, v.Start(ctx))
	waitFor(t, v, Synced)
	fill(t, v, lun.Extent{Start: 1, Blocks: 1}, 1)
	must(t, v.Cutover(ctx, CutoverOptions{}))
	must(t, v.Cutover(ctx, CutoverOptions{}))
	writes := r.destination.Count(luntest.Write)
	if err := v.WriteAt(ctx, stamp(1, 2), 1); !errors.Is(err, lun.ErrUnavailable) {
		t.Errorf("a write after the cutover: %v", err)
	}
	if r.destination.Count(luntest.Write) != writes {
		t.Error("a write reached the destination after the cutover")
	}
	if err := v.Start(ctx); !errors.Is(err, ErrPhase) {
		t.Errorf("start after cutover: %v", err)
	}
	must(t, r.store.Close())
	r.source, r.destination = nil, nil // the old LUN may be gone

	store, err := state.Open(r.dir, state.Options{Log: quiet()})
	must(t, err)
	defer store.Close()
	if needs, err := NeedsUnits(store, "vol"); err != nil || needs {
		t.Fatalf("NeedsUnits: %v %v", needs, err)
	}
	tgt, err := target.New(target.Config{Log: quiet()})
	must(t, err)
	v, err = Open(ctx, Config{Name: "vol", Store: store, Target: tgt, Log: quiet()})
	must(t, err)
	if s := v.Status(); s.Phase != Cutover || s.Hold == nil || s.Size != 1024*testBlock {
		t.Errorf("status: %+v", s)
	}
	must(t, v.Remove(ctx))
	if _, found, err := store.Record("vol"); err != nil || found {
		t.Errorf("the record is still there: %v %v", found, err)
	}
}

func TestRefusals(t *testing.T) {
	ctx := context.Background()
	mem := func(bs uint32, blocks uint64) *luntest.Memory { return luntest.NewThinMemory(bs, blocks) }
	dirty := mem(512, 4096)
	fill(t, dirty, lun.Extent{Start: 4095, Blocks: 1}, 1)
	same := mem(512, 64)
	for _, c := range []struct {
		name                string
		source, destination lun.Device
		overwrite           bool
		want                string
	}{
		{"fits", mem(512, 4096), mem(512, 4096), false, ""},
		{"larger", mem(512, 4096), mem(512, 5000), false, ""},
		{"smaller", mem(512, 4096), mem(512, 4095), false, "destination is smaller"},
		{"block size", mem(512, 4096), mem(4096, 4096), false, "block sizes differ"},
		{"same", same, same, false, "same device"},
		{"not blank", mem(512, 4096), dirty, false, "not blank"},
		{"overwrite", mem(512, 4096), dirty, true, ""},
		{"tiny", mem(512, 1), mem(512, 1), false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			refused, err := Check(ctx, c.source, c.destination, c.overwrite)
			must(t, err)
			text := fmt.Sprint(errors.Join(refused...))
			if c.want == "" && len(refused) != 0 || !strings.Contains(text, c.want) && c.want != "" {
				t.Errorf("refused: %v, want %q", text, c.want)
			}
			if strings.Contains(text, "\n") {
				t.Errorf("more than one line: %q", text)
			}
		})
	}
}

func TestStateOfAnotherPairIsRefused(t *testing.T) {
	r := newRig(t, 1024)
	v := r.open(t)
	must(t, v.Start(context.Background()))
	waitFor(t, v, Synced)
	r.close(t)
	store, err := state.Open(r.dir, state.Options{Log: quiet()})
	must(t, err)
	defer store.Close()
	tgt, err := target.New(target.Config{Log: quiet()})
	must(t, err)
	_, err = Open(context.Background(), Config{
		Name: "vol", IQN: "iqn.2026-11.net.example:vol", Source: r.source, Destination: luntest.NewThinMemory(512, 1024),
		RegionSize: testRegion, CopyDepth: 1, Store: store, Target: tgt, Log: quiet(),
	})
	var refusal *Refusal
	if !errors.As(err, &refusal) || !strings.Contains(err.Error(), "belongs to source") {
		t.Fatalf("got %v", err)
	}
}

// It fails when the copier does not ask again, under the lock, what is still not valid.
//
// Writers hammer the whole volume while it is copied; what each acknowledged last is
// what both the volume and the destination hold at the end.
func TestCopierNeverOverwritesNewerData(t *testing.T) {
	const blocks, writers = 16384, 4
	r := newRig(t, blocks)
	fill(t, r.source, lun.Extent{Blocks: blocks}, 1)
	v := r.open(t)
	defer r.close(t)
	must(t, v.Throttle(context.Background(), 8<<20))
	must(t, v.Start(context.Background()))
	last := make([]uint64, blocks)
	for i := range last {
		last[i] = 1
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			for n := uint64(2); ; n++ {
				select {
				case <-done:
					return
				default:
				}
				// Each writer has every fourth group of eight blocks to itself.
				e := lun.Extent{Start: lun.LBA(rng.IntN(blocks/(8*writers))*8*writers + 8*w + rng.IntN(4)), Blocks: uint64(1 + rng.IntN(4))}
				if err := v.WriteAt(context.Background(), stamps(e, n), e.Start); err != nil {
					t.Error(err)
					return
				}
				for at := e.Start; at < e.End(); at++ {
					last[at] = n
				}
				p := make([]byte, e.Blocks*testBlock)
				if err := v.ReadAt(context.Background(), p, e.Start); err != nil || !bytes.Equal(p, stamps(e, n)) {
					t.Errorf("read back of %v: wrong data or %v", e, err)
					return
				}
			}
		})
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	err := v.Wait(ctx, Synced)
	close(done)
	wg.Wait()
	must(t, err)
	for at, version := range last {
		expect(t, r.destination, lun.Extent{Start: lun.LBA(at), Blocks: 1}, version)
	}
}

// A volume under random commands, steps, restarts and power losses of the
// destination behaves as one array whose writes are durable once acknowledged.
func TestVolumeMatchesOneArray(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		const blocks = 600 // five regions, the last one short
		r := &rig{dir: t.TempDir(), source: luntest.NewThinMemory(testBlock, blocks), destination: luntest.NewThinMemory(testBlock, blocks)}
		model := make([]uint64, blocks)
		set := func(e lun.Extent, version uint64) {
			for at := e.Start; at < e.End(); at++ {
				model[at] = version
			}
		}
		extent := func() lun.Extent {
			start := rapid.IntRange(0, blocks-1).Draw(rt, "start")
			return lun.Extent{Start: lun.LBA(start), Blocks: uint64(rapid.IntRange(1, min(200, blocks-start)).Draw(rt, "blocks"))}
		}
		for range rapid.IntRange(0, 4).Draw(rt, "old extents") {
			e := extent()
			fill(rt, r.source, e, 1)
			set(e, 1)
		}
		must(rt, r.source.Flush(context.Background()))
		ctx := context.Background()
		v := r.open(rt)
		defer func() { r.close(rt) }()
		must(rt, v.Throttle(ctx, 1)) // the copier does a burst and then stands still
		version := uint64(1)
		for range rapid.IntRange(1, 25).Draw(rt, "steps") {
			e := extent()
			version++
			switch rapid.SampledFrom([]string{"write", "write", "read", "unmap", "zero", "update", "start", "reopen", "loss", "copy"}).Draw(rt, "step") {
			case "write":
				fill(rt, v, e, version)
				set(e, version)
			case "read":
				for at := e.Start; at < e.End(); at++ {
					expect(rt, v, lun.Extent{Start: at, Blocks: 1}, model[at])
				}
			case "unmap":
				must(rt, v.Unmap(ctx, e))
				set(e, 0)
			case "zero":
				must(rt, v.WriteZeroes(ctx, e))
				set(e, 0)
			case "update":
				must(rt, v.Update(ctx, e, func(p []byte) error {
					for i := range int(e.Blocks) {
						at := e.Start + lun.LBA(i)
						if !bytes.Equal(p[i*testBlock:(i+1)*testBlock], stamp(at, model[at])) {
							return fmt.Errorf("update of LBA %d read the wrong version", at)
						}
						copy(p[i*testBlock:], stamp(at, version))
					}
					return nil
				}))
				set(e, version)
			case "start":
				must(rt, v.Start(ctx))
			case "reopen":
				r.close(rt)
				v = r.open(rt)
			case "loss":
				// Durable is what was flushed; first writes are, by the rule, and
				// this one is for the rest.
				must(rt, v.Flush(ctx))
				r.destination.PowerLoss()
			case "copy":
				must(rt, v.Throttle(ctx, 0))
				must(rt, v.Start(ctx))
				waitFor(rt, v, Synced)
			}
		}
		p := make([]byte, blocks*testBlock)
		must(rt, v.ReadAt(ctx, p, 0))
		for at, version := range model {
			if !bytes.Equal(p[at*testBlock:(at+1)*testBlock], stamp(lun.LBA(at), version)) {
				rt.Fatalf("LBA %d at the end: not version %d", at, version)
			}
		}
	})
}
