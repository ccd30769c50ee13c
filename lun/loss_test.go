package lun

import (
	"context"
	"errors"
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
