package demo

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lunshift/lun"
)

func TestDemoMovesASmallUnitUnderLoad(t *testing.T) {
	var out bytes.Buffer
	r, err := Run(context.Background(), Options{Size: 64 << 20, Lead: 300 * time.Millisecond, Out: &out})
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if r.BlocksChecked != 64<<20/blockSize || r.Before.IOPS == 0 || r.During.IOPS == 0 || r.After.IOPS == 0 || r.Copied == 0 {
		t.Errorf("report: %+v", r)
	}
	if !strings.Contains(out.String(), "blocks checked, all right") {
		t.Errorf("no table:\n%s", out.String())
	}
}

// One wrong byte must make the check fail: the demonstration proves nothing otherwise.
func TestCheckFindsOneWrongByte(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "unit.img")
	if err := os.WriteFile(path, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := lun.Open(ctx, path, lun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	o := newOracle(4 << 20)
	if err := o.fill(ctx, dev); err != nil {
		t.Fatal(err)
	}
	if blocks, err := o.check(ctx, dev); err != nil || blocks != 4<<20/blockSize {
		t.Fatalf("a right unit: %d blocks, %v", blocks, err)
	}
	p := make([]byte, blockSize)
	if err := dev.ReadAt(ctx, p, 4097); err != nil {
		t.Fatal(err)
	}
	p[300] ^= 1
	if err := dev.WriteAt(ctx, p, 4097); err != nil {
		t.Fatal(err)
	}
	if _, err := o.check(ctx, dev); err == nil || !strings.Contains(err.Error(), "LBA 4096") {
		t.Fatalf("a wrong byte: %v", err)
	}
}

func TestWhatAKilledDemoLeftIsRemoved(t *testing.T) {
	parent := t.TempDir()
	dead, err := newFolder(parent)
	if err != nil {
		t.Fatal(err)
	}
	dead.lock.Close() // as the kernel does for a process that was killed
	living, err := newFolder(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer living.remove()
	if _, err := os.Stat(dead.path); !os.IsNotExist(err) {
		t.Errorf("the dead one's folder is still there: %v", err)
	}
	third, err := newFolder(parent)
	if err != nil {
		t.Fatal(err)
	}
	third.remove()
	if _, err := os.Stat(living.path); err != nil {
		t.Errorf("the living one's folder is gone: %v", err)
	}
}

// A cutover that fails leaves commands that wait for the new unit; the load must end all
// the same.
func TestLoadEndsWhileItWaitsToBeMoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "unit.img")
	if err := os.WriteFile(path, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := lun.Open(context.Background(), path, lun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l := newLoad(newOracle(16<<20), dev, 4)
	l.start(context.Background())
	l.moving.Store(true)
	if err := dev.Close(); err != nil { // every command fails from here on
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.stop()
	}()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("the load did not end")
	}
}
