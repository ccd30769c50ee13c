package torture

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"
)

// program is the lunshift that all tests run: as it ships, but with failpoints.
var program string

// whole is what all tests of a run did together.
var whole struct {
	sync.Mutex // guards the rest
	sum        sum
	seed       uint64
}

// TestMain builds it. LUNSHIFT_TORTURE_BINARY names another one, which must have been
// built with the tag failpoint. The long tier ends with one line for the whole run.
func TestMain(m *testing.M) {
	os.Exit(func() (code int) {
		if os.Getenv("LUNSHIFT_TORTURE") != "" {
			defer func() { fmt.Printf("torture, the whole run: seed %d: %v\n", whole.seed, whole.sum) }()
		}
		if program = os.Getenv("LUNSHIFT_TORTURE_BINARY"); program != "" {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "lunshift-torture")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "lunshift")
		build := exec.Command("go", "build", "-trimpath", "-tags", "failpoint", "-o", program, "lunshift/cmd/lunshift")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "build of cmd/lunshift:", err)
			return 1
		}
		return m.Run()
	}())
}

// tier is how much a test does.
type tier struct {
	seed   uint64
	cycles int           // at least
	lasts  time.Duration // at least
}

// tierOf gives the short tier, with so many cycles, or the long one where
// LUNSHIFT_TORTURE asks for it by a duration. LUNSHIFT_TORTURE_SEED sets the seed.
func tierOf(t *testing.T, short, long int) tier {
	t.Helper()
	r := tier{cycles: short}
	if text := os.Getenv("LUNSHIFT_TORTURE"); text != "" {
		d, err := time.ParseDuration(text)
		must(t, err)
		r.cycles, r.lasts = long, d
	}
	whole.Lock()
	defer whole.Unlock()
	if text := os.Getenv("LUNSHIFT_TORTURE_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		must(t, err)
		whole.seed = seed
	} else if whole.seed == 0 {
		whole.seed = rand.Uint64()>>1 | 1
	}
	r.seed = whole.seed
	t.Logf("seed %d", r.seed)
	return r
}

// must fails the test at once on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
