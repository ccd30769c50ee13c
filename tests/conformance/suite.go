package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"lunshift/tests/peer"
)

// outcome is what one case gave.
type outcome string

const (
	passed  outcome = "passed"
	failed  outcome = "failed"
	skipped outcome = "skipped"
	missing outcome = "not run" // the suite ended before it
)

// testCase is one case of the suite as it ran.
type testCase struct {
	Family, Suite, Name string
	Outcome             outcome
	// Why is the suite's own words for a failure or a skip.
	Why string
	// Complaints are the failures that a passed case printed.
	Complaints []string
}

// ID is the case without its family: the families hold the same cases.
func (c testCase) ID() string { return c.Suite + "." + c.Name }

// tool is the program of libiscsi that holds the suite.
const tool = "iscsi-test-cu"

// families are those of the suite, in the order in which it runs them.
var families = []string{"ALL", "SCSI", "iSCSI", "LINUX"}

// runSuite runs one family of the suite, or all if family is empty, over the urls, which
// lead to one logical unit, and gives every case that the suite lists of it. Where the
// suite did not get to its end there is an error beside the cases.
func runSuite(ctx context.Context, family string, urls ...string) ([]testCase, error) {
	list, err := peer.Run(ctx, tool, "--list")
	if err != nil {
		return nil, err
	}
	// Without --test all families run.
	args := []string{"--dataloss", "--ignore", "--verbose"}
	cases := parseList(list)
	if family != "" {
		args = append(args, "--test="+family)
		cases = slices.DeleteFunc(cases, func(c testCase) bool { return c.Family != family })
	}
	out, err := peer.Run(ctx, tool, append(args, urls...)...)
	ran, ends := parseOutput(out, cases)
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("%s: stopped after %d of %d cases: %w", tool, ran, len(cases), ctx.Err())
	case !ends || ran != len(cases):
		err = errors.Join(fmt.Errorf("%s: ended after %d of %d cases: %s", tool, ran, len(cases), tail(out)), err)
	default:
		err = nil // its exit status tells of failed cases only
	}
	return cases, err
}

// parseList reads the list of FAMILY.SUITE.CASE.
func parseList(list string) []testCase {
	var cases []testCase
	for line := range strings.Lines(list) {
		if p := strings.SplitN(strings.TrimSpace(line), ".", 3); len(p) == 3 {
			cases = append(cases, testCase{Family: p[0], Suite: p[1], Name: p[2], Outcome: missing})
		}
	}
	return cases
}

var (
	suiteLine = regexp.MustCompile(`^Suite: (\S+)`)
	caseLine  = regexp.MustCompile(`^  Test: (\S+) \.\.\.(.*)`)
	// A verdict begins a line, or follows the case's name where the case printed nothing.
	verdict = regexp.MustCompile(`^(passed|FAILED)`)
	reason  = regexp.MustCompile(`^\s+\d+\. (.*)`)
)

// parseOutput enters in cases what the output says of each; they ran in the order of
// the list. It gives how many ran, and whether the output has its end.
func parseOutput(out string, cases []testCase) (ran int, ends bool) {
	suite := ""
	var c *testCase // whose output the lines are
	next := 0
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\r\n")
		if m := suiteLine.FindStringSubmatch(line); m != nil {
			suite, c = m[1], nil
			continue
		}
		if strings.HasPrefix(line, "Run Summary:") {
			ends, c = true, nil
			continue
		}
		rest := line
		if m := caseLine.FindStringSubmatch(line); m != nil {
			if next == len(cases) || cases[next].Suite != suite || cases[next].Name != m[1] {
				return ran, false // not what the list promised
			}
			c, rest = &cases[next], m[2]
			next++
		}
		switch {
		case c == nil: // between two cases
		case c.Outcome == failed:
			// What failed follows the verdict, with what the suite's clean-up prints behind.
			if m := reason.FindStringSubmatch(line); m != nil && c.Why == "" {
				c.Why, _, _ = strings.Cut(m[1], "    ")
			}
		case verdict.MatchString(rest):
			ran++
			if strings.HasPrefix(rest, "FAILED") {
				c.Outcome, c.Why = failed, ""
				continue
			}
			c.Outcome = passed
			if c.Why != "" {
				c.Outcome = skipped
			}
			c = nil
		case strings.Contains(rest, "[SKIPPED]"):
			if c.Why == "" {
				_, c.Why, _ = strings.Cut(rest, "[SKIPPED]")
				c.Why = strings.TrimSpace(c.Why)
			}
		case strings.Contains(rest, "[FAILED]"):
			_, what, _ := strings.Cut(rest, "[FAILED]")
			c.Complaints = append(c.Complaints, strings.TrimSpace(what))
		}
	}
	return ran, ends
}

// tail is the end of a tool's output in one line.
func tail(out string) string {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], " / ")
}
