package state

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSmallFileSystemFillsUpWithoutAFault fills a file system of its own, which
// only root can make.
func TestSmallFileSystemFillsUpWithoutAFault(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a file system")
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=160m"); err != nil {
		t.Skipf("cannot mount a file system: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := open(t, dir)
	g := Geometry{Blocks: 1 << 36, RegionBlocks: 1 << 17}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	f.compact = false
	var acked []Run
	for err == nil {
		runs := make([]Run, 64) // 16 KiB of bitmap each, as they are not stored as runs
		for i := range runs {
			runs[i] = Run{rand.Uint64N(g.Blocks - 8), 8}
		}
		if err = f.Set(context.Background(), Valid, runs...); err == nil {
			acked = append(acked, runs...)
		}
	}
	if !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	t.Logf("%d runs fit", len(acked))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// What was acknowledged is there once the file system has grown.
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=1g"); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if f, err = s.Flags("v", g); err != nil {
		t.Fatal(err)
	}
	for _, r := range acked {
		if !f.All(Valid, r) {
			t.Fatalf("%v was acknowledged and is gone", r)
		}
	}
	if err := f.Set(context.Background(), Valid, Run{0, g.Blocks}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
