package state

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
)

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-s.closing: // the test did it
		default:
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return s
}

func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, s.dir)
}

func TestRecordsComeBackAsTheyWerePut(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "a", "b"))
	if _, ok, err := s.Record("db01"); ok || err != nil {
		t.Fatal(ok, err)
	}
	now := time.Now().UTC().Truncate(time.Nanosecond).Round(0)
	rate, hold := uint64(200<<20), 12*time.Millisecond
	a := Record{
		Volume: "db01", SourceID: "naa.1", DestinationID: "naa.2", BlockSize: 512, Blocks: 1 << 31,
		RegionBlocks: 2048, Phase: "cutover", Paused: true, RateLimit: &rate, CopiedBytes: 5, SkippedBytes: 6,
		CreatedAt: now, StartedAt: &now, SyncedAt: &now, CutoverAt: &now, Hold: &hold,
	}
	b := Record{Volume: "aux", Phase: "ready", CreatedAt: now}
	if err := s.PutRecords(context.Background(), a, b); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	got, ok, err := s.Record("db01")
	if err != nil || !ok || !reflect.DeepEqual(got, a) {
		t.Fatalf("%+v %v %v", got, ok, err)
	}
	all, err := s.Records()
	if err != nil || !reflect.DeepEqual(all, []Record{b, a}) {
		t.Fatalf("%+v %v", all, err)
	}
	if st, err := os.Stat(s.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Fatal(st.Mode(), err)
	}
}

func TestForgottenVolumeBeginsWithoutFlags(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	g := Geometry{Blocks: 100000, RegionBlocks: 128}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.Flags("w", g)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*Flags{f, other} {
		if err := f.Set(ctx, Valid, Run{3, 50000}, Run{90000, 1}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutRecords(ctx, Record{Volume: "v", Phase: "cutover"}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Forget("v"); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Set(ctx, Valid, Run{3, 1}); !errors.Is(err, ErrForgotten) {
		t.Fatal(err)
	}
	if _, ok, err := s.Record("v"); ok || err != nil {
		t.Fatal(ok, err)
	}
	if f, err = s.Flags("v", Geometry{Blocks: 7, RegionBlocks: 2}); err != nil || f.Count(Valid) != 0 {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if f, err = s.Flags("v", Geometry{Blocks: 7, RegionBlocks: 2}); err != nil || f.Count(Valid) != 0 {
		t.Fatal(err)
	}
	if other, err = s.Flags("w", g); err != nil || other.Count(Valid) != 50001 {
		t.Fatal(err)
	}
	// Nothing of the forgotten flags is left.
	gens := map[string]bool{}
	err = s.view(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte(flagsPrefix)})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			gens[string(it.Item().Key()[:genSize])] = true
		}
		return nil
	})
	if err != nil || len(gens) != 1 {
		t.Fatalf("%d generations, %v", len(gens), err)
	}
}

func TestInterruptedForgetIsFinishedAtOpen(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	f, err := s.Flags("v", Geometry{Blocks: 1000, RegionBlocks: 16})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Set(ctx, Valid, Run{0, 500}); err != nil {
		t.Fatal(err)
	}
	// The first half of Forget only.
	if err := s.submit(ctx, &request{forget: "v"}); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if value, err := s.get(chunkKey(f.gen, 0, 0)); err != nil || value != nil {
		t.Fatal(value, err)
	}
}

// Caught: a directory that is not locked.
func TestSecondOpenIsRefusedWithThePid(t *testing.T) {
	s := open(t, t.TempDir())
	_, err := Open(s.dir, Options{})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) || !strings.Contains(err.Error(), s.dir) {
		t.Fatal(err)
	}
	reopen(t, s)
}

func TestWhatIsNoStateIsRefusedAndLeftAlone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file, Options{}); err == nil || !strings.Contains(err.Error(), file) {
		t.Fatal(err)
	}

	dir := filepath.Dir(file)
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), dir) {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}

	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, headName), []byte("ref: refs/heads/main\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrForeign) {
		t.Fatal(err)
	}

	if os.Getuid() != 0 {
		dir = t.TempDir()
		if err := os.Chmod(dir, 0o500); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, Options{}); !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), dir) {
			t.Fatal(err)
		}
	}
	if _, err := Open("/proc/lunshift-state", Options{}); err == nil || !strings.Contains(err.Error(), "/proc/lunshift-state") {
		t.Fatal(err)
	}
}

