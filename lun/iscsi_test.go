package lun_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/tests/peer"
)

const testIQN = "iqn.2026-11.net.example:disk"

func TestISCSIKeepsTheContract(t *testing.T) {
	d := peer.StartTgtd(t)
	for _, tc := range []struct {
		name string
		unit peer.Unit
		opts lun.Options
	}{
		{"Thin512", peer.Unit{Thin: true}, lun.Options{}},
		{"Thick512TwoSessions", peer.Unit{}, lun.Options{Sessions: 2}},
		{"Thin4096", peer.Unit{BlockSize: 4096, Thin: true}, lun.Options{}},
		{"Thick4096FewCommands", peer.Unit{BlockSize: 4096}, lun.Options{QueueDepth: 2}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			iqn := fmt.Sprintf("%s-%s", testIQN, tc.name)
			tc.unit.Path = sparseFile(t, 20<<20)
			if err := d.AddTarget(t.Context(), iqn, []peer.Unit{tc.unit}); err != nil {
				t.Fatal(err)
			}
			luntest.Run(t, func(t *testing.T) lun.Device { return openPath(t, d.LUN(iqn, 1).URL(), tc.opts) }, luntest.MustCancel)
		})
	}
}

func serve(t *testing.T, d *peer.Tgtd, size int64, unit peer.Unit, accounts ...peer.Account) peer.LUN {
	t.Helper()
	unit.Path = sparseFile(t, size)
	if err := d.AddTarget(t.Context(), testIQN, []peer.Unit{unit}, accounts...); err != nil {
		t.Fatal(err)
	}
	return d.LUN(testIQN, 1)
}

func TestISCSIDeviceIsWhatTheTargetSays(t *testing.T) {
	d := peer.StartTgtd(t)
	l := serve(t, d, 8<<20, peer.Unit{BlockSize: 4096, Thin: true, Serial: "SN-4711"})
	dev := openPath(t, l.URL(), lun.Options{})
	i := dev.Info()
	if i.BlockSize != 4096 || i.Blocks != 2048 || i.Serial != "SN-4711" || i.Vendor != "IET" || i.Product != "VIRTUAL-DISK" {
		t.Errorf("info %+v", i)
	}
	if !i.Thin || !i.UnmapZeroes || !i.ReportsAllocation || !i.VolatileCache {
		t.Errorf("provisioning and cache are not as served: %+v", i)
	}
	second := openPath(t, l.URL(), lun.Options{Sessions: 3}).Info()
	if !second.Identity.Equal(i.Identity) || i.Identity == nil {
		t.Errorf("a second path has the identity %+v instead of %+v", second.Identity, i.Identity)
	}
	if second.Identity = i.Identity; second != i {
		t.Errorf("a second path says %+v instead of %+v", second, i)
	}
	if names, err := d.Initiators(t.Context(), testIQN); err != nil || len(names) != 4 {
		t.Errorf("sessions at the target: %v, %v", names, err)
	}
}

// TestDigestThatTheTargetRefusesIsAnError: tgtd has digests off unless told otherwise.
func TestDigestThatTheTargetRefusesIsAnError(t *testing.T) {
	d := peer.StartTgtd(t)
	url := serve(t, d, 8<<20, peer.Unit{}).URL()
	for _, opts := range []lun.Options{{HeaderDigest: true}, {DataDigest: true}} {
		dev, err := lun.Open(t.Context(), url, opts)
		if err == nil {
			dev.Close()
			t.Fatal("the digest is silently not on")
		}
		if !strings.Contains(err.Error(), "Digest") {
			t.Errorf("the error does not say why: %v", err)
		}
	}
}

func TestUnmappedRangeOfAThinTargetIsFreed(t *testing.T) {
	d := peer.StartTgtd(t)
	dev := openPath(t, serve(t, d, 8<<20, peer.Unit{Thin: true}).URL(), lun.Options{})
	all := dev.Info().All()
	if err := dev.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 8<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Unmap(t.Context(), lun.Extent{Start: 2048, Blocks: 8192}); err != nil {
		t.Fatal(err)
	}
	var free uint64
	for at := all.Start; at < all.End(); {
		runs, err := dev.Extents(t.Context(), lun.Extent{Start: at, Blocks: uint64(all.End() - at)})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range runs {
			if !r.Allocated {
				free += r.Blocks
			}
			at = r.End()
		}
	}
	if free != 8192 {
		t.Fatalf("%d blocks are unallocated, want 8192", free)
	}
}

