package proxy

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

// synced gives a volume in phase synced whose source held data everywhere.
func synced(t *testing.T, r *rig, blocks uint64) *Volume {
	t.Helper()
	if err := r.source.WriteAt(t.Context(), stamps(lun.Extent{Blocks: blocks}, 1), 0); err != nil {
		t.Fatal(err)
	}
	v := r.open(t)
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitFor(t, v, Synced)
	return v
}

// Caught: contents that are not compared.
func TestVerifyFindsWhatWasChangedBehindTheVolumesBack(t *testing.T) {
	const blocks = 4096
	r := newRig(t, blocks)
	v := synced(t, r, blocks)
	defer r.close(t)
	report, err := v.Verify(t.Context(), VerifyOptions{})
	if err != nil || report.Different != 0 || report.Compared != blocks*testBlock || report.Written != 0 {
		t.Fatalf("equal units: %+v, %v", report, err)
	}
	if err := v.WriteAt(t.Context(), stamps(lun.Extent{Start: 100, Blocks: 50}, 2), 100); err != nil {
		t.Fatal(err)
	}
	for _, at := range []lun.LBA{7, 99, 120, 3000, 3001, blocks - 1} { // 120 is an initiator's by now
		if err := r.destination.WriteAt(t.Context(), stamp(at, 77), at); err != nil {
			t.Fatal(err)
		}
	}
	report, err = v.Verify(t.Context(), VerifyOptions{})
	want := []BlockRun{{7, 1}, {99, 1}, {3000, 2}, {blocks - 1, 1}}
	if err != nil || report.Different != 5*testBlock || report.Written != 50*testBlock || len(report.Extents) != len(want) {
		t.Fatalf("%+v, %v", report, err)
	}
	for i, d := range want {
		if report.Extents[i] != d {
			t.Errorf("difference %d is %v, not %v", i, report.Extents[i], d)
		}
	}
	if s := v.Status().Verify; s == nil || s.Running || s.Last == nil || s.Last.DifferentBytes != 5*testBlock || s.Last.Sample {
		t.Errorf("status %+v", s)
	}

	// What is known to differ keeps from a cutover, over a restart, and whatever a sample finds that
	// misses it, until everything is the same, or it is taken as it is.
	refused := func(when string, v *Volume) {
		t.Helper()
		if s := v.Status(); !s.Degraded || !strings.Contains(s.DegradedReason, "comparison: ") {
			t.Errorf("%s: %v %q", when, s.Degraded, s.DegradedReason)
		}
		answers, done := v.Ask(t.Context(), CutoverStep(CutoverOptions{}))
		if err := Disagreement(answers); done || err == nil || !strings.Contains(err.Error(), " bytes differed") {
			t.Errorf("%s: asked: %v", when, err)
		}
		if err := v.Cutover(t.Context(), CutoverOptions{}); err == nil || v.Phase() != Synced {
			t.Errorf("%s: cut over: %v", when, err)
		}
	}
	refused("after a comparison", v)
	for tries := 0; ; tries++ { // until a sample misses it
		report, err := v.Verify(t.Context(), VerifyOptions{Sample: testBlock})
		must(t, err)
		if report.Different == 0 {
			break
		}
		if tries == 1000 {
			t.Fatal("every sample finds it")
		}
	}
	refused("after a sample that misses it", v)
	r.close(t)
	v = r.open(t)
	refused("after a restart", v)
	if answers, _ := v.Ask(t.Context(), CutoverStep(CutoverOptions{NoVerify: true})); Disagreement(answers) != nil {
		t.Errorf("taken as it is: %v", Disagreement(answers))
	}
	for _, at := range []lun.LBA{7, 99, 3000, 3001, blocks - 1} {
		b := make([]byte, testBlock)
		must(t, r.source.ReadAt(t.Context(), b, at))
		must(t, r.destination.WriteAt(t.Context(), b, at))
	}
	if report, err := v.Verify(t.Context(), VerifyOptions{}); err != nil || report.Different > 0 || v.Status().Degraded {
		t.Fatalf("mended: %+v, %v, %q", report, err, v.Status().DegradedReason)
	}
	must(t, r.destination.WriteAt(t.Context(), stamp(7, 77), 7))
	if report, err := v.Verify(t.Context(), VerifyOptions{}); err != nil || report.Different == 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	must(t, v.Cutover(t.Context(), CutoverOptions{NoVerify: true}))
	if s := v.Status(); s.Phase != Cutover || s.Degraded {
		t.Errorf("taken as it is: %+v", s)
	}
}

func TestComparisonsAreKeptOverARestart(t *testing.T) {
	const blocks = 4096
	r := newRig(t, blocks)
	v := synced(t, r, blocks)
	defer r.close(t)
	must(t, r.destination.WriteAt(t.Context(), stamps(lun.Extent{Start: 3000, Blocks: 5}, 77), 3000))
	_, err := v.Verify(t.Context(), VerifyOptions{})
	must(t, err)
	r.close(t)
	if s := r.open(t).Status().Verify; s == nil || s.Last == nil || s.Last.DifferentBytes != 5*testBlock || s.LastAll == nil || s.LastAll.DifferentBytes != 5*testBlock || s.LastSample != nil {
		t.Errorf("after a restart: %+v", s)
	}
}

