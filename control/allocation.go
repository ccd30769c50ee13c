package control

import (
	"context"
	"fmt"

	"lunshift/conf"
	"lunshift/fsmap"
	"lunshift/lun"
	"lunshift/proxy"
)

// inspectFileSystems says what tells the allocation of the source, and gives what its file systems
// have free, in rising order, where these are asked.
func (r *VolumeReport) inspectFileSystems(ctx context.Context, v conf.Volume, source lun.Device) (free []lun.Extent, err error) {
	a, info := proxy.Allocation(v.Allocation), source.Info()
	r.Allocation, r.AllocationFound = a.Describe(info, v.Seeded), []string{}
	if r.Phase != proxy.Ready || !a.FileSystems(info, v.Seeded) {
		return nil, nil
	}
	limit, cancel := context.WithTimeout(ctx, allocationLimit)
	defer cancel()
	// Whether a file system is in use at the start only the start can tell.
	m, found, err := fsmap.Allocated(limit, source, info.All(), fsmap.Use{Idle: true})
	switch {
	case err != nil && limit.Err() != nil && ctx.Err() == nil:
		r.AllocationFound = append(r.AllocationFound, fmt.Sprintf("not found out within %v", allocationLimit))
		return nil, nil
	case err != nil:
		return nil, err
	}
	for _, f := range found {
		r.AllocationFound = append(r.AllocationFound, f.String())
	}
	return m.Free, nil
}

// allocated counts the bytes that dev has storage for and that are not in free, which is in rising
// order, within allocationLimit, and gives some of the runs they are in, from all over the device.
func allocated(ctx context.Context, dev lun.Device, a proxy.Allocation, free []lun.Extent) (bytes uint64, known bool, some []lun.Extent, err error) {
	info := dev.Info()
	every, seen := 1, 0 // of the runs seen, every so many-th is kept
	count := func(runs ...lun.Extent) {
		for _, run := range lun.Without(runs, free) {
			bytes += info.Bytes(run)
			if seen++; seen%every == 0 {
				some = append(some, run)
			}
			if len(some) == sampleRuns {
				for i := range sampleRuns / 2 {
					some[i] = some[2*i+1]
				}
				some, every = some[:sampleRuns/2], every*2
			}
		}
	}
	if a == proxy.AllocationAll || !info.ReportsAllocation {
		count(info.All())
		return bytes, true, some, nil
	}
	limit, cancel := context.WithTimeout(ctx, allocationLimit)
	defer cancel()
	for rest := info.All(); !rest.Empty(); {
		runs, err := dev.Extents(limit, rest)
		if err != nil {
			if limit.Err() != nil && ctx.Err() == nil {
				return bytes, false, some, nil
			}
			return bytes, false, some, err
		}
		if len(runs) == 0 {
			return bytes, false, some, fmt.Errorf("no answer for %v", rest)
		}
		for _, run := range runs {
			for len(free) > 0 && free[0].End() <= run.Start {
				free = free[1:]
			}
			if run.Allocated {
				count(run.Extent)
			}
		}
		end := runs[len(runs)-1].End()
		rest = lun.Extent{Start: end, Blocks: uint64(info.All().End() - end)}
	}
	return bytes, true, some, nil
}