func TestLoginWithCHAPNeedsTheRightSecret(t *testing.T) {
	d := peer.StartTgtd(t)
	in := peer.Account{User: "reader", Secret: "rightrightright"}
	out := peer.Account{User: "array", Secret: "provenprovenproven", Outgoing: true}
	l := serve(t, d, 2<<20, peer.Unit{}, in, out)
	l.User = in.User
	for _, tc := range []struct {
		name string
		opts lun.Options
		ok   bool
	}{
		{"right secret", lun.Options{Secret: in.Secret}, true},
		{"right secret, target proves itself", lun.Options{Secret: in.Secret, TargetUser: out.User, TargetSecret: out.Secret}, true},
		{"wrong secret", lun.Options{Secret: "wrongwrongwrong"}, false},
		{"no secret", lun.Options{}, false},
		{"target cannot prove itself", lun.Options{Secret: in.Secret, TargetSecret: "anotheranotheranother"}, false},
		{"target proves to be another", lun.Options{Secret: in.Secret, TargetUser: "other", TargetSecret: out.Secret}, false},
	} {
		dev, err := lun.Open(t.Context(), l.URL(), tc.opts)
		if err == nil {
			dev.Close()
		}
		if (err == nil) != tc.ok || err != nil && !errors.Is(err, lun.ErrAuth) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err != nil && (strings.Contains(err.Error(), tc.opts.Secret) && tc.opts.Secret != "" || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: the error holds the secret or a line break: %q", tc.name, err)
		}
	}
	l.User = ""
	if _, err := lun.Open(t.Context(), l.URL(), lun.Options{}); !errors.Is(err, lun.ErrAuth) {
		t.Errorf("no user: want ErrAuth, got %v", err)
	}
}

func TestOpenOfWhatIsNotThereFailsClearly(t *testing.T) {
	d := peer.StartTgtd(t)
	serve(t, d, 2<<20, peer.Unit{})
	if _, err := lun.Open(t.Context(), d.LUN(testIQN, 7).URL(), lun.Options{}); err == nil || !strings.Contains(err.Error(), "no logical unit 7") {
		t.Errorf("absent LUN: %v", err)
	}
	if _, err := lun.Open(t.Context(), d.LUN(testIQN, 0).URL(), lun.Options{}); err == nil || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("controller: %v", err)
	}
	if _, err := lun.Open(t.Context(), d.LUN(testIQN+".absent", 1).URL(), lun.Options{}); err == nil || !strings.Contains(err.Error(), "no such target") {
		t.Errorf("absent target: %v", err)
	}
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := lun.Open(t.Context(), d.LUN(testIQN, 1).URL(), lun.Options{}); !errors.Is(err, lun.ErrUnavailable) {
		t.Errorf("absent portal: want ErrUnavailable, got %v", err)
	}
}

// TestAcknowledgedWritesOutliveLostConnections writes through kills of the
// target; every write must succeed, and every block read back be the last written.
func TestAcknowledgedWritesOutliveLostConnections(t *testing.T) {
	d := peer.StartTgtd(t)
	l := serve(t, d, 16<<20, peer.Unit{})
	dev := openPath(t, l.URL(), lun.Options{Sessions: 2, IOTimeout: 20 * time.Second})
	const writers, span = 8, 64
	last := make([][]uint64, writers)
	var stop atomic.Bool
	var count atomic.Int64
	var wg sync.WaitGroup
	for w := range writers {
		last[w] = make([]uint64, span)
		wg.Go(func() {
			p := make([]byte, 8192)
			for n := 0; !stop.Load(); n++ {
				at := n * 7 % span
				version := uint64(n + 1)
				peer.Stamp(p, 512, uint64(w*span+at)*16, 1, version)
				if err := dev.WriteAt(t.Context(), p, lun.LBA((w*span+at)*16)); err != nil {
					t.Errorf("write %d of writer %d: %v", n, w, err)
					return
				}
				last[w][at] = version
				count.Add(1)
			}
		})
	}
	wait := func() {
		for n := count.Load(); count.Load() < n+500 && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
	}
	for range 3 {
		wait()
		if err := d.Kill(); err != nil {
			t.Error(err)
		}
		if err := d.Start(t.Context()); err != nil {
			t.Error(err)
		}
	}
	wait()
	stop.Store(true)
	wg.Wait()
	got, want := make([]byte, 8192), make([]byte, 8192)
	for w := range writers {
		for at, version := range last[w] {
			if version == 0 {
				continue
			}
			lba := uint64(w*span+at) * 16
			if err := dev.ReadAt(t.Context(), got, lun.LBA(lba)); err != nil {
				t.Fatal(err)
			}
			if peer.Stamp(want, 512, lba, 1, version); !bytes.Equal(got, want) {
				t.Fatalf("LBA %d does not hold version %d", lba, version)
			}
		}
	}
}

