package proxy

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// fenceArray is a Memory with reservations that several services reach.
type fenceArray struct {
	*luntest.Memory
	mu         sync.Mutex // protects the fields below
	key        uint64     // of the reservation
	registered map[uint64]string
	fail       error
	failing    string // the call that fails
}

// fencePort is one service's way to an array.
type fencePort struct {
	*fenceArray
	told chan struct{}
	own  uint64 // the key it fenced with last
}

func newFenceArray(blocks uint64) *fenceArray {
	return &fenceArray{Memory: luntest.NewThinMemory(testBlock, blocks), registered: map[uint64]string{}}
}

func (a *fenceArray) do(what string, change func() error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fail != nil {
		return a.fail
	}
	if a.failing == what {
		return lun.ErrUnavailable
	}
	return change()
}

func (a *fenceArray) held() lun.Reservations {
	r := lun.Reservations{Key: a.key}
	if a.key != 0 {
		r.Type = 5
	}
	for k, name := range a.registered {
		r.Registrants = append(r.Registrants, lun.Registrant{Key: k, Port: name, Holder: k == a.key})
	}
	return r
}

func (a *fenceArray) holder() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.key
}

func (p *fencePort) Disturbed() <-chan struct{} { return p.told }
func (p *fencePort) Unreachable() error         { return nil }

func (p *fencePort) Fence(_ context.Context, key uint64) error {
	return p.do("fence", func() error {
		p.own = key
		if p.key != 0 && p.key != key {
			return &lun.ReservedError{Reservations: p.held()}
		}
		p.key, p.registered[key] = key, "a service"
		return nil
	})
}

func (p *fencePort) Unfence(_ context.Context, key uint64) error {
	return p.do("unfence", func() error {
		delete(p.registered, key)
		if p.key == key {
			p.key = 0
		}
		return nil
	})
}

func (p *fencePort) Fenced(context.Context) (r lun.Reservations, err error) {
	err = p.do("ask", func() error { r = p.held(); return nil })
	return r, err
}

func (p *fencePort) BreakFence(_ context.Context, key uint64) error {
	return p.do("break", func() error {
		for k := range p.registered {
			if k != key {
				delete(p.registered, k)
			}
		}
		if p.key != key {
			p.key = 0
		}
		return nil
	})
}

// WriteAt meets the reservation as any write does.
func (p *fencePort) WriteAt(ctx context.Context, b []byte, at lun.LBA) error {
	p.mu.Lock()
	_, ours := p.registered[p.own]
	conflict := p.key != 0 && !ours
	p.mu.Unlock()
	if conflict {
		return lun.ErrConflict
	}
	return p.Memory.WriteAt(ctx, b, at)
}

// fencedRig is a volume between two such arrays.
type fencedRig struct {
	dir      string
	from, to *fenceArray
	cfg      Config
	store    *state.Store
	vol      *Volume
}

func newFencedRig(t *testing.T) *fencedRig {
	r := &fencedRig{dir: t.TempDir(), from: newFenceArray(1024), to: newFenceArray(1024)}
	r.cfg = Config{Name: "vol", IQN: "iqn.2026-11.net.example:vol", RegionSize: testRegion, CopyDepth: 4, fenceEvery: 20 * time.Millisecond}
	fill(t, r.from.Memory, lun.Extent{Blocks: 1024}, 1)
	return r
}

// beside is a second service on the same arrays.
func (r *fencedRig) beside(t *testing.T) *fencedRig {
	other := *r
	other.dir, other.store, other.vol = t.TempDir(), nil, nil
	return &other
}

func (r *fencedRig) tryOpen(t *testing.T) (*Volume, error) {
	t.Helper()
	var err error
	if r.store, err = state.Open(r.dir, state.Options{Log: quiet()}); err != nil {
		t.Fatal(err)
	}
	cfg := r.cfg
	cfg.Source, cfg.Destination = &fencePort{r.from, make(chan struct{}, 1), 0}, &fencePort{r.to, make(chan struct{}, 1), 0}
	cfg.Store, cfg.Log = r.store, quiet()
	if cfg.Target, err = target.New(target.Config{Log: quiet()}); err != nil {
		t.Fatal(err)
	}
	if r.vol, err = Open(t.Context(), cfg); err != nil {
		must(t, r.store.Close())
	}
	return r.vol, err
}

func (r *fencedRig) open(t *testing.T) *Volume {
	t.Helper()
	v, err := r.tryOpen(t)
	must(t, err)
	return v
}

func (r *fencedRig) close(t *testing.T) {
	t.Helper()
	must(t, r.vol.Shutdown(t.Context()))
	must(t, r.store.Close())
}

