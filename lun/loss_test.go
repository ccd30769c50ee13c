package lun

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
)

func (f *fakeTarget) loginCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.logins)
}

// TestCommandThatLosesEveryConnectionTimesOut: a connection that lives for less than a
// tick must not keep its commands from their time-out, nor the target busy with logins.
func TestCommandThatLosesEveryConnectionTimesOut(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{IOTimeout: 2 * time.Second})
	f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
		if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != opRead16 {
			return false
		}
		c.nc.Close()
		return true
	})
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
	defer cancel()
	if err := dev.ReadAt(ctx, make([]byte, 512), 0); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("want ErrUnavailable, got %v", err)
	}
	if n := f.loginCount(); n < 2 || n > 20 {
		t.Fatalf("%d logins", n)
	}
	f.bend(func(*fakeConn, *iscsi.BHS, []byte) bool { return false })
	roundTrip(t, dev, 512)
}

// TestAnotherUnitIsNotTakenForTheOldOne: what answers after a reconnect must be the
// unit that was there, also where neither has a designator.
func TestAnotherUnitIsNotTakenForTheOldOne(t *testing.T) {
	capacity := func(blocks int) []byte {
		p := make([]byte, 32)
		binary.BigEndian.PutUint64(p, uint64(blocks-1))
		binary.BigEndian.PutUint32(p[8:], 512)
		return p
	}
	serial := func(s string) []byte { return append([]byte{0, 0x80, 0, byte(len(s))}, s...) }
	standard := func(name string) []byte {
		p := make([]byte, 36)
		copy(p[8:], name)
		return p
	}
	for _, tc := range []struct {
		name                           string
		named                          bool
		capacityNow, serialNow, stdNow []byte
		same                           bool
	}{
		{name: "nothing changed", same: true},
		{name: "smaller", capacityNow: capacity(4096)},
		{name: "larger", capacityNow: capacity(1 << 20)},
		{name: "other serial number", serialNow: serial("TWO")},
		{name: "other product", stdNow: standard("FAKE    OTHER               1   ")},
		{name: "other firmware", stdNow: standard("FAKE    BENDABLE        2   "), same: true},
		{name: "named and smaller", named: true, capacityNow: capacity(4096)},
		{name: "named and grown", named: true, capacityNow: capacity(1 << 20), same: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeTarget(t)
			var swapped atomic.Bool
			f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
				if h.Opcode() != iscsi.OpSCSICommand {
					return false
				}
				answer := func(before, now []byte) bool {
					if swapped.Load() && now != nil {
						before = now
					}
					if before == nil {
						return false
					}
					c.in(h, before)
					return true
				}
				cdb := h.CDB()
				switch {
				case cdb[0] == opServiceIn16 && cdb[1] == serviceReadCapacity16:
					return answer(nil, tc.capacityNow)
				case cdb[0] == opInquiry && cdb[1] == 0:
					return answer(nil, tc.stdNow)
				case cdb[0] == opInquiry && cdb[2] == 0x80:
					return answer(serial("ONE"), tc.serialNow)
				case cdb[0] == opInquiry && cdb[2] == 0x83 && !tc.named:
					c.check(h, senseIllegalRequest, 0x24, 0)
					return true
				}
				return false
			})
			dev := f.open(Options{IOTimeout: 500 * time.Millisecond})
			swapped.Store(true)
			f.drop()
			err := dev.ReadAt(t.Context(), make([]byte, 512), 0)
			if tc.same && err != nil || !tc.same && !errors.Is(err, ErrUnavailable) {
				t.Fatalf("read: %v", err)
			}
			if !tc.same && !strings.Contains(err.Error(), "another logical unit") {
				t.Fatalf("the error does not say why: %v", err)
			}
		})
	}
}

// TestOneCommandZeroesABoundedStretch: what the device says it takes in one WRITE SAME
// or UNMAP may be more than it can do before the command's time is over.
func TestOneCommandZeroesABoundedStretch(t *testing.T) {
	const blocks = 4 << 30 / 512
	for _, provisioning := range []byte{0x40, 0x80} {
		f := newFakeTarget(t)
		var largest, total atomic.Uint64
		f.bend(func(c *fakeConn, h *iscsi.BHS, data []byte) bool {
			if h.Opcode() != iscsi.OpSCSICommand {
				return false
			}
			note := func(n uint64) bool {
				largest.Store(max(largest.Load(), n))
				total.Add(n)
				c.good(h)
				return true
			}
			switch cdb := h.CDB(); {
			case cdb[0] == opServiceIn16 && cdb[1] == serviceReadCapacity16:
				p := make([]byte, 32)
				binary.BigEndian.PutUint64(p, blocks-1)
				binary.BigEndian.PutUint32(p[8:], 512)
				p[14] = 0x80 // LBPME
				c.in(h, p)
				return true
			case cdb[0] == opInquiry && cdb[2] == 0xb0:
				p := make([]byte, 64)
				p[1], p[3] = 0xb0, 60
				binary.BigEndian.PutUint32(p[20:], 0xffffffff) // MAXIMUM UNMAP LBA COUNT
				binary.BigEndian.PutUint32(p[24:], 1)
				binary.BigEndian.PutUint64(p[36:], 1<<40) // MAXIMUM WRITE SAME LENGTH
				c.in(h, p)
				return true
			case cdb[0] == opInquiry && cdb[2] == 0xb2:
				c.in(h, []byte{0, 0xb2, 0, 4, 0, provisioning, 2, 0})
				return true
			case cdb[0] == opWriteSame16:
				return note(uint64(binary.BigEndian.Uint32(cdb[10:])))
			case cdb[0] == opUnmap:
				return note(uint64(binary.BigEndian.Uint32(data[16:])))
			}
			return false
		})
		dev := f.open(Options{})
		if err := dev.Unmap(t.Context(), Extent{Blocks: blocks}); err != nil {
			t.Fatal(err)
		}
		if total.Load() != blocks || largest.Load() > 1<<30/512 {
			t.Errorf("unmap in commands of up to %d blocks, %d in all of %d", largest.Load(), total.Load(), blocks)
		}
		total.Store(0)
		if err := dev.WriteZeroes(t.Context(), Extent{Blocks: blocks}); err != nil {
			t.Fatal(err)
		}
		if total.Load() != blocks || largest.Load() > 1<<30/512 {
			t.Errorf("zeroes in commands of up to %d blocks, %d in all of %d", largest.Load(), total.Load(), blocks)
		}
	}
}
