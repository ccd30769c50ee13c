package proxy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/state"
)

// A volume that the state knows nothing of is either new, or its migration was begun and
// the state is lost. In the second case the source is stale, and serving it would undo
// what initiators wrote without a word. The destination tells: a migration that was begun
// leaves data there. So such a volume is not served while its destination holds
// any, until somebody says which it is (Adopt), once. No setting says it, for a setting stays.

const (
	// rebuildChunk is how much of each side is compared at a time, in bytes, rebuildDepth
	// how many of them are under way.
	rebuildChunk = 1 << 20
	rebuildDepth = 4
	// rebuildTells is how often the progress is told.
	rebuildTells = 5 * time.Second
)

// UnknownError says that a volume is not served because nobody can tell whether a
// migration of it was begun.
type UnknownError struct{ text string }

func (e *UnknownError) Error() string { return e.text }

// Unknown gives an UnknownError for a volume of which the store, the directory dir, has no
// record while the destination holds data.
func Unknown(ctx context.Context, store *state.Store, dir, volume, address string, destination lun.Device) error {
	_, found, err := store.Record(volume)
	if err != nil || found {
		return err
	}
	return UnknownWithoutRecord(ctx, dir, volume, address, destination)
}

// UnknownWithoutRecord is Unknown for a volume of which it is known that the state has no
// record.
func UnknownWithoutRecord(ctx context.Context, dir, volume, address string, destination lun.Device) error {
	at, dirty, err := findData(ctx, destination)
	if err != nil {
		return fmt.Errorf("volume %s: look whether the destination is blank: %w", volume, err)
	}
	if !dirty {
		return nil
	}
	return &UnknownError{fmt.Sprintf("volume %s: destination %s is not blank (data near LBA %d) and the state directory %s knows nothing of the volume: if a migration was begun, its state is lost and the source is stale: put the directory back, or compare both LUNs (lunshift adopt %s --rebuild); if none was ever begun, or the last one was rolled back to its end, name a blank LUN, or say so (lunshift adopt %s --new) and set overwrite = true if its content may go, or seeded = true if it has most of the data",
		volume, address, at, dir, volume, volume)}
}

// Side is the side whose content counts for a block of which a rebuild cannot tell.
type Side string

// The sides.
const (
	SideSource      Side = "source"
	SideDestination Side = "destination"
)

// AdoptOptions say what a volume is that the state knows nothing of. One of New and
// Rebuild must be set.
type AdoptOptions struct {
	// New: no migration of it was begun. The source is served.
	New bool `json:"new"`
	// Rebuild: a migration was begun, and its flags are made anew.
	Rebuild bool `json:"rebuild"`
	// WasSynced: that migration was synced, so that everything is on the destination.
	// Nothing is compared.
	WasSynced bool `json:"was_synced"`
	// Zeroes is where blocks are that hold zeroes on the destination and something else on
	// the source: never copied, or zeroed by initiators. Empty is not decided.
	Zeroes Side `json:"zeroes"`
	// Different is where blocks are that differ and are not zero on the destination:
	// initiators wrote them, or, where the destination was not blank at the start, they were
	// there before. No setting tells which (StartOptions.Reuse is none). Empty is not decided.
	Different Side `json:"different"`
	// Rate is how many bytes per second are read of each side; 0 is no limit.
	Rate uint64 `json:"rate"`
	// AcceptUnreadableWrites is for a volume that the state knows: see Config.Withdraw.
	AcceptUnreadableWrites bool `json:"accept_unreadable_writes"`
}

// Check gives what is wrong with the options, in one line.
func (o AdoptOptions) Check() error {
	side := func(s Side) bool { return s == "" || s == SideSource || s == SideDestination }
	switch {
	case o.AcceptUnreadableWrites && (o != AdoptOptions{AcceptUnreadableWrites: true}):
		return errors.New("--accept-unreadable-writes goes with nothing else: the state knows the volume")
	case o.AcceptUnreadableWrites:
		return nil
	case o.New == o.Rebuild:
		return errors.New("say one of --new (no migration was begun) and --rebuild (one was, and its state is lost)")
	case o.New && (o.WasSynced || o.Zeroes != "" || o.Different != ""):
		return errors.New("--new goes with nothing else: there is nothing to rebuild")
	case o.WasSynced && (o.Zeroes != "" || o.Different != ""):
		return errors.New("--was-synced says that everything is on the destination: leave --zeroes and --different out")
	case !side(o.Zeroes) || !side(o.Different):
		return errors.New("--zeroes and --different take source or destination")
	}
	return nil
}

