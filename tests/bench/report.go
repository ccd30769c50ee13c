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

// table prints aligned columns, and keeps them.
type table struct {
	w     *tabwriter.Writer
	title string
	rows  [][]string // the first is the head
}

func (b *bench) newTable(title string, head ...string) *table {
	fmt.Println(title)
	t := &table{w: tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight), title: title}
	b.tables = append(b.tables, t)
	t.row(head...)
	return t
}

// markdown is the table for a document.
func (t *table) markdown() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s\n\n", t.title)
	for i, cells := range t.rows {
		fmt.Fprintf(&s, "| %s |\n", strings.Join(cells, " | "))
		if i == 0 {
			fmt.Fprintf(&s, "|---%s|\n", strings.Repeat("|---:", len(cells)-1))
		}
	}
	return s.String()
}

const beginMark, endMark = "<!-- bench -->\n", "<!-- /bench -->\n"

// write puts the tables into a document between its marks.
func (b *bench) write(path, where string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(text), beginMark)
	_, after, closed := strings.Cut(rest, endMark)
	if !ok || !closed {
		return fmt.Errorf("%s has no lines %s and %s", path, strings.TrimSpace(beginMark), strings.TrimSpace(endMark))
	}
	middle := "\n" + where + "\n"
	for _, t := range b.tables {
		middle += "\n" + t.markdown()
	}
	return os.WriteFile(path, []byte(before+beginMark+middle+"\n"+endMark+after), 0o644)
}

func (t *table) row(cells ...string) {
	t.rows = append(t.rows, cells)
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
