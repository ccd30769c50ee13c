package state

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// childEnv makes the test binary the process that is killed: its value is the
// state directory.
const childEnv = "LUNSHIFT_STATE_TEST_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := changeUntilKilled(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

var crashGeometry = Geometry{Blocks: 1 << 22, RegionBlocks: 2048}

// changeUntilKilled changes flags from several goroutines, in one turn after the other, and
// prints each change when it is tried and once it is acknowledged.
func changeUntilKilled(dir string) error {
	ctx := context.Background()
	s, err := Open(dir, Options{})
	if err != nil {
		return err
	}
	f, err := s.Flags("v", crashGeometry)
	if err != nil {
		return err
	}
	if err := proveAll(ctx, f); err != nil {
		return err
	}
	var out sync.Mutex
	say := func(format string, a ...any) {
		out.Lock()
		defer out.Unlock()
		fmt.Printf(format+"\n", a...)
	}
	say("open %v", f.Backward())
	for n := 0; ; {
		var wg sync.WaitGroup
		for range 8 {
			n++
			first := n * 1000
			wg.Go(func() {
				for id := first; id < first+40; id++ {
					k := Kinds(1 + rand.IntN(3))
					r := Run{rand.Uint64N(crashGeometry.Blocks - 4096), 1 + rand.Uint64N(8)}
					if rand.IntN(4) == 0 {
						r.Blocks = 1 + rand.Uint64N(4096)
					}
					way := rand.IntN(3)
					if way == 2 {
						k = Valid | Dirty
					}
					say("try %d %d %d %d", id, k, r.Start, r.Blocks)
					var err error
					switch {
					case way == 2:
						err = keep(ctx, f, []Run{r})
					case way == 1:
						err = f.Note(ctx, k, r)
					case f.Backward():
						err = f.Clear(ctx, k, r)
					default:
						err = f.Set(ctx, k, r)
					}
					if err != nil {
						fmt.Fprintln(os.Stderr, err)
						os.Exit(1)
					}
					say("done %d", id)
				}
			})
		}
		wg.Wait()
		if err := f.Await(ctx, Run{Blocks: crashGeometry.Blocks}); err != nil {
			return err
		}
		back := !f.Backward()
		say("turn")
		if err := s.Turn(ctx, []Turning{{f, back}}); err != nil {
			return err
		}
		say("turned %v", back)
	}
}

// proveAll tells that all that was intended was written.
func proveAll(ctx context.Context, f *Flags) error {
	var written []Run
	for _, sum := range f.Unproven() {
		if sum.Hash != 7 {
			return fmt.Errorf("%v was never intended", sum)
		}
		written = append(written, sum.Run)
	}
	return f.Prove(ctx, written...)
}

// The flags as the parent of a child that is killed knows them.
const (
	isClear = iota
	isSet
	isEither
)

// killed is what the parent knows.
type killed struct {
	blocks   [kindCount][]uint8
	backward bool
	turning  bool
	tried    map[int]struct {
		k Kinds
		r Run
	}
	changes, turns int
}

// hear takes up a line of the child and reports false where the kill cut it.
func (c *killed) hear(line string) bool {
	var id int
	var what string
	var n struct {
		k Kinds
		r Run
	}
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "open", "turned":
		if _, err := fmt.Sscan(rest, &what); err != nil || what != "true" && what != "false" {
			return false
		}
		c.backward, c.turning = what == "true", false
		c.turns++
	case "turn":
		c.turning = true
	case "try":
		if _, err := fmt.Sscan(rest, &id, &n.k, &n.r.Start, &n.r.Blocks); err != nil {
			return false
		}
		c.tried[id] = n
	case "done":
		if _, err := fmt.Sscan(rest, &id); err != nil {
			return false
		}
		to := uint8(isSet)
		if c.backward {
			to = isClear
		}
		c.mark(c.tried[id].k, c.tried[id].r, to)
		delete(c.tried, id)
		c.changes++
	}
	return true
}

