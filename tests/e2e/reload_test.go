package e2e

import (
	"encoding/json"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"lunshift/tests/peer"
)

// notices is what systemd would be told.
func notices(t *testing.T) (path string, next func() string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "n")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return path, func() string {
		t.Helper()
		must(t, conn.SetReadDeadline(time.Now().Add(30*time.Second)))
		p := make([]byte, 4096)
		n, err := conn.Read(p)
		must(t, err)
		return string(p[:n])
	}
}

// Caught at the first run: without RELOADING=1 systemd would take the reload for done at once.
// (Volumes that are opened anew by a reload are seen by control's
// TestReloadLeavesSessionsOfOtherVolumesAlone.)
func TestReloadUnderLoadAddsAVolumeAndTouchesNoOther(t *testing.T) {
	path, notice := notices(t)
	s, b, _, _ := stopping(t, "20s", "1MiB", "NOTIFY_SOCKET="+path)
	if got := notice(); got != "READY=1" {
		t.Errorf("systemd is told %q", got)
	}
	before := s.status("vol")
	if len(before.Sessions) == 0 {
		t.Fatal("no sessions")
	}

	// By SIGHUP: a volume more, and settings of the one that is used.
	dir := t.TempDir()
	s.volumes = append(s.volumes, volume{name: "two", source: sparseFile(t, dir, "old", 4*mib, 0.5, 5), destination: emptyFile(t, dir, "new", 4*mib)})
	s.volumes[0].more = "copy = { rate = \"8MiB\", depth = 2 }\nverify = \"readback\"\n"
	s.more = "shutdown_timeout = \"25s\"\n"
	s.configure()
	must(t, s.cmd.Process.Signal(syscall.SIGHUP))
	got := notice()
	usec, ok := strings.CutPrefix(got, "RELOADING=1\nMONOTONIC_USEC=")
	if !ok || usec == "0" || usec == "" {
		t.Errorf("systemd is told %q", got)
	}
	if got := notice(); got != "READY=1" {
		t.Errorf("systemd is told %q", got)
	}
	for _, line := range []string{"reload: volume two: added", "reload: volume[vol].verify: changed", "reload: volume[vol].copy.depth: changed", "reload: service.shutdown_timeout: changed"} {
		s.untilLog(line, 1)
	}
	s.run("start", "two")
	s.run("wait", "two", "--for", "synced", "--timeout", "1m")
	if out, err := s.front("two").QemuIO(t.Context(), "read 0 4M"); err != nil {
		t.Errorf("the new volume: %v: %s", err, out)
	}

	// By the command: the rest of the outcomes, each by its exit code.
	if out := s.run("reload"); out != "nothing changed\n" {
		t.Errorf("reload says %q", out)
	}
	s.more = "shutdown_timeout = \"25s\"\nio_timeout = \"3s\"\n"
	s.configure()
	// The key is there twice now: a fault, and nothing changes.
	r := s.try("reload", "--json")
	if r.code != usage || !strings.Contains(r.stdout, "\"kind\":\"configuration\"") || !strings.Contains(r.stderr, "io_timeout") {
		t.Errorf("reload of a faulty file: exit code %d, %s%s", r.code, r.stdout, r.stderr)
	}
	s.more = "shutdown_timeout = \"25s\"\nlog_level = \"debug\"\n"
	s.portals = []string{peer.FreePort(t)}
	s.configure()
	var report struct {
		Changed, Dropped []string
		Restart          []string `json:"restart_needed"`
		Kept             []struct{ Name, Phase string }
	}
	r = s.try("reload", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || r.code != 4 || !slices.Equal(report.Restart, []string{"service.portals"}) || !slices.Equal(report.Changed, []string{"service.log_level"}) {
		t.Errorf("reload with another portal: exit code %d, %v, %+v, %s", r.code, err, report, r.stderr)
	}
	all := s.volumes
	s.volumes, s.portals = all[1:], nil
	s.configure()
	r = s.try("reload", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || r.code != wrongPhase || len(report.Kept) != 1 || report.Kept[0].Name != "vol" {
		t.Errorf("reload without a volume that migrates: exit code %d, %v, %+v, %s", r.code, err, report, r.stderr)
	}
	s.oneLine(r.stderr, []string{"are being moved"}, "reload")
	s.volumes = all
	s.configure()
	s.run("reload")

	after := s.status("vol")
	if !slices.Equal(before.Sessions, after.Sessions) {
		t.Errorf("sessions before %+v, after %+v", before.Sessions, after.Sessions)
	}
	acks := b.acks.Load()
	for deadline := time.Now().Add(30 * time.Second); b.acks.Load() < acks+50; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the load does not go on")
		}
	}
	b.stop()
	b.all.Wait()
	s.run("throttle", "vol", "--rate", "0")
	s.run("wait", "vol", "--for", "synced", "--timeout", "1m")
	b.rightIn(s)
	s.stop()
}
