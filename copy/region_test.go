package copier

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

// A region of which two runs are allocated is read as one, which fails, and then run by
// run; the buffer is that of the region before. The blocks between the runs have no
// storage, and are zero on the destination.
//
// Caught: nothing cleared between the runs, as first run.
func TestBlocksBetweenRunsThatAreReadApartAreZero(t *testing.T) {
	const region = 16
	source, destination := luntest.NewThinMemory(512, 2*region), luntest.NewThinMemory(512, 2*region)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := slices.Repeat([]byte{7}, 512*region)
	for _, e := range []lun.Extent{{Start: 0, Blocks: region}, {Start: region, Blocks: 2}, {Start: region + 4, Blocks: 2}} {
		if err := source.WriteAt(ctx, p[:e.Blocks*512], e.Start); err != nil {
			t.Fatal(err)
		}
	}
	// Old content, so that zeroes have to be written.
	if err := destination.WriteAt(ctx, slices.Repeat([]byte{9}, 2*region*512), 0); err != nil {
		t.Fatal(err)
	}
	var failed atomic.Int32
	source.Intercept(func(_ context.Context, op luntest.Op, e lun.Extent) error {
		if op == luntest.Read && e.Start == region && e.Blocks > 2 {
			failed.Add(1)
			return errors.New("the runs are not read as one")
		}
		return nil
	})
	l := &sumLedger{blocks: 2 * region, region: region, valid: map[lun.LBA]bool{}}
	c := New(Options{
		Source: source, Destination: destination, Ledger: l, Volume: lun.Extent{Blocks: 2 * region},
		RegionBlocks: region, Depth: 1, Throttle: NewThrottle(0), Fault: func(error) {},
	})
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if failed.Load() == 0 {
		t.Fatal("no read failed, so nothing was tested")
	}
	want, got := make([]byte, 2*region*512), make([]byte, 2*region*512)
	if err := errors.Join(source.ReadAt(ctx, want, 0), destination.ReadAt(ctx, got, 0)); err != nil {
		t.Fatal(err)
	}
	for at := range 2 * region {
		if !slices.Equal(want[at*512:(at+1)*512], got[at*512:(at+1)*512]) {
			t.Errorf("block %d begins with %d, want %d", at, got[at*512], want[at*512])
		}
	}
}
