package lun

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
)

// What a target says it did not do whole is asked for again; where that goes on it is
// unavailable, which makes initiators try again, and never done.
//
// Caught, each by its row: no look at the residual of a read; none at an overflow; TASK ABORTED
// handed up as it is; LBA OUT OF RANGE of a device that shrank handed up as the caller's fault.
func TestWhatWasNotDoneWholeIsAskedForAgain(t *testing.T) {
	good := func(c *fakeConn, h *iscsi.BHS, flags byte, residual uint32) {
		c.send(c.answer(iscsi.OpSCSIResponse, h, func(h *iscsi.BHS) { h.SetFlags(iscsi.FlagFinal | flags); h.SetResidual(residual) }), nil)
	}
	read := func(flags byte, residual uint32) func(*fakeConn, *iscsi.BHS) {
		return func(c *fakeConn, h *iscsi.BHS) {
			c.send(c.answer(iscsi.OpDataIn, h, func(h *iscsi.BHS) {
				h.SetFlags(iscsi.FlagFinal | iscsi.FlagStatus | flags)
				h.SetResidual(residual)
			}), make([]byte, 512))
		}
	}
	for _, tc := range []struct {
		name  string
		write bool
		do    func(c *fakeConn, h *iscsi.BHS)
	}{
		{"read without data", false, func(c *fakeConn, h *iscsi.BHS) { good(c, h, 0, 0) }},
		{"read with all data and a residual", false, read(iscsi.FlagUnderflow, 512)},
		{"read with all data and more to come", false, read(iscsi.FlagOverflow, 512)},
		{"write with a residual", true, func(c *fakeConn, h *iscsi.BHS) { good(c, h, iscsi.FlagUnderflow, 512) }},
		{"write that wants more", true, func(c *fakeConn, h *iscsi.BHS) { good(c, h, iscsi.FlagOverflow, 512) }},
		{"task aborted by somebody else", true, func(c *fakeConn, h *iscsi.BHS) { c.status(h, statusTaskAborted) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := newFakeTarget(t)
			var left, came atomic.Int32
			f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
				op := byte(opRead16)
				if tc.write {
					op = opWrite16
				}
				if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != op || h.ExpectedLength() == 0 {
					return false
				}
				came.Add(1)
				if left.Add(-1) < 0 {
					return false
				}
				tc.do(c, h)
				return true
			})
			dev := f.open(Options{})
			left.Store(2)
			roundTrip(t, dev, 512)
			if n := came.Load(); n != 3 {
				t.Errorf("%d commands came, want 3", n)
			}
			left.Store(1 << 20)
			var err error
			if tc.write {
				err = dev.WriteAt(t.Context(), make([]byte, 512), 5)
			} else {
				err = dev.ReadAt(t.Context(), make([]byte, 512), 5)
			}
			if !errors.Is(err, ErrUnavailable) {
				t.Errorf("for ever: %v", err)
			}
			if n := came.Load(); n < 5 || n > 20 {
				t.Errorf("%d commands came in all", n)
			}
		})
	}
}

// Caught: the sense handed up, on which Linux fails a command at once.
func TestUnitThatStaysAwayIsUnavailableAfterTheTimeout(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{IOTimeout: 300 * time.Millisecond})
	var came atomic.Int32
	f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
		if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != opRead16 {
			return false
		}
		came.Add(1)
		c.check(h, senseNotReady, 0x04, 0x0c) // TARGET PORT IN UNAVAILABLE STATE
		return true
	})
	began := time.Now()
	err := dev.ReadAt(t.Context(), make([]byte, 512), 5)
	var sense *SenseError
	if !errors.Is(err, ErrUnavailable) || errors.As(err, &sense) {
		t.Errorf("%v", err)
	}
	if waited := time.Since(began); waited < 300*time.Millisecond || came.Load() < 4 || came.Load() > 30 {
		t.Errorf("%d commands in %v", came.Load(), waited)
	}
}

// An array whose unit became smaller has not done what nobody asked wrongly: its sense is
// not for the initiator, who would take it for the end of his file.
func TestUnitThatBecameSmallerIsUnavailable(t *testing.T) {
	f := newFakeTarget(t)
	dev := f.open(Options{})
	f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
		if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != opRead16 {
			return false
		}
		c.check(h, senseIllegalRequest, 0x21, 0)
		return true
	})
	err := dev.ReadAt(t.Context(), make([]byte, 512), 5)
	var sense *SenseError
	if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrOutOfRange) || errors.As(err, &sense) {
		t.Errorf("%v", err)
	}
	if err := dev.ReadAt(t.Context(), make([]byte, 512), LBA(dev.Info().Blocks)); !errors.Is(err, ErrOutOfRange) {
		t.Errorf("beyond its end: %v", err)
	}
}
