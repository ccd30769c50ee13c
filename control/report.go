package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"lunshift/conf"
	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

const (
	// mostRuns, mostSessions and mostReported bound what a report lists of one kind; each says
	// how much there is besides.
	mostRuns     = 1000
	mostSessions = 200
	mostReported = 1000
)

// Report is what is to be told of one migration, for a change ticket. Sizes are bytes, times are
// null where it did not come to it, and zero counts are of what did not happen.
//
// Without its history it is kept with the state at each step and phase, so that it is there
// when the arrays are away, after the cutover and after the volume was removed.
type Report struct {
	Name     string         `json:"name"`
	IQN      string         `json:"iqn"`
	LUN      uint64         `json:"lun"`
	Identity proxy.Identity `json:"identity,omitempty"`
	// WrittenAt is when the facts were taken, CreatedAt when the state first had the volume, or
	// had it anew.
	WrittenAt time.Time   `json:"written_at"`
	CreatedAt time.Time   `json:"created_at"`
	Phase     proxy.Phase `json:"phase"`
	Paused    bool        `json:"paused"`
	// Removed tells whether the volume is not there any more: the rest is as it was at its end.
	Removed bool `json:"removed"`
	// Versions are those of lunshift that took part.
	Versions  []string `json:"versions"`
	Size      uint64   `json:"size_bytes"`
	BlockSize uint32   `json:"block_size"`
	// Source and Destination have no secrets. Their logical blocks are of BlockSize.
	Source      ReportUnit `json:"source"`
	Destination ReportUnit `json:"destination"`

	// Asked are the last steps of each kind that were done in this migration, with who asked.
	Asked  []state.Event `json:"asked"`
	Phases []ReportPhase `json:"phases"`
	// Hold is how long commands of initiators were held at the cutover, or else at the rollback, in
	// milliseconds.
	Hold *float64 `json:"hold_ms"`

	Bytes ReportBytes `json:"bytes"`
	// Rate is Bytes.Copied, or of a copy that compares Bytes.Compared, per second of phase migrating
	// with its pauses; null before there is one.
	Rate *uint64 `json:"average_bytes_per_second"`

	// Unreadable is what the source cannot read, AcceptedUnreadable what of it was given up; of
	// each the first 1000 runs.
	Unreadable         []proxy.BlockRun `json:"unreadable"`
	AcceptedUnreadable []proxy.BlockRun `json:"accepted_unreadable"`
	// UnreadableLeftOut is how many runs of the two are not listed.
	UnreadableLeftOut int `json:"unreadable_runs_left_out"`

	// MirrorUsed tells whether writes went to both sides at any time since the start; Mirror is how it
	// stands, null where they go to one.
	MirrorUsed bool                `json:"mirror_used"`
	Mirror     *proxy.MirrorStatus `json:"mirror"`

	// Verified are the last comparisons of everything and of a sample.
	Verified struct {
		All    *state.Verified `json:"all"`
		Sample *state.Verified `json:"sample"`
	} `json:"verified"`
	// Checksums are null where everything was never compared. ChecksumsCover says in words what
	// they are of.
	Checksums      *proxy.Checksums `json:"checksums"`
	ChecksumsCover string           `json:"checksums_cover,omitempty"`

	// Sessions are those of initiators now, Dropped those that a forced cutover ended; the
	// first 200 of each.
	Sessions []target.SessionInfo `json:"sessions"`
	Dropped  []target.SessionInfo `json:"dropped_sessions"`
	// Faults are those that are on now.
	Faults []string `json:"faults"`

	// History is the audit trail, the newest 1000 events; HistoryLeftOut are not among them
	// (Client.History has them).
	History        []state.Event `json:"history"`
	HistoryLeftOut int           `json:"history_left_out"`
}

// ReportUnit is a logical unit of a report. ID is its NAA, EUI or T10 designator where it has one.
type ReportUnit struct {
	Address string `json:"address"`
	ID      string `json:"id"`
	Vendor  string `json:"vendor,omitempty"`
	Product string `json:"product,omitempty"`
	Serial  string `json:"serial,omitempty"`
	Size    uint64 `json:"size_bytes"`
	Thin    bool   `json:"thin"`
}

