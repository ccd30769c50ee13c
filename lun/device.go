// Package lun is what lunshift meets behind itself: a logical unit that it
// reads and writes as an application client. A Device is a file, a block
// device, or a logical unit of an iSCSI target; all behave alike, and one
// conformance suite (package luntest) holds each to this contract.
//
// The package knows nothing of volumes, flags or initiators.
package lun

import (
	"context"
	"errors"
	"fmt"
)

// LBA is the address of a logical block (SBC-3 3.1.66), counted from 0.
type LBA uint64

// Extent is a run of consecutive logical blocks.
type Extent struct {
	Start  LBA
	Blocks uint64
}

// End is the first block after the extent.
func (e Extent) End() LBA { return e.Start + LBA(e.Blocks) }

// Empty tells whether the extent holds no block.
func (e Extent) Empty() bool { return e.Blocks == 0 }

// Overlaps tells whether the two extents share a block.
func (e Extent) Overlaps(o Extent) bool {
	return max(e.Start, o.Start) < min(e.End(), o.End())
}

// Intersect is the run of blocks that both extents hold; it is empty when they
// share none.
func (e Extent) Intersect(o Extent) Extent {
	start, end := max(e.Start, o.Start), min(e.End(), o.End())
	if start >= end {
		return Extent{Start: start}
	}
	return Extent{Start: start, Blocks: uint64(end - start)}
}

// Join adds e to a list in rising order, to the last extent where it follows on that.
func Join(list []Extent, e Extent) []Extent {
	if n := len(list); n > 0 && list[n-1].End() == e.Start {
		list[n-1].Blocks += e.Blocks
		return list
	}
	return append(list, e)
}

// Subtract gives the blocks of list that are not in e.
func Subtract(list []Extent, e Extent) []Extent {
	var left []Extent
	for _, x := range list {
		if !x.Overlaps(e) {
			left = append(left, x)
			continue
		}
		if x.Start < e.Start {
			left = append(left, Extent{Start: x.Start, Blocks: uint64(e.Start - x.Start)})
		}
		if x.End() > e.End() {
			left = append(left, Extent{Start: e.End(), Blocks: uint64(x.End() - e.End())})
		}
	}
	return left
}

// Without gives the blocks of list that are in none of others; both are in rising order.
func Without(list, others []Extent) (left []Extent) {
	for _, run := range list {
		for len(others) > 0 && others[0].End() <= run.Start {
			others = others[1:]
		}
		for _, o := range others {
			if o.Start >= run.End() {
				break
			}
			if o.Start > run.Start {
				left = append(left, Extent{Start: run.Start, Blocks: uint64(o.Start - run.Start)})
			}
			end := min(o.End(), run.End())
			run.Start, run.Blocks = end, uint64(run.End()-end)
		}
		if !run.Empty() {
			left = append(left, run)
		}
	}
	return left
}

func (e Extent) String() string {
	return fmt.Sprintf("LBA %d+%d", e.Start, e.Blocks)
}

// Info is what a Device says of itself. It does not change while the Device is
// open.
type Info struct {
	// BlockSize is the logical block length in bytes (READ CAPACITY, SBC-3 5.16).
	BlockSize uint32
	// Blocks is the capacity in logical blocks.
	Blocks uint64
	// PhysicalExponent is LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT (SBC-3 5.16.2).
	PhysicalExponent uint8

	// Vendor, Product, Revision are the standard INQUIRY identification
	// (SPC-4 6.6.2), Serial is VPD page 80h, all without padding. Empty where the
	// device has none (files).
	Vendor, Product, Revision, Serial string
	// ID names the device itself, so that two paths to one device compare equal:
	// a logical-unit designator of VPD page 83h such as "naa.6001405…",
	// "eui.…" or "t10.…"; "file:<dev>:<inode>" for a file; "block:<major>:<minor>"
	// for a block device that is not SCSI. Never empty.
	ID string
	// Identity is what another unit must say to be taken for this one; nil where the device
	// has none (files, block devices that are not SCSI, partitions).
	Identity *Identity

	// Thin: the device can leave blocks without storage (SBC-3 4.7.3).
	Thin bool
	// UnmapZeroes: blocks that Unmap deallocated read as zeroes (LBPRZ, SBC-3 5.16.2).
	UnmapZeroes bool
	// ReportsAllocation: Extents tells allocated from unallocated blocks. Where
	// false, Extents calls every block allocated.
	ReportsAllocation bool
	// VolatileCache: a completed write may be lost at power loss until Flush
	// (WCE in the caching mode page, SBC-3 6.4.5; true for files).
	VolatileCache bool
	// MaxTransfer is the largest ReadAt or WriteAt in blocks that the device
	// serves as one command; larger ones are split by the Device itself. 0 is no limit.
	MaxTransfer uint32
	// UnmapGranularity is the optimal unmap granularity in blocks (VPD page B0h); 0 unknown.
	UnmapGranularity uint32
}

