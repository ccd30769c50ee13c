package target

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/gostor/gotgt/pkg/api"

	"lunshift/lun"
)

// unit is one logical unit as the sessions meet it.
type unit struct {
	Unit
	// rules are what of Unit may change: its Initiators and PortalGroups are not looked at.
	rules  atomic.Pointer[rules]
	node   *node
	info   lun.Info
	shift  uint       // log2 of the block length
	prober lun.Prober // nil where the device is none
	lu     *api.SCSILu
	gate   gate
	inq    atomic.Pointer[inquiryData] // what INQUIRY says
	state  atomic.Uint32               // AccessState
	// changed: the state is not what it was at first.
	changed atomic.Bool

	reserved *reservations
}

func newUnit(u Unit) (*unit, error) {
	where := fmt.Sprintf("%s LUN %d", u.IQN, u.LUN)
	info := u.Device.Info()
	if info.BlockSize < 512 || info.BlockSize > 65536 || bits.OnesCount32(info.BlockSize) != 1 {
		return nil, fmt.Errorf("%s: block size %d is not a power of two from 512 to 65536", where, info.BlockSize)
	}
	if info.Blocks == 0 || info.Blocks > 1<<63/uint64(info.BlockSize) {
		return nil, fmt.Errorf("%s: %d blocks of %d bytes cannot be served", where, info.Blocks, info.BlockSize)
	}
	sum := sha256.Sum256([]byte(where))
	if u.Vendor == "" {
		u.Vendor = "LUNSHIFT"
	}
	if u.Product == "" {
		u.Product = "VIRTUAL-DISK"
	}
	if u.Revision == "" {
		u.Revision = "1"
	}
	if u.Serial == "" {
		u.Serial = hex.EncodeToString(sum[:8])
	}
	if u.NAA == 0 {
		// NAA 3h, locally assigned (SPC-4 7.8.6.6).
		u.NAA = binary.BigEndian.Uint64(sum[8:])&(1<<60-1) | 3<<60
	}
	n := &unit{Unit: u, info: info, shift: uint(bits.TrailingZeros32(info.BlockSize))}
	n.prober, _ = u.Device.(lun.Prober)
	n.rules.Store(&rules{u.Initiators, u.PortalGroups})
	n.gate.drained = make(chan struct{})
	n.inq.Store(newInquiryData(n, u.Identity))
	n.state.Store(uint32(u.Access))
	n.lu = newLogicalUnit(n)
	var err error
	n.reserved, err = newReservations(n)
	return n, err
}

// gate counts the commands inside a unit and can be closed.
type gate struct {
	n       atomic.Int64 // commands inside, less gateClosed once closed
	drained chan struct{}
	once    sync.Once
}

const gateClosed = 1 << 62

// enter is false when the gate is closed; else leave must follow.
func (g *gate) enter() bool {
	if g.n.Add(1) > 0 {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.n.Add(-1) == -gateClosed {
		g.once.Do(func() { close(g.drained) })
	}
}

// close lets nobody in any more; drained is closed when the last one left.
func (g *gate) close() {
	for {
		n := g.n.Load()
		if n < 0 {
			return
		}
		if g.n.CompareAndSwap(n, n-gateClosed) {
			if n == 0 {
				g.once.Do(func() { close(g.drained) })
			}
			return
		}
	}
}

func (g *gate) closed() bool { return g.n.Load() < 0 }
