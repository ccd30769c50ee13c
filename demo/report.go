package demo

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
)

func size(n uint64) string { return humanize.IBytes(n) }

// print writes the short table.
func (r *Report) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	row := func(name string, cells ...any) {
		fmt.Fprint(t, name)
		for _, c := range cells {
			fmt.Fprintf(t, "\t%v", c)
		}
		fmt.Fprintln(t, "\t")
	}
	fmt.Fprintln(w)
	row("allocated", size(r.Allocated))
	row("copied", size(r.Copied))
	row("skipped", size(r.Skipped))
	row("written by the load", size(r.Written))
	row("allocated on the new LUN", size(r.NewAllocated))
	row("time to copy", time.Duration(r.CopySeconds*float64(time.Second)).Round(10*time.Millisecond))
	row("commands held at cutover", fmt.Sprintf("%.1f ms", r.HoldMilliseconds))
	row("load without an answer at cutover", fmt.Sprintf("%.1f ms", r.GapMilliseconds))
	row("blocks checked, all right", humanize.Comma(int64(r.BlocksChecked)))
	t.Flush()
	fmt.Fprintln(w)
	row("the load", "IOPS", "p99")
	for _, phase := range []struct {
		name string
		rate LoadRate
	}{{"before the copy", r.Before}, {"during the copy", r.During}, {"after the copy", r.After}} {
		row(phase.name, humanize.Comma(int64(phase.rate.IOPS)), fmt.Sprintf("%.2f ms", phase.rate.P99Milliseconds))
	}
	t.Flush()
}