// Size is the capacity in bytes.
func (i Info) Size() uint64 { return i.Blocks * uint64(i.BlockSize) }

// Bytes is the length of e in bytes.
func (i Info) Bytes(e Extent) uint64 { return e.Blocks * uint64(i.BlockSize) }

// All is the extent of the whole device.
func (i Info) All() Extent { return Extent{Blocks: i.Blocks} }

// Allocation is a run of blocks with one provisioning status (GET LBA STATUS,
// SBC-3 5.6.2).
type Allocation struct {
	Extent
	// Allocated is false where the device has no storage for the blocks and
	// reads them as zeroes.
	Allocated bool
}

// Device is one logical unit. All methods may be called concurrently; the
// Device orders nothing between commands in flight, except that a command whose
// call begins after another's returned sees what that one did.
//
// Every method but Info and Close ends when ctx ends, with ctx's error; what a
// cancelled write did is then unknown (any of its blocks may be old or new).
// Each logical block is written as a whole or not at all by the device's own
// promise; runs of blocks may be torn.
//
// A method that lies beyond the capacity fails with ErrOutOfRange and does
// nothing. After Close every method fails with ErrClosed.
type Device interface {
	Info() Info

	// ReadAt fills p with the blocks from start on. len(p) is a multiple of
	// BlockSize. p is not used after the return.
	ReadAt(ctx context.Context, p []byte, start LBA) error
	// WriteAt writes p to the blocks from start on. len(p) is a multiple of
	// BlockSize. p is neither changed nor used after the return.
	WriteAt(ctx context.Context, p []byte, start LBA) error
	// Flush returns once every write that returned before the call is on stable
	// storage (SYNCHRONIZE CACHE, fdatasync).
	Flush(ctx context.Context) error
	// Unmap tells the device that the blocks are not needed. With UnmapZeroes
	// every block of e reads as zeroes afterwards, whether or not the device
	// could free it; otherwise each reads as before or as zeroes. On a
	// device that is not Thin it fails with ErrUnsupported.
	Unmap(ctx context.Context, e Extent) error
	// WriteZeroes makes every block of e read as zeroes, without data transfer
	// where the device can, and without allocating where a deallocated block reads
	// as zeroes.
	WriteZeroes(ctx context.Context, e Extent) error
	// Extents gives the provisioning status of blocks from e.Start on: at least
	// one run, consecutive, together a prefix of e (the caller asks again for
	// the rest). An empty e gives none.
	Extents(ctx context.Context, e Extent) ([]Allocation, error)
	// Close gives the device up; commands in flight fail or finish first.
	Close() error
}

// Updater is a Device that can change blocks with no other command between the
// read and the write.
type Updater interface {
	Device
	// Update reads the blocks of e, hands them to modify, which may change them in
	// place, and writes them back; no other write to these blocks comes between.
	// If modify returns an error nothing is written and Update returns
	// it. (COMPARE AND WRITE, SBC-3 5.3, and ORWRITE rest on it.)
	Update(ctx context.Context, e Extent, modify func(blocks []byte) error) error
}

// Prober is a Device that can say at once that a read need not wait.
type Prober interface {
	// TryReadAt is ReadAt when the blocks can be had without waiting. It
	// reports false, p then being undefined, when they cannot, or with an error.
	TryReadAt(p []byte, start LBA) (bool, error)
}

