package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
)

func TestReservationsOutliveTheProcessAndARenewal(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	check := func(volume, want string) {
		t.Helper()
		got, err := s.Reservation(volume)
		if err != nil || string(got) != want || (got == nil) != (want == "") {
			t.Fatalf("reservations of %s: %q, %v, want %q", volume, got, err, want)
		}
	}
	put := func(volume, data string) {
		t.Helper()
		if err := s.PutReservation(ctx, volume, []byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	check("v", "")
	put("v", "one")
	put("w", "other")
	check("v", "one")
	s = reopen(t, s)
	check("v", "one")
	put("v", "two")
	if err := s.PutRecords(ctx, Record{Volume: "v", Phase: "ready"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Renew("v"); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	check("v", "two")
	if _, found, err := s.Record("v"); found || err != nil {
		t.Fatalf("the record is still there (%v)", err)
	}
	if err := s.Forget("v", Record{Volume: "v", Phase: "removed"}); err != nil {
		t.Fatal(err)
	}
	check("v", "")
	check("w", "other")
	put("w", "")
	s = reopen(t, s)
	check("v", "")
	check("w", "")
}

func TestReservationsShareCommitsWithFlags(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	f, err := s.Flags("v", Geometry{Blocks: 1 << 20, RegionBlocks: 128})
	if err != nil {
		t.Fatal(err)
	}
	const each = 100
	var all sync.WaitGroup
	for n := range 16 {
		all.Go(func() {
			for i := range each {
				var err error
				if n%2 == 0 {
					err = f.Set(ctx, Valid, Run{uint64(n*each+i) * 3, 1})
				} else {
					err = s.PutReservation(ctx, fmt.Sprintf("v%d", n), fmt.Appendf(nil, "%d", i))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if st := s.Stats(); st.Commits >= 16*each/2 {
		t.Errorf("%d commits for %d requests", st.Commits, st.Requests)
	}
	s = reopen(t, s)
	for n := 1; n < 16; n += 2 {
		if got, err := s.Reservation(fmt.Sprintf("v%d", n)); err != nil || string(got) != fmt.Sprint(each-1) {
			t.Errorf("volume v%d: %q, %v", n, got, err)
		}
	}
}

func TestReservationsThatCannotBeKeptOrReadAreRefused(t *testing.T) {
	ctx := context.Background()
	s := open(t, t.TempDir())
	if err := s.PutReservation(ctx, "v", bytes.Repeat([]byte("x"), mostReservation+1)); err == nil || !strings.Contains(err.Error(), "volume v") {
		t.Error(err)
	}
	if err := s.PutReservation(ctx, "v", bytes.Repeat([]byte("x"), mostReservation)); err != nil {
		t.Error(err)
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.PutReservation(over, "v", []byte("late")); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if got, err := s.Reservation("v"); err != nil || len(got) != mostReservation {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for value, want := range map[string]error{"\x09data": ErrVersion, "\x00data": ErrCorrupt, "\x01": ErrCorrupt} {
		if err := s.submit(ctx, &request{records: []op{{reservationKey("v"), []byte(value)}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Reservation("v"); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", value, err, want)
		}
	}
	s.freeMin.Store(1 << 62)
	if err := s.PutReservation(ctx, "v", []byte("more")); !errors.Is(err, ErrNoSpace) {
		t.Error(err)
	}
}
