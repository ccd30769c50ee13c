package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"lunshift/proxy"
	"lunshift/state"
)

func TestStepsTravelOverTheSocket(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	client, _ := serveFakes(t, v, newFake("db02"))
	check := func(what string, s proxy.Status, err error, right bool) {
		t.Helper()
		if err != nil || s.Name != "db01" || !right {
			t.Errorf("%s: %+v, %v", what, s, err)
		}
	}
	s, err := client.Start(ctx, "db01")
	check("start", s, err, s.Phase == proxy.Migrating)
	s, err = client.Pause(ctx, "db01")
	check("pause", s, err, s.Paused)
	s, err = client.Resume(ctx, "db01")
	check("resume", s, err, !s.Paused)
	s, err = client.Throttle(ctx, "db01", 200<<20)
	check("throttle", s, err, s.RateLimit == 200<<20)
	v.report = proxy.VerifyReport{Different: 512, Extents: []proxy.BlockRun{{LBA: 9, Blocks: 1}}}
	how := proxy.VerifyOptions{Sample: 1 << 20, Rate: 5}
	if r, err := client.Verify(ctx, "db01", how); err != nil || r.Different != 512 || r.Extents[0].LBA != 9 || v.asked != how {
		t.Errorf("verify %v: %+v, %v", v.asked, r, err)
	}
	go v.set(func(s *proxy.Status) { s.Phase = proxy.Synced })
	s, err = client.CutoverWhenSynced(ctx, "db01", 0, proxy.CutoverOptions{AcceptUnreadable: true, NoVerify: true})
	check("cutover", s, err, s.Phase == proxy.Cutover && v.asked == proxy.CutoverOptions{AcceptUnreadable: true, NoVerify: true})

	all, err := client.Statuses(ctx)
	if err != nil || len(all) != 2 || all[0].Name != "db01" || all[1].Name != "db02" {
		t.Errorf("statuses: %+v, %v", all, err)
	}
	for _, first := range []bool{true, false} {
		if r, err := client.Remove(ctx, "db01"); err != nil || r != (RemoveReport{Name: "db01", Removed: first, Known: true}) {
			t.Errorf("remove: %+v, %v", r, err)
		}
	}
	if all, err := client.Statuses(ctx); err != nil || len(all) != 1 {
		t.Errorf("after remove: %+v, %v", all, err)
	}
	if _, err := client.Status(ctx, "db01"); KindOf(err) != Unknown {
		t.Errorf("status of a removed volume: %v", err)
	}
}

func TestKindsOfFailureKeepTheirExitCodesOverTheSocket(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	client, _ := serveFakes(t, v)
	for _, tc := range []struct {
		name string
		do   func() error
		kind Kind
		exit int
		text string
	}{
		{"phase", func() error { _, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{}); return err }, WrongPhase, 3, "cutover is not allowed in phase ready: do something else"},
		{"cutover --wait before start", func() error { _, err := client.CutoverWhenSynced(ctx, "db01", 0, proxy.CutoverOptions{}); return err }, WrongPhase, 3, "start it first"},
		{"unknown", func() error { _, err := client.Start(ctx, "db/9?x"); return err }, Unknown, 1, `there is no volume "db/9?x"; the service has db01`},
		{"dots", func() error { _, err := client.Remove(ctx, ".."); return err }, Usage, 2, "no volume name"},
		{"empty name", func() error { _, err := client.Start(ctx, ""); return err }, Usage, 2, "no volume name"},
		{"failure", func() error { v.fail = errors.New("disk full"); _, err := client.Start(ctx, "db01"); return err }, Failed, 1, "disk full"},
		{"failure by a limit of its own", func() error {
			v.set(func(s *proxy.Status) { s.Phase = proxy.Synced })
			v.fail = fmt.Errorf("cutover undone: %w", context.DeadlineExceeded)
			_, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{})
			return err
		}, Failed, 1, "cutover undone"},
		{"failure by a stop of the service", func() error {
			v.fail = fmt.Errorf("cutover undone: %w", context.Canceled)
			_, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{})
			v.set(func(s *proxy.Status) { s.Phase = proxy.Ready })
			return err
		}, Failed, 1, "cutover undone"},
		{"phase name", func() error { _, err := client.Wait(ctx, "db01", "sinked", 0); return err }, Usage, 2, "the phases are ready, migrating, synced, cutover"},
		{"timeout", func() error { _, err := client.Wait(ctx, "db01", proxy.Synced, time.Millisecond); return err }, Timeout, 1, "still ready after 1ms, not synced"},
		{"bad body", func() error {
			return client.call(ctx, http.MethodPost, "/v1/volumes/db01/throttle", map[string]string{"rate": "fast"}, nil)
		}, Usage, 2, "throttle"},
		{"unknown request", func() error { return client.call(ctx, http.MethodPost, "/v1/volumes/db01/explode", nil, nil) }, Failed, 1, "another version"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.do()
			if KindOf(err) != tc.kind || ExitCode(err) != tc.exit || err == nil || !strings.Contains(err.Error(), tc.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("kind %s, exit %d, %v; want kind %s, exit %d, %q", KindOf(err), ExitCode(err), err, tc.kind, tc.exit, tc.text)
			}
		})
	}
}