// RebuildReport is what a rebuild found and decided. Counts are of logical blocks.
type RebuildReport struct {
	StartedAt time.Time `json:"started_at"`
	EndedAt   time.Time `json:"ended_at"`
	BlockSize uint32    `json:"block_size"`
	Blocks    uint64    `json:"blocks"`
	// WasSynced is set where all was taken from the destination without comparing.
	WasSynced bool `json:"was_synced"`
	// Equal are the same on both sides: they are taken for copied.
	Equal uint64 `json:"equal_blocks"`
	// Different differ and are not zero on the destination, Zeroes differ and are
	// zero there; both with the side that counts now, empty where nobody decided.
	Different     uint64 `json:"different_blocks"`
	DifferentFrom Side   `json:"different_from"`
	Zeroes        uint64 `json:"zeroes_blocks"`
	ZeroesFrom    Side   `json:"zeroes_from"`
	// Unreadable is what of Different and Zeroes the source cannot read.
	Unreadable uint64 `json:"unreadable_blocks"`
	// DifferentExtents and ZeroesExtents are the first places, in rising order; More says
	// that there are others.
	DifferentExtents []BlockRun `json:"different_extents"`
	ZeroesExtents    []BlockRun `json:"zeroes_extents"`
	More             bool       `json:"more"`
	// Undecided says what is to be decided before the volume can be served; empty where it
	// is served.
	Undecided string `json:"undecided,omitempty"`
}

// rebuild is one under way.
type rebuild struct {
	cfg  Config
	o    AdoptOptions
	info lun.Info // of the volume
	// presented is what initiators find, by the configuration.
	presented *state.Presented
	flags     *state.Flags
	looked    atomic.Uint64 // blocks
	limiter   *copier.Throttle

	mu     sync.Mutex // protects report and cut
	report RebuildReport
	// cut is from where on places of a class are not listed any more; 0 is nowhere.
	cut [zeroes + 1]uint64
}

// Rebuild makes the flags and the record of a volume anew that the state knows nothing of, by
// comparing its units, which it does not change. The record comes last: killed or failed
// before that, it leaves nothing that is believed, and another begins at block 0. The volume is then
// migrating. Where something is to be decided the report says so and the state stays
// without the volume. tell, which may be nil, is called with the progress from time to time.
func Rebuild(ctx context.Context, cfg Config, o AdoptOptions, tell func(done, all uint64)) (RebuildReport, error) {
	fail := func(err error) (RebuildReport, error) {
		return RebuildReport{}, fmt.Errorf("volume %s: rebuild: %w", cfg.Name, err)
	}
	if r, found, err := cfg.Store.Record(cfg.Name); err != nil {
		return fail(err)
	} else if found {
		return fail(&Refusal{fmt.Sprintf("the state has the volume, in phase %s: nothing is lost", r.Phase)})
	}
	refused, err := Check(ctx, cfg.Source, cfg.Destination, true)
	if err != nil {
		return fail(err)
	}
	if len(refused) > 0 {
		return fail(oneLine(refused))
	}
	key, err := FenceKey(ctx, cfg.Store, cfg.Name)
	if err != nil {
		return fail(err)
	}
	s := cfg.Source.Info()
	presented, err := cfg.Identity.Present(s, cfg.Destination.Info())
	if err != nil {
		return fail(err)
	}
	x := &rebuild{cfg: cfg, o: o, info: s, presented: presented, limiter: copier.NewThrottle(o.Rate)}
	x.report = RebuildReport{
		StartedAt: time.Now(), BlockSize: s.BlockSize, Blocks: s.Blocks, WasSynced: o.WasSynced,
		DifferentFrom: x.o.Different, ZeroesFrom: o.Zeroes,
		DifferentExtents: []BlockRun{}, ZeroesExtents: []BlockRun{},
	}
	// Nobody else writes to either side from here on.
	unfence, err := fenceBoth(ctx, cfg, key)
	if err == nil {
		err = x.make(ctx, tell)
	}
	if err != nil || x.report.Undecided != "" {
		// What was set so far counts for nothing without a record; it goes now, or before
		// the next one begins.
		err = errors.Join(err, cfg.Store.Renew(cfg.Name), unfence())
	}
	if err != nil {
		return fail(err)
	}
	return x.report, nil
}

