package state

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func manySums(at uint64, n int) []Sum {
	sums := make([]Sum, n)
	for i := range sums {
		sums[i] = Sum{Run{at + 2*uint64(i), 1}, uint64(i)}
	}
	return sums
}

// A journal full of the largest entries goes into the database in transactions that it
// takes. Caught: one transaction for all.
func TestAJournalOfTheLargestEntriesIsTakenOver(t *testing.T) {
	s := open(t, t.TempDir())
	f, err := s.Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	// Many at a time, so that frames have no space left over.
	const rounds, together = 15, 60
	const writes = rounds * together
	for round := range uint64(rounds) {
		var wg sync.WaitGroup
		for k := range uint64(together) {
			wg.Go(func() {
				i, err := f.Intend(t.Context(), manySums((round*together+k)*4096, MostSums)...)
				if err != nil {
					t.Error(err)
					return
				}
				i.Keep()
			})
		}
		wg.Wait()
	}
	g, err := abandoned(t, s).Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	if n := g.Count(Valid)/MostSums + uint64(len(g.Unproven()))/MostSums; n != writes {
		t.Fatalf("%d of %d writes are known", n, writes)
	}
}

// Caught: more intents under way than one frame carries, as the one who turned over waited for
// withdrawals that waited for it.
func TestWritesThatHangHoldUpNoOtherVolumeAndNoWithdrawal(t *testing.T) {
	s, err := Open(t.TempDir(), Options{}) // closed below
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.Flags("other", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	var under []*Intent
	for k := uint64(0); ; k++ { // writes of many runs, on an array that hangs
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		i, err := f.Intend(ctx, manySums(k*4096, MostSums)...)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && k > 50 {
			break // as many as there may be
		}
		if err != nil || k > 500 {
			t.Fatal(k, err)
		}
		under = append(under, i)
	}
	var n atomic.Int64
	noted := make(chan struct{})
	go func() {
		defer close(noted)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		for k := range uint64(3 * segmentSlots) { // small first writes of another volume
			if err := other.Note(ctx, Valid|Dirty, Run{k * 8, 8}); err != nil {
				t.Errorf("note %d: %v", k, err)
				return
			}
			n.Add(1)
		}
	}()
	select {
	case <-noted:
	case <-time.After(20 * time.Second):
		t.Errorf("the other volume stands still after %d notes, ctx of 10 s notwithstanding", n.Load())
	}
	// Now the array fails all of them.
	var wg sync.WaitGroup
	done := make(chan struct{})
	for _, i := range under {
		wg.Go(func() {
			if err := i.Withdraw(); err != nil {
				t.Error(err)
			}
		})
	}
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(15 * time.Second):
		t.Error("withdrawals do not end")
	}
	closed := make(chan struct{})
	go func() { s.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(15 * time.Second):
		t.Fatal("Close does not end")
	}
}

