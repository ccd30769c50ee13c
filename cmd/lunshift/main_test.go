package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"lunshift/control"
	"lunshift/lun"
	"lunshift/proxy"
)

// asCommand makes the test binary the command itself.
const asCommand = "LUNSHIFT_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
	}
	os.Exit(m.Run())
}

func command(args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = environment()
	return c
}

// environment makes a child a command, and spares it the second that the race
// detector waits at an exit.
func environment() []string {
	return append(os.Environ(), asCommand+"=1", "GORACE=atexit_sleep_ms=0")
}

// result is how a command ended.
type result struct {
	stdout, stderr string
	code           int
}

func lunshift(t *testing.T, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	c := command(args...)
	c.Stdout, c.Stderr = &stdout, &stderr
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{stdout.String(), stderr.String(), c.ProcessState.ExitCode()}
}

// configFile writes a configuration with two volumes on files and gives its path.
func configFile(t *testing.T, dir string) string {
	t.Helper()
	text := fmt.Sprintf("[service]\nportals = [\"127.0.0.1:0\"]\nhttp = \"\"\ncontrol = %q\nstate = %q\n",
		filepath.Join(dir, "c.sock"), filepath.Join(dir, "state"))
	for _, name := range []string{"db01", "db02"} {
		for _, side := range []string{"old", "new"} {
			f, err := os.Create(filepath.Join(dir, name+side))
			if err != nil {
				t.Fatal(err)
			}
			if side == "old" {
				_, err = f.Write(bytes.Repeat([]byte{7}, 8<<20))
			}
			if err := errors.Join(err, f.Truncate(16<<20), f.Close()); err != nil {
				t.Fatal(err)
			}
		}
		text += fmt.Sprintf("[[volume]]\nname = %q\niqn = \"iqn.2026-11.net.example:%s\"\nsource = %q\ndestination = %q\n",
			name, name, filepath.Join(dir, name+"old"), filepath.Join(dir, name+"new"))
	}
	path := filepath.Join(dir, "lunshift.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// spoil changes one byte of a block of db01's destination.
func spoil(t *testing.T, config string, block int64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(filepath.Dir(config), "db01new"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte{8}, block*512+100)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// errorOf reads the error that a command with --json gave, which is its only output.
func errorOf(t *testing.T, r result) (e struct{ Kind, Message string }) {
	t.Helper()
	var reply map[string]*struct{ Kind, Message string }
	if err := json.Unmarshal([]byte(r.stdout), &reply); err != nil || reply["error"] == nil || len(reply) != 1 {
		t.Errorf("no error in JSON: %q (%v)", r.stdout, err)
		return e
	}
	return *reply["error"]
}

func TestWrongUsageIsOneLineAndExitCode2(t *testing.T) {
	for _, args := range []string{
		"statsu", "start", "start a b", "status --wacth", "status a b", "serve now", "throttle db01",
		"throttle db01 --rate fast", "throttle db01 --rate -5", "wait db01", "wait db01 --for sinked",
		"wait db01 --for synced --timeout soon", "wait db01 --for synced --timeout -1s",
		"status --config a --control b", "help nosuch", "help status extra", "--nosuch",
		"cutover db01 --timeout 1s", "cutover db01 --wait --timeout -1s", "cutover db01 --wait --timeout soon",
		"demo --size 0", "demo --size 512KiB", "demo --size 1.5MiB", "demo --size 10485761", "demo --size big", "version extra", "check extra", "remove", "status --config",
	} {
		t.Run(args, func(t *testing.T) {
			r := lunshift(t, strings.Fields(args)...)
			if r.code != 2 || !strings.HasPrefix(r.stderr, "lunshift: ") || strings.Count(r.stderr, "\n") != 1 || r.stdout != "" {
				t.Errorf("exit %d, stderr %q, stdout %q", r.code, r.stderr, r.stdout)
			}
			for _, with := range [][]string{append([]string{"--json"}, strings.Fields(args)...), append(strings.Fields(args), "--json")} {
				if args == "status --config" && with[0] != "--json" {
					continue // --json is the name of the file there
				}
				r := lunshift(t, with...)
				if e := errorOf(t, r); r.code != 2 || e.Kind != "usage" || !strings.Contains(r.stderr, e.Message) || strings.Count(r.stderr, "\n") != 1 {
					t.Errorf("%v: exit %d, stderr %q, stdout %q", with, r.code, r.stderr, r.stdout)
				}
			}
		})
	}
}

func TestWhatIsMissingIsSaidInPlainWords(t *testing.T) {
	for args, want := range map[string]string{
		"start":                              "the name of a volume is missing",
		"start a b":                          "one volume at a time, not a and b",
		"throttle db01":                      "throttle needs --rate",
		"throttle db01 --rate=-5":            `--rate: "-5" is below 0`,
		"wait db01":                          "wait needs --for, a phase",
		"wait db01 --for never":              `there is no phase "never"`,
		"mirror db01":                        "it takes the name of a volume, and on or off",
		"mirror db01 maybe":                  `a mirror is on or off, not "maybe"`,
		"rollback db01 --timeout 1s":         "--timeout goes with --wait",
		"cutover db01 --timeout 1s":          "--timeout goes with --wait",
		"rollback db01 --wait --timeout=-1s": "is no time to wait",
		"verify db01 --rate=-1MiB":           "is below 0",
	} {
		if r := lunshift(t, strings.Fields(args)...); r.code != 2 || !strings.Contains(r.stderr, want) {
			t.Errorf("%s: exit %d, stderr %q, want %q", args, r.code, r.stderr, want)
		}
	}
}

func TestHelpAndVersionSucceed(t *testing.T) {
	for _, args := range []string{"--help", "help", "help status", "status --help", "version", "--version", "--json=false version", ""} {
		if r := lunshift(t, strings.Fields(args)...); r.code != 0 || r.stdout == "" || r.stderr != "" {
			t.Errorf("%s: exit %d, stderr %q, stdout %q", args, r.code, r.stderr, r.stdout)
		}
	}
	var v map[string]string
	for _, arg := range []string{"version", "--version"} {
		clear(v)
		if r := lunshift(t, arg, "--json"); json.Unmarshal([]byte(r.stdout), &v) != nil || v["version"] == "" || v["go"] == "" {
			t.Errorf("%s --json: %q", arg, r.stdout)
		}
	}
}

func TestCommandsWithoutAServiceSaySo(t *testing.T) {
	dir := t.TempDir()
	config := configFile(t, dir)
	socket := filepath.Join(dir, "c.sock")
	for _, args := range [][]string{
		{"status"}, {"status", "db01"}, {"status", "--watch"}, {"start", "db01"}, {"pause", "db01"}, {"resume", "db01"}, {"throttle", "db01", "--rate", "0"},
		{"wait", "db01", "--for", "synced"}, {"cutover", "db01"}, {"cutover", "db01", "--wait"}, {"remove", "db01"},
		{"rollback", "db01"}, {"rollback", "db01", "--wait"}, {"mirror", "db01", "on"},
	} {
		for _, where := range [][]string{{"--config", config}, {"--control", socket}} {
			r := lunshift(t, append(args, where...)...)
			want := "lunshift: is lunshift serve running? There is no socket " + socket
			if r.code != 1 || !strings.HasPrefix(r.stderr, want) || strings.Count(r.stderr, "\n") != 1 || r.stdout != "" {
				t.Errorf("%v: exit %d, stderr %q, stdout %q", args, r.code, r.stderr, r.stdout)
			}
		}
	}
	r := lunshift(t, "status", "--json", "--config", config)
	if e := errorOf(t, r); r.code != 1 || e.Kind != "failed" || !strings.Contains(r.stderr, e.Message) {
		t.Errorf("--json: exit %d, stdout %q", r.code, r.stdout)
	}
}

func TestFaultyConfigurationIsReportedWhole(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "bad.toml")
	if err := os.WriteFile(path, []byte("[service]\nportal = 1\n[[volume]]\nname = \"db01\"\nlun = -1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	codes := map[string]int{"check": 1, "serve": 2, "status": 1}
	for _, args := range []string{"check", "serve"} {
		r := lunshift(t, args, "--config", path)
		for _, want := range []string{
			"lunshift: " + path + ":2: service.portal: there is no such setting; is portals meant?\n",
			"lunshift: " + path + ":3: volume[db01].source: is missing",
			"lunshift: " + path + ":3: volume[db01].destination: is missing",
			"lunshift: " + path + ":3: volume[db01].iqn: is missing",
			"lunshift: " + path + ":5: volume[db01].lun: is -1; it is from 0 to 16383\n",
		} {
			if !strings.Contains(r.stderr, want) {
				t.Errorf("%s: missing %q in %q", args, want, r.stderr)
			}
		}
		if r.code != codes[args] || strings.Count(r.stderr, "\n") != 5 {
			t.Errorf("%s: exit %d, stderr %q", args, r.code, r.stderr)
		}
		kinds := map[string]string{"check": "failed", "serve": "configuration"}
		if e := errorOf(t, lunshift(t, args, "--json", "--config", path)); e.Kind != kinds[args] || strings.Count(e.Message, "\n") != 4 {
			t.Errorf("%s --json: %+v", args, e)
		}
	}
	for _, args := range []string{"check", "serve", "status"} {
		missing := filepath.Join(dir, "none.toml")
		r := lunshift(t, args, "--config", missing)
		if want := "lunshift: cannot read the configuration " + missing + ": no such file or directory\n"; r.code != codes[args] || r.stderr != want {
			t.Errorf("%s: exit %d, stderr %q, want %q", args, r.code, r.stderr, want)
		}
	}
}

func TestSystemdDoesNotRestartAfterAFaultyConfiguration(t *testing.T) {
	unit, err := os.ReadFile("../../conf/lunshift.service")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("\nRestartPreventExitStatus=%d\n", control.ExitUsage); !strings.Contains(string(unit), want) {
		t.Errorf("the unit lacks %q", want)
	}
}

func TestFilesThatMayNotBeReadAreNamed(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to become somebody who may not")
	}
	dir, err := os.MkdirTemp("/tmp", "lunshift-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// The test binary lies where nobody else may look.
	binary := filepath.Join(dir, "lunshift")
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(binary, program, 0o755); err != nil {
		t.Fatal(err)
	}
	asNobody := func(args ...string) result {
		var stdout, stderr bytes.Buffer
		c := exec.Command(binary, args...)
		c.Dir, c.Env = "/", environment()
		c.Stdout, c.Stderr = &stdout, &stderr
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: true}}
		err := c.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return result{stdout.String(), stderr.String(), c.ProcessState.ExitCode()}
	}
	config := configFile(t, dir)
	if r := asNobody("check", "--config", config); r.code != 1 || r.stderr != "lunshift: cannot read the configuration "+config+": permission denied\n" {
		t.Errorf("configuration: exit %d, stderr %q", r.code, r.stderr)
	}
	socket := filepath.Join(dir, "private.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(socket, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := asNobody("status", "--control", socket); r.code != 1 || !strings.HasPrefix(r.stderr, "lunshift: no permission for the control socket "+socket) {
		t.Errorf("socket: exit %d, stderr %q", r.code, r.stderr)
	}
}

// serve runs lunshift serve until the end of the test, and then has it end by
// SIGTERM.
func serve(t *testing.T, config string) {
	t.Helper()
	c := command("serve", "--config", config)
	log, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	c.Stderr = log
	launch(t, c, filepath.Join(filepath.Dir(config), "c.sock"))
	t.Cleanup(func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
		text, _ := os.ReadFile(log.Name())
		if code := c.ProcessState.ExitCode(); code != 0 || t.Failed() {
			t.Errorf("serve ended with exit %d; its log:\n%s", code, text)
		}
	})
}

func TestCommandsCanBeRepeatedFromStartToRemove(t *testing.T) {
	config := configFile(t, t.TempDir())
	serve(t, config)
	do := func(code int, want string, args ...string) result {
		t.Helper()
		r := lunshift(t, append(args, "--config", config)...)
		if r.code != code || !strings.Contains(r.stdout+r.stderr, want) || (code == 0) != (r.stderr == "") {
			t.Errorf("%v: exit %d, stdout %q, stderr %q; want exit %d, %q", args, r.code, r.stdout, r.stderr, code, want)
		}
		return r
	}
	do(0, "nothing would be refused", "check")
	do(0, "db02", "status")
	do(3, "start it first", "cutover", "db01")
	do(3, "start it first", "cutover", "db01", "--wait")
	do(3, "remove is not allowed in phase ready", "remove", "db01")
	do(1, `there is no volume "db09"; the service has db01, db02`, "start", "db09")
	do(1, "db01: still ready after 10ms, not synced", "wait", "db01", "--for", "synced", "--timeout", "10ms")
	do(1, "already running", "serve")
	for range 2 {
		do(0, "db01: ", "throttle", "db01", "--rate", "1MiB")
		do(0, "db01: migrating", "start", "db01")
		do(0, "db01: migrating, paused", "pause", "db01")
	}
	for _, args := range [][]string{{"wait", "db01", "--for", "synced"}, {"cutover", "db01", "--wait"}} {
		r := do(1, "db01: still migrating after 10ms, not synced", append(args, "--timeout", "10ms")...)
		if !strings.HasPrefix(r.stderr, "lunshift: volume db01 is paused; resume it with: lunshift resume db01\n") || strings.Count(r.stderr, "\n") != 2 {
			t.Errorf("%v of a paused copy: stderr %q", args, r.stderr)
		}
	}
	var status map[string]any
	r := do(0, "", "status", "db01", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &status); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"name", "phase", "paused", "degraded", "size_bytes", "block_size", "allocated_bytes", "copied_bytes",
		"initiator_written_bytes", "remaining_bytes", "copy_rate_bytes_per_second", "eta_seconds", "sessions", "source", "destination"} {
		if _, ok := status[key]; !ok {
			t.Errorf("status --json lacks %s", key)
		}
	}
	if status["paused"] != true || status["copy_rate_limit_bytes_per_second"] != float64(1<<20) {
		t.Errorf("status: %v", status)
	}
	do(0, "", "throttle", "db01", "--rate", "0")
	for range 2 {
		do(0, "", "resume", "db01")
	}
	do(3, "verify is not allowed in phase ready", "verify", "db02")
	do(1, "there is no volume", "verify", "db09")
	do(0, "db01: synced", "wait", "db01", "--for", "synced", "--timeout", "30s")
	do(0, "db01: everything compared", "verify", "db01")
	do(2, "--sample", "verify", "db01", "--sample", "much")
	do(0, "no difference", "status", "db01")
	// Somebody writes to the new array past lunshift.
	spoil(t, config, 5000)
	do(5, "512 B differ\n  LBA 5000, 1 blocks\n", "verify", "db01")
	var report proxy.VerifyReport
	if r := do(5, "", "verify", "db01", "--json"); json.Unmarshal([]byte(r.stdout), &report) != nil || report.Different != 512 || len(report.Extents) != 1 {
		t.Errorf("verify --json: %q", r.stdout)
	}
	do(1, "512 bytes differed between source and destination when everything was compared", "cutover", "db01")
	do(0, "db01: cutover", "cutover", "db01", "--no-verify")
	do(0, "db01: cutover", "cutover", "db01", "--wait")
	do(0, "cutover", "status", "db01", "--watch")
	do(0, "db01: removed", "remove", "db01")
	do(0, "db01: nothing to remove", "remove", "db01")
	do(0, "db01: cutover", "cutover", "db01", "--wait", "--timeout", "1m")
	do(0, "db01: cutover", "wait", "db01", "--for", "synced")
	do(1, `there is no volume "nosuch"`, "remove", "nosuch")
	do(1, "there is no volume", "status", "db01")
	do(1, "refused", "check")
	do(0, "", "start", "db02", "--json")
}