// Without the second look at the flags this finds differences within a second: a write
// may come between the first and the reads.
//
// Caught: blocks that initiators wrote are not left out.
func TestVerifyUnderLoadHasNoFalseAlarms(t *testing.T) {
	const blocks = 4096
	r := newRig(t, blocks)
	v := synced(t, r, blocks)
	defer r.close(t)
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for n := uint64(2); ctx.Err() == nil; n++ {
				e := lun.Extent{Start: lun.LBA(rng.Uint64N(blocks - 16)), Blocks: 1 + rng.Uint64N(16)}
				var err error
				if n%8 == 0 {
					err = v.Unmap(ctx, e)
				} else {
					err = v.WriteAt(ctx, stamps(e, n), e.Start)
				}
				if err != nil && ctx.Err() == nil {
					t.Errorf("write: %v", err)
				}
				if n%64 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	var excluded uint64
	for range 20 {
		report, err := v.Verify(t.Context(), VerifyOptions{})
		if err != nil || report.Different != 0 {
			t.Errorf("%+v, %v", report, err)
			break
		}
		excluded = report.Written
	}
	stop()
	writers.Wait()
	if excluded == 0 {
		t.Error("no write came in between")
	}
}

func TestVerifySampleComparesNoMoreThanAsked(t *testing.T) {
	const blocks = 16384 // 8 MiB
	r := newRig(t, blocks)
	v := synced(t, r, blocks)
	defer r.close(t)
	report, err := v.Verify(t.Context(), VerifyOptions{Sample: 1 << 20})
	if err != nil || report.Compared != 1<<20 || !report.Sample {
		t.Fatalf("%+v, %v", report, err)
	}
}

func TestVerifyReadsNoUnallocatedBlocks(t *testing.T) {
	const blocks = 16384
	r := newRig(t, blocks)
	if err := r.source.WriteAt(t.Context(), stamps(lun.Extent{Start: 5000, Blocks: 128}, 1), 5000); err != nil {
		t.Fatal(err)
	}
	v := r.open(t)
	defer r.close(t)
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitFor(t, v, Synced)
	report, err := v.Verify(t.Context(), VerifyOptions{})
	if err != nil || report.Different != 0 || report.Compared+report.Unallocated != blocks*testBlock || report.Compared > 1<<20 {
		t.Fatalf("%+v, %v", report, err)
	}
	// What has storage on one side only is compared.
	if err := r.destination.WriteAt(t.Context(), stamp(9, 3), 9); err != nil {
		t.Fatal(err)
	}
	if report, err = v.Verify(t.Context(), VerifyOptions{}); err != nil || report.Different != testBlock {
		t.Fatalf("%+v, %v", report, err)
	}
}

func TestVerifyIsForPhaseSyncedAlone(t *testing.T) {
	r := newRig(t, 1024)
	v := r.open(t)
	defer r.close(t)
	if _, err := v.Verify(t.Context(), VerifyOptions{}); !errors.Is(err, ErrPhase) {
		t.Fatalf("in ready: %v", err)
	}
}

func TestVerifyEndsWithTheCutover(t *testing.T) {
	const blocks = 16384
	r := newRig(t, blocks)
	v := synced(t, r, blocks)
	defer r.close(t)
	ended := make(chan error, 1)
	go func() {
		_, err := v.Verify(t.Context(), VerifyOptions{Rate: 64 << 10}) // two minutes
		ended <- err
	}()
	deadline := time.Now().Add(30 * time.Second)
	for s := v.Status().Verify; s == nil || !s.Running || s.Done == 0; s = v.Status().Verify {
		if time.Now().After(deadline) {
			t.Fatal("it does not run")
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := v.Verify(t.Context(), VerifyOptions{}); err == nil {
		t.Error("two at a time")
	}
	if err := v.Cutover(t.Context(), CutoverOptions{NoVerify: true}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a comparison that was cut short came to its end")
		}
	case <-time.After(time.Minute):
		t.Error("it goes on after the cutover")
	}
}

// Caught: a difference that is forgotten as the comparison ended with an error.
func TestAComparisonThatFailsKeepsWhatItFound(t *testing.T) {
	const blocks = 65536
	r := newRig(t, blocks)
	r.cfg.VerifySample = 0
	v := synced(t, r, blocks)
	defer r.close(t)
	must(t, r.destination.WriteAt(t.Context(), stamp(7, 77), 7))
	ctx, cancel := context.WithCancel(t.Context())
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Start > blocks/2 {
			cancel() // somebody ends it
		}
		return nil
	})
	if _, err := v.Verify(ctx, VerifyOptions{}); err == nil {
		t.Fatal("it was not ended")
	}
	r.source.Intercept(nil)
	if s := v.Status(); !s.Degraded || !strings.Contains(s.DegradedReason, "512 bytes differed") {
		t.Errorf("degraded %v: %q", s.Degraded, s.DegradedReason)
	}
	if err := v.Cutover(t.Context(), CutoverOptions{}); err == nil {
		t.Error("cut over")
	}
	// All of it is compared where the sample is as large.
	b := make([]byte, testBlock)
	must(t, r.source.ReadAt(t.Context(), b, 7))
	must(t, r.destination.WriteAt(t.Context(), b, 7))
	if report, err := v.Verify(t.Context(), VerifyOptions{Sample: 1 << 40}); err != nil || report.Sample || v.Status().Degraded {
		t.Errorf("%+v, %v, %q", report, err, v.Status().DegradedReason)
	}
}
