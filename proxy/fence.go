package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"lunshift/lun"
	"lunshift/state"
)

// While a volume is migrating or synced its source and destination are fenced, where
// they have persistent reservations: nobody but this service writes to them, under
// whatever key and name. A host that was forgotten on the old LUN is told so by a
// RESERVATION CONFLICT, and a second lunshift is refused. The fence is taken before the
// start is recorded, taken again when the service comes back, looked after while it runs,
// and given up once the cutover is recorded.

const (
	// fencePrefix begins the keys of lunshift, so that one knows another: "lun".
	fencePrefix = 0x6c756e
	// fenceEvery is the time between two looks at the fences, fencePause the least time
	// between them when devices ask for one.
	fenceEvery = 30 * time.Second
	fencePause = 200 * time.Millisecond
	// unfenceLimit bounds giving the fences up.
	unfenceLimit = 10 * time.Second
)

// What keeps others from writing to a unit, as UnitStatus shows it.
const (
	FenceReserved = "reserved" // a persistent reservation
	FenceLocked   = "locked"   // a lock on this host, of a file or a block device
	FenceNone     = "none"
	FenceLost     = "lost" // somebody else has what was held
)

// FencedError says that somebody else has reserved a unit, or may write to it.
type FencedError struct {
	text  string
	cause error
}

func (e *FencedError) Error() string { return e.text }

// Unwrap makes errors.Is(err, lun.ErrConflict) hold.
func (e *FencedError) Unwrap() error { return e.cause }

// FenceKey is the reservation key of a volume: its own, and the same after a restart.
func FenceKey(ctx context.Context, store interface {
	Identity(context.Context) (state.Identity, error)
}, volume string) (uint64, error) {
	id, err := store.Identity(ctx)
	if err != nil {
		return 0, fmt.Errorf("volume %s: %w", volume, err)
	}
	return FenceKeyOf(id, volume), nil
}

// FenceKeyOf is FenceKey for the volume of a state with that identity.
func FenceKeyOf(id state.Identity, volume string) uint64 {
	sum := sha256.Sum256(append(append(id[:], 0), volume...))
	return fencePrefix<<40 | binary.BigEndian.Uint64(sum[:])>>24
}

// HasFences tells whether the volume of that name is cut over and may have fences on its
// units still. Open takes those units that can be opened and gives the fences up.
func HasFences(store *state.Store, name string) (bool, error) {
	r, ok, err := store.Record(name)
	return ok && Phase(r.Phase) == Cutover && r.Fenced, err
}

func isFenceKey(key uint64) bool { return key>>40 == fencePrefix }

// CheckFence gives every reason, one line each, for which a unit cannot be fenced under
// key; with registered also those for which the fence would not keep everybody out. It
// changes nothing. ErrUnsupported where the device has no reservations.
func CheckFence(ctx context.Context, volume, role, address string, dev lun.Device, key uint64, registered bool) (refused []error, _ lun.Reservations, _ error) {
	f, ok := dev.(lun.Fencer)
	if !ok {
		return nil, lun.Reservations{}, lun.ErrUnsupported
	}
	held, err := f.Fenced(ctx)
	if err != nil {
		return nil, held, err
	}
	if held.HeldByOther(key) {
		refused = append(refused, fenced(volume, role, address, &lun.ReservedError{Reservations: held}))
	}
	if others := held.Others(key); registered && len(others) > 0 && !held.HeldByOther(key) {
		refused = append(refused, &FencedError{fmt.Sprintf("%s %s: others are registered there and could write behind the migration's back: %s: shut these hosts down, take their registrations away (lunshift break-fence %s --yes), or let them (lunshift start %s --ignore-registrations)",
			role, address, list(others), volume, volume), lun.ErrConflict})
	}
	return refused, held, nil
}

