package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	copier "lunshift/copy"
	"lunshift/fsmap"
	"lunshift/lun"
	"lunshift/state"
)

// Allocation says what tells which blocks of the source are copied.
type Allocation string

// The kinds of allocation. The empty one is AllocationAuto.
const (
	// AllocationAuto: the device where it reports allocation, else the file systems; not these
	// where both sides are compared, as blocks that are free are often equal there.
	AllocationAuto Allocation = "auto"
	// AllocationDevice: the device (GET LBA STATUS, SEEK_HOLE), else everything.
	AllocationDevice Allocation = "device"
	// AllocationFileSystem: what both the device, where it reports allocation, and the file
	// systems call allocated.
	AllocationFileSystem Allocation = "filesystem"
	// AllocationAll: everything.
	AllocationAll Allocation = "all"
)

// FileSystems tells whether the file systems on a source are asked; compared says whether both
// sides are compared.
func (a Allocation) FileSystems(source lun.Info, compared bool) bool {
	switch a {
	case AllocationFileSystem:
		return true
	case AllocationDevice, AllocationAll:
		return false
	}
	return !source.ReportsAllocation && !compared
}

// Describe says in one line what tells the allocation of a source.
func (a Allocation) Describe(source lun.Info, compared bool) string {
	fs, device := a.FileSystems(source, compared), source.ReportsAllocation && a != AllocationAll
	switch {
	case fs && device:
		return "as the source and its file systems tell"
	case fs:
		return "as the file systems of the source tell"
	case device:
		return "as the source tells"
	case a == AllocationAll:
		return "everything, as allocation = \"all\""
	case a == AllocationDevice:
		return "everything, as the source does not tell"
	}
	return "everything, as the source does not tell and both sides are compared"
}

// unused is what a migration leaves out because the file systems on the source had it free at
// the start. There the source keeps what it had, and the destination reads zeroes, until an
// initiator writes. It is found once and kept in the state before the first of it is flagged, so
// that a comparison knows of it whatever is on the source by then.
type unused struct {
	started time.Time // of the migration that it belongs to
	runs    []lun.Extent
	report  []string // what was found
}

// usage is what the volume knows of its source's file systems.
type usage struct {
	// known: an earlier run of the service had the volume in phase ready; what initiators
	// wrote by it is not known.
	known bool
	// wrote: an initiator wrote to the source in this run.
	wrote atomic.Bool
	// idle: no host can have had a file system of the source mounted at the start.
	idle atomic.Bool
	// left is what is left out; nil while that is not found out, or nothing was asked.
	left atomic.Pointer[unused]
}

// frozen tells whether the source is as it was at the start, so that its file systems may be read.
func (v *Volume) frozen() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.Phase() == Migrating && !v.record.Mirrored
}

// sourceIdle looks, while commands are held for the start, whether anybody can have a file system of
// the source mounted. XFS and NTFS write data into blocks that are free on the medium before the medium
// shows that they are mounted.
func (v *Volume) sourceIdle() {
	u := &v.usage
	u.idle.Store(!u.known && !u.wrote.Load() && len(v.cfg.Target.Sessions(v.cfg.IQN)) == 0)
}

// survey says what of the source is copied.
func (v *Volume) survey(ctx context.Context, seen func(uint64)) (*copier.AllocationMap, error) {
	all := v.info.All()
	if v.cfg.Allocation == AllocationAll {
		return copier.Everything(all), nil
	}
	m, err := copier.Survey(ctx, v.source, all, seen)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	compared := v.record.Compare
	v.mu.Unlock()
	if !v.cfg.Allocation.FileSystems(v.source.Info(), compared) {
		return m, nil
	}
	left, err := v.findUnused(ctx)
	if err != nil || left == nil {
		return m, err
	}
	return m.Without(left.runs), nil
}

