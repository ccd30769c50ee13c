package lun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"lunshift/iscsi"
)

// TestDeviceWithoutReservationsSaysSo, whether it knows none of the commands or only how to
// tell. Caught: ILLEGAL REQUEST handed up as any other error.
func TestDeviceWithoutReservationsSaysSo(t *testing.T) {
	for _, tells := range []bool{false, true} {
		f := newFakeTarget(t)
		dev := f.open(Options{})
		if tells {
			f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
				if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != opPersistentIn {
					return false
				}
				c.in(h, make([]byte, 8)) // nobody, nothing
				return true
			})
		}
		fencer := dev.(Fencer)
		if err := fencer.Fence(t.Context(), 1); !errors.Is(err, ErrUnsupported) || errors.Is(err, ErrConflict) {
			t.Errorf("tells %v: fence: %v", tells, err)
		}
		if _, err := fencer.Fenced(t.Context()); tells != (err == nil) || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("tells %v: ask: %v", tells, err)
		}
		if err := fencer.BreakFence(t.Context(), 1); !errors.Is(err, ErrUnsupported) {
			t.Errorf("tells %v: break: %v", tells, err)
		}
		if err := dev.WriteAt(t.Context(), make([]byte, 512), 0); err != nil {
			t.Errorf("tells %v: write: %v", tells, err)
		}
	}
}

// TestAnswersAboutReservationsThatMakeNoSense are errors, or nothing, and never a fence.
func TestAnswersAboutReservationsThatMakeNoSense(t *testing.T) {
	for name, answer := range map[string][]byte{
		"short":               {0, 0, 0, 1},
		"longer than it is":   {0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 1, 2, 3},
		"half a reservation":  {0, 0, 0, 1, 0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9},
		"a reservation alone": append([]byte{0, 0, 0, 1, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, prWriteExclusiveRO}, 0, 0),
	} {
		f := newFakeTarget(t)
		dev := f.open(Options{}).(Fencer)
		f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
			if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != opPersistentIn {
				return false
			}
			c.in(h, answer)
			return true
		})
		if err := dev.Fence(t.Context(), 1); err == nil || errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err) // and not taken for a device without
		}
	}
}

func FuzzFullStatus(f *testing.F) {
	name := "iqn.2026-11.net.example:a,i,0x800000000001"
	d := make([]byte, 24, 128)
	binary.BigEndian.PutUint64(d, 0xcafe)
	d[12], d[13] = 1, prWriteExclusiveRO
	id := append([]byte{1<<6 | 5, 0, 0, byte(len(name) + 2)}, name...)
	id = append(id, 0, 0)
	binary.BigEndian.PutUint32(d[20:], uint32(len(id)))
	d = append(d, id...)
	f.Add(d)
	f.Add(append(bytes.Clone(d), d...))
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, x := range parseFullStatus(p) {
			if strings.ContainsAny(x.Port, "\n\r\x00\x1b") {
				t.Errorf("%q", x.Port)
			}
		}
	})
	if all := parseFullStatus(append(bytes.Clone(d), d...)); len(all) != 2 || all[1] != (Registrant{0xcafe, name, true}) {
		f.Errorf("%+v", all)
	}
}
