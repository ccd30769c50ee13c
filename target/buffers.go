package target

import (
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	// maxTransfer is the most data one command moves, in bytes (MAXIMUM TRANSFER
	// LENGTH of VPD page B0h).
	maxTransfer = 32 << 20
	// maxNeed is the most that one command is charged, in bytes.
	maxNeed = maxTransfer + 8<<20

	minClass = 12 // 4 KiB
	maxClass = 25 // 32 MiB
)

// buffer is memory for the data of one command. Its contents are whatever was there.
type buffer struct {
	b     []byte
	class int
	// from is where to give n bytes back when the buffer is released; may be nil.
	from *share
	n    int64
	more atomic.Int32 // holders besides one
}

// pools keep buffers by size class, a power of two.
var pools [maxClass + 1]sync.Pool

// class is the size class of n bytes.
func class(n int) int { return max(bits.Len(uint(max(n, 1)-1)), minClass) }

// cost is what a buffer of n bytes takes, in bytes.
func cost(n int) int64 { return 1 << class(n) }

// newBuffer gives a buffer of n bytes, at most maxTransfer.
func newBuffer(n int) *buffer {
	class := class(n)
	if b, ok := pools[class].Get().(*buffer); ok {
		b.b = b.b[:n]
		return b
	}
	return &buffer{b: make([]byte, 1<<class)[:n], class: class}
}

// hold makes one more Release be needed.
func (b *buffer) hold() { b.more.Add(1) }

// Release gives the buffer back, with the last of its holders.
func (b *buffer) Release() {
	if b.more.Add(-1) >= 0 {
		return
	}
	b.more.Store(0)
	from, n := b.from, b.n
	b.from, b.n = nil, 0
	pools[b.class].Put(b)
	if from != nil {
		from.release(n)
	}
}

// float is how much a session takes of an admission at a time, in bytes, so that
// most commands get what they need without the admission's lock. It is lent: as soon
// as anybody waits it goes back.
const float = 1 << 20

// admission bounds bytes in use. Who does not fit waits in order; who waits for bytes of
// its own session's share holds up nobody else.
//
// A part is kept apart for data that arrives before its command was admitted. Who has
// of that part waits for the other, and nobody the other way round, so that all
// that was admitted can end.
type admission struct {
	each  int64        // the most one share holds, at least maxNeed
	early atomic.Int64 // free of what is kept for early data
	some  atomic.Bool  // somebody waits

	mu      sync.Mutex // protects what follows, and the shares
	free    int64
	waiting []*claim
	shares  map[*share]struct{} // that may have something to spare
}

// share is what one session has of an admission.
type share struct {
	a      *admission
	spare  atomic.Int64 // of held, in no command's use
	held   int64
	behind bool // within grant: a claim of it does not fit
}

// claim is one that waits for n bytes; granted is called, on a goroutine of its own,
// when they are its.
type claim struct {
	n       int64
	of      *share
	granted func()
	calling bool // acquire tells it itself
	has     bool
}

// newAdmission makes one of n bytes, at least 2*maxTransfer, of which a quarter is for
// early data.
func newAdmission(n int64) *admission {
	a := &admission{free: n - n/4, shares: map[*share]struct{}{}}
	a.each = max(a.free/4, maxNeed)
	a.early.Store(n / 4)
	return a
}

// take takes n bytes if they can be had now and nobody waits.
func (s *share) take(n int64) bool {
	for !s.a.some.Load() {
		have := s.spare.Load()
		if have < n {
			break
		}
		if s.spare.CompareAndSwap(have, have-n) {
			return true
		}
	}
	a := s.a
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shares[s] = struct{}{}
	if len(a.waiting) > 0 {
		return false
	}
	more := int64(float)
	if a.free < n+more || s.held+n+more > a.each {
		a.reclaim()
		more = 0
	}
	if a.free < n+more || s.held+n+more > a.each {
		return false
	}
	a.free -= n + more
	s.held += n + more
	s.spare.Add(more)
	return true
}

// acquire takes n bytes now, or files the claim for later if it waits.
func (s *share) acquire(n int64, c *claim, wait bool) bool {
	a := s.a
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shares[s] = struct{}{}
	c.n, c.of, c.calling = n, s, true
	a.waiting = append(a.waiting, c)
	// In this order: what becomes spare after the one is seen by the other.
	a.some.Store(true)
	a.reclaim()
	a.grant()
	c.calling = false
	if !c.has && !wait {
		a.remove(len(a.waiting) - 1) // claims keep their order: it is still the last
	}
	return c.has
}

// cancel takes a claim back; false when it was granted.
func (s *share) cancel(c *claim) bool {
	a := s.a
	a.mu.Lock()
	defer a.mu.Unlock()
	i := slices.Index(a.waiting, c)
	if i < 0 {
		return false
	}
	a.remove(i)
	a.grant()
	return true
}

// remove takes a claim off. mu is held.
func (a *admission) remove(i int) {
	a.waiting = slices.Delete(a.waiting, i, i+1)
	a.some.Store(len(a.waiting) > 0)
}

func (s *share) release(n int64) {
	if s.spare.Add(n) <= 2*float && !s.a.some.Load() {
		return
	}
	a := s.a
	a.mu.Lock()
	defer a.mu.Unlock()
	back := s.spare.Swap(0)
	if keep := min(back, float); len(a.waiting) == 0 {
		s.spare.Add(keep)
		back -= keep
	}
	a.free += back
	s.held -= back
	a.grant()
}

// leave gives back what the share has to spare, for good.
func (s *share) leave() {
	a := s.a
	a.mu.Lock()
	defer a.mu.Unlock()
	s.reclaim()
	delete(a.shares, s)
	a.grant()
}

// reclaim takes back what the share has to spare; the admission's mu is held.
func (s *share) reclaim() {
	n := s.spare.Swap(0)
	s.a.free += n
	s.held -= n
}

// reclaim takes back what all shares have to spare. mu is held.
func (a *admission) reclaim() {
	for s := range a.shares {
		s.reclaim()
	}
}

// takeEarly takes n of the bytes for early data, or none.
func (a *admission) takeEarly(n int64) bool {
	if a.early.Add(-n) < 0 {
		a.early.Add(n)
		return false
	}
	return true
}

// grant serves the claims in order; one that is beyond its share is passed over. mu is
// held.
func (a *admission) grant() {
	left := a.waiting[:0]
	for i, c := range a.waiting {
		if c.of.behind || c.of.held+c.n > a.each {
			c.of.behind = true // and so are its later claims
			left = append(left, c)
			continue
		}
		if a.free < c.n {
			left = append(left, a.waiting[i:]...)
			break
		}
		a.free -= c.n
		c.of.held += c.n
		if c.has = true; !c.calling {
			// The claimant's connection waits for it through its count of claims.
			go c.granted()
		}
	}
	clear(a.waiting[len(left):])
	a.waiting = left
	a.some.Store(len(left) > 0)
	for _, c := range left {
		c.of.behind = false
	}
}
