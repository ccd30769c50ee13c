package proxy

import (
	"context"

	"lunshift/state"
)

// store is what a volume asks of the state; stored is the real one. Tests that decide when
// each call takes effect have their own.
type store interface {
	Record(volume string) (state.Record, bool, error)
	PutRecords(ctx context.Context, records ...state.Record) error
	Renew(volume string, instead ...state.Record) error
	Forget(volume string, instead ...state.Record) error
	Identity(ctx context.Context) (state.Identity, error)
	Reservation(volume string) ([]byte, error)
	PutReservation(ctx context.Context, volume string, data []byte) error
	Unused(volume string) ([]byte, error)
	PutUnused(ctx context.Context, volume string, data []byte) error
	Attach(ctx context.Context, volume string, a state.Attachment, data []byte) error
	Flags(volume string, geometry state.Geometry) (flags, error)
	// Turn is PutRecords, and begins a new turn of the flags in the same transaction.
	Turn(ctx context.Context, turns []turning, records ...state.Record) error
}

// turning is flags whose direction changes.
type turning struct {
	flags    flags
	backward bool
}

// flags is what a pass asks of the state, in its own terms: to a pass back what is dirty is
// what is not valid, and the other way round (reversed).
type flags interface {
	All(k state.Kinds, r state.Run) bool
	Any(k state.Kinds, r state.Run) bool
	Runs(k state.Kinds, r state.Run, yield func(r state.Run, set bool) bool) error
	Count(k state.Kinds) uint64
	// Missing is the first region at or after from in which a block lacks the kind k, Next
	// the first in which one has it.
	Missing(k state.Kinds, from uint64) (region uint64, ok bool)
	Next(k state.Kinds, from uint64) (region uint64, ok bool)
	NextPartial(k state.Kinds, from uint64) (region uint64, ok bool)
	Set(ctx context.Context, k state.Kinds, runs ...state.Run) error
	Clear(ctx context.Context, k state.Kinds, runs ...state.Run) error
	Note(ctx context.Context, k state.Kinds, runs ...state.Run) error
	Intend(ctx context.Context, sums ...state.Sum) (intent, error)
	Unsettled(r state.Run) bool
	Await(ctx context.Context, r state.Run) error
	Unproven() []state.Sum
	Prove(ctx context.Context, written ...state.Run) error
}

// intent is what a volume asks of a state.Intent.
type intent interface {
	Keep()
	Withdraw() error
}

type stored struct{ *state.Store }

func (s stored) Flags(volume string, geometry state.Geometry) (flags, error) {
	f, err := s.Store.Flags(volume, geometry)
	if err != nil {
		return nil, err
	}
	return storedFlags{f}, nil
}

func (s stored) Turn(ctx context.Context, turns []turning, records ...state.Record) error {
	all := make([]state.Turning, len(turns))
	for i, t := range turns {
		all[i] = state.Turning{Flags: t.flags.(storedFlags).Flags, Backward: t.backward}
	}
	return s.Store.Turn(ctx, all, records...)
}

type storedFlags struct{ *state.Flags }

func (f storedFlags) Missing(k state.Kinds, from uint64) (uint64, bool) {
	region, _, ok := f.Flags.Missing(k, from)
	return region, ok
}

func (f storedFlags) Intend(ctx context.Context, sums ...state.Sum) (intent, error) {
	i, err := f.Flags.Intend(ctx, sums...)
	if err != nil {
		return nil, err
	}
	return i, nil
}

// reversed are flags as a pass back sees them: the source holds the current content of
// what is not dirty, and the destination is stale where it is not valid.
type reversed struct {
	flags
	blocks uint64
}

// opposite gives the kind that says no where k, of the other direction, says yes.
func opposite(k state.Kinds) (o state.Kinds) {
	if k&state.Valid != 0 {
		o |= state.Dirty
	}
	if k&state.Dirty != 0 {
		o |= state.Valid
	}
	return o
}

func (f reversed) All(k state.Kinds, r state.Run) bool { return !f.flags.Any(opposite(k), r) }

func (f reversed) Any(k state.Kinds, r state.Run) bool {
	for _, one := range []state.Kinds{state.Valid, state.Dirty} {
		if k&one != 0 && !f.flags.All(opposite(one), r) {
			return true
		}
	}
	return false
}

func (f reversed) Runs(k state.Kinds, r state.Run, yield func(r state.Run, set bool) bool) error {
	return f.flags.Runs(opposite(k), r, func(r state.Run, set bool) bool { return yield(r, !set) })
}

func (f reversed) Count(k state.Kinds) uint64 { return f.blocks - f.flags.Count(opposite(k)) }

func (f reversed) Missing(k state.Kinds, from uint64) (uint64, bool) {
	return f.flags.Next(opposite(k), from)
}

func (f reversed) Next(k state.Kinds, from uint64) (uint64, bool) {
	return f.flags.Missing(opposite(k), from)
}

func (f reversed) NextPartial(k state.Kinds, from uint64) (uint64, bool) {
	return f.flags.NextPartial(opposite(k), from)
}

func (f reversed) Set(ctx context.Context, k state.Kinds, runs ...state.Run) error {
	return f.flags.Clear(ctx, opposite(k), runs...)
}

func (f reversed) Clear(ctx context.Context, k state.Kinds, runs ...state.Run) error {
	return f.flags.Set(ctx, opposite(k), runs...)
}

// Note clears, in a backward turn.
func (f reversed) Note(ctx context.Context, k state.Kinds, runs ...state.Run) error {
	return f.flags.Note(ctx, opposite(k), runs...)
}
