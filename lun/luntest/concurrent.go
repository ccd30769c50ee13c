package luntest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
)

func testConcurrentWriters(t *testing.T, b *bench) {
	const writers, rounds = 16, 60
	var wg sync.WaitGroup
	last := make([]map[lun.LBA]uint64, writers)
	for w := range writers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(b.seed, uint64(w)))
			mine := map[lun.LBA]uint64{}
			last[w] = mine
			for version := uint64(1); version <= rounds; version++ {
				// Writer w owns every block whose number is w modulo the number of
				// writers, so that neighbours of each of its blocks are others'.
				l := lun.LBA(rnd.Uint64N(b.blocks/writers))*writers + lun.LBA(w)
				p := make([]byte, b.bs)
				b.stamp(p, l, version)
				if err := b.dev.WriteAt(t.Context(), p, l); err != nil {
					t.Errorf("write LBA %d: %v", l, err)
					return
				}
				mine[l] = version
				clear(p)
				if err := b.dev.ReadAt(t.Context(), p, l); err != nil {
					t.Errorf("read LBA %d: %v", l, err)
					return
				}
				if err := b.check(p, l, version); err != nil {
					t.Errorf("after its own write: %v", err)
					return
				}
				if version%20 == 0 {
					if err := b.dev.Flush(t.Context()); err != nil {
						t.Errorf("flush: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	for _, mine := range last {
		for l, version := range mine {
			b.expect(t, lun.Extent{Start: l, Blocks: 1}, version)
		}
	}
}

func testModel(t *testing.T, b *bench) {
	all := b.extent(0, 4<<20)
	all.Blocks = min(all.Blocks, b.blocks)
	model := make([]byte, b.info.Bytes(all))
	if err := b.dev.WriteAt(t.Context(), model, 0); err != nil {
		t.Fatal(err)
	}
	small := uint64(max(32<<10/b.bs, 1))
	for version := uint64(1); version <= 400; version++ {
		limit := small
		if version%16 == 0 {
			limit = all.Blocks
		}
		n := 1 + b.rnd.Uint64N(limit)
		e := lun.Extent{Start: lun.LBA(b.rnd.Uint64N(all.Blocks - n + 1)), Blocks: n}
		part := model[int(e.Start)*b.bs : int(e.End())*b.bs]
		var err error
		switch b.rnd.IntN(8) {
		case 0, 1, 2:
			b.stamp(part, e.Start, version)
			err = b.dev.WriteAt(t.Context(), part, e.Start)
		case 3:
			clear(part)
			err = b.dev.WriteZeroes(t.Context(), e)
		case 4:
			if b.info.UnmapZeroes {
				clear(part)
				err = b.dev.Unmap(t.Context(), e)
			}
		default:
			if got := b.read(t, e); !bytes.Equal(got, part) {
				for off := 0; off < len(got); off += b.bs {
					if !bytes.Equal(got[off:off+b.bs], part[off:off+b.bs]) {
						t.Fatalf("step %d, LBA %d: want %s, got %s", version, int(e.Start)+off/b.bs,
							b.describe(part[off:off+b.bs]), b.describe(got[off:off+b.bs]))
					}
				}
			}
		}
		if err != nil {
			t.Fatalf("step %d, %v: %v", version, e, err)
		}
	}
	if !bytes.Equal(b.read(t, all), model) {
		t.Fatal("the device differs from the model at the end")
	}
}

// testCancelInFlight holds the device to "p is not used after the return" with
// contexts that end at any point of a command.
func testCancelInFlight(t *testing.T, b *bench) {
	const workers, rounds = 8, 24
	var wg sync.WaitGroup
	span := b.blocks / workers
	size := min(span, uint64(max(128<<10/b.bs, 1)))
	poisoned := bytes.Repeat([]byte{0xd5}, int(size)*b.bs)
	var cancelled atomic.Int64
	for w := range workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(b.seed, uint64(w)))
			e := lun.Extent{Start: lun.LBA(uint64(w) * span), Blocks: size}
			p := make([]byte, b.info.Bytes(e))
			b.stamp(p, e.Start, 1)
			if err := b.dev.WriteAt(t.Context(), p, e.Start); err != nil {
				t.Errorf("write %v: %v", e, err)
				return
			}
			for round := range rounds {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rnd.IntN(400))*time.Microsecond)
				version := uint64(round + 2)
				var err error
				alive := ctx.Err() == nil
				if round%2 == 0 {
					err = b.dev.ReadAt(ctx, p, e.Start)
				} else {
					b.stamp(p, e.Start, version)
					err = b.dev.WriteAt(ctx, p, e.Start)
				}
				cancel()
				if err != nil {
					if alive {
						cancelled.Add(1)
					}
					if !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("want the context's error, got %v", err)
						return
					}
				}
				// From here on the buffer is the caller's: no block may become poison,
				// and the poison must stay.
				copy(p, poisoned)
				got := make([]byte, len(p))
				if err := b.dev.ReadAt(t.Context(), got, e.Start); err != nil {
					t.Errorf("read after a cancelled command: %v", err)
					return
				}
				for off := 0; off < len(got); off += b.bs {
					if bytes.Equal(got[off:off+b.bs], poisoned[:b.bs]) {
						t.Errorf("LBA %d holds what was put into the buffer after the write returned", int(e.Start)+off/b.bs)
						return
					}
				}
				if !bytes.Equal(p, poisoned) {
					t.Errorf("the buffer changed after the command returned")
					return
				}
			}
			// A write that was cancelled is over: one that follows wins.
			b.stamp(p, e.Start, 1000)
			if err := b.dev.WriteAt(t.Context(), p, e.Start); err != nil {
				t.Errorf("write %v: %v", e, err)
				return
			}
			clear(p)
			if err := b.dev.ReadAt(t.Context(), p, e.Start); err != nil {
				t.Errorf("read %v: %v", e, err)
			} else if err := b.check(p, e.Start, 1000); err != nil {
				t.Errorf("a cancelled write came after a later one: %v", err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d of %d commands were cancelled", cancelled.Load(), workers*rounds)
	if cancelled.Load() == 0 && b.must(MustCancel) {
		t.Error("no command was cancelled, so nothing was tested")
	}
}

func testCloseInFlight(t *testing.T, b *bench) {
	var wg sync.WaitGroup
	var started atomic.Int64
	for w := range 8 {
		wg.Go(func() {
			p := make([]byte, 64<<10)
			for {
				err := b.dev.ReadAt(context.Background(), p, lun.LBA(w))
				started.Add(1)
				if err != nil {
					if !errors.Is(err, lun.ErrClosed) {
						t.Errorf("want ErrClosed, got %v", err)
					}
					return
				}
			}
		})
	}
	for started.Load() < 16 {
		time.Sleep(100 * time.Microsecond)
	}
	if err := b.dev.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	wg.Wait()
}

func testUpdateAtomic(t *testing.T, b *bench) {
	u, ok := b.dev.(lun.Updater)
	if !ok {
		t.Skip("the device is not an Updater")
	}
	const workers, rounds = 8, 50
	e := lun.Extent{Start: 3, Blocks: 4}
	if err := b.dev.WriteZeroes(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			// Every worker updates another run of blocks around the shared counter.
			mine := lun.Extent{Start: e.Start + lun.LBA(w%3), Blocks: 2}
			at := int(4-mine.Start) * b.bs
			if at >= 2*b.bs || at < 0 {
				mine, at = e, b.bs
			}
			for range rounds {
				err := u.Update(t.Context(), mine, func(p []byte) error {
					if len(p) != int(b.info.Bytes(mine)) {
						return errors.New("wrong length")
					}
					binary.LittleEndian.PutUint64(p[at:], binary.LittleEndian.Uint64(p[at:])+1)
					return nil
				})
				if err != nil {
					t.Errorf("update: %v", err)
					return
				}
			}
		})
	}
	// Writes of a neighbour that overlap some of the updates must not be undone.
	wg.Go(func() {
		for version := uint64(1); version <= rounds; version++ {
			l := lun.Extent{Start: e.Start + 3, Blocks: 1}
			p := make([]byte, b.bs)
			b.stamp(p, l.Start, version)
			if err := b.dev.WriteAt(t.Context(), p, l.Start); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			clear(p)
			if err := b.dev.ReadAt(t.Context(), p, l.Start); err != nil {
				t.Errorf("read: %v", err)
			} else if err := b.check(p, l.Start, version); err != nil {
				t.Errorf("a write was undone by an update: %v", err)
				return
			}
		}
	})
	wg.Wait()
	p := b.read(t, lun.Extent{Start: 4, Blocks: 1})
	if n := binary.LittleEndian.Uint64(p); n != workers*rounds {
		t.Fatalf("%d updates counted, want %d", n, workers*rounds)
	}
}

