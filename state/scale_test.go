package state

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// largeGeometry is 64 TiB in blocks of 512 bytes and regions of 1 MiB.
var largeGeometry = Geometry{Blocks: 64 << 40 / 512, RegionBlocks: 2048}

// fill makes every nth region of volume v partial, in the form in which Set stores it, by
// a shorter way.
func fill(t testing.TB, dir string, g Geometry, nth uint64, bitmap func(words []uint64)) {
	t.Helper()
	s := open(t, dir)
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	const perCommit = 4000
	var ops []op
	for region := uint64(0); region < f.Regions(); region += nth {
		words := make([]uint64, f.words)
		bitmap(words)
		ops = append(ops, op{regionKey(f.gen, region), encodeRegion(regionBitmaps{words, words}, f.compact)})
		if len(ops) == perCommit || region+nth >= f.Regions() {
			if err := s.submit(context.Background(), &request{records: ops}); err != nil {
				t.Fatal(err)
			}
			ops = ops[:0]
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// size is how many bytes dir takes on disk.
func size(t testing.TB, dir string) (bytes int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil {
			bytes += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}

type opened struct {
	store, both time.Duration
	cpu         time.Duration // of both
	heap        float64       // in bytes
}

// measureOpen opens the state and the flags of v, and closes them.
func measureOpen(t testing.TB, dir string, g Geometry) (o opened) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	begin, used := time.Now(), cpuTime(t)
	s := open(t, dir)
	o.store = time.Since(begin)
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	o.both, o.cpu = time.Since(begin), cpuTime(t)-used
	runtime.GC()
	runtime.ReadMemStats(&after)
	o.heap = float64(after.HeapAlloc) - float64(before.HeapAlloc)
	if !f.Any(Valid, Run{0, g.RegionBlocks}) {
		t.Fatal("no flag came back")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return o
}

// cpuTime is what the process has used of the processors.
func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func openBounded(t testing.TB, dir string, bitmapMemory uint64) *Store {
	t.Helper()
	s, err := Open(dir, Options{BitmapMemory: bitmapMemory})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// every other 4 KiB of a region
func everyOther(words []uint64) {
	for i := range words {
		words[i] = 0x00ff00ff00ff00ff
	}
}

// The time is the processors', because other tests run beside this one.
func TestSixtyFourTebibytesOpenInTwoSeconds(t *testing.T) {
	if testing.Short() {
		t.Skip("fills 670,000 regions")
	}
	dir, g, limit := t.TempDir(), largeGeometry, 2*time.Second
	if raceEnabled {
		g.Blocks /= 32
	}
	fill(t, dir, g, 100, everyOther)
	o := measureOpen(t, dir, g)
	t.Logf("%v, of them %v for the store; %v of the processors; %.0f MiB of heap", o.both, o.store, o.cpu, o.heap/(1<<20))
	if o.heap > 256<<20 {
		t.Errorf("%.0f MiB of heap, want at most 256", o.heap/(1<<20))
	}
	if o.cpu > limit {
		t.Errorf("opened with %v of the processors' time, want at most %v", o.cpu, limit)
	}
}

func TestFragmentedVolumeStaysBounded(t *testing.T) {
	t.Parallel()
	const limit = 512 << 10
	ctx := t.Context()
	dir := t.TempDir()
	g := Geometry{Blocks: 1 << 23, RegionBlocks: 2048} // 4 GiB
	fill(t, dir, g, 1, everyOther)
	s := openBounded(t, dir, limit)
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	bounded := func(when string) {
		t.Helper()
		if n := s.Stats().BitmapBytes; n > limit+shardCount*1024 {
			t.Fatalf("%s: %d bytes of bitmaps, want at most %d", when, n, limit)
		}
	}
	if got := f.Count(Dirty); got != g.Blocks/2 {
		t.Fatalf("%d dirty blocks, want %d", got, g.Blocks/2)
	}
	check := func(from, regions uint64) {
		t.Helper()
		at := from * g.RegionBlocks
		err := f.Runs(Dirty, Run{at, regions * g.RegionBlocks}, func(r Run, set bool) bool {
			if r.Start != at || r.Blocks != 8 || set != (r.Start/8%2 == 0) {
				t.Fatalf("%v %v at block %d", r, set, at)
			}
			at = r.end()
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	check(0, f.Regions())
	bounded("read through")

	// The copier fills regions; what initiators wrote in them stays known.
	for region := uint64(0); region < 1024; region += 256 {
		if err := f.Set(ctx, Valid, Run{region * g.RegionBlocks, 256 * g.RegionBlocks}); err != nil {
			t.Fatal(err)
		}
	}
	bounded("copied")
	// The initiators write 4 KiB more in each of some others.
	for region := uint64(2048); region < 2560; region += 256 {
		var runs []Run
		for i := range uint64(256) {
			runs = append(runs, Run{(region+i)*g.RegionBlocks + 8, 8})
		}
		if err := f.Set(ctx, Valid|Dirty, runs...); err != nil {
			t.Fatal(err)
		}
	}
	bounded("written")
	if n, ok := f.NextPartial(Valid, 0); !ok || n != 1024 {
		t.Fatalf("first partial region %d, want 1024", n)
	}
	if got, want := f.Count(Valid), g.Blocks/2+1024*g.RegionBlocks/2+512*8; got != want {
		t.Fatalf("%d valid blocks, want %d", got, want)
	}
	if got, want := f.Count(Dirty), g.Blocks/2+512*8; got != want {
		t.Fatalf("%d dirty blocks, want %d", got, want)
	}
	check(0, 2048)
	for region := uint64(2048); region < 2560; region++ {
		if at := region * g.RegionBlocks; !f.All(Valid|Dirty, Run{at, 24}) || f.Any(Valid, Run{at + 24, 8}) {
			t.Fatalf("region %d is not as it was written", region)
		}
	}
	check(2560, f.Regions()-2560)
	bounded("read again")
	if s.Stats().BitmapReads == 0 {
		t.Fatal("nothing was read from the database: the test shows nothing")
	}
}

// With stage.region taking its bitmaps without pinning them this fails: the reader
// finds the second run in the database.
func TestNoFlagShowsBeforeItsSync(t *testing.T) {
	s := openBounded(t, t.TempDir(), 1) // one bitmap in each shard
	g := Geometry{Blocks: 1 << 22, RegionBlocks: 2048}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	first, second := Run{0, 8}, Run{64, 8}
	crowd := Run{shardCount * g.RegionBlocks, 8} // in the same shard
	for _, r := range []Run{first, crowd} {
		if err := f.Set(t.Context(), Valid, r); err != nil {
			t.Fatal(err)
		}
	}
	syncs := 0
	s.syncer.synced = func(string) { // in the middle of the commit of second
		syncs++
		for range 3 {
			if !f.All(Valid, crowd) || !f.All(Valid, first) {
				t.Error("a flag that was acknowledged does not show")
			}
			if f.Any(Valid, second) {
				t.Error("a flag shows before its commit is done")
			}
		}
	}
	if err := f.Set(t.Context(), Valid, second); err != nil {
		t.Fatal(err)
	}
	if syncs != 1 || !f.All(Valid, second) {
		t.Fatalf("%d syncs", syncs)
	}
}

func TestUnreadableBitmapIsAnErrorAndNoAnswer(t *testing.T) {
	s := openBounded(t, t.TempDir(), 1)
	g := Geometry{Blocks: 1 << 22, RegionBlocks: 2048}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	lost, crowd := Run{0, 8}, Run{shardCount * g.RegionBlocks, 8}
	for _, r := range []Run{lost, crowd} {
		if err := f.Set(t.Context(), Valid|Dirty, r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.submit(t.Context(), &request{records: []op{{key: regionKey(f.gen, 0)}}}); err != nil {
		t.Fatal(err)
	}
	if f.All(Valid, lost) || !f.Any(Valid, Run{100, 8}) {
		t.Fatal("blocks are told valid, or not valid, and nobody knows")
	}
	err = f.Runs(Valid, Run{0, g.RegionBlocks}, func(r Run, set bool) bool {
		t.Errorf("%v told as %v, and nobody knows", r, set)
		return true
	})
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), s.dir) {
		t.Fatal(err)
	}
	if err := f.Set(t.Context(), Valid, Run{100, 8}); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	// What is in order goes on.
	more := Run{crowd.Start + 100, 8}
	if err := f.Set(t.Context(), Valid, more); err != nil || !f.All(Valid, more) || !f.All(Valid|Dirty, crowd) {
		t.Fatal(err)
	}
}

// Without the count of changes, what a slow reader brings from the database would take
// the place of what was published and dropped again meanwhile.
func TestReaderThatWasOvertakenLooksAgain(t *testing.T) {
	s := openBounded(t, t.TempDir(), 1)
	g := Geometry{Blocks: 1 << 22, RegionBlocks: 2048}
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	crowd := Run{shardCount * g.RegionBlocks, 8}
	for _, r := range []Run{{0, 8}, crowd} {
		if err := f.Set(t.Context(), Valid, r); err != nil {
			t.Fatal(err)
		}
	}
	id := regionID{f.gen, 0}
	sh := s.bitmaps.shard(id)
	before := sh.changes
	old, err := f.readRegion(0)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []Run{{64, 8}, {crowd.Start + 64, 8}} {
		if err := f.Set(t.Context(), Valid, r); err != nil {
			t.Fatal(err)
		}
	}
	if sh.held[id] != nil {
		t.Fatal("the region is still held: the test shows nothing")
	}
	if _, again, err := sh.hold(id, old, nil, before, false); !again || err != nil || !f.All(Valid, Run{64, 8}) {
		t.Fatalf("a bitmap of before was taken up: %v", err)
	}
}
