package control

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	Source      BreakSide `json:"source"`
	Destination BreakSide `json:"destination"`
}

// BreakSide is the outcome on one logical unit.
type BreakSide struct {
	FenceReport
	// Broken tells whether nothing of others is left there; false as well where there
	// can be nothing, which Means says.
	Broken bool `json:"broken"`
	// Error says why what others had is still there; Means is empty then.
	Error string `json:"error,omitempty"`
}

func (b BreakSide) String() string {
	switch {
	case b.Error != "":
		return "could not be reached, and what others hold there stays: " + b.Error
	case b.Means != "reservations":
		return "has no persistent reservations"
	case b.Own:
		return "reserved by this volume"
	case b.Type != "":
		return fmt.Sprintf("reserved (%s) by %s", b.Type, b.Holder)
	}
	return "free"
}

func (r BreakReport) sides() []breakRole {
	return []breakRole{{"source", r.Source}, {"destination", r.Destination}}
}

type breakRole struct {
	role string
	BreakSide
}

// Err is nil where nothing of others is left on either side.
func (r BreakReport) Err() error {
	var errs []error
	for _, side := range r.sides() {
		if side.Error != "" {
			errs = append(errs, fmt.Errorf("%s: %s", side.role, side.Error))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return &Error{Failed, fmt.Sprintf("volume %s: what others hold was not broken everywhere: %s: do it again once the array is back", r.Name, oneLine(errors.Join(errs...)))}
}

// WriteBreak shows the outcome, a line for each side.
func WriteBreak(w io.Writer, r BreakReport) error {
	for _, side := range r.sides() {
		if _, err := fmt.Fprintf(w, "%s: %s %v\n", r.Name, side.role, side); err != nil {
			return err
		}
	}
	return nil
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
		refused, held, err := proxy.CheckFence(ctx, v.Name, side.role, side.address, side.dev, key, idle(r.Phase))
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
func (s *Service) breakFence(ctx context.Context, e *entry) (BreakReport, error) {
	e.mu.Lock()
	volume, units := e.volume, e.units
	e.mu.Unlock()
	if len(units) == 2 {
		return s.breakUnits(ctx, e, volume, units[0], units[1], nil)
	}
	// Sessions of their own, for the volume may be opened meanwhile.
	source, destination, unopened := s.openUnits(ctx, e.settings(), "/break-fence")
	report, err := s.breakUnits(ctx, e, volume, source, destination, unopened)
	if err = errors.Join(err, closeUnits([]lun.Device{source, destination})); err != nil || volume != nil || unopened != nil {
		return report, err
	}
	// It need not wait until the volumes that are not open are tried again.
	if err := s.openEntry(ctx, e); err != nil {
		s.log.WithError(err).Warnf("volume %s: not served yet", e.name)
	} else if _, err := e.open(); err == nil {
		s.log.Infof("volume %s: its logical units are free of others, it is served", e.name)
	}
	return report, nil
}

// breakUnits is breakFence for units of which one is nil that could not be opened.
func (s *Service) breakUnits(ctx context.Context, e *entry, volume Volume, source, destination lun.Device, unopened error) (report BreakReport, err error) {
	report.Name = e.name
	key, err := proxy.FenceKey(ctx, s.store, e.name)
	if err != nil {
		return report, err
	}
	var broken proxy.Broken
	if volume != nil {
		broken, err = volume.BreakFence(ctx, source, destination)
	} else {
		broken, err = proxy.BreakFence(ctx, s.store, e.name, source, destination)
	}
	if err != nil {
		return report, err
	}
	reasons := lines(unopened)
	for _, side := range []struct {
		dev lun.Device
		err error
		to  *BreakSide
	}{{source, broken.Source, &report.Source}, {destination, broken.Destination, &report.Destination}} {
		if side.dev == nil && len(reasons) > 0 {
			side.err, reasons = errors.New(reasons[0]), reasons[1:]
		}
		*side.to = breakSide(ctx, side.dev, key, side.err)
	}
	for _, side := range report.sides() {
		if side.Error != "" {
			s.log.Warnf("volume %s: %s %v", e.name, side.role, side)
		} else {
			s.log.Infof("volume %s: %s %v", e.name, side.role, side)
		}
	}
	return report, nil
}

// breakSide asks how a unit is after it was broken, unless that failed with err.
func breakSide(ctx context.Context, dev lun.Device, key uint64, err error) BreakSide {
	side := BreakSide{FenceReport: FenceReport{Others: []RegistrantReport{}}}
	var held lun.Reservations
	if err == nil {
		f, ok := dev.(lun.Fencer)
		if err = lun.ErrUnsupported; ok {
			held, err = f.Fenced(ctx)
		}
	}
	switch {
	case errors.Is(err, lun.ErrUnsupported):
		side.Means = "none"
	case err != nil:
		side.Error = oneLine(err)
	default:
		side.FenceReport, side.Broken = fenceReport(held, key), true
	}
	return side
}

func (s *Service) answerBreakFence(r *http.Request) (any, error) {
	e, err := s.entry(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	s.logStep(r)
	s.log.Warnf("volume %s: takes the reservations and registrations of others away from source and destination", e.name)
	var report BreakReport
	err = s.ask(r, step{name: "break-fence", unwritten: true, do: func(ctx context.Context) (text string, err error) {
		if report, err = s.breakFence(ctx, e); err == nil {
			err = report.Err()
		}
		return fmt.Sprintf("source %v; destination %v", report.Source, report.Destination), err
	}}, e)
	if report.Err() != nil {
		return report, nil // which says what was not broken
	}
	return report, err
}

// BreakFence takes the reservations and registrations of others away from the source and
// the destination of a volume. Where it could be done for one side only, the report says
// so, and the error is nil.
func (c *Client) BreakFence(ctx context.Context, volume string) (BreakReport, error) {
	var report BreakReport
	return report, c.onVolume(ctx, http.MethodPost, volume, "/break-fence", nil, &report)
}
