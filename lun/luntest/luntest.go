// Package luntest holds implementations of lun.Device to the contract: one
// suite that checks what the blocks hold, not only what the calls return.
package luntest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"lunshift/lun"
)

// area is how much of the device the suite writes, in bytes.
const area = 8 << 20

// Must is what the suite cannot demand of every device, but of some: that a check met
// what it is there for.
type Must int

const (
	// MustCancel: some commands are cut short while the device works on them.
	MustCancel Must = iota
	// MustTry: TryReadAt serves blocks that were just written.
	MustTry
)

// Run runs the suite. Each call of open gives the same or a fresh device of at
// least 2 MiB, open and writable, whose content the suite destroys; the
// suite closes what it opened, and open's own clean-up must bear that.
func Run(t *testing.T, open func(t *testing.T) lun.Device, musts ...Must) {
	tests := []struct {
		name string
		test func(*testing.T, *bench)
	}{
		{"InfoIsPlausibleAndConstant", testInfo},
		{"WhatIsWrittenIsReadBack", testReadBack},
		{"NeighboursOfAWriteKeepTheirContent", testNeighbours},
		{"FirstAndLastBlockCanBeUsed", testEdges},
		{"BeyondTheCapacityIsRefusedAndDoesNothing", testOutOfRange},
		{"EmptyCommandsDoNothing", testEmpty},
		{"WriteLeavesTheBufferAlone", testBufferUnchanged},
		{"ConcurrentWritersOfDistinctBlocksDoNotMeet", testConcurrentWriters},
		{"OneLargeCommandIsServedWhole", testLarge},
		{"UnmappedBlocksReadAsPromised", testUnmap},
		{"ZeroedBlocksReadAsZeroes", testZeroes},
		{"ExtentsCoverExactly", testExtents},
		{"UnallocatedBlocksReadAsZeroes", testUnallocated},
		{"RandomCommandsAgreeWithAModel", testModel},
		{"EndedContextIsReported", testEndedContext},
		{"BuffersAreFreeAfterACancelledCommand", testCancelInFlight},
		{"ClosedDeviceRefusesEverything", testClosed},
		{"CloseWithCommandsInFlightEndsThem", testCloseInFlight},
		{"UpdateIsAtomic", testUpdateAtomic},
		{"FailedUpdateWritesNothing", testUpdateFails},
		{"TriedReadsAreRight", testProber},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			dev := open(t)
			defer func() {
				if err := dev.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}()
			b := newBench(t, dev)
			b.musts = musts
			tc.test(t, b)
		})
	}
}

// bench is one device under test.
type bench struct {
	dev    lun.Device
	info   lun.Info
	bs     int
	blocks uint64 // that the suite uses, from LBA 0
	seed   uint64
	rnd    *rand.Rand
	musts  []Must
}

func (b *bench) must(m Must) bool { return slices.Contains(b.musts, m) }

func newBench(t *testing.T, dev lun.Device) *bench {
	t.Helper()
	i := dev.Info()
	if i.BlockSize == 0 || i.Size() < 2<<20 {
		t.Fatalf("device of %d blocks of %d bytes is smaller than 2 MiB", i.Blocks, i.BlockSize)
	}
	b := &bench{dev: dev, info: i, bs: int(i.BlockSize), seed: rand.Uint64()}
	b.blocks = min(i.Blocks, uint64(area/b.bs))
	b.rnd = rand.New(rand.NewPCG(b.seed, 1))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", b.seed)
		}
	})
	return b
}

// stamp fills p, which is to go to start, with blocks that name their place,
// the version and this run, in every 32 bytes.
func (b *bench) stamp(p []byte, start lun.LBA, version uint64) {
	for ; len(p) > 0; p, start = p[b.bs:], start+1 {
		binary.LittleEndian.PutUint64(p, uint64(start))
		binary.LittleEndian.PutUint64(p[8:], version)
		binary.LittleEndian.PutUint64(p[16:], b.seed)
		binary.LittleEndian.PutUint64(p[24:], uint64(start)*0x9e3779b97f4a7c15^version)
		for n := 32; n < b.bs; n *= 2 {
			copy(p[n:b.bs], p[:n])
		}
	}
}

