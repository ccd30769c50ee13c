package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
)

// entry is a volume of the configuration.
type entry struct {
	name string

	// stepping is held by a step that changes who serves what, with its hooks. Lock order: before
	// those of the volume.
	stepping turn

	// opening is held while the volume is opened, changed or dropped. Lock order: before mu.
	opening sync.Mutex

	mu   sync.Mutex // protects what follows
	conf conf.Volume
	// dropped is set once the configuration has it no more: it is not opened again.
	dropped bool
	giveUp  context.CancelFunc // ends an attempt to open it; nil while there is none
	volume  Volume             // nil while it is not open
	units   []lun.Device
	// failure says why volume is nil, known what is told of it meanwhile.
	failure error
	known   proxy.Status
	removed bool
	// unsure is set where removed may not be true: no unit could be opened to tell.
	unsure bool
	// faults are those of what the service does with the volume: a start by itself ("start"), a
	// hook ("hook").
	faults map[string]string
	// following are the phases whose hook is running.
	following map[proxy.Phase]bool
	// opened is closed when volume is set or removed; nil while nobody waits for it.
	opened chan struct{}
}

func newEntry(v conf.Volume) *entry { return &entry{name: v.Name, conf: v} }

// settings is the volume's part of the configuration that is in effect.
func (e *entry) settings() conf.Volume {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.conf
}

// open is the volume, or an error that says why it is not served.
func (e *entry) open() (Volume, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.volume == nil {
		return nil, &Error{Failed, fmt.Sprintf("not served yet: %v", oneLine(e.failure))}
	}
	return e.volume, nil
}

func (e *entry) isRemoved() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.removed
}

// isGone tells whether the volume is removed for sure.
func (e *entry) isGone() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.removed && !e.unsure
}

func (e *entry) status() proxy.Status {
	e.mu.Lock()
	volume, status := e.volume, e.known
	var mine []string
	for _, kind := range append([]string{"start"}, allHooks...) {
		if text := e.faults[kind]; text != "" {
			mine = append(mine, text)
		}
	}
	e.mu.Unlock()
	if volume != nil {
		status = volume.Status()
	}
	if len(mine) > 0 {
		if status.Degraded {
			mine = append([]string{status.DegradedReason}, mine...)
		}
		status.Degraded, status.DegradedReason = true, strings.Join(mine, "; ")
	}
	return status
}

// fail keeps the last failure of a kind for the status; nil says that it is over.
func (e *entry) fail(kind string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.faults == nil {
		e.faults = map[string]string{}
	}
	if delete(e.faults, kind); err != nil {
		e.faults[kind] = oneLine(err)
	}
}

// forgetHooks takes the failures of hooks away; mu is held.
func (e *entry) forgetHooks() {
	for _, name := range allHooks {
		delete(e.faults, name)
	}
}

