package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"lunshift/tests/peer"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// Exit codes of the commands.
const (
	done        = 0
	failed      = 1
	usage       = 2
	wrongPhase  = 3
	commandTime = 2 * time.Minute // more than any command of these tests takes
)

// volume is one [[volume]] of the configuration.
type volume struct {
	name, iqn           string
	lun                 uint64
	source, destination string
	block               uint32 // of plain files
	more                string // further lines
}

// service is one lunshift with its own directory and configuration.
type service struct {
	t       *testing.T
	dir     string
	portal  string
	http    string
	state   string
	volumes []volume
	portals []string // besides portal, as the configuration has them
	more    string   // further lines of [service], and tables below it
	env     []string // of every command
	// ioTimeout is io_timeout, 20s where empty.
	ioTimeout string

	cmd    *exec.Cmd
	log    *os.File
	exited chan error
}

// frontIQN is where initiators find the volume of that name.
func frontIQN(name string) string { return "iqn.2026-11.net.example:" + name }

// newService writes the configuration; nothing runs yet.
func newService(t *testing.T, volumes ...volume) *service {
	t.Helper()
	// The control socket's path must fit sun_path, which t.TempDir may not.
	dir, err := os.MkdirTemp("", "lunshift")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &service{t: t, dir: dir, portal: peer.FreePort(t), state: filepath.Join(dir, "state"), volumes: volumes}
	s.configure()
	s.log, err = os.Create(filepath.Join(dir, "serve.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.kill()
		s.log.Close()
		b, err := os.ReadFile(s.log.Name())
		if err != nil {
			t.Error(err)
		}
		if bytes.Contains(b, []byte("goroutine ")) || bytes.Contains(b, []byte("DATA RACE")) {
			t.Error("lunshift panicked or raced")
		}
		if t.Failed() {
			t.Logf("log of lunshift:\n%s", bytes.TrimSpace(b[max(0, len(b)-20000):]))
		}
	})
	return s
}

func (s *service) config() string { return filepath.Join(s.dir, "lunshift.toml") }