// list names registrations, each once.
func list(all []lun.Registrant) string {
	var texts []string
	seen := map[string]bool{}
	for _, x := range all {
		text := fmt.Sprintf("key %#016x", x.Key)
		if x.Port != "" {
			text += " of " + x.Port
		}
		if !seen[text] {
			seen[text] = true
			texts = append(texts, text)
		}
	}
	const most = 8
	if n := len(texts); n > most {
		texts = append(texts[:most], fmt.Sprintf("and %d more", n-most))
	}
	return strings.Join(texts, ", ")
}

// fenced says what to do about a reservation of somebody else; another error stays as it is.
func fenced(volume, role, address string, err error) error {
	var r *lun.ReservedError
	if !errors.As(err, &r) {
		return fmt.Errorf("%s %s: fence: %w", role, address, err)
	}
	who := "shut down the hosts that still use it directly, or take it from them"
	if isFenceKey(r.Key) {
		who = "another lunshift, or this one before its state directory was lost, migrates it: end that migration there, or if it is gone for good take it from it"
	}
	return &FencedError{fmt.Sprintf("%s %s is %v: %s (lunshift break-fence %s --yes)", role, address, r, who, volume), r}
}

// units are both sides that are open.
func (v *Volume) units() []*unit {
	var all []*unit
	for _, u := range []*unit{v.source, v.destination} {
		if u != nil {
			all = append(all, u)
		}
	}
	return all
}

// openFences brings the fences into the state that the record asks for, before anything is
// written.
func (v *Volume) openFences(ctx context.Context, r *state.Record) error {
	if Phase(r.Phase).Moving() {
		if !r.Fenced {
			r.Fenced = true
			if err := v.store.PutRecords(ctx, *r); err != nil {
				return v.errorf("write its state: %w", err)
			}
		}
		return v.fence(ctx)
	}
	for _, u := range v.units() {
		_, held, err := CheckFence(ctx, v.cfg.Name, u.role, u.address, u.Device, v.key, false)
		switch {
		case errors.Is(err, lun.ErrUnsupported):
			continue
		case err != nil:
			return v.errorf("%s: ask for reservations: %w", u.role, err)
		case held.Locked:
			u.setFence(FenceLocked)
		case held.HeldByOther(v.key) && isFenceKey(held.Key):
			return v.errorf("%w", fenced(v.cfg.Name, u.role, u.address, &lun.ReservedError{Reservations: held}))
		case held.HeldByOther(v.key):
			v.log.Warnf("%s %s is %v: writes fail there, and start is refused", u.role, u.address, &lun.ReservedError{Reservations: held})
		case len(held.Others(v.key)) > 0:
			v.log.Warnf("%s %s: others are registered there: %s", u.role, u.address, list(held.Others(v.key)))
		}
		// A start that was cut short may have left this one.
		if err := v.unfence(ctx, u); err != nil {
			return v.errorf("%w", err)
		}
	}
	r.Fenced = false
	return nil
}

// fence takes both fences.
func (v *Volume) fence(ctx context.Context) error {
	for _, u := range v.units() {
		if err := v.fenceUnit(ctx, u); err != nil {
			return v.errorf("%w", err)
		}
	}
	return nil
}

// giveBack gives the fences up after a start that failed with err.
func (v *Volume) giveBack(ctx context.Context, err error) error {
	for _, u := range v.units() {
		if e := v.unfence(context.WithoutCancel(ctx), u); e != nil {
			err = fmt.Errorf("%w; %w", err, e)
		}
	}
	return err
}

func (v *Volume) fenceUnit(ctx context.Context, u *unit) error {
	f, ok := u.Device.(lun.Fencer)
	err := error(lun.ErrUnsupported)
	if ok {
		err = f.Fence(ctx, v.key)
	}
	switch {
	case err == nil:
		if _, remote := u.Device.(lun.Reachable); remote {
			u.setFence(FenceReserved)
		} else {
			u.setFence(FenceLocked)
		}
	case errors.Is(err, lun.ErrUnsupported):
		if u.setFence(FenceNone) {
			v.log.Warnf("%s %s has no persistent reservations: nothing keeps others from writing to it; take their access away at the array", u.role, u.address)
		}
	case errors.Is(err, lun.ErrConflict):
		u.setFence(FenceLost)
		return fenced(v.cfg.Name, u.role, u.address, err)
	default:
		return fmt.Errorf("%s %s: %w", u.role, u.address, err)
	}
	return nil
}

