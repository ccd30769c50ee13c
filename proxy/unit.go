package proxy

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"lunshift/lun"
)

// unit is one side of a volume: the device, and what it last said of itself.
type unit struct {
	lun.Device
	role    string // "source" or "destination"
	address string

	errors atomic.Uint64
	down   atomic.Bool
	mu     sync.Mutex // protects reason
	reason string
}

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
		Size: info.Size(), Thin: info.Thin, Errors: u.errors.Load(),
	}
	if u.down.Load() {
		u.mu.Lock()
		s.State, s.Reason = "unavailable", u.reason
		u.mu.Unlock()
	}
	return s
}

// flusher lets one flush of a unit serve every caller that asked before it began.
type flusher struct {
	unit *unit

	mu      sync.Mutex // protects the fields below
	running bool
	next    *flush // callers that came while one was running
}

type flush struct {
	done chan struct{}
	err  error // set before done is closed
}

// Flush returns once all writes to the unit that returned before the call are on
// stable storage. The flush itself is not cut short by ctx, as others wait for it.
func (f *flusher) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f.mu.Lock()
	if f.running {
		if f.next == nil {
			f.next = &flush{done: make(chan struct{})}
		}
		mine := f.next
		f.mu.Unlock()
		<-mine.done
		return mine.err
	}
	f.running = true
	f.mu.Unlock()

	err := f.unit.Flush(context.WithoutCancel(ctx))
	f.mu.Lock()
	batch := f.next
	f.next = nil
	f.running = batch != nil
	f.mu.Unlock()
	if batch != nil {
		go f.serve(batch)
	}
	return err
}

// serve runs flushes until nobody waits for one; each caller of Flush that
// found one running is waiting for its outcome.
func (f *flusher) serve(batch *flush) {
	for batch != nil {
		batch.err = f.unit.Flush(context.Background())
		close(batch.done)
		f.mu.Lock()
		batch = f.next
		f.next = nil
		f.running = batch != nil
		f.mu.Unlock()
	}
}
