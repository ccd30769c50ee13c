package lun

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Without the locks of file.go this finds a torn block within a second.
func TestReadOfAFileSeesNoBlockHalfWritten(t *testing.T) {
	const block, blocks = 4096, 64
	path := filepath.Join(t.TempDir(), "unit")
	if err := os.WriteFile(path, make([]byte, block*blocks), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := Open(t.Context(), path, Options{BlockSize: block})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	var work sync.WaitGroup
	for w := range 2 {
		work.Go(func() {
			p := bytes.Repeat([]byte{byte(w + 1)}, block*8)
			for n := 0; ctx.Err() == nil; n++ {
				var err error
				if n%16 == 0 {
					err = dev.WriteZeroes(ctx, Extent{Start: 3, Blocks: 8})
				} else {
					err = dev.WriteAt(ctx, p, 3)
				}
				if err != nil && ctx.Err() == nil {
					t.Errorf("write: %v", err)
				}
			}
		})
	}
	for r := range 2 {
		work.Go(func() {
			p := make([]byte, block*8)
			for ctx.Err() == nil {
				err, got := error(nil), true
				if r == 0 {
					err = dev.ReadAt(ctx, p, 3)
				} else {
					got, err = dev.(Prober).TryReadAt(p, 3)
				}
				if err != nil && ctx.Err() == nil {
					t.Errorf("read: %v", err)
				}
				for i := 0; got && err == nil && i < len(p); i += block {
					if b := p[i : i+block]; !bytes.Equal(b, bytes.Repeat(b[:1], block)) {
						t.Errorf("block %d is torn", 3+i/block)
						cancel()
						return
					}
				}
			}
		})
	}
	work.Wait()
}

func TestSpanIsInRisingOrderAndCoversEachStripeOnce(t *testing.T) {
	for _, c := range []struct {
		off, n int64
		want   [2][2]int
	}{
		{0, 1, [2][2]int{{0, 1}, {}}},
		{stripeBytes - 1, 2, [2][2]int{{0, 2}, {}}},
		{stripeBytes * 255, stripeBytes, [2][2]int{{255, 256}, {}}},
		{stripeBytes * 255, stripeBytes + 1, [2][2]int{{0, 1}, {255, 256}}},
		{stripeBytes * 3, stripeBytes * 256, [2][2]int{{0, 256}, {}}},
		{stripeBytes*1000 + 5, 1 << 40, [2][2]int{{0, 256}, {}}},
		{stripeBytes * 7, 0, [2][2]int{{7, 8}, {}}},
	} {
		if got := span(c.off, c.n); got != c.want {
			t.Errorf("%d+%d: %v, not %v", c.off, c.n, got, c.want)
		}
	}
	var s stripes
	s.lock(stripeBytes*255, 1)
	if s.tryRLock(stripeBytes*200, stripeBytes*100) { // wraps around to 255 after 0 to 43
		t.Error("shared while it is held alone")
	}
	s.unlock(stripeBytes*255, 1)
	if !s.tryRLock(0, 1<<40) {
		t.Error("a failed attempt left locks behind")
	} else {
		s.runlock(0, 1<<40)
	}
	s.lock(0, 1<<40)
	s.unlock(0, 1<<40)
}
