package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
)

// BreakReport is the outcome of breaking the fences of a volume.
type BreakReport struct {
	Name string `json:"name"`
	// Source and Destination are how the units are now.
	Source      FenceReport `json:"source"`
	Destination FenceReport `json:"destination"`
}

// FenceReport is who may write to a logical unit.
type FenceReport struct {
	// Means is "reservations", "lock" (a file or a block device of this host, locked while
	// it is open), or "none"; empty where it is not known.
	Means string `json:"means"`
	// Type is the persistent reservation that is held, Holder its holder; empty without.
	Type   string `json:"type,omitempty"`
	Holder string `json:"holder,omitempty"`
	// Own tells whether it is this volume's.
	Own bool `json:"own"`
	// Others are the registrations of others.
	Others []RegistrantReport `json:"others"`
}

// RegistrantReport is a registration.
type RegistrantReport struct {
	Key string `json:"key"`
	// Initiator is the initiator port, where the device tells.
	Initiator string `json:"initiator,omitempty"`
}

func fenceReport(held lun.Reservations, key uint64) FenceReport {
	r := FenceReport{Means: "reservations", Others: []RegistrantReport{}}
	if held.Locked {
		r.Means = "lock"
	}
	if held.Type != 0 {
		r.Type, r.Holder, r.Own = lun.ReservationType(held.Type), held.Holder(), held.Key == key
	}
	for _, x := range held.Others(key) {
		r.Others = append(r.Others, RegistrantReport{fmt.Sprintf("%#016x", x.Key), x.Port})
	}
	return r
}

// inspectFences adds who may write to the units, and what a start would refuse.
func (r *VolumeReport) inspectFences(ctx context.Context, v conf.Volume, source, destination lun.Device, key uint64) {
	for _, side := range []struct {
		role, address string
		dev           lun.Device
		report        *UnitReport
	}{
		{"source", v.Source.Address, source, &r.Source},
		{"destination", v.Destination.Address, destination, &r.Destination},
	} {
		refused, held, err := proxy.CheckFence(ctx, v.Name, side.role, side.address, side.dev, key, r.Phase == proxy.Ready)
		if errors.Is(err, lun.ErrUnsupported) {
			side.report.Fence = FenceReport{Means: "none", Others: []RegistrantReport{}}
			continue
		}
		if err != nil {
			*r = r.refuse("volume %s: %s: ask for reservations: %s", v.Name, side.role, oneLine(err))
			continue
		}
		side.report.Fence = fenceReport(held, key)
		for _, e := range refused {
			*r = r.refuse("volume %s: %s", v.Name, oneLine(e))
		}
	}
}

// warnFences says which units nobody can be kept away from.
func (r *VolumeReport) warnFences() {
	for _, side := range []struct {
		role string
		unit UnitReport
	}{{"source", r.Source}, {"destination", r.Destination}} {
		switch fence := side.unit.Fence; {
		case fence.Means == "none":
			r.Warnings = append(r.Warnings, fmt.Sprintf("volume %s: the %s has no persistent reservations: nothing keeps a host from writing to it behind the migration's back; take the access of all others away at the array", r.Name, side.role))
		case fence.Means == "lock" && !strings.HasPrefix(side.unit.ID, "file:"):
			r.Warnings = append(r.Warnings, fmt.Sprintf("volume %s: the %s is a block device, which is locked on this host alone: take the access of all other hosts away at the array", r.Name, side.role))
		}
	}
}

// breakFence takes the reservations and registrations of others away from both units, be
// the volume served or not.
func (s *Service) breakFence(ctx context.Context, e *entry) (report BreakReport, err error) {
	report.Name = e.name
	e.mu.Lock()
	volume, units := e.volume, e.units
	e.mu.Unlock()
	var source, destination lun.Device
	if len(units) == 2 {
		source, destination = units[0], units[1]
	} else {
		// Sessions of their own, for the volume may be opened meanwhile.
		source, destination, err = s.openUnits(ctx, e.settings(), "/break-fence")
		defer func() { err = errors.Join(err, closeUnits([]lun.Device{source, destination})) }()
		if err != nil && (source == nil && destination == nil || volume != nil) {
			return report, err
		}
	}
	unopened := err
	if volume != nil {
		err = volume.BreakFence(ctx, source, destination)
	} else {
		err = proxy.BreakFence(ctx, s.store, e.name, source, destination)
	}
	if err = errors.Join(err, unopened); err != nil {
		return report, err
	}
	key, err := proxy.FenceKey(ctx, s.store, e.name)
	if err != nil {
		return report, err
	}
	for dev, to := range map[lun.Device]*FenceReport{source: &report.Source, destination: &report.Destination} {
		*to = FenceReport{Means: "none", Others: []RegistrantReport{}}
		f, ok := dev.(lun.Fencer)
		if !ok {
			continue
		}
		held, err := f.Fenced(ctx)
		if errors.Is(err, lun.ErrUnsupported) {
			continue
		}
		if err != nil {
			return report, err
		}
		*to = fenceReport(held, key)
	}
	return report, nil
}

func (s *Service) answerBreakFence(r *http.Request) (any, error) {
	e, err := s.entry(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	report, err := s.breakFence(s.running, e)
	if err == nil {
		s.logStep(r)
	}
	return report, err
}

// BreakFence takes the reservations and registrations of others away from the source and
// the destination of a volume.
func (c *Client) BreakFence(ctx context.Context, volume string) (BreakReport, error) {
	var report BreakReport
	return report, c.onVolume(ctx, http.MethodPost, volume, "/break-fence", nil, &report)
}
