package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"lunshift/tests/peer"
)

func main() {
	binary := flag.String("lunshift", "bin/lunshift", "the lunshift to run")
	bound := flag.Duration("bound", 5*time.Minute, "how long one run of the suite may take")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := report(ctx, os.Stdout, *binary, *bound); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		stop()
		os.Exit(1)
	}
}

// run is one run of the suite.
type run struct {
	title string
	block int
	phase string
	list  []exception
	cases []testCase
	err   error
}

// report runs the suite against lunshift and tgtd and writes the table. What lunshift
// should not have answered is the error.
func report(ctx context.Context, w io.Writer, binary string, bound time.Duration) error {
	dir, err := os.MkdirTemp("", "conf")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ours := lunshiftRuns(ctx, binary, dir, bound)
	theirs, err := tgtdRun(ctx, dir, bound)
	if err != nil {
		return err
	}
	all := append(slices.Clone(ours), theirs)
	table(w, all)
	details(w, all)
	var faults []error
	for _, r := range ours {
		for _, f := range r.faults() {
			faults = append(faults, fmt.Errorf("%s: %s", r.title, f))
		}
	}
	return errors.Join(faults...)
}

// faults says what is wrong with a run of lunshift.
func (r run) faults() []string {
	var list []string
	if r.err != nil {
		list = append(list, r.err.Error())
	}
	for _, c := range r.cases {
		if f := fault(c, r.list); f != "" {
			list = append(list, f)
		}
	}
	return list
}

// lunshiftRuns runs the suite in every phase over both block lengths, each over a service
// of its own and all at once: the suite sleeps for most of its time.
func lunshiftRuns(ctx context.Context, binary, dir string, bound time.Duration) []run {
	var runs []run
	for _, block := range []int{512, 4096} {
		for _, phase := range phases {
			runs = append(runs, run{title: fmt.Sprintf("lunshift, %d-byte blocks, %s", block, phase), block: block, phase: phase, list: exceptionsOf(block)})
		}
	}
	var all sync.WaitGroup
	for i := range runs {
		r := &runs[i]
		all.Go(func() {
			r.cases, r.err = lunshiftRun(ctx, binary, filepath.Join(dir, fmt.Sprintf("%d%s", r.block, r.phase)), r.block, r.phase, bound)
		})
	}
	all.Wait()
	return runs
}

func lunshiftRun(ctx context.Context, binary, dir string, block int, phase string, bound time.Duration) (cases []testCase, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	s, err := startService(ctx, binary, dir, block)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.enter(ctx, phase); err != nil {
		return nil, err
	}
	cases, err = bounded(ctx, bound, "", s.urls...)
	return cases, errors.Join(err, s.leave(ctx, phase))
}

// tgtdRun runs the families one after another, each with a tgtd of its own: tgtd leaves
// commands without an answer when all run at once.
func tgtdRun(ctx context.Context, dir string, bound time.Duration) (run, error) {
	all := run{title: "tgtd, 512-byte blocks"}
	for _, f := range families {
		at := filepath.Join(dir, "tgtd-"+f)
		if err := os.Mkdir(at, 0o700); err != nil {
			return all, err
		}
		cases, err := tgtdFamily(ctx, at, f, bound)
		all.cases, all.err = append(all.cases, cases...), errors.Join(all.err, err)
	}
	return all, nil
}

func tgtdFamily(ctx context.Context, dir, family string, bound time.Duration) (cases []testCase, err error) {
	image := filepath.Join(dir, "tgtd.img")
	if err := thinFile(image, true); err != nil {
		return nil, err
	}
	d, err := peer.NewTgtd(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := d.AddTarget(ctx, volumeIQN, []peer.Unit{{Path: image, Thin: true}}); err != nil {
		return nil, err
	}
	url := d.LUN(volumeIQN, 1).URL()
	return bounded(ctx, bound, family, url, url)
}

// bounded is runSuite that ends in bounded time: a target may leave a case without an
// answer.
func bounded(ctx context.Context, bound time.Duration, family string, urls ...string) ([]testCase, error) {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	return runSuite(ctx, family, urls...)
}

// table writes the counts of each family.
func table(w io.Writer, runs []run) {
	fmt.Fprintln(w, "| target | family | cases | passed | failed | skipped | not run |")
	fmt.Fprintln(w, "|---|---|---:|---:|---:|---:|---:|")
	for _, r := range runs {
		var present []string
		count := map[string]map[outcome]int{}
		for _, c := range r.cases {
			for _, f := range []string{c.Family, "together"} {
				if count[f] == nil {
					count[f] = map[outcome]int{}
					if f != "together" {
						present = append(present, f)
					}
				}
				count[f][c.Outcome]++
			}
		}
		for _, f := range append(present, "together") {
			n := count[f]
			fmt.Fprintf(w, "| %s | %s | %d | %d | %d | %d | %d |\n", r.title, f,
				n[passed]+n[failed]+n[skipped]+n[missing], n[passed], n[failed], n[skipped], n[missing])
		}
	}
}

// details writes why cases failed or were skipped, each once: the families hold the
// same cases.
func details(w io.Writer, runs []run) {
	for _, r := range runs {
		type entry struct {
			outcome outcome
			why     string
		}
		var order []entry
		ids := map[entry][]string{}
		for _, c := range r.cases {
			if c.Outcome == passed {
				continue
			}
			e := entry{c.Outcome, c.Why}
			if ids[e] == nil {
				order = append(order, e)
			}
			if !slices.Contains(ids[e], c.ID()) {
				ids[e] = append(ids[e], c.ID())
			}
		}
		fmt.Fprintf(w, "\n%s:\n", r.title)
		if r.err != nil {
			fmt.Fprintf(w, "  %v\n", r.err)
		}
		for _, e := range order {
			fmt.Fprintf(w, "  %s (%s): %s\n", e.outcome, e.why, strings.Join(ids[e], " "))
		}
	}
}
