package state

import (
	"math/bits"
	"sync/atomic"
)

// levels is one kind's upper level, one bit for each region. Only the committer
// writes it, in an order on which readers without a lock rely: a region that becomes all
// has its bit in all set before its bitmap goes; of one that stops being all the bitmap is
// published and its bit in partial set before the bit in all is cleared. So at each moment
// one of the two tells of a region that is not none. As a reader looks at one after the
// other, a region that was changed twice meanwhile may show it neither; falls tells it
// then to look again.
type levels struct {
	all     []atomic.Uint64
	partial []atomic.Uint64
	falls   atomic.Uint64 // counts publications by which regions stop being all, before they do
	blocks  atomic.Uint64 // that have the flag
}

func (f *Flags) isAll(i int, g uint64) bool {
	return f.kinds[i].all[g/64].Load()>>(g%64)&1 != 0
}

func (f *Flags) isPartialOf(i int, g uint64) bool {
	return f.kinds[i].partial[g/64].Load()>>(g%64)&1 != 0
}

// isPartial tells whether region g is partial of a kind.
func (f *Flags) isPartial(g uint64) bool {
	for i := range f.kinds {
		if f.isPartialOf(i, g) {
			return true
		}
	}
	return false
}

// nextNotAll is the first region from g on that is not all, or end.
func (f *Flags) nextNotAll(i int, g, end uint64) uint64 {
	l := &f.kinds[i]
	for g < end {
		if w := ^l.all[g/64].Load() >> (g % 64); w != 0 {
			return min(g+uint64(bits.TrailingZeros64(w)), end)
		}
		g = g&^63 + 64
	}
	return end
}

// nextAll is the first region from g on that is all, or end.
func (f *Flags) nextAll(i int, g, end uint64) uint64 {
	l := &f.kinds[i]
	for g < end {
		if w := l.all[g/64].Load() >> (g % 64); w != 0 {
			return min(g+uint64(bits.TrailingZeros64(w)), end)
		}
		g = g&^63 + 64
	}
	return end
}

// nextSome is the first region from g on that is partial or all, or end.
func (f *Flags) nextSome(i int, g, end uint64) uint64 {
	l := &f.kinds[i]
	for g < end {
		if w := l.some(g/64) >> (g % 64); w != 0 {
			return min(g+uint64(bits.TrailingZeros64(w)), end)
		}
		g = g&^63 + 64
	}
	return end
}

// some is word w of the regions that are partial or all.
func (l *levels) some(w uint64) uint64 {
	for {
		falls := l.falls.Load()
		some := l.all[w].Load()
		some |= l.partial[w].Load()
		some |= l.all[w].Load() // what left partial meanwhile is all or none
		if l.falls.Load() == falls {
			return some
		}
	}
}

// bitmap gives kind i's bitmap of region g; nil where it is all or none, and then all
// tells which.
func (f *Flags) bitmap(i int, g uint64) (bitmap []uint64, all bool, err error) {
	for {
		falls := f.kinds[i].falls.Load()
		if f.isAll(i, g) {
			return nil, true, nil
		}
		if f.isPartialOf(i, g) {
			m, err := f.store.bitmaps.find(f, g, false)
			if m[i] != nil || err != nil {
				return m[i], false, err
			}
		}
		// It is none, or became all meanwhile.
		if f.isAll(i, g) {
			return nil, true, nil
		}
		if f.kinds[i].falls.Load() == falls {
			return nil, false, nil
		}
	}
}

// partialAll tells whether n bits from lo on of region g are known to be set.
func (f *Flags) partialAll(i int, g, lo, n uint64) bool {
	bitmap, all, err := f.bitmap(i, g)
	switch {
	case err != nil:
		return false
	case bitmap != nil:
		return allBits(bitmap, lo, n)
	}
	return all
}

// partialAny tells whether one of n bits from lo on of region g is not known to be
// clear.
func (f *Flags) partialAny(i int, g, lo, n uint64) bool {
	bitmap, all, err := f.bitmap(i, g)
	switch {
	case err != nil:
		return true
	case bitmap != nil:
		return anyBit(bitmap, lo, n)
	}
	return all
}

// markPartial notes of which kinds region g is partial.
func (f *Flags) markPartial(g uint64, m regionBitmaps) {
	for i, b := range m {
		if b != nil {
			orWord(&f.kinds[i].partial[g/64], 1<<(g%64))
		} else {
			clearWord(&f.kinds[i].partial[g/64], 1<<(g%64))
		}
	}
}

func orWord(w *atomic.Uint64, m uint64) {
	if v := w.Load(); v&m != m {
		w.Or(m)
	}
}

func clearWord(w *atomic.Uint64, m uint64) {
	if w.Load()&m != 0 {
		w.And(^m)
	}
}

func equalWords(a, b []uint64) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
