package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Tgtd is one tgtd process with a portal of its own. Its methods are not for
// concurrent use.
type Tgtd struct {
	dir    string
	portal string // host:port; the port is 0 until the first start
	log    *os.File

	cmd    *exec.Cmd
	exited chan error

	targets []target
	serial  int
}

type target struct {
	iqn      string
	units    []Unit
	accounts []Account
}

// Unit is a logical unit to serve. The first of a target is LUN 1 (LUN 0 is
// tgtd's controller), the next LUN 2.
type Unit struct {
	// Path is the backing file; its size is the unit's.
	Path string
	// BlockSize is the logical block length in bytes, 512 where 0.
	BlockSize uint32
	// Thin: the unit supports UNMAP and tells what is allocated.
	Thin bool
	// ID and Serial are what VPD pages 83h and 80h say; empty makes one that no
	// other unit of this package has.
	ID, Serial string
}

// Account is a CHAP account of a target: an initiator logs in with it, or, where
// Outgoing, the target proves itself with it.
type Account struct {
	User, Secret string
	Outgoing     bool
}

// NewTgtd starts a tgtd that serves nothing yet. It keeps its files in dir.
func NewTgtd(ctx context.Context, dir string) (*Tgtd, error) {
	return newTgtd(ctx, dir, "127.0.0.1:0")
}

func newTgtd(ctx context.Context, dir, portal string) (*Tgtd, error) {
	log, err := os.OpenFile(filepath.Join(dir, "tgtd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	d := &Tgtd{dir: dir, portal: portal, log: log}
	if err := d.start(ctx); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	return d, nil
}

// StartTgtd is NewTgtd for a test; the test's end ends it.
func StartTgtd(t testing.TB) *Tgtd {
	t.Helper()
	return StartTgtdOn(t, "127.0.0.1:0")
}

// StartTgtdOn is StartTgtd with a portal of the test's choice, host:port, for a test in a
// network namespace of its own.
func StartTgtdOn(t testing.TB, portal string) *Tgtd {
	t.Helper()
	Need(t, "tgtd", "tgtadm")
	// The control socket's path must fit sun_path, which t.TempDir may not.
	dir, err := os.MkdirTemp("", "tgtd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	d, err := newTgtd(t.Context(), dir, portal)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			if b, err := os.ReadFile(d.log.Name()); err == nil {
				t.Logf("log of tgtd on %s:\n%s", d.portal, bytes.TrimSpace(b))
			}
		}
	})
	return d
}

// Portal is the host:port where it listens; a restart keeps it.
func (d *Tgtd) Portal() string { return d.portal }

// PID is the id of the process that runs now.
func (d *Tgtd) PID() int { return d.cmd.Process.Pid }

// LUN is logical unit number of the target iqn, logged in to without CHAP.
func (d *Tgtd) LUN(iqn string, number uint64) LUN {
	return LUN{Portal: d.portal, IQN: iqn, Number: number}
}

// AddTarget serves units under iqn, to initiators that log in with one of the
// accounts; without accounts, to all.
func (d *Tgtd) AddTarget(ctx context.Context, iqn string, units []Unit, accounts ...Account) error {
	t := target{iqn: iqn, accounts: accounts}
	for _, u := range units {
		if strings.Contains(u.Path, ",") {
			return fmt.Errorf("serve %s: tgtadm takes no path with a comma: %s", iqn, u.Path)
		}
		d.serial++
		name := fmt.Sprintf("%s-%d", d.portal[strings.LastIndexByte(d.portal, ':')+1:], d.serial)
		if u.BlockSize == 0 {
			u.BlockSize = 512
		}
		// By itself tgtd gives the same ID to the first unit of every instance.
		if u.ID == "" {
			u.ID = "PEER-" + name
		}
		if u.Serial == "" {
			u.Serial = "SN-" + name
		}
		t.units = append(t.units, u)
	}
	d.targets = append(d.targets, t)
	return d.serve(ctx, len(d.targets))
}

