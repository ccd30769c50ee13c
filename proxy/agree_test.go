package proxy

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
)

// Everybody who is not ready is named, and nothing is held or changed. Caught: the first alone; a
// source that is asked though it is not needed; a rollback that needs a destination which has
// nothing of its own; a state that is not asked.
func TestAStepBeginsWhereAllAreReady(t *testing.T) {
	ctx := t.Context()
	pair := newPair(t, 256)
	var down [2][2]atomic.Bool
	var volumes []*Volume
	for i, r := range pair {
		for side, m := range []*luntest.Memory{r.source, r.destination} {
			m.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
				if down[i][side].Load() {
					return lun.ErrUnavailable
				}
				return nil
			})
		}
		must(t, r.vol.Start(ctx))
		waitFor(t, r.vol, Synced)
		volumes = append(volumes, r.vol)
	}
	all := func(down *[2][2]atomic.Bool, to bool) {
		for i := range down {
			for side := range down[i] {
				down[i][side].Store(to)
			}
		}
	}
	wants := func(what string, err error, names, not []string) {
		t.Helper()
		if err == nil || strings.Contains(err.Error(), "\n") {
			t.Fatalf("%s: %v", what, err)
		}
		for _, name := range names {
			if !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %q is not in %v", what, name, err)
			}
		}
		for _, name := range not {
			if strings.Contains(err.Error(), name) {
				t.Errorf("%s: %q is in %v", what, name, err)
			}
		}
		for _, v := range volumes {
			if v.Phase() != Synced || v.Status().Hold != nil {
				t.Errorf("%s: phase %s, held %v", what, v.Phase(), v.Status().Hold)
			}
		}
	}
	a, b := "volume "+volumes[0].Name()+": ", "volume "+volumes[1].Name()+": "
	all(&down, true)
	cut := CutoverStep(CutoverOptions{})
	for _, v := range volumes {
		v.settings.VerifySample = 1 << 20
	}
	err := Do(ctx, cut, Together{}, volumes...)
	wants("all are away", err, []string{a + "source", a + "destination", b + "source", b + "destination", "not ready for the cutover"}, nil)
	if !errors.Is(err, lun.ErrUnavailable) {
		t.Errorf("the reason: %v", err)
	}
	wants("nothing is compared", Do(ctx, CutoverStep(CutoverOptions{NoVerify: true}), Together{}, volumes...), []string{a + "destination", b + "destination"}, []string{"source"})
	wants("back", Do(ctx, RollbackStep(RollbackOptions{}), Together{}, volumes...), []string{a + "source", b + "source"}, []string{"destination"})
	all(&down, false)
	fill(t, pair[1].vol, lun.Extent{Start: 9, Blocks: 1}, 2)
	down[1][1].Store(true)
	wants("back, with blocks on the destination alone", Do(ctx, RollbackStep(RollbackOptions{}), Together{}, volumes...), []string{b + "destination"}, []string{a, "source"})

	// Answers come in the order of the volume, its state, its units.
	answers, done := volumes[1].Ask(ctx, cut)
	var parties []string
	for _, x := range answers {
		parties = append(parties, x.Party)
		if x.Ready != (x.Err == nil) || x.Ready != (x.Reason == "") {
			t.Errorf("%+v", x)
		}
	}
	if len(parties) != 4 || done || parties[0]+": " != b || !strings.HasPrefix(parties[1], b+"state") || !strings.HasPrefix(parties[2], b+"source") || answers[3].Ready {
		t.Errorf("asked: %v, %v", parties, done)
	}
	down[1][1].Store(false)

	sure := volumes[0].store
	volumes[0].store = fullStore{sure}
	wants("a state that takes nothing", Do(ctx, cut, Together{}, volumes...), []string{a + "state: not ready for the cutover", "disk full"}, []string{b})
	volumes[0].store = sure
	waitUntilWell(t, volumes[0])
	must(t, Do(ctx, cut, Together{}, volumes...))
}

// fullStore takes no records.
type fullStore struct{ store }

func (fullStore) PutRecords(context.Context, ...state.Record) error { return errors.New("disk full") }

func waitUntilWell(t *testing.T, v *Volume) {
	t.Helper()
	must(t, v.save(t.Context(), func(*state.Record) {}))
	eventually(t, v, "well", func(s Status) bool { return !s.Degraded })
}