// fenceBoth takes the fences of both units; what it gives releases those that it took.
func fenceBoth(ctx context.Context, cfg Config, key uint64) (release func() error, err error) {
	var taken []lun.Fencer
	release = func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unfenceLimit)
		defer cancel()
		var errs []error
		for _, f := range taken {
			errs = append(errs, f.Unfence(ctx, key))
		}
		return errors.Join(errs...)
	}
	for _, side := range []struct {
		role, address string
		dev           lun.Device
	}{{"source", cfg.SourceAddress, cfg.Source}, {"destination", cfg.DestinationAddress, cfg.Destination}} {
		f, ok := side.dev.(lun.Fencer)
		if !ok {
			continue
		}
		switch err := f.Fence(ctx, key); {
		case err == nil:
			taken = append(taken, f)
		case !errors.Is(err, lun.ErrUnsupported):
			return release, fenced(cfg.Name, side.role, side.address, err)
		}
	}
	return release, nil
}

// make sets the flags and, if nothing is left to decide, writes the record.
func (x *rebuild) make(ctx context.Context, tell func(done, all uint64)) error {
	name := x.cfg.Name
	// An earlier one may have been cut short.
	if err := x.cfg.Store.Renew(name); err != nil {
		return err
	}
	geometry := state.Geometry{Blocks: x.info.Blocks, RegionBlocks: max(1, x.cfg.RegionSize/uint64(x.info.BlockSize))}
	destination := &unit{Device: x.cfg.Destination, role: "destination"}
	era := destination.Resets()
	var err error
	if x.flags, err = x.cfg.Store.Flags(name, geometry); err != nil {
		return err
	}
	if x.o.WasSynced {
		err = x.flags.Set(ctx, state.Valid|state.Dirty, run(x.info.All()))
	} else {
		err = x.compare(ctx, tell)
	}
	if err != nil {
		return err
	}
	now := time.Now()
	x.report.EndedAt = now
	if x.report.Undecided = x.undecided(); x.report.Undecided != "" {
		return nil
	}
	// What was read may be in the destination's cache alone, and is now relied on.
	if err := destination.Flush(ctx); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if destination.Resets() != era {
		return fmt.Errorf("destination: it may have lost its cache while it was compared: begin again: %w", lun.ErrUnavailable)
	}
	return x.cfg.Store.PutRecords(ctx, state.Record{
		Volume: name, SourceID: x.info.ID, DestinationID: x.cfg.Destination.Info().ID,
		BlockSize: x.info.BlockSize, Blocks: geometry.Blocks, RegionBlocks: geometry.RegionBlocks,
		Phase: string(Migrating), Fenced: true, CreatedAt: now, StartedAt: &now,
		Presented: x.presented,
	})
}

// undecided says what nobody has decided.
func (x *rebuild) undecided() string {
	var open []string
	note := func(n uint64, from Side, what string) {
		if n > 0 && from == "" {
			open = append(open, fmt.Sprintf("%d blocks %s=source or %s=destination)", n, what, what[strings.LastIndex(what, "--"):]))
		}
	}
	note(x.report.Zeroes, x.o.Zeroes, "are zero on the destination and not on the source: never copied, or zeroed by initiators (--zeroes")
	note(x.report.Different, x.o.Different, "differ: written by initiators, or, on a destination that was not blank at the start, never copied (--different")
	return strings.Join(open, "; ")
}

