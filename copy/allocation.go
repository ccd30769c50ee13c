package copier

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"lunshift/lun"
)

// maxRuns bounds an allocation map: 16 bytes a run, 16 MiB in all.
const maxRuns = 1 << 20

// AllocationMap says which blocks of a device have storage, as runs in rising
// order. It may call an unallocated block allocated (that costs a read of
// zeroes), never the other way round. It does not change once made.
type AllocationMap struct {
	runs      []lun.Extent
	allocated uint64
}

// Survey reads the allocation map of dev (GET LBA STATUS, SEEK_HOLE). seen is told
// how many allocated blocks were found so far. Where dev does not report allocation
// every block counts as allocated. A map of more than a million runs is coarsened
// by taking ever longer gaps as allocated.
func Survey(ctx context.Context, dev lun.Device, of lun.Extent, seen func(blocks uint64)) (*AllocationMap, error) {
	return survey(ctx, dev, of, seen, maxRuns)
}

func survey(ctx context.Context, dev lun.Device, of lun.Extent, seen func(uint64), limit int) (*AllocationMap, error) {
	m := &AllocationMap{}
	gap := uint64(0) // gaps up to this long are bridged
	for rest := of; !rest.Empty(); {
		list, err := dev.Extents(ctx, rest)
		if cannotTell(err) {
			list, err = []lun.Allocation{{Extent: rest, Allocated: true}}, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the allocation of %v: %w", rest, err)
		}
		at := rest.Start
		for _, a := range list {
			if a.Start != at || a.Empty() || a.End() > rest.End() {
				return nil, fmt.Errorf("read the allocation of %v: the device answered %v out of order", rest, a.Extent)
			}
			at = a.End()
			if a.Allocated {
				m.append(a.Extent, gap)
			}
		}
		if at == rest.Start {
			return nil, fmt.Errorf("read the allocation of %v: the device gave no answer", rest)
		}
		rest = lun.Extent{Start: at, Blocks: uint64(rest.End() - at)}
		for len(m.runs) > limit {
			gap = max(2*gap, 8)
			m.coarsen(gap)
		}
		if seen != nil {
			seen(m.allocated)
		}
	}
	m.runs = slices.Clip(m.runs)
	return m, nil
}

// Everything is a map that calls every block of a volume allocated.
func Everything(of lun.Extent) *AllocationMap {
	m := &AllocationMap{}
	m.append(of, 0)
	return m
}

// Without is the map but for blocks that are not to be copied, in rising order: they count as
// unallocated.
func (m *AllocationMap) Without(unused []lun.Extent) *AllocationMap {
	rest := &AllocationMap{runs: lun.Without(m.runs, unused)}
	for _, e := range rest.runs {
		rest.allocated += e.Blocks
	}
	return rest
}

// cannotTell tells whether the device refused to say what is allocated, now and
// for ever.
func cannotTell(err error) bool {
	const illegalRequest = 0x5 // SPC-4 table 49
	var sense *lun.SenseError
	return errors.Is(err, lun.ErrUnsupported) || errors.As(err, &sense) && sense.Key == illegalRequest
}

// Allocated is how many blocks count as allocated.
func (m *AllocationMap) Allocated() uint64 { return m.allocated }

// Within gives the allocated runs inside e, in rising order.
func (m *AllocationMap) Within(e lun.Extent) []lun.Extent {
	var in []lun.Extent
	for i := m.search(e.Start); i < len(m.runs) && m.runs[i].Start < e.End(); i++ {
		if part := m.runs[i].Intersect(e); !part.Empty() {
			in = append(in, part)
		}
	}
	return in
}

// NextAllocated is the first allocated block at or after from; false when there is
// none.
func (m *AllocationMap) NextAllocated(from lun.LBA) (lun.LBA, bool) {
	i := m.search(from)
	if i == len(m.runs) {
		return 0, false
	}
	return max(from, m.runs[i].Start), true
}

// search is the index of the first run that ends after at.
func (m *AllocationMap) search(at lun.LBA) int {
	return sort.Search(len(m.runs), func(i int) bool { return m.runs[i].End() > at })
}

func (m *AllocationMap) append(e lun.Extent, gap uint64) {
	if n := len(m.runs); n > 0 {
		last := &m.runs[n-1]
		if hole := uint64(e.Start - last.End()); hole <= gap {
			last.Blocks += hole + e.Blocks
			m.allocated += hole + e.Blocks
			return
		}
	}
	m.runs = append(m.runs, e)
	m.allocated += e.Blocks
}

func (m *AllocationMap) coarsen(gap uint64) {
	old := m.runs
	m.runs, m.allocated = m.runs[:0], 0
	for _, e := range old {
		m.append(e, gap)
	}
}
