// Package runbooks runs the scripts of docs/runbooks with programs that stand for lunshift, the
// host and its cluster (world.sh), and ends them at each of their steps. That the scripts fit real
// programs is shown by tests/vm.
package runbooks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	oldAt, gateway, newAt = "10.0.0.5", "10.0.0.20", "10.0.0.9"
	oldIQN, front, newIQN = "iqn.2001-04.com.example:old", "iqn.2026-11.net.example:db01", "iqn.2001-04.com.example:new"
)

// world is one state of lunshift and the hosts, in a directory.
type world struct {
	t         *testing.T
	dir, bin  string
	script    string
	variables []string
}

func newWorld(t *testing.T, script string, variables ...string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), bin: t.TempDir(), script: script}
	text, err := os.ReadFile("world.sh")
	must(t, err)
	for _, name := range []string{"lunshift", "iscsiadm", "app", "member", "sleep"} {
		must(t, os.WriteFile(filepath.Join(w.bin, name), append([]byte("#!/bin/sh\n"), text...), 0o755))
	}
	w.variables = append([]string{"PATH=" + w.bin + ":" + os.Getenv("PATH"), "WORLD=" + w.dir,
		"OLDAT=" + oldAt, "NEWAT=" + newAt, "GATEWAY=" + gateway, "FRONT=" + front,
		"HOST=sh -c", "OLD=" + oldAt + " " + oldIQN, "STOP=app stop", "START=app start"}, variables...)
	w.set("phase", "ready")
	w.set("app", "")
	// The host has a disk of another array all the time.
	w.set("sessions", "10.0.0.7 iqn.2001-04.com.example:other sdz")
	w.set("records", "10.0.0.7 iqn.2001-04.com.example:other automatic")
	return w
}

func (w *world) set(file, text string) {
	w.t.Helper()
	must(w.t, os.WriteFile(filepath.Join(w.dir, file), []byte(text+"\n"), 0o644))
}

func (w *world) get(file string) string {
	b, err := os.ReadFile(filepath.Join(w.dir, file))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// run gives what the script said, and how often something was called.
func (w *world) run(variables ...string) (string, int, error) {
	w.t.Helper()
	w.set("calls", "0")
	os.Remove(filepath.Join(w.dir, "log"))
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "../../docs/runbooks/"+w.script, "db01")
	cmd.Env = append(w.variables, variables...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		w.t.Fatalf("%s does not end: %s", w.script, out)
	}
	if wrong := w.get("wrong"); wrong != "" {
		w.t.Fatalf("%s\nits calls:\n%s\n%s", wrong, w.get("log"), out)
	}
	calls, convErr := strconv.Atoi(w.get("calls"))
	must(w.t, convErr)
	return string(out), calls, err
}

// said demands that the script failed saying so.
func (w *world) said(text, out string, err error) {
	w.t.Helper()
	if err == nil || !strings.Contains(out, "FAILED: ") || !strings.Contains(out, text) {
		w.t.Errorf("%v, want %q: %s", err, text, out)
	}
}

// eachStep runs f in a new test for each call of a run of w that is undisturbed: once where that
// call fails, and once where it is the last that the run does.
func eachStep(t *testing.T, start func(*testing.T) *world, f func(t *testing.T, w *world, stop string)) {
	undisturbed := start(t)
	out, calls, err := undisturbed.run()
	log := strings.Split(undisturbed.get("log"), "\n")
	if err != nil || calls < 10 {
		t.Fatalf("undisturbed: %v, %d calls: %s", err, calls, out)
	}
	for n := range calls {
		for _, how := range []string{"FAIL", "KILL"} {
			if how == "KILL" && asks.MatchString(log[n]) {
				continue // the same as after the call before
			}
			stop := fmt.Sprintf("%s=%d", how, n+1)
			t.Run(stop, func(t *testing.T) {
				t.Parallel()
				w := start(t)
				f(t, w, stop)
				if t.Failed() {
					t.Logf("calls of the last run:\n%s", w.get("log"))
				}
			})
		}
	}
}

// asks are calls that change nothing.
var asks = regexp.MustCompile(`status|check|verify|report|dry-run|-m session|-p [0-9.]*$|sleep|registered`)

func singleHost(t *testing.T) *world {
	w := newWorld(t, "single-host.sh", "NEW="+newAt+" "+newIQN)
	w.set("app", oldAt)
	w.set("sessions", w.get("sessions")+"\n"+oldAt+" "+oldIQN+" sda")
	w.set("records", w.get("records")+"\n"+oldAt+" "+oldIQN+" automatic")
	return w
}