// check says where p, read from start, is not stamped with version.
func (b *bench) check(p []byte, start lun.LBA, version uint64) error {
	want := make([]byte, b.bs)
	for off := 0; off < len(p); off += b.bs {
		lba := start + lun.LBA(off/b.bs)
		b.stamp(want, lba, version)
		if got := p[off : off+b.bs]; !bytes.Equal(got, want) {
			return fmt.Errorf("LBA %d: want version %d, got %s", lba, version, b.describe(got))
		}
	}
	return nil
}

func (b *bench) describe(p []byte) string {
	if isZero(p) {
		return "zeroes"
	}
	lba, version, seed := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:]), binary.LittleEndian.Uint64(p[16:])
	if seed != b.seed {
		return fmt.Sprintf("foreign data % x", p[:32])
	}
	want := make([]byte, len(p))
	b.stamp(want, lun.LBA(lba), version)
	torn := ""
	if !bytes.Equal(p, want) {
		torn = " (torn)"
	}
	return fmt.Sprintf("version %d of LBA %d%s", version, lba, torn)
}

func (b *bench) write(t *testing.T, e lun.Extent, version uint64) {
	t.Helper()
	p := make([]byte, b.info.Bytes(e))
	b.stamp(p, e.Start, version)
	if err := b.dev.WriteAt(t.Context(), p, e.Start); err != nil {
		t.Fatalf("write %v: %v", e, err)
	}
}

func (b *bench) read(t *testing.T, e lun.Extent) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xee}, int(b.info.Bytes(e)))
	if err := b.dev.ReadAt(t.Context(), p, e.Start); err != nil {
		t.Fatalf("read %v: %v", e, err)
	}
	return p
}

func (b *bench) expect(t *testing.T, e lun.Extent, version uint64) {
	t.Helper()
	if err := b.check(b.read(t, e), e.Start, version); err != nil {
		t.Fatalf("read of %v: %v", e, err)
	}
}

func (b *bench) expectZero(t *testing.T, e lun.Extent) {
	t.Helper()
	p := b.read(t, e)
	for off := 0; off < len(p); off += b.bs {
		if !isZero(p[off : off+b.bs]) {
			t.Fatalf("LBA %d: want zeroes, got %s", int(e.Start)+off/b.bs, b.describe(p[off:off+b.bs]))
		}
	}
}

// extent is n bytes at off, in blocks, rounded up to at least one.
func (b *bench) extent(off, n int) lun.Extent {
	return lun.Extent{Start: lun.LBA(off / b.bs), Blocks: uint64(max(n/b.bs, 1))}
}

// randomExtent lies within the blocks in use, with at most limit blocks.
func (b *bench) randomExtent(limit uint64) lun.Extent {
	n := 1 + b.rnd.Uint64N(min(limit, b.blocks))
	return lun.Extent{Start: lun.LBA(b.rnd.Uint64N(b.blocks - n + 1)), Blocks: n}
}

func testInfo(t *testing.T, b *bench) {
	i := b.info
	if i.BlockSize < 256 || i.BlockSize&(i.BlockSize-1) != 0 {
		t.Errorf("block size %d is not a power of two", i.BlockSize)
	}
	if i.Blocks == 0 || i.Size()/uint64(i.BlockSize) != i.Blocks || i.Size() > math.MaxInt64 {
		t.Errorf("capacity of %d blocks of %d bytes is out of range", i.Blocks, i.BlockSize)
	}
	if i.ID == "" {
		t.Error("the ID is empty")
	}
	if i.UnmapZeroes && !i.Thin {
		t.Error("UnmapZeroes without Thin")
	}
	b.write(t, lun.Extent{Blocks: 1}, 1)
	if got := b.dev.Info(); got != i {
		t.Errorf("Info changed from %+v to %+v", i, got)
	}
}

