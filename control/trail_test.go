package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"lunshift/proxy"
	"lunshift/state"
)

// historyOf is the audit trail of a volume, a line each: what, result.
func historyOf(t *testing.T, c *Client, volume string) (events []state.Event, lines []string) {
	t.Helper()
	events, err := c.History(t.Context(), volume)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		lines = append(lines, strings.TrimSpace(what(e)+" "+e.Result))
	}
	return events, lines
}

func sameLines(t *testing.T, when string, have []string, want ...string) {
	t.Helper()
	if strings.Join(have, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s: history is\n  %s\nwant\n  %s", when, strings.Join(have, "\n  "), strings.Join(want, "\n  "))
	}
}

// Caught: a pause or a verify that goes past Service.step; a peer that is not asked for; options
// that are not kept; a refused step that counts as failed.
func TestEveryStepIsInTheTrailWithWhoAskedAndWhatCameOfIt(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	client, _ := serveFakes(t, v)
	_, _ = client.Start(ctx, "db01", proxy.StartOptions{Reuse: true})
	_, _ = client.Pause(ctx, "db01")
	_, _ = client.Resume(ctx, "db01")
	_, _ = client.Start(ctx, "db01")
	_, _ = client.Throttle(ctx, "db01", 1<<40)
	_, _ = client.Mirror(ctx, "db01", true)
	_, _ = client.Mirror(ctx, "db01", false)
	_, _ = client.Cutover(ctx, "db01", proxy.CutoverOptions{Force: true})
	v.set(func(s *proxy.Status) { s.Phase = proxy.Synced })
	_, _ = client.Verify(ctx, "db01", proxy.VerifyOptions{Sample: 5})
	v.mu.Lock()
	v.fail = errors.New("the array\nis on fire")
	v.mu.Unlock()
	_, _ = client.Rollback(ctx, "db01", proxy.RollbackOptions{})
	v.mu.Lock()
	v.fail = &proxy.Refusal{Reason: "it does not fit"}
	v.mu.Unlock()
	_, _ = client.Start(ctx, "db01")
	v.mu.Lock()
	v.fail = nil
	v.mu.Unlock()
	_, _ = client.Cutover(ctx, "db01", proxy.CutoverOptions{})
	_, _ = client.Status(ctx, "db01")
	_, _ = client.Start(ctx, "db09")
	_, _ = client.Remove(ctx, "db09")
	_, _ = client.Adopt(ctx, "db01", proxy.AdoptOptions{New: true})
	_, _ = client.Remove(ctx, "db01")

	events, lines := historyOf(t, client, "db01")
	sameLines(t, "all", lines, "start reuse done", "pause done", "resume done", "start done", "throttle rate=1099511627776 done", "mirror on done", "mirror off done",
		"cutover force refused", "verify sample-bytes=5 done", "rollback failed", "start refused", "cutover done", "adopt new failed", "remove done")
	for i, e := range events {
		if e.Sequence != uint64(i+1) || e.Who.UID == nil || *e.Who.UID != uint32(os.Getuid()) || e.Who.PID != int32(os.Getpid()) || e.Who.Service || e.Took == nil || *e.Took < 0 ||
			time.Since(e.At) > time.Minute {
			t.Errorf("event %+v", e)
		}
	}
	for at, text := range map[int]string{3: "nothing to do", 7: "cutover is not allowed in phase migrating", 8: "everything compared", 9: "the array; is on fire", 10: "it does not fit", 13: "its state is forgotten"} {
		if !strings.Contains(events[at].Text, text) {
			t.Errorf("event %d lacks %q: %q", at, text, events[at].Text)
		}
	}
	if _, err := client.History(ctx, "db09"); KindOf(err) != Unknown {
		t.Errorf("history of a volume that never was: %v", err)
	}
	all, _ := historyOf(t, client, "")
	if len(all) != len(events) {
		t.Errorf("all volumes: %d events, want %d", len(all), len(events))
	}
}

// Caught: the event written once the step has ended; a trail that cannot be written and is
// logged alone.
func TestStepIsWrittenDownBeforeItBegins(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	client, s := serveFakes(t, v)
	v.during = func() {
		_, lines := historyOf(t, client, "db01")
		sameLines(t, "while it is done", lines, "start begun")
	}
	if _, err := client.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	_, lines := historyOf(t, client, "db01")
	sameLines(t, "done", lines, "start done")

	v.during = func() { t.Error("a step was begun that is not in the trail") }
	if err := s.store.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Pause(ctx, "db01"); err == nil || !strings.Contains(err.Error(), "pause not begun, as it cannot be written down") || v.Status().Paused {
		t.Errorf("without a trail: %v, paused %v", err, v.Status().Paused)
	}
	// But in an emergency.
	if _, err := client.BreakFence(ctx, "db01"); err == nil || strings.Contains(err.Error(), "written down") || !strings.Contains(err.Error(), "volume db01") {
		t.Errorf("break-fence without a trail: %v", err)
	}
	done := false
	if err := s.step(ctx, itself, step{name: "break-fence", unwritten: true, do: func(context.Context) (string, error) { done = true; return "", nil }}, s.entries...); err != nil || !done {
		t.Errorf("a step that needs no trail: %v, done %v", err, done)
	}
}

