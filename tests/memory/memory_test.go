// Package memory shows what idle sessions cost the service that is built.
package memory

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"lunshift/iscsi"
)

const (
	sessions = 1000
	limit    = 100 << 20 // resident, bytes
	iqn      = "iqn.2026-11.net.example:idle"
)

func TestThousandIdleSessionsFitInto100MiB(t *testing.T) {
	dir := t.TempDir()
	pid, portal := serve(t, dir)
	before := resident(t, pid)
	var all sync.WaitGroup
	errs := make([]error, sessions)
	conns := make([]net.Conn, sessions)
	for worker := range 8 {
		all.Go(func() {
			for n := worker; n < sessions; n += 8 {
				conns[n], errs[n] = login(portal, n)
			}
		})
	}
	all.Wait()
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	for n, err := range errs {
		if err != nil {
			t.Fatalf("session %d: %v", n, err)
		}
	}
	after := resident(t, pid)
	for n, c := range conns {
		all.Go(func() { errs[n] = ping(c) })
	}
	all.Wait()
	for n, err := range errs {
		if err != nil {
			t.Fatalf("session %d did not live when the memory was looked at: %v", n, err)
		}
	}
	t.Logf("resident: %d KiB, before the sessions %d KiB: %d bytes for each", after>>10, before>>10, (after-before)/sessions)
	if after >= limit {
		t.Errorf("%d sessions and the service take %d MiB", sessions, after>>20)
	}
}

// serve runs the service that this tree builds with one blank volume.
func serve(t *testing.T, dir string) (pid int, portal string) {
	t.Helper()
	binary := filepath.Join(dir, "lunshift")
	build := exec.Command("go", "build", "-trimpath", "-o", binary, "lunshift/cmd/lunshift")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range []string{"old.img", "new.img"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err == nil {
			err = f.Truncate(64 << 20)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	portal = l.Addr().String()
	l.Close()
	text := fmt.Sprintf(`[service]
portals = [%q]
control = %q
http = ""
state = %q
log_level = "warn"

[service.limits]
connections = %d
connections_per_address = %[4]d
sessions_per_volume = %[4]d

[[volume]]
name = "idle"
iqn = %[5]q
lun = 1
source = %[6]q
destination = %[7]q
`, portal, filepath.Join(dir, "sock"), filepath.Join(dir, "state"), sessions+10, iqn, filepath.Join(dir, "old.img"), filepath.Join(dir, "new.img"))
	config := filepath.Join(dir, "lunshift.toml")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "--config", config, "serve")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", portal); err == nil {
			c.Close()
			return cmd.Process.Pid, portal
		}
		if time.Now().After(end) {
			t.Fatal("the service does not listen")
		}
	}
}

// login begins a session of an initiator of its own.
func login(portal string, n int) (net.Conn, error) {
	nc, err := net.Dial("tcp", portal)
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(time.Now().Add(60 * time.Second))
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpLoginRequest)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagTransit | iscsi.StageOperational<<2 | iscsi.StageFullFeature)
	h.SetISID(iscsi.ISID{0x80, 0, 0, 0, byte(n >> 8), byte(n)})
	text := iscsi.AppendText(nil, iscsi.Pair{Key: "InitiatorName", Value: fmt.Sprintf("iqn.2026-11.net.example:host%d", n)},
		iscsi.Pair{Key: "SessionType", Value: "Normal"}, iscsi.Pair{Key: "TargetName", Value: iqn})
	h.SetDataLength(len(text))
	pdu := append(h[:], text...)
	pdu = append(pdu, make([]byte, -len(text)&3)...)
	if _, err := nc.Write(pdu); err != nil {
		return nc, err
	}
	r := iscsi.NewReader(nc, 4096)
	answer, err := r.Next()
	if err != nil {
		return nc, err
	}
	if answer.Opcode() != iscsi.OpLoginResponse || answer.LoginStatus() != 0 || answer.Flags()&iscsi.FlagTransit == 0 {
		return nc, fmt.Errorf("%v, login status %04Xh", answer.Opcode(), answer.LoginStatus())
	}
	return nc, r.Discard()
}

// ping sends a NOP-Out and waits for its answer.
func ping(nc net.Conn) error {
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpNopOut)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(1)
	h.SetTTT(iscsi.NoTag)
	if _, err := nc.Write(h[:]); err != nil {
		return err
	}
	for r := iscsi.NewReader(nc, 4096); ; {
		p, err := r.Next()
		if err != nil {
			return err
		}
		if p.Opcode() == iscsi.OpNopIn && p.ITT() == 1 {
			return nil
		}
		if p.Opcode() != iscsi.OpNopIn && p.Opcode() != iscsi.OpAsync {
			return fmt.Errorf("%v for a ping", p.Opcode())
		}
	}
}

// resident is VmRSS of a process, in bytes.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