func testReadBack(t *testing.T, b *bench) {
	version := uint64(0)
	for _, n := range []int{1, 4096, 8192, 64 << 10, 256 << 10, 1 << 20} {
		for _, off := range []int{0, b.bs, 3 * b.bs, 4096, 64<<10 - b.bs} {
			e := b.extent(off, n)
			if e.End() > lun.LBA(b.blocks) {
				continue
			}
			version++
			b.write(t, e, version)
			b.expect(t, e, version)
			if err := b.dev.Flush(t.Context()); err != nil {
				t.Fatalf("flush: %v", err)
			}
			b.expect(t, e, version)
		}
	}
}

func testNeighbours(t *testing.T, b *bench) {
	all := b.extent(0, 1<<20)
	b.write(t, all, 1)
	version := map[lun.LBA]uint64{}
	for v := uint64(2); v < 40; v++ {
		n := 1 + b.rnd.Uint64N(all.Blocks/4)
		e := lun.Extent{Start: lun.LBA(b.rnd.Uint64N(all.Blocks - n + 1)), Blocks: n}
		b.write(t, e, v)
		for l := e.Start; l < e.End(); l++ {
			version[l] = v
		}
	}
	p := b.read(t, all)
	for l := range all.End() {
		v := max(version[l], 1)
		if err := b.check(p[int(l)*b.bs:int(l+1)*b.bs], l, v); err != nil {
			t.Fatal(err)
		}
	}
}

func testEdges(t *testing.T, b *bench) {
	last := lun.LBA(b.info.Blocks - 1)
	b.write(t, lun.Extent{Start: 0, Blocks: 1}, 1)
	b.write(t, lun.Extent{Start: last, Blocks: 1}, 2)
	b.expect(t, lun.Extent{Start: 0, Blocks: 1}, 1)
	b.expect(t, lun.Extent{Start: last, Blocks: 1}, 2)
	tail := lun.Extent{Start: last - 15, Blocks: 16}
	b.write(t, tail, 3)
	b.expect(t, tail, 3)
	if err := b.dev.WriteZeroes(t.Context(), tail); err != nil {
		t.Fatalf("zero %v: %v", tail, err)
	}
	b.expectZero(t, tail)
}

func testOutOfRange(t *testing.T, b *bench) {
	n := b.info.Blocks
	last := lun.Extent{Start: lun.LBA(n - 1), Blocks: 1}
	b.write(t, last, 1)
	for _, e := range []lun.Extent{
		{Start: lun.LBA(n), Blocks: 1},
		{Start: lun.LBA(n - 1), Blocks: 2},
		{Start: lun.LBA(n - 1), Blocks: 8},
		{Start: math.MaxUint64, Blocks: 1},
		{Start: math.MaxUint64, Blocks: 4},
		{Start: 1 << 63, Blocks: 2},
	} {
		p := bytes.Repeat([]byte{0x5a}, int(b.info.Bytes(e)))
		ctx := t.Context()
		_, extentsErr := b.dev.Extents(ctx, e)
		for name, err := range map[string]error{
			"read": b.dev.ReadAt(ctx, p, e.Start), "write": b.dev.WriteAt(ctx, p, e.Start),
			"zero": b.dev.WriteZeroes(ctx, e), "extents": extentsErr,
		} {
			if !errors.Is(err, lun.ErrOutOfRange) {
				t.Errorf("%s %v of %d blocks: want ErrOutOfRange, got %v", name, e, n, err)
			}
		}
		if err := b.dev.Unmap(ctx, e); !errors.Is(err, lun.ErrOutOfRange) && (b.info.Thin || !errors.Is(err, lun.ErrUnsupported)) {
			t.Errorf("unmap %v of %d blocks: want ErrOutOfRange, got %v", e, n, err)
		}
		if !bytes.Equal(p, bytes.Repeat([]byte{0x5a}, len(p))) {
			t.Errorf("read of %v changed the buffer", e)
		}
	}
	if err := b.dev.WriteZeroes(t.Context(), lun.Extent{Start: 1, Blocks: math.MaxUint64}); !errors.Is(err, lun.ErrOutOfRange) {
		t.Errorf("zero of more blocks than there are: want ErrOutOfRange, got %v", err)
	}
	b.expect(t, last, 1)
}

