package fsmap

import (
	"cmp"
	"slices"
)

// byteRun is a run of bytes.
type byteRun struct{ at, length uint64 }

func (r byteRun) end() uint64 { return r.at + r.length }

// runs is a bounded set of runs of bytes that do not overlap. Once there are too many, the
// shortest are dropped, and so are such ones from then on.
type runs struct {
	list  []byteRun
	least uint64 // shorter ones are dropped
}

// add takes a run; one that follows on the last becomes part of it.
func (r *runs) add(at, length uint64) {
	if n := len(r.list); n > 0 && r.list[n-1].end() == at {
		r.list[n-1].length += length
		return
	}
	// The last one does not grow any more.
	if n := len(r.list); n > 0 && r.list[n-1].length < r.least {
		r.list = r.list[:n-1]
	}
	if length > 0 {
		r.list = append(r.list, byteRun{at, length})
	}
	for len(r.list) > maxRuns {
		r.least = max(512, 2*r.least)
		last := r.list[len(r.list)-1] // may still grow
		r.list = slices.DeleteFunc(r.list[:len(r.list)-1], func(x byteRun) bool { return x.length < r.least })
		r.list = append(r.list, last)
	}
}

// sorted gives the runs in rising order.
func (r *runs) sorted() []byteRun {
	list := slices.DeleteFunc(slices.Clone(r.list), func(x byteRun) bool { return x.length < r.least })
	slices.SortFunc(list, func(a, b byteRun) int { return cmp.Compare(a.at, b.at) })
	return list
}

// overlap tells whether a run of a and one of b share a byte; both are in rising order and each
// apart from its neighbours.
func overlap(a, b []byteRun) bool {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0].end() <= b[0].at:
			a = a[1:]
		case b[0].end() <= a[0].at:
			b = b[1:]
		default:
			return true
		}
	}
	return false
}

// apart puts list in rising order and tells whether its runs do not overlap.
func apart(list []byteRun) bool {
	slices.SortFunc(list, func(a, b byteRun) int { return cmp.Compare(a.at, b.at) })
	for i := 1; i < len(list); i++ {
		if list[i].at < list[i-1].end() {
			return false
		}
	}
	return true
}