func (c *killed) mark(k Kinds, r Run, to uint8) {
	for i := range c.blocks {
		for b := r.Start; b < r.end() && k&(1<<i) != 0; b++ {
			c.blocks[i][b] = to
		}
	}
}

// compare holds the flags against what is known, and learns from them the rest.
func (c *killed) compare(t *testing.T, f *Flags) {
	t.Helper()
	for _, n := range c.tried {
		c.mark(n.k, n.r, isEither)
	}
	clear(c.tried)
	if !c.turning && f.Backward() != c.backward {
		t.Fatalf("backward is %v", f.Backward())
	}
	for i := range c.blocks {
		err := f.Runs(1<<i, Run{Blocks: crashGeometry.Blocks}, func(r Run, set bool) bool {
			is := uint8(isClear)
			if set {
				is = isSet
			}
			for b := r.Start; b < r.end(); b++ {
				if was := c.blocks[i][b]; was != is && was != isEither {
					t.Fatalf("block %d has kind %d: %v, and that was acknowledged otherwise", b, i, set)
				}
				c.blocks[i][b] = is
			}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Caught: entries that name the generation alone, a Prove that sets in a backward turn, and
// intents that are told there by the question of a forward one.
func TestEveryAcknowledgedChangeSurvivesKillsInEachTurn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	known := &killed{tried: map[int]struct {
		k Kinds
		r Run
	}{}}
	for i := range known.blocks {
		known.blocks[i] = make([]uint8, crashGeometry.Blocks)
	}
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		limit := 300 + rand.IntN(2500)
		for n := 0; lines.Scan(); n++ {
			if !known.hear(lines.Text()) {
				break
			}
			if n == limit {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
			t.Fatalf("round %d: the child ended by itself: %v", round, err)
		}
		// Half of the rounds go on with the directory as the kill left it.
		at := dir
		if round%2 == 0 {
			at = copyState(t, dir)
		}
		s := open(t, at)
		f, err := s.Flags("v", crashGeometry)
		if err != nil {
			t.Fatal(err)
		}
		if err := proveAll(t.Context(), f); err != nil {
			t.Fatal(err)
		}
		known.compare(t, f)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d acknowledged changes in %d turns", known.changes, known.turns)
}

// copyState copies a directory as a crash would leave it.
func copyState(t *testing.T, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("cp", "-r", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	os.Remove(filepath.Join(to, badgerDir, "LOCK"))
	return to
}

// written makes a state with flags and a record, as left by Close or by a kill.
func written(t *testing.T, closed bool) (dir string, runs []Run) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	f, err := s.Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.PutRecords(context.Background(), Record{Volume: "v", Phase: "migrating"}); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(40) {
		r := Run{i * 5000, 3000}
		set := f.Set
		if i%2 == 0 {
			set = f.Note
		}
		if err := set(context.Background(), Valid|Dirty, r); err != nil {
			t.Fatal(err)
		}
		runs = append(runs, r)
	}
	if closed {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return dir, runs
	}
	return copyState(t, dir), runs
}

// holdsOrRefuses opens dir and wants either every run or an error that says what
// is wrong. It tells which.
func holdsOrRefuses(t *testing.T, dir string, runs []Run, what string) (refused bool) {
	t.Helper()
	s, err := Open(dir, Options{})
	if err == nil {
		defer s.Close()
		var f *Flags
		if f, err = s.Flags("v", crashGeometry); err == nil {
			for _, r := range runs {
				if !f.All(Valid|Dirty, r) {
					t.Fatalf("%s: %v is gone without an error", what, r)
				}
			}
			return false
		}
	}
	if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrForeign) && !errors.Is(err, ErrVersion) {
		t.Fatalf("%s: unclear error: %v", what, err)
	}
	if !strings.Contains(err.Error(), dir) || strings.Contains(err.Error(), "\n") {
		t.Fatalf("%s: error does not name the directory in one line: %v", what, err)
	}
	return true
}

// Caught: files that are not verified before Badger opens them.
func TestDamagedFilesAreRefusedOrHarmless(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for _, closed := range []bool{true, false} {
		dir, runs := written(t, closed)
		var files []string
		for _, pattern := range []string{"HEAD", "journal.*", "badger/*"} {
			names, _ := filepath.Glob(filepath.Join(dir, pattern))
			for _, name := range names {
				if st, err := os.Stat(name); err == nil && st.Size() > 0 && filepath.Base(name) != "LOCK" {
					rel, _ := filepath.Rel(dir, name)
					files = append(files, rel)
				}
			}
		}
		refusals := 0
		damage := func(what, file string, change func(path string, b []byte) error) {
			c := copyState(t, dir)
			path := filepath.Join(c, file)
			b, err := os.ReadFile(path)
			if err == nil {
				err = change(path, b)
			}
			if err != nil {
				t.Fatal(err)
			}
			if holdsOrRefuses(t, c, runs, fmt.Sprintf("%s, closed=%v, seed %d", what, closed, seed)) {
				refusals++
			}
			os.RemoveAll(c)
		}
		for _, file := range files {
			times := 1
			if ext := filepath.Ext(file); ext == ".sst" || ext == ".mem" {
				times = 3
			}
			for range times {
				damage("flip in "+file, file, func(path string, b []byte) error {
					n := len(b)
					for n > 1 && b[n-1] == 0 {
						n--
					}
					b[rnd.IntN(n)] ^= 1 << rnd.IntN(8)
					return os.WriteFile(path, b, 0o600)
				})
				damage("cut "+file, file, func(path string, b []byte) error {
					n := len(b)
					for n > 1 && b[n-1] == 0 {
						n--
					}
					return os.Truncate(path, rnd.Int64N(int64(n)))
				})
			}
			damage("lost "+file, file, func(path string, _ []byte) error { return os.Remove(path) })
			damage("garbage in "+file, file, func(path string, b []byte) error {
				for i := range min(len(b), 1<<20) {
					b[i] = byte(rnd.Uint32())
				}
				return os.WriteFile(path, b, 0o600)
			})
		}
		t.Logf("closed=%v: %d refusals over %v", closed, refusals, files)
		if refusals == 0 {
			t.Fatal("no damage was noticed")
		}
	}
}

func TestDamageInsideTheLogIsToldFromATornEnd(t *testing.T) {
	dir, runs := written(t, false)
	log := filepath.Join(dir, badgerDir, "00001.mem")
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if err := verifyLog(b); err != nil {
		t.Fatalf("intact: %v", err)
	}
	at := logHeader
	var ends []int
	for {
		key, n := logEntry(b[at:])
		if n == 0 {
			break
		}
		at += n
		if strings.HasPrefix(string(key), logFinish) {
			ends = append(ends, at)
		}
	}
	if len(ends) < len(runs)/2 { // half of them were noted, and settled together
		t.Fatalf("%d transactions in the log, want at least %d", len(ends), len(runs)/2)
	}
	b = b[:at+4096]
	for i, end := range ends {
		begin := logHeader
		if i > 0 {
			begin = ends[i-1]
		}
		torn := append([]byte(nil), b...)
		torn[begin+(end-begin)/2] ^= 0x10
		err := verifyLog(torn)
		if i < len(ends)-1 && err == nil {
			t.Fatalf("transaction %d of %d damaged, and not noticed", i, len(ends))
		}
		if i == len(ends)-1 && err != nil {
			t.Fatalf("torn end taken for damage: %v", err)
		}
	}
}

// Caught: the number in HEAD that is not compared.
func TestDatabaseThatFellBackIsRefused(t *testing.T) {
	dir, runs := written(t, false)
	log := filepath.Join(dir, badgerDir, "00001.mem")
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	// Cut between two transactions the log looks intact.
	at := logHeader
	for range 20 {
		for {
			key, n := logEntry(b[at:])
			at += n
			if strings.HasPrefix(string(key), logFinish) {
				break
			}
		}
	}
	clear(b[at:])
	if err := os.WriteFile(log, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if !holdsOrRefuses(t, dir, runs, "log cut between transactions") {
			t.Fatal("half of the commits are gone, and nobody noticed")
		}
	}
}