// Caught: an end that is written under the context of the service; what an earlier service
// began shown as under way.
func TestStepThatTheServiceDidNotEndIsShownAsUnknown(t *testing.T) {
	v := newFake("db01")
	client, s := serveFakes(t, v)
	if _, err := s.asks(t.Context(), itself, "", "start", nil, "db01"); err != nil {
		t.Fatal(err)
	}
	s.since = time.Now()
	if _, err := s.asks(t.Context(), itself, "", "pause", nil, "db01"); err != nil {
		t.Fatal(err)
	}
	events, lines := historyOf(t, client, "db01")
	sameLines(t, "after a restart", lines, "start unknown", "pause begun")
	if events[0].Text == "" {
		t.Error("it is not said why")
	}
	a, err := s.asks(t.Context(), itself, "", "resume", nil, "db01")
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	a.ends("well", nil)
	if of, err := s.store.History("db01"); err != nil || of[2].Result != resultDone {
		t.Errorf("an end while the service stops: %+v, %v", of, err)
	}
}

func TestHistoryIsShownOnALineEach(t *testing.T) {
	id, login, took := uint32(0), uint32(1<<31), 61000.0
	at := time.Date(2026, 11, 23, 7, 0, 0, 0, time.Local)
	events := []state.Event{
		{Volume: "db01", At: at, Who: state.Who{UID: &id, User: "root", LoginUID: &login}, What: "cutover", Group: "erp",
			Options: []byte(`{"accept_unreadable":true,"no_verify":false}`), Result: "failed", Text: "a\x1b[2J\nb", Took: &took},
		{Volume: "db01", At: at, Who: itself, What: "fault", Result: resultNoted, Text: "copy: x"},
	}
	var b bytes.Buffer
	if err := WriteHistory(&b, events); err != nil {
		t.Fatal(err)
	}
	want := "TIME                 WHO                     WHAT                                       RESULT\n" +
		"2026-11-23 07:00:00  uid 2147483648 as root  cutover accept-unreadable (group erp)      failed in 1m 01s: a [2J b\n" +
		"2026-11-23 07:00:00  lunshift                fault                                      copy: x\n"
	if strings.Join(strings.Fields(b.String()), " ") != strings.Join(strings.Fields(want), " ") || strings.Count(b.String(), "\n") != 3 {
		t.Errorf("%q", b.String())
	}
	b.Reset()
	events[1].Volume = ""
	if err := WriteHistory(&b, events); err != nil || !strings.Contains(b.String(), "VOLUME") || !strings.Contains(b.String(), "db01") {
		t.Errorf("of several: %q, %v", b.String(), err)
	}
	b.Reset()
	if err := WriteHistory(&b, nil); err != nil || strings.Count(b.String(), "\n") != 1 {
		t.Errorf("of nothing: %q, %v", b.String(), err)
	}
}

func TestWhoIsNotKnownIsSaidSo(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", nil).WithContext(context.Background())
	if text := who(asker(r)); text != "?" {
		t.Errorf("%q", text)
	}
}

// Caught: a group's pause that is entered for its first volume alone; a reload that is not
// entered where it changed something; synced not noted.
func TestTrailHasGroupsReloadsAndWhatHappensByItself(t *testing.T) {
	ctx := t.Context()
	f := newFile(t, "a", "b", "c")
	f.add("c", erp)
	r := f.start()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := r.client.CutoverGroup(ctx, "erp", proxy.CutoverOptions{})
	if KindOf(err) != WrongPhase {
		t.Errorf("cutover: %v", err)
	}
	_, err = r.client.StartGroup(ctx, "erp", proxy.StartOptions{})
	check(err)
	_, err = r.client.WaitGroup(ctx, "erp", proxy.Synced, 30*time.Second, true)
	check(err)
	if _, err := r.client.Cutover(ctx, "a", proxy.CutoverOptions{}); KindOf(err) != Usage {
		t.Errorf("alone: %v", err)
	}
	f.add("b", "copy = { rate = \"7MiB\" }\n")
	if report := f.reload(r); report.Err() != nil {
		t.Fatal(report.Err())
	}
	_, err = r.client.RollbackGroup(ctx, "erp", proxy.RollbackOptions{})
	check(err)
	_, err = r.client.WaitGroup(ctx, "erp", proxy.RolledBack, 30*time.Second, false)
	check(err)
	// What happens by itself is written down soon after.
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if all, _ := historyOf(t, r.client, "erp"); strings.Count(fmt.Sprint(all), string(proxy.RolledBack)) == 3 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("no rolled-back: %+v", all)
		}
	}
	for name, want := range map[string][]string{
		"a": {"cutover (group erp) refused", "start (group erp) done", "synced noted", "cutover refused", "rollback (group erp) done", "rolled-back noted"},
		"b": {"cutover (group erp) refused", "start (group erp) done", "synced noted", "reload done", "rollback (group erp) done", "rolled-back noted"},
		"c": {"cutover (group erp) refused", "start (group erp) done", "synced noted", "rollback (group erp) done", "rolled-back noted"},
	} {
		events, lines := historyOf(t, r.client, name)
		sameLines(t, name, lines, want...)
		if name == "b" && events[3].Text != "copy.rate changed" {
			t.Errorf("reload: %+v", events[3])
		}
	}
	check(r.stop())
	r = f.start()
	// A restart notes nothing anew.
	if _, lines := historyOf(t, r.client, "a"); len(lines) != 6 {
		t.Errorf("after a restart: %v", lines)
	}
	var service []string
	all, _ := historyOf(t, r.client, "")
	for _, e := range all {
		if e.Volume == "" {
			service = append(service, e.What+" "+e.Result+" "+e.Text)
		}
	}
	sameLines(t, "service", service, "serve noted lunshift test", "reload done volume[b].copy.rate: changed", "stop noted lunshift test", "serve noted lunshift test")
}
