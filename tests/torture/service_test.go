package torture

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"lunshift/control"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/tests/peer"
)

const (
	volumeName = "db01"
	frontIQN   = "iqn.2026-11.net.example:" // and the volume's name
	regionSize = 64 << 10
)

// volume is a [[volume]] of the configuration.
type volume struct {
	name, source, destination string
	more                      string // further lines
}

// service is one lunshift. What has no volume's name is of the first one.
type service struct {
	t     testing.TB
	first string // volume
	// reuse has starts take what the destination holds.
	reuse  bool
	dir    string
	portal string
	client *control.Client

	cmd    *exec.Cmd
	log    *os.File
	exited chan error
}

// newService writes the configuration; nothing runs yet.
func newService(t testing.TB, stateDir string, volumes ...volume) *service {
	t.Helper()
	// The control socket's path must fit sun_path, which t.TempDir may not.
	dir, err := os.MkdirTemp("", "lunshift")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &service{t: t, first: volumes[0].name, dir: dir, portal: peer.FreePort(t)}
	if stateDir == "" {
		stateDir = filepath.Join(dir, "state")
	}
	socket := filepath.Join(dir, "control.sock")
	s.client = control.NewClient(socket)
	text := fmt.Sprintf(`[service]
portals = [%q]
control = %q
http = ""
state = %q
initiator_name = "iqn.2026-11.net.example:gateway"
io_timeout = "20s"
`, s.portal, socket, stateDir)
	for _, v := range volumes {
		text += fmt.Sprintf(`
[[volume]]
name = %q
iqn = %q
lun = 0
source = %q
destination = %q
region_size = "%dKiB"
%s`, v.name, frontIQN+v.name, v.source, v.destination, regionSize>>10, v.more)
	}
	must(t, os.WriteFile(filepath.Join(dir, "lunshift.toml"), []byte(text), 0o600))
	s.log, err = os.Create(filepath.Join(dir, "serve.log"))
	must(t, err)
	t.Cleanup(func() {
		s.kill()
		s.log.Close()
		b, err := os.ReadFile(s.log.Name())
		if err != nil {
			t.Error(err)
		}
		if bytes.Contains(b, []byte("goroutine ")) {
			t.Error("lunshift panicked")
		}
		if t.Failed() {
			t.Logf("log of lunshift:\n%s", bytes.TrimSpace(b[max(0, len(b)-6000):]))
		}
	})
	return s
}

// start runs serve, to crash at point where that is not empty, and waits until
// it answers. False says that it has crashed already.
func (s *service) start(point string) bool {
	s.t.Helper()
	s.cmd = exec.Command(program, "--config", filepath.Join(s.dir, "lunshift.toml"), "serve")
	s.cmd.Env = append(os.Environ(), "LUNSHIFT_FAILPOINT="+point)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(s.t, s.cmd.Start())
	exited := make(chan error, 1)
	s.exited = exited
	cmd := s.cmd
	go func() { exited <- cmd.Wait() }()
	for deadline := time.Now().Add(peer.Patience); ; {
		_, err := s.client.Status(s.t.Context(), s.first)
		if err == nil {
			return true
		}
		select {
		case <-s.exited:
			s.exited <- nil
			if !s.killed() {
				s.t.Fatal("lunshift serve ended by itself at its start")
			}
			return false
		case <-time.After(3 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("lunshift serve does not answer: %v", err)
		}
	}
}

// killed tells whether the process, which has ended, was killed by a signal.
func (s *service) killed() bool {
	st, ok := s.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && st.Signaled() && st.Signal() == syscall.SIGKILL
}

// dead tells whether the process has ended, and fails the test where nothing killed it.
func (s *service) dead() bool {
	select {
	case err := <-s.exited:
		s.exited <- err
		if !s.killed() {
			s.t.Fatalf("lunshift serve ended by itself: %v", err)
		}
		return true
	default:
		return false
	}
}

// kill ends the service at once, as a crash.
func (s *service) kill() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Kill()
	<-s.exited
	s.cmd = nil
}

// phase asks for the phase; false where nobody answers.
func (s *service) status() (proxy.Status, bool) {
	st, err := s.client.Status(s.t.Context(), s.first)
	return st, err == nil
}

// mustStatus is status of a service that runs.
func (s *service) mustStatus() proxy.Status {
	s.t.Helper()
	st, ok := s.status()
	if !ok {
		s.t.Fatal("lunshift serve does not answer")
	}
	return st
}

// url is where initiators find a volume.
func (s *service) url(volume string) string {
	return fmt.Sprintf("iscsi://%s/%s/0", s.portal, frontIQN+volume)
}

// dial opens sessions with the volume.
func (s *service) dial(ctx context.Context, name string) (*lun.Initiator, error) {
	addr, err := lun.ParseAddress(s.url(s.first))
	if err != nil {
		return nil, err
	}
	return lun.DialInitiator(ctx, addr, lun.Options{InitiatorName: "iqn.2026-11.net.example:" + name, Sessions: 2, IOTimeout: peer.Patience})
}

// point of the last crash, as the log tells it.
func (s *service) point() string {
	b, err := os.ReadFile(s.log.Name())
	must(s.t, err)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	last := lines[len(lines)-1]
	if name, ok := strings.CutPrefix(last, "failpoint "); ok {
		return strings.TrimSuffix(name, " reached")
	}
	return ""
}