// serve makes the target with this id, counted from 1, known to the process.
func (d *Tgtd) serve(ctx context.Context, id int) error {
	t := d.targets[id-1]
	tid := fmt.Sprint(id)
	steps := [][]string{{"--mode", "target", "--op", "new", "--tid", tid, "--targetname", t.iqn}}
	for i, u := range t.units {
		lun := fmt.Sprint(i + 1)
		thin := 0
		if u.Thin {
			thin = 1
		}
		steps = append(steps,
			[]string{"--mode", "logicalunit", "--op", "new", "--tid", tid, "--lun", lun,
				"--backing-store", u.Path, "--bstype", "rdwr", "--blocksize", fmt.Sprint(u.BlockSize)},
			[]string{"--mode", "logicalunit", "--op", "update", "--tid", tid, "--lun", lun, "--params",
				fmt.Sprintf("thin_provisioning=%d,scsi_id=%s,scsi_sn=%s", thin, u.ID, u.Serial)})
	}
	for _, a := range t.accounts {
		bind := []string{"--mode", "account", "--op", "bind", "--tid", tid, "--user", a.User}
		if a.Outgoing {
			bind = append(bind, "--outgoing")
		}
		steps = append(steps,
			[]string{"--mode", "account", "--op", "new", "--user", a.User, "--password", a.Secret}, bind)
	}
	// Initiators are let in last, when all is in place.
	steps = append(steps, []string{"--mode", "target", "--op", "bind", "--tid", tid, "--initiator-address", "ALL"})
	for _, args := range steps {
		if _, err := d.admin(ctx, args...); err != nil {
			return fmt.Errorf("serve %s: %w", t.iqn, err)
		}
	}
	return nil
}

var nexusLine = regexp.MustCompile(`(?m)^\s+Initiator: (\S+)`)

// Initiators are the names of the initiators logged in to the target now, one
// for each session.
func (d *Tgtd) Initiators(ctx context.Context, iqn string) ([]string, error) {
	out, err := d.admin(ctx, "--mode", "target", "--op", "show")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, section := range strings.Split("\n"+out, "\nTarget ") {
		head, _, _ := strings.Cut(section, "\n")
		if !strings.HasSuffix(head, ": "+iqn) {
			continue
		}
		for _, m := range nexusLine.FindAllStringSubmatch(section, -1) {
			names = append(names, m[1])
		}
	}
	return names, nil
}

// Kill ends the process at once, as a power failure of the array's controller
// would; what it wrote stays in the backing files.
func (d *Tgtd) Kill() error {
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	err := <-d.exited
	d.cmd = nil
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return nil
	}
	return fmt.Errorf("tgtd on %s had ended by itself: %v (its log is %s)", d.portal, err, d.log.Name())
}

// Stop halts the process without ending it, as an array that hangs; Continue
// undoes it.
func (d *Tgtd) Stop() error { return d.cmd.Process.Signal(syscall.SIGSTOP) }

// Continue undoes Stop.
func (d *Tgtd) Continue() error { return d.cmd.Process.Signal(syscall.SIGCONT) }

// Start runs the process again after Kill, on the same portal with the same
// targets.
func (d *Tgtd) Start(ctx context.Context) error {
	if err := d.start(ctx); err != nil {
		return err
	}
	for id := range d.targets {
		if err := d.serve(ctx, id+1); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the process.
func (d *Tgtd) Close() error {
	return errors.Join(d.Kill(), d.log.Close())
}

// start runs the process and waits until it takes orders.
func (d *Tgtd) start(ctx context.Context) error {
	path, err := lookPath("tgtd")
	if err != nil {
		return err
	}
	cmd := exec.Command(path, "-f", "-C", "1", "--iscsi", "portal="+d.portal)
	cmd.Env = append(os.Environ(), d.env())
	cmd.Stdout, cmd.Stderr = d.log, d.log
	// A test binary that is ended by force leaves no tgtd behind.
	cmd.SysProcAttr = dieWithTest()
	if err := cmd.Start(); err != nil {
		return err
	}
	d.cmd, d.exited = cmd, make(chan error, 1)
	go func() { d.exited <- cmd.Wait() }()

	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		out, err := d.admin(ctx, "--mode", "portal", "--op", "show")
		if err == nil {
			if portal, ok := parsePortal(out); ok {
				d.portal = portal
				return nil
			}
		}
		select {
		case exit := <-d.exited:
			d.exited <- exit
			return fmt.Errorf("tgtd on %s did not start: %v (its log is %s)", d.portal, exit, d.log.Name())
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("tgtd on %s does not answer: %w", d.portal, err), d.Kill())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// parsePortal takes the host:port from "Portal: 127.0.0.1:43421,1".
func parsePortal(out string) (string, bool) {
	_, rest, ok := strings.Cut(out, "Portal: ")
	portal, _, tag := strings.Cut(rest, ",")
	return portal, ok && tag && !strings.HasSuffix(portal, ":0")
}

// env keeps the control socket in the instance's own directory.
func (d *Tgtd) env() string { return "TGT_IPC_SOCKET=" + filepath.Join(d.dir, "control") }

func (d *Tgtd) admin(ctx context.Context, args ...string) (string, error) {
	path, err := lookPath("tgtadm")
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, path, append([]string{"-C", "1", "--lld", "iscsi"}, args...)...)
	cmd.Env = append(os.Environ(), d.env())
	cmd.SysProcAttr = dieWithTest()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("tgtadm: %w: %s", err, bytes.TrimSpace(out))
	}
	return string(out), nil
}