// ReportPhase is the time that a migration was in one phase. Until is null while it is.
type ReportPhase struct {
	Phase proxy.Phase `json:"phase"`
	Since time.Time   `json:"since"`
	Until *time.Time  `json:"until"`
	// Seconds is how long, up to WrittenAt while it lasts. Of an end it is 0.
	Seconds float64 `json:"seconds"`
}

// ReportBytes is what became of the bytes of a volume.
type ReportBytes struct {
	Allocated uint64 `json:"allocated"`
	// Copied was put on the destination, Skipped not: the source had no storage for it, or zeroes.
	Copied  uint64 `json:"copied"`
	Skipped uint64 `json:"skipped_unallocated"`
	// Unused was left out as free in a file system.
	Unused uint64 `json:"left_out_free"`
	// CompareCopy tells whether the copy compared both sides; Compared was, Equal was there already.
	CompareCopy bool   `json:"compare"`
	Compared    uint64 `json:"compared"`
	Equal       uint64 `json:"equal"`
	// InitiatorWritten is the size of the blocks that initiators wrote.
	InitiatorWritten uint64 `json:"initiator_written"`
	CopiedBack       uint64 `json:"copied_back"`
	Remaining        uint64 `json:"remaining"`
	Unreadable       uint64 `json:"unreadable"`
	Accepted         uint64 `json:"accepted_unreadable"`
}

// checksumsCover says what the checksums of a report are of.
const checksumsCover = "each is the SHA-256 of all bytes of its extent in the order of the blocks, as the last full verify read them from the " +
	"destination and found them equal to the source; blocks with storage on neither side count as zeroes, as they are read. " +
	"An extent in which initiators wrote since the start, up to now or to the cutover, or of which blocks were left out as free, " +
	"given up as unreadable, or different, has none. " +
	"What is written on the destination after the cutover, past lunshift, changes its extent."

// report is that of a volume that is served, or of one that was.
func (s *Service) report(name string) (Report, error) {
	s.keeping.Lock()
	r, found, err := s.facts(name)
	s.keeping.Unlock()
	if err != nil {
		return r, err
	}
	if !found {
		return r, s.unknown(name)
	}
	events, err := s.store.History(name)
	if err != nil {
		return r, err
	}
	events = s.shownEvents(events)
	r.Asked = askedOf(events, r.CreatedAt)
	r.HistoryLeftOut = max(0, len(events)-mostReported)
	r.History = events[r.HistoryLeftOut:]
	return r, nil
}

// keepReport keeps the report of a volume, without the history, which is kept of itself. One whose
// migration was not begun has none. Where the volume is gone, what was kept stays.
func (s *Service) keepReport(ctx context.Context, name string) error {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	r, found, err := s.facts(name)
	if err != nil || !found || r.Removed || len(r.Phases) == 0 {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("volume %s: encode its report: %w", name, err)
	}
	return s.store.Attach(ctx, name, state.Report, data)
}

// logReport is keepReport where nothing else hangs on it.
func (s *Service) logReport(name string) {
	ctx, cancel := context.WithTimeout(context.Background(), trailLimit)
	defer cancel()
	if err := s.keepReport(ctx, name); err != nil {
		s.log.WithError(err).Errorf("volume %s: what its report has to say was not kept", name)
	}
}