// compare looks at every block of both sides.
func (x *rebuild) compare(ctx context.Context, tell func(done, all uint64)) error {
	parts, gctx := errgroup.WithContext(ctx)
	parts.SetLimit(rebuildDepth)
	told := time.Now()
	step := max(1, rebuildChunk/uint64(x.info.BlockSize))
	for at := uint64(0); at < x.info.Blocks && gctx.Err() == nil; at += step {
		e := lun.Extent{Start: lun.LBA(at), Blocks: min(step, x.info.Blocks-at)}
		parts.Go(func() error {
			defer x.looked.Add(e.Blocks)
			return x.chunk(gctx, e)
		})
		if tell != nil && time.Since(told) >= rebuildTells {
			told = time.Now()
			tell(x.looked.Load(), x.info.Blocks)
		}
	}
	if err := parts.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// The classes of a block.
type class int

const (
	same class = iota
	different
	zeroes
)

// chunk compares e and sets its flags.
func (x *rebuild) chunk(ctx context.Context, e lun.Extent) error {
	size := int(x.info.Bytes(e))
	if err := x.limiter.Wait(ctx, size); err != nil {
		return err
	}
	s, d := make([]byte, size), make([]byte, size)
	var bad []bool // blocks that the source cannot read; nil is none
	var sides errgroup.Group
	sides.Go(func() (err error) {
		bad, err = x.readSource(ctx, s, e)
		return err
	})
	sides.Go(func() error {
		if err := x.cfg.Destination.ReadAt(ctx, d, e.Start); err != nil {
			return fmt.Errorf("destination: %w", err)
		}
		return nil
	})
	if err := sides.Wait(); err != nil {
		return err
	}
	bs := int(x.info.BlockSize)
	blank := make([]byte, bs)
	of := func(i int) class {
		p, q := s[i*bs:(i+1)*bs], d[i*bs:(i+1)*bs]
		switch unread := bad != nil && bad[i]; {
		case !unread && bytes.Equal(p, q):
			return same
		case bytes.Equal(q, blank):
			return zeroes
		}
		return different
	}
	var copied, written []state.Run
	for i, blocks := 0, int(e.Blocks); i < blocks; {
		c, from := of(i), i
		for i++; i < blocks && of(i) == c; i++ {
		}
		r := state.Run{Start: uint64(e.Start) + uint64(from), Blocks: uint64(i - from)}
		x.note(c, r)
		switch {
		case c == same:
			copied = append(copied, r)
		case c == different && x.o.Different == SideDestination, c == zeroes && x.o.Zeroes == SideDestination:
			written = append(written, r)
		}
	}
	for _, b := range bad {
		if b {
			x.mu.Lock()
			x.report.Unreadable++
			x.mu.Unlock()
		}
	}
	if err := x.flags.Set(ctx, state.Valid, copied...); err != nil {
		return err
	}
	return x.flags.Set(ctx, state.Valid|state.Dirty, written...)
}

// note counts a run of one class.
func (x *rebuild) note(c class, r state.Run) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch c {
	case same:
		x.report.Equal += r.Blocks
	case different:
		x.report.Different += r.Blocks
		x.report.DifferentExtents = x.add(x.report.DifferentExtents, c, r)
	case zeroes:
		x.report.Zeroes += r.Blocks
		x.report.ZeroesExtents = x.add(x.report.ZeroesExtents, c, r)
	}
}

// add puts a run into a list in rising order and joins it with its neighbours. Chunks end in
// any order, so what is too much is cut off at the far end, and nothing beyond it is taken
// any more.
func (x *rebuild) add(list []BlockRun, c class, r state.Run) []BlockRun {
	if x.cut[c] != 0 && r.Start >= x.cut[c] {
		return list
	}
	i, _ := slices.BinarySearchFunc(list, r.Start, func(b BlockRun, at uint64) int { return cmp.Compare(b.LBA, at) })
	list = slices.Insert(list, i, BlockRun{LBA: r.Start, Blocks: r.Blocks})
	for _, n := range []int{i, i - 1} {
		if n >= 0 && n+1 < len(list) && list[n].LBA+list[n].Blocks == list[n+1].LBA {
			list[n].Blocks += list[n+1].Blocks
			list = slices.Delete(list, n+1, n+2)
		}
	}
	if len(list) > mostDifferences {
		x.cut[c], x.report.More = list[mostDifferences].LBA, true
		list = list[:mostDifferences]
	}
	return list
}

// readSource fills p with e and tells which blocks cannot be read.
func (x *rebuild) readSource(ctx context.Context, p []byte, e lun.Extent) (bad []bool, err error) {
	err = x.cfg.Source.ReadAt(ctx, p, e.Start)
	if !lun.MediumError(err) {
		return nil, wrapSide("source", err)
	}
	bs := uint64(x.info.BlockSize)
	bad = make([]bool, e.Blocks)
	for i := range e.Blocks {
		err := x.cfg.Source.ReadAt(ctx, p[i*bs:(i+1)*bs], e.Start+lun.LBA(i))
		if bad[i] = lun.MediumError(err); err != nil && !bad[i] {
			return nil, wrapSide("source", err)
		}
	}
	return bad, nil
}

func wrapSide(side string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", side, err)
}