// wait returns once the volume is in the phase or past it, or removed. It waits for a
// volume that is not open yet, unless its recorded phase is enough and need not
// be served.
func (e *entry) wait(ctx context.Context, phase proxy.Phase, served bool) error {
	for {
		e.mu.Lock()
		volume, recorded, gone := e.volume, e.known.Phase, e.removed && !e.unsure
		if e.dropped {
			e.mu.Unlock()
			return errDropped
		}
		if volume == nil && e.opened == nil {
			e.opened = make(chan struct{})
		}
		opened := e.opened
		e.mu.Unlock()
		switch {
		case gone:
			_, err := reached(e.name, proxy.Cutover, phase)
			return err
		case volume != nil:
			return volume.Wait(ctx, phase)
		}
		if over, err := reached(e.name, recorded, phase); err != nil || over && !served {
			return err
		}
		select {
		case <-opened:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// remove forgets the volume, leaves the mark and gives the units up. It tells
// whether that is done by this call.
func (e *entry) remove(ctx context.Context, mark state.Record) (bool, error) {
	if e.isRemoved() {
		return false, nil
	}
	volume, err := e.open()
	if err != nil {
		return false, err
	}
	if err := volume.Remove(ctx, mark); err != nil {
		return false, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.removed = true
	units := e.units
	e.units = nil
	return true, closeUnits(units)
}

// errDropped is of a volume that was taken out of the configuration.
var errDropped = &Error{Unknown, "the volume was taken out of the configuration"}

// change takes the settings up that count at once, from what the file has now, and gives the
// keys of those and of the others. A volume that is not open takes all of them.
func (e *entry) change(to conf.Volume) (changed, restart []string, err error) {
	e.mu.Lock()
	same, rebuilt := len(e.conf.Changes(to)) == 0, isUnknown(e.failure)
	if !same && !rebuilt && e.giveUp != nil {
		e.giveUp() // by the old settings
	}
	e.mu.Unlock()
	switch {
	case same: // nothing to wait for
		return nil, nil, nil
	case !rebuilt:
		e.opening.Lock()
	case !e.opening.TryLock(): // a rebuild takes its time, and is not to be lost
		return nil, nil, fmt.Errorf("volume %s: it is being adopted; reload again when that is over", e.name)
	}
	defer e.opening.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	next := to
	if e.volume != nil && !e.removed {
		next = e.conf
		next.Autostart, next.Verify, next.VerifySample, next.Overwrite = to.Autostart, to.Verify, to.VerifySample, to.Overwrite
		next.Seeded = to.Seeded
		if idle(e.volume.Status().Phase) {
			next.Mirror = to.Mirror // it counts from the start on
		}
		next.Copy, next.Initiators, next.PortalGroups, next.Redirect = to.Copy, to.Initiators, to.PortalGroups, to.Redirect
		next.Identity = to.Identity
		next.RedirectFor, next.LogoutTimeout = to.RedirectFor, to.LogoutTimeout
		next.Hooks = to.Hooks
	}
	changed, restart = e.conf.Changes(next), next.Changes(to)
	if len(changed) > 0 && e.volume != nil && !e.removed {
		if err := e.volume.Set(settingsOf(next)); err != nil {
			return nil, restart, err
		}
	}
	if slices.ContainsFunc(changed, func(key string) bool { return strings.HasPrefix(key, "hooks.") }) {
		e.forgetHooks() // of what is no more
	}
	e.conf = next
	return changed, restart, nil
}

// drop gives the volume up unless something is being moved, which is a proxy.PhaseError.
func (e *entry) drop(ctx context.Context) error {
	e.mu.Lock()
	if e.giveUp != nil {
		e.giveUp()
	}
	e.mu.Unlock()
	e.opening.Lock()
	defer e.opening.Unlock()
	e.mu.Lock()
	volume, units, phase := e.volume, e.units, e.known.Phase
	if e.removed {
		volume, phase = nil, removed
	}
	e.mu.Unlock()
	var err error
	if volume != nil {
		err = volume.Withdraw(ctx)
	} else if phase.Moving() {
		err = &proxy.PhaseError{Volume: e.name, Step: "to drop it", Phase: phase}
	}
	if errors.Is(err, proxy.ErrPhase) {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dropped, e.volume, e.units, e.failure = true, nil, nil, errDropped
	if e.opened != nil {
		close(e.opened)
		e.opened = nil
	}
	return errors.Join(err, closeUnits(units))
}

func (e *entry) close(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.volume == nil || e.removed {
		return nil
	}
	err := e.volume.Shutdown(ctx)
	if err != nil {
		err = fmt.Errorf("close volume %s: %w", e.name, err)
	}
	units := e.units
	e.units, e.volume, e.failure = nil, nil, errors.New("the service stops")
	return errors.Join(err, closeUnits(units))
}

// openUnits opens the units of a volume to serve it. Sessions are the service's own: a
// later process with the same state takes their place, and no other. What is opened for
// another purpose beside it names that.
func (s *Service) openUnits(ctx context.Context, v conf.Volume, purpose string) (source, destination lun.Device, err error) {
	id, err := s.store.Identity(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("volume %s: %w", v.Name, err)
	}
	return openUnits(ctx, s.config().Service, v, s.log, fmt.Sprintf("%x/%s%s", id, v.Name, purpose))
}

// openUnits opens source and destination of a volume at the same time. What could
// be opened is given even with an error, which has one line for each side that
// could not. Without the key of their sessions they are opened beside a service that may
// have them, for reading alone.
func openUnits(ctx context.Context, service conf.Service, v conf.Volume, log logrus.FieldLogger, sessions string) (source, destination lun.Device, err error) {
	readOnly := sessions == ""
	open := func(side string, u conf.Unit) (lun.Device, error) {
		key := sessions + "/" + side
		if readOnly {
			key = ""
		}
		device, err := lun.Open(ctx, u.Address, lun.Options{
			ReadOnly: readOnly, SessionKey: key, BlockSize: v.FileBlockSize,
			InitiatorName: service.InitiatorName, Secret: u.Secret.Reveal(), TargetSecret: u.TargetSecret.Reveal(),
			Sessions: v.Sessions, HeaderDigest: v.Digests, DataDigest: v.Digests,
			LoginTimeout: service.LoginTimeout, IOTimeout: service.IOTimeout,
			Log: log.WithField("volume", v.Name).WithField("unit", side),
		})
		if errors.Is(err, lun.ErrAuth) {
			err = fmt.Errorf("%w: correct the user in the URL, or the secret in %s_secret_file or %s", err, side, conf.SecretVariable(v.Name, side))
		}
		if err != nil {
			return nil, fmt.Errorf("volume %s: %s: %w", v.Name, side, err)
		}
		return device, nil
	}
	var group sync.WaitGroup
	var sourceErr, destinationErr error
	group.Go(func() { source, sourceErr = open("source", v.Source) })
	group.Go(func() { destination, destinationErr = open("destination", v.Destination) })
	group.Wait()
	return source, destination, errors.Join(sourceErr, destinationErr)
}

// closeUnits closes the units that are open, at the same time, as an array that hangs takes
// its time; the others are nil.
func closeUnits(units []lun.Device) error {
	errs := make([]error, len(units))
	var group sync.WaitGroup
	for i, u := range units {
		if u != nil {
			group.Go(func() { errs[i] = u.Close() })
		}
	}
	group.Wait()
	return errors.Join(errs...)
}

// claims tells which volume has which logical unit. Two addresses may lead to one
// unit, and a unit that two volumes move would lose data.
type claims struct {
	mu sync.Mutex // protects by
	by map[string]claim
}

// claim is one side of one volume.
type claim struct{ volume, side string }

// take claims both units of a volume, named by lun.Info.ID, or none.
func (c *claims) take(volume, source, destination string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by == nil {
		c.by = make(map[string]claim)
	}
	for side, id := range map[string]string{"source": source, "destination": destination} {
		if other, taken := c.by[id]; taken && other.volume != volume {
			return fmt.Errorf("volume %s: %s is the %s of volume %s under another address (%s): a logical unit belongs to one volume", volume, side, other.side, other.volume, id)
		}
	}
	c.by[source], c.by[destination] = claim{volume, "source"}, claim{volume, "destination"}
	return nil
}

func (c *claims) release(volume string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.by, func(_ string, by claim) bool { return by.volume == volume })
}

// oneLine joins the lines of an error.
func oneLine(err error) string {
	if err == nil {
		return ""
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}
