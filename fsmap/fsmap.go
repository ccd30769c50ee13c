// Package fsmap finds out which logical blocks of a logical unit the file systems on it use,
// for units that cannot tell themselves what is allocated (GET LBA STATUS, SBC-3 5.6).
//
// It reads partition tables (GPT, MBR), LVM2 physical volumes, and the free-space maps of ext2,
// ext3, ext4, XFS and NTFS. A block counts as free only where a file system says so that was left
// clean, all of whose parts that were read agree with one another; everything else counts as
// allocated: what is not understood, not clean, damaged, ambiguous, or between file systems.
//
// What it reads may have been made by anybody. Memory, reads and recursion are bounded, and
// nothing that is on the unit makes it panic. It never writes. It knows nothing of volumes and
// phases: that nobody writes to the unit meanwhile is for the caller to see to.
package fsmap

import (
	"context"
	"errors"
	"fmt"

	"lunshift/lun"
)

const (
	// maxRuns bounds a Map: beyond it the shortest free runs count as allocated.
	maxRuns = 1 << 15
	// leastFree is the shortest free run that is told, in bytes.
	leastFree = 64 << 10
	// maxFindings bounds a Report.
	maxFindings = 256
	// readFloor and readShare bound what is read, in bytes: the floor, and this part of the unit.
	readFloor = 64 << 20
	readShare = 4096
	// chunk is the longest single read, in bytes.
	chunk = 1 << 20
)

// Use says what is known of those who use the unit.
type Use struct {
	// Idle: no host can have a file system of the unit mounted. XFS and NTFS do not mark on the
	// medium that they are mounted before they write the first data into blocks that are still
	// free there, so without Idle they count as allocated. ext2, ext3 and ext4 do.
	Idle bool
	// trust has every checksum count as right, for tests of what lies behind them.
	trust bool
}

// Map says which blocks are free.
type Map struct {
	// Free are runs of blocks that no file system uses, in rising order, apart from one
	// another; 32768 at the most.
	Free []lun.Extent
}

// Blocks is how many blocks are free.
func (m Map) Blocks() (n uint64) {
	for _, e := range m.Free {
		n += e.Blocks
	}
	return n
}

// Finding is one thing that was found on the unit.
type Finding struct {
	// Kind is "ext4", "XFS", "LVM2", "swap" and the like, Where is "the whole unit",
	// "partition 1", "logical volume vg/root".
	Kind, Where string
	// Read tells whether its free blocks count as free.
	Read bool
	// Text is what was found: its use, or why it counts as allocated.
	Text string
}

func (f Finding) String() string {
	s := fmt.Sprintf("%s on %s: %s", f.Kind, f.Where, f.Text)
	if !f.Read {
		s += ": counts as allocated"
	}
	return s
}

// Report is what was found, in the order of the unit; 256 findings at the most.
type Report []Finding

// Allocated reads which blocks of the extent the file systems on dev leave free. It fails only
// where dev cannot be read now or ctx ends; blocks that dev has but cannot read (MEDIUM ERROR)
// make what they belong to count as allocated.
func Allocated(ctx context.Context, dev lun.Device, of lun.Extent, use Use) (Map, Report, error) {
	info := dev.Info()
	if info.BlockSize < 512 || info.BlockSize > 64<<10 || info.BlockSize&(info.BlockSize-1) != 0 || info.Blocks > 1<<62/uint64(info.BlockSize) {
		return Map{}, nil, nil
	}
	m := &mapper{dev: dev, info: info, use: use, left: readFloor + info.Size()/readShare, free: runs{least: leastFree}}
	whole := &space{m: m, where: "the whole unit", size: info.Size(), pieces: []piece{{length: info.Size()}}}
	if err := m.disk(ctx, whole); err != nil {
		return Map{}, nil, err
	}
	var out Map
	for _, r := range m.free.sorted() {
		bs := uint64(info.BlockSize)
		first, end := (r.at+bs-1)/bs, r.end()/bs
		if first >= end {
			continue
		}
		if e := (lun.Extent{Start: lun.LBA(first), Blocks: end - first}).Intersect(of); !e.Empty() {
			out.Free = append(out.Free, e)
		}
	}
	return out, m.report, nil
}

// mapper is one call of Allocated.
type mapper struct {
	dev    lun.Device
	info   lun.Info
	use    Use
	left   uint64 // bytes that may still be read
	free   runs   // in bytes of the unit
	report Report
}

// unreachable is an error of the device that says nothing about its content.
type unreachable struct{ error }

func (u unreachable) Unwrap() error { return u.error }

// fatal tells whether err ends the whole.
func fatal(err error) bool {
	var u unreachable
	return errors.As(err, &u)
}

