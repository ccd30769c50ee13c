package state

import (
	"strings"
	"testing"
)

// Caught: Renew that keeps what the last migration left out.
func TestWhatIsLeftOutEndsWithItsMigration(t *testing.T) {
	ctx := t.Context()
	s := open(t, t.TempDir())
	check := func(volume, want string) {
		t.Helper()
		got, err := s.Unused(volume)
		if err != nil || string(got) != want || (got == nil) != (want == "") {
			t.Fatalf("left out of %s: %q, %v, want %q", volume, got, err, want)
		}
	}
	check("v", "")
	for volume, data := range map[string]string{"v": "one", "w": "other"} {
		if err := s.PutUnused(ctx, volume, []byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s)
	check("v", "one")
	if err := s.PutRecords(ctx, Record{Volume: "v", Phase: "ready"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Renew("v"); err != nil {
		t.Fatal(err)
	}
	check("v", "")
	if err := s.PutUnused(ctx, "v", []byte("two")); err != nil {
		t.Fatal(err)
	}
	if err := s.Forget("v"); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	check("v", "")
	check("w", "other")
	if err := s.PutUnused(ctx, "v", make([]byte, MostUnused+1)); err == nil || !strings.Contains(err.Error(), "volume v: ") {
		t.Errorf("more than can be kept: %v", err)
	}
}
