package target

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"lunshift/iscsi"
	"lunshift/lun"
)

// Bits of byte 1 of block commands (SBC-3 5).
const (
	dpo = 0x10
	fua = 0x08
)

// chunk is how much a command that needs memory of its own works on at a time, in
// bytes.
const chunk = 1 << 20

func allocation32(b []byte) int { return int(min(binary.BigEndian.Uint32(b), 1<<30)) }

// place reads LBA and number of blocks of a block command and holds them against
// the capacity.
func (t *task) place() error {
	b := t.cdb[:]
	switch b[0] >> 5 {
	case 0:
		t.lba = uint64(b[1]&0x1f)<<16 | uint64(b[2])<<8 | uint64(b[3])
		if t.blocks = uint64(b[4]); t.blocks == 0 {
			t.blocks = 256
		}
	case 1, 2:
		t.lba, t.blocks = uint64(binary.BigEndian.Uint32(b[2:])), uint64(binary.BigEndian.Uint16(b[7:]))
	case 5:
		t.lba, t.blocks = uint64(binary.BigEndian.Uint32(b[2:])), uint64(binary.BigEndian.Uint32(b[6:]))
	default:
		t.lba, t.blocks = binary.BigEndian.Uint64(b[2:]), uint64(binary.BigEndian.Uint32(b[10:]))
	}
	return t.inRange()
}

func (t *task) inRange() error {
	if t.u.info.Check(t.extent()) != nil {
		return senseLBARange
	}
	return nil
}

func (t *task) extent() lun.Extent { return lun.Extent{Start: lun.LBA(t.lba), Blocks: t.blocks} }

// transfer is place for a command that moves its blocks; it gives their length.
func (t *task) transfer() (int, error) {
	if err := t.place(); err != nil {
		return 0, err
	}
	if t.blocks > maxTransfer>>t.u.shift {
		return 0, senseInvalidField
	}
	return int(t.blocks << t.u.shift), nil
}

func decodeRead(t *task) (err error) {
	t.alloc, err = t.transfer()
	return err
}

// read is READ. Where the initiator takes fewer bytes than the CDB says, only the
// blocks that it takes a part of are read.
func read(t *task) error {
	if t.cdb[0] != 0x08 && t.cdb[1]&fua != 0 {
		if err := t.settle(); err != nil {
			return err
		}
	}
	bs := int(t.u.info.BlockSize)
	n := min(t.alloc, (int(t.expected)+bs-1)/bs*bs)
	if t.flags&iscsi.FlagRead == 0 {
		n = 0
	}
	if n > 0 {
		t.inBuf = t.buffer(n)
		t.in = t.inBuf.b
		if err := t.u.Device.ReadAt(t, t.in, lun.LBA(t.lba)); err != nil {
			return err
		}
	}
	t.whole = t.alloc
	return nil
}

func decodeWrite(t *task) (err error) {
	t.want, err = t.transfer()
	return err
}

func write(t *task) error {
	if t.want == 0 {
		return nil
	}
	put := func() error { return t.u.Device.WriteAt(t, t.out, lun.LBA(t.lba)) }
	if t.cdb[0] != 0x0a && t.cdb[1]&fua != 0 {
		return t.stable(put)
	}
	return put()
}

// mostRepeats is how often one command is done again because the unit lost its cache.
const mostRepeats = 5

// stable has do write, and returns once that is on stable storage. A unit that lost
// its cache between the two (lun.Resetter) completes the flush all the same; then both are
// done again.
func (t *task) stable(do func() error) error {
	for range mostRepeats {
		era := t.resets()
		if err := do(); err != nil {
			return err
		}
		if err := t.settle(); err != nil {
			return err
		}
		if t.resets() == era {
			return nil
		}
	}
	return fmt.Errorf("the unit lost its cache %d times during one command: %w", mostRepeats, lun.ErrUnavailable)
}

// resets counts the occasions on which the unit may have lost its cache.
func (t *task) resets() uint64 {
	if d, ok := t.u.Device.(lun.Resetter); ok {
		return d.Resets()
	}
	return 0
}

// settle puts what was written on stable storage, where it is not already.
func (t *task) settle() error {
	if !t.u.info.VolatileCache {
		return nil
	}
	return t.u.Device.Flush(t)
}

// bytchk is the BYTCHK field (SBC-3 5.28); 10b is reserved.
func (t *task) bytchk() byte { return t.cdb[1] >> 1 & 3 }

func decodeWriteVerify(t *task) error {
	if t.bytchk() > 1 {
		return senseInvalidField
	}
	return decodeWrite(t)
}

// writeVerify is WRITE AND VERIFY: the blocks are on the medium and were compared.
func writeVerify(t *task) error {
	if t.want > 0 {
		if err := t.stable(func() error { return t.u.Device.WriteAt(t, t.out, lun.LBA(t.lba)) }); err != nil {
			return err
		}
	}
	t.blocks = uint64(t.want) >> t.u.shift
	return t.compare(t.out)
}

