package proxy

import (
	"context"
	"sync"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

// theSeat is a seat whose turns a test gives and takes.
type theSeat struct {
	mu     sync.Mutex
	come   chan struct{} // received from by Take
	leave  context.CancelFunc
	waits  bool
	first  bool
	idle   bool
	taken  int
	copies bool
}

func (s *theSeat) Take(ctx context.Context, first bool) (context.Context, error) {
	s.set(func() { s.waits, s.first = true, first })
	defer s.set(func() { s.waits = false })
	select {
	case <-s.come:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	turn, leave := context.WithCancel(ctx)
	s.set(func() { s.leave, s.copies, s.idle, s.taken = leave, true, false, s.taken+1 })
	return turn, nil
}
func (s *theSeat) Idle(idle bool) { s.set(func() { s.idle = idle }) }
func (s *theSeat) Give()          { s.set(func() { s.copies = false; s.leave() }) }
func (s *theSeat) Position() int {
	n := 0
	s.set(func() {
		if s.waits {
			n = 7
		}
	})
	return n
}

func (s *theSeat) set(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	do()
}

// Caught: a copy that goes on when its turn is over, one that ends then for good, and one that
// keeps its turn when it is paused.
func TestAVolumeCopiesInItsTurnsAndServesBetweenThem(t *testing.T) {
	const blocks = 65536
	r := newRig(t, blocks)
	fill(t, r.source, lun.Extent{Blocks: blocks}, 1)
	seat := &theSeat{come: make(chan struct{})}
	r.cfg.Seat = seat
	v := r.open(t)
	defer r.close(t)
	ctx := t.Context()
	must(t, v.Throttle(ctx, 4<<20))
	must(t, v.Start(ctx))
	eventually(t, v, "it waits for its turn", func(s Status) bool { return s.Queued == 7 })
	reads := r.source.Count(luntest.Read)
	fill(t, v, lun.Extent{Start: 3, Blocks: 4}, 2)
	expect(t, v, lun.Extent{Start: 3, Blocks: 4}, 2)
	if s := v.Status(); s.Phase != Migrating || s.Copied != 0 || s.ETA != nil || r.source.Count(luntest.Read) != reads {
		t.Errorf("while it waits: %+v, %d reads of the source", s, r.source.Count(luntest.Read)-reads)
	}

	seat.come <- struct{}{}
	eventually(t, v, "it copies", func(s Status) bool { return s.Copied > 0 && s.Queued == 0 })
	seat.set(func() { seat.leave() })
	eventually(t, v, "it gave its turn back and waits for another", func(s Status) bool { return s.Queued == 7 })
	seat.set(func() {
		if seat.copies || seat.first {
			t.Errorf("the turn was not given back, or it comes first: %v, %v", seat.copies, seat.first)
		}
	})
	copied, reads := v.Status().Copied, r.source.Count(luntest.Read)
	fill(t, v, lun.Extent{Start: 9, Blocks: 1}, 3)
	expect(t, v, lun.Extent{Start: 9, Blocks: 1}, 3)
	if s := v.Status(); s.Copied != copied || r.source.Count(luntest.Read) != reads || s.Rate != 0 {
		t.Errorf("it copies on without a turn: %d and %d bytes", copied, s.Copied)
	}
	// To be paused it need not wait for a turn.
	must(t, v.Pause(ctx))
	if s := v.Status(); s.Queued != 0 || !s.Paused {
		t.Errorf("paused: %+v", s)
	}
	must(t, v.Resume(ctx))
	seat.come <- struct{}{}
	must(t, v.Throttle(ctx, 0))
	waitFor(t, v, Synced)
	fill(t, v, lun.Extent{Start: 11, Blocks: 1}, 4)
	must(t, v.Rollback(ctx, RollbackOptions{}))
	eventually(t, v, "the rollback waits", func(s Status) bool { return s.Queued == 7 })
	seat.set(func() {
		if !seat.first {
			t.Error("a volume that goes back does not come first")
		}
	})
	seat.come <- struct{}{}
	waitFor(t, v, RolledBack)
	seat.set(func() {
		if seat.taken != 3 || seat.copies {
			t.Errorf("%d turns; it copies: %v", seat.taken, seat.copies)
		}
	})
	for at, version := range map[lun.LBA]uint64{3: 2, 9: 3, 11: 4, 12: 1} {
		expect(t, r.source, lun.Extent{Start: at, Blocks: 1}, version)
	}
}

// Caught: without Idle in watch, at the first run.
func TestAVolumeThatCanCopyNothingKeepsNoOtherFromIt(t *testing.T) {
	const blocks = 4096
	r := newRig(t, blocks)
	fill(t, r.source, lun.Extent{Blocks: blocks}, 1)
	damaged(r, lun.Extent{Start: 700, Blocks: 3})
	seat := &theSeat{come: make(chan struct{}, 1)}
	seat.come <- struct{}{}
	r.cfg.Seat = seat
	v := r.open(t)
	defer r.close(t)
	must(t, v.Throttle(t.Context(), 64<<10))
	must(t, v.Start(t.Context()))
	eventually(t, v, "it copies", func(s Status) bool { return s.Rate > 0 })
	seat.set(func() {
		if seat.idle {
			t.Error("it copies and says that it cannot")
		}
	})
	must(t, v.Throttle(t.Context(), 0))
	eventually(t, v, "only what cannot be read is left, and it says so", func(Status) (idle bool) {
		seat.set(func() { idle = seat.idle })
		return idle
	})
	if s := v.Status(); s.Remaining != 3*testBlock || s.Phase != Migrating {
		t.Errorf("status %+v", s)
	}
}