func TestWaitEndsWhenTheCallerGoesOrTheServiceStops(t *testing.T) {
	client, s := serveFakes(t, newFake("db01"))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := client.Wait(ctx, "db01", proxy.Synced, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled wait: %v", err)
	}
	done := make(chan error, 1)
	go func() { _, err := client.Wait(t.Context(), "db01", proxy.Synced, 0); done <- err }()
	time.AfterFunc(20*time.Millisecond, s.stop)
	if err := <-done; err == nil || !strings.Contains(err.Error(), "the service stops") {
		t.Errorf("wait of a service that stops: %v", err)
	}
}

func TestVolumeThatIsNotOpenSaysWhy(t *testing.T) {
	client, s := serveFakes(t)
	e := &entry{failure: errors.New("volume db01: source: no route\nvolume db01: destination: no route"), known: proxy.Status{Name: "db01", Phase: proxy.Migrating, Degraded: true}}
	e.name, e.conf.Name = "db01", "db01"
	s.entries = append(s.entries, e)
	if got, err := client.Status(t.Context(), "db01"); err != nil || got.Phase != proxy.Migrating || !got.Degraded {
		t.Errorf("status: %+v, %v", got, err)
	}
	_, err := client.Start(t.Context(), "db01")
	if want := "not served yet: volume db01: source: no route; volume db01: destination: no route"; err == nil || err.Error() != want {
		t.Errorf("start: %v, want %s", err, want)
	}
}