// space is a run of bytes in which something lies: the unit, a partition, a logical volume.
type space struct {
	m      *mapper
	where  string
	size   uint64
	pieces []piece // in rising order of at, without gaps
}

// piece says where length bytes of a space, from at on, are on the unit.
type piece struct{ at, dev, length uint64 }

// part is the space of length bytes from at on; both were checked.
func (s *space) part(where string, at, length uint64) *space {
	p := &space{m: s.m, where: where}
	p.add(s, at, length)
	return p
}

// add appends what s has at an offset; it was checked.
func (s *space) add(of *space, at, length uint64) {
	of.each(at, length, func(dev, n uint64) error {
		s.pieces = append(s.pieces, piece{s.size, dev, n})
		s.size += n
		return nil
	})
}

// holds tells whether the run lies in the space.
func (s *space) holds(at, length uint64) bool { return length <= s.size && at <= s.size-length }

// each hands out where the run lies on the unit, piece by piece.
func (s *space) each(at, length uint64, yield func(dev, n uint64) error) error {
	lo, hi := 0, len(s.pieces)
	for lo < hi { // the piece that holds at
		mid := (lo + hi) / 2
		if s.pieces[mid].at+s.pieces[mid].length <= at {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	for ; length > 0 && lo < len(s.pieces); lo++ {
		p := s.pieces[lo]
		skip := at - p.at
		n := min(length, p.length-skip)
		if err := yield(p.dev+skip, n); err != nil {
			return err
		}
		at, length = at+n, length-n
	}
	return nil
}

// read fills p from an offset of the space.
func (s *space) read(ctx context.Context, p []byte, at uint64) error {
	if !s.holds(at, uint64(len(p))) {
		return errors.New("it reaches past its end")
	}
	return s.each(at, uint64(len(p)), func(dev, n uint64) error {
		err := s.m.read(ctx, p[:n], dev)
		p = p[n:]
		return err
	})
}

// get is read into memory of its own; length is bounded by the caller.
func (s *space) get(ctx context.Context, at, length uint64) ([]byte, error) {
	if !s.holds(at, length) {
		return nil, errors.New("it reaches past its end")
	}
	p := make([]byte, length)
	return p, s.read(ctx, p, at)
}

// read fills p from an offset of the unit, which it lies in.
func (m *mapper) read(ctx context.Context, p []byte, at uint64) error {
	bs := uint64(m.info.BlockSize)
	for len(p) > 0 {
		skip := at % bs
		n := min(uint64(len(p)), chunk-skip)
		length := (skip + n + bs - 1) / bs * bs
		if length > m.left {
			return errors.New("more would have to be read than a file system of its size should need")
		}
		m.left -= length
		buf := p[:n]
		if length != n {
			buf = make([]byte, length)
		}
		if err := m.dev.ReadAt(ctx, buf, lun.LBA(at/bs)); err != nil {
			if ctx.Err() == nil && lun.MediumError(err) {
				return fmt.Errorf("it cannot be read: %w", err)
			}
			return unreachable{fmt.Errorf("read what the file systems use at byte %d: %w", at, err)}
		}
		if length != n {
			copy(p[:n], buf[skip:])
		}
		p, at = p[n:], at+n
	}
	return nil
}

// wrong tells whether a checksum is wrong.
func (m *mapper) wrong(have, want uint32) bool { return have != want && !m.use.trust }

// find puts a finding into the report.
func (m *mapper) find(f Finding) {
	if len(m.report) < maxFindings {
		m.report = append(m.report, f)
	}
}

// fileSystem has read give the free runs of a file system in s, in bytes of s, and takes them
// over where it does so without an error; an error that says something about the device is
// returned.
func (m *mapper) fileSystem(s *space, read func() (fs, error)) error {
	f, err := read()
	if fatal(err) {
		return err
	}
	if err == nil && !m.use.Idle && !f.marks {
		err = errors.New("initiators may have had it mounted at the start, which it does not show")
	}
	if err != nil {
		m.find(Finding{Kind: f.kind, Where: s.where, Text: err.Error()})
		return nil
	}
	var free uint64
	for _, r := range f.free.sorted() {
		if err := s.each(r.at, r.length, func(dev, n uint64) error {
			m.free.add(dev, n)
			return nil
		}); err != nil {
			return err
		}
	}
	free = f.freeBytes
	used := uint64(100)
	if f.size > 0 {
		used = (f.size - min(free, f.size)) / max(1, (f.size+99)/100)
	}
	m.find(Finding{Kind: f.kind, Where: s.where, Read: true, Text: fmt.Sprintf("clean, %d %% used", min(100, used))})
	return nil
}

// fs is what was read of a file system.
type fs struct {
	kind string
	// marks: the medium says that it is mounted before anything else is written.
	marks bool
	free  runs // in bytes of its space
	// size and freeBytes are for people.
	size, freeBytes uint64
}
