// Package proxy is the volume: one source and one destination logical unit, and
// the virtual logical unit in front of them.
//
// It routes each command of an initiator by the flags of the blocks it touches,
// has the copier move what is left, and takes the volume through its phases.
// Its guarantee: a write is acknowledged only after the destination has it, the
// destination was flushed if its cache is volatile and the blocks were not valid
// before, and their flags are on stable storage, in that order; and a
// block is read from the destination only once its flag is durable. So neither a
// kill nor a power loss loses an acknowledged write, or shows an older block than one
// already read.
//
// route.go and write.go are the data path, pass.go its two directions, mirror.go writes that
// go to both sides, lifecycle.go the phases, check.go the refusals.
package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/state"
	"lunshift/target"
)

// Config is what a Volume is made of.
type Config struct {
	Name string
	// IQN and LUN are where initiators find the volume.
	IQN string
	LUN uint64
	// Source and Destination are open; the Volume does not close them. They may be
	// nil where the state says that the volume is cut over (see NeedsUnits).
	Source, Destination lun.Device
	// SourceAddress and DestinationAddress are shown to people; no secrets.
	SourceAddress, DestinationAddress string
	// RegionSize is the unit of copying in bytes, a power of two from 64 KiB to 64
	// MiB. Once a migration has started, the size it started with stays.
	RegionSize uint64
	// CopyDepth is how many regions are copied at once, 1 to 256.
	CopyDepth int
	// CopyRate limits the copy in bytes per second; 0 is no limit. A rate set by
	// Throttle is kept in the state and wins over it.
	CopyRate uint64
	// CopyRateOfAll limits the copies of all volumes that have it together; nil is no limit.
	CopyRateOfAll *copier.Throttle
	// Seat is the volume's among those that copy at a time; nil where all may.
	Seat Seat
	// Mirror has writes go to both sides from the start on, unless SetMirror said otherwise.
	Mirror bool
	// Readback has what is copied read back from the destination and compared.
	Readback bool
	// DestinationCache says whether the destination is flushed before flags are set; empty
	// is CacheAuto.
	DestinationCache Cache
	// Allocation tells which blocks of the source are copied; empty is AllocationAuto.
	Allocation Allocation
	// VerifySample is how much of source and destination is compared before a cutover,
	// in bytes; 0 is nothing.
	VerifySample uint64
	// Overwrite allows a destination that is not blank.
	Overwrite bool
	// Seeded allows it too, and has the copy compare both sides and write only what
	// differs. It counts at the start.
	Seeded bool
	// Initiators, PortalGroups and ReservationsByName are as in target.Unit.
	Initiators         []target.Initiator
	PortalGroups       []uint16
	ReservationsByName bool
	// Identity is whose identity initiators find. It counts until the start.
	Identity Identity
	// LogoutTimeout is how long sessions may take to log out at a cutover; 0 is
	// DefaultLogoutTimeout.
	LogoutTimeout time.Duration
	// CutOver, where it is set, is called once a cutover is recorded, before logins are
	// answered again. It may ask for Status.
	CutOver func()
	// Happened, where it is set, is told what the volume comes to by itself, in the order in
	// which it does. It must not wait, nor call the volume.
	Happened func(Happening)
	// Withdraw, unless nil, lets Open go on where the destination cannot read what was being
	// written when the service ended: such a write is taken for one that was not made, and
	// may have been acknowledged. It is called with each once that is on stable storage.
	Withdraw func(BlockRun)
	// fenceEvery is the time between looks at the fences; 0 is 30 s.
	fenceEvery time.Duration
	// mostEqual bounds what a mirror knows to be equal; 0 is 65,536 extents.
	mostEqual int
	// askLimit is how long somebody may take to answer before a step; 0 is 10 s.
	askLimit time.Duration
	// store takes the place of Store in tests.
	store store

	Store  *state.Store
	Target *target.Server
	Log    logrus.FieldLogger
}

