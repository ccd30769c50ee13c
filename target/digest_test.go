package target

import (
	"encoding/binary"
	"hash/crc32"
	"testing"
	"time"

	"lunshift/iscsi"
)

// The CDB wants one block, the segment brings eight: the digest is behind what is
// written.
func TestDataWithAWrongDigestIsNotWritten(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{want: func(p *iscsi.Params) { p.HeaderDigest, p.DataDigest = true, true }})
	h := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite|iscsi.FlagFinal, 4096)
	data := pattern(4096, 5)
	h.SetDataLength(len(data))
	b := append([]byte{}, h[:]...)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(h[:], crc32.MakeTable(crc32.Castagnoli)))
	b = append(append(b, data...), 1, 2, 3, 4)
	part := iscsi.BHSLength + iscsi.DigestLength + 1024
	if _, err := i.nc.Write(b[:part]); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // what is there is taken by itself
	if _, err := i.nc.Write(b[part:]); err != nil {
		t.Fatal(err)
	}
	i.expectClosed()
	if m.bytes()[1] != 0 {
		t.Error("it was written")
	}
}
