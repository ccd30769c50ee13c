package proxy

import (
	"context"
	"testing"

	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

func TestReservationsStayAsLongAsTheVolumeIsTheSame(t *testing.T) {
	ctx := context.Background()
	const data = `{"schema":2,"registrations":[{"name":"aXFuLjIwMjYtMTEubmV0LmV4YW1wbGU6YQ==","isid":[1,2,3,4,5,6],"portal_group":1,"key":7}]}`
	r := newRig(t, 1024)
	kept := func(what, want string) {
		t.Helper()
		got, err := r.vol.front().Reservations.Load()
		must(t, err)
		if string(got) != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	v := r.open(t)
	kept("a new volume", "")
	must(t, v.front().Reservations.Save(ctx, make([]byte, target.MostReservationData)))
	must(t, v.front().Reservations.Save(ctx, []byte(data)))
	r.close(t)
	r.open(t)
	kept("ready, after a restart", data)

	// Another source is another disk.
	first := r.source
	r.close(t)
	r.source = luntest.NewThinMemory(testBlock, 1024)
	v = r.open(t)
	kept("ready, with another source", "")
	r.close(t)
	r.source = first
	v = r.open(t)
	kept("ready, with the first source again", "")

	must(t, v.front().Reservations.Save(ctx, []byte(data)))
	must(t, v.Start(ctx))
	waitFor(t, v, Synced)
	kept("synced", data)
	r.close(t)
	v = r.open(t)
	kept("synced, after a restart", data)
	must(t, v.Cutover(ctx, CutoverOptions{}))
	must(t, v.Remove(ctx))
	kept("removed", "")
	must(t, r.store.Close())
	store, err := state.Open(r.dir, state.Options{Log: quiet()})
	must(t, err)
	defer store.Close()
	if got, err := store.Reservation("vol"); err != nil || got != nil {
		t.Errorf("removed, after a restart: %q, %v", got, err)
	}
}
