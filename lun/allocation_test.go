package lun

import (
	"encoding/binary"
	"errors"
	"testing"
)

// TestAllocationIsReportedOnlyWhereFreeBlocksAreZero: a block device whose deallocated
// blocks may hold anything must not have them taken for zeroes.
func TestAllocationIsReportedOnlyWhereFreeBlocksAreZero(t *testing.T) {
	info := Info{BlockSize: 512, Blocks: 8192}
	for _, tc := range []struct {
		name   string
		flags  byte
		blocks uint64
		status bool
		want   bool
	}{
		{"LBPME and LBPRZ", 0xc0, 8192, true, true},
		{"no LBPRZ", 0x80, 8192, true, false},
		{"no LBPME", 0x40, 8192, true, false},
		{"other capacity", 0xc0, 8191, true, false},
		{"no GET LBA STATUS", 0xc0, 8192, false, false},
	} {
		got := reportsAllocation(&info, func(cdb, answer []byte) (int, error) {
			if cdb[0] != opServiceIn16 {
				t.Fatalf("command %02Xh", cdb[0])
			}
			if cdb[1] == serviceReadCapacity16 {
				binary.BigEndian.PutUint64(answer, tc.blocks-1)
				binary.BigEndian.PutUint32(answer[8:], 512)
				answer[14] = tc.flags
				return 32, nil
			}
			if !tc.status {
				return 0, errors.New("refused")
			}
			binary.BigEndian.PutUint32(answer, 20)
			binary.BigEndian.PutUint32(answer[16:], 8192)
			return 24, nil
		})
		if got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}