// unfence gives a fence up, whether or not it is held.
func (v *Volume) unfence(ctx context.Context, u *unit) error {
	f, ok := u.Device.(lun.Fencer)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, unfenceLimit)
	defer cancel()
	var err error
	if d, ok := u.Device.(lun.Reachable); ok {
		err = d.Unreachable() // nobody waits for an array that is gone
	}
	if err == nil {
		err = f.Unfence(ctx, v.key)
	}
	if err != nil && !errors.Is(err, lun.ErrUnsupported) {
		return fmt.Errorf("%s %s: its fence stays: give it up with lunshift break-fence %s --yes: %w", u.role, u.address, v.cfg.Name, err)
	}
	if u.fence() != FenceLocked {
		u.setFence(FenceNone)
	}
	return nil
}

// checkOthers refuses a start while others may write to the units. It gives the keys of those
// that are put up with, by role.
func (v *Volume) checkOthers(ctx context.Context, ignore bool) (accepted map[string][]uint64, _ error) {
	accepted = map[string][]uint64{}
	var refused []error
	for _, u := range v.units() {
		reasons, held, err := CheckFence(ctx, v.cfg.Name, u.role, u.address, u.Device, v.key, !ignore)
		switch {
		case errors.Is(err, lun.ErrUnsupported):
			continue
		case err != nil:
			return nil, v.errorf("%s: ask for reservations: %w", u.role, err)
		}
		refused = append(refused, reasons...)
		if others := held.Others(v.key); ignore && len(reasons) == 0 && len(others) > 0 {
			v.log.Warnf("%s %s: started although others are registered there, who can write behind the migration's back: %s", u.role, u.address, list(others))
			for _, x := range others {
				accepted[u.role] = append(accepted[u.role], x.Key)
			}
		}
	}
	if len(refused) == 0 {
		return accepted, nil
	}
	return nil, v.errorf("start refused: %w", &FencedError{oneLine(refused).Error(), lun.ErrConflict})
}

// runGuard begins to look after the fences, and gives them up once the volume is rolled back;
// the caller holds step.
func (v *Volume) runGuard() {
	v.guard = begin(func(ctx context.Context) {
		for {
			if v.Phase() == RolledBack {
				v.fault("registrations", nil)
				v.keepReleasing(ctx, v.units(), func() {})
				return
			}
			v.refence(ctx)
			v.lookForOthers(ctx)
			if !v.untilNextLook(ctx) {
				return
			}
		}
	})
}

// stopGuard ends it and waits for it, or returns ctx's error when that ends first: an array
// that hangs may hold it up for a moment. The caller holds step.
func (v *Volume) stopGuard(ctx context.Context) error {
	if err := v.guard.end(ctx); err != nil {
		return v.errorf("who looks after the fences did not stop: %w", err)
	}
	v.guard = nil
	return nil
}

// untilNextLook waits until the fences are to be looked at; false says that ctx ended.
func (v *Volume) untilNextLook(ctx context.Context) bool {
	v.mu.Lock()
	changed := v.changed
	v.mu.Unlock()
	every := v.cfg.fenceEvery
	if every == 0 {
		every = fenceEvery
	}
	pause := time.NewTimer(min(fencePause, every))
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-ctx.Done():
		return false
	}
	var told [2]<-chan struct{}
	for i, u := range v.units() {
		if f, ok := u.Device.(lun.Fencer); ok {
			told[i] = f.Disturbed()
		}
	}
	round := time.NewTimer(every)
	defer round.Stop()
	select {
	case <-round.C:
	case <-changed:
	case <-told[0]:
	case <-told[1]:
	case <-ctx.Done():
		return false
	}
	return true
}

