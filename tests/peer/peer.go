// Package peer runs the programs that the tests talk to and that nobody of this
// project wrote: tgtd as an array, qemu-io, qemu-img and libiscsi's tools as
// initiators. It also makes the content that they write and compare.
//
// Every process it starts listens on 127.0.0.1 alone, on a port of its own, and
// is ended by its own process id.
package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Need fails the test unless every tool is installed; tests/install.sh installs
// them.
func Need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := lookPath(tool); err != nil {
			t.Fatalf("%s is not installed: run tests/install.sh", tool)
		}
	}
}

// lookPath finds a tool also where only root's PATH would.
func lookPath(tool string) (string, error) {
	if path, err := exec.LookPath(tool); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, tool)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", tool)
}

// ToolError is a tool that did not exit with 0.
type ToolError struct {
	Tool   string
	Status int // exit status, or -1 where a signal ended it
	Output string
}

func (e *ToolError) Error() string {
	return fmt.Sprintf("%s: exit status %d: %s", e.Tool, e.Status, strings.TrimSpace(e.Output))
}

// Run runs a tool and returns what it wrote to stdout and stderr, together.
// A status other than 0 is a *ToolError.
func Run(ctx context.Context, tool string, args ...string) (string, error) {
	path, err := lookPath(tool)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = dieWithTest()
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return out.String(), &ToolError{Tool: tool, Status: exit.ExitCode(), Output: out.String()}
	}
	return out.String(), err
}

// dieWithTest ends a process that is started with it with the tests that started it, however
// these end.
func dieWithTest() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }

// LUN is where a logical unit is found, and how an initiator logs in.
type LUN struct {
	Portal string // host:port
	IQN    string
	Number uint64

	// Initiator is the initiator name; empty lets the tool choose one.
	Initiator string
	// User and Secret are for CHAP; empty is none.
	User, Secret string
	// TargetUser and TargetSecret are what the target must prove in turn; empty asks for
	// no proof. QEMU cannot ask.
	TargetUser, TargetSecret string
}

// URL is the address as lunshift writes it; the secret is not in it.
func (l LUN) URL() string {
	user := ""
	if l.User != "" {
		user = l.User + "@"
	}
	return fmt.Sprintf("iscsi://%s%s/%s/%d", user, l.Portal, l.IQN, l.Number)
}

// toolURL is the address as libiscsi's tools take it.
func (l LUN) toolURL() string {
	user := ""
	if l.User != "" {
		user = l.User + "%" + l.Secret + "@"
	}
	target := ""
	if l.TargetUser != "" {
		target = "?" + url.Values{"target_user": {l.TargetUser}, "target_password": {l.TargetSecret}}.Encode()
	}
	return fmt.Sprintf("iscsi://%s%s/%s/%d%s", user, l.Portal, l.IQN, l.Number, target)
}

// Inquiry runs iscsi-inq; with page at least 0 it asks for that VPD page.
func (l LUN) Inquiry(ctx context.Context, page int) (string, error) {
	args := l.initiatorArgs()
	if page >= 0 {
		args = append(args, "-e", "1", "-c", strconv.Itoa(page))
	}
	return Run(ctx, "iscsi-inq", append(args, l.toolURL())...)
}

// ReadCapacity runs iscsi-readcapacity16.
func (l LUN) ReadCapacity(ctx context.Context) (string, error) {
	return Run(ctx, "iscsi-readcapacity16", append(l.initiatorArgs(), l.toolURL())...)
}

// List runs iscsi-ls against the portal, with its logical units.
func (l LUN) List(ctx context.Context) (string, error) {
	portal, _, _ := strings.Cut(l.toolURL(), "/"+l.IQN)
	return Run(ctx, "iscsi-ls", append(l.initiatorArgs(), "-s", portal)...)
}

// Discover runs iscsi-ls against the portal: the targets, each with its portals.
func (l LUN) Discover(ctx context.Context) (string, error) {
	portal, _, _ := strings.Cut(l.toolURL(), "/"+l.IQN)
	return Run(ctx, "iscsi-ls", append(l.initiatorArgs(), portal)...)
}

func (l LUN) initiatorArgs() []string {
	if l.Initiator == "" {
		return nil
	}
	return []string{"-i", l.Initiator}
}

// CPUTime is the processor time, user and system together, that a process has
// used so far. Its grain is 10 ms.
func CPUTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The command name may hold anything; what follows its last ")" is regular
	// (proc(5)): utime and stime are then fields 12 and 13.
	_, rest, ok := strings.Cut(string(b[bytes.LastIndexByte(b, ')'):]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: cannot be read: %q", pid, b)
	}
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		ticks += n
	}
	const ticksPerSecond = 100 // USER_HZ, the same on every Linux architecture that Go knows
	return time.Duration(ticks) * time.Second / ticksPerSecond, nil
}

// Allocated is how many bytes of storage the file system gave to a file.
func Allocated(path string) (uint64, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return uint64(st.Blocks) * 512, nil
}

// Partition has sfdisk write a partition table into an image by a script of its own.
func Partition(ctx context.Context, image, script string) error {
	path, err := lookPath("sfdisk")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, "--no-reread", "--no-tell-kernel", "-q", image)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return &ToolError{Tool: "sfdisk", Status: cmd.ProcessState.ExitCode(), Output: string(out)}
	}
	return nil
}
