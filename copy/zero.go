package copier

import (
	"bytes"

	"lunshift/lun"
)

// zeroRunBytes is the shortest run of zeroes that is left out of a write: leaving
// out shorter ones keeps the destination hardly thinner and costs a
// command each.
const zeroRunBytes = 32 << 10

// zeroGrain is the length in bytes at which data is looked at for zeroes.
const zeroGrain = 4 << 10

var zeroes [zeroGrain]byte

func isZero(p []byte) bool {
	for len(p) > zeroGrain {
		if !bytes.Equal(p[:zeroGrain], zeroes[:]) {
			return false
		}
		p = p[zeroGrain:]
	}
	return bytes.Equal(p, zeroes[:len(p)])
}

// splitZeroes cuts p, the content of e, into consecutive runs that are all zeroes
// (zero true) or data, and hands each to yield until it returns an error.
// Runs of zeroes shorter than zeroRunBytes are left in the data around them.
func splitZeroes(p []byte, e lun.Extent, blockSize uint32, yield func(p []byte, e lun.Extent, zero bool) error) error {
	grain := max(zeroGrain, int(blockSize))
	emit := func(from, to int, zero bool) error {
		if from == to {
			return nil
		}
		return yield(p[from:to], lun.Extent{
			Start:  e.Start + lun.LBA(from/int(blockSize)),
			Blocks: uint64((to - from) / int(blockSize)),
		}, zero)
	}
	data := 0 // where the data not yet handed on begins
	for at := 0; at < len(p); {
		end := at
		for end < len(p) && isZero(p[end:min(end+grain, len(p))]) {
			end = min(end+grain, len(p))
		}
		if end-at >= zeroRunBytes || end-at == len(p) {
			if err := emit(data, at, false); err != nil {
				return err
			}
			if err := emit(at, end, true); err != nil {
				return err
			}
			data, at = end, end
			continue
		}
		at = min(end+grain, len(p)) // the grain at end holds data, or p is through
	}
	return emit(data, len(p), false)
}
