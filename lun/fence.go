package lun

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
)

// Fencer is a Device that can keep others from writing to it.
//
// The fence of a logical unit with persistent reservations (SPC-4 5.12) is one of type
// Write Exclusive – Registrants Only under a key of the caller's choice: who is not
// registered reads, and gets RESERVATION CONFLICT for a write. Every I_T nexus of the
// Device is registered under that key, also the one that a lost connection comes
// back with, and before it carries a command. Files and block devices are locked while
// they are open, and ask for no more.
type Fencer interface {
	// Fence takes the fence under a key that is not 0, or makes sure that it is still
	// held. It fails with ErrConflict, as a *ReservedError, where somebody else holds a
	// reservation, and has changed nothing then; with ErrUnsupported where the device
	// has no reservations. A fence that was held before and that somebody else took
	// stays wanted: the next call takes it again once it is free.
	Fence(ctx context.Context, key uint64) error
	// Unfence gives up what is held and registered under key, whoever of an earlier
	// process did that. It touches nothing of others.
	Unfence(ctx context.Context, key uint64) error
	// Fenced tells what is held and who is registered, without changing it.
	// ErrUnsupported where the device has no reservations.
	Fenced(ctx context.Context) (Reservations, error)
	// BreakFence takes every reservation and registration away that is not under key,
	// together with the commands of their initiators where the device can, and holds the
	// fence under key in between. Afterwards the fence is held if it was, and else free.
	BreakFence(ctx context.Context, key uint64) error
	// Disturbed has a value when the fence may have changed: a session began anew, or the
	// device told that a reservation was preempted or released. It holds one value.
	Disturbed() <-chan struct{}
}

// Reservations are what a device knows of who may write to it.
type Reservations struct {
	// Locked: the device is a file or a block device of this host, which is locked
	// while it is open; nothing else is known then.
	Locked bool
	// Type is the type of the persistent reservation (SPC-4 6.15.3.4), 0 where none is
	// held. Key is its holder's, 0 where all registrants hold it.
	Type byte
	Key  uint64
	// Registrants are all registrations, also those under the holder's key.
	Registrants []Registrant
}

// Registrant is one registration.
type Registrant struct {
	Key uint64
	// Port is the initiator port, such as "iqn.1994-05.com.redhat:db01,i,0x00023d010000";
	// empty where the device does not tell.
	Port string
	// Holder: it holds the reservation.
	Holder bool
}

// Others are the registrations under other keys than key.
func (r Reservations) Others(key uint64) []Registrant {
	return slices.DeleteFunc(slices.Clone(r.Registrants), func(x Registrant) bool { return x.Key == key })
}

// HeldByOther tells whether a reservation is held under another key than key.
func (r Reservations) HeldByOther(key uint64) bool { return r.Type != 0 && r.Key != key }

// Holder says who holds the reservation, as far as the device tells.
func (r Reservations) Holder() string {
	if r.Key == 0 {
		return "all that are registered"
	}
	who := fmt.Sprintf("key %#016x", r.Key)
	var ports []string
	for _, x := range r.Registrants {
		if x.Key == r.Key && x.Port != "" && !slices.Contains(ports, x.Port) {
			ports = append(ports, x.Port)
		}
	}
	if len(ports) > 0 {
		who += " of " + strings.Join(ports, " and ")
	}
	return who
}

// ReservedError is an ErrConflict that says who holds what.
type ReservedError struct{ Reservations }

func (e *ReservedError) Error() string {
	return fmt.Sprintf("reserved (%s) by %s", ReservationType(e.Type), e.Holder())
}

// Is makes errors.Is(err, ErrConflict) hold.
func (e *ReservedError) Is(target error) bool { return target == ErrConflict }

// ReservationType is the name of a type of persistent reservation (SPC-4 6.15.3.4).
func ReservationType(t byte) string {
	names := map[byte]string{
		1: "Write Exclusive", 3: "Exclusive Access",
		prWriteExclusiveRO: "Write Exclusive – Registrants Only", 6: "Exclusive Access – Registrants Only",
		7: "Write Exclusive – All Registrants", 8: "Exclusive Access – All Registrants",
	}
	if name, ok := names[t]; ok {
		return name
	}
	return fmt.Sprintf("type %d", t)
}

// locked is the Fencer of a device that is locked while it is open.
type locked struct{}

