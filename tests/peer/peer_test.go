package peer

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const mib = 1 << 20

const iqn = "iqn.2026-11.net.example.peer:one"

func tools(t *testing.T) {
	Need(t, "tgtd", "tgtadm", "qemu-io", "qemu-img", "iscsi-inq", "iscsi-ls", "iscsi-readcapacity16")
}

func serve(t *testing.T, u Unit, accounts ...Account) (*Tgtd, LUN) {
	t.Helper()
	tools(t)
	d := StartTgtd(t)
	if err := d.AddTarget(t.Context(), iqn, []Unit{u}, accounts...); err != nil {
		t.Fatal(err)
	}
	return d, d.LUN(iqn, 1)
}

func sparse(t *testing.T, size uint64, share float64, seed uint64) (path string, written uint64) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "lun.img")
	written, err := SparseFile(path, size, share, seed)
	if err != nil {
		t.Fatal(err)
	}
	return path, written
}

func TestTgtdServesTheBackingFile(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		path, _ := sparse(t, 32*mib, 0.4, 7)
		d, lun := serve(t, Unit{Path: path, BlockSize: block, Thin: true})
		ctx := t.Context()
		out, err := lun.ReadCapacity(ctx)
		if err != nil || !strings.Contains(out, "LBPME:1") || !strings.Contains(out, "Total size:33554432") {
			t.Errorf("read capacity: %v\n%s", err, out)
		}
		if err := lun.Compare(ctx, path); err != nil {
			t.Error(err)
		}
		if _, err := lun.QemuIO(ctx, Write(0x5a, 4*mib, 64<<10), Read(0x5a, 4*mib, 64<<10)); err != nil {
			t.Error(err)
		}
		p := make([]byte, 64<<10)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.ReadAt(p, 4*mib); err != nil || strings.Trim(string(p), "\x5a") != "" {
			t.Errorf("the backing file does not hold what was written (%v)", err)
		}
		if _, err := lun.QemuIO(ctx, Read(0x5b, 4*mib, 4096)); err == nil {
			t.Error("a read of another pattern passed")
		}
		out, err = lun.List(ctx)
		if err != nil || !strings.Contains(out, iqn) || !strings.Contains(out, "Lun:1") {
			t.Errorf("list: %v\n%s", err, out)
		}
		if names, err := d.Initiators(ctx, iqn); err != nil || len(names) != 0 {
			t.Errorf("logged in: %v, %v", names, err)
		}
	}
}

func TestDiscardFreesTheBackingFile(t *testing.T) {
	path, written := sparse(t, 32*mib, 1, 7)
	_, lun := serve(t, Unit{Path: path, Thin: true})
	if n, err := Allocated(path); err != nil || n < written {
		t.Fatalf("allocated %d of %d written, %v", n, written, err)
	}
	if _, err := lun.QemuIO(t.Context(), "discard 8M 16M", Read(0, 8*mib, 16*mib)); err != nil {
		t.Fatal(err)
	}
	if n, err := Allocated(path); err != nil || n > 17*mib {
		t.Errorf("allocated %d after discard, %v", n, err)
	}
}

