package control

import (
	"context"
	"fmt"

	"lunshift/conf"
	"lunshift/fsmap"
	"lunshift/lun"
	"lunshift/proxy"
)

// inspectFileSystems says what tells the allocation of the source, and takes what its file systems
// have free, where these are asked, off what is to be copied; runs are some of the allocated
// ones, of which it gives those that stay.
func (r *VolumeReport) inspectFileSystems(ctx context.Context, v conf.Volume, source lun.Device, runs []lun.Extent) ([]lun.Extent, error) {
	a, info := proxy.Allocation(v.Allocation), source.Info()
	r.Allocation, r.AllocationFound = a.Describe(info, v.Seeded), []string{}
	if a == proxy.AllocationAll {
		r.Allocated, r.AllocatedKnown = info.Size(), true
		return []lun.Extent{info.All()}, nil
	}
	if r.Phase != proxy.Ready || !a.FileSystems(info, v.Seeded) {
		return runs, nil
	}
	limit, cancel := context.WithTimeout(ctx, allocationLimit)
	defer cancel()
	// Whether a file system is in use at the start only the start can tell.
	m, found, err := fsmap.Allocated(limit, source, info.All(), fsmap.Use{Idle: true})
	switch {
	case err != nil && limit.Err() != nil && ctx.Err() == nil:
		r.AllocationFound = append(r.AllocationFound, fmt.Sprintf("not found out within %v", allocationLimit))
		return runs, nil
	case err != nil:
		return nil, err
	}
	for _, f := range found {
		r.AllocationFound = append(r.AllocationFound, f.String())
	}
	if !info.ReportsAllocation {
		r.Allocated -= m.Blocks() * uint64(info.BlockSize)
	}
	return lun.Without(runs, m.Free), nil
}