func testUpdateFails(t *testing.T, b *bench) {
	u, ok := b.dev.(lun.Updater)
	if !ok {
		t.Skip("the device is not an Updater")
	}
	e := lun.Extent{Start: 1, Blocks: 8}
	b.write(t, e, 1)
	refuse := errors.New("refused")
	err := u.Update(t.Context(), e, func(p []byte) error {
		if err := b.check(p, e.Start, 1); err != nil {
			t.Errorf("update was given other blocks: %v", err)
		}
		clear(p)
		return refuse
	})
	if !errors.Is(err, refuse) {
		t.Fatalf("want the error of modify, got %v", err)
	}
	b.expect(t, e, 1)
	if err := u.Update(t.Context(), lun.Extent{Start: lun.LBA(b.info.Blocks), Blocks: 1}, func([]byte) error {
		t.Error("modify was called beyond the capacity")
		return nil
	}); !errors.Is(err, lun.ErrOutOfRange) {
		t.Fatalf("update beyond the capacity: want ErrOutOfRange, got %v", err)
	}
}

func testProber(t *testing.T, b *bench) {
	p, ok := b.dev.(lun.Prober)
	if !ok && b.must(MustTry) {
		t.Fatal("the device is not a Prober")
	}
	if !ok {
		t.Skip("the device is not a Prober")
	}
	e := b.extent(0, 1<<20)
	b.write(t, e, 1)
	got, hits := make([]byte, 4*b.bs), 0
	for l := e.Start; l+4 <= e.End(); l += 3 {
		if l%2 == 0 {
			b.write(t, lun.Extent{Start: l, Blocks: 4}, uint64(l)+2)
		} else {
			b.write(t, lun.Extent{Start: l, Blocks: 4}, 1)
		}
		clear(got)
		had, err := p.TryReadAt(got, l)
		if err != nil {
			t.Fatalf("try LBA %d: %v", l, err)
		}
		if !had {
			continue
		}
		hits++
		version := uint64(1)
		if l%2 == 0 {
			version = uint64(l) + 2
		}
		if err := b.check(got, l, version); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d tried reads were served", hits)
	if hits == 0 && b.must(MustTry) {
		t.Error("no tried read was served, so nothing was tested")
	}
	if had, err := p.TryReadAt(got[:b.bs], lun.LBA(b.info.Blocks)); had || err != nil && !errors.Is(err, lun.ErrOutOfRange) {
		t.Fatalf("try beyond the capacity: %v, %v", had, err)
	}
}