func (r *fencedRig) setFail(err error) {
	for _, a := range []*fenceArray{r.from, r.to} {
		a.mu.Lock()
		a.fail = err
		a.mu.Unlock()
	}
}

func (r *fencedRig) wants(t *testing.T, what string, held bool) {
	t.Helper()
	for side, a := range map[string]*fenceArray{"source": r.from, "destination": r.to} {
		a.mu.Lock()
		if key := a.key; held && (key != r.vol.key || !isFenceKey(key)) || !held && (key != 0 || len(a.registered) > 0) {
			t.Errorf("%s: the %s: reserved by %x, registered %x", what, side, key, a.registered)
		}
		a.mu.Unlock()
	}
}

func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// TestFencesAreHeldFromStartToCutover, also while the service is down. Caught: fences that
// are given up when the service stops; that are not given up at the cutover.
func TestFencesAreHeldFromStartToCutover(t *testing.T) {
	r := newFencedRig(t)
	v := r.open(t)
	r.wants(t, "ready", false)
	must(t, v.Throttle(t.Context(), 1))
	must(t, v.Start(t.Context()))
	must(t, v.Pause(t.Context()))
	must(t, v.Throttle(t.Context(), 0))
	r.wants(t, "migrating", true)
	r.close(t)
	r.wants(t, "stopped", true)
	v = r.open(t)
	r.wants(t, "back again", true)
	must(t, v.Resume(t.Context()))
	must(t, v.Wait(t.Context(), Synced))
	r.wants(t, "synced", true)
	if st := v.Status(); st.Source.Fence != FenceReserved || st.Destination.Fence != FenceReserved {
		t.Errorf("status: %+v", st)
	}
	must(t, v.Cutover(t.Context(), CutoverOptions{}))
	r.wants(t, "cut over", false)
	if v.record.Fenced {
		t.Error("the record says that there are fences")
	}
	r.close(t)
}

// TestStartThatFailsHoldsNoFence. Caught: a start that gives nothing back.
func TestStartThatFailsHoldsNoFence(t *testing.T) {
	for _, c := range []struct {
		name string
		hurt func(r *fencedRig)
	}{
		{"destination held by somebody else", func(r *fencedRig) { r.to.key, r.to.registered[0xbad] = 0xbad, "iqn.2026-11.net.example:them" }},
		{"source held by somebody else", func(r *fencedRig) { r.from.key, r.from.registered[0xbad] = 0xbad, "iqn.2026-11.net.example:them" }},
		{"somebody registered on the source", func(r *fencedRig) { r.from.registered[0xbad] = "iqn.2026-11.net.example:them" }},
		{"somebody registered on the destination", func(r *fencedRig) { r.to.registered[0xbad] = "iqn.2026-11.net.example:them" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newFencedRig(t)
			c.hurt(r)
			v := r.open(t)
			err := v.Start(t.Context())
			var refused *FencedError
			if !errors.As(err, &refused) || !errors.Is(err, lun.ErrConflict) || !strings.Contains(err.Error(), "iqn.2026-11.net.example:them") || strings.Contains(err.Error(), "\n") {
				t.Errorf("start: %v", err)
			}
			if v.Phase() != Ready {
				t.Errorf("phase %s", v.Phase())
			}
			for _, a := range []*fenceArray{r.from, r.to} {
				if _, ours := a.registered[v.key]; ours {
					t.Error("a fence stays")
				}
			}
			r.close(t)
		})
	}
	t.Run("the destination goes away", func(t *testing.T) {
		r := newFencedRig(t)
		v := r.open(t)
		r.to.mu.Lock()
		r.to.failing = "fence"
		r.to.mu.Unlock()
		if err := v.Start(t.Context()); !errors.Is(err, lun.ErrUnavailable) || v.Phase() != Ready {
			t.Errorf("start: %v, phase %s", err, v.Phase())
		}
		r.wants(t, "start failed", false)
		r.close(t)
	})
	t.Run("the record cannot be written", func(t *testing.T) {
		r := newFencedRig(t)
		v := r.open(t)
		ctx, cancel := context.WithCancel(t.Context())
		r.from.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
			r.from.mu.Lock()
			defer r.from.mu.Unlock()
			if op == luntest.Flush && r.from.key != 0 {
				cancel() // between the fence and the record
			}
			return nil
		})
		if err := v.Start(ctx); err == nil || v.Phase() != Ready {
			t.Errorf("start: %v, phase %s", err, v.Phase())
		}
		r.wants(t, "start failed", false)
		r.close(t)
	})
}