// facts is the report of a volume without the history, from what can be asked now and what was
// kept; found is false where neither is. keeping is held.
func (s *Service) facts(name string) (r Report, found bool, err error) {
	data, err := s.store.Attached(name, state.Report)
	if err != nil {
		return r, false, err
	}
	var kept *Report
	if data != nil {
		kept = &Report{}
		if err := json.Unmarshal(data, kept); err != nil {
			return r, false, fmt.Errorf("volume %s: its report is not readable: %w", name, err)
		}
	}
	record, recorded, err := s.store.Record(name)
	if err != nil {
		return r, false, err
	}
	e, _ := s.entry(name)
	switch {
	case e == nil && (!recorded || record.Phase == removed):
		if kept == nil {
			return r, false, nil
		}
		kept.Removed, kept.Faults, kept.Sessions = true, []string{}, []target.SessionInfo{}
		return *kept, true, nil
	case e == nil: // taken out of the configuration, and not removed
		status := s.knownOf(conf.Volume{Name: name}, errors.New("not in the configuration"))
		r = s.reportOf(status, record)
		r.Faults = []string{}
	default:
		r = s.reportOf(e.status(), record)
	}
	if r.Checksums, err = proxy.ReadChecksums(s.store, name); err != nil {
		return r, false, err
	}
	if r.Checksums != nil {
		r.ChecksumsCover = checksumsCover
	}
	if kept != nil && kept.CreatedAt.Equal(r.CreatedAt) {
		r.fillFrom(*kept)
	}
	// One that begins when all is over took no part.
	if over := len(r.Versions) > 0 && (r.Phase == proxy.Cutover || r.Phase == proxy.RolledBack); !over && s.version != "" && !slices.Contains(r.Versions, s.version) {
		r.Versions = append(r.Versions, s.version)
	}
	return r, true, nil
}

// reportOf is what the status and the record of a volume tell.
func (s *Service) reportOf(v proxy.Status, record state.Record) Report {
	unit := func(u proxy.UnitStatus) ReportUnit {
		return ReportUnit{Address: u.Address, ID: u.ID, Vendor: u.Vendor, Product: u.Product, Serial: u.Serial, Size: u.Size, Thin: u.Thin}
	}
	r := Report{
		Name: v.Name, IQN: v.IQN, LUN: v.LUN, Identity: v.Identity, WrittenAt: time.Now(), CreatedAt: record.CreatedAt,
		Phase: v.Phase, Paused: v.Paused, Versions: []string{}, Size: v.Size, BlockSize: v.BlockSize,
		Source: unit(v.Source), Destination: unit(v.Destination), Asked: []state.Event{}, Hold: v.Hold,
		Bytes: ReportBytes{
			Allocated: v.Allocated, Copied: v.Copied, Skipped: v.Skipped, Unused: v.Unused, CompareCopy: v.Compare, Compared: v.Compared, Equal: v.Equal,
			InitiatorWritten: v.InitiatorWritten, CopiedBack: v.CopiedBack, Remaining: v.Remaining, Unreadable: v.Unreadable, Accepted: v.AcceptedUnreadable,
		},
		Unreadable: []proxy.BlockRun{}, AcceptedUnreadable: []proxy.BlockRun{},
		MirrorUsed: record.Mirrored, Mirror: v.Mirror,
		Sessions: firstOf(v.Sessions, mostSessions), Dropped: firstOf(v.Dropped, mostSessions), Faults: []string{}, History: []state.Event{},
	}
	r.Phases = phasesOf(v, r.WrittenAt)
	for _, p := range r.Phases {
		done := v.Copied
		if v.Compare {
			done = v.Compared
		}
		if p.Phase == proxy.Migrating && p.Seconds > 0 {
			rate := uint64(float64(done) / p.Seconds)
			r.Rate = &rate
		}
	}
	r.Unreadable = append(r.Unreadable, firstOf(v.UnreadableRuns, mostRuns)...)
	for _, run := range firstOf(record.Accepted, mostRuns) {
		r.AcceptedUnreadable = append(r.AcceptedUnreadable, proxy.BlockRun{LBA: run.Start, Blocks: run.Blocks})
	}
	r.UnreadableLeftOut = len(v.UnreadableRuns) + len(record.Accepted) - len(r.Unreadable) - len(r.AcceptedUnreadable)
	r.Verified.All, r.Verified.Sample = record.VerifiedAll, record.VerifiedSample
	if v.Degraded {
		r.Faults = append(r.Faults, v.DegradedReason)
	}
	return r
}