func TestWaitBearsAVolumeThatIsNotOpenYet(t *testing.T) {
	ctx := t.Context()
	client, s := serveFakes(t)
	e := &entry{failure: errors.New("no route"), known: proxy.Status{Name: "db01", Phase: proxy.Migrating}}
	e.name, e.conf.Name = "db01", "db01"
	s.entries = append(s.entries, e)
	if got, err := client.Wait(ctx, "db01", proxy.Migrating, 0); err != nil || got.Phase != proxy.Migrating {
		t.Errorf("phase that is recorded: %+v, %v", got, err)
	}
	_, err := client.Wait(ctx, "db01", proxy.Synced, 50*time.Millisecond)
	if want := "volume db01: still migrating after 50ms, not synced: not served yet: no route"; KindOf(err) != Timeout || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	open := func(phase proxy.Phase) *fakeVolume {
		v := newFake("db01")
		v.status.Phase = phase
		e.mu.Lock()
		defer e.mu.Unlock()
		e.volume = v
		close(e.opened)
		e.opened = nil
		return v
	}
	waits := func(do func() (proxy.Status, error)) <-chan error {
		t.Helper()
		done := make(chan error, 1)
		go func() { _, err := do(); done <- err }()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			e.mu.Lock()
			waiting := e.opened != nil
			e.mu.Unlock()
			if waiting {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("nobody waits for the volume to open")
			}
		}
		select {
		case err := <-done:
			t.Fatalf("did not wait: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		return done
	}
	done := waits(func() (proxy.Status, error) { return client.Wait(ctx, "db01", proxy.Synced, 0) })
	v := open(proxy.Migrating)
	v.set(func(s *proxy.Status) { s.Phase = proxy.Synced })
	if err := <-done; err != nil {
		t.Errorf("wait: %v", err)
	}

	// Synced by the record: a cutover needs the units all the same.
	e.mu.Lock()
	e.volume, e.known.Phase = nil, proxy.Synced
	e.mu.Unlock()
	done = waits(func() (proxy.Status, error) { return client.CutoverWhenSynced(ctx, "db01", 0, proxy.CutoverOptions{}) })
	v = open(proxy.Synced)
	if err := <-done; err != nil || v.Status().Phase != proxy.Cutover {
		t.Errorf("cutover: %v", err)
	}
}

func TestLastStepsOfARemovedVolumeAreDone(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	v.status.Phase = proxy.Cutover
	client, s := serveFakes(t, v, newFake("db02"))
	if _, err := client.Remove(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	for name, phase := range map[string]string{"marked": removed, "deleted": string(proxy.Cutover), "moving": string(proxy.Synced)} {
		if err := s.store.PutRecords(ctx, state.Record{Volume: name, Phase: phase}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"db01", "marked", "deleted"} {
		got, err := client.Cutover(ctx, name, proxy.CutoverOptions{})
		if err != nil || got.Phase != proxy.Cutover || got.Name != name {
			t.Errorf("cutover of %s: %+v, %v", name, got, err)
		}
		if _, err := client.CutoverWhenSynced(ctx, name, time.Second, proxy.CutoverOptions{}); err != nil {
			t.Errorf("cutover --wait of %s: %v", name, err)
		}
		if got, err := client.Wait(ctx, name, proxy.Synced, time.Second); err != nil || got.Phase != proxy.Cutover {
			t.Errorf("wait of %s: %+v, %v", name, got, err)
		}
		if _, err := client.Wait(ctx, name, "sinked", 0); KindOf(err) != Usage {
			t.Errorf("wait of %s for no phase: %v", name, err)
		}
		if _, err := client.Start(ctx, name); KindOf(err) != Unknown {
			t.Errorf("start of %s: %v", name, err)
		}
	}
	for _, name := range []string{"moving", "db09"} {
		if _, err := client.CutoverWhenSynced(ctx, name, time.Second, proxy.CutoverOptions{}); KindOf(err) != Unknown {
			t.Errorf("cutover of %s: %v", name, err)
		}
	}
	if r, err := client.Remove(ctx, "db09"); KindOf(err) != Unknown {
		t.Errorf("remove of a name that is nowhere: %+v, %v", r, err)
	}
	if _, err := s.asks(ctx, itself, "", "remove", nil, "db09"); err != nil { // it was a volume once
		t.Fatal(err)
	}
	if r, err := client.Remove(ctx, "db09"); err != nil || r != (RemoveReport{Name: "db09"}) {
		t.Errorf("remove of a name that was: %+v, %v", r, err)
	}
}

func TestOnlyStepsThatChangedSomethingAreLogged(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	client, s := serveFakes(t, v)
	var log bytes.Buffer
	s.log.(*logrus.Logger).SetOutput(&log)
	for range 2 {
		for _, do := range []func() (proxy.Status, error){
			func() (proxy.Status, error) { return client.Start(ctx, "db01") },
			func() (proxy.Status, error) { return client.Pause(ctx, "db01") },
			func() (proxy.Status, error) { return client.Throttle(ctx, "db01", 9) },
		} {
			if _, err := do(); err != nil {
				t.Fatal(err)
			}
		}
	}
	v.set(func(s *proxy.Status) { s.Phase = proxy.Cutover })
	for range 2 {
		if _, err := client.Remove(ctx, "db01"); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Cutover(ctx, "db01", proxy.CutoverOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"POST /v1/volumes/db01/start", "POST /v1/volumes/db01/pause", "POST /v1/volumes/db01/throttle", "DELETE /v1/volumes/db01"} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("%s is not logged once:\n%s", want, log.String())
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 4 {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}

func TestWaitForAPausedCopyIsSaidToBeStuck(t *testing.T) {
	v := newFake("db01")
	client, _ := serveFakes(t, v)
	for _, tc := range []struct {
		is     proxy.Phase
		paused bool
		wanted proxy.Phase
		stuck  bool
	}{
		{proxy.Migrating, true, proxy.Synced, true}, {proxy.Migrating, true, proxy.Cutover, true},
		{proxy.Migrating, false, proxy.Synced, false}, {proxy.Migrating, true, proxy.Migrating, false}, {proxy.Synced, true, proxy.Synced, false},
		{proxy.RollingBack, true, proxy.RolledBack, true}, {proxy.RollingBack, true, proxy.Synced, false}, {proxy.Migrating, true, proxy.RolledBack, false},
	} {
		v.set(func(s *proxy.Status) { s.Phase, s.Paused = tc.is, tc.paused })
		status, err := client.Status(t.Context(), "db01")
		if text := Stuck(status, tc.wanted); err != nil || strings.Contains(text, "lunshift resume db01") != tc.stuck {
			t.Errorf("%+v: %q, %v", tc, text, err)
		}
	}
	if text := Stuck(proxy.Status{}, proxy.Synced); text != "" {
		t.Errorf("unknown volume: %q", text)
	}
}

func TestSocketIsPrivateAndOnlyAStaleOneIsReplaced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "c.sock")
	first, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := listenSocket(path); err == nil || !strings.Contains(err.Error(), "already running") {
		t.Errorf("second service: %v", err)
	}
	// A service that was killed leaves socket and lock file behind, unlocked.
	first.Listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := listenSocket(path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}

	foreign, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if _, err := listenSocket(path); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("foreign socket: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenSocket(file); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("file in the place: %v", err)
	}
	if text, err := os.ReadFile(file); string(text) != "precious" {
		t.Errorf("the file was changed: %q, %v", text, err)
	}
}

func TestClientSaysWhatToDoWithoutAService(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	for path, want := range map[string]string{
		filepath.Join(dir, "none.sock"): "is lunshift serve running? There is no socket " + dir,
		stale:                           "is lunshift serve running? Nobody listens on the socket " + stale,
	} {
		_, err := NewClient(path).Statuses(t.Context())
		if err == nil || !strings.HasPrefix(err.Error(), want) || ExitCode(err) != ExitFailed {
			t.Errorf("%s: %v", path, err)
		}
	}
	denied := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", unix.EACCES)}
	if err := NewClient("/s").unreachable(t.Context(), denied); !strings.Contains(err.Error(), "no permission for the control socket /s") {
		t.Errorf("permission: %v", err)
	}
}

func TestClientRefusesAnswersThatAreNotTheServices(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	reply := "<html>"
	server := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if reply == "" {
			panic(http.ErrAbortHandler)
		}
		io.WriteString(w, reply)
	})}}
	server.Start()
	defer server.Close()
	if _, err := NewClient(path).Statuses(t.Context()); err == nil || !strings.Contains(err.Error(), "not understood") {
		t.Errorf("no JSON: %v", err)
	}
	reply = ""
	if _, err := NewClient(path).Statuses(t.Context()); err == nil || !strings.Contains(err.Error(), "ended before it answered") {
		t.Errorf("no answer: %v", err)
	}
}

func TestSystemdIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := notify("READY=1"); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 100)
	n, err := conn.Read(buffer)
	if err != nil || string(buffer[:n]) != "READY=1" {
		t.Errorf("got %q, %v", buffer[:n], err)
	}
	t.Setenv("NOTIFY_SOCKET", path+"-gone")
	if err := notify("READY=1"); err == nil {
		t.Error("no error where nobody listens")
	}
}

func TestExitCodes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		exit int
	}{
		{nil, 0}, {errors.New("x"), 1}, {Usagef("x"), 2}, {fmt.Errorf("x: %w", Usagef("y")), 2},
		{&proxy.PhaseError{}, 3}, {fmt.Errorf("x: %w", proxy.ErrPhase), 3}, {&Error{Kind: WrongPhase}, 3},
		{context.Canceled, 130}, {context.DeadlineExceeded, 1}, {&Error{Kind: Unknown}, 1}, {&Error{Kind: Differs}, 5},
	} {
		if got := ExitCode(tc.err); got != tc.exit {
			t.Errorf("%v: %d, want %d", tc.err, got, tc.exit)
		}
	}
}