// configure writes the configuration of the volumes as they stand.
func (s *service) configure() {
	s.t.Helper()
	var b bytes.Buffer
	portals, err := json.Marshal(append([]string{s.portal}, s.portals...))
	must(s.t, err)
	fmt.Fprintf(&b, "[service]\nportals = %s\ncontrol = %q\nhttp = %q\nstate = %q\n", portals,
		filepath.Join(s.dir, "control.sock"), s.http, s.state)
	fmt.Fprintf(&b, "initiator_name = \"iqn.2026-11.net.example:gateway\"\nlogin_timeout = \"5s\"\nio_timeout = %q\n%s", cmp.Or(s.ioTimeout, "20s"), s.more)
	for _, v := range s.volumes {
		if v.iqn == "" {
			v.iqn = frontIQN(v.name)
		}
		fmt.Fprintf(&b, "\n[[volume]]\nname = %q\niqn = %q\nlun = %d\nsource = %q\ndestination = %q\n",
			v.name, v.iqn, v.lun, v.source, v.destination)
		if v.block != 0 {
			fmt.Fprintf(&b, "file_block_size = %d\n", v.block)
		}
		b.WriteString(v.more)
	}
	if err := os.WriteFile(s.config(), b.Bytes(), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// result is what a command left.
type result struct {
	stdout, stderr string
	code           int
}

// try runs a command to its end.
func (s *service) try(args ...string) result {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append([]string{"--config", s.config()}, args...)...)
	cmd.Env = append(os.Environ(), s.env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("lunshift %v: %v", args, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// run runs a command that must succeed and gives its standard output.
func (s *service) run(args ...string) string {
	s.t.Helper()
	r := s.try(args...)
	if r.code != done {
		s.t.Fatalf("lunshift %v: exit code %d: %s", args, r.code, r.stderr)
	}
	return r.stdout
}

// fails runs a command that must end with code and with exactly one line on
// standard error, which holds every one of the words.
func (s *service) fails(code int, words []string, args ...string) {
	s.t.Helper()
	r := s.try(args...)
	if r.code != code {
		s.t.Errorf("lunshift %v: exit code %d, want %d (stdout %q, stderr %q)", args, r.code, code, r.stdout, r.stderr)
		return
	}
	s.oneLine(r.stderr, words, args...)
}

func (s *service) oneLine(stderr string, words []string, args ...string) {
	s.t.Helper()
	line, ok := strings.CutSuffix(stderr, "\n")
	if !ok || line == "" || strings.Contains(line, "\n") {
		s.t.Errorf("lunshift %v: want one line on stderr, have %q", args, stderr)
	}
	for _, w := range words {
		if !strings.Contains(line, w) {
			s.t.Errorf("lunshift %v: the line lacks %q: %s", args, w, line)
		}
	}
}

// start runs serve and waits until it answers.
func (s *service) start() {
	s.t.Helper()
	s.launch()
	deadline := time.Now().Add(30 * time.Second)
	for {
		r := s.try("status", "--json")
		if r.code == done {
			return
		}
		select {
		case err := <-s.exited:
			s.exited <- err
			s.t.Fatalf("lunshift serve ended: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("lunshift serve does not answer: %s", r.stderr)
		}
	}
}

func (s *service) launch() {
	s.t.Helper()
	s.cmd = exec.Command(binary, "--config", s.config(), "serve")
	s.cmd.Env = append(os.Environ(), s.env...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	exited := make(chan error, 1)
	s.exited = exited
	cmd := s.cmd
	go func() { exited <- cmd.Wait() }()
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

// stop ends the service as an administrator does, and wants exit code 0.
func (s *service) stop() {
	s.t.Helper()
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-s.exited:
		s.cmd = nil
		if err != nil {
			s.t.Errorf("lunshift serve, told to stop: %v", err)
		}
	case <-time.After(40 * time.Second):
		s.t.Error("lunshift serve does not stop within 40 s of SIGTERM")
		s.kill()
	}
}

// status is what these tests read of status --json.
type status struct {
	Name             string  `json:"name"`
	Phase            string  `json:"phase"`
	Paused           bool    `json:"paused"`
	Degraded         bool    `json:"degraded"`
	DegradedReason   string  `json:"degraded_reason"`
	Size             uint64  `json:"size_bytes"`
	BlockSize        uint32  `json:"block_size"`
	Allocated        uint64  `json:"allocated_bytes"`
	Copied           uint64  `json:"copied_bytes"`
	Unused           uint64  `json:"unused_bytes"`
	Skipped          uint64  `json:"skipped_bytes"`
	Compare          bool    `json:"compare"`
	Compared         uint64  `json:"compared_bytes"`
	Equal            uint64  `json:"equal_bytes"`
	InitiatorWritten uint64  `json:"initiator_written_bytes"`
	Remaining        uint64  `json:"remaining_bytes"`
	Rate             float64 `json:"copy_rate_bytes_per_second"`
	ETA              *int64  `json:"eta_seconds"`
	Sessions         []struct {
		Initiator string    `json:"initiator"`
		Address   string    `json:"address"`
		Since     time.Time `json:"since"`
		Group     uint16    `json:"portal_group"`
		CHAPUser  string    `json:"chap_user"`
	} `json:"sessions"`
	Source      struct{ State string } `json:"source"`
	Destination struct{ State string } `json:"destination"`
}

func (s *service) status(name string) status {
	s.t.Helper()
	text := s.run("status", name, "--json")
	var st status
	if err := json.Unmarshal([]byte(text), &st); err != nil || st.Name != name {
		s.t.Fatalf("status %s --json: %v: %s", name, err, text)
	}
	return st
}

// until polls the status of a volume until ok says so.
func (s *service) until(name, what string, ok func(status) bool) status {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		st := s.status(name)
		if ok(st) {
			return st
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("volume %s: not %s within a minute: %+v", name, what, st)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// untilLog waits until the log holds words at least count times.
func (s *service) untilLog(words string, count int) {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(s.log.Name())
		must(s.t, err)
		if bytes.Count(b, []byte(words)) >= count {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the log does not say %q within a minute", words)
		}
	}
}

// front is the volume as initiators meet it.
func (s *service) front(name string) peer.LUN {
	return peer.LUN{Portal: s.portal, IQN: frontIQN(name), Initiator: "iqn.2026-11.net.example:host"}
}

// array is a tgtd with one target.
type array struct {
	*peer.Tgtd
	iqn   string
	units []peer.Unit
}

func newArray(t *testing.T, name string, units ...peer.Unit) *array {
	t.Helper()
	a := &array{Tgtd: peer.StartTgtd(t), iqn: "iqn.2001-04.com.example:" + name, units: units}
	if err := a.AddTarget(t.Context(), a.iqn, units); err != nil {
		t.Fatal(err)
	}
	return a
}

// unit is the array's logical unit with this number, reached directly.
func (a *array) unit(number uint64) peer.LUN {
	l := a.LUN(a.iqn, number)
	l.Initiator = "iqn.2026-11.net.example:host"
	return l
}

func needTools(t *testing.T) {
	t.Helper()
	peer.Need(t, "tgtd", "tgtadm", "qemu-io", "qemu-img", "iscsi-inq", "iscsi-ls", "iscsi-readcapacity16")
}

func sparseFile(t *testing.T, dir, name string, size uint64, share float64, seed uint64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if _, err := peer.SparseFile(path, size, share, seed); err != nil {
		t.Fatal(err)
	}
	return path
}

func emptyFile(t *testing.T, dir, name string, size uint64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := peer.EmptyFile(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// must fails the test at once on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
