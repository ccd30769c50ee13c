package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	volumeName = "suite"
	volumeIQN  = "iqn.2026-11.net.example:suite"
	volumeSize = 64 << 20 // bytes
	// patience is how long anything but the suite may take.
	patience = 2 * time.Minute
)

// service is one lunshift with a volume from a thin file to a thin file, behind two
// portals of two portal groups.
type service struct {
	binary, dir         string
	source, destination string
	urls                []string
	cmd                 *exec.Cmd
	exited              chan error
	log                 *os.File
}

// startService runs a lunshift in dir with a volume of that block length.
func startService(ctx context.Context, binary, dir string, block int) (*service, error) {
	s := &service{binary: binary, dir: dir,
		source: filepath.Join(dir, "source.img"), destination: filepath.Join(dir, "destination.img")}
	if err := thinFile(s.source, true); err != nil {
		return nil, err
	}
	if err := thinFile(s.destination, false); err != nil {
		return nil, err
	}
	var portals []string
	for group := 1; group <= 2; group++ {
		address, err := freePort()
		if err != nil {
			return nil, err
		}
		portals = append(portals, fmt.Sprintf("%q", fmt.Sprintf("%s,%d", address, group)))
		s.urls = append(s.urls, fmt.Sprintf("iscsi://%s/%s/0", address, volumeIQN))
	}
	conf := fmt.Sprintf("[service]\nportals = [%s]\ncontrol = %q\nhttp = \"\"\nstate = %q\n[[volume]]\nname = %q\niqn = %q\nsource = %q\ndestination = %q\nfile_block_size = %d\n",
		strings.Join(portals, ", "), s.control(), filepath.Join(dir, "state"), volumeName, volumeIQN, s.source, s.destination, block)
	if err := os.WriteFile(s.config(), []byte(conf), 0o600); err != nil {
		return nil, err
	}
	var err error
	if s.log, err = os.Create(filepath.Join(dir, "serve.log")); err != nil {
		return nil, err
	}
	s.cmd = exec.Command(binary, "--config", s.config(), "serve")
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, errors.Join(err, s.log.Close())
	}
	s.exited = make(chan error, 1)
	go func() { s.exited <- s.cmd.Wait() }()
	if err := s.until(ctx, func(st status) bool { return st.Phase == "ready" }); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

func (s *service) config() string  { return filepath.Join(s.dir, "lunshift.toml") }
func (s *service) control() string { return filepath.Join(s.dir, "control.sock") }

// run runs a command of lunshift.
func (s *service) run(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.binary, append([]string{"--config", s.config()}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("lunshift %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

// status is what `lunshift status --json` says of the volume.
type status struct {
	Phase     string `json:"phase"`
	Paused    bool   `json:"paused"`
	Copied    uint64 `json:"copied_bytes"`
	Remaining uint64 `json:"remaining_bytes"`
}

// until waits for the volume to be as wanted.
func (s *service) until(ctx context.Context, as func(status) bool) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		out, err := s.run(ctx, "status", volumeName, "--json")
		if err == nil {
			var st status
			if err = json.Unmarshal(out, &st); err == nil && as(st) {
				return nil
			}
			if err == nil {
				err = fmt.Errorf("the volume stays %s", out)
			}
		}
		select {
		case exit := <-s.exited:
			s.exited <- exit
			return fmt.Errorf("lunshift ended: %v (see %s)", exit, s.log.Name())
		case <-ctx.Done():
			return fmt.Errorf("lunshift is not as wanted: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// phases are those in which the suite runs, in the order of a migration.
var phases = []string{"ready", "migrating", "synced"}

// copiedAtMost is how much of the volume is copied when the suite runs in migrating, in bytes:
// nearly all that has storage has it on the source alone, also where the cases read and write.
const copiedAtMost = 1 << 20

// enter brings a volume that is ready into a phase and keeps it there. In migrating the copy
// has hardly begun and is paused.
func (s *service) enter(ctx context.Context, phase string) error {
	var err error
	step := func(args ...string) {
		if err == nil {
			_, err = s.run(ctx, args...)
		}
	}
	switch phase {
	case "migrating":
		step("throttle", volumeName, "--rate", "1")
		step("start", volumeName)
		step("pause", volumeName)
	case "synced":
		step("start", volumeName)
	}
	if err == nil {
		err = s.until(ctx, func(st status) bool {
			return st.Phase == phase && (phase != "migrating" || st.Paused && st.Copied <= copiedAtMost && st.Remaining >= volumeSize/2)
		})
	}
	if err != nil {
		return fmt.Errorf("phase %s: %w", phase, err)
	}
	return nil
}

// leave ends the service. A migration is done with first: what the suite did must not keep
// the copy from its end, and what it did not write must be the same on both sides.
func (s *service) leave(ctx context.Context, phase string) error {
	err := s.still(ctx, phase)
	if phase == "migrating" && err == nil {
		_, one := s.run(ctx, "throttle", volumeName, "--rate", "0")
		_, two := s.run(ctx, "resume", volumeName)
		err = errors.Join(one, two, s.until(ctx, func(st status) bool { return st.Phase == "synced" }))
	}
	if phase != "ready" && err == nil {
		_, err = s.run(ctx, "verify", volumeName)
	}
	err = errors.Join(err, s.stop())
	if lines, e := s.faults(); e != nil || len(lines) > 0 {
		err = errors.Join(err, e, fmt.Errorf("the service logged %q", lines))
	}
	return err
}

// still tells whether the volume is in the phase, with an error that says where it is if
// not.
func (s *service) still(ctx context.Context, phase string) error {
	out, err := s.run(ctx, "status", volumeName, "--json")
	if err != nil {
		return err
	}
	var st status
	if err := json.Unmarshal(out, &st); err != nil {
		return err
	}
	if st.Phase != phase || st.Paused != (phase == "migrating") {
		return fmt.Errorf("the volume left phase %s: %s", phase, out)
	}
	return nil
}

// stop ends the service as SIGTERM does.
func (s *service) stop() error {
	if s.cmd == nil {
		return nil
	}
	err := s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case exit := <-s.exited:
		err = exit
	case <-time.After(patience):
		err = errors.Join(errors.New("lunshift did not stop"), s.cmd.Process.Kill(), <-s.exited)
	}
	s.cmd = nil
	return errors.Join(err, s.log.Close())
}

// faults are the lines of the log that a suite must not bring about.
func (s *service) faults() ([]string, error) {
	b, err := os.ReadFile(s.log.Name())
	var lines []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "goroutine ") || strings.Contains(line, "level=error") || strings.Contains(line, "DATA RACE") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines, err
}

// thinFile makes a file of volumeSize. One that is filled holds random data where the cases
// write and read most: the first half and the last eighth have storage, what is between
// has none.
func thinFile(path string, filled bool) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(volumeSize)
	for _, part := range []struct{ at, n int64 }{{0, volumeSize / 2}, {volumeSize - volumeSize/8, volumeSize / 8}} {
		if filled && err == nil {
			_, err = io.CopyN(io.NewOffsetWriter(f, part.at), rand.Reader, part.n)
		}
	}
	return errors.Join(err, f.Close())
}

// freePort is a loopback address that nobody listens on.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
