package proxy

import (
	"context"
	"errors"
	"fmt"

	"lunshift/lun"
	"lunshift/state"
	"lunshift/target"
)

// Identity says whose identity initiators find on the volume: vendor, product, revision,
// serial number and every designator of the logical unit.
type Identity string

// The identities. The empty one is IdentityOwn.
const (
	// IdentityOwn: one made from IQN and LUN.
	IdentityOwn Identity = "own"
	// IdentitySource: the source's. In phase ready the volume is one more path to it.
	IdentitySource Identity = "source"
	// IdentityDestination: the destination's. From the cutover on the destination's own paths
	// are the way to what initiators had here.
	IdentityDestination Identity = "destination"
)

func (i Identity) orOwn() Identity {
	if i == "" {
		return IdentityOwn
	}
	return i
}

// Present gives what initiators would find by the identity; nil where it is the volume's own.
// It fails with a Refusal where that device has none.
func (i Identity) Present(source, destination lun.Info) (*state.Presented, error) {
	of := source.Identity
	switch i.orOwn() {
	case IdentityOwn:
		return nil, nil
	case IdentitySource:
	case IdentityDestination:
		of = destination.Identity
	default:
		return nil, &Refusal{fmt.Sprintf("there is no identity %q", string(i))}
	}
	if of == nil {
		return nil, i.Refused()
	}
	return &state.Presented{From: string(i), Standard: of.Standard, Serial: of.Serial, Designators: of.Designators}, nil
}

// Refused is why a device cannot lend its identity.
func (i Identity) Refused() error {
	return &Refusal{fmt.Sprintf("identity = %q, but the %s has none that initiators could find elsewhere (no designator of a logical unit in VPD page 83h; files have none): set identity = \"own\", or name a SCSI logical unit", string(i), string(i))}
}

// presentedBy is whose identity p is.
func presentedBy(p *state.Presented) Identity {
	if p == nil {
		return IdentityOwn
	}
	return Identity(p.From)
}

// inquired is the identity for the target; nil for the volume's own.
func inquired(p *state.Presented) *lun.Identity {
	if p == nil {
		return nil
	}
	return &lun.Identity{Standard: p.Standard, Serial: p.Serial, Designators: p.Designators}
}

// onSource tells whether all is on the source and nothing is being moved.
func onSource(r *state.Record) bool { return Phase(r.Phase) == Ready || Phase(r.Phase) == RolledBack }

// present takes up the identity for a record: by the configuration while nothing is moved,
// else by the record, as initiators keep what they found at the start.
func (v *Volume) present(r *state.Record, s, d lun.Info) error {
	if onSource(r) {
		p, err := v.cfg.Identity.Present(s, d)
		if err != nil {
			return v.errorf("%w", err)
		}
		r.Presented = p
		return nil
	}
	if want, is := v.cfg.Identity.orOwn(), presentedBy(r.Presented); want != is {
		v.log.Warnf("identity = %q in the configuration, but the migration was started with %q, which stays until its end", string(want), string(is))
	}
	return nil
}

// setIdentity changes whose identity initiators find, which they are told. Once the migration
// was started it is refused: their other paths may lead to what is stale by then.
func (v *Volume) setIdentity(i Identity) error {
	ctx, cancel := context.WithTimeout(context.Background(), holdLimit)
	defer cancel()
	v.mu.Lock()
	is := presentedBy(v.record.Presented)
	v.mu.Unlock()
	if i = i.orOwn(); i == is || v.Phase() == Cutover {
		return nil
	}
	p, err := i.Present(v.source.Info(), v.destination.Info())
	if err != nil {
		return v.errorf("%w", err)
	}
	late := false
	err = v.save(ctx, func(r *state.Record) {
		if late = !onSource(r); !late {
			r.Presented = p
		}
	})
	if err != nil {
		return err
	}
	if late {
		return v.errorf("identity = %q: the migration was started with %q, which initiators keep until it is over: set that, or roll back first", string(i), string(is))
	}
	defer v.showAccess()
	return v.cfg.Target.SetIdentity(v.cfg.IQN, v.cfg.LUN, inquired(p))
}

// access is how well initiators do to come this way rather than another that they have to
// what has the same identity.
func access(r *state.Record) target.AccessState {
	switch presentedBy(r.Presented) {
	case IdentitySource:
		// The array's own paths are shorter. Under the fence they are no way, and what they
		// lead to is stale.
		if onSource(r) && !r.Fenced {
			return target.ActiveNonOptimized
		}
	case IdentityDestination:
		if Phase(r.Phase) == Cutover {
			return target.Unavailable
		}
	}
	return target.ActiveOptimized
}

// showAccess tells initiators how it stands by the record. It waits for no command.
func (v *Volume) showAccess() {
	v.mu.Lock()
	r := v.record
	v.mu.Unlock()
	if err := v.cfg.Target.SetAccess(v.cfg.IQN, v.cfg.LUN, access(&r)); err != nil && !errors.Is(err, target.ErrNoUnit) {
		v.log.WithError(err).Error("initiators are not told of the access state")
	}
}

// shared tells whether initiators may be writing to the source on its own paths too, past the
// locks of the volume.
func (v *Volume) shared() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return presentedBy(v.record.Presented) == IdentitySource && onSource(&v.record)
}

// updateShared is Update of a source that is shared: the array alone can keep other writes
// out. Where it cannot the command is refused rather than lost among them. The caller is
// inside the gate and holds e.
func (v *Volume) updateShared(ctx context.Context, e lun.Extent, modify func([]byte) error) error {
	dev, ok := v.source.Device.(lun.Swapper)
	if !ok {
		return fmt.Errorf("%w: hosts use the source's own paths as well, and it cannot compare and write in one step", lun.ErrUnsupported)
	}
	return v.write(ctx, e, nil, func(ctx context.Context, u *unit) error {
		var refused error // by modify, which is no fault of the unit
		err := lun.UpdateShared(ctx, dev, e, func(blocks []byte) error {
			refused = modify(blocks)
			return refused
		})
		if refused != nil {
			return refused
		}
		return u.note(err)
	})
}
