package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"
)

// Guest is one running virtual machine, at 10.0.0.30.
type Guest struct {
	cmd     *exec.Cmd
	console *os.File
	exited  chan error
}

// agentAddress is where the guest takes scripts.
const agentAddress = "10.0.0.30:5000"

// Boot starts the guest on the network interface tap and returns when it takes scripts. Its
// console goes to the file at console.
func Boot(ctx context.Context, image Image, tap, console string) (*Guest, error) {
	out, err := os.OpenFile(console, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	// Emulation boots in seconds and works everywhere; on a machine that is a guest itself
	// KVM may be there and halt the guest with an internal error.
	accel, cpu := "tcg", "max"
	if os.Getenv("LUNSHIFT_VM_KVM") != "" {
		accel, cpu = "kvm", "host"
	}
	cmd := exec.Command("qemu-system-x86_64", "-accel", accel, "-cpu", cpu, "-machine", "q35", "-m", "768", "-smp", "1",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", image.Kernel, "-initrd", image.Disk, "-append", "console=ttyS0 panic=-1 quiet mitigations=off",
		"-netdev", "tap,id=n0,ifname="+tap+",script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0,romfile=")
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, out.Close())
	}
	g := &Guest{cmd: cmd, console: out, exited: make(chan error, 1)}
	go func() { g.exited <- cmd.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for {
		if _, err := g.Run(ctx, "true"); err == nil {
			return g, nil
		}
		select {
		case err := <-g.exited:
			g.exited <- err
			return nil, fmt.Errorf("the guest ended by itself: %v (its console is %s)", err, console)
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("the guest does not answer (its console is %s)", console), g.Kill())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// ScriptError is a script that did not exit with 0.
type ScriptError struct {
	Script, Output string
	Status         int
}

func (e *ScriptError) Error() string {
	return fmt.Sprintf("status %d of\n%s\n%s", e.Status, e.Script, e.Output)
}

// Run runs a shell script in the guest and returns what it wrote. A status other than 0 is a
// *ScriptError. Any number of scripts may run at once.
func (g *Guest) Run(ctx context.Context, script string) (string, error) {
	d := net.Dialer{Timeout: 2 * time.Second}
	c, err := d.DialContext(ctx, "tcp", agentAddress)
	if err != nil {
		return "", err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if _, err := io.WriteString(c, script); err != nil {
		return "", err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	out, err := io.ReadAll(c)
	if err != nil {
		return string(out), errors.Join(err, context.Cause(ctx))
	}
	i := bytes.LastIndex(out, []byte("\nstatus "))
	if i < 0 {
		return string(out), fmt.Errorf("the guest broke off: %s", out)
	}
	status, err := strconv.Atoi(string(bytes.TrimSpace(out[i+len("\nstatus "):])))
	if err != nil {
		return string(out), err
	}
	if status != 0 {
		return string(out[:i]), &ScriptError{script, string(out[:i]), status}
	}
	return string(out[:i]), nil
}

// Kill ends the guest at once, as a power failure would.
func (g *Guest) Kill() error {
	if g.cmd == nil {
		return nil
	}
	if err := g.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-g.exited
	g.cmd = nil
	return g.console.Close()
}