// Who does not answer is not ready after a while. Caught: a question without an end.
func TestWhoDoesNotAnswerIsNotReady(t *testing.T) {
	r := newRig(t, 64)
	r.cfg.askLimit = 200 * time.Millisecond
	v := r.open(t)
	defer r.close(t)
	hangs := make(chan struct{})
	defer close(hangs)
	r.destination.Intercept(func(ctx context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Read {
			select {
			case <-hangs:
			case <-ctx.Done():
			}
			return ctx.Err()
		}
		return nil
	})
	err := v.Start(t.Context())
	if err == nil || !strings.Contains(err.Error(), "destination : not ready for the start: no answer within 200ms") || v.Phase() != Ready {
		t.Errorf("%v, phase %s", err, v.Phase())
	}
}

// A step goes ahead where it does not depend on what is wrong: a cutover where somebody else has
// reserved the source, of which it only reads; either way where the own reservation is gone and not
// taken again yet. Where somebody else has what is to be written it is refused. Caught: a
// source that is compared asked for its reservation; a destination that is not.
func TestAReservationCountsWhereTheStepWrites(t *testing.T) {
	const stranger = 0x77
	take := func(a *fenceArray, key uint64) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.key, a.registered = key, map[uint64]string{}
		if key != 0 {
			a.registered[key] = "a stranger"
		}
	}
	cut := func(v *Volume) error { return v.Cutover(t.Context(), CutoverOptions{}) }
	back := func(v *Volume) error { return v.Rollback(t.Context(), RollbackOptions{}) }
	for name, c := range map[string]struct {
		step                func(*Volume) error
		source, destination uint64 // whose reservation it is; 1 is the volume's
		refused             string
	}{
		"cutover, the source is somebody else's":      {cut, stranger, 1, ""},
		"cutover, the destination is somebody else's": {cut, 1, stranger, "volume vol: cutover refused: destination /new is reserved (Write Exclusive – Registrants Only) by "},
		"cutover, nobody has either":                  {cut, 0, 0, ""},
		"rollback, the source is somebody else's":     {back, stranger, 1, "volume vol: rollback refused: source /old is reserved (Write Exclusive – Registrants Only) by "},
		"rollback, nobody has either":                 {back, 0, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newFencedRig(t)
			r.cfg.fenceEvery = time.Hour // nothing is taken again in time, or if it is that is as well
			r.cfg.VerifySample = 1 << 20
			r.cfg.SourceAddress, r.cfg.DestinationAddress = "/old", "/new"
			v := r.open(t)
			defer r.close(t)
			must(t, v.Start(t.Context()))
			waitFor(t, v, Synced)
			if c.source != 1 {
				take(r.from, c.source)
			}
			if c.destination != 1 {
				take(r.to, c.destination)
			}
			err := c.step(v)
			if c.refused == "" {
				must(t, err)
			} else if err == nil || !strings.Contains(err.Error(), c.refused) || !errors.Is(err, lun.ErrConflict) || v.Phase() != Synced {
				t.Errorf("%v, phase %s", err, v.Phase())
			}
		})
	}
}

// A broken mirror can be switched off, and one is not switched on while the source is away, but before the
// start. Caught: a switch that asks the source in either case, or in none.
func TestAMirrorNeedsTheSourceToBeSwitchedOn(t *testing.T) {
	ctx := t.Context()
	r := newRig(t, 64)
	r.cfg.SourceAddress = "/old"
	var away atomic.Bool
	r.source.Intercept(func(context.Context, luntest.Op, lun.Extent) error {
		if away.Load() {
			return lun.ErrUnavailable
		}
		return nil
	})
	v := r.open(t)
	defer r.close(t)
	away.Store(true)
	must(t, v.SetMirror(ctx, true))
	away.Store(false)
	must(t, v.Start(ctx))
	waitFor(t, v, Synced)
	away.Store(true)
	fill(t, v, lun.Extent{Blocks: 1}, 2)
	if m := v.Status().Mirror; m == nil || m.State != "broken" {
		t.Fatalf("mirror %+v", m)
	}
	must(t, v.SetMirror(ctx, false))
	err := v.SetMirror(ctx, true)
	if s := v.Status(); err == nil || !strings.Contains(err.Error(), "source /old: not ready for the mirror: ") || s.Mirrored || s.Mirror != nil {
		t.Errorf("%v, mirrored %v, %+v", err, s.Mirrored, s.Mirror)
	}
	away.Store(false)
	must(t, v.SetMirror(ctx, true))
}
