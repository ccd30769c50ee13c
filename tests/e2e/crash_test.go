package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// oracle knows what each block of one client's range may hold. The client has
// one command at a time.
type oracle struct {
	from, blocks uint64
	block        uint64
	span         uint64 // writes stay within the first blocks of the range
	acked        []byte // the pattern last acknowledged; 0 is the content before
	maybe        []byte // a pattern issued later and not answered; 0 is none
}

func newOracle(from, blocks, block uint64) *oracle {
	return &oracle{from, blocks, block, blocks, make([]byte, blocks), make([]byte, blocks)}
}

// host is an initiator: it writes a pattern over a range of bytes, or fails unless it
// reads the pattern there.
type host interface {
	write(ctx context.Context, pattern byte, offset, length uint64) error
	expect(ctx context.Context, pattern byte, offset, length uint64) error
}

// qemuHost is qemu-io, which has one command at a time.
type qemuHost struct{ *peer.QemuShell }

func (h qemuHost) write(ctx context.Context, pattern byte, offset, length uint64) error {
	_, err := h.Do(ctx, peer.Write(pattern, offset, length))
	return err
}

func (h qemuHost) expect(ctx context.Context, pattern byte, offset, length uint64) error {
	_, err := h.Do(ctx, peer.Read(pattern, offset, length))
	return err
}

// deviceHost is lunshift's own initiator; many may share one, so that many commands are in
// flight on a session.
type deviceHost struct{ lun.Device }

func (h deviceHost) write(ctx context.Context, pattern byte, offset, length uint64) error {
	p := bytes.Repeat([]byte{pattern}, int(length))
	return h.WriteAt(ctx, p, lun.LBA(offset/uint64(h.Info().BlockSize)))
}

func (h deviceHost) expect(ctx context.Context, pattern byte, offset, length uint64) error {
	p := make([]byte, length)
	if err := h.ReadAt(ctx, p, lun.LBA(offset/uint64(h.Info().BlockSize))); err != nil {
		return err
	}
	if !filled(p, pattern) {
		return fmt.Errorf("reads %x…, wrote %#x", p[:8], pattern)
	}
	return nil
}

// client writes and reads one range until load ends; what it issued before is still
// waited for, as long as ctx. Each answered write counts in acks.
func (o *oracle) client(ctx, load context.Context, h host, rng *rand.Rand, acks *atomic.Int64) error {
	for load.Err() == nil {
		n := uint64(1 + rng.IntN(16))
		at := rng.Uint64N(o.span - n + 1)
		if rng.IntN(3) == 0 {
			if o.acked[at] == 0 || o.maybe[at] != 0 {
				continue
			}
			// A block once acknowledged is never seen older.
			if err := h.expect(ctx, o.acked[at], (o.from+at)*o.block, o.block); err != nil {
				return fmt.Errorf("block %d: %w", o.from+at, err)
			}
			continue
		}
		pattern := byte(1 + rng.IntN(255))
		for i := at; i < at+n; i++ {
			o.maybe[i] = pattern
		}
		if err := h.write(ctx, pattern, (o.from+at)*o.block, n*o.block); err != nil {
			return fmt.Errorf("write of %d blocks at %d: %w", n, o.from+at, err)
		}
		for i := at; i < at+n; i++ {
			o.acked[i], o.maybe[i] = pattern, 0
		}
		acks.Add(1)
	}
	return nil
}

// check reads every block of the range from an image and from the image before.
func (o *oracle) check(t *testing.T, image, before *os.File) {
	t.Helper()
	p, old := make([]byte, o.block), make([]byte, o.block)
	wrong := 0
	for i := range o.blocks {
		at := int64((o.from + i) * o.block)
		if _, err := image.ReadAt(p, at); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if _, err := before.ReadAt(old, at); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		ok := o.acked[i] == 0 && string(p) == string(old) || o.acked[i] != 0 && filled(p, o.acked[i])
		if ok = ok || o.maybe[i] != 0 && filled(p, o.maybe[i]); !ok {
			if wrong++; wrong <= 10 {
				t.Errorf("block %d: holds %x…, acknowledged %#x, perhaps %#x", o.from+i, p[:8], o.acked[i], o.maybe[i])
			}
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d blocks are wrong", wrong, o.blocks)
	}
}

func filled(p []byte, pattern byte) bool {
	for _, b := range p {
		if b != pattern {
			return false
		}
	}
	return true
}

// TestKilledServiceGoesOnAndLosesNoAcknowledgedWrite shows it to hosts that nobody of this
// project wrote; tests/torture crashes the service in more ways, under more load.
func TestKilledServiceGoesOnAndLosesNoAcknowledgedWrite(t *testing.T) {
	needTools(t)
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 96 * mib}.make(t)
	killInMidCopy(t, p, 4, func(s *service) func() host {
		return func() host { return qemuHost{shell(t, s.front("db01"))} }
	})
}

