package proxy

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
)

// damaged makes the source unable to read some blocks, as a disk with bad sectors, and
// counts the attempts.
func damaged(r *rig, bad ...lun.Extent) *atomic.Int64 {
	attempts := new(atomic.Int64)
	r.source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		for _, b := range bad {
			if op == luntest.Read && e.Overlaps(b) {
				attempts.Add(1)
				return &lun.SenseError{Key: 0x3, ASC: 0x11, LBA: b.Start, Valid: true}
			}
		}
		return nil
	})
	return attempts
}

func TestUnreadableBlocksAreShownAndStopTheCutoverUntilTheyAreGivenUp(t *testing.T) {
	const blocks = 4096
	bad := []lun.Extent{{Start: 700, Blocks: 3}, {Start: 1023, Blocks: 2}, {Start: 4095, Blocks: 1}} // 1023 and 1024 lie in two regions
	r := newRig(t, blocks)
	if err := r.source.WriteAt(t.Context(), stamps(lun.Extent{Blocks: blocks}, 1), 0); err != nil {
		t.Fatal(err)
	}
	damaged(r, bad...)
	r.cfg.VerifySample = 1 << 20
	v := r.open(t)
	defer r.close(t)
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	const lost = 6 * testBlock
	eventually(t, v, "all but the bad blocks is copied", func(s Status) bool {
		return s.Remaining == lost && s.Unreadable == lost
	})
	s := v.Status()
	want := []BlockRun{{700, 3}, {1023, 1}, {1024, 1}, {4095, 1}}
	if len(s.UnreadableRuns) != len(want) {
		t.Fatalf("unreadable %v", s.UnreadableRuns)
	}
	for i := range want {
		if s.UnreadableRuns[i] != want[i] {
			t.Errorf("unreadable %v, not %v", s.UnreadableRuns, want)
		}
	}
	if !s.Degraded || !strings.Contains(s.DegradedReason, "cannot read") {
		t.Errorf("degraded %v: %s", s.Degraded, s.DegradedReason)
	}
	// Initiators meet the source's own sense.
	var sense *lun.SenseError
	if err := v.ReadAt(t.Context(), make([]byte, testBlock), 701); !errors.As(err, &sense) || sense.Key != 0x3 {
		t.Errorf("a read of a bad block: %v", err)
	}
	var phase *PhaseError
	if err := v.Cutover(t.Context(), CutoverOptions{}); !errors.As(err, &phase) || !strings.Contains(phase.Hint, "--accept-unreadable") {
		t.Errorf("cutover: %v", err)
	}
	// What an initiator writes is not lost any more.
	if err := v.WriteAt(t.Context(), stamp(701, 2), 701); err != nil {
		t.Fatal(err)
	}
	if s := v.Status(); s.Unreadable != lost-testBlock || len(s.UnreadableRuns) != 5 {
		t.Errorf("after a write: %d, %v", s.Unreadable, s.UnreadableRuns)
	}
	r.close(t) // it is known over a restart
	v = r.open(t)
	eventually(t, v, "the same after a restart", func(s Status) bool {
		return s.Remaining == lost-testBlock && s.Unreadable == lost-testBlock
	})
	if err := v.Cutover(t.Context(), CutoverOptions{AcceptUnreadable: true}); err != nil {
		t.Fatal(err)
	}
	if s := v.Status(); s.Phase != Cutover || s.AcceptedUnreadable != lost-testBlock {
		t.Errorf("after the cutover: %+v", s)
	}
	got := make([]byte, blocks*testBlock)
	if err := r.destination.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	wanted := stamps(lun.Extent{Blocks: blocks}, 1)
	for _, e := range bad {
		clear(wanted[uint64(e.Start)*testBlock : uint64(e.End())*testBlock])
	}
	copy(wanted[701*testBlock:], stamp(701, 2))
	if !bytes.Equal(got, wanted) {
		t.Error("the destination is not what it should be")
	}
}

