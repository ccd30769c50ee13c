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

// Variable names the point to die at and which passage of it, as point:count. Of several,
// with commas between, each counts once the one before was passed, and the last one kills.
const Variable = "LUNSHIFT_FAILPOINT"

// chosen is read once, before anything passes a point.
var chosen = parse(os.Getenv(Variable))

// passed is how many of the chosen points were.
var passed atomic.Int64

type choice struct {
	point string
	left  *atomic.Int64 // passages until the one that counts
}

func parse(text string) (list []choice) {
	if text == "" {
		return nil
	}
	for one := range strings.SplitSeq(text, ",") {
		point, count, ok := strings.Cut(one, ":")
		n, err := strconv.ParseInt(count, 10, 64)
		if !ok || err != nil || n < 1 {
			fmt.Fprintf(os.Stderr, "%s=%q: want point:count with a count of 1 or more\n", Variable, text)
			os.Exit(2)
		}
		c := choice{point: point, left: new(atomic.Int64)}
		c.left.Store(n)
		list = append(list, c)
	}
	return list
}

// Here ends the process with SIGKILL if this is the chosen passage of the chosen point.
// Nothing is flushed, closed or deferred, as in a crash.
func Here(point string) {
	if chosen == nil {
		return
	}
	c := chosen[passed.Load()]
	if c.point != point || c.left.Add(-1) != 0 {
		return
	}
	if passed.Load() < int64(len(chosen)-1) {
		passed.Add(1)
		return
	}
	fmt.Fprintf(os.Stderr, "failpoint %s reached\n", point)
	unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // until the signal comes
}