// Caught: one reason for all volumes why notes do not settle.
func TestFlagsThatCannotSettleStopNoOtherVolume(t *testing.T) {
	s := openBounded(t, t.TempDir(), 1)
	g := crashGeometry
	a, _ := s.Flags("a", g)
	b, err := s.Flags("b", g)
	if err != nil {
		t.Fatal(err)
	}
	lost, crowd := Run{0, 8}, Run{shardCount * g.RegionBlocks, 8}
	for _, r := range []Run{lost, crowd} {
		if err := a.Set(t.Context(), Valid|Dirty, r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.submit(t.Context(), &request{records: []op{{key: regionKey(a.gen, 0)}}}); err != nil {
		t.Fatal(err)
	}
	if err := a.Note(t.Context(), Valid|Dirty, Run{100, 8}); err != nil {
		t.Fatal(err)
	}
	t.Log(a.Await(t.Context(), Run{100, 8}))
	if err := b.Set(t.Context(), Valid, Run{0, 8}); err != nil {
		t.Errorf("Set of b: %v", err)
	}
	if err := b.Note(t.Context(), Valid|Dirty, Run{100, 8}); err != nil {
		t.Errorf("Note of b: %v", err)
	}
	i, err := b.Intend(t.Context(), Sum{Run{200, 8}, 1})
	if err != nil {
		t.Errorf("Intend of b: %v", err)
	} else {
		i.Keep()
	}
}

// Caught: an intent that leaves only after its withdrawal is durable and another has turned over.
func TestAnIntentIsNotCarriedPastItsWithdrawal(t *testing.T) {
	ctx := t.Context()
	s := open(t, t.TempDir())
	f, err := s.Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	at := uint64(1 << 20)
	note := func() {
		at += 8
		if err := f.Note(ctx, Valid, Run{at, 1}); err != nil {
			t.Fatal(err)
		}
	}
	to := func(next int) {
		first := s.journal.current
		for s.journal.current == first || s.journal.segments[s.journal.current].next < next {
			note()
		}
	}
	i, err := f.Intend(ctx, Sum{Run{100, 8}, 42})
	if err != nil {
		t.Fatal(err)
	}
	to(segmentSlots - 1)
	// Withdraw, in its two steps.
	if err := f.journal(ctx, &entry{kind: withdrawEntry, number: i.entry.number, turn: f.turnID(), ends: i.entry}); err != nil {
		t.Fatal(err)
	}
	note() // by another, before this one runs on
	to(1)
	re := abandoned(t, s)
	g, err := re.Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	if got := g.Unproven(); len(got) > 0 {
		t.Fatalf("withdrawn, and told: %v", got)
	}
}

// Caught: a sum of what is early and what is settled with a settling in between; in a
// backward turn, notes of blocks that are settled as set and are not taken off.
func TestCountIsExactWhileNotesSettle(t *testing.T) {
	for _, back := range []bool{false, true} {
		t.Run(fmt.Sprint("backward=", back), func(t *testing.T) { countIsExact(t, back) })
	}
}

func countIsExact(t *testing.T, back bool) {
	s, err := Open(t.TempDir(), Options{SettleDelay: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	g := Geometry{Blocks: 1 << 14, RegionBlocks: 2048}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	if back {
		err := errors.Join(f.Set(t.Context(), Valid|Dirty, Run{0, g.Blocks}), s.Turn(t.Context(), []Turning{{f, true}}))
		if err != nil {
			t.Fatal(err)
		}
	}
	var noted atomic.Uint64 // told to be under way
	var acked atomic.Uint64
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		for k := uint64(0); k < g.Blocks; k += 16 {
			noted.Add(16)
			if err := f.Note(context.Background(), Valid|Dirty, Run{k, 16}); err != nil {
				t.Error(err)
				return
			}
			acked.Add(16)
		}
	}()
	over, under, looks := 0, 0, 0
	for {
		select {
		case <-stop:
			t.Logf("%d looks", looks)
			if over > 0 || under > 0 {
				t.Fatalf("too many: %d times, too few: %d times", over, under)
			}
			return
		default:
		}
		least := acked.Load()
		n := f.Count(Valid)
		if back {
			n = g.Blocks - n // that were noted, in either direction
		}
		if n > noted.Load() {
			over++
		}
		if n < least {
			under++
		}
		looks++
	}
}

// Caught: a withdrawal that is given up when the journal has no room.
func TestAWithdrawalThatFoundNoSpaceIsMadeAgain(t *testing.T) {
	ctx := t.Context()
	s, err := Open(t.TempDir(), Options{SettleDelay: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	f, err := s.Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	i, err := f.Intend(ctx, Sum{Run{100, 8}, 42})
	if err != nil {
		t.Fatal(err)
	}
	k := uint64(1 << 20)
	note := func() {
		k += 8
		if err := f.Note(ctx, Valid, Run{k, 1}); err != nil {
			t.Fatal(err)
		}
	}
	first := s.journal.current
	for s.journal.current == first || s.journal.segments[s.journal.current].next < segmentSlots {
		note()
	}
	s.freeMin.Store(1 << 62) // disk full while notes are pending
	err = i.Withdraw()
	t.Log("withdraw:", err)
	s.freeMin.Store(minFree)
	if !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	s.settler.settle()
	for range 2 * segmentSlots {
		note()
	}
	s.settler.settle()
	g, err := abandoned(t, s).Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	if got := g.Unproven(); len(got) > 0 {
		t.Fatalf("failed 1024 frames ago, space since then, and told: %v", got)
	}
}

// What was acknowledged is seen by every later look, with bitmaps that are read back.
// Caught: in a backward turn, a note that reads as set.
func TestReadersSeeWhatWasNotedWhileItSettles(t *testing.T) {
	for _, back := range []bool{false, true} {
		t.Run(fmt.Sprint("backward=", back), func(t *testing.T) { seesWhatWasNoted(t, back) })
	}
}

func seesWhatWasNoted(t *testing.T, back bool) {
	s, err := Open(t.TempDir(), Options{SettleDelay: time.Millisecond, BitmapMemory: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	g := Geometry{Blocks: 1 << 14, RegionBlocks: 2048}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	if back {
		err := errors.Join(f.Set(t.Context(), Valid|Dirty, Run{0, g.Blocks}), s.Turn(t.Context(), []Turning{{f, true}}))
		if err != nil {
			t.Fatal(err)
		}
	}
	const step = 24
	var acked atomic.Uint64
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		for k := uint64(0); k+step <= g.Blocks; k += step {
			if err := f.Note(context.Background(), Valid|Dirty, Run{k, 16}, Run{k + 16, 8}); err != nil {
				t.Error(err)
				return
			}
			acked.Store(k + step)
		}
	}()
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				n := acked.Load()
				lo := n - min(n, 4096)
				r := Run{lo, n - lo}
				if w == 0 {
					if !back && !f.All(Valid|Dirty, r) || back && f.Any(Valid|Dirty, r) {
						t.Error("All or Any went back")
						return
					}
				} else if n > 0 {
					err := f.Runs(Valid, r, func(r Run, set bool) bool {
						if set == back {
							t.Error("Runs went back", r)
						}
						return set != back
					})
					if err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// The journal alone, with segments that turn often, and a frame torn at any place: what is
// under way is told, and what was withdrawn is not.
func TestJournalTellsWhatIsUnderWayAtAnyTornEnd(t *testing.T) {
	for seed := range uint64(6) {
		rnd := rand.New(rand.NewPCG(seed, 4))
		dir := t.TempDir()
		if err := createJournal(dir); err != nil {
			t.Fatal(err)
		}
		h := &head{dir: dir}
		if err := h.create(); err != nil {
			t.Fatal(err)
		}
		j, entries, err := openJournal(dir, h)
		if err != nil || len(entries) > 0 {
			t.Fatal(err)
		}
		live := map[uint64]*entry{}    // intents that count
		withdrawn := map[uint64]bool{} // durable
		j.stuck = func() error { return nil }
		j.kick = func() {}
		if err := j.begin(); err != nil {
			t.Fatal(err)
		}
		var number uint64
		size := 0
		check := func(tear bool) {
			to := t.TempDir()
			for _, n := range []string{headName, segmentName(0), segmentName(1), segmentName(2)} {
				b, err := os.ReadFile(filepath.Join(dir, n))
				if err != nil {
					t.Fatal(err)
				}
				if tear && n == segmentName(j.current) && j.segments[j.current].next < segmentSlots {
					// part of the sectors of a frame that was never acknowledged
					at := j.segments[j.current].next * slotSize
					f := append([]byte(frameMagic), make([]byte, 24+rnd.IntN(60000))...)
					binary.LittleEndian.PutUint64(f[8:], j.epoch)
					binary.LittleEndian.PutUint64(f[16:], j.number+1)
					binary.LittleEndian.PutUint32(f[24:], uint32(len(f)-frameHead))
					for i := frameHead; i < len(f); i++ {
						f[i] = byte(rnd.Uint32())
					}
					binary.LittleEndian.PutUint32(f[4:], crc32.Checksum(f[8:], castagnoli))
					missing := rnd.IntN(len(f)/512 + 1)
					for i := 0; i*512 < len(f) && at+i*512 < len(b); i++ {
						if i != missing && rnd.IntN(3) > 0 {
							copy(b[at+i*512:min(at+i*512+512, len(b))], f[i*512:])
						}
					}
				}
				if err := os.WriteFile(filepath.Join(to, n), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			g, err := openHead(to)
			if err != nil {
				t.Fatal(err)
			}
			k, raw, err := openJournal(to, g)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			k.closeFiles()
			g.file.Close()
			os.RemoveAll(to)
			told, gone := map[uint64]bool{}, map[uint64]bool{}
			for _, b := range raw {
				e, err := decodeEntry(b)
				if err != nil {
					t.Fatal(err)
				}
				if e.kind == withdrawEntry {
					gone[e.number] = true
				} else {
					told[e.number] = true
				}
			}
			for n := range live {
				if !told[n] || gone[n] {
					t.Fatalf("seed %d: intent %d is lost", seed, n)
				}
			}
			for n := range told {
				if withdrawn[n] && !gone[n] {
					t.Fatalf("seed %d: intent %d was withdrawn and is told", seed, n)
				}
			}
		}
		for step := range 1500 {
			switch rnd.IntN(3) {
			case 0, 1:
				if size > 150000 {
					break
				}
				number++
				e := &entry{kind: intentEntry, number: number, turn: 1, kinds: 3, sums: make([]Sum, 1+rnd.IntN(1+rnd.IntN(MostSums)))}
				if err := errors.Join(j.admit(t.Context(), e), j.append(e)); err != nil {
					t.Fatal(err)
				}
				live[number] = e
				size += e.size()
				continue
			}
			for n, e := range live {
				if rnd.IntN(2) == 0 {
					if err := j.append(&entry{kind: withdrawEntry, number: n, turn: 1, ends: e}); err != nil {
						t.Fatal(err)
					}
					withdrawn[n] = true
				}
				delete(live, n)
				size -= e.size()
				j.release(e)
				break
			}
			if step%25 == 0 {
				check(step%50 == 0)
			}
		}
		j.closeFiles()
	}
}
