package lun_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

// loopDevice gives a block device of this host with that block size.
func loopDevice(t *testing.T, size int64, blockSize string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("block devices need root")
	}
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", blockSize, sparseFile(t, size)).CombinedOutput()
	if err != nil {
		t.Skipf("this host has no loop device to give: %v: %s", err, out)
	}
	path := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", path).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", path, err, out)
		}
	})
	return path
}

func TestBlockDeviceKeepsTheContract(t *testing.T) {
	for _, bs := range []string{"512", "4096"} {
		t.Run(bs, func(t *testing.T) {
			path := loopDevice(t, 12<<20, bs)
			luntest.Run(t, func(t *testing.T) lun.Device { return openPath(t, path, lun.Options{}) })
		})
	}
}

func TestBlockDeviceIsHeldExclusively(t *testing.T) {
	path := loopDevice(t, 2<<20, "512")
	dev := openPath(t, path, lun.Options{})
	if _, err := lun.Open(t.Context(), path, lun.Options{}); !errors.Is(err, lun.ErrInUse) {
		t.Fatalf("want ErrInUse, got %v", err)
	}
	if i := dev.Info(); !strings.HasPrefix(i.ID, "block:") || i.BlockSize != 512 || i.Size() != 2<<20 {
		t.Errorf("info %+v", i)
	}
}

func TestFullFileSystemIsSpaceAllocationFailed(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("tmpfs cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "lun.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 8<<20); err != nil {
		t.Fatal(err)
	}
	dev := openPath(t, path, lun.Options{})
	defer dev.Close()
	err := dev.WriteAt(t.Context(), make([]byte, 4<<20), 0)
	var sense *lun.SenseError
	if !errors.As(err, &sense) || sense.Key != 7 || sense.ASC != 0x27 || sense.ASCQ != 7 {
		t.Fatalf("want DATA PROTECT, SPACE ALLOCATION FAILED, got %v", err)
	}
	if err := dev.Unmap(t.Context(), dev.Info().All()); err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteAt(t.Context(), make([]byte, 256<<10), 0); err != nil {
		t.Fatalf("after space was freed: %v", err)
	}
}
