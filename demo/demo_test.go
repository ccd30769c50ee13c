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
	r, err := Run(context.Background(), Options{Size: 64 << 20, Lead: 300 * time.Millisecond, Units: t.TempDir(), State: t.TempDir(), Out: &out})
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