func TestAnInitiatorsWriteOverTheLastBadBlockEndsTheCopy(t *testing.T) {
	const blocks = 1024
	r := newRig(t, blocks)
	if err := r.source.WriteAt(t.Context(), stamps(lun.Extent{Blocks: blocks}, 1), 0); err != nil {
		t.Fatal(err)
	}
	damaged(r, lun.Extent{Start: 300, Blocks: 1})
	v := r.open(t)
	defer r.close(t)
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, v, "one block is left", func(s Status) bool { return s.Unreadable == testBlock && s.Remaining == testBlock })
	if err := v.WriteAt(t.Context(), stamp(300, 5), 300); err != nil {
		t.Fatal(err)
	}
	waitFor(t, v, Synced)
	if s := v.Status(); s.Degraded || s.Unreadable != 0 {
		t.Errorf("synced: %v %s, %d", s.Degraded, s.DegradedReason, s.Unreadable)
	}
}

// A bad block costs some twenty reads, not one for each block of its region, and is
// left in peace afterwards.
func TestABadBlockIsFoundWithFewReads(t *testing.T) {
	const blocks = 1024
	r := newRig(t, blocks)
	r.cfg.RegionSize = blocks * testBlock
	if err := r.source.WriteAt(t.Context(), stamps(lun.Extent{Blocks: blocks}, 1), 0); err != nil {
		t.Fatal(err)
	}
	attempts := damaged(r, lun.Extent{Start: 777, Blocks: 1})
	v := r.open(t)
	defer r.close(t)
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, v, "one block is left", func(s Status) bool { return s.Unreadable == testBlock && s.Remaining == testBlock })
	if n := attempts.Load(); n > 14 {
		t.Errorf("%d attempts at the bad block", n)
	}
}

func TestCutoverIsRefusedWhenASampleDiffers(t *testing.T) {
	const blocks = 1024
	r := newRig(t, blocks)
	r.cfg.VerifySample = blocks * testBlock
	v := synced(t, r, blocks)
	defer r.close(t)
	if err := r.destination.WriteAt(t.Context(), stamp(512, 9), 512); err != nil {
		t.Fatal(err)
	}
	var refused *Refusal
	if err := v.Cutover(t.Context(), CutoverOptions{}); !errors.As(err, &refused) || !strings.Contains(err.Error(), "first at LBA 512") {
		t.Fatalf("cutover: %v", err)
	}
	if v.Phase() != Synced {
		t.Fatalf("phase %s", v.Phase())
	}
	if err := v.Cutover(t.Context(), CutoverOptions{NoVerify: true}); err != nil {
		t.Fatal(err)
	}
}

// counted is flags whose Count(Valid) is over by some, as that of a note which is settled
// between the two looks of state.Flags.Count .
type counted struct {
	flags
	over atomic.Uint64
}

func (c *counted) Count(k state.Kinds) uint64 {
	n := c.flags.Count(k)
	if k == state.Valid {
		n += c.over.Swap(0) // once
	}
	return n
}

// Caught: a decision by the count of valid blocks.
func TestAcceptUnreadableLooksAtEachBlockAndBelievesNoCount(t *testing.T) {
	const blocks = 4096
	r := newRig(t, blocks)
	must(t, r.source.WriteAt(t.Context(), stamps(lun.Extent{Blocks: blocks}, 1), 0))
	bad, slow := lun.Extent{Start: 700, Blocks: 3}, lun.Extent{Start: 3000, Blocks: 1}
	r.source.Intercept(func(ctx context.Context, op luntest.Op, e lun.Extent) error {
		switch {
		case op == luntest.Read && e.Overlaps(bad):
			return &lun.SenseError{Key: 0x3, ASC: 0x11, LBA: bad.Start, Valid: true}
		case op == luntest.Read && e.Overlaps(slow): // not copied yet
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	c := &counted{flags: v.raw()}
	replaceFlags(v, c)
	must(t, v.Start(t.Context()))
	var left uint64
	eventually(t, v, "all but the slow region is copied", func(s Status) bool {
		left = s.Remaining/testBlock - 3
		return s.Unreadable == 3*testBlock && s.Remaining <= testRegion+3*testBlock
	})
	c.over.Store(left)
	err := v.Cutover(t.Context(), CutoverOptions{AcceptUnreadable: true, NoVerify: true})
	t.Logf("cutover: %v; phase %s; %d blocks never copied", err, v.Phase(), left)
	if v.Phase() != Migrating {
		t.Errorf("phase %s with %d blocks that were never copied", v.Phase(), left)
	}
}