func TestNewerFormatIsRefused(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.submit(context.Background(), &request{records: []op{{recordKey("v"), []byte(`{"schema":99,"phase":7}`)}}}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Record("v"); !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "volume v") {
		t.Fatal(err)
	}
	if _, err := s.Records(); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b := (&head{seq: 5}).encode()
	b[8] = 9
	sum := headSum(b[:])
	for i := range 4 {
		b[12+i] = byte(sum >> (8 * i))
	}
	if err := os.WriteFile(filepath.Join(s.dir, headName), b[:], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.dir, Options{}); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
}

func TestFlagsOfAnotherGeometryOrMissingAreRefused(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	g := Geometry{Blocks: 1000, RegionBlocks: 64}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.Flags("v", g); again != f || err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Flags("v", Geometry{Blocks: 1000, RegionBlocks: 128}); !errors.Is(err, ErrGeometry) {
			t.Fatal(err)
		}
		s = reopen(t, s)
	}
	for _, bad := range []Geometry{{0, 8}, {8, 0}, {8, 3}, {8, 1 << 21}, {1 << 40, 1}} {
		if _, err := s.Flags("x", bad); err == nil {
			t.Fatal(bad)
		}
	}
	if err := s.PutRecords(ctx, Record{Volume: "w", Phase: "migrating"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Flags("w", g); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "volume w is in phase migrating") {
		t.Fatal(err)
	}
}

func TestBadStoredFlagsAreRefused(t *testing.T) {
	t.Parallel()
	g := Geometry{Blocks: 1000, RegionBlocks: 64} // 16 regions, the last of 40 blocks
	word := make([]byte, 8)
	for name, bad := range map[string]func(gen uint64) op{
		"chunk length": func(gen uint64) op { return op{chunkKey(gen, 0, 0), make([]byte, 9)} },
		"chunk number": func(gen uint64) op { return op{chunkKey(gen, 0, 1), make([]byte, chunkWords*8)} },
		"chunk kind":   func(gen uint64) op { return op{chunkKey(gen, 2, 0), make([]byte, chunkWords*8)} },
		"region in chunk": func(gen uint64) op {
			return op{chunkKey(gen, 0, 0), append([]byte{0, 0, 1}, make([]byte, chunkWords*8-3)...)}
		},
		"region number":    func(gen uint64) op { return op{regionKey(gen, 16), append([]byte{1}, word...)} },
		"region tag":       func(gen uint64) op { return op{regionKey(gen, 1), append([]byte{4}, word...)} },
		"region same":      func(gen uint64) op { return op{regionKey(gen, 1), append([]byte{0x81}, word...)} },
		"region length":    func(gen uint64) op { return op{regionKey(gen, 1), append([]byte{3}, word...)} },
		"region empty":     func(gen uint64) op { return op{regionKey(gen, 1), []byte{}} },
		"block beyond end": func(gen uint64) op { return op{regionKey(gen, 15), append([]byte{1}, 0, 0, 0, 0, 0, 1, 0, 0)} },
		"unknown key":      func(gen uint64) op { return op{append(genKey(gen), 'x'), word} },
		"header":           func(uint64) op { return op{headerKey("v"), []byte(`{"schema":1}`)} },
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			f, err := s.Flags("v", g)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.submit(context.Background(), &request{records: []op{bad(f.gen)}}); err != nil {
				t.Fatal(err)
			}
			dir := s.dir
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s, err = Open(dir, Options{})
			if err == nil {
				defer s.Close()
				_, err = s.Flags("v", g)
			}
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), dir) {
				t.Fatal(err)
			}
		})
	}
}

