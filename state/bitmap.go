package state

import "math/bits"

// setBits sets n bits of words from bit lo on.
func setBits(words []uint64, lo, n uint64) {
	for n > 0 {
		m, taken := wordMask(lo, n)
		words[lo/64] |= m
		lo, n = lo+taken, n-taken
	}
}

// allBits tells whether n bits of words from bit lo on are all set.
func allBits(words []uint64, lo, n uint64) bool {
	for n > 0 {
		m, taken := wordMask(lo, n)
		if words[lo/64]&m != m {
			return false
		}
		lo, n = lo+taken, n-taken
	}
	return true
}

// anyBit tells whether one of n bits of words from bit lo on is set.
func anyBit(words []uint64, lo, n uint64) bool {
	for n > 0 {
		m, taken := wordMask(lo, n)
		if words[lo/64]&m != 0 {
			return true
		}
		lo, n = lo+taken, n-taken
	}
	return false
}

// runLength is how many of the n bits from lo on equal the one at lo.
func runLength(words []uint64, lo, n uint64) uint64 {
	set := words[lo/64]>>(lo%64)&1 != 0
	var length uint64
	for length < n {
		w := words[lo/64] >> (lo % 64)
		if set {
			w = ^w
		}
		in := min(64-lo%64, n-length)
		same := min(uint64(bits.TrailingZeros64(w)), in)
		length += same
		if same < in {
			break
		}
		lo += same
	}
	return length
}

func countBits(words []uint64) (n uint64) {
	for _, w := range words {
		n += uint64(bits.OnesCount64(w))
	}
	return n
}

// wordMask is the part of n bits from lo on that lies in lo's word.
func wordMask(lo, n uint64) (mask, taken uint64) {
	taken = min(64-lo%64, n)
	return ^uint64(0) >> (64 - taken) << (lo % 64), taken
}

// clearBits clears n bits of words from bit lo on.
func clearBits(words []uint64, lo, n uint64) {
	for n > 0 {
		m, taken := wordMask(lo, n)
		words[lo/64] &^= m
		lo, n = lo+taken, n-taken
	}
}

// replaceBits makes the first n bits of words those of by, and tells whether that changed
// one.
func replaceBits(words, by []uint64, n uint64) (changed bool) {
	for lo := uint64(0); lo < n; {
		m, taken := wordMask(lo, n-lo)
		w := words[lo/64]&^m | by[lo/64]&m
		changed = changed || w != words[lo/64]
		words[lo/64] = w
		lo += taken
	}
	return changed
}
