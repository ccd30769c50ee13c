package proxy

import "context"

// Seat is a volume's place among volumes of which only some copy at a time. Position may be
// called at any time, Take, Idle and Give by the copy alone.
type Seat interface {
	// Take returns once it is the volume's turn, or with ctx's error when that ends. first is of
	// a volume that goes back to its source. The turn is
	// over when the context it gives ends, with ctx or because others come first. Each Take
	// that gave one is followed by Give, once nothing is copied any more.
	Take(ctx context.Context, first bool) (turn context.Context, err error)
	// Idle says whether nothing can be copied for the time being, so that another volume may copy
	// meanwhile.
	Idle(idle bool)
	Give()
	// Position is which of those that wait the volume is, from 1 on; 0 where it does not wait.
	Position() int
}

// everybodys is the seat of a volume that waits for no other.
type everybodys struct{}

func (everybodys) Take(ctx context.Context, _ bool) (context.Context, error) { return ctx, ctx.Err() }
func (everybodys) Idle(bool)                                                 {}
func (everybodys) Give()                                                     {}
func (everybodys) Position() int                                             { return 0 }

// stalled tells whether the copy has nothing that it can do: an array is away, or all that is
// left cannot be read.
func (v *Volume) stalled() bool {
	return v.source.unavailable() != "" || v.destination.unavailable() != "" || v.onlyUnreadable()
}