func TestConcurrentSetsShareCommits(t *testing.T) {
	s := open(t, t.TempDir())
	const callers, each = 64, 20
	var flags [2]*Flags
	for i := range flags {
		f, err := s.Flags(fmt.Sprint(i), Geometry{Blocks: 1 << 20, RegionBlocks: 256})
		if err != nil {
			t.Fatal(err)
		}
		flags[i] = f
	}
	before := s.Stats()
	var wg sync.WaitGroup
	var wrong atomic.Int64
	for c := range uint64(callers) {
		wg.Go(func() {
			f := flags[c%2]
			for i := range uint64(each) {
				r := Run{c<<12 + i*100, 8}
				if err := f.Set(context.Background(), Valid, r); err != nil || !f.All(Valid, r) {
					wrong.Add(1)
				}
			}
		})
	}
	wg.Wait()
	after := s.Stats()
	commits := after.Commits - before.Commits
	t.Logf("%d calls in %d commits", callers*each, commits)
	if wrong.Load() > 0 || after.Requests-before.Requests != callers*each || after.FlagsSet-before.FlagsSet != callers*each*8 {
		t.Fatalf("%d wrong, %+v", wrong.Load(), after)
	}
	if commits > callers*each/4 {
		t.Fatalf("%d commits for %d calls", commits, callers*each)
	}
}

func TestReadersNeverSeeAFlagGoBack(t *testing.T) {
	for _, memory := range []uint64{0, 1} { // all bitmaps in memory, and next to none
		t.Run(fmt.Sprint("memory=", memory), func(t *testing.T) { neverGoesBack(t, memory) })
	}
}

