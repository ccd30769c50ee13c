package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"lunshift/lun"
)

// unit is one side of a volume: the device, and what it last said of itself.
type unit struct {
	lun.Device
	role    string // "source" or "destination"
	address string
	cache   Cache // what is said of its cache, whatever the device says

	errors atomic.Uint64
	down   atomic.Bool // the last command that ended found the unit gone
	mu     sync.Mutex  // protects reason
	reason string

	fencing atomic.Value // string: what keeps others out
}

func (u *unit) fence() string {
	s, _ := u.fencing.Load().(string)
	return s
}

// setFence tells whether that is news.
func (u *unit) setFence(s string) bool { return u.fencing.Swap(s) != s }

// note counts a failed command and marks the unit as gone or back. It returns err
// with the unit's role.
func (u *unit) note(err error) error {
	switch {
	case err == nil:
		if u.down.Load() {
			u.down.Store(false)
		}
		return nil
	case errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		return err
	}
	u.errors.Add(1)
	if errors.Is(err, lun.ErrConflict) {
		// Initiators would take RESERVATION CONFLICT for a word about a reservation of
		// theirs, and give up. Nothing was written; they try again until it is mended.
		err = fmt.Errorf("%w: %w", lun.ErrUnavailable, err)
	}
	if errors.Is(err, lun.ErrUnavailable) {
		u.mu.Lock()
		u.reason = err.Error()
		u.mu.Unlock()
		u.down.Store(true)
	}
	return &unitError{u.role, err}
}

// unitError says which side failed.
type unitError struct {
	role string
	err  error
}

func (e *unitError) Error() string { return e.role + ": " + e.err.Error() }
func (e *unitError) Unwrap() error { return e.err }

// Info implements lun.Device. What the configuration says of the cache counts: everybody
// asks here and not the device, so the flushes and what initiators are told agree.
func (u *unit) Info() lun.Info {
	info := u.Device.Info()
	switch u.cache {
	case CacheVolatile:
		info.VolatileCache = true
	case CacheNonvolatile:
		info.VolatileCache = false
	}
	return info
}

func (u *unit) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	return u.note(u.Device.ReadAt(ctx, p, start))
}

func (u *unit) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	return u.note(u.Device.WriteAt(ctx, p, start))
}

func (u *unit) Flush(ctx context.Context) error { return u.note(u.Device.Flush(ctx)) }

func (u *unit) Unmap(ctx context.Context, e lun.Extent) error {
	return u.note(u.Device.Unmap(ctx, e))
}

func (u *unit) WriteZeroes(ctx context.Context, e lun.Extent) error {
	return u.note(u.Device.WriteZeroes(ctx, e))
}

func (u *unit) Extents(ctx context.Context, e lun.Extent) ([]lun.Allocation, error) {
	list, err := u.Device.Extents(ctx, e)
	return list, u.note(err)
}

// TryReadAt implements lun.Prober where the device does.
func (u *unit) TryReadAt(p []byte, start lun.LBA) (bool, error) {
	d, ok := u.Device.(lun.Prober)
	if !ok {
		return false, nil
	}
	done, err := d.TryReadAt(p, start)
	return done, u.note(err)
}

// Resets implements lun.Resetter; a device that is none never loses its cache
// unnoticed.
func (u *unit) Resets() uint64 {
	if d, ok := u.Device.(lun.Resetter); ok {
		return d.Resets()
	}
	return 0
}

// discard makes e read as zeroes, freeing the blocks where the unit can.
func (u *unit) discard(ctx context.Context, e lun.Extent) error {
	if info := u.Info(); info.Thin && info.UnmapZeroes {
		return u.Unmap(ctx, e)
	}
	return u.WriteZeroes(ctx, e)
}

func (u *unit) status() UnitStatus {
	info := u.Info()
	s := UnitStatus{
		Address: u.address, State: "online", ID: info.ID,
		Vendor: info.Vendor, Product: info.Product, Serial: info.Serial,
		Size: info.Size(), Thin: info.Thin, Errors: u.errors.Load(), Fence: u.fence(),
	}
	if why := u.unavailable(); why != "" {
		s.State, s.Reason = "unavailable", why
	}
	return s
}

// unavailable says why the unit cannot be reached, "" where it can: from the device
// itself if it knows, else from the last command.
func (u *unit) unavailable() string {
	if d, ok := u.Device.(lun.Reachable); ok {
		if err := d.Unreachable(); err != nil {
			return err.Error()
		}
		return ""
	}
	if !u.down.Load() {
		return ""
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.reason
}

// flusher lets one flush of a unit serve every caller that asked before it began.
type flusher struct {
	unit *unit

	mu      sync.Mutex // protects the fields below
	running bool
	next    *flush // callers whose flush has not begun
	serving sync.WaitGroup
}

type flush struct {
	done chan struct{}
	err  error // set before done is closed
}

// Flush returns once all writes to the unit that returned before the call are on
// stable storage. When ctx ends it returns ctx's error; the flush goes on, as others
// may wait for it.
func (f *flusher) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f.mu.Lock()
	if f.next == nil {
		f.next = &flush{done: make(chan struct{})}
	}
	mine := f.next
	if !f.running {
		f.running = true
		f.serving.Go(f.serve)
	}
	f.mu.Unlock()
	select {
	case <-mine.done:
		return mine.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serve flushes until nobody waits for it.
func (f *flusher) serve() {
	for {
		f.mu.Lock()
		batch := f.next
		f.next = nil
		f.running = batch != nil
		f.mu.Unlock()
		if batch == nil {
			return
		}
		batch.err = f.unit.Flush(context.Background())
		close(batch.done)
	}
}

// wait returns when no flush is under way, or with ctx's error.
func (f *flusher) wait(ctx context.Context) error {
	return until(ctx, f.serving.Wait)
}

// until returns when wait does, or with ctx's error when that ends first.
func until(ctx context.Context, wait func()) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wait()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