// TestASingleHostGoesOnFromEachStep: where a run ended at any step, or any step failed once, the next
// run finishes; and until the cutover a step that fails leaves the application running.
func TestASingleHostGoesOnFromEachStep(t *testing.T) {
	eachStep(t, singleHost, func(t *testing.T, w *world, stop string) {
		out, _, _ := w.run(stop)
		if strings.HasPrefix(stop, "FAIL") && w.get("phase") != "cutover" && w.get("app") == "" {
			t.Errorf("the application is stopped, phase %s: %s", w.get("phase"), out)
		}
		if out, _, err := w.run(); err != nil {
			t.Fatalf("the second run: %v: %s", err, out)
		}
		const done = "10.0.0.7 iqn.2001-04.com.example:other sdz\n" + newAt + " " + newIQN + " sdb"
		if w.get("phase") != "cutover" || w.get("app") != newAt || w.get("sessions") != done {
			t.Errorf("phase %q, the application at %q, sessions %q", w.get("phase"), w.get("app"), w.get("sessions"))
		}
		records := w.get("records") + "\n"
		for _, want := range []string{oldAt + " " + oldIQN + " manual\n", gateway + " " + front + " manual\n", newAt + " " + newIQN + " automatic\n"} {
			if !strings.Contains(records, want) {
				t.Errorf("records %q lack %q", records, want)
			}
		}
	})
}

// TestASingleHostIsGivenBackWhereItCannotGoOn: a step that fails for good is told for what it is,
// and the application runs.
func TestASingleHostIsGivenBackWhereItCannotGoOn(t *testing.T) {
	for _, tc := range []struct{ what, variable, text, at string }{
		{"they differ", "VERIFY=5", "source and destination differ", gateway},
		{"verify fails", "VERIFY=1", "could not be compared (exit code 1)", gateway},
		{"another iqn", "OLD=" + oldAt + " iqn.2001-04.com.example:wrong", "is OLD right?", oldAt},
		{"the application cannot end", "STOP=false", "the application goes on there", oldAt},
	} {
		t.Run(tc.what, func(t *testing.T) {
			w := singleHost(t)
			out, _, err := w.run(tc.variable)
			if w.said(tc.text, out, err); w.get("app") != tc.at {
				t.Errorf("the application runs at %q: %s", w.get("app"), out)
			}
			if tc.variable != "VERIFY=5" && strings.Contains(out, "differ") {
				t.Errorf("told as a difference: %s", out)
			}
			if out, _, err := w.run(); err != nil {
				t.Errorf("the next run: %v: %s", err, out)
			}
		})
	}
}

// TestAnApplicationThatWasLeftStoppedRunsFirst: a run that was ended with the application stopped is
// followed by one that starts it before anything that takes long, or fails.
func TestAnApplicationThatWasLeftStoppedRunsFirst(t *testing.T) {
	for _, phase := range []string{"migrating", "synced"} {
		w := newWorld(t, "single-host.sh", "NEW="+newAt+" "+newIQN)
		w.set("phase", phase)
		out, _, err := w.run("VERIFY=5")
		if w.said("source and destination differ", out, err); w.get("app") != gateway {
			t.Errorf("%s: the application runs at %q: %s", phase, w.get("app"), out)
		}
	}
}

func multipath(t *testing.T) *world {
	w := newWorld(t, "multipath.sh", "NEW="+newAt, "QUEUES=yes", "HOST=on-host")
	// A host's shell, whose kernel is in the directory as well.
	must(t, os.WriteFile(filepath.Join(w.bin, "on-host"), []byte("#!/bin/sh\nexec sh -c \"$(printf %s \"$1\" | sed \"s,/sys/,$WORLD/sys/,g\")\"\n"), 0o755))
	w.set("phase", "synced")
	w.set("sessions", w.get("sessions")+"\n"+gateway+" "+front+" sdb")
	disk := filepath.Join(w.dir, "sys/class/iscsi_session/session2/device/target2:0:0/2:0:0:1")
	must(t, os.MkdirAll(disk, 0o755))
	w.set("sys/class/iscsi_session/session2/targetname", front)
	w.set("sys/class/iscsi_session/session2/recovery_tmo", "120")
	must(t, os.WriteFile(filepath.Join(disk, "wwid"), []byte("naa.600\n"), 0o644))
	return w
}

