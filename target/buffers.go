package target

import (
	"math/bits"
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
	from *admission
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

// admission bounds bytes in use. Who does not fit waits in order.
type admission struct {
	mu      sync.Mutex // protects what follows
	free    int64
	waiting []*claim
}

// claim is one that waits for n bytes; granted is called, on a goroutine of its own,
// when they are its.
type claim struct {
	n       int64
	granted func()
}

func newAdmission(n int64) *admission { return &admission{free: n} }

// acquire takes n bytes now, or files the claim for later.
func (a *admission) acquire(n int64, c *claim) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.waiting) == 0 && a.free >= n {
		a.free -= n
		return true
	}
	c.n = n
	a.waiting = append(a.waiting, c)
	return false
}

// cancel takes a claim back; false when it was granted.
func (a *admission) cancel(c *claim) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, w := range a.waiting {
		if w == c {
			a.waiting = append(a.waiting[:i], a.waiting[i+1:]...)
			a.grant()
			return true
		}
	}
	return false
}

func (a *admission) release(n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free += n
	a.grant()
}

func (a *admission) grant() {
	for len(a.waiting) > 0 && a.free >= a.waiting[0].n {
		c := a.waiting[0]
		a.waiting = a.waiting[1:]
		a.free -= c.n
		// The claimant's connection waits for it through its count of claims.
		go c.granted()
	}
}