func testEmpty(t *testing.T, b *bench) {
	first := lun.Extent{Blocks: 1}
	b.write(t, first, 1)
	ctx := t.Context()
	if err := b.dev.ReadAt(ctx, nil, 0); err != nil {
		t.Errorf("read of nothing: %v", err)
	}
	if err := b.dev.WriteAt(ctx, nil, 0); err != nil {
		t.Errorf("write of nothing: %v", err)
	}
	if err := b.dev.WriteZeroes(ctx, lun.Extent{}); err != nil {
		t.Errorf("zero of nothing: %v", err)
	}
	if err := b.dev.Unmap(ctx, lun.Extent{}); err != nil && (b.info.Thin || !errors.Is(err, lun.ErrUnsupported)) {
		t.Errorf("unmap of nothing: %v", err)
	}
	if runs, err := b.dev.Extents(ctx, lun.Extent{}); err != nil || len(runs) != 0 {
		t.Errorf("extents of nothing: %v, %v", runs, err)
	}
	b.expect(t, first, 1)
}

func testBufferUnchanged(t *testing.T, b *bench) {
	e := b.extent(b.bs, 256<<10)
	p := make([]byte, b.info.Bytes(e))
	b.stamp(p, e.Start, 7)
	want := bytes.Clone(p)
	if err := b.dev.WriteAt(t.Context(), p, e.Start); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, want) {
		t.Fatal("the write changed the caller's buffer")
	}
	clear(p) // the device holds a copy of its own
	b.expect(t, e, 7)
}

func testLarge(t *testing.T, b *bench) {
	for _, e := range []lun.Extent{
		{Blocks: b.blocks},
		{Start: 1, Blocks: b.blocks - 1},
	} {
		version := uint64(e.Start) + 11
		b.write(t, e, version)
		b.expect(t, e, version)
	}
	b.expect(t, lun.Extent{Blocks: 1}, 11)
}

func testEndedContext(t *testing.T, b *bench) {
	first := lun.Extent{Blocks: 1}
	b.write(t, first, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p := make([]byte, b.bs)
	_, extentsErr := b.dev.Extents(ctx, first)
	for name, err := range map[string]error{
		"read": b.dev.ReadAt(ctx, p, 0), "write": b.dev.WriteAt(ctx, p, 0),
		"zero": b.dev.WriteZeroes(ctx, first), "flush": b.dev.Flush(ctx), "extents": extentsErr,
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: want context.Canceled, got %v", name, err)
		}
	}
	if err := b.dev.Unmap(ctx, first); !errors.Is(err, context.Canceled) && (b.info.Thin || !errors.Is(err, lun.ErrUnsupported)) {
		t.Errorf("unmap: want context.Canceled, got %v", err)
	}
	b.write(t, first, 2)
	b.expect(t, first, 2)
}

func testClosed(t *testing.T, b *bench) {
	info := b.info
	if err := b.dev.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	ctx, p, e := t.Context(), make([]byte, b.bs), lun.Extent{Blocks: 1}
	_, extentsErr := b.dev.Extents(ctx, e)
	for name, err := range map[string]error{
		"read": b.dev.ReadAt(ctx, p, 0), "write": b.dev.WriteAt(ctx, p, 0), "zero": b.dev.WriteZeroes(ctx, e),
		"unmap": b.dev.Unmap(ctx, e), "flush": b.dev.Flush(ctx), "extents": extentsErr,
	} {
		if !errors.Is(err, lun.ErrClosed) {
			t.Errorf("%s: want ErrClosed, got %v", name, err)
		}
	}
	if b.dev.Info() != info {
		t.Error("Info changed with Close")
	}
}

func isZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
