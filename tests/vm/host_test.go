package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"lunshift/tests/peer"
)

const mib = 1 << 20

// gateway is one lunshift at 10.0.0.20:3260 with its configuration.
type gateway struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	exited chan error
}

// newGateway writes the configuration: volumes is what follows [service].
func newGateway(t *testing.T, volumes string) *gateway {
	t.Helper()
	dir, err := os.MkdirTemp("", "lunshift")
	must(t, err)
	g := &gateway{t: t, dir: dir}
	g.configure(volumes)
	t.Cleanup(func() {
		g.kill()
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "serve.log"))
			t.Logf("log of lunshift:\n%s", bytes.TrimSpace(b))
		}
		os.RemoveAll(dir)
	})
	return g
}

func (g *gateway) configure(volumes string) {
	g.t.Helper()
	must(g.t, os.WriteFile(g.config(), fmt.Appendf(nil, `[service]
portals = ["10.0.0.20:3260"]
control = %q
http = ""
state = %q
initiator_name = "iqn.2026-11.net.example:gw"
%s`, filepath.Join(g.dir, "control.sock"), filepath.Join(g.dir, "state"), volumes), 0o600))
}

func (g *gateway) config() string { return filepath.Join(g.dir, "lunshift.toml") }

// start runs the service and waits until initiators can connect.
func (g *gateway) start() {
	g.t.Helper()
	log, err := os.OpenFile(filepath.Join(g.dir, "serve.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(g.t, err)
	defer log.Close()
	g.cmd = exec.Command(lunshift, "serve", "--config", g.config())
	g.cmd.Stdout, g.cmd.Stderr = log, log
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(g.t, g.cmd.Start())
	g.exited = make(chan error, 1)
	go func(cmd *exec.Cmd) { g.exited <- cmd.Wait() }(g.cmd)
	g.t.Log("lunshift runs")
	within(g.t, "lunshift's portal", func() error {
		select {
		case err := <-g.exited:
			g.exited <- err
			g.t.Fatalf("lunshift serve ended by itself: %v", err)
		default:
		}
		c, err := net.Dial("tcp", "10.0.0.20:3260")
		if err == nil {
			c.Close()
		}
		return err
	})
}

// kill ends the service as SIGKILL does.
func (g *gateway) kill() {
	if g.cmd == nil {
		return
	}
	g.cmd.Process.Kill()
	<-g.exited
	g.cmd = nil
}

// run runs a command of lunshift's, which must succeed.
func (g *gateway) run(args ...string) string {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, lunshift, append(args, "--config", g.config())...).CombinedOutput()
	if err != nil {
		g.t.Fatalf("lunshift %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// array is a tgtd on ip:3260 with one unit of size bytes, LUN 1 of iqn.
func array(t *testing.T, ip, iqn string, size int64) (*peer.Tgtd, string) {
	t.Helper()
	d := peer.StartTgtdOn(t, ip+":3260")
	path := filepath.Join(t.TempDir(), "disk")
	blank(t, path, size)
	must(t, d.AddTarget(t.Context(), iqn, []peer.Unit{{Path: path, Thin: true, ID: "ARRAY-" + ip, Serial: "SN-" + ip}}))
	return d, path
}

func blank(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	must(t, errors.Join(f.Truncate(size), f.Close()))
}

// boot starts a guest that the test's end ends.
func boot(t *testing.T) *Guest {
	t.Helper()
	console := filepath.Join(t.TempDir(), "console")
	g, err := Boot(t.Context(), image, tap, console)
	if err != nil {
		b, _ := os.ReadFile(console)
		t.Fatalf("%v\n%s", err, b)
	}
	t.Cleanup(func() {
		if t.Failed() && g.cmd != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			out, _ := g.Run(ctx, "dmesg | tail -60")
			t.Logf("the guest's kernel says:\n%s", out)
		}
		g.Kill()
	})
	return g
}

// in runs a script in the guest, which must succeed.
func in(t *testing.T, g *Guest, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	out, err := g.Run(ctx, script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// allocatedBytes is what the file takes on its file system.
func allocatedBytes(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	return st.Blocks * 512
}

// calm fails the test where the guest's kernel complains about its disks or its sessions,
// but for lines with one of the texts in but.
func calm(t *testing.T, g *Guest, but ...string) {
	t.Helper()
	for line := range strings.Lines(in(t, g, "dmesg")) {
		if slices.ContainsFunc(but, func(text string) bool { return strings.Contains(line, text) }) {
			continue
		}
		for _, bad := range []string{"I/O error", "Sense Key", "hostbyte", "conn error", "session recovery timed out",
			"Invalid", "FAILED", "EXT4-fs error", "JBD2:", "WARNING", "BUG:", "pdu (", "digest error"} {
			if strings.Contains(line, bad) {
				t.Errorf("the guest's kernel says: %s", line)
			}
		}
	}
}

// within waits up to a minute for a condition.
func within(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