// TestAHostThatQueuesIsLookedAtInEachRun: a run after the cutover is done only where the host is at
// the new array and comes back to it after a boot.
func TestAHostThatQueuesIsLookedAtInEachRun(t *testing.T) {
	eachStep(t, multipath, func(t *testing.T, w *world, stop string) {
		w.run(stop)
		if out, _, err := w.run(); err != nil || w.get("phase") != "cutover" || !strings.Contains(w.get("records"), newAt+" "+front) {
			t.Errorf("the second run: %v, phase %s, records %q: %s", err, w.get("phase"), w.get("records"), out)
		}
	})
	for _, tc := range []struct{ what, variable, text string }{
		{"they differ", "VERIFY=5", "source and destination differ"},
		{"verify fails", "VERIFY=1", "could not be compared (exit code 1)"},
		{"the session stays", "QUEUES=", "the host goes on with lunshift"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			w := multipath(t)
			out, _, err := w.run(tc.variable)
			if w.said(tc.text, out, err); w.get("phase") != "synced" || tc.variable != "VERIFY=5" && strings.Contains(out, "differ") {
				t.Errorf("phase %s: %s", w.get("phase"), out)
			}
		})
	}
	t.Run("it gives up soon", func(t *testing.T) {
		w := multipath(t)
		w.set("sys/class/iscsi_session/session2/recovery_tmo", "5")
		out, _, err := w.run()
		if w.said("the host cannot wait without a path", out, err); w.get("phase") != "synced" {
			t.Errorf("phase %s: %s", w.get("phase"), out)
		}
	})
	t.Run("the host is elsewhere", func(t *testing.T) {
		w := multipath(t)
		w.set("phase", "cutover")
		w.set("sessions", newAt+" iqn.2001-04.com.example:other sdz\n"+gateway+" "+front+" sdb")
		out, _, err := w.run()
		w.said("no disk of "+front+" at "+newAt, out, err)
	})
}

func cluster(t *testing.T) *world {
	w := newWorld(t, "cluster.sh", "NODES=env NODE=a sh -c\nenv NODE=b sh -c", "OFFLINE=member offline", "REGISTERED=member registered",
		"MOVE=member move", "LOGIN=member login", "ONLINE=member online")
	for _, file := range []string{"in.a", "in.b", "on.a", "on.b"} {
		w.set(file, "")
	}
	return w
}

// TestAClusterIsOnlineWhateverFails: a step that fails before the cutover leaves the disk online on
// lunshift, or says that it is not; and the next run finishes.
func TestAClusterIsOnlineWhateverFails(t *testing.T) {
	online := func(w *world) bool {
		for _, file := range []string{"in.a", "in.b", "on.a", "on.b"} {
			if _, err := os.Stat(filepath.Join(w.dir, file)); err != nil {
				return false
			}
		}
		return true
	}
	eachStep(t, cluster, func(t *testing.T, w *world, stop string) {
		out, _, _ := w.run(stop)
		if !online(w) {
			if strings.HasPrefix(stop, "FAIL") && w.get("phase") != "cutover" {
				t.Errorf("the disk is offline in phase %s: %s", w.get("phase"), out)
			}
			if w.get("phase") != "cutover" {
				// Its reservation is gone: nothing but the admin tells why.
				out, _, err := w.run()
				w.said("bring the disk online", out, err)
				for _, file := range []string{"in.a", "in.b", "on.a", "on.b"} {
					w.set(file, "")
				}
			}
		}
		if out, _, err := w.run(); err != nil || !online(w) || w.get("phase") != "cutover" {
			t.Errorf("the next run: %v, phase %s: %s", err, w.get("phase"), out)
		}
	})
	for _, tc := range []struct{ what, phase, variable, text string }{
		{"they differ", "ready", "VERIFY=5", "source and destination differ"},
		{"verify fails", "ready", "VERIFY=1", "could not be compared (exit code 1)"},
		{"going back", "rolling-back", "VERIFY=0", "phase rolling-back is not one to go on from"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			w := cluster(t)
			w.set("phase", tc.phase)
			out, _, err := w.run(tc.variable)
			if w.said(tc.text, out, err); !online(w) || tc.variable != "VERIFY=5" && strings.Contains(out, "differ") {
				t.Errorf("phase %s: %s", w.get("phase"), out)
			}
		})
	}
}

// TestACutoverIsKnownByThePhase: one that is done though the command failed is gone on from.
func TestACutoverIsKnownByThePhase(t *testing.T) {
	for _, start := range []func(*testing.T) *world{singleHost, multipath, cluster} {
		w := start(t)
		if out, _, err := w.run("LOST=yes"); err != nil || !strings.Contains(out, "exit code 1 of the cutover") {
			t.Errorf("%s: %v: %s", w.script, err, out)
		}
	}
}

// TestAClusterWithoutItsReservationIsLeftAlone: nothing is started where a node is not registered.
func TestAClusterWithoutItsReservationIsLeftAlone(t *testing.T) {
	w := cluster(t)
	must(t, os.Remove(filepath.Join(w.dir, "on.b")))
	out, _, err := w.run()
	if w.said("registrations are not in order in phase ready", out, err); w.get("phase") != "ready" {
		t.Errorf("phase %s: %s", w.get("phase"), out)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