// refence takes again what was lost, unless somebody else has it: that is a fault until it
// is free. A unit that cannot be reached is shown as such, and asked once it is back.
func (v *Volume) refence(ctx context.Context) {
	var faults []error
	for _, u := range v.units() {
		if err := v.fenceUnit(ctx, u); err != nil && !errors.Is(err, lun.ErrUnavailable) {
			faults = append(faults, err)
		}
	}
	if ctx.Err() != nil {
		return
	}
	if len(faults) == 0 {
		v.fault("fence", nil)
		return
	}
	v.fault("fence", oneLine(faults))
}

// lookForOthers raises a fault while somebody is registered on a fenced unit who was not
// accepted at the start: he gets no conflict, and what he writes is written behind the
// migration's back. Who cannot be asked now is asked in the next round.
func (v *Volume) lookForOthers(ctx context.Context) {
	v.mu.Lock()
	accepted := v.record.AcceptedKeys
	v.mu.Unlock()
	var faults []error
	unknown := false
	for _, u := range v.units() {
		f, ok := u.Device.(lun.Fencer)
		if !ok || u.fence() != FenceReserved {
			continue
		}
		held, err := f.Fenced(ctx)
		if err != nil {
			unknown = true
			continue
		}
		others := slices.DeleteFunc(held.Others(v.key), func(x lun.Registrant) bool { return slices.Contains(accepted[u.role], x.Key) })
		if len(others) > 0 {
			faults = append(faults, fmt.Errorf("%s %s: others are registered there since the start and can write behind the migration's back: %s: shut these hosts down and take their registrations away (lunshift break-fence %s --yes)",
				u.role, u.address, list(others), v.cfg.Name))
		}
	}
	switch {
	case ctx.Err() != nil:
	case len(faults) > 0:
		v.fault("registrations", oneLine(faults))
	case !unknown:
		v.fault("registrations", nil)
	}
}

// release gives both fences up after the cutover was recorded. It returns once the
// destination is free, for initiators go there next. The source may be gone for good, so
// the channel is closed when that was tried once; what failed is tried again until
// stopGuard. The caller holds step.
func (v *Volume) release(ctx context.Context) <-chan struct{} {
	pending := []*unit{v.source}
	if v.unfence(ctx, v.destination) != nil {
		pending = append(pending, v.destination)
	}
	tried := make(chan struct{})
	v.guard = begin(func(ctx context.Context) {
		v.keepReleasing(ctx, pending, sync.OnceFunc(func() { close(tried) }))
	})
	return tried
}

// keepReleasing gives the fences of units up, and tries again what failed until ctx ends. It
// calls tried after each attempt.
func (v *Volume) keepReleasing(ctx context.Context, pending []*unit, tried func()) {
	for {
		var errs []error
		var left []*unit
		for _, u := range pending {
			if err := v.unfence(ctx, u); err != nil {
				errs, left = append(errs, err), append(left, u)
			}
		}
		pending = left
		v.released(ctx, errs)
		tried()
		if len(errs) == 0 || !v.untilNextLook(ctx) {
			return
		}
	}
}

// released notes that the fences are given up, or what failed.
func (v *Volume) released(ctx context.Context, errs []error) {
	err := errors.Join(errs...)
	if err == nil {
		err = v.saveReleased(ctx)
	}
	if err != nil {
		err = oneLine([]error{err})
	} else {
		v.showAccess()
	}
	v.fault("fence", err)
}

func (v *Volume) saveReleased(ctx context.Context) error {
	released := func(r *state.Record) { r.Fenced = false }
	if v.source != nil {
		return v.save(ctx, released)
	}
	r := v.record
	released(&r)
	if err := v.store.PutRecords(ctx, r); err != nil {
		return v.errorf("write its state: %w", err)
	}
	v.mu.Lock()
	v.record = r
	v.mu.Unlock()
	return nil
}

