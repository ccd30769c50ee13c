package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"lunshift/tests/peer"
)

// server is something that serves a logical unit.
type server struct {
	name string
	unit peer.LUN
	pid  int
}

// freePort is a port that nobody listens on, below those that the kernel gives
// to outgoing connections.
func freePort() (int, error) {
	for range 1000 {
		port := 20000 + rand.IntN(10000)
		if l, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port")
}

// spawn starts a program that is ended with the part.
func (b *bench) spawn(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	b.atEnd(func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case <-ended: // a signal's exit status is no fault here
			return nil
		case <-time.After(10 * time.Second):
			cmd.Process.Kill()
			<-ended
			return fmt.Errorf("%s did not end within 10 s of SIGTERM", filepath.Base(cmd.Path))
		}
	})
	return nil
}

// file makes a file of size bytes of which share is written.
func (b *bench) file(name string, size uint64, share float64) (string, error) {
	path := filepath.Join(b.dir, name)
	if share == 0 {
		return path, peer.EmptyFile(path, size)
	}
	_, err := peer.SparseFile(path, size, share, 1)
	return path, err
}

// tgtd serves files as LUN 1 and up of a tgtd of its own.
func (b *bench) tgtd(iqn string, thin bool, paths ...string) (*peer.Tgtd, error) {
	// The control socket's path must be short.
	dir, err := b.subdir()
	if err != nil {
		return nil, err
	}
	d, err := peer.NewTgtd(b.ctx, dir)
	if err != nil {
		return nil, err
	}
	b.atEnd(d.Close)
	var units []peer.Unit
	for _, p := range paths {
		units = append(units, peer.Unit{Path: p, Thin: thin})
	}
	return d, d.AddTarget(b.ctx, iqn, units)
}

// gotgt serves a file as LUN 1 with gotgt's stock port.
func (b *bench) gotgt(path string) (server, error) {
	port, err := freePort()
	if err != nil {
		return server{}, err
	}
	const iqn = "iqn.2026-11.net.example.bench:gotgt"
	cmd := exec.Command(b.gotgtd, "-file", path, "-iqn", iqn, "-port", strconv.Itoa(port))
	cmd.Stderr = os.Stderr
	if err := b.spawn(cmd); err != nil {
		return server{}, err
	}
	unit := peer.LUN{Portal: fmt.Sprintf("127.0.0.1:%d", port), IQN: iqn, Number: 1}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", unit.Portal); err == nil {
			c.Close()
			return server{"gotgt", unit, cmd.Process.Pid}, nil
		}
		if time.Now().After(deadline) {
			return server{}, errors.New("gotgt does not listen")
		}
	}
}

// slowArray serves files as LUN 1 and up with a delay on every read and write.
func (b *bench) slowArray(iqn string, delay time.Duration, paths ...string) (portal string, pid int, err error) {
	return b.array(append([]string{"-delay", delay.String(), "-iqn", iqn}, paths...)...)
}

// array runs an array with these arguments of its role.
func (b *bench) array(args ...string) (portal string, pid int, err error) {
	cmd := exec.Command(b.self, append([]string{"array"}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", 0, err
	}
	cmd.Stderr = os.Stderr
	if err := b.spawn(cmd); err != nil {
		return "", 0, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return "", 0, fmt.Errorf("the slow array did not start: %w", err)
	}
	return strings.TrimSpace(line), cmd.Process.Pid, nil
}

// gateway is a running lunshift with one volume.
type gateway struct {
	server
	b      *bench
	config string
}

const volumeName = "bench"

// serve runs lunshift on a volume from source to destination, in phase ready, with more
// lines in its table.
func (b *bench) serve(source, destination string, more ...string) (*gateway, error) {
	dir, err := b.subdir()
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	portal := fmt.Sprintf("127.0.0.1:%d", port)
	const iqn = "iqn.2026-11.net.example.bench:lunshift"
	text := fmt.Sprintf("[service]\nportals = [%q]\ncontrol = %q\nhttp = \"\"\nstate = %q\nlog_level = \"warn\"\n\n"+
		"[service.limits]\nconnections = 2000\nconnections_per_address = 2000\nsessions_per_volume = 2000\n\n"+
		"[[volume]]\nname = %q\niqn = %q\nlun = 1\nsource = %q\ndestination = %q\noverwrite = true\n%s\n",
		portal, filepath.Join(dir, "control.sock"), filepath.Join(dir, "state"), volumeName, iqn, source, destination, strings.Join(more, "\n"))
	g := &gateway{b: b, config: filepath.Join(dir, "lunshift.toml")}
	if err := os.WriteFile(g.config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(b.lunshift, "--config", g.config, "serve")
	cmd.Stderr = os.Stderr
	if err := b.spawn(cmd); err != nil {
		return nil, err
	}
	g.server = server{"lunshift", peer.LUN{Portal: portal, IQN: iqn, Number: 1}, cmd.Process.Pid}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := g.command("status")
		if err == nil {
			return g, g.adopt()
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("lunshift does not answer: %w", err)
		}
	}
}

// adopt says that the volume is new, where its destination holds data.
func (g *gateway) adopt() error {
	err := g.command("adopt", volumeName, "--new")
	var exit *exec.ExitError
	const known = 3 // the state knows it: the destination is blank
	if errors.As(err, &exit) && exit.ExitCode() == known {
		return nil
	}
	return err
}

// command runs one lunshift command against the gateway.
func (g *gateway) command(args ...string) error {
	cmd := exec.CommandContext(g.b.ctx, g.b.lunshift, append([]string{"--config", g.config}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("lunshift %v: %w: %s", args, err, bytes.TrimSpace(out))
	}
	return nil
}

// load runs one workload against a unit from a process of its own, and watches the
// processor time of pids.
func (b *bench) load(unit peer.LUN, w work, pids ...int) (outcome, error) {
	text, err := json.Marshal(w)
	if err != nil {
		return outcome{}, err
	}
	watch, err := json.Marshal(pids)
	if err != nil {
		return outcome{}, err
	}
	cmd := exec.CommandContext(b.ctx, b.self, "load", "-address", unit.URL(), "-work", string(text), "-for", b.span.String(), "-pids", string(watch))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// An I/O that is never answered must not stop the run.
	kill := time.AfterFunc(10*b.span+30*time.Second, func() { cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Run(); err != nil {
		return outcome{}, fmt.Errorf("load of %v: %w: %s", w, err, bytes.TrimSpace(stderr.Bytes()))
	}
	var o outcome
	return o, json.Unmarshal(stdout.Bytes(), &o)
}
