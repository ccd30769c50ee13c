package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"lunshift/lun"
)

func rw6(op byte, lba uint32, blocks byte) []byte {
	return []byte{op, byte(lba >> 16), byte(lba >> 8), byte(lba), blocks, 0}
}

func rw10(op byte, lba uint32, blocks uint16) []byte {
	b := binary.BigEndian.AppendUint32([]byte{op, 0}, lba)
	return append(binary.BigEndian.AppendUint16(append(b, 0), blocks), 0)
}

func rw12(op byte, lba, blocks uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{op, 0}, lba)
	return append(binary.BigEndian.AppendUint32(b, blocks), 0, 0)
}

func bytchk(cdb []byte) []byte {
	cdb[1] |= 0x02
	return cdb
}

// TestEachCommandOfADiskDoesWhatItSays names every command by its opcode, apart from the
// table that serves them.
func TestEachCommandOfADiskDoesWhatItSays(t *testing.T) {
	m := newMemory(512, 1024)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	at := func(lba, n int) []byte { return m.bytes()[lba*512 : (lba+n)*512] }
	const lba, n = 40, 3

	for k, cdb := range [][]byte{
		rw6(0x0a, lba, n), rw10(0x2a, lba, n), rw12(0xaa, lba, n), rw16(0x8a, lba, n), // WRITE
		rw10(0x2e, lba, n), rw12(0xae, lba, n), rw16(0x8e, lba, n), // WRITE AND VERIFY
		bytchk(rw10(0x2e, lba, n)), bytchk(rw12(0xae, lba, n)), bytchk(rw16(0x8e, lba, n)),
	} {
		out := pattern(n*512, byte(k+1))
		i.good(cdb, out, 0)
		if !bytes.Equal(at(lba, n), out) {
			t.Errorf("CDB %x did not write its blocks", cdb)
		}
	}
	want := at(lba, n)
	for _, cdb := range [][]byte{rw6(0x08, lba, n), rw10(0x28, lba, n), rw12(0xa8, lba, n), rw16(0x88, lba, n)} { // READ
		if got := i.good(cdb, nil, n*512); !bytes.Equal(got.data, want) {
			t.Errorf("CDB %x did not read its blocks", cdb)
		}
	}
	wrong := bytes.Clone(want)
	wrong[700]++
	for _, cdb := range [][]byte{rw10(0x2f, lba, n), rw12(0xaf, lba, n), rw16(0x8f, lba, n)} { // VERIFY
		i.good(cdb, nil, 0)
		i.good(bytchk(cdb), want, 0)
		if r := i.do(cdb, wrong, 0); r.key != keyMiscompare || r.info != 700 {
			t.Errorf("CDB %x with other data: %v at %d", cdb, r, r.info)
		}
	}
	for _, cdb := range [][]byte{rw10(0x35, 0, 0), rw16(0x91, 0, 0)} { // SYNCHRONIZE CACHE
		before := m.flushed()
		i.good(cdb, nil, 0)
		if m.flushed() == before {
			t.Errorf("CDB %x flushed nothing", cdb)
		}
	}
	for k, cdb := range [][]byte{rw10(0x41, 100, 5), rw16(0x93, 100, 5)} { // WRITE SAME
		out := pattern(512, byte(k+20))
		i.good(cdb, out, 0)
		if !bytes.Equal(at(100, 5), bytes.Repeat(out, 5)) {
			t.Errorf("CDB %x did not write its blocks", cdb)
		}
	}
	caw := make([]byte, 16) // COMPARE AND WRITE
	caw[0], caw[9], caw[13] = 0x89, 100, 1
	out := pattern(512, 77)
	i.good(caw, append(at(100, 1), out...), 0)
	if !bytes.Equal(at(100, 1), out) {
		t.Error("COMPARE AND WRITE did not write")
	}
	cdb, list := unmapCDB(lun.Extent{Start: 101, Blocks: 2})
	if cdb[0] != 0x42 {
		t.Fatal("not UNMAP")
	}
	i.good(cdb, list, 0)
	if !bytes.Equal(at(101, 2), make([]byte, 1024)) {
		t.Error("UNMAP left data")
	}
	status := rw16(0x9e, 100, 0) // GET LBA STATUS
	status[1], status[13] = 0x12, 64
	if got := i.good(status, nil, 64); len(got.data) < 40 || got.data[8+12] != 0 || got.data[24+12] != 1 {
		t.Errorf("GET LBA STATUS: %x", got.data)
	}
	if got := i.good(rw10(0x25, 0, 0), nil, 8); !bytes.Equal(got.data, []byte{0, 0, 3, 0xff, 0, 0, 2, 0}) { // READ CAPACITY
		t.Errorf("READ CAPACITY (10): %x", got.data)
	}
	capacity := make([]byte, 16)
	capacity[0], capacity[1], capacity[13] = 0x9e, 0x10, 32
	if got := i.good(capacity, nil, 32); len(got.data) != 32 || !bytes.Equal(got.data[:12], []byte{0, 0, 0, 0, 0, 0, 3, 0xff, 0, 0, 2, 0}) {
		t.Errorf("READ CAPACITY (16): %x", got.data)
	}
	for _, cdb := range [][]byte{
		{0x12, 0, 0, 0, 96, 0}, {0x1a, 0, 0x3f, 0, 192, 0}, {0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 192, 0},
		{0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, {0x03, 0, 0, 0, 18, 0},
		{0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, {0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0},
	} {
		if got := i.good(cdb, nil, 256); len(got.data) < 4 {
			t.Errorf("CDB %x gives %x", cdb, got.data)
		}
	}
	i.good([]byte{0, 0, 0, 0, 0, 0}, nil, 0)
}

// updatesOnly is a device that fails every read and write that is not an Update.
type updatesOnly struct{ *memory }

func (updatesOnly) ReadAt(context.Context, []byte, lun.LBA) error { return errors.New("a read apart") }

func (updatesOnly) WriteAt(context.Context, []byte, lun.LBA) error {
	return errors.New("a write apart")
}

func TestCompareAndWriteIsOneUpdateOfTheDevice(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: updatesOnly{m}})
	i := login(t, addr, loginOptions{})
	for _, fuaBit := range []byte{0, fua} {
		t.Run(fmt.Sprintf("FUA %02X", fuaBit), func(t *testing.T) {
			cdb := make([]byte, 16)
			cdb[0], cdb[1], cdb[9], cdb[13] = 0x89, fuaBit, 5, 1
			before := m.flushed()
			out := pattern(512, fuaBit+1)
			i.good(cdb, append(m.bytes()[5*512:6*512], out...), 0)
			if !bytes.Equal(m.bytes()[5*512:6*512], out) {
				t.Error("not written")
			}
			if flushed := m.flushed() > before; flushed != (fuaBit != 0) {
				t.Errorf("flushed: %v", flushed)
			}
		})
	}
}

// lossy is a device whose writes change one byte on their way.
type lossy struct{ *memory }

func (m lossy) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	p = bytes.Clone(p)
	p[len(p)-1]++
	return m.memory.WriteAt(ctx, p, start)
}

func TestWriteAndVerifyFindsWhatWasNotWritten(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: lossy{newMemory(512, 64)}})
	i := login(t, addr, loginOptions{})
	for _, cdb := range [][]byte{
		rw10(0x2e, 1, 2), rw12(0xae, 1, 2), rw16(0x8e, 1, 2),
		bytchk(rw10(0x2e, 1, 2)), bytchk(rw12(0xae, 1, 2)), bytchk(rw16(0x8e, 1, 2)),
	} {
		if r := i.do(cdb, pattern(1024, 3), 0); r.key != keyMiscompare || r.info != 1023 {
			t.Errorf("CDB %x: %v at %d", cdb, r, r.info)
		}
	}
}