// findUnused reads the file systems on the source and keeps what they have free, once in a
// migration; nil where the source is not what it was at the start any more.
func (v *Volume) findUnused(ctx context.Context) (*unused, error) {
	if left := v.usage.left.Load(); left != nil {
		return left, nil
	}
	if !v.frozen() {
		return nil, nil
	}
	v.mu.Lock()
	started := v.record.StartedAt
	v.mu.Unlock()
	if started == nil {
		return nil, errors.New("the state does not say when the migration was started")
	}
	m, report, err := fsmap.Allocated(ctx, v.source, v.info.All(), fsmap.Use{Idle: v.usage.idle.Load()})
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	if !v.frozen() {
		return nil, nil
	}
	left := &unused{started: *started, runs: m.Free}
	for _, f := range report {
		left.report = append(left.report, f.String())
		v.log.Infof("allocation: %s", f)
	}
	data := left.encode()
	if len(data) > state.MostUnused {
		return nil, fmt.Errorf("what the file systems of the source have free takes %d bytes, at most %d are kept", len(data), state.MostUnused)
	}
	if err := v.store.PutUnused(ctx, v.cfg.Name, data); err != nil {
		return nil, err
	}
	v.usage.left.Store(left)
	return left, nil
}

// loadUnused takes up what an earlier run of the service left out in this migration.
func (v *Volume) loadUnused(r state.Record) error {
	if p := Phase(r.Phase); p == Ready || r.StartedAt == nil {
		return nil
	}
	data, err := v.store.Unused(v.cfg.Name)
	if err != nil || data == nil {
		return err
	}
	left, err := decodeUnused(data, v.info.All())
	if err != nil {
		return v.errorf("its state is damaged: what the copy leaves out: %w", err)
	}
	if left.started.Equal(*r.StartedAt) {
		v.usage.left.Store(left)
	}
	return nil
}

// leftOut gives the runs that the copy leaves out, in rising order.
func (v *Volume) leftOut() []lun.Extent {
	if left := v.usage.left.Load(); left != nil {
		return left.runs
	}
	return nil
}

// encode writes numbers as varints: the time of the start, the lines with their lengths, the
// runs as what lies between them and how long they are.
func (u *unused) encode() []byte {
	b := binary.AppendVarint(nil, u.started.UnixNano())
	b = binary.AppendUvarint(b, uint64(len(u.report)))
	for _, line := range u.report {
		b = append(binary.AppendUvarint(b, uint64(len(line))), line...)
	}
	at := lun.LBA(0)
	for _, e := range u.runs {
		b = binary.AppendUvarint(b, uint64(e.Start-at))
		b = binary.AppendUvarint(b, e.Blocks)
		at = e.End()
	}
	return b
}

// decodeUnused reads what encode wrote, of a volume of the extent all.
func decodeUnused(b []byte, all lun.Extent) (*unused, error) {
	short := errors.New("it ends too early")
	number := func() (uint64, bool) {
		n, size := binary.Uvarint(b)
		if size <= 0 {
			return 0, false
		}
		b = b[size:]
		return n, true
	}
	nano, size := binary.Varint(b)
	if size <= 0 {
		return nil, short
	}
	b = b[size:]
	u := &unused{started: time.Unix(0, nano)}
	lines, ok := number()
	for ; ok && lines > 0; lines-- {
		var n uint64
		if n, ok = number(); !ok || n > uint64(len(b)) {
			return nil, short
		}
		u.report = append(u.report, string(b[:n]))
		b = b[n:]
	}
	if !ok {
		return nil, short
	}
	for at := lun.LBA(0); len(b) > 0; {
		gap, ok1 := number()
		blocks, ok2 := number()
		if !ok1 || !ok2 {
			return nil, short
		}
		if gap > uint64(all.End()-at) || blocks == 0 || blocks > uint64(all.End()-at)-gap {
			return nil, errors.New("a run lies out of range")
		}
		e := lun.Extent{Start: at + lun.LBA(gap), Blocks: blocks}
		u.runs = append(u.runs, e)
		at = e.End()
	}
	return u, nil
}
