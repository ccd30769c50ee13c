package e2e

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"lunshift/tests/peer"
)

func TestCommandsAreIdempotentAndKeepToThePhase(t *testing.T) {
	needTools(t)
	ctx := t.Context()
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 128 * mib}.make(t)
	s := newService(t, p.volume("db01"))

	s.fails(failed, []string{"running"}, "status")
	s.start()
	s.run("check")

	// ready
	s.fails(wrongPhase, []string{"db01", "ready"}, "pause", "db01")
	s.fails(wrongPhase, []string{"db01", "ready"}, "cutover", "db01")
	s.fails(wrongPhase, []string{"db01", "ready"}, "remove", "db01")
	s.fails(failed, []string{"db01"}, "wait", "db01", "--for", "synced", "--timeout", "100ms")
	s.run("wait", "db01", "--for", "ready")
	s.run("throttle", "db01", "--rate", "2MiB")
	s.run("throttle", "db01", "--rate", "2MiB")

	// migrating
	s.run("start", "db01")
	s.run("start", "db01")
	s.until("db01", "copying", func(st status) bool { return st.Copied > 0 })
	s.fails(wrongPhase, []string{"db01", "migrating"}, "cutover", "db01")
	s.fails(wrongPhase, []string{"db01", "migrating"}, "remove", "db01")
	s.run("pause", "db01")
	s.run("pause", "db01")
	paused := s.status("db01")
	if !paused.Paused || paused.ETA != nil {
		t.Errorf("paused: %+v", paused)
	}
	host := shell(t, s.front("db01"))
	m := newModel(t, p.sourcePath, p.block)
	m.churn(ctx, host, rand.New(rand.NewPCG(1, 1)), 0, m.size, 20) // initiators go on
	if st := s.status("db01"); st.Copied != paused.Copied {
		t.Errorf("the copy went on while paused: %d bytes, then %d", paused.Copied, st.Copied)
	}
	s.stop()
	s.start()
	if st := s.status("db01"); !st.Paused || st.Phase != "migrating" {
		t.Errorf("pause is not kept over a restart: %+v", st)
	}
	s.run("resume", "db01")
	s.run("resume", "db01")
	s.until("db01", "copying again", func(st status) bool { return !st.Paused && st.Copied > paused.Copied })

	// The throttle, which was kept too, holds.
	began, from := time.Now(), s.status("db01").Copied
	now := s.until("db01", "copying 6 MiB more", func(st status) bool { return st.Copied >= from+6*mib })
	rate := float64(now.Copied-from) / time.Since(began).Seconds()
	if rate > 2*mib*1.5 {
		t.Errorf("throttled to 2 MiB/s, copies %.1f MiB/s", rate/mib)
	}
	if now.ETA == nil || now.Rate <= 0 {
		t.Errorf("no rate or time left while copying: %+v", now)
	}
	s.run("throttle", "db01", "--rate", "0")
	s.run("wait", "db01", "--for", "synced", "--timeout", "1m")

	// synced
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "migrating")
	s.fails(wrongPhase, []string{"db01", "synced"}, "remove", "db01")
	s.run("cutover", "db01", "--wait")
	s.run("cutover", "db01", "--wait")

	// cutover
	s.run("status", "db01", "--watch") // which ends by itself now
	s.run("wait", "db01", "--for", "cutover")
	s.fails(wrongPhase, []string{"db01", "cutover"}, "start", "db01")
	s.fails(wrongPhase, []string{"db01", "cutover"}, "pause", "db01")
	s.stop()
	s.start()
	if st := s.status("db01"); st.Phase != "cutover" {
		t.Errorf("after a restart: %+v", st)
	}
	s.run("remove", "db01")
	s.run("remove", "db01")
	s.stop()
	m.sameAs(p.destinationPath)
}

func TestWrongUseExitsWithTwoAndOneLine(t *testing.T) {
	s := newService(t, files(t))
	s.start()
	for _, args := range [][]string{
		{"start"},
		{"start", "db01", "db01"},
		{"start", "--no-such-flag", "db01"},
		{"no-such-command"},
		{"throttle", "db01"},
		{"throttle", "db01", "--rate", "fast"},
		{"wait", "db01", "--for", "bliss"},
		{"wait", "db01"},
	} {
		s.fails(usage, nil, args...)
	}
	for _, command := range []string{"start", "pause", "status", "cutover"} {
		r := s.try(command, "nobody")
		if r.code == done || !strings.Contains(r.stderr, "nobody") {
			t.Errorf("%s of an unknown volume: exit code %d: %s", command, r.code, r.stderr)
		}
		s.oneLine(r.stderr, nil, command)
	}
	s.stop()
}

