package target

import (
	"math/bits"
	"slices"
	"sync"
)

const (
	// maxTransfer is the most data one command moves, in bytes (MAXIMUM TRANSFER
	// LENGTH of VPD page B0h).
	maxTransfer = 32 << 20
	// freely is the size up to which a command's data is not counted against
	// BytesInFlight; the command window bounds those.
	freely = 64 << 10

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
}

// pools keep buffers by size class, a power of two.
var pools [maxClass + 1]sync.Pool

// newBuffer gives a buffer of n bytes, at most maxTransfer.
func newBuffer(n int) *buffer {
	class := max(bits.Len(uint(max(n, 1)-1)), minClass)
	if b, ok := pools[class].Get().(*buffer); ok {
		b.b = b.b[:n]
		return b
	}
	return &buffer{b: make([]byte, 1<<class)[:n], class: class}
}

// Release gives the buffer back.
func (b *buffer) Release() {
	if b.from != nil {
		b.from.release(b.n)
		b.from, b.n = nil, 0
	}
	pools[b.class].Put(b)
}

// admission bounds bytes in use. Who does not fit waits in order; who waits for bytes of
// its own session's share holds up nobody else.
type admission struct {
	each int64 // the most one share holds, at least maxTransfer

	mu      sync.Mutex // protects what follows, and the shares
	free    int64
	waiting []*claim
}

// share is what one session has of an admission.
type share struct {
	a      *admission
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

// newAdmission makes one of n bytes, at least maxTransfer.
func newAdmission(n int64) *admission { return &admission{free: n, each: max(n/4, maxTransfer)} }

// acquire takes n bytes now, or files the claim for later.
func (s *share) acquire(n int64, c *claim) bool {
	a := s.a
	a.mu.Lock()
	defer a.mu.Unlock()
	c.n, c.of, c.calling = n, s, true
	a.waiting = append(a.waiting, c)
	a.grant()
	c.calling = false
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
	a.waiting = slices.Delete(a.waiting, i, i+1)
	a.grant()
	return true
}

func (s *share) release(n int64) {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	s.a.free += n
	s.held -= n
	s.a.grant()
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
	for _, c := range left {
		c.of.behind = false
	}
}