func (locked) Fence(context.Context, uint64) error      { return nil }
func (locked) Unfence(context.Context, uint64) error    { return nil }
func (locked) BreakFence(context.Context, uint64) error { return nil }
func (locked) Disturbed() <-chan struct{}               { return nil }
func (locked) Fenced(context.Context) (Reservations, error) {
	return Reservations{Locked: true}, nil
}

var (
	_ Fencer = (*file)(nil)
	_ Fencer = (*block)(nil)
	_ Fencer = (*remote)(nil)
)

// breakRounds bounds how often BreakFence looks again: registrations come in while it is
// at work.
const breakRounds = 64

// fence is what a remote holds.
type fence struct {
	turn chan struct{} // buffered 1: one change at a time
	// key is that under which the fence is wanted, 0 for none. Whoever registers a nexus
	// looks at it again afterwards.
	key      atomic.Uint64
	told     chan struct{} // Disturbed
	volatile atomic.Bool   // the device refuses to keep registrations over a loss of power
	looked   atomic.Uint64 // counts verdicts
	verdict  error         // whether the fence is held, as of the last look; guarded by turn
}

func (f *fence) disturb() {
	select {
	case f.told <- struct{}{}:
	default:
	}
}

// judged keeps a verdict. The turn is held.
func (f *fence) judged(err error) {
	f.verdict = err
	f.looked.Add(1)
}

