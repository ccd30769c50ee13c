package luntest

import (
	"errors"
	"testing"

	"lunshift/lun"
)

func testUnmap(t *testing.T, b *bench) {
	all := b.extent(0, 2<<20)
	inner := []lun.Extent{
		b.extent(0, 1), b.extent(4096+b.bs, 1), b.extent(64<<10, 64<<10),
		b.extent(256<<10+b.bs, 300<<10), b.extent(1<<20, 1<<20),
	}
	if !b.info.Thin {
		b.write(t, all, 1)
		if err := b.dev.Unmap(t.Context(), inner[0]); !errors.Is(err, lun.ErrUnsupported) {
			t.Fatalf("unmap of a device that is not thin: want ErrUnsupported, got %v", err)
		}
		b.expect(t, all, 1)
		return
	}
	for version, e := range inner {
		b.write(t, all, uint64(version))
		if err := b.dev.Unmap(t.Context(), e); err != nil {
			t.Fatalf("unmap %v: %v", e, err)
		}
		b.expectAround(t, all, e, uint64(version))
		if b.info.UnmapZeroes {
			b.expectZero(t, e)
		} else {
			p := b.read(t, e)
			for off := 0; off < len(p); off += b.bs {
				block := p[off : off+b.bs]
				if err := b.check(block, e.Start+lun.LBA(off/b.bs), uint64(version)); err != nil && !isZero(block) {
					t.Fatalf("after unmap neither as before nor zeroes: %v", err)
				}
			}
		}
		b.write(t, e, 99)
		b.expect(t, e, 99)
	}
}

func testZeroes(t *testing.T, b *bench) {
	used := lun.Extent{Blocks: b.blocks}
	for i, e := range []lun.Extent{
		b.extent(0, 1), b.extent(b.bs, 1), b.extent(4096-b.bs, 8192), b.extent(64<<10, 64<<10),
		b.extent(3*b.bs, 1<<20), {Start: 1, Blocks: b.blocks - 2}, used,
	} {
		version := uint64(i + 1)
		all := b.extent(0, 1<<20+64<<10)
		if e.End() > all.End() {
			all = used
		}
		b.write(t, all, version)
		if err := b.dev.WriteZeroes(t.Context(), e); err != nil {
			t.Fatalf("zero %v: %v", e, err)
		}
		b.expectZero(t, e)
		b.expectAround(t, all, e, version)
	}
	if err := b.dev.Flush(t.Context()); err != nil {
		t.Fatalf("flush: %v", err)
	}
	b.expectZero(t, used)
}

// expectAround checks up to 64 KiB of all on either side of e.
func (b *bench) expectAround(t *testing.T, all, e lun.Extent, version uint64) {
	t.Helper()
	span := lun.LBA(64 << 10 / b.bs)
	if before := all.Intersect(lun.Extent{Start: e.Start - min(e.Start, span), Blocks: uint64(min(e.Start, span))}); !before.Empty() {
		b.expect(t, before, version)
	}
	if after := all.Intersect(lun.Extent{Start: e.End(), Blocks: uint64(span)}); !after.Empty() {
		b.expect(t, after, version)
	}
}

// extents collects all runs of e, and checks that they cover it exactly.
func (b *bench) extents(t *testing.T, e lun.Extent) []lun.Allocation {
	t.Helper()
	var all []lun.Allocation
	for at := e.Start; at < e.End(); {
		rest := lun.Extent{Start: at, Blocks: uint64(e.End() - at)}
		runs, err := b.dev.Extents(t.Context(), rest)
		if err != nil {
			t.Fatalf("extents of %v: %v", rest, err)
		}
		if len(runs) == 0 {
			t.Fatalf("extents of %v: none", rest)
		}
		for _, r := range runs {
			if r.Start != at || r.Empty() || r.End() > e.End() {
				t.Fatalf("extents of %v: run %v, want one that begins at LBA %d", rest, r, at)
			}
			at = r.End()
		}
		all = append(all, runs...)
	}
	return all
}

func testExtents(t *testing.T, b *bench) {
	b.write(t, lun.Extent{Start: lun.LBA(b.rnd.Uint64N(b.blocks)), Blocks: 1}, 1)
	whole := b.extents(t, b.info.All())
	if !b.info.ReportsAllocation {
		for _, r := range whole {
			if !r.Allocated {
				t.Fatalf("run %v is unallocated on a device that reports no allocation", r)
			}
		}
	}
	for range 50 {
		b.extents(t, b.randomExtent(b.blocks))
		b.extents(t, b.randomExtent(16))
	}
	last := lun.Extent{Start: lun.LBA(b.info.Blocks - 1), Blocks: 1}
	if got := b.extents(t, last); len(got) != 1 {
		t.Fatalf("extents of the last block: %v", got)
	}
}

func testUnallocated(t *testing.T, b *bench) {
	all := lun.Extent{Blocks: b.blocks}
	if err := b.dev.WriteZeroes(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	written := map[lun.LBA]bool{}
	for range 40 {
		e := b.randomExtent(uint64(max(128<<10/b.bs, 1)))
		b.write(t, e, 5)
		for l := e.Start; l < e.End(); l++ {
			written[l] = true
		}
	}
	for _, r := range b.extents(t, all) {
		if r.Allocated {
			continue
		}
		b.expectZero(t, r.Extent)
		for l := r.Start; l < r.End(); l++ {
			if written[l] {
				t.Fatalf("LBA %d was written and is called unallocated", l)
			}
		}
	}
}