// Volume is one migration, and the logical unit in front of it: it implements
// lun.Updater and lun.Prober. All methods may be called concurrently.
type Volume struct {
	cfg                 Config
	log                 logrus.FieldLogger
	source, destination *unit // nil in phase cutover after a restart
	sourceFlush         *flusher
	destinationFlush    *flusher
	info                lun.Info
	store               store
	ways                atomic.Pointer[ways]
	mirror              atomic.Pointer[mirror] // nil while writes go to one side
	throttle            *copier.Throttle

	// Lock order: step, gate, a range of writes, commits, mu.
	step    sync.Mutex    // one step of the lifecycle at a time
	gate    gate          // every command of an initiator passes it
	writes  lun.RangeLock // held over each change of blocks, whoever makes it
	commits turn          // held while flags of copied blocks, or the record, are committed

	usage usage // of the source by file systems

	cleared atomic.Uint64 // state.Record.ClearedBytes

	phase atomic.Value // Phase; assigned in lifecycle.go only
	// fromFlushed: the side that takes no writes has nothing in its cache.
	fromFlushed atomic.Bool

	setting sync.Mutex // one Set at a time; before mu

	mu       sync.Mutex // protects the fields below
	settings Settings
	record   state.Record
	changed  chan struct{} // closed and replaced when the phase changes
	faults   map[string]string
	samples  []sample
	dropped  []target.SessionInfo // by the cutover

	faulty    atomic.Bool // faults is not empty
	verifying atomic.Pointer[verification]
	showing   sync.Mutex // held while the fault of a comparison is brought up to date

	key     uint64    // of the fences
	guard   *activity // looks after the fences; guarded by step
	copying *activity // guarded by step
	left    *mirror   // that a rollback ended just now; guarded by step
	// whole: in phase rolling-back the source has everything, whatever is dirty (rollback.after).
	whole  atomic.Bool
	closed bool // guarded by step
}

// activity is a goroutine of the volume that it waits for.
type activity struct {
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
}

// begin has do run until it returns or end ends it.
func begin(do func(context.Context)) *activity {
	ctx, cancel := context.WithCancel(context.Background())
	a := &activity{ctx, cancel, make(chan struct{})}
	go func() {
		defer close(a.done)
		defer cancel()
		do(ctx)
	}()
	return a
}

// ending tells whether it was told to end.
func (a *activity) ending() bool { return a.ctx.Err() != nil }