// phasesOf are the phases that a migration was in, in their order; none before its start.
func phasesOf(v proxy.Status, now time.Time) []ReportPhase {
	phases := []ReportPhase{}
	for _, p := range []struct {
		phase proxy.Phase
		at    *time.Time
	}{{proxy.Migrating, v.StartedAt}, {proxy.Synced, v.SyncedAt}, {proxy.Cutover, v.CutoverAt}, {proxy.RollingBack, v.RollbackAt}, {proxy.RolledBack, v.RolledBackAt}} {
		if p.at == nil {
			continue
		}
		if n := len(phases); n > 0 {
			last := &phases[n-1]
			last.Until, last.Seconds = p.at, p.at.Sub(last.Since).Seconds()
		}
		phases = append(phases, ReportPhase{Phase: p.phase, Since: *p.at})
	}
	if n := len(phases); n > 0 && phases[n-1].Phase.Moving() {
		phases[n-1].Seconds = now.Sub(phases[n-1].Since).Seconds()
	}
	return phases
}

// fillFrom takes over from a report of the same migration what cannot be asked any more: once
// a volume is cut over its units are not open, and an array may be away.
func (r *Report) fillFrom(kept Report) {
	r.Versions = append(r.Versions, kept.Versions...)
	for _, u := range []struct{ now, kept *ReportUnit }{{&r.Source, &kept.Source}, {&r.Destination, &kept.Destination}} {
		if u.now.Size == 0 && (u.now.ID == "" || u.now.ID == u.kept.ID) {
			u.now.ID, u.now.Vendor, u.now.Product, u.now.Serial = u.kept.ID, u.kept.Vendor, u.kept.Product, u.kept.Serial
			u.now.Size, u.now.Thin = u.kept.Size, u.kept.Thin
		}
		u.now.Address = cmp.Or(u.now.Address, u.kept.Address)
	}
	if r.IQN == "" {
		r.IQN, r.LUN = kept.IQN, kept.LUN
	}
	r.Identity = cmp.Or(r.Identity, kept.Identity)
	r.Size, r.BlockSize = cmp.Or(r.Size, kept.Size), cmp.Or(r.BlockSize, kept.BlockSize)
	r.Bytes.Allocated, r.Bytes.Unused = cmp.Or(r.Bytes.Allocated, kept.Bytes.Allocated), cmp.Or(r.Bytes.Unused, kept.Bytes.Unused)
	r.Bytes.Accepted = cmp.Or(r.Bytes.Accepted, kept.Bytes.Accepted)
	if r.Hold == nil {
		r.Hold = kept.Hold
	}
	if len(r.Dropped) == 0 {
		r.Dropped = kept.Dropped
	}
}

// askedOf are the last events of each step that was done since the state has the volume; a start
// that had it begin anew was under way then.
func askedOf(events []state.Event, since time.Time) []state.Event {
	last := map[string]int{}
	for i, e := range events {
		_, known := steps[e.What]
		ended := e.At
		if e.Took != nil {
			ended = ended.Add(time.Duration(*e.Took * float64(time.Millisecond)))
		}
		if known && e.Result == resultDone && !ended.Before(since) {
			last[e.What] = i
		}
	}
	asked := []state.Event{}
	for i, e := range events {
		if at, done := last[e.What]; done && at == i {
			asked = append(asked, e)
		}
	}
	return asked
}

// steps are what a report says who asked for, with the words for it.
var steps = map[string]string{
	"start": "the start", "verify": "the last comparison", "mirror": "the mirror", "rollback": "the rollback", "cutover": "the cutover", "remove": "the removal",
}

// firstOf is at most so many of the first, never nil.
func firstOf[T any](list []T, most int) []T {
	return append([]T{}, list[:min(len(list), most)]...)
}

func (s *Service) answerReport(r *http.Request) (any, error) {
	return s.report(r.PathValue("name"))
}

// Report is what is to be told of the migration of a volume, in any phase, also of one that was
// removed.
func (c *Client) Report(ctx context.Context, volume string) (Report, error) {
	var report Report
	return report, c.onVolume(ctx, http.MethodGet, volume, "/report", nil, &report)
}