func decodeVerify(t *task) (err error) {
	switch t.bytchk() {
	case 0:
		return t.place()
	case 1:
		t.want, err = t.transfer()
		return err
	case 3:
		if err = t.place(); t.blocks > 0 {
			t.want = int(t.u.info.BlockSize)
		}
		return err
	}
	return senseInvalidField
}

func verify(t *task) error {
	if t.bytchk() == 0 {
		return t.compare(nil)
	}
	return t.compare(t.out)
}

// compare reads the task's blocks and holds them against data: as long as they are,
// one block for each of them, or nil for nothing but reading.
func (t *task) compare(data []byte) error {
	bs := uint64(t.u.info.BlockSize)
	step := min(t.blocks, chunk/bs)
	if step == 0 {
		return nil
	}
	buf := newBuffer(int(step * bs))
	defer buf.Release()
	for done := uint64(0); done < t.blocks; {
		n := min(step, t.blocks-done)
		got := buf.b[:n*bs]
		if err := t.u.Device.ReadAt(t, got, lun.LBA(t.lba+done)); err != nil {
			return err
		}
		switch {
		case data == nil:
		case uint64(len(data)) == bs:
			for i := range n {
				if at := differ(got[i*bs:(i+1)*bs], data); at >= 0 {
					return miscompare(at)
				}
			}
		default:
			if at := differ(got, data[done*bs:][:len(got)]); at >= 0 {
				return miscompare(int(done*bs) + at)
			}
		}
		done += n
	}
	return nil
}

// differ is the first place where a and b, of one length, differ, or -1.
func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// miscompare is MISCOMPARE DURING VERIFY OPERATION with the byte offset of the
// first difference in the INFORMATION field (SBC-3 4.18.1).
func miscompare(at int) error {
	return &lun.SenseError{Key: keyMiscompare, ASC: 0x1d, ASCQ: 0, LBA: lun.LBA(at), Valid: true}
}

func decodeCompareWrite(t *task) error {
	t.lba, t.blocks = binary.BigEndian.Uint64(t.cdb[2:]), uint64(t.cdb[13])
	if err := t.inRange(); err != nil {
		return err
	}
	if t.blocks > maxCompare(t.u.info.BlockSize) || t.blocks == 0 && t.flags&iscsi.FlagWrite != 0 && t.expected > 0 {
		return senseInvalidField
	}
	t.want = int(2 * t.blocks << t.u.shift)
	return nil
}

// maxCompare is the MAXIMUM COMPARE AND WRITE LENGTH in blocks: what the command has
// memory for besides its data.
func maxCompare(blockSize uint32) uint64 { return min(255, chunk/uint64(blockSize)) }

// compareAndWrite is COMPARE AND WRITE: no other write comes between the comparison
// and the write.
func compareAndWrite(t *task) error {
	if t.want == 0 {
		return nil
	}
	expect, data := t.out[:t.want/2], t.out[t.want/2:]
	era := t.resets()
	err := t.u.Device.Update(t, t.extent(), func(blocks []byte) error {
		if at := differ(blocks, expect); at >= 0 {
			return miscompare(at)
		}
		copy(blocks, data)
		return nil
	})
	if err != nil {
		return err
	}
	if t.cdb[1]&fua == 0 {
		return nil
	}
	if err := t.settle(); err != nil {
		return err
	}
	if t.resets() != era { // it cannot be done again: another write may have come between
		return fmt.Errorf("the unit lost its cache during the command: %w", lun.ErrUnavailable)
	}
	return nil
}

func decodeSync(t *task) error { return t.place() }

// synchronizeCache is SYNCHRONIZE CACHE; IMMED is taken and the answer still comes
// when the data is safe. The device flushes as a whole.
func synchronizeCache(t *task) error { return t.u.Device.Flush(t) }

// orWrite is ORWRITE (16): each block becomes what it was or what was sent, and no other
// write of the block comes between. As between the blocks of a WRITE, a write of another
// command may come between two runs of blocks.
func orWrite(t *task) error {
	if t.want > 0 && t.cdb[1]&fua != 0 {
		return t.stable(t.or)
	}
	return t.or()
}

func (t *task) or() error {
	bs := uint64(t.u.info.BlockSize)
	for out, at := t.out[:t.want], t.lba; len(out) > 0; {
		n := min(len(out), chunk)
		part := out[:n]
		e := lun.Extent{Start: lun.LBA(at), Blocks: uint64(n) / bs}
		err := t.u.Device.Update(t, e, func(blocks []byte) error {
			for i, b := range part {
				blocks[i] |= b
			}
			return nil
		})
		if err != nil {
			return err
		}
		out, at = out[n:], at+e.Blocks
	}
	return nil
}