// end ends it and waits for it, or returns ctx's error when that ends first. It is for
// nil too.
func (a *activity) end(ctx context.Context) error {
	if a == nil {
		return nil
	}
	a.cancel()
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sample is how much had been read from the source at a time.
type sample struct {
	at   time.Time
	read uint64
}

// NeedsUnits tells whether the volume of that name still uses its source and
// destination. It does not once it is cut over: the old LUN may be gone by then,
// and the new one belongs to the initiators.
func NeedsUnits(store *state.Store, name string) (bool, error) {
	r, ok, err := store.Record(name)
	return !ok || Phase(r.Phase) != Cutover, err
}

// Open takes up a volume from its state, or begins a new one in phase ready. It
// puts the volume on the target and, where the state says migrating, goes on
// copying. It fails with a Refusal when the state belongs to other logical units.
func Open(ctx context.Context, cfg Config) (*Volume, error) {
	v := &Volume{
		cfg:      cfg,
		log:      cfg.Log.WithField("volume", cfg.Name),
		store:    cfg.store,
		commits:  newTurn(),
		throttle: copier.NewThrottle(cfg.CopyRate),
		changed:  make(chan struct{}),
		faults:   make(map[string]string),
		settings: cfg.settings(),
	}
	if v.cfg.Seat == nil {
		v.cfg.Seat = everybodys{}
	}
	if v.store == nil {
		v.store = stored{cfg.Store}
	}
	record, found, err := v.store.Record(cfg.Name)
	if err != nil {
		return nil, v.errorf("read its state: %w", err)
	}
	if v.key, err = FenceKey(ctx, v.store, cfg.Name); err != nil {
		return nil, err
	}
	if found && Phase(record.Phase) == Cutover {
		v.record = record
		v.phase.Store(Cutover)
		v.info = lun.Info{BlockSize: record.BlockSize, Blocks: record.Blocks}
		v.releaseLate(ctx)
		return v, nil
	}
	v.source = &unit{Device: cfg.Source, role: "source", address: cfg.SourceAddress}
	v.destination = &unit{Device: cfg.Destination, role: "destination", address: cfg.DestinationAddress, cache: cfg.DestinationCache}
	v.sourceFlush, v.destinationFlush = &flusher{unit: v.source}, &flusher{unit: v.destination}
	v.info = frontInfo(cfg.Name, v.source.Info(), v.destination.Info())
	if err := v.takeUp(ctx, record, found); err != nil {
		return nil, err
	}
	v.phase.Store(Phase(v.record.Phase))
	if p := v.Phase(); p == Migrating || p == Synced {
		v.makeMirror() // no command comes past it
	}
	if err := cfg.Target.AddUnit(v.front()); err != nil {
		return nil, v.errorf("%w", err)
	}
	v.showDifference()
	v.resumePhase()
	return v, nil
}

// takeUp makes the record and the flags those of this pair of units, or refuses.
func (v *Volume) takeUp(ctx context.Context, r state.Record, found bool) error {
	s, d := v.cfg.Source.Info(), v.cfg.Destination.Info()
	moving := found && Phase(r.Phase).Moving()
	if moving && d.Blocks < r.Blocks {
		return &Refusal{fmt.Sprintf("volume %s: destination %s has become smaller than the volume: %d of %d blocks: restore its size", v.cfg.Name, d.ID, d.Blocks, r.Blocks)}
	}
	same := r.SourceID == s.ID && r.DestinationID == d.ID && r.Blocks == s.Blocks && r.BlockSize == s.BlockSize
	if moving && !same {
		return &Refusal{fmt.Sprintf("volume %s: its state (phase %s) belongs to source %s (%d blocks) and destination %s, but the configuration names source %s (%d blocks) and destination %s: correct the configuration, or give the new pair another name",
			v.cfg.Name, r.Phase, r.SourceID, r.Blocks, r.DestinationID, s.ID, s.Blocks, d.ID)}
	}
	if !found {
		r.Phase = string(Ready)
	}
	if err := v.present(&r, s, d); err != nil {
		return err
	}
	if err := v.openFences(ctx, &r); err != nil {
		return err
	}
	// What was rolled back is whole on the source, and of the destination nothing counts.
	if Phase(r.Phase) == RolledBack && !same {
		r.Phase = string(Ready)
	}
	if Phase(r.Phase) == Ready {
		// Nothing is on disk yet that hangs on the units, so the configuration
		// counts.
		// A rebuild that was cut short leaves flags without a record. The initiators'
		// reservations stay with the unit that they know.
		renew := v.store.Renew
		if found && r.SourceID != s.ID {
			renew = v.store.Forget
		}
		if err := renew(v.cfg.Name); err != nil {
			return v.errorf("renew its state: %w", err)
		}
		rate := r.RateLimit
		r = state.Record{
			Volume: v.cfg.Name, SourceID: s.ID, DestinationID: d.ID,
			BlockSize: s.BlockSize, Blocks: s.Blocks,
			RegionBlocks: max(1, v.cfg.RegionSize/uint64(s.BlockSize)),
			Phase:        string(Ready), Paused: r.Paused, RateLimit: rate, Mirror: r.Mirror, CreatedAt: time.Now(),
			Presented: r.Presented,
		}
	}
	flags, err := v.store.Flags(v.cfg.Name, state.Geometry{Blocks: r.Blocks, RegionBlocks: r.RegionBlocks})
	if err != nil {
		return v.errorf("load its flags: %w", err)
	}
	v.record = r
	v.cleared.Store(r.ClearedBytes)
	v.ways.Store(v.newWays(flags, Phase(r.Phase) == RollingBack || Phase(r.Phase) == RolledBack))
	if err := v.way().recover(ctx); err != nil {
		return err
	}
	if Phase(r.Phase) == Ready {
		if err := v.store.PutRecords(ctx, r); err != nil {
			return v.errorf("write its state: %w", err)
		}
	}
	v.usage.known = found
	if err := v.loadUnused(r); err != nil {
		return err
	}
	if r.RateLimit != nil {
		v.throttle.Set(*r.RateLimit)
	}
	return nil
}

// frontInfo is what the virtual unit says of itself: the same in every phase, so it
// promises only what both sides can keep.
func frontInfo(name string, s, d lun.Info) lun.Info {
	thin := s.Thin || d.Thin
	return lun.Info{
		BlockSize: s.BlockSize, Blocks: s.Blocks, PhysicalExponent: s.PhysicalExponent,
		ID: "lunshift:" + name, Thin: thin, UnmapZeroes: thin,
		ReportsAllocation: s.ReportsAllocation || d.ReportsAllocation,
		VolatileCache:     s.VolatileCache || d.VolatileCache,
		UnmapGranularity:  max(s.UnmapGranularity, d.UnmapGranularity),
	}
}

// front is the volume as the target serves it, with an identity of its own that
// follows from where initiators find it unless it presents another.
func (v *Volume) front() target.Unit {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", v.cfg.IQN, v.cfg.LUN))
	const locallyAssigned = 0x3 // NAA, SPC-4 7.8.6.6.3
	return target.Unit{
		IQN: v.cfg.IQN, LUN: v.cfg.LUN, Device: v,
		Vendor: "LUNSHIFT", Product: "VOLUME", Revision: "1",
		Serial: fmt.Sprintf("%x", sum[:8]),
		NAA:    locallyAssigned<<60 | binary.BigEndian.Uint64(sum[:8])>>4,
		Alias:  v.cfg.Name,

		Identity: inquired(v.record.Presented), Access: access(&v.record),
		Initiators: v.cfg.Initiators, PortalGroups: v.cfg.PortalGroups,
		ReservationsByName: v.cfg.ReservationsByName,
		Reservations:       reservations{v.store, v.cfg.Name},
	}
}

// Name is the volume's name.
func (v *Volume) Name() string { return v.cfg.Name }

// Status is a snapshot.
func (v *Volume) Status() Status {
	s := Status{
		Name: v.cfg.Name, IQN: v.cfg.IQN, LUN: v.cfg.LUN, Phase: v.Phase(),
		Size: v.info.Size(), BlockSize: v.info.BlockSize, RateLimit: v.throttle.Rate(),
		Sessions: v.cfg.Target.Sessions(v.cfg.IQN),
	}
	s.Reservation, _ = v.cfg.Target.Reservation(v.cfg.IQN, v.cfg.LUN) // none where it is not served
	if s.Sessions == nil {
		s.Sessions = []target.SessionInfo{}
	}
	v.mu.Lock()
	r := v.record
	s.Readback = v.settings.Readback
	s.Degraded, s.DegradedReason = v.degraded()
	s.Rate = v.rate()
	s.Verify = v.verified()
	s.Dropped = v.dropped
	v.mu.Unlock()
	s.StartedAt, s.SyncedAt, s.CutoverAt = r.StartedAt, r.SyncedAt, r.CutoverAt
	s.RollbackAt, s.RolledBackAt = r.RollbackAt, r.RolledBackAt
	s.Compare = r.Compare
	s.Mirrored = (s.Phase == Ready || s.Phase == Migrating || s.Phase == Synced) && v.wantsMirror(r)
	s.MirrorUsed = r.Mirrored
	s.Identity, s.Access = presentedBy(r.Presented), access(&r).String()
	s.UnreadableRuns = []BlockRun{}
	s.AllocationFound = []string{}
	_, s.AcceptedUnreadable = v.shown(extents(r.Accepted))
	if r.Hold != nil {
		ms := float64(r.Hold.Microseconds()) / 1000
		s.Hold = &ms
	}
	if v.source == nil {
		s.Copied, s.Skipped, s.Compared, s.Equal = r.CopiedBytes, r.SkippedBytes, r.ComparedBytes, r.EqualBytes
		if r.AllocatedBytes != nil {
			s.Allocated, s.AllocatedKnown = *r.AllocatedBytes, true
		}
		s.InitiatorWritten = r.InitiatorWrittenBytes
		s.Source = UnitStatus{Address: v.cfg.SourceAddress, State: "released", ID: r.SourceID}
		s.Destination = UnitStatus{Address: v.cfg.DestinationAddress, State: "released", ID: r.DestinationID}
		return s
	}
	s.Source, s.Destination = v.source.status(), v.destination.status()
	s.Allocation = v.cfg.Allocation.Describe(v.source.Info(), r.Compare)
	if left := v.usage.left.Load(); left != nil {
		s.AllocationFound = append(s.AllocationFound, left.report...)
		for _, e := range left.runs {
			s.Unused += v.info.Bytes(e)
		}
	}
	p, bs := v.progress(), uint64(v.info.BlockSize)
	s.Copied, s.Skipped, s.Allocated, s.AllocatedKnown = p.Copied, p.Skipped, p.Allocated, p.Surveyed
	s.Compared, s.Equal = p.Compared, p.Equal
	s.ChecksumErrors, s.ReadbackErrors = p.ChecksumErrors, p.ReadbackErrors
	s.InitiatorWritten, s.Mirror = r.InitiatorWrittenBytes, v.mirrorStatus()
	if s.Phase == Migrating || s.Phase == Synced {
		s.InitiatorWritten = v.written()
	}
	if s.Phase != RolledBack {
		s.Remaining = s.Size - v.way().flags.Count(state.Valid)*bs
	}
	s.CopiedBack = v.copiedBack()
	s.UnreadableRuns, s.Unreadable = v.shown(v.unreadable())
	if s.Phase != Migrating && s.Phase != RollingBack {
		s.Rate = 0
		return s
	}
	s.Paused, s.Queued = r.Paused, v.cfg.Seat.Position()
	known, left := s.AllocatedKnown, min(s.Remaining, p.Left)
	if s.Phase == RollingBack {
		known, left = true, s.Remaining
	}
	if known && s.Rate > 0 && !s.Paused {
		eta := int64((left + s.Rate - 1) / s.Rate)
		s.ETA = &eta
	}
	return s
}

// degraded gives the reasons, in a stable order; v.mu is held.
func (v *Volume) degraded() (bool, string) {
	var reason string
	add := func(text string) {
		if reason != "" {
			reason += "; "
		}
		reason += text
	}
	for _, kind := range []string{"state", "fence", "registrations", "copy", copyBack, "mirror", "comparison"} {
		if text := v.faults[kind]; text != "" {
			add(text)
		}
	}
	for _, u := range []*unit{v.source, v.destination} {
		if u == nil {
			continue
		}
		if why := u.unavailable(); why != "" {
			add(u.role + " unavailable: " + why)
		}
	}
	return reason != "", reason
}

// fault keeps the last failure of a kind for Status, and logs it when it is a new
// one; nil says that it is over.
func (v *Volume) fault(kind string, err error) {
	if err == nil && !v.faulty.Load() {
		return
	}
	text := ""
	if err != nil {
		text = kind + ": " + err.Error()
	}
	v.mu.Lock()
	old := v.faults[kind]
	if text == "" {
		delete(v.faults, kind)
	} else {
		v.faults[kind] = text
	}
	v.faulty.Store(len(v.faults) > 0)
	if (text == "") != (old == "") && v.cfg.Happened != nil {
		v.cfg.Happened(Happening{Volume: v.cfg.Name, At: time.Now(), Fault: kind, Text: text})
	}
	v.mu.Unlock()
	switch {
	case text != "" && text != old:
		v.log.Warn(text)
	case text == "" && old != "":
		v.log.Infof("%s: the fault is over", kind)
	}
}

// rate is the copy's speed over the last samples in bytes per second; v.mu is held.
func (v *Volume) rate() uint64 {
	if len(v.samples) < 2 {
		return 0
	}
	first, last := v.samples[0], v.samples[len(v.samples)-1]
	if took := last.at.Sub(first.at).Seconds(); took > 0 {
		return uint64(float64(last.read-first.read) / took)
	}
	return 0
}

// save writes the record as edit leaves it, and keeps it once it is on stable storage.
func (v *Volume) save(ctx context.Context, edit func(*state.Record)) error {
	return save(ctx, change{v: v, edit: edit})
}

// tally is the record with what was counted by now.
func (v *Volume) tally() state.Record {
	v.mu.Lock()
	r := v.record
	v.mu.Unlock()
	p := v.progress()
	r.CopiedBytes, r.SkippedBytes, r.ComparedBytes, r.EqualBytes = p.Copied, p.Skipped, p.Compared, p.Equal
	r.CopiedBackBytes = v.copiedBack()
	if p.Surveyed {
		r.AllocatedBytes = &p.Allocated
	}
	if at := Phase(r.Phase); at == Migrating || at == Synced {
		r.ClearedBytes = v.cleared.Load()
		r.InitiatorWrittenBytes = v.written()
	}
	return r
}

// current is the record as it stands.
func (v *Volume) current() state.Record {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.record
}

// paused tells whether the administrator wants nothing copied.
func (v *Volume) paused() bool { return v.current().Paused }

// written is the size of the blocks that initiators wrote since the start, see
// Status.InitiatorWritten.
func (v *Volume) written() uint64 {
	return min(v.info.Size(), v.raw().Count(state.Dirty)*uint64(v.info.BlockSize)+v.cleared.Load())
}

// copiedBack is what was copied to the source since the migration started, in bytes.
func (v *Volume) copiedBack() uint64 {
	w := v.ways.Load()
	return w.beforeBack + w.back.copier.Progress().Copied
}

// progress is what was copied since the migration started.
func (v *Volume) progress() copier.Progress {
	w := v.ways.Load()
	p := w.forward.copier.Progress()
	p.Copied += w.before.Copied
	p.Skipped += w.before.Skipped
	p.Compared += w.before.Compared
	p.Equal += w.before.Equal
	if !p.Surveyed && w.before.Surveyed {
		p.Allocated, p.Surveyed = w.before.Allocated, true
	}
	return p
}

func (v *Volume) errorf(format string, args ...any) error {
	return fmt.Errorf("volume %s: "+format, append([]any{v.cfg.Name}, args...)...)
}

var (
	_ lun.Updater   = (*Volume)(nil)
	_ lun.Prober    = (*Volume)(nil)
	_ copier.Ledger = (*pass)(nil)
)
