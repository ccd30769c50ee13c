package copier

import (
	"context"

	"golang.org/x/time/rate"
)

// Throttle is a limit in bytes per second that can be changed while it is waited
// for. All methods may be called concurrently.
type Throttle struct {
	limiter *rate.Limiter
}

// NewThrottle makes a limit of bytesPerSecond; 0 is none.
func NewThrottle(bytesPerSecond uint64) *Throttle {
	t := &Throttle{limiter: rate.NewLimiter(rate.Inf, sliceBytes)}
	t.Set(bytesPerSecond)
	return t
}

// Set changes the limit; 0 is none.
func (t *Throttle) Set(bytesPerSecond uint64) {
	limit := rate.Inf
	if bytesPerSecond > 0 {
		limit = rate.Limit(bytesPerSecond)
	}
	t.limiter.SetLimit(limit)
}

// Rate is the limit; 0 is none.
func (t *Throttle) Rate() uint64 {
	if l := t.limiter.Limit(); l != rate.Inf {
		return uint64(l)
	}
	return 0
}

// Wait returns when n more bytes may go.
func (t *Throttle) Wait(ctx context.Context, n int) error {
	for n > 0 {
		part := min(n, sliceBytes)
		if err := t.limiter.WaitN(ctx, part); err != nil {
			return err
		}
		n -= part
	}
	return nil
}