// Resetter is a Device with a volatile cache whose loss Flush alone cannot tell:
// a device that lost power between a write and the flush that follows completes
// that flush all the same. Who must know that a write is on stable storage takes
// Resets before it, and after the flush compares: unless both are equal the write
// is to be repeated.
type Resetter interface {
	// Resets counts the occasions on which the device may have lost its cache. It
	// grows before any command that began after the loss returns.
	Resets() uint64
}

// Reachable is a Device that is reached over a network.
type Reachable interface {
	// Unreachable is nil while commands reach the device: at least one session is
	// logged in and leads to the right logical unit. Otherwise it says in one line why
	// not; errors.Is tells ErrUnavailable, or ErrClosed after Close. It does no
	// I/O, and tells a loss as soon as the connection shows it.
	Unreachable() error
}

// Ender is a context that tells its end by a call, which costs no goroutine and no
// memory. A Device that waits for an array on the caller's own goroutine asks for it.
type Ender interface {
	context.Context
	// OnEnd has e.Ended called once when the context ends, and reports true; or
	// reports false where it has ended. A nil e takes the wish back; once that
	// returned Ended is not running and does not run. One wish at a time.
	OnEnd(e Ended) bool
}

// Ended is told that a context ended. It must not block, nor call the context but
// for Err.
type Ended interface{ Ended(err error) }

// Errors a Device returns, wrapped with what was being done. Sense travels in
// a SenseError.
var (
	// ErrOutOfRange: the command reaches beyond the capacity.
	ErrOutOfRange = errors.New("logical block address out of range")
	// ErrClosed: the Device was closed.
	ErrClosed = errors.New("device closed")
	// ErrUnsupported: the device has no such command.
	ErrUnsupported = errors.New("not supported by the device")
	// ErrUnavailable: the device cannot be reached now; it may come back.
	ErrUnavailable = errors.New("device unavailable")
	// ErrInUse: another process holds the device.
	ErrInUse = errors.New("in use by another process")
	// ErrAuth: the array refused the name or the secret.
	ErrAuth = errors.New("authentication failed")
	// ErrConflict: the device holds a reservation of somebody else (RESERVATION
	// CONFLICT, SAM-5 5.3.1).
	ErrConflict = errors.New("reservation conflict")
)

// SenseError is a CHECK CONDITION of a device (SPC-4 4.5).
type SenseError struct {
	Key, ASC, ASCQ byte
	// LBA is the INFORMATION field where it was valid.
	LBA   LBA
	Valid bool
	// Deferred is of an earlier command that was answered with GOOD; the one that is told of it
	// was not done (SPC-4 4.5.5).
	Deferred bool
}

func (e *SenseError) Error() string {
	s := fmt.Sprintf("CHECK CONDITION %s, ASC/ASCQ %02X/%02Xh", senseKeyName(e.Key), e.ASC, e.ASCQ)
	if e.Valid {
		s += fmt.Sprintf(" at LBA %d", e.LBA)
	}
	return s
}

func senseKeyName(k byte) string {
	names := [...]string{"NO SENSE", "RECOVERED ERROR", "NOT READY", "MEDIUM ERROR",
		"HARDWARE ERROR", "ILLEGAL REQUEST", "UNIT ATTENTION", "DATA PROTECT",
		"BLANK CHECK", "VENDOR SPECIFIC", "COPY ABORTED", "ABORTED COMMAND",
		"reserved", "VOLUME OVERFLOW", "MISCOMPARE", "COMPLETED"}
	return names[k&0xf]
}

// MediumError tells whether a device has the blocks but cannot read or write them
// (MEDIUM ERROR, SPC-4 4.5.6).
func MediumError(err error) bool {
	const key = 0x3
	var sense *SenseError
	return errors.As(err, &sense) && sense.Key == key
}

// Check says whether the extent lies within the device, with an ErrOutOfRange
// that names it if not.
func (i Info) Check(e Extent) error {
	if e.Blocks > i.Blocks || uint64(e.Start) > i.Blocks-e.Blocks {
		return fmt.Errorf("%v of %d blocks: %w", e, i.Blocks, ErrOutOfRange)
	}
	return nil
}
