package lun

import (
	"context"
	"sync"
)

// RangeLock gives exclusive use of extents of one device. Those who ask for
// overlapping extents are served in the order in which they asked; others do
// not wait. The zero value is ready.
type RangeLock struct {
	mu   sync.Mutex // protects what follows and the entries between head and tail
	head *Held
	tail *Held
	free *Held // entries for reuse, linked by next
	kept int   // in free
}

// mostKept bounds the entries that a RangeLock keeps for reuse.
const mostKept = 256

// Held is an extent that was locked, or waits to be. After Unlock it is another's.
type Held struct {
	extent     Extent
	prev, next *Held
	ahead      int           // earlier entries that overlap and are still there
	ready      chan struct{} // closed when ahead falls to 0; nil when it began at 0
}

// Lock waits until no earlier holder overlaps e. It fails only when ctx ends
// first.
func (l *RangeLock) Lock(ctx context.Context, e Extent) (*Held, error) {
	l.mu.Lock()
	h := l.entry(e)
	for o := l.head; o != nil; o = o.next {
		if o.extent.Overlaps(e) {
			h.ahead++
		}
	}
	l.push(h)
	if h.ahead == 0 {
		l.mu.Unlock()
		return h, nil
	}
	h.ready = make(chan struct{})
	l.mu.Unlock()
	select {
	case <-h.ready:
		return h, nil
	case <-ctx.Done():
		l.Unlock(h)
		return nil, ctx.Err()
	}
}

// TryLock is Lock where nobody else holds or waits for a block of e; otherwise it
// reports false at once.
func (l *RangeLock) TryLock(e Extent) (*Held, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for o := l.head; o != nil; o = o.next {
		if o.extent.Overlaps(e) {
			return nil, false
		}
	}
	h := l.entry(e)
	l.push(h)
	return h, true
}

// entry makes an entry; mu is held.
func (l *RangeLock) entry(e Extent) *Held {
	h := l.free
	if h == nil {
		return &Held{extent: e}
	}
	l.free = h.next
	l.kept--
	*h = Held{extent: e}
	return h
}

// push puts h at the end of the list; mu is held.
func (l *RangeLock) push(h *Held) {
	h.prev = l.tail
	if l.tail != nil {
		l.tail.next = h
	} else {
		l.head = h
	}
	l.tail = h
}

// Unlock gives the extent up. It must be called once for each Lock that
// succeeded.
func (l *RangeLock) Unlock(h *Held) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for o := h.next; o != nil; o = o.next {
		if o.ahead > 0 && o.extent.Overlaps(h.extent) {
			if o.ahead--; o.ahead == 0 {
				close(o.ready)
			}
		}
	}
	if h.prev != nil {
		h.prev.next = h.next
	} else {
		l.head = h.next
	}
	if h.next != nil {
		h.next.prev = h.prev
	} else {
		l.tail = h.prev
	}
	if l.kept < mostKept {
		*h = Held{next: l.free}
		l.free = h
		l.kept++
	}
}

// Serialized makes an Updater of any Device by putting its writes through a
// RangeLock.
type Serialized struct {
	Device
	lock RangeLock
}

// Serialize wraps dev.
func Serialize(dev Device) *Serialized { return &Serialized{Device: dev} }

// WriteAt is Device.WriteAt, ordered against overlapping writes.
func (s *Serialized) WriteAt(ctx context.Context, p []byte, start LBA) error {
	return s.locked(ctx, Extent{start, uint64(len(p)) / uint64(s.Info().BlockSize)}, func() error {
		return s.Device.WriteAt(ctx, p, start)
	})
}

// Unmap is Device.Unmap, ordered against overlapping writes.
func (s *Serialized) Unmap(ctx context.Context, e Extent) error {
	return s.locked(ctx, e, func() error { return s.Device.Unmap(ctx, e) })
}

// WriteZeroes is Device.WriteZeroes, ordered against overlapping writes.
func (s *Serialized) WriteZeroes(ctx context.Context, e Extent) error {
	return s.locked(ctx, e, func() error { return s.Device.WriteZeroes(ctx, e) })
}

// Update implements Updater.
func (s *Serialized) Update(ctx context.Context, e Extent, modify func([]byte) error) error {
	return s.locked(ctx, e, func() error { return UpdateUnlocked(ctx, s.Device, e, modify) })
}

// TryReadAt passes to the Device where that is a Prober.
func (s *Serialized) TryReadAt(p []byte, start LBA) (bool, error) {
	if d, ok := s.Device.(Prober); ok {
		return d.TryReadAt(p, start)
	}
	return false, nil
}

// Resets passes to the Device where that is a Resetter.
func (s *Serialized) Resets() uint64 {
	if d, ok := s.Device.(Resetter); ok {
		return d.Resets()
	}
	return 0
}

// Unreachable passes to the Device where that is Reachable; others are reached always.
func (s *Serialized) Unreachable() error {
	if d, ok := s.Device.(Reachable); ok {
		return d.Unreachable()
	}
	return nil
}

func (s *Serialized) locked(ctx context.Context, e Extent, do func() error) error {
	h, err := s.lock.Lock(ctx, e)
	if err != nil {
		return err
	}
	defer s.lock.Unlock(h)
	return do()
}

// UpdateUnlocked reads, modifies and writes back e of dev; the caller holds
// whatever keeps other writes out.
func UpdateUnlocked(ctx context.Context, dev Device, e Extent, modify func([]byte) error) error {
	buf := make([]byte, dev.Info().Bytes(e))
	if err := dev.ReadAt(ctx, buf, e.Start); err != nil {
		return err
	}
	if err := modify(buf); err != nil {
		return err
	}
	return dev.WriteAt(ctx, buf, e.Start)
}
