package lun_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

func sparseFile(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lun.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openPath(t testing.TB, path string, opts lun.Options) lun.Device {
	t.Helper()
	dev, err := lun.Open(t.Context(), path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

func TestFileKeepsTheContract(t *testing.T) {
	for _, bs := range []uint32{512, 4096} {
		t.Run(fmt.Sprint(bs), func(t *testing.T) {
			path := sparseFile(t, 20<<20)
			luntest.Run(t, func(t *testing.T) lun.Device { return openPath(t, path, lun.Options{BlockSize: bs}) }, mustTry(t)...)
		})
	}
}

func TestSerializedFileKeepsTheContract(t *testing.T) {
	path := sparseFile(t, 20<<20)
	luntest.Run(t, func(t *testing.T) lun.Device { return lun.Serialize(openPath(t, path, lun.Options{})) }, mustTry(t)...)
}

func TestSecondOpenOfAFileIsRefused(t *testing.T) {
	path := sparseFile(t, 1<<20)
	first := openPath(t, path, lun.Options{})
	for _, ro := range []bool{false, true} {
		if _, err := lun.Open(t.Context(), path, lun.Options{ReadOnly: ro}); !errors.Is(err, lun.ErrInUse) {
			t.Fatalf("read-only %v: want ErrInUse, got %v", ro, err)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	openPath(t, path, lun.Options{})
}

func TestReadOnlyFileRefusesWritesAndIsShared(t *testing.T) {
	path := sparseFile(t, 1<<20)
	openPath(t, path, lun.Options{ReadOnly: true})
	dev := openPath(t, path, lun.Options{ReadOnly: true})
	e := lun.Extent{Blocks: 1}
	for name, err := range map[string]error{
		"write": dev.WriteAt(t.Context(), make([]byte, 512), 0),
		"zero":  dev.WriteZeroes(t.Context(), e), "unmap": dev.Unmap(t.Context(), e),
	} {
		var sense *lun.SenseError
		if !errors.As(err, &sense) || sense.Key != 7 || sense.ASC != 0x27 {
			t.Errorf("%s: want DATA PROTECT, WRITE PROTECTED, got %v", name, err)
		}
	}
	if err := dev.Flush(t.Context()); err != nil {
		t.Errorf("flush: %v", err)
	}
}

func TestUnmappedRangeOfAFileIsFreed(t *testing.T) {
	path := sparseFile(t, 8<<20)
	dev := openPath(t, path, lun.Options{})
	if !dev.Info().Thin {
		t.Skip("the file system has no holes")
	}
	if err := dev.WriteAt(t.Context(), make([]byte, 8<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Unmap(t.Context(), lun.Extent{Start: 2048, Blocks: 8192}); err != nil {
		t.Fatal(err)
	}
	runs, err := dev.Extents(t.Context(), dev.Info().All())
	if err != nil {
		t.Fatal(err)
	}
	want := []lun.Allocation{
		{Extent: lun.Extent{Start: 0, Blocks: 2048}, Allocated: true},
		{Extent: lun.Extent{Start: 2048, Blocks: 8192}},
		{Extent: lun.Extent{Start: 10240, Blocks: 6144}, Allocated: true},
	}
	if fmt.Sprint(runs) != fmt.Sprint(want) {
		t.Fatalf("extents %v, want %v", runs, want)
	}
}

func TestFileThatCannotBeALogicalUnitIsRefused(t *testing.T) {
	dir := t.TempDir()
	ragged := sparseFile(t, 1000)
	empty := sparseFile(t, 0)
	for _, tc := range []struct {
		path, says string
		opts       lun.Options
	}{
		{path: ragged, says: "not a multiple of the block size"},
		{path: empty, says: "empty"},
		{path: dir, says: "neither a regular file nor a block device"},
		{path: filepath.Join(dir, "absent"), says: "no such file"},
		{path: sparseFile(t, 1<<20), opts: lun.Options{BlockSize: 1000}, says: "not a power of two"},
	} {
		_, err := lun.Open(t.Context(), tc.path, tc.opts)
		if err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), tc.path) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: want one line with %q and the path, got %v", tc.path, tc.says, err)
		}
	}
}

func TestFileIODoesNotAllocate(t *testing.T) {
	dev := openPath(t, sparseFile(t, 1<<20), lun.Options{})
	p := make([]byte, 4096)
	ctx := t.Context()
	for name, do := range map[string]func(){
		"write": func() { _ = dev.WriteAt(ctx, p, 8) },
		"read":  func() { _ = dev.ReadAt(ctx, p, 8) },
		"try":   func() { _, _ = dev.(lun.Prober).TryReadAt(p, 8) },
	} {
		if n := testing.AllocsPerRun(100, do); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// mustTry demands tried reads where the file system can serve them.
func mustTry(t *testing.T) []luntest.Must {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Preadv2(int(f.Fd()), [][]byte{make([]byte, 4096)}, 0, unix.RWF_NOWAIT); err != nil || n != 4096 {
		t.Logf("this file system has no reads that do not wait: %v", err)
		return nil
	}
	return []luntest.Must{luntest.MustTry}
}
