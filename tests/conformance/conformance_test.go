package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"lunshift/tests/peer"
)

// binary is the lunshift that all tests run.
var binary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "conformance")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, "lunshift")
		build := exec.Command("go", "build", "-trimpath", "-o", binary, "lunshift/cmd/lunshift")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "build of cmd/lunshift:", err)
			return 1
		}
		return m.Run()
	}())
}

// TestSuiteAnswersTheSameInEveryPhase runs all families before, during and after the
// copy, over units of 512-byte and of 4096-byte blocks.
func TestSuiteAnswersTheSameInEveryPhase(t *testing.T) {
	peer.Need(t, tool)
	// The control socket's path must fit sun_path, which t.TempDir may not.
	dir, err := os.MkdirTemp("", "conf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	runs := lunshiftRuns(t.Context(), binary, dir, 10*time.Minute)
	ready := map[int][]testCase{}
	for i := range runs {
		r := &runs[i]
		wrong := differences(*r, ready)
		if len(wrong) > 0 {
			// Six runs at once keep the machine so busy that a case of the suite gives up
			// waiting (TargetColdReset), or a port that was free is taken. What is wrong is so alone too.
			t.Logf("%s: once more, alone, for %q", r.title, wrong)
			r.cases, r.err = lunshiftRun(t.Context(), binary, filepath.Join(dir, fmt.Sprint("again", i)), r.block, r.phase, 10*time.Minute)
			wrong = differences(*r, ready)
		}
		for _, w := range wrong {
			t.Errorf("%s: %s", r.title, w)
		}
		if r.phase == phases[0] {
			ready[r.block] = r.cases
		}
	}
}

// differences are the faults of a run, and where it differs from the one in phase ready.
func differences(r run, ready map[int][]testCase) []string {
	wrong := r.faults()
	before, ok := ready[r.block]
	if !ok {
		before = r.cases
	}
	if len(r.cases) == 0 || len(r.cases) != len(before) {
		return append(wrong, fmt.Sprintf("%d cases, %d in phase %s", len(r.cases), len(before), phases[0]))
	}
	for i, c := range r.cases {
		if before[i].Outcome != c.Outcome {
			wrong = append(wrong, fmt.Sprintf("%s.%s: %s, in phase %s %s", c.Family, c.ID(), c.Outcome, phases[0], before[i].Outcome))
		}
	}
	return wrong
}

const sample = `    [SKIPPED] PERSISTENT RESERVE IN is not implemented.

Suite: A
  Test: One ...passed
  Test: Two ...    [SKIPPED] TWO is not implemented.
    [SKIPPED] SECOND LINE
passed
  Test: Three ...FAILED
    1. three.c:12  - CU_FAIL("[FAILED] it")    [SKIPPED] PERSISTENT RESERVE IN is not implemented.
    [SKIPPED] PERSISTENT RESERVE IN is not implemented.

Suite: B
  Test: One ...
    [FAILED] WRITE10 failed
passed    [SKIPPED] PERSISTENT RESERVE IN is not implemented.
`

func TestOutputOfTheSuiteIsReadCaseByCase(t *testing.T) {
	list := "ALL\nALL.A\nALL.A.One\nALL.A.Two\nALL.A.Three\nALL.B\nALL.B.One\n"
	cases := parseList(list)
	ran, ends := parseOutput(sample+"\nRun Summary: x\n", cases)
	if ran != 4 || !ends {
		t.Fatalf("%d cases ran, end %v", ran, ends)
	}
	for i, want := range []struct {
		outcome    outcome
		why        string
		complaints int
	}{{passed, "", 0}, {skipped, "TWO is not implemented.", 0}, {failed, `three.c:12  - CU_FAIL("[FAILED] it")`, 0}, {passed, "", 1}} {
		if c := cases[i]; c.Outcome != want.outcome || c.Why != want.why || len(c.Complaints) != want.complaints {
			t.Errorf("case %d is %+v", i, c)
		}
	}
	for _, c := range cases[1:] {
		if fault(c, nil) == "" {
			t.Errorf("%+v is no fault", c)
		}
	}
	if fault(cases[0], nil) != "" {
		t.Error("a passed case is a fault")
	}

	// What ended in the middle has its end nowhere.
	cases = parseList(list)
	if ran, ends := parseOutput(sample[:len(sample)-100], cases); ran == 4 || ends || cases[3].Outcome == passed {
		t.Errorf("%d cases ran of a suite that was cut off, end %v", ran, ends)
	}
}
