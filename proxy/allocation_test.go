package proxy

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"lunshift/fsmap"
	"lunshift/lun"
	"lunshift/lun/luntest"
)

// newFileSystemRig has a source that cannot tell what is allocated, with a clean file system on it,
// of which every free block holds rests of something.
func newFileSystemRig(t *testing.T, image string, thin bool) (r *rig, content []byte, free []lun.Extent) {
	t.Helper()
	f, err := os.Open("../fsmap/testdata/" + image + ".img.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	if content, err = io.ReadAll(z); err != nil {
		t.Fatal(err)
	}
	blocks := uint64(len(content)) / testBlock
	r = newRig(t, blocks)
	if !thin {
		r.source = luntest.NewMemory(lun.Info{BlockSize: testBlock, Blocks: blocks})
	}
	if err := r.source.WriteAt(t.Context(), content, 0); err != nil {
		t.Fatal(err)
	}
	m, report, err := fsmap.Allocated(t.Context(), r.source, r.source.Info().All(), fsmap.Use{Idle: true})
	if err != nil || len(m.Free) == 0 {
		t.Fatal(report, err)
	}
	for _, e := range m.Free {
		copy(content[uint64(e.Start)*testBlock:], stamps(e, 66))
		if err := r.source.WriteAt(t.Context(), stamps(e, 66), e.Start); err != nil {
			t.Fatal(err)
		}
	}
	return r, content, m.Free
}

// wantContent compares the whole volume with content, but for the free runs, which read as zeroes.
func wantContent(t *testing.T, v *Volume, content []byte, free []lun.Extent) {
	t.Helper()
	want := bytes.Clone(content)
	for _, e := range free {
		clear(want[uint64(e.Start)*testBlock : uint64(e.End())*testBlock])
	}
	have := make([]byte, len(want))
	if err := v.ReadAt(t.Context(), have, 0); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(have); i += testBlock {
		if !bytes.Equal(have[i:i+testBlock], want[i:i+testBlock]) {
			t.Fatalf("block %d is not what it should be", i/testBlock)
		}
	}
}

func extentBytes(list []lun.Extent) (n uint64) {
	for _, e := range list {
		n += e.Blocks * testBlock
	}
	return n
}

// Caught: a comparison that does not know what was left out, and finds each free block different.
func TestFreeBlocksOfAFileSystemAreLeftOutAndVerifyKnows(t *testing.T) {
	r, content, free := newFileSystemRig(t, "ext2", false)
	v := r.open(t)
	defer r.close(t)
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitFor(t, v, Synced)
	s := v.Status()
	if s.Unused != extentBytes(free) || s.Allocated != s.Size-s.Unused || s.Copied > s.Allocated {
		t.Errorf("unused %d, allocated %d, copied %d of %d, want %d unused", s.Unused, s.Allocated, s.Copied, s.Size, extentBytes(free))
	}
	if len(s.AllocationFound) != 1 || !strings.HasPrefix(s.AllocationFound[0], "ext2 on the whole unit: clean") {
		t.Errorf("found %v", s.AllocationFound)
	}
	if n := r.destination.Allocated() * testBlock; n > s.Allocated {
		t.Errorf("the destination has storage for %d bytes, %d are in use", n, s.Allocated)
	}
	wantContent(t, v, content, free)
	check := func(different uint64) {
		t.Helper()
		report, err := v.Verify(t.Context(), VerifyOptions{})
		if err != nil || report.Different != different || report.Unused != extentBytes(free) || report.Compared == 0 {
			t.Errorf("verify: %+v, %v, want %d bytes different, %d unused", report, err, different, extentBytes(free))
		}
	}
	check(0)
	// Whatever the source says later, also to the next run of the service.
	if err := r.source.WriteAt(t.Context(), make([]byte, testBlock), 2); err != nil {
		t.Fatal(err)
	}
	r.close(t)
	v = r.open(t)
	check(testBlock)
}