func neverGoesBack(t *testing.T, memory uint64) {
	s := openBounded(t, t.TempDir(), memory)
	g := Geometry{Blocks: 1 << 14, RegionBlocks: 128}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	var lost atomic.Pointer[string]
	for range 2 {
		wg.Go(func() {
			seen := make([]bool, g.Blocks)
			for {
				f.Runs(Valid, Run{0, g.Blocks}, func(r Run, set bool) bool {
					for b := r.Start; b < r.end(); b++ {
						if seen[b] && !set {
							what := fmt.Sprintf("block %d", b)
							lost.Store(&what)
						}
						seen[b] = seen[b] || set
					}
					return true
				})
				for b := uint64(0); b < g.Blocks; b += 97 {
					if seen[b] && (!f.All(Valid, Run{b, 1}) || !f.Any(Valid, Run{b, 1})) {
						what := fmt.Sprintf("block %d by All or Any", b)
						lost.Store(&what)
					}
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	// Small writes first, then whole regions over them: none → partial → all.
	for step := range uint64(60) {
		for _, k := range []Kinds{Valid | Dirty, Valid} {
			at := step * 271 % (g.Blocks - 512)
			n := uint64(5)
			if k == Valid {
				n = 300
			}
			if err := f.Set(context.Background(), k, Run{at, n}); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(done)
	wg.Wait()
	if what := lost.Load(); what != nil {
		t.Fatal(*what, "went back")
	}
}

func TestFullDiskFailsTheCallAndNothingElse(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	f, err := s.Flags("v", Geometry{Blocks: 1000, RegionBlocks: 64})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Set(ctx, Valid, Run{0, 10}); err != nil {
		t.Fatal(err)
	}
	s.freeMin.Store(1 << 62)
	if err := f.Set(ctx, Valid, Run{5, 10}); !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), s.dir) {
		t.Fatal(err)
	}
	if f.Any(Valid, Run{10, 5}) || !f.All(Valid, Run{0, 10}) || f.Count(Valid) != 10 {
		t.Fatal("a flag of the failed call is visible")
	}
	if err := f.Set(ctx, Valid, Run{0, 10}); err != nil {
		t.Fatalf("nothing was to be written: %v", err)
	}
	s.freeMin.Store(minFree)
	if err := f.Set(ctx, Valid, Run{5, 10}); err != nil {
		t.Fatal(err)
	}
}

func TestFailedCommitEndsAllWriting(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	f, err := s.Flags("v", Geometry{Blocks: 1000, RegionBlocks: 64})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Set(ctx, Valid, Run{0, 10}); err != nil {
		t.Fatal(err)
	}
	s.db.Close() // the database refuses from here on
	for range 2 {
		if err := f.Set(ctx, Valid, Run{5, 10}); !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), s.dir) {
			t.Fatal(err)
		}
	}
	if f.Any(Valid, Run{10, 5}) || !f.All(Valid, Run{0, 10}) {
		t.Fatal("a flag of the failed call is visible, or an earlier one is not")
	}
	if s.Stats().Failures != 1 {
		t.Fatal(s.Stats())
	}
}

func TestCancelledSetIsWithdrawnOrDone(t *testing.T) {
	s := open(t, t.TempDir())
	f, err := s.Flags("v", Geometry{Blocks: 1 << 20, RegionBlocks: 64})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := f.Set(ctx, Valid, Run{0, 10}); !errors.Is(err, context.Canceled) || f.Any(Valid, Run{0, 10}) {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var wrong, cancelled atomic.Int64
	for c := range uint64(32) {
		wg.Go(func() {
			for i := range uint64(20) {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i*30)*time.Microsecond)
				r := Run{c<<14 + i*10, 10}
				switch err := f.Set(ctx, Dirty, r); {
				case err == nil && !f.All(Dirty, r):
					wrong.Add(1)
				case err != nil && f.Any(Dirty, r):
					wrong.Add(1)
				case err != nil:
					cancelled.Add(1)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	t.Logf("%d of 640 cancelled", cancelled.Load())
	if wrong.Load() > 0 {
		t.Fatal(wrong.Load())
	}
}

func TestCloseAnswersEveryCaller(t *testing.T) {
	s := open(t, t.TempDir())
	f, err := s.Flags("v", Geometry{Blocks: 1 << 30, RegionBlocks: 64})
	if err != nil {
		t.Fatal(err)
	}
	acked := make([][]Run, 32)
	var wg sync.WaitGroup
	for c := range uint64(len(acked)) {
		wg.Go(func() {
			for i := uint64(0); ; i++ {
				r := Run{c<<20 + i*10, 10}
				if err := f.Set(context.Background(), Valid, r); err != nil {
					if !errors.Is(err, ErrClosed) {
						t.Error(err)
					}
					return
				}
				acked[c] = append(acked[c], r)
			}
		})
	}
	for s.Stats().Commits < 10 {
		time.Sleep(time.Millisecond)
	}
	s = reopen(t, s)
	wg.Wait()
	again, err := s.Flags("v", f.Geometry())
	if err != nil {
		t.Fatal(err)
	}
	for _, runs := range acked {
		for _, r := range runs {
			if !again.All(Valid, r) {
				t.Fatal(r)
			}
		}
	}
}

func TestOneSetOfEverythingSpansManyTransactions(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	g := Geometry{Blocks: 700<<30/4096 - 3, RegionBlocks: 16} // 700 GiB in regions of 64 KiB
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Set(context.Background(), Valid, Run{17, 1}); err != nil {
		t.Fatal(err)
	}
	before := s.Stats().Commits
	if err := f.Set(context.Background(), Valid|Dirty, Run{0, g.Blocks}); err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().Commits - before; n < 2 {
		t.Fatalf("%d commits", n)
	}
	for range 2 {
		if _, _, missing := f.Missing(Valid, 0); missing || f.Count(Valid) != g.Blocks || !f.All(Valid|Dirty, Run{0, g.Blocks}) {
			t.Fatal(f.Count(Valid))
		}
		s = reopen(t, s)
		if f, err = s.Flags("v", g); err != nil {
			t.Fatal(err)
		}
	}
	if _, partial := f.NextPartial(Valid, 0); partial {
		t.Fatal("partial region left")
	}
}

func TestSetBeyondTheVolumeIsRefused(t *testing.T) {
	s := open(t, t.TempDir())
	f, err := s.Flags("v", Geometry{Blocks: 1000, RegionBlocks: 64})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []Run{{0, 1001}, {1000, 1}, {^uint64(0), 2}, {5, ^uint64(0)}} {
		if err := f.Set(context.Background(), Valid, Run{0, 1}, r); !errors.Is(err, ErrRange) {
			t.Fatal(r, err)
		}
		if f.All(Valid, r) || f.Any(Valid, r) {
			t.Fatal(r)
		}
		f.Runs(Valid, r, func(r Run, set bool) bool { t.Fatal(r); return false })
	}
	for _, k := range []Kinds{0, 4, 7} {
		if err := f.Set(context.Background(), k, Run{0, 1}); err == nil {
			t.Fatal(k)
		}
	}
	if f.Count(Valid) != 0 {
		t.Fatal("a refused call set flags")
	}
}
