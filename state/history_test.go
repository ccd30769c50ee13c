package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

func asked(volume, what string) Event {
	uid := uint32(1000)
	return Event{Volume: volume, At: time.Now().UTC().Round(0), Who: Who{UID: &uid, User: "alice", PID: 7}, What: what, Result: "begun"}
}

func byItself(volume, what string) Event {
	return Event{Volume: volume, At: time.Now().UTC().Round(0), Who: Who{Service: true}, What: what, Result: "noted"}
}

func appended(t testing.TB, s *Store, events ...Event) []Event {
	t.Helper()
	events, err := s.Append(t.Context(), events...)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

func historyOf(t testing.TB, s *Store, volume string) []Event {
	t.Helper()
	events, err := s.History(volume)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// Caught: numbers that begin anew after a reopen; Forget that takes the trail with it.
func TestTrailOutlivesItsVolumeAndStaysInOrder(t *testing.T) {
	s := open(t, t.TempDir())
	first := asked("db01", "start")
	first.Options = json.RawMessage(`{"reuse":true}`)
	first = appended(t, s, first, byItself("db01", "synced"), asked("db012", "start"), byItself("", "serve"))[0]
	if err := s.PutRecords(t.Context(), Record{Volume: "db01", Phase: "ready"}); err != nil {
		t.Fatal(err)
	}
	took := 12.5
	first.Result, first.Text, first.Took = "done", "all well", &took
	if err := s.Amend(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if err := s.Forget("db01"); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	last := appended(t, s, asked("db01", "remove"))[0]
	have := historyOf(t, s, "db01")
	if len(have) != 3 || !reflect.DeepEqual(have[0], first) || have[1].What != "synced" || !reflect.DeepEqual(have[2], last) {
		t.Errorf("history: %+v", have)
	}
	for i, e := range have {
		if e.Sequence != uint64(i+1) {
			t.Errorf("event %d has number %d", i, e.Sequence)
		}
	}
	if have := historyOf(t, s, ""); len(have) != 1 || have[0].What != "serve" {
		t.Errorf("history of the service: %+v", have)
	}
	all, err := s.Histories()
	if err != nil || len(all) != 5 || all[4].What != "remove" {
		t.Errorf("all: %v, %+v", err, all)
	}
}

// Caught: one list for both, so that faults push the start out; a count that is not
// taken up at a reopen, so that nothing gives way.
func TestTrailIsBoundedAndFaultsPushNoStepOut(t *testing.T) {
	s := open(t, t.TempDir())
	appended(t, s, asked("db01", "start"))
	const more = 1200 // that gives way, in part after a reopen
	for left := MostEvents + more; left > 0; left -= 400 {
		events := make([]Event, 400)
		for i := range events {
			events[i] = byItself("db01", "fault")
		}
		appended(t, s, events...)
		if left == 800 {
			s = reopen(t, s)
		}
	}
	have := historyOf(t, s, "db01")
	if len(have) != MostEvents+1 || have[0].What != "start" || have[1].Sequence != more+2 || have[len(have)-1].Sequence != MostEvents+more+1 {
		t.Fatalf("%d events, first %+v, second %+v, last %+v", len(have), have[0], have[1], have[len(have)-1])
	}
	// One that gave way does not come back.
	gone := byItself("db01", "fault")
	gone.Sequence = 2
	if err := s.Amend(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	if n := len(historyOf(t, s, "db01")); n != MostEvents+1 {
		t.Errorf("%d events after an amendment", n)
	}
}

// Caught: the lock of the trail given back before the commit, so that two events have one number.
func TestEventsOfManyAtOnceHaveOneNumberEach(t *testing.T) {
	s := open(t, t.TempDir())
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 10 {
				if _, err := s.Append(context.Background(), asked("db01", fmt.Sprint(i, j)), byItself("db02", "x")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for _, volume := range []string{"db01", "db02"} {
		have := historyOf(t, s, volume)
		if len(have) != 80 || have[79].Sequence != 80 {
			t.Errorf("%s: %d events", volume, len(have))
		}
	}
}

func TestEventsThatCannotBeKeptOrReadAreRefused(t *testing.T) {
	s := open(t, t.TempDir())
	e := asked("v", "start")
	e.Text = strings.Repeat("x", mostEvent)
	if _, err := s.Append(t.Context(), e); err == nil {
		t.Error("an event that is too long was kept")
	}
	if _, err := s.Append(t.Context(), asked("a\x00b", "start")); err == nil {
		t.Error("a name with NUL was taken")
	}
	if err := s.Amend(t.Context(), asked("v", "start")); err == nil {
		t.Error("an event without a number was amended")
	}
	s.freeMin.Store(1 << 62)
	if _, err := s.Append(t.Context(), asked("v", "start")); !errors.Is(err, ErrNoSpace) {
		t.Error(err)
	}
	s.freeMin.Store(minFree)
	// What was refused took no number.
	if e := appended(t, s, asked("v", "start"))[0]; e.Sequence != 1 {
		t.Errorf("number %d", e.Sequence)
	}
	for value, want := range map[string]error{
		`{"schema":2,"volume":"v","sequence":1}`: ErrVersion, `{"schema":1,"volume":"w","sequence":1}`: ErrCorrupt,
		`{"schema":1,"volume":"v","sequence":2}`: ErrCorrupt, `x`: ErrCorrupt,
	} {
		if err := s.submit(t.Context(), &request{records: []op{{eventKey("v", askedList, 1), []byte(value)}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.History("v"); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", value, err, want)
		}
	}
	if err := s.submit(t.Context(), &request{records: []op{{[]byte(eventPrefix + "v"), []byte("{}")}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Histories(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a key that is cut off: %v", err)
	}
}

// Caught: checksums that a new migration finds; a report that goes with its volume.
func TestAttachmentsEndWithWhatTheyBelongTo(t *testing.T) {
	ctx := t.Context()
	s := open(t, t.TempDir())
	check := func(a Attachment, want string) {
		t.Helper()
		got, err := s.Attached("v", a)
		if err != nil || string(got) != want || (got == nil) != (want == "") {
			t.Errorf("%c: %q, %v, want %q", a, got, err, want)
		}
	}
	for _, a := range []Attachment{Followed, Checksums, Report} {
		check(a, "")
		if err := s.Attach(ctx, "v", a, []byte{byte(a)}); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s)
	if err := s.Renew("v"); err != nil {
		t.Fatal(err)
	}
	check(Followed, "f")
	check(Checksums, "")
	if err := s.Forget("v"); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	check(Followed, "")
	check(Report, "r")
	if err := s.Attach(ctx, "v", Report, make([]byte, MostAttached+1)); err == nil || !strings.Contains(err.Error(), "volume v: ") {
		t.Errorf("more than can be kept: %v", err)
	}
	for value, want := range map[string]error{"\x09data": ErrVersion, "\x00data": ErrCorrupt, "\x01": ErrCorrupt} {
		if err := s.submit(ctx, &request{records: []op{{attachmentKey("v", Report), []byte(value)}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Attached("v", Report); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", value, err, want)
		}
	}
}