func TestTargetThatHangsIsUnavailableAfterTheTimeout(t *testing.T) {
	d := peer.StartTgtd(t)
	dev := openPath(t, serve(t, d, 2<<20, peer.Unit{}).URL(), lun.Options{
		IOTimeout: 300 * time.Millisecond, PingInterval: 100 * time.Millisecond, LoginTimeout: 200 * time.Millisecond,
	})
	p := make([]byte, 512)
	if err := dev.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := dev.ReadAt(t.Context(), p, 0); !errors.Is(err, lun.ErrUnavailable) {
		t.Errorf("want ErrUnavailable, got %v", err)
	}
	if err := dev.WriteAt(t.Context(), p, 0); !errors.Is(err, lun.ErrUnavailable) {
		t.Errorf("want ErrUnavailable, got %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := dev.ReadAt(ctx, p, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("want the context's error, got %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("three commands took %v to fail", took)
	}
	if err := d.Continue(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := dev.ReadAt(t.Context(), p, 0)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the device does not come back: %v", err)
		}
	}
}

func TestIdleSessionIsKeptAlive(t *testing.T) {
	d := peer.StartTgtd(t)
	log := logrus.New()
	var out bytes.Buffer
	log.SetOutput(&out)
	dev := openPath(t, serve(t, d, 2<<20, peer.Unit{}).URL(), lun.Options{PingInterval: 200 * time.Millisecond, Log: log})
	time.Sleep(1200 * time.Millisecond) // many intervals in which only pings are sent
	if err := dev.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if out.Len() > 0 {
		t.Fatalf("the session was lost while idle: %s", out.String())
	}
}

func TestISCSIIODoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector throws away what is pooled")
	}
	d := peer.StartTgtd(t)
	dev := openPath(t, serve(t, d, 2<<20, peer.Unit{}).URL(), lun.Options{})
	p := make([]byte, 4096)
	for name, do := range map[string]func(){
		"write": func() { _ = dev.WriteAt(t.Context(), p, 8) },
		"read":  func() { _ = dev.ReadAt(t.Context(), p, 8) },
	} {
		if n := testing.AllocsPerRun(500, do); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestDeviceTellsWhetherItsArrayIsReachable has nobody issue commands: the session
// alone must notice.
func TestDeviceTellsWhetherItsArrayIsReachable(t *testing.T) {
	d := peer.StartTgtd(t)
	dev := openPath(t, serve(t, d, 2<<20, peer.Unit{}).URL(), lun.Options{Sessions: 2})
	r, ok := dev.(lun.Reachable)
	if !ok {
		t.Fatal("the device does not tell")
	}
	if err := r.Unreachable(); err != nil {
		t.Fatalf("reachable, but: %v", err)
	}
	until := func(want bool, span time.Duration) error {
		for deadline := time.Now().Add(span); ; time.Sleep(time.Millisecond) {
			if err := r.Unreachable(); (err == nil) == want || time.Now().After(deadline) {
				return err
			}
		}
	}
	for range 2 {
		if err := d.Kill(); err != nil {
			t.Fatal(err)
		}
		err := until(false, 2*time.Second)
		if !errors.Is(err, lun.ErrUnavailable) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), d.Portal()) {
			t.Errorf("2 s after the kill: %q", err)
		}
		if err := d.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := until(true, 10*time.Second); err != nil {
			t.Errorf("10 s after the restart: %v", err)
		}
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Unreachable(); !errors.Is(err, lun.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
