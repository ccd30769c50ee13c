package copier

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Throttle is a limit in bytes per second that can be changed while it is waited
// for. All methods may be called concurrently.
type Throttle struct {
	limiter *rate.Limiter

	mu      sync.Mutex    // protects changed
	changed chan struct{} // closed and replaced by Set
}

// NewThrottle makes a limit of bytesPerSecond; 0 is none.
func NewThrottle(bytesPerSecond uint64) *Throttle {
	t := &Throttle{limiter: rate.NewLimiter(rate.Inf, sliceBytes), changed: make(chan struct{})}
	t.Set(bytesPerSecond)
	return t
}

// Set changes the limit; 0 is none. Those who wait go on by the new one.
func (t *Throttle) Set(bytesPerSecond uint64) {
	limit := rate.Inf
	if bytesPerSecond > 0 {
		limit = rate.Limit(bytesPerSecond)
	}
	t.limiter.SetLimit(limit)
	// A tenth of a second may be caught up on, so that workers that were busy
	// writing do not lose what they could have read meanwhile.
	t.limiter.SetBurst(int(min(max(bytesPerSecond/10, sliceBytes), 1<<30)))
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.changed)
	t.changed = make(chan struct{})
}

// Rate is the limit; 0 is none.
func (t *Throttle) Rate() uint64 {
	if l := t.limiter.Limit(); l != rate.Inf {
		return uint64(l)
	}
	return 0
}

// Wait returns when n more bytes may go, or with ctx's error when that ends.
func (t *Throttle) Wait(ctx context.Context, n int) error {
	for n > 0 {
		part := min(n, sliceBytes)
		went, err := t.wait(ctx, part)
		if err != nil {
			return err
		}
		if went {
			n -= part
		}
	}
	return ctx.Err()
}

// wait is Wait for at most a burst; it reports false when the limit changed.
func (t *Throttle) wait(ctx context.Context, n int) (bool, error) {
	t.mu.Lock()
	changed := t.changed
	t.mu.Unlock()
	r := t.limiter.ReserveN(time.Now(), n)
	delay := r.Delay()
	if delay == 0 {
		return true, nil
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true, nil
	case <-changed:
		r.Cancel()
		return false, nil
	case <-ctx.Done():
		r.Cancel()
		return false, ctx.Err()
	}
}