func TestShellOutlivesARestartOfTheTarget(t *testing.T) {
	path, _ := sparse(t, 4*mib, 0, 1)
	d, lun := serve(t, Unit{Path: path})
	lun.Initiator = "iqn.2026-11.net.example.peer:client"
	ctx := t.Context()
	shell, err := lun.Shell(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := shell.Do(ctx, Write(1, 0, 4096)); err != nil {
		t.Fatal(err)
	}
	names, err := d.Initiators(ctx, iqn)
	if err != nil || len(names) != 1 || names[0] != lun.Initiator {
		t.Errorf("logged in: %q, %v", names, err)
	}
	portal := d.Portal()
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if d.Portal() != portal {
		t.Errorf("portal moved from %s to %s", portal, d.Portal())
	}
	if _, err := shell.Do(ctx, Read(1, 0, 4096)); err != nil {
		t.Error(err)
	}
	if _, err := shell.Do(ctx, Read(2, 0, 4096)); err == nil {
		t.Error("a read of another pattern passed")
	}
	if err := shell.Close(); err != nil {
		t.Error(err)
	}
	if _, err := shell.Do(ctx, Read(1, 0, 4096)); err == nil {
		t.Error("a closed shell took a command")
	}
}

func TestCHAPLetsOnlyTheRightSecretIn(t *testing.T) {
	path, _ := sparse(t, 4*mib, 0, 1)
	_, lun := serve(t, Unit{Path: path}, Account{User: "migrate", Secret: "correct-horse-1"})
	ctx := t.Context()
	if _, err := lun.QemuIO(ctx, Read(0, 0, 512)); err == nil {
		t.Error("a login without CHAP passed")
	}
	lun.User, lun.Secret = "migrate", "wrong-horse-123"
	if _, err := lun.QemuIO(ctx, Read(0, 0, 512)); err == nil {
		t.Error("a wrong secret passed")
	}
	lun.Secret = "correct-horse-1"
	if _, err := lun.QemuIO(ctx, Read(0, 0, 512)); err != nil {
		t.Error(err)
	}
	if out, err := lun.Inquiry(ctx, -1); err != nil || !strings.Contains(out, "IET") {
		t.Errorf("inquiry: %v\n%s", err, out)
	}
}

func TestCopyToMakesTheUnitsEqual(t *testing.T) {
	from, _ := sparse(t, 16*mib, 0.4, 3)
	to, _ := sparse(t, 16*mib, 0, 3)
	tools(t)
	d := StartTgtd(t)
	ctx := t.Context()
	if err := d.AddTarget(ctx, iqn, []Unit{{Path: from}, {Path: to, Thin: true}}); err != nil {
		t.Fatal(err)
	}
	if err := d.LUN(iqn, 2).Compare(ctx, from); err == nil {
		t.Error("an empty unit compares equal")
	}
	if _, err := d.LUN(iqn, 1).CopyTo(ctx, d.LUN(iqn, 2), 16); err != nil {
		t.Fatal(err)
	}
	if err := d.LUN(iqn, 2).Compare(ctx, from); err != nil {
		t.Error(err)
	}
	saved := filepath.Join(t.TempDir(), "saved.img")
	if err := d.LUN(iqn, 2).SaveTo(ctx, saved); err != nil {
		t.Fatal(err)
	}
	if err := d.LUN(iqn, 1).Compare(ctx, saved); err != nil {
		t.Error(err)
	}
}

func TestSparseFileKeepsToItsShare(t *testing.T) {
	path, written := sparse(t, 256*mib, 0.4, 99)
	if share := float64(written) / (256 * mib); share < 0.38 || share > 0.42 {
		t.Errorf("wrote a share of %.3f", share)
	}
	n, err := Allocated(path)
	if err != nil || n < written || n > written+written/50 {
		t.Errorf("allocated %d, written %d, %v", n, written, err)
	}
}

func TestStampTellsTornAndMisplacedBlocks(t *testing.T) {
	p, q := make([]byte, 4096), make([]byte, 4096)
	Stamp(p, 4096, 10, 1, 5)
	Stamp(q, 4096, 10, 1, 6)
	if v, ok := Stamped(p, 10, 1); !ok || v != 5 {
		t.Errorf("version %d, %v", v, ok)
	}
	if _, ok := Stamped(p, 11, 1); ok {
		t.Error("a misplaced block passed")
	}
	copy(p[2048:], q[2048:])
	if _, ok := Stamped(p, 10, 1); ok {
		t.Error("a torn block passed")
	}
}

func TestCPUTimeGrowsWithWork(t *testing.T) {
	before, err := CPUTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for p := make([]byte, mib); ctx.Err() == nil; {
		Stamp(p, 512, 0, 1, 1)
		if now, err := CPUTime(os.Getpid()); err != nil {
			t.Fatal(err)
		} else if now-before >= 50*time.Millisecond {
			return
		}
	}
	t.Error("no processor time in 10 s of work")
}
