//go:build failpoint

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Variable names the point to die at and which passage of it, as point:count.
const Variable = "LUNSHIFT_FAILPOINT"

// chosen is read once, before anything passes a point.
var chosen = parse(os.Getenv(Variable))

type choice struct {
	point string
	left  *atomic.Int64 // passages until the one that kills
}

func parse(text string) choice {
	if text == "" {
		return choice{}
	}
	point, count, ok := strings.Cut(text, ":")
	n, err := strconv.ParseInt(count, 10, 64)
	if !ok || err != nil || n < 1 {
		fmt.Fprintf(os.Stderr, "%s=%q: want point:count with a count of 1 or more\n", Variable, text)
		os.Exit(2)
	}
	c := choice{point: point, left: new(atomic.Int64)}
	c.left.Store(n)
	return c
}

// Here ends the process with SIGKILL if this is the chosen passage of the chosen point.
// Nothing is flushed, closed or deferred, as in a crash.
func Here(point string) {
	if chosen.left == nil || chosen.point != point || chosen.left.Add(-1) != 0 {
		return
	}
	fmt.Fprintf(os.Stderr, "failpoint %s reached\n", point)
	unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // until the signal comes
}
