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
	Flags(volume string, geometry state.Geometry) (flags, error)
}

// flags is what a volume asks of its state.Flags.
type flags interface {
	All(k state.Kinds, r state.Run) bool
	Any(k state.Kinds, r state.Run) bool
	Runs(k state.Kinds, r state.Run, yield func(r state.Run, set bool) bool) error
	Count(k state.Kinds) uint64
	Missing(k state.Kinds, from uint64) (region uint64, partial bool, ok bool)
	NextPartial(k state.Kinds, from uint64) (region uint64, ok bool)
	Set(ctx context.Context, k state.Kinds, runs ...state.Run) error
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

type storedFlags struct{ *state.Flags }

func (f storedFlags) Intend(ctx context.Context, sums ...state.Sum) (intent, error) {
	i, err := f.Flags.Intend(ctx, sums...)
	if err != nil {
		return nil, err
	}
	return i, nil
}
