package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"lunshift/lun"
	"lunshift/state"
)

// checksums are the extents of the volume's checksums, with the uncovered ones by reason.
func checksums(t *testing.T, r *rig) (c *Checksums, why map[string]int) {
	t.Helper()
	c, err := ReadChecksums(r.store, "vol")
	if err != nil || c == nil {
		t.Fatalf("%v, %v", c, err)
	}
	why = map[string]int{}
	next := uint64(0)
	for _, x := range c.Extents {
		if x.LBA != next || (x.SHA256 == "") == (x.Uncovered == "") {
			t.Fatalf("extent %+v after block %d", x, next)
		}
		next += x.Blocks
		why[x.Uncovered]++
	}
	return c, why
}

// sameSums makes each checksum again from what a device holds.
func sameSums(t *testing.T, c *Checksums, d lun.Device) {
	t.Helper()
	for _, x := range c.Extents {
		if x.SHA256 == "" {
			continue
		}
		p := make([]byte, x.Blocks*testBlock)
		if err := d.ReadAt(context.Background(), p, lun.LBA(x.LBA)); err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(p); hex.EncodeToString(sum[:]) != x.SHA256 {
			t.Errorf("extent at block %d: the device has %x, its checksum is %s", x.LBA, sum, x.SHA256)
		}
	}
}

// Caught: storage that is on neither side left out of the sums; chunks summed up in the order in
// which they were read; a write after the comparison that leaves the sum as it is, also after the
// cutover and a restart; a difference that is summed up.
func TestChecksumsAreWhatTheDestinationHolds(t *testing.T) {
	const blocks = 10*2048 + 100 // an extent is 2048
	r := newRig(t, blocks)
	for _, e := range []lun.Extent{{Start: 10, Blocks: 2000}, {Start: 3000, Blocks: 3000}, {Start: 12000, Blocks: 5}, {Start: blocks - 20, Blocks: 20}} {
		fill(t, r.source, e, 1)
	}
	v := r.open(t)
	defer r.close(t)
	if err := v.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitFor(t, v, Synced)
	if c, err := ReadChecksums(r.store, "vol"); c != nil || err != nil {
		t.Fatalf("before any comparison: %v, %v", c, err)
	}
	fill(t, v, lun.Extent{Start: 4 * 2048, Blocks: 3}, 2)
	verify := func() {
		t.Helper()
		if _, err := v.Verify(t.Context(), VerifyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	verify()
	c, why := checksums(t, r)
	if len(c.Extents) != 11 || why[""] != 10 || c.Extents[4].Uncovered != UncoveredWritten || c.ExtentBytes != 1<<20 {
		t.Fatalf("%+v", c)
	}
	sameSums(t, c, r.destination)
	sameSums(t, c, r.source)

	// What is written from then on takes the sum away, at once.
	fill(t, v, lun.Extent{Start: 6*2048 - 1, Blocks: 2}, 3)
	if _, why := checksums(t, r); why[""] != 8 || why[UncoveredWritten] != 3 {
		t.Fatalf("after a write in two extents: %v", why)
	}
	// A comparison of a part changes nothing of it, a difference takes a sum away.
	if err := r.destination.WriteAt(t.Context(), stamp(2048, 9), 2048); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), VerifyOptions{Sample: 1}); err != nil {
		t.Fatal(err)
	}
	if _, why := checksums(t, r); why[""] != 8 {
		t.Fatalf("after a sample: %v", why)
	}
	verify()
	if c, why := checksums(t, r); why[""] != 7 || c.Extents[1].Uncovered != UncoveredDifferent {
		t.Fatalf("with a difference: %v", why)
	}
	fill(t, v, lun.Extent{Start: 0, Blocks: 1}, 4) // not compared again
	if err := v.Cutover(t.Context(), CutoverOptions{NoVerify: true}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c, why = checksums(t, r)
		if why[""] != 6 || why[UncoveredWritten] != 4 || why[UncoveredDifferent] != 1 {
			t.Fatalf("after the cutover: %v", why)
		}
		sameSums(t, c, r.destination)
		r.close(t)
		v = r.open(t)
	}
	if err := v.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c, err := ReadChecksums(r.store, "vol"); c != nil || err != nil {
		t.Fatalf("after the state was forgotten: %v, %v", c, err)
	}
}