func (f *fence) begin(ctx context.Context) error {
	select {
	case f.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fence) end() { <-f.turn }

func (r *remote) Disturbed() <-chan struct{} { return r.fence.told }

func (r *remote) Fence(ctx context.Context, key uint64) error {
	if key == 0 {
		return errors.New("a fence needs a key other than 0")
	}
	if err := r.admit(ctx, Extent{}, 0, true); err != nil {
		return err
	}
	if err := r.fence.begin(ctx); err != nil {
		return err
	}
	defer r.fence.end()
	old := r.fence.key.Load()
	if old == key {
		return r.named("fence", r.look(ctx, key))
	}
	r.fence.key.Store(key)
	err := r.take(ctx, key, true)
	if err != nil {
		r.fence.key.Store(old)
	}
	if errors.Is(err, ErrConflict) {
		// What was registered before it showed that somebody else was faster does not stay.
		if e := r.drop(context.WithoutCancel(ctx), key); e != nil {
			err = fmt.Errorf("%w; the registration under key %#016x stays: %w", err, key, e)
		}
	}
	return r.named("fence", err)
}

func (r *remote) Unfence(ctx context.Context, key uint64) error {
	if err := r.admit(ctx, Extent{}, 0, true); err != nil {
		return err
	}
	if err := r.fence.begin(ctx); err != nil {
		return err
	}
	defer r.fence.end()
	if r.fence.key.Load() == key {
		r.fence.key.Store(0)
	}
	return r.named("give the fence up", r.drop(ctx, key))
}

func (r *remote) Fenced(ctx context.Context) (Reservations, error) {
	if err := r.admit(ctx, Extent{}, 0, false); err != nil {
		return Reservations{}, err
	}
	n := r.nexus(r.carrier())
	held, err := n.held(ctx)
	if err == nil {
		held.Registrants, err = n.registrants(ctx)
	}
	return held, r.named("ask for reservations", err)
}

func (r *remote) BreakFence(ctx context.Context, key uint64) error {
	if err := r.admit(ctx, Extent{}, 0, true); err != nil {
		return err
	}
	if err := r.fence.begin(ctx); err != nil {
		return err
	}
	defer r.fence.end()
	err := r.displace(ctx, key)
	if err == nil && r.fence.key.Load() == key {
		err = r.take(ctx, key, true)
	} else {
		err = errors.Join(err, r.drop(ctx, key))
	}
	return r.named("break the fence", err)
}

// displace takes away what is not under key.
func (r *remote) displace(ctx context.Context, key uint64) error {
	n := r.nexus(r.carrier())
	if err := n.register(ctx, key); err != nil {
		return err
	}
	for range breakRounds {
		held, err := n.held(ctx)
		if err != nil {
			return err
		}
		keys, err := n.keys(ctx)
		if err != nil {
			return err
		}
		victim, found := held.Key, held.HeldByOther(key)
		for _, k := range keys {
			if !found && k != key {
				victim, found = k, true
			}
		}
		if !found {
			return nil
		}
		if err := n.preempt(ctx, key, victim, true); err != nil && !errors.Is(err, ErrConflict) {
			return err
		}
	}
	return fmt.Errorf("others register again and again: shut them down first")
}

// take registers every session that is logged in, and reserves; clean, it first takes
// away what earlier sessions left under key, which a device that knows no initiator
// ports (tgt) would keep. The turn is held.
func (r *remote) take(ctx context.Context, key uint64, clean bool) (err error) {
	defer func() { r.fence.judged(err) }()
	first := r.carrier()
	n := r.nexus(first)
	held, err := n.held(ctx)
	if err != nil {
		return err
	}
	if held.HeldByOther(key) {
		return n.reserved(ctx, held)
	}
	if err := n.register(ctx, key); err != nil {
		return err
	}
	switch {
	case held.Type == 0:
		err = n.reserve(ctx, key)
	case clean || held.Type != prWriteExclusiveRO:
		err = n.preempt(ctx, key, key, false)
	}
	if err != nil {
		// Somebody came between.
		if held, e := n.held(ctx); e == nil && held.HeldByOther(key) {
			err = n.reserved(ctx, held)
		}
		return err
	}
	for _, s := range r.sessions {
		// A session that is not open registers when it is: see rejoin.
		if s == first || s.reachable() != nil {
			continue
		}
		if err := r.nexus(s).register(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// look makes sure that the fence is held under key and takes it again if nobody has it.
// The turn is held.
func (r *remote) look(ctx context.Context, key uint64) error {
	n := r.nexus(r.carrier())
	held, err := n.held(ctx)
	if err != nil {
		return err
	}
	if held.Type == prWriteExclusiveRO && held.Key == key {
		keys, err := n.keys(ctx)
		if err != nil {
			return err
		}
		if registeredAs(keys, key) >= len(r.sessions) {
			r.fence.judged(nil)
			return nil
		}
	}
	return r.take(ctx, key, false)
}

// regain is for a command that met a reservation conflict: it tells whether the fence is
// held after all, so that the command may be sent again; else the error says why not.
func (r *remote) regain(ctx context.Context, seen uint64) error {
	if err := r.fence.begin(ctx); err != nil {
		return err
	}
	defer r.fence.end()
	key := r.fence.key.Load()
	if key == 0 {
		return ErrConflict
	}
	if r.fence.looked.Load() != seen {
		return r.fence.verdict // another command asked meanwhile
	}
	r.fence.disturb()
	return r.take(ctx, key, false)
}

// drop gives up what is registered under key. The turn is held.
func (r *remote) drop(ctx context.Context, key uint64) error {
	n := r.nexus(r.carrier())
	keys, err := n.keys(ctx)
	if err != nil || !slices.Contains(keys, key) {
		return err
	}
	if err := n.register(ctx, key); err != nil {
		return err
	}
	// Away with the other nexuses under the key; the reservation, if it is theirs, is
	// then this one's, and is released with its registration.
	if err := n.preempt(ctx, key, key, false); err != nil && !errors.Is(err, ErrConflict) {
		return err
	}
	return n.register(ctx, 0)
}

// rejoin registers the nexus of a new connection before it carries commands. What the
// device does not grant is left to who looks after the fence: reads go on without.
func (r *remote) rejoin(ctx context.Context, s *session) error {
	key := r.fence.key.Load()
	if key == 0 {
		return nil
	}
	r.fence.disturb()
	n := r.nexus(s)
	n.urgent = true
	held, err := n.held(ctx)
	if err == nil && !held.HeldByOther(key) {
		if err = n.register(ctx, key); err == nil && held.Type == 0 {
			err = ignoreConflict(n.reserve(ctx, key))
		}
		if err == nil && r.fence.key.Load() != key {
			err = n.register(ctx, 0) // given up meanwhile
		}
	}
	var sense *SenseError
	if errors.As(err, &sense) || errors.Is(err, ErrConflict) {
		r.opts.Log.WithField("device", r.addr.String()).WithError(err).Warn("the new session could not register for the fence")
		return nil
	}
	return err
}

// carrier is a session that is logged in, or else the first.
func (r *remote) carrier() *session {
	for _, s := range r.sessions {
		if s.reachable() == nil {
			return s
		}
	}
	return r.sessions[0]
}

func (r *remote) named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s: %w", r.addr, what, err)
}

func ignoreConflict(err error) error {
	if errors.Is(err, ErrConflict) {
		return nil
	}
	return err
}
