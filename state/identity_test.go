package state

import (
	"errors"
	"sync"
	"testing"
)

// TestIdentityStaysAndIsTheStatesOwn. Caught: an identity that is made anew at each Open;
// one that two first callers make twice.
func TestIdentityStaysAndIsTheStatesOwn(t *testing.T) {
	open := func(dir string) *Store {
		t.Helper()
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	dir := t.TempDir()
	s := open(dir)
	ids := make([]Identity, 32)
	var group sync.WaitGroup
	begin := make(chan struct{})
	for i := range ids {
		group.Go(func() {
			<-begin
			var err error
			if ids[i], err = s.Identity(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	close(begin)
	group.Wait()
	for _, id := range ids {
		if id != ids[0] || id == (Identity{}) {
			t.Fatalf("identities of one state: %x", ids)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Identity(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	again, other := open(dir), open(t.TempDir())
	defer again.Close()
	defer other.Close()
	if id, err := again.Identity(t.Context()); err != nil || id != ids[0] {
		t.Errorf("opened again: %x, %v; was %x", id, err, ids[0])
	}
	if id, err := other.Identity(t.Context()); err != nil || id == ids[0] {
		t.Errorf("another state has the identity %x, %v", id, err)
	}
}