func TestStatusAsJSONHasEveryKey(t *testing.T) {
	s := newService(t, files(t))
	s.start()
	var st map[string]any
	must(t, json.Unmarshal([]byte(s.run("status", "db01", "--json")), &st))
	for _, key := range []string{"name", "phase", "paused", "degraded", "size_bytes", "block_size", "allocated_bytes",
		"copied_bytes", "initiator_written_bytes", "remaining_bytes", "copy_rate_bytes_per_second", "eta_seconds",
		"sessions", "source", "destination"} {
		if _, ok := st[key]; !ok {
			t.Errorf("status lacks %s", key)
		}
	}
	for _, args := range [][]string{
		{"status"}, {"check"}, {"start", "db01"}, {"pause", "db01"}, {"resume", "db01"},
		{"throttle", "db01", "--rate", "0"}, {"wait", "db01", "--for", "synced"}, {"cutover", "db01", "--wait"},
		{"remove", "db01"}, {"version"},
	} {
		if text := s.run(append(args, "--json")...); !json.Valid([]byte(text)) {
			t.Errorf("%v --json: %s", args, text)
		}
	}
	s.stop()
}

func TestEveryFaultOfTheConfigurationIsToldAtOnce(t *testing.T) {
	v := files(t)
	v.more = "copy = { depth = 0, rate = \"soon\" }\nregion_size = \"3MiB\"\ncolour = \"red\"\n"
	s := newService(t, v)
	r := s.try("check")
	if r.code != usage && r.code != failed {
		t.Errorf("check: exit code %d", r.code)
	}
	for _, key := range []string{"depth", "rate", "region_size", "colour"} {
		if !strings.Contains(r.stderr, key) {
			t.Errorf("the faults lack %s:\n%s", key, r.stderr)
		}
	}
	if !strings.Contains(r.stderr, s.config()+":") {
		t.Errorf("the faults lack the file:\n%s", r.stderr)
	}
}

func TestAfterCutoverNothingPassesTheProxy(t *testing.T) {
	needTools(t)
	ctx := t.Context()
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 16 * mib}.make(t)
	m := newModel(t, p.sourcePath, p.block)
	s := newService(t, p.volume("db01"))
	s.start()
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "synced", "--timeout", "30s")
	front := s.front("db01")
	host, idle := shell(t, front), shell(t, front)
	m.churn(ctx, host, rand.New(rand.NewPCG(3, 3)), 0, m.size, 10)
	if st := s.status("db01"); len(st.Sessions) != 2 || st.Sessions[0].Initiator != front.Initiator {
		t.Errorf("sessions: %+v", st.Sessions)
	}
	s.run("cutover", "db01")
	if st := s.status("db01"); st.Phase != "cutover" || len(st.Sessions) != 0 {
		t.Errorf("after cutover: %+v", st)
	}
	// The application goes on against the new array, behind lunshift's back.
	direct := p.new.unit(1)
	if _, err := direct.QemuIO(ctx, peer.Write(0xdd, 0, m.size)); err != nil {
		t.Fatal(err)
	}
	// A host that was forgotten gets no data and does no harm. libiscsi goes on
	// trying to log in, so its commands do not end by themselves.
	for _, sh := range []*peer.QemuShell{host, idle} {
		for _, command := range []string{peer.Write(0xee, 0, 64*kib), peer.Read(0xdd, 0, 64*kib)} {
			short, cancel := context.WithTimeout(ctx, 2*time.Second)
			if out, err := sh.Do(short, command); err == nil {
				t.Errorf("%s passed after cutover: %s", command, out)
			}
			cancel()
		}
	}
	if out, err := front.QemuIO(ctx, peer.Read(0xdd, 0, 512)); err == nil {
		t.Errorf("a new login passed: %s", out)
	}
	if out, _ := front.List(ctx); strings.Contains(out, front.IQN) {
		t.Errorf("the target is still listed:\n%s", out)
	}
	if _, err := direct.QemuIO(ctx, peer.Read(0xdd, 0, m.size)); err != nil {
		t.Error(err)
	}
	s.stop()
	s.start()
	if out, _ := front.List(ctx); strings.Contains(out, front.IQN) {
		t.Errorf("the target is listed again after a restart:\n%s", out)
	}
	s.stop()
}
