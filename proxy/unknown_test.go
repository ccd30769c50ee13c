package proxy

import (
	"bytes"
	"strings"
	"testing"

	"lunshift/lun"
	"lunshift/state"
)

// A block of which nobody knows where it is must not be answered from either side: the
// source may be stale there, the destination may not have it yet.
func TestFlagsThatCannotBeReadFailTheCommand(t *testing.T) {
	const regions = 130
	r := newRig(t, regions*testRegion/testBlock)
	r.bitmapMemory = 1
	all := lun.Extent{Blocks: regions * testRegion / testBlock}
	fill(t, r.source, all, 1)
	v := r.open(t)
	must(t, v.Throttle(t.Context(), testRegion))
	must(t, v.Start(t.Context()))
	must(t, v.Pause(t.Context()))
	for region := lun.LBA(0); region < regions; region++ {
		fill(t, v, lun.Extent{Start: region * testRegion / testBlock, Blocks: 8}, 2)
	}
	for region := lun.LBA(0); region < regions; region++ {
		expect(t, v, lun.Extent{Start: region * testRegion / testBlock, Blocks: 8}, 2)
	}
	must(t, r.store.Close())
	defer v.Shutdown(t.Context())

	// Of most regions no bitmap is in memory: all of what was written is not known to
	// be valid, and some of the rest is not known not to be.
	var lost lun.Extent
	for region := lun.LBA(0); region < regions && lost.Empty(); region++ {
		e := lun.Extent{Start: region * testRegion / testBlock, Blocks: 16}
		rest := lun.Extent{Start: e.Start + 8, Blocks: 8}
		if !v.raw().All(state.Valid, run(lun.Extent{Start: e.Start, Blocks: 8})) && v.raw().Any(state.Valid, run(rest)) {
			lost = e
		}
	}
	if lost.Empty() {
		t.Fatal("all bitmaps are in memory: the test shows nothing")
	}
	p := make([]byte, lost.Blocks*testBlock)
	if err := v.ReadAt(t.Context(), p, lost.Start); err == nil {
		t.Fatal("blocks were read, and nobody knows where they are")
	}
	if err := v.WriteAt(t.Context(), bytes.Repeat([]byte{3}, len(p)), lost.Start); err == nil {
		t.Fatal("a write was acknowledged without its flags")
	}
	if _, err := v.Extents(t.Context(), lost); err == nil {
		t.Fatal("the allocation of blocks was told, and nobody knows where they are")
	}
	if s := v.Status(); !s.Degraded || !strings.Contains(s.DegradedReason, "state") {
		t.Fatalf("degraded %v: %q", s.Degraded, s.DegradedReason)
	}
}