// releaseLate gives up the fences of a volume that was cut over just before the service
// ended. A unit that could not be opened is nil.
func (v *Volume) releaseLate(ctx context.Context) {
	if !v.record.Fenced {
		return
	}
	var errs []error
	for _, u := range []*unit{
		{Device: v.cfg.Source, role: "source", address: v.cfg.SourceAddress},
		{Device: v.cfg.Destination, role: "destination", address: v.cfg.DestinationAddress},
	} {
		if u.Device == nil {
			errs = append(errs, fmt.Errorf("%s %s could not be opened to give its fence up: do it with lunshift break-fence %s --yes once it is back", u.role, u.address, v.cfg.Name))
			continue
		}
		if err := v.unfence(ctx, u); err != nil {
			errs = append(errs, err)
		}
	}
	v.released(ctx, errs)
}

// Broken says for each side why the reservations of others are still there, as far as they
// are; nil where they are gone.
type Broken struct{ Source, Destination error }

// Err is why either is still there.
func (b Broken) Err() error { return errors.Join(b.Source, b.Destination) }

// BreakFence takes every reservation and registration of others away from source and
// destination, from the one also where the other cannot be reached. The fences of a volume
// that is migrating, synced or rolling back are then its own. In phase cutover the volume has no units, so
// they must be given; nil is one that could not be opened. The error is ErrClosed.
func (v *Volume) BreakFence(ctx context.Context, source, destination lun.Device) (Broken, error) {
	v.step.Lock()
	defer v.step.Unlock()
	if v.closed {
		return Broken{}, v.errorf("break the fence: %w", lun.ErrClosed)
	}
	if v.Phase() != Cutover {
		source, destination = v.source.Device, v.destination.Device
	}
	broken := breakFences(ctx, v.key, false, source, destination)
	if broken.Err() == nil && len(v.current().AcceptedKeys) > 0 {
		if err := v.save(ctx, func(r *state.Record) { r.AcceptedKeys = nil }); err != nil {
			return broken, v.errorf("write its state: %w", err)
		}
	}
	switch v.Phase() {
	case Cutover:
		if broken.Err() == nil && source != nil && destination != nil {
			v.released(ctx, nil)
		}
	case Migrating, Synced, RollingBack:
		v.refence(ctx)
		v.lookForOthers(ctx)
	}
	return broken, nil
}

// BreakFence is Volume.BreakFence for a volume that is not open. The fences of one that is
// migrating, synced or rolling back are held by its key from then on, until Open takes them over.
func BreakFence(ctx context.Context, store *state.Store, volume string, source, destination lun.Device) (Broken, error) {
	key, err := FenceKey(ctx, store, volume)
	if err != nil {
		return Broken{}, err
	}
	record, _, err := store.Record(volume)
	if err != nil {
		return Broken{}, fmt.Errorf("volume %s: %w", volume, err)
	}
	hold := Phase(record.Phase).Moving()
	broken := breakFences(ctx, key, hold, source, destination)
	if broken.Err() == nil && source != nil && destination != nil && len(record.AcceptedKeys) > 0 {
		record.AcceptedKeys = nil
		if err := store.PutRecords(ctx, record); err != nil {
			return broken, fmt.Errorf("volume %s: write its state: %w", volume, err)
		}
	}
	return broken, nil
}

func breakFences(ctx context.Context, key uint64, hold bool, source, destination lun.Device) (b Broken) {
	one := func(dev lun.Device) error {
		f, ok := dev.(lun.Fencer)
		if !ok {
			return nil
		}
		if d, ok := dev.(lun.Reachable); ok {
			if err := d.Unreachable(); err != nil {
				return err // nobody waits for an array that is gone
			}
		}
		err := f.BreakFence(ctx, key)
		if err == nil && hold {
			err = f.Fence(ctx, key)
		}
		if errors.Is(err, lun.ErrUnsupported) {
			return nil
		}
		return err
	}
	var sides sync.WaitGroup
	sides.Go(func() { b.Source = one(source) })
	sides.Go(func() { b.Destination = one(destination) })
	sides.Wait()
	return b
}