// TestARestartLeavesOutTheSame: what was left out is not found out again.
// Caught: a restart that reads the source again, and then copies what verify leaves out.
func TestARestartLeavesOutTheSame(t *testing.T) {
	r, content, free := newFileSystemRig(t, "xfs5", false)
	v := r.open(t)
	defer r.close(t)
	if err := v.Throttle(t.Context(), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, v, "the free blocks are found", func(s Status) bool { return s.Unused > 0 })
	written := lun.Extent{Start: free[len(free)-1].End() - 10, Blocks: 10}
	if err := v.WriteAt(t.Context(), stamps(written, 2), written.Start); err != nil {
		t.Fatal(err)
	}
	r.close(t)
	if v = r.open(t); v.Phase() != Migrating {
		t.Fatalf("phase %s: the copy was over before the restart", v.Phase())
	}
	if s := v.Status(); s.Unused != extentBytes(free) {
		t.Errorf("unused %d after the restart, want %d", s.Unused, extentBytes(free))
	}
	if err := v.Throttle(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, v, Synced)
	copy(content[uint64(written.Start)*testBlock:], stamps(written, 2))
	wantContent(t, v, content, lun.Without(free, []lun.Extent{written}))
	if report, err := v.Verify(t.Context(), VerifyOptions{}); err != nil || report.Different != 0 {
		t.Errorf("verify: %+v, %v", report, err)
	}
}

// TestWhatDoesNotShowItsMountsIsCopiedWhereItMayBeMounted: an XFS has data in blocks that are free on the
// medium, before its log says so.
// Caught: a write of an initiator before the start that is not seen.
func TestWhatDoesNotShowItsMountsIsCopiedWhereItMayBeMounted(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, r *rig, v *Volume) *Volume{
		"an initiator wrote": func(t *testing.T, r *rig, v *Volume) *Volume {
			at := lun.LBA(v.Info().Blocks - 1)
			p := make([]byte, testBlock)
			if err := v.ReadAt(t.Context(), p, at); err != nil {
				t.Fatal(err)
			}
			if err := v.WriteAt(t.Context(), p, at); err != nil {
				t.Fatal(err)
			}
			return v
		},
		"an earlier run": func(t *testing.T, r *rig, v *Volume) *Volume {
			r.close(t)
			return r.open(t)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, content, _ := newFileSystemRig(t, "xfs5", false)
			v := r.open(t)
			defer r.close(t)
			v = before(t, r, v)
			if err := v.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			waitFor(t, v, Synced)
			wantContent(t, v, content, nil)
			if s := v.Status(); s.Unused != 0 || len(s.AllocationFound) != 1 || !strings.Contains(s.AllocationFound[0], "may have had it mounted") {
				t.Errorf("unused %d, found %v", s.Unused, s.AllocationFound)
			}
		})
	}
}

// TestAllocationIsAsItIsSet tries each setting with a source that cannot tell and with one that can.
func TestAllocationIsAsItIsSet(t *testing.T) {
	for _, c := range []struct {
		set       Allocation
		thin      bool
		leavesOut bool
		text      string
	}{
		{"", false, true, "as the file systems of the source tell"},
		{AllocationAuto, false, true, "as the file systems of the source tell"},
		{AllocationAuto, true, false, "as the source tells"},
		{AllocationDevice, false, false, "everything, as the source does not tell"},
		{AllocationDevice, true, false, "as the source tells"},
		{AllocationFileSystem, true, true, "as the source and its file systems tell"},
		{AllocationAll, false, false, "everything, as allocation = \"all\""},
		{AllocationAll, true, false, "everything, as allocation = \"all\""},
	} {
		r, content, free := newFileSystemRig(t, "ext2", c.thin)
		r.cfg.Allocation = c.set
		v := r.open(t)
		if err := v.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		waitFor(t, v, Synced)
		if !c.leavesOut {
			free = nil
		}
		wantContent(t, v, content, free)
		if s := v.Status(); s.Unused != extentBytes(free) || s.Allocation != c.text {
			t.Errorf("%q, thin %v: unused %d, want %d; %s", c.set, c.thin, s.Unused, extentBytes(free), s.Allocation)
		}
		r.close(t)
	}
}

// TestWhatIsLeftOutIsReadBackAsItWasKept, and damage is told.
func TestWhatIsLeftOutIsReadBackAsItWasKept(t *testing.T) {
	r, _, free := newFileSystemRig(t, "ext2", false)
	all := r.source.Info().All()
	u := &unused{runs: free, report: []string{"one", "", "two"}}
	b := u.encode()
	back, err := decodeUnused(b, all)
	if err != nil || !slices.Equal(back.runs, u.runs) || !slices.Equal(back.report, u.report) {
		t.Fatalf("%+v, %v", back, err)
	}
	if _, err := decodeUnused(b, lun.Extent{Blocks: uint64(free[0].Start)}); err == nil {
		t.Error("runs beyond the volume are taken")
	}
	for i := range b {
		if got, err := decodeUnused(b[:i], all); err == nil && len(got.runs) == len(free) {
			t.Errorf("the first %d of %d bytes are taken for all", i, len(b))
		}
	}
}