// Caught: no look at what was written since the comparison began.
func TestChecksumsUnderLoadHoldOnlyWhatNobodyWrote(t *testing.T) {
	const blocks = 32 * 2048
	r := newRig(t, blocks)
	v := synced(t, r, blocks)
	defer r.close(t)
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	for w := range 3 {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 5))
			for n := uint64(2); ctx.Err() == nil && n < 10; n++ {
				e := lun.Extent{Start: lun.LBA(rng.Uint64N(blocks - 8)), Blocks: 8}
				if err := v.WriteAt(ctx, stamps(e, n), e.Start); err != nil && ctx.Err() == nil {
					t.Errorf("write: %v", err)
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	_, err := v.Verify(t.Context(), VerifyOptions{Rate: 512 << 20})
	stop()
	writers.Wait()
	if err != nil {
		t.Fatal(err)
	}
	c, why := checksums(t, r)
	if why[UncoveredWritten] == 0 || why[""] == 0 {
		t.Errorf("%v: the load is not one that tells", why)
	}
	sameSums(t, c, r.destination)
}

// A mirror takes the note of a write away once both sides have it; after a rollback all of them go.
//
// Caught: sums shown for either.
func TestChecksumsAreWithheldWhereWritesCannotBeTold(t *testing.T) {
	for name, step := range map[string]func(context.Context, *Volume) error{
		"mirror":   func(ctx context.Context, v *Volume) error { return v.SetMirror(ctx, true) },
		"rollback": func(ctx context.Context, v *Volume) error { return v.Rollback(ctx, RollbackOptions{}) },
	} {
		r := newRig(t, 4096)
		v := synced(t, r, 4096)
		defer r.close(t)
		if _, err := v.Verify(t.Context(), VerifyOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, why := checksums(t, r); why[""] != 2 {
			t.Fatalf("%v", why)
		}
		if err := step(t.Context(), v); err != nil {
			t.Fatal(err)
		}
		if c, err := ReadChecksums(r.store, "vol"); err != nil || c == nil || c.Withheld == "" || len(c.Extents) > 0 {
			t.Errorf("after a %s: %+v, %v", name, c, err)
		}
		r.close(t)
	}
}

// Caught: an extent summed up although blocks of it were left out; a run in two extents that
// uncovers the first alone; a sum that is not begun anew after an uncovered extent; the sum of a
// whole extent of zeroes taken for a shorter one.
func TestChecksumsAreOfAllBytesInOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		info := lun.Info{BlockSize: 4096, Blocks: rapid.Uint64Range(1, 3000).Draw(t, "blocks")}
		image := make([]byte, info.Size())
		var chunks, free, lost []lun.Extent
		var texts []string
		for at := uint64(0); at < info.Blocks; {
			n := min(rapid.Uint64Range(1, 600).Draw(t, "run"), info.Blocks-at)
			e := lun.Extent{Start: lun.LBA(at), Blocks: n}
			switch what := rapid.IntRange(0, 9).Draw(t, "what"); {
			case what < 3: // unallocated
			case what == 3:
				free = append(free, e)
			case what == 4 && n < 5:
				lost = append(lost, e)
			default:
				text := ""
				if what == 5 && n < 20 {
					text = UncoveredDifferent
				}
				chunks, texts = append(chunks, e), append(texts, text)
				for i := at * 4096; i < (at+n)*4096; i += 512 {
					image[i] = byte(i/512 + 1)
				}
			}
			at += n
		}
		s := newSumming(info, func(state.Kinds, state.Run) bool { return false }, free, lost)
		for i, e := range chunks {
			s.add(e, image[uint64(e.Start)*4096:uint64(e.End())*4096], texts[i])
		}
		s.fill(lun.Extent{Start: s.at, Blocks: info.Blocks - uint64(s.at)}, nil)
		uncovered := func(at, end uint64) bool {
			for _, list := range [][]lun.Extent{free, lost} {
				for _, e := range list {
					if uint64(e.Start) < end && at < uint64(e.End()) {
						return true
					}
				}
			}
			for i, e := range chunks {
				if texts[i] != "" && uint64(e.Start) < end && at < uint64(e.End()) {
					return true
				}
			}
			return false
		}
		for _, x := range s.list {
			sum := fmt.Sprintf("%x", sha256.Sum256(image[x.LBA*4096:(x.LBA+x.Blocks)*4096]))
			if uncovered(x.LBA, x.LBA+x.Blocks) {
				sum = ""
			}
			got := x.SHA256
			if x.Uncovered != "" {
				got = ""
			}
			if got != sum {
				t.Fatalf("extent at %d: %q (%s), want %q", x.LBA, got, x.Uncovered, sum)
			}
		}
	})
}
