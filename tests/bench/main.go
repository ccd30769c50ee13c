// Command bench measures lunshift against its peers on this machine, in one run,
// and prints ratios:
//
//   - target: a LUN that is a file, against tgtd and istgt on the same file, with system calls
//     and memory;
//   - files: a LUN that is a file, against tgtd and stock gotgt on the same file;
//   - arrays: a LUN on tgtd and on an array of 1 ms per I/O, through lunshift against directly;
//   - copy: the background copy, against qemu-img convert between the same two LUNs;
//   - seeded: the copy to a destination that differs in 1 %, against a full one.
//
// The load comes from processes of their own: lunshift's initiator, and iscsi-perf as
// a second opinion. Rounds are interleaved, so that a slow moment of the machine
// hits all alike, and each figure is the median of its rounds. Processor time is the
// server's, user and system.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// roles are what this program is when it starts itself.
var roles = map[string]func(args []string) error{"load": runLoad, "array": runArray}

func run() error {
	if len(os.Args) > 1 {
		if role, ok := roles[os.Args[1]]; ok {
			return role(os.Args[2:])
		}
	}
	short := flag.Bool("short", false, "one short round of each")
	only := flag.String("only", "", "comma-separated parts to run: target, files, perf, arrays, first, slow, copy, seeded, mirror")
	dir := flag.String("dir", "/dev/shm", "where the LUNs' files are; about 3 GiB")
	state := flag.String("state", os.TempDir(), "where lunshift's state is; a disk, as in service")
	output := flag.String("o", "", "a Markdown file to write the tables to, between its lines <!-- bench --> and <!-- /bench -->")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()

	b := &bench{ctx: ctx, rounds: 3, span: 1200 * time.Millisecond}
	if *short {
		b.rounds, b.span = 1, 500*time.Millisecond
	}
	var err error
	if b.dir, err = os.MkdirTemp(*dir, "lunshift-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if b.state, err = os.MkdirTemp(*state, "lunshift-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.state)
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	if err := b.build(); err != nil {
		return err
	}
	where := fmt.Sprintf("%s; rounds: %d of %v; load average before: %s", machine(), b.rounds, b.span, busy())
	fmt.Println(where)
	fmt.Println()
	for _, part := range []struct {
		name string
		run  func() error
	}{{"target", b.target}, {"files", b.files}, {"perf", b.perf}, {"arrays", b.arrays}, {"first", b.firstWrites}, {"slow", b.slowArrays}, {"copy", b.copies}, {"seeded", b.seeded}, {"mirror", b.mirror}} {
		if *only != "" && !strings.Contains(","+*only+",", ","+part.name+",") {
			continue
		}
		err := part.run()
		if err = errors.Join(err, b.endAll()); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	if *output != "" {
		return b.write(*output, where)
	}
	return nil
}

// bench is one run.
type bench struct {
	ctx    context.Context
	dir    string
	state  string
	self   string // this program
	rounds int
	span   time.Duration // of one round of one workload

	lunshift, gotgtd string // built
	ends             []func() error
	made             int // directories made so far
	tables           []*table
}

// build builds the programs that are compared, as lunshift ships.
func (b *bench) build() error {
	b.lunshift, b.gotgtd = filepath.Join(b.dir, "lunshift"), filepath.Join(b.dir, "gotgtd")
	for _, p := range []struct{ out, pkg string }{{b.lunshift, "lunshift/cmd/lunshift"}, {b.gotgtd, "lunshift/tests/bench/gotgtd"}} {
		cmd := exec.CommandContext(b.ctx, "go", "build", "-trimpath", "-o", p.out, p.pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("build %s: %w", p.pkg, err)
		}
	}
	return nil
}

// atEnd has f called when the part is over.
func (b *bench) atEnd(f func() error) { b.ends = append(b.ends, f) }

func (b *bench) endAll() error {
	var err error
	for i := len(b.ends) - 1; i >= 0; i-- {
		err = errors.Join(err, b.ends[i]())
	}
	b.ends = nil
	return err
}

// subdir makes a directory of its own, for what is not a LUN.
func (b *bench) subdir() (string, error) {
	b.made++
	dir := filepath.Join(b.state, fmt.Sprint(b.made))
	return dir, os.Mkdir(dir, 0o700)
}

// busy is the load average of the last minute: what else runs takes its share.
func busy() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(text), " ")
	return first
}

// machine is one line on what the figures were measured on.
func machine() string {
	model := runtime.GOARCH
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	kernel := "unknown"
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = strings.TrimSpace(string(text))
	}
	return fmt.Sprintf("%s, %d cores, Linux %s, %s, %s", model, runtime.NumCPU(), kernel, runtime.Version(), time.Now().Format(time.DateOnly))
}