// killInMidCopy migrates a pair and kills the service several times, and stops it once, while clients,
// each with a range of its own, write and read.
func killInMidCopy(t *testing.T, p *pair, clients int, connect func(*service) func() host) {
	ctx := t.Context()
	const restarts = 4
	before := p.sourcePath + ".before"
	clone(t, p.sourcePath, before)
	s := newService(t, p.volume("db01"))
	s.start()
	s.run("throttle", "db01", "--rate", "2MiB")
	s.run("start", "db01")

	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var acks atomic.Int64
	load, stop := context.WithCancel(ctx)
	defer stop()
	var running sync.WaitGroup
	faults := make(chan error, clients)
	var oracles []*oracle
	newHost := connect(s)
	block := uint64(p.block)
	for i := range clients {
		share := p.size / uint64(clients) / block
		o := newOracle(uint64(i)*share, share, block)
		o.span = share / 8 // so that there is always something left to copy
		oracles = append(oracles, o)
		h := newHost()
		running.Go(func() {
			if err := o.client(ctx, load, h, rand.New(rand.NewPCG(seed, uint64(i))), &acks); err != nil {
				faults <- err
			}
		})
	}
	progress := func() {
		t.Helper()
		for from, deadline := acks.Load(), time.Now().Add(time.Minute); acks.Load() < from+100; {
			select {
			case err := <-faults:
				t.Fatal(err)
			case <-time.After(10 * time.Millisecond):
			}
			if time.Now().After(deadline) {
				t.Fatalf("the load stands still after %d writes", acks.Load())
			}
		}
	}
	for i := range restarts {
		from := s.status("db01").Copied
		progress()
		last := s.until("db01", "copying", func(st status) bool { return st.Copied >= from+mib || st.Phase != "migrating" })
		if last.Phase != "migrating" {
			t.Fatalf("the copy was over before its end was due: %+v", last)
		}
		if i == restarts-1 {
			s.stop() // in order, which hosts must outlive as well
		} else {
			s.kill()
		}
		s.start()
		now := s.status("db01")
		if now.Phase != "migrating" || now.Remaining == 0 {
			t.Errorf("after the kill: %+v", now)
		}
		// What was copied is not copied again, but for the regions in flight.
		if now.Remaining > last.Remaining+16*mib {
			t.Errorf("the copy began again: %d bytes remained before the kill, %d after", last.Remaining, now.Remaining)
		}
		if now.Copied+16*mib < last.Copied || now.Copied == 0 {
			t.Errorf("%d bytes were copied before the kill, %d after", last.Copied, now.Copied)
		}
		progress()
	}
	s.run("throttle", "db01", "--rate", "0")
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	progress()
	s.kill() // synced now, and under load still
	s.start()
	if st := s.status("db01"); st.Phase != "synced" {
		t.Errorf("killed in phase synced, now %s", st.Phase)
	}
	progress()
	stop()
	running.Wait()
	select {
	case err := <-faults:
		t.Fatal(err)
	default:
	}
	s.run("cutover", "db01")
	s.stop()
	t.Logf("%d writes acknowledged", acks.Load())

	image, err := os.Open(p.destinationPath)
	must(t, err)
	defer image.Close()
	old, err := os.Open(before)
	must(t, err)
	defer old.Close()
	for _, o := range oracles {
		o.check(t, image, old)
	}
	if at, same := sameImages(t, before, p.sourcePath, p.size); !same {
		t.Errorf("the source was written, at byte %d", at)
	}
}

// TestWritesThatRaceTheCopyWin has many writes in flight while the copy goes as fast
// as it can, most of it over holes.
func TestWritesThatRaceTheCopyWin(t *testing.T) {
	needTools(t)
	ctx := t.Context()
	const clients = 32
	for _, share := range []float64{0.1, 1} {
		dir := t.TempDir()
		const size = 64 * mib
		from := sparseFile(t, dir, "old.img", size, share, 8)
		before := from + ".before"
		clone(t, from, before)
		to := emptyFile(t, dir, "new.img", size)
		a := newArray(t, "new", peer.Unit{Path: to, Thin: true})
		s := newService(t, volume{name: "db01", source: from, destination: a.unit(1).URL(), more: "region_size = \"64KiB\"\n"})
		s.start()
		s.run("start", "db01")
		s.run("pause", "db01")
		dev, err := lun.Open(ctx, s.front("db01").URL(), lun.Options{})
		must(t, err)
		t.Cleanup(func() { dev.Close() })
		var acks atomic.Int64
		load, stop := context.WithCancel(ctx)
		defer stop()
		var running sync.WaitGroup
		var oracles []*oracle
		faults := make(chan error, clients)
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		for i := range clients {
			blocks := uint64(size / clients / 512)
			o := newOracle(uint64(i)*blocks, blocks, 512)
			oracles = append(oracles, o)
			running.Go(func() {
				if err := o.client(ctx, load, deviceHost{dev}, rand.New(rand.NewPCG(seed, uint64(i))), &acks); err != nil {
					faults <- err
				}
			})
		}
		s.run("resume", "db01")
		s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
		during := acks.Load()
		stop()
		running.Wait()
		select {
		case err := <-faults:
			t.Fatal(err)
		default:
		}
		t.Logf("%d writes during the copy", during)
		if during < clients {
			t.Errorf("no load worth the name: %d writes", during)
		}
		must(t, dev.Close())
		s.run("cutover", "db01")
		s.stop()
		image, err := os.Open(to)
		must(t, err)
		old, err := os.Open(before)
		must(t, err)
		for _, o := range oracles {
			o.check(t, image, old)
		}
		must(t, image.Close())
		must(t, old.Close())
	}
}