func TestSignalsEndServeAndWaitQuietly(t *testing.T) {
	config := configFile(t, t.TempDir())
	serve(t, config)
	for _, args := range [][]string{{"wait", "db01", "--for", "synced"}, {"status", "--watch"}, {"wait", "db01", "--for", "synced", "--json"}} {
		var stderr bytes.Buffer
		c := command(append(args, "--config", config)...)
		c.Stderr = &stderr
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if args[0] == "status" {
			if _, err := out.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		} else {
			waitForConnection(t, c.Process.Pid)
		}
		if err := c.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(out)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Wait()
		if code := c.ProcessState.ExitCode(); code != 130 || stderr.Len() > 0 {
			t.Errorf("%v: exit %d, stderr %q", args, code, stderr.String())
		}
		if args[len(args)-1] == "--json" {
			if e := errorOf(t, result{stdout: string(rest)}); e.Kind != "interrupted" || e.Message == "" {
				t.Errorf("%v: stdout %q", args, rest)
			}
		}
	}
}

func TestSecondSignalEndsServeAtOnce(t *testing.T) {
	service, log := serveHungCommand(t, "1m")
	if err := service.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	log.waitFor(t, "stopping")
	begin := time.Now()
	if err := service.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = service.Wait()
	if code := service.ProcessState.ExitCode(); code != 130 || time.Since(begin) > 10*time.Second {
		t.Errorf("exit %d after %s; log:\n%s", code, time.Since(begin), log)
	}
}