func TestStartIgnoresRegistrationsWhenTold(t *testing.T) {
	r := newFencedRig(t)
	r.from.registered[0xbad] = "iqn.2026-11.net.example:them"
	v := r.open(t)
	must(t, v.Start(t.Context(), StartOptions{IgnoreRegistrations: true}))
	r.wants(t, "told", true)
	r.close(t)
}

// TestVolumeIsNotServedOnUnitsFencedByAnother, in whatever phase. Caught: an Open that
// does not look.
func TestVolumeIsNotServedOnUnitsFencedByAnother(t *testing.T) {
	first := newFencedRig(t)
	v := first.open(t)
	must(t, v.Throttle(t.Context(), 1))
	must(t, v.Start(t.Context()))
	second := first.beside(t)
	if _, err := second.tryOpen(t); !errors.Is(err, lun.ErrConflict) || !strings.Contains(err.Error(), "another lunshift") || !strings.Contains(err.Error(), "break-fence vol") {
		t.Errorf("ready, on fenced units: %v", err)
	}
	first.wants(t, "after the second", true)
	first.close(t)

	// The second takes over; the first is in phase migrating.
	store, err := state.Open(second.dir, state.Options{Log: quiet()})
	must(t, err)
	ports := []lun.Device{&fencePort{second.from, nil, 0}, &fencePort{second.to, nil, 0}}
	broken, err := BreakFence(t.Context(), store, "vol", ports[0], ports[1])
	must(t, errors.Join(err, broken.Err()))
	must(t, store.Close())
	second.cfg.Overwrite = true
	v = second.open(t)
	must(t, v.Throttle(t.Context(), 1))
	must(t, v.Start(t.Context()))
	if _, err := first.tryOpen(t); !errors.Is(err, lun.ErrConflict) {
		t.Errorf("migrating, on fenced units: %v", err)
	}
	second.wants(t, "after the first", true)
	second.close(t)
}

// TestLostFenceIsAFaultUntilItIsFree. Caught: nobody who looks.
func TestLostFenceIsAFaultUntilItIsFree(t *testing.T) {
	r := newFencedRig(t)
	v := r.open(t)
	must(t, v.Throttle(t.Context(), 1))
	must(t, v.Start(t.Context()))
	must(t, v.Pause(t.Context())) // nothing is copied in between
	take := func(key uint64) {
		r.to.mu.Lock()
		defer r.to.mu.Unlock()
		r.to.registered, r.to.key = map[uint64]string{}, key
		if key != 0 {
			r.to.registered[key] = "iqn.2026-11.net.example:thief"
		}
	}
	take(0) // the array lost its memory
	soon(t, "taken again", func() bool { return r.to.holder() == v.key })

	take(0xbad)
	soon(t, "shown", func() bool {
		st := v.Status()
		return st.Degraded && strings.Contains(st.DegradedReason, "iqn.2026-11.net.example:thief") && st.Destination.Fence == FenceLost
	})
	// Initiators are told to try again, not that a reservation of theirs is in the way.
	err := v.WriteAt(t.Context(), make([]byte, testBlock), 5)
	if !errors.Is(err, lun.ErrUnavailable) {
		t.Errorf("a write without the fence: %v", err)
	}
	if r.to.holder() != 0xbad {
		t.Error("taken from its holder")
	}
	take(0)
	soon(t, "free again", func() bool { return r.to.holder() == v.key && !v.Status().Degraded })
	must(t, v.WriteAt(t.Context(), make([]byte, testBlock), 5))

	take(0xbad)
	broken, err := v.BreakFence(t.Context(), nil, nil)
	must(t, errors.Join(err, broken.Err()))
	r.wants(t, "broken", true)
	soon(t, "well again", func() bool { return !v.Status().Degraded })
	r.close(t)
}

// TestDisturbedFenceIsLookedAfterAtOnce rather than at the next round. Caught: a guard that
// does not listen to the destination.
func TestDisturbedFenceIsLookedAfterAtOnce(t *testing.T) {
	r := newFencedRig(t)
	r.cfg.fenceEvery = time.Hour
	v := r.open(t)
	must(t, v.Throttle(t.Context(), 1))
	must(t, v.Start(t.Context()))
	r.to.mu.Lock()
	r.to.registered, r.to.key = map[uint64]string{}, 0
	r.to.mu.Unlock()
	v.destination.Device.(*fencePort).told <- struct{}{}
	soon(t, "taken again", func() bool { return r.to.holder() == v.key })
	r.close(t)
}

