package main

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// table prints aligned columns.
type table struct{ w *tabwriter.Writer }

func newTable(title string, head ...string) *table {
	fmt.Println(title)
	t := &table{tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)}
	t.row(head...)
	return t
}

func (t *table) row(cells ...string) {
	fmt.Fprintln(t.w, strings.Join(cells, "\t")+"\t")
}

func (t *table) end() {
	t.w.Flush()
	fmt.Println()
}

func median[T cmp.Ordered](values []T) T {
	var zero T
	if len(values) == 0 {
		return zero
	}
	s := slices.Sorted(slices.Values(values))
	return s[len(s)/2]
}

// medians is the median of each figure of the rounds by itself.
func medians(rounds []outcome) outcome {
	if len(rounds) == 0 {
		return outcome{}
	}
	pick := func(of func(outcome) float64) float64 {
		var list []float64
		for _, o := range rounds {
			list = append(list, of(o))
		}
		return median(list)
	}
	m := outcome{
		IOPS: pick(func(o outcome) float64 { return o.IOPS }),
		P50:  time.Duration(pick(func(o outcome) float64 { return float64(o.P50) })),
		P99:  time.Duration(pick(func(o outcome) float64 { return float64(o.P99) })),
	}
	for i := range rounds[0].CPU {
		m.CPU = append(m.CPU, time.Duration(pick(func(o outcome) float64 { return float64(o.CPU[i]) })))
	}
	return m
}

func iops(v float64) string { return fmt.Sprintf("%.0f", v) }

func micros(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/float64(time.Microsecond)) }

// ratio is a/b, NaN-free: "-" where b is 0.
func ratio(a, b float64) string {
	if b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", a/b)
}

// atLeast and atMost say whether a ratio is what is aimed at.
func atLeast(a, b, aim float64) string { return verdict(b > 0 && a/b >= aim) }
func atMost(a, b, aim float64) string  { return verdict(b > 0 && a/b <= aim) }

func verdict(ok bool) string {
	if ok {
		return "ok"
	}
	return "missed"
}
