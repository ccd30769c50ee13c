package target

import (
	"encoding/binary"

	"lunshift/lun"
)

const (
	// maxUnmapBlocks is the most blocks one UNMAP covers (MAXIMUM UNMAP LBA COUNT).
	maxUnmapBlocks = 1 << 20
	// maxUnmap is the most one WRITE SAME covers, in bytes.
	maxUnmap uint64 = 4 << 30
	// maxUnmapDescriptors is MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT.
	maxUnmapDescriptors = 256
	// maxStatusDescriptors bounds one answer of GET LBA STATUS.
	maxStatusDescriptors = 2048
)

func decodeUnmap(t *task) error {
	t.want = int(binary.BigEndian.Uint16(t.cdb[7:]))
	return nil
}

// unmap is UNMAP. All descriptors are checked before the first takes effect.
func unmap(t *task) error {
	if t.want == 0 {
		return nil
	}
	if len(t.out) < 8 {
		return senseParamLength
	}
	n := int(binary.BigEndian.Uint16(t.out[2:]))
	if n > len(t.out)-8 {
		return senseParamLength
	}
	n -= n % 16 // a descriptor that is not whole is ignored (SBC-3 5.28.2)
	if n/16 > maxUnmapDescriptors {
		return senseParamField
	}
	var extents []lun.Extent
	total := uint64(0)
	for d := t.out[8 : 8+n]; len(d) > 0; d = d[16:] {
		e := lun.Extent{Start: lun.LBA(binary.BigEndian.Uint64(d)), Blocks: uint64(binary.BigEndian.Uint32(d[8:]))}
		if t.u.info.Check(e) != nil {
			return senseLBARange
		}
		total += e.Blocks
		if !e.Empty() {
			extents = append(extents, e)
		}
	}
	if total > maxUnmapBlocks {
		return senseParamField
	}
	for _, e := range extents {
		if err := t.u.Device.Unmap(t, e); err != nil {
			return err
		}
	}
	return nil
}

// Bits of WRITE SAME (SBC-3 5.44).
const (
	wsUnmap = 0x08
	wsNDOB  = 0x01
)

// lengthAt is where the NUMBER OF LOGICAL BLOCKS of WRITE SAME is.
func (t *task) lengthAt() int {
	if t.cdb[0] == 0x41 {
		return 7
	}
	return 10
}

func decodeWriteSame(t *task) error {
	if err := t.place(); err != nil {
		return err
	}
	// WSNZ is reported: no number is no way to say "to the end of the medium", by which an
	// initiator in error would lose all that follows.
	if t.blocks == 0 || t.blocks > maxUnmap>>t.u.shift {
		return badField{at: t.lengthAt(), bit: -1}
	}
	if t.cdb[1]&wsUnmap != 0 && !t.u.info.Thin {
		return badField{at: 1, bit: 3}
	}
	if t.cdb[1]&wsNDOB == 0 {
		t.want = int(t.u.info.BlockSize)
	}
	return nil
}

// writeSame is WRITE SAME. Blocks of zeroes are written without transfer, or
// deallocated where the UNMAP bit allows it and they then read as zeroes;
// whatever the device does, the blocks read as what was sent.
func writeSame(t *task) error {
	if t.cdb[1]&wsNDOB != 0 || allZero(t.out) {
		if t.cdb[1]&wsUnmap != 0 && t.u.info.UnmapZeroes {
			return t.u.Device.Unmap(t, t.extent())
		}
		return t.u.Device.WriteZeroes(t, t.extent())
	}
	bs := uint64(t.u.info.BlockSize)
	step := min(t.blocks, chunk/bs)
	buf := newBuffer(int(step * bs))
	defer buf.Release()
	for i := range step {
		copy(buf.b[i*bs:], t.out)
	}
	for done := uint64(0); done < t.blocks; {
		n := min(step, t.blocks-done)
		if err := t.u.Device.WriteAt(t, buf.b[:n*bs], lun.LBA(t.lba+done)); err != nil {
			return err
		}
		done += n
	}
	return nil
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

func decodeLBAStatus(t *task) error {
	t.lba, t.blocks = binary.BigEndian.Uint64(t.cdb[2:]), 1
	t.alloc = allocation32(t.cdb[10:])
	return t.inRange()
}

// getLBAStatus is GET LBA STATUS: the provisioning of blocks from the LBA on, as many
// descriptors as the allocation length takes.
func getLBAStatus(t *task) error {
	room := min(max((t.alloc-8)/16, 1), maxStatusDescriptors)
	out := make([]byte, 8, 8+16*min(room, 64))
	rest := lun.Extent{Start: lun.LBA(t.lba), Blocks: t.u.info.Blocks - t.lba}
	var last lun.Allocation
	put := func() {
		for last.Blocks > 0 && len(out) < 8+16*room {
			n := min(last.Blocks, 1<<32-1)
			d := binary.BigEndian.AppendUint64(out, uint64(last.Start))
			d = binary.BigEndian.AppendUint32(d, uint32(n))
			status := byte(1) // deallocated
			if last.Allocated {
				status = 0 // mapped
			}
			out = append(d, status, 0, 0, 0)
			last.Start += lun.LBA(n)
			last.Blocks -= n
		}
	}
	// A few windows, so that no one command scans a large device.
	for range 16 {
		if rest.Empty() || len(out) >= 8+16*room {
			break
		}
		window := rest
		window.Blocks = min(window.Blocks, maxUnmap>>t.u.shift)
		runs, err := t.u.Device.Extents(t, window)
		if err != nil {
			return err
		}
		next := rest.Start
		for _, r := range runs {
			if r.Start != next || r.Empty() {
				return senseInternal // not a prefix of what was asked for
			}
			next = r.End()
			if last.Blocks > 0 && last.Allocated == r.Allocated {
				last.Blocks += r.Blocks
				continue
			}
			put()
			last = r
		}
		if next == rest.Start {
			return senseInternal
		}
		rest.Blocks -= uint64(next - rest.Start)
		rest.Start = next
	}
	put()
	binary.BigEndian.PutUint32(out, uint32(len(out)-4))
	return t.reply(out, t.alloc)
}
