package peer

import (
	"context"
	"fmt"
	"sync/atomic"

	"lunshift/lun"
)

// recordSize is the length of a record in bytes: a block.
const recordSize = 512

// Records are what writers write to several volumes: each writer numbers its records, writes
// record n to volume n mod Volumes, and begins none before the one before was acknowledged. So an
// image of the volumes at one instant has of each writer the records up to some number, and no
// others.
type Records struct {
	Volumes int
	// Share is the number of blocks of each volume that a writer fills, from its number times
	// Share on.
	Share uint64
	acked []atomic.Int64 // by writer
}

// NewRecords begins with none, on volumes of size bytes.
func NewRecords(volumes, writers int, size uint64) *Records {
	return &Records{Volumes: volumes, Share: size / recordSize / uint64(writers), acked: make([]atomic.Int64, writers)}
}

// Write has a writer go on after its last acknowledged record until its blocks are full, ctx
// ends or a write fails. One call for each writer at a time; devices are the volumes.
func (r *Records) Write(ctx context.Context, writer int, devices []lun.Device) error {
	block := make([]byte, recordSize)
	for n := uint64(r.acked[writer].Load()); n < r.Room(); n++ {
		at := r.at(writer, n)
		Stamp(block, recordSize, at, uint64(writer+1), n+1)
		if err := devices[n%uint64(r.Volumes)].WriteAt(ctx, block, lun.LBA(at)); err != nil {
			return fmt.Errorf("writer %d, record %d: %w", writer, n, err)
		}
		r.acked[writer].Store(int64(n + 1))
	}
	return nil
}

// Room is how many records a writer has in all.
func (r *Records) Room() uint64 { return r.Share * uint64(r.Volumes) }

func (r *Records) at(writer int, n uint64) uint64 {
	return uint64(writer)*r.Share + n/uint64(r.Volumes)
}

// Acknowledged counts the records of each writer that were.
func (r *Records) Acknowledged() []int64 {
	var list []int64
	for w := range r.acked {
		list = append(list, r.acked[w].Load())
	}
	return list
}

// Check looks at images of the volumes, taken at one instant: of each writer, from its record
// from on, none is missing of which a later one is there, and those below least are there. from
// may be nil. It gives how many there are, and says what is wrong.
func (r *Records) Check(images [][]byte, from, least []int64) (have []int64, wrong error) {
	for w := range r.acked {
		first := uint64(0)
		if from != nil {
			first = uint64(from[w])
		}
		missing, last := ^uint64(0), first
		for n := first; n < r.Room(); n++ {
			volume := n % uint64(r.Volumes)
			at := r.at(w, n)
			version, whole := Stamped(images[volume][at*recordSize:(at+1)*recordSize], at, uint64(w+1))
			if !whole || version != n+1 {
				missing = min(missing, n)
				continue
			}
			if last = n + 1; missing < n {
				return have, fmt.Errorf("record %d of writer %d is on volume %d, but record %d is not on volume %d", n, w, volume, missing, missing%uint64(r.Volumes))
			}
		}
		if last < uint64(least[w]) {
			return have, fmt.Errorf("writer %d has %d records there, and %d were acknowledged before", w, last, least[w])
		}
		have = append(have, int64(last))
	}
	return have, nil
}