func TestHungArrayHoldsAStopNoLongerThanShutdownTimeout(t *testing.T) {
	service, log := serveHungCommand(t, "1s")
	if err := service.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	_ = service.Wait()
	// The array does not even answer that the command is gone, which would be waited for.
	want := "lunshift: the stop did not end within shutdown_timeout (1s): an array hangs; sessions are left as they are, and nothing that was acknowledged is lost\n"
	if code := service.ProcessState.ExitCode(); code != 1 || time.Since(begin) > 15*time.Second ||
		!strings.HasSuffix(log.String(), want) || strings.Count(log.String(), "lunshift: ") != 1 {
		t.Errorf("exit %d after %s; log:\n%s", code, time.Since(begin), log)
	}
}

// serveHungCommand runs a service with a command in flight to an array that hangs.
func serveHungCommand(t *testing.T, shutdownTimeout string) (*exec.Cmd, *syncBuffer) {
	t.Helper()
	arrayDir, dir := t.TempDir(), t.TempDir()
	array := command("serve", "--config", configFile(t, arrayDir))
	launch(t, array, filepath.Join(arrayDir, "c.sock"))
	t.Cleanup(func() {
		_ = array.Process.Kill()
		_ = array.Wait()
	})
	portal := portalOf(t, filepath.Join(arrayDir, "c.sock"))

	config := configFile(t, dir)
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	remote := "iscsi://" + portal + "/iqn.2026-11.net.example:db01/0"
	changed := strings.Replace(string(text), filepath.Join(dir, "db01old"), remote, 1)
	changed = strings.Replace(changed, "[service]", "[service]\nshutdown_timeout = \""+shutdownTimeout+"\"", 1)
	if err := os.WriteFile(config, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	log := &syncBuffer{}
	service := command("serve", "--config", config)
	service.Stderr = log
	launch(t, service, filepath.Join(dir, "c.sock"))
	t.Cleanup(func() { _ = service.Process.Kill() })
	dev, err := lun.Open(t.Context(), "iscsi://"+portalOf(t, filepath.Join(dir, "c.sock"))+"/iqn.2026-11.net.example:db01/0", lun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	halt(t, array)
	ctx, cancel := context.WithCancel(context.Background())
	read := make(chan error, 1)
	go func() { read <- dev.ReadAt(ctx, make([]byte, 4096), 0) }()
	t.Cleanup(func() { cancel(); <-read })
	select {
	case err := <-read:
		read <- err
		t.Fatalf("the read did not wait for the array: %v", err)
	case <-time.After(200 * time.Millisecond): // it is on its way, and stays there
	}
	return service, log
}

// halt stops every thread of a process.
func halt(t *testing.T, c *exec.Cmd) {
	t.Helper()
	if err := c.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := func() bool {
		states, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", c.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range states {
			if text, err := os.ReadFile(path); err == nil && !strings.Contains(string(text), "\nState:\tT") {
				return false
			}
		}
		return true
	}
	for deadline := time.Now().Add(10 * time.Second); !stopped(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the process does not halt")
		}
	}
}

// launch starts a service and returns once it answers.
func launch(t *testing.T, c *exec.Cmd, socket string) {
	t.Helper()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); lunshift(t, "status", "--control", socket).code != 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("serve does not answer")
		}
	}
}

func portalOf(t *testing.T, socket string) string {
	t.Helper()
	info, err := control.NewClient(socket).Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info.Portals[0]
}

// syncBuffer is a buffer that is read while a process writes it.
type syncBuffer struct {
	mu sync.Mutex // protects b
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// waitFor returns once the text is in the buffer.
func (s *syncBuffer) waitFor(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(s.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %q in\n%s", text, s)
		}
	}
}

// waitForConnection returns once the process has a socket open, which it has only
// after it has taken over the signals.
func waitForConnection(t *testing.T, pid int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		open, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range open {
			if what, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && strings.HasPrefix(what, "socket:") {
				return
			}
		}
	}
	t.Fatal("the command does not connect")
}
