package control

import (
	"errors"
	"fmt"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

// removed is the phase in the record of a volume that was removed while the
// configuration still had it. Such a volume must not begin anew by itself: its source
// is stale and its destination in use.
const removed = "removed"

// errRemoved is why such a volume is not served.
var errRemoved = errors.New("was cut over and removed; delete its [[volume]] from the configuration")

// errUnsure is errRemoved where no unit could be opened that would tell. Such a volume
// is tried again, and nobody is told that its migration is done.
var errUnsure = fmt.Errorf("%w (its logical units cannot be opened; another pair is served once they can)", errRemoved)

// takeAnew lets the name of a removed volume be used for another pair of units. The
// same units, or units that cannot be opened, give errRemoved.
func (s *Service) takeAnew(mark state.Record, source, destination lun.Device, failure error) error {
	if err := sameUnits(mark, source, destination, failure); err != nil {
		return fmt.Errorf("volume %s: %w", mark.Volume, err)
	}
	return s.store.Forget(mark.Volume)
}

// sameUnits gives errRemoved for units that the mark stands for, and errUnsure where
// failure, that of opening them, leaves it open. A unit that was not opened is nil.
func sameUnits(mark state.Record, source, destination lun.Device, failure error) error {
	switch {
	case source != nil && source.Info().ID == mark.SourceID, destination != nil && destination.Info().ID == mark.DestinationID:
		return errRemoved
	case failure != nil:
		return errUnsure
	}
	return nil
}

func (s *Service) foreign(name, source, destination string) error {
	records, err := s.store.Records()
	if err != nil {
		return err
	}
	return foreign(records, name, source, destination)
}

// foreign refuses units whose migration the state has under another name: a volume
// that was renamed would otherwise begin anew with a stale source. The destination
// of a volume that is cut over may move on, as the source of another.
func foreign(records []state.Record, name, source, destination string) error {
	for _, r := range records {
		phase := proxy.Phase(r.Phase)
		if r.Volume == name || idle(phase) {
			continue
		}
		moving := phase.Moving()
		switch {
		case source == r.SourceID || destination == r.DestinationID:
		case moving && (source == r.DestinationID || destination == r.SourceID):
		default:
			continue
		}
		hint := fmt.Sprintf("forget that one first (lunshift remove %s)", r.Volume)
		if moving {
			hint = "give the volume its name back"
		}
		return fmt.Errorf("volume %s: the state has volume %s with these logical units in phase %s: %s", name, r.Volume, r.Phase, hint)
	}
	return nil
}

// gone is the status of a volume that is cut over and removed, or whose
// [[volume]] was deleted after its cutover; false for every other name.
func (s *Service) gone(name string) (proxy.Status, bool) {
	status := proxy.Status{Name: name, Phase: proxy.Cutover, Sessions: []target.SessionInfo{}, Reservation: target.Unreserved(),
		Source: proxy.UnitStatus{State: "released"}, Destination: proxy.UnitStatus{State: "released"}}
	for _, e := range s.list() {
		if e.name == name {
			status.IQN, status.LUN = e.settings().IQN, e.settings().LUN
			status.Source.Address, status.Destination.Address = e.settings().Source.Address, e.settings().Destination.Address
			return status, e.isGone()
		}
	}
	record, found, err := s.store.Record(name)
	if err != nil || !found {
		return status, false
	}
	status.Source.ID, status.Destination.ID = record.SourceID, record.DestinationID
	return status, record.Phase == removed || proxy.Phase(record.Phase) == proxy.Cutover
}

// reachable is the status of a unit that is not held open but answered when it was.
func reachable(address string, i lun.Info) proxy.UnitStatus {
	return proxy.UnitStatus{Address: address, State: "online", ID: i.ID, Vendor: i.Vendor, Product: i.Product, Serial: i.Serial, Size: i.Size(), Thin: i.Thin}
}

// knownOf is what can be told of a volume whose units cannot be opened.
func (s *Service) knownOf(v conf.Volume, failure error) proxy.Status {
	status := proxy.Status{
		Name: v.Name, IQN: v.IQN, LUN: v.LUN, Phase: proxy.Ready,
		Degraded: true, DegradedReason: "not served: " + oneLine(failure), RateLimit: uint64(v.Copy.Rate),
		Sessions:    []target.SessionInfo{},
		Reservation: target.Unreserved(),
		Source:      proxy.UnitStatus{Address: v.Source.Address, State: "unavailable"},
		Destination: proxy.UnitStatus{Address: v.Destination.Address, State: "unavailable"},
	}
	var w *waiting
	if errors.As(failure, &w) {
		status.Phase, status.Size, status.BlockSize = phaseUnknown, w.source.Size(), w.source.BlockSize
		status.Source, status.Destination = reachable(v.Source.Address, w.source), reachable(v.Destination.Address, w.destination)
	}
	record, found, err := s.store.Record(v.Name)
	if err != nil || !found {
		return status
	}
	status.Phase, status.Paused = proxy.Phase(record.Phase), record.Paused
	status.Size, status.BlockSize = record.Blocks*uint64(record.BlockSize), record.BlockSize
	status.Copied, status.Skipped = record.CopiedBytes, record.SkippedBytes
	status.Compare, status.Compared, status.Equal = record.Compare, record.ComparedBytes, record.EqualBytes
	status.InitiatorWritten, status.Remaining = record.InitiatorWrittenBytes, status.Size
	status.CopiedBack, status.Mirrored = record.CopiedBackBytes, record.Mirror != nil && *record.Mirror
	if record.AllocatedBytes != nil {
		status.Allocated, status.AllocatedKnown = *record.AllocatedBytes, true
	}
	if record.RateLimit != nil {
		status.RateLimit = *record.RateLimit
	}
	if record.Hold != nil {
		ms := float64(record.Hold.Microseconds()) / 1000
		status.Hold = &ms
	}
	status.Source.ID, status.Destination.ID = record.SourceID, record.DestinationID
	switch status.Phase {
	case proxy.Migrating, proxy.RollingBack:
		// The record's tally is as old as the last progress; the flags are exact.
		flags, err := s.store.Flags(v.Name, state.Geometry{Blocks: record.Blocks, RegionBlocks: record.RegionBlocks})
		if err == nil {
			valid, dirty := flags.Count(state.Valid)*uint64(record.BlockSize), flags.Count(state.Dirty)*uint64(record.BlockSize)
			if status.Remaining -= min(valid, status.Size); status.Phase == proxy.Migrating {
				status.InitiatorWritten = dirty
			} else {
				status.Remaining = dirty
			}
		} else {
			s.log.WithError(err).Debug("progress of a volume that is not served")
		}
	case proxy.Synced, proxy.Cutover, proxy.RolledBack:
		status.Remaining = 0
	}
	status.StartedAt, status.SyncedAt, status.CutoverAt = record.StartedAt, record.SyncedAt, record.CutoverAt
	status.RollbackAt, status.RolledBackAt = record.RollbackAt, record.RolledBackAt
	return status
}