// TestFencesThatOutliveTheCutoverAreGivenUpLater: the array was away, or the service ended
// at that instant. Caught: a record that does not tell.
func TestFencesThatOutliveTheCutoverAreGivenUpLater(t *testing.T) {
	r := newFencedRig(t)
	r.cfg.Happened = func(h Happening) {
		if h.Phase == Cutover { // it is recorded, and its fences are not given up yet
			r.setFail(lun.ErrUnavailable)
		}
	}
	v := r.open(t)
	must(t, v.Start(t.Context()))
	must(t, v.Wait(t.Context(), Synced))
	must(t, v.Cutover(t.Context(), CutoverOptions{}))
	if st := v.Status(); !st.Degraded || !strings.Contains(st.DegradedReason, "break-fence vol") {
		t.Errorf("cut over, with fences that stay: %+v", st)
	}
	r.close(t)
	r.setFail(nil)
	v = r.open(t) // the units can be opened again
	if left, err := HasFences(r.store, "vol"); err != nil || left || v.Status().Degraded {
		t.Errorf("given up, and yet: %v, %v, %+v", left, err, v.Status())
	}
	r.wants(t, "given up", false)
	r.close(t)
}

// TestFenceOfAStartThatWasCutShortIsGivenUp: killed between the fences and the record.
// Caught: an Open in phase ready that gives up nothing.
func TestFenceOfAStartThatWasCutShortIsGivenUp(t *testing.T) {
	r := newFencedRig(t)
	v := r.open(t)
	must(t, v.fence(t.Context()))
	r.wants(t, "cut short", true)
	must(t, r.store.Close())
	r.open(t)
	r.wants(t, "ready again", false)
	r.close(t)
}

func TestKeysTellStatesAndVolumesApart(t *testing.T) {
	a, b := state.Identity{1}, state.Identity{2}
	keys := map[uint64]bool{}
	for _, k := range []uint64{FenceKeyOf(a, "x"), FenceKeyOf(a, "y"), FenceKeyOf(b, "x")} {
		if !isFenceKey(k) || keys[k] {
			t.Errorf("key %#x", k)
		}
		keys[k] = true
	}
	if FenceKeyOf(a, "x") != FenceKeyOf(a, "x") {
		t.Error("a key changes")
	}
}

// TestUnitWithoutReservationsIsMigratedAllTheSame, and said to be without a fence.
func TestUnitWithoutReservationsIsMigratedAllTheSame(t *testing.T) {
	r := newFencedRig(t)
	r.setFail(lun.ErrUnsupported)
	v := r.open(t)
	must(t, v.Start(t.Context()))
	must(t, v.Wait(t.Context(), Synced))
	if st := v.Status(); st.Degraded || st.Source.Fence != FenceNone {
		t.Errorf("status: %+v", st)
	}
	must(t, v.Cutover(t.Context(), CutoverOptions{}))
	if v.Status().Degraded {
		t.Errorf("status: %+v", v.Status())
	}
	r.close(t)
}

// Caught: a guard that goes on in phase rolled-back; a record that is fenced still after a restart.
func TestFencesAreGivenUpOnceRolledBack(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		r := newFencedRig(t)
		v := r.open(t)
		must(t, v.Start(t.Context()))
		waitFor(t, v, Synced)
		must(t, v.Rollback(t.Context(), RollbackOptions{}))
		waitFor(t, v, RolledBack)
		if restarted {
			r.close(t)
			v = r.open(t)
		}
		soon(t, "both are free", func() bool { return r.from.holder() == 0 && r.to.holder() == 0 && !v.current().Fenced })
		must(t, v.Start(t.Context(), StartOptions{Reuse: true}))
		if r.from.holder() != v.key || r.to.holder() != v.key {
			t.Errorf("started again: held by %#x and %#x", r.from.holder(), r.to.holder())
		}
		r.close(t)
	}
}

// Caught: units of a volume that is rolling back left free.
func TestBreakFenceTakesTheUnitsOfAMigrationThatIsNotOpenAgain(t *testing.T) {
	for _, p := range []Phase{Migrating, Synced, RollingBack} {
		r := newFencedRig(t)
		store, err := state.Open(t.TempDir(), state.Options{Log: quiet()})
		must(t, err)
		must(t, store.PutRecords(t.Context(), state.Record{Volume: "vol", Phase: string(p), BlockSize: testBlock, Blocks: 1024, RegionBlocks: 128, CreatedAt: time.Now()}))
		from, to := &fencePort{fenceArray: r.from}, &fencePort{fenceArray: r.to}
		must(t, from.Fence(t.Context(), 0x99))
		b, err := BreakFence(t.Context(), store, "vol", from, to)
		must(t, err)
		must(t, b.Err())
		if r.from.holder() == 0 || r.to.holder() == 0 {
			t.Errorf("%s: held by %#x and %#x", p, r.from.holder(), r.to.holder())
		}
		must(t, store.Close())
	}
}
