package lun

import "sync"

// A file system promises nothing of a read beside a write of the same bytes: the read
// may see the first half of a block as it was and the second as it is. A disk does
// not do that to a logical block, so a file must not either.

const (
	stripeCount = 256
	// stripeBytes is how much of a file one lock stands for; the locks repeat.
	stripeBytes = 64 << 10
)

// stripes are the locks of a file: shared for reads, alone for writes, in rising order.
// The zero value is ready.
type stripes [stripeCount]sync.RWMutex

// span gives the locks of n bytes from off on, as two ranges of indices in rising order.
func span(off, n int64) (ranges [2][2]int) {
	first, last := off/stripeBytes, (off+max(n, 1)-1)/stripeBytes
	if last-first >= stripeCount-1 {
		return [2][2]int{{0, stripeCount}, {}}
	}
	a, b := int(first%stripeCount), int(last%stripeCount)
	if a <= b {
		return [2][2]int{{a, b + 1}, {}}
	}
	return [2][2]int{{0, b + 1}, {a, stripeCount}}
}

func (s *stripes) lock(off, n int64)    { s.each(off, n, (*sync.RWMutex).Lock) }
func (s *stripes) unlock(off, n int64)  { s.each(off, n, (*sync.RWMutex).Unlock) }
func (s *stripes) rlock(off, n int64)   { s.each(off, n, (*sync.RWMutex).RLock) }
func (s *stripes) runlock(off, n int64) { s.each(off, n, (*sync.RWMutex).RUnlock) }

// each does the same with every lock of n bytes from off on.
func (s *stripes) each(off, n int64, do func(*sync.RWMutex)) {
	for _, r := range span(off, n) {
		for i := r[0]; i < r[1]; i++ {
			do(&s[i])
		}
	}
}

// tryRLock is rlock where no write is under way; otherwise it reports false and holds
// nothing.
func (s *stripes) tryRLock(off, n int64) bool {
	ranges := span(off, n)
	for k, r := range ranges {
		for i := r[0]; i < r[1]; i++ {
			if s[i].TryRLock() {
				continue
			}
			for i--; i >= r[0]; i-- {
				s[i].RUnlock()
			}
			if k == 1 {
				for i := ranges[0][0]; i < ranges[0][1]; i++ {
					s[i].RUnlock()
				}
			}
			return false
		}
	}
	return true
}
