package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"lunshift/tests/peer"
)

// positions are those of all volumes in the queue, in the order of the configuration.
func (s *service) positions() (all []int) {
	s.t.Helper()
	var list []struct {
		Position int `json:"queue_position"`
	}
	must(s.t, json.Unmarshal([]byte(s.run("status", "--json")), &list))
	for _, v := range list {
		all = append(all, v.Position)
	}
	return all
}

func (s *service) untilQueued(want ...int) {
	s.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !slices.Equal(s.positions(), want); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("the queue is %v, want %v", s.positions(), want)
		}
	}
}

// Caught: volumes that are copied in the order in which they were started or opened, at the
// first run.
func TestVolumesAreCopiedInOrderOfPriorityAndServedMeanwhile(t *testing.T) {
	needTools(t)
	ctx := t.Context()
	dir := t.TempDir()
	const size = 16 * mib
	names := []string{"a", "b", "c"}
	var olds, news []peer.Unit
	for i, name := range names {
		olds = append(olds, peer.Unit{Path: sparseFile(t, dir, name+".old", size, 0.8, uint64(i)), BlockSize: 512, Thin: true})
		news = append(news, peer.Unit{Path: emptyFile(t, dir, name+".new", size), BlockSize: 512, Thin: true})
	}
	from, to := newArray(t, "old", olds...), newArray(t, "new", news...)
	var volumes []volume
	for i, name := range names {
		more := fmt.Sprintf("autostart = true\ncopy = { rate = \"256KiB\", priority = %d }\n", map[string]int{"c": 10}[name])
		volumes = append(volumes, volume{name: name, source: from.unit(uint64(i + 1)).URL(), destination: to.unit(uint64(i + 1)).URL(), more: more})
	}
	s := newService(t, volumes...)
	s.more = "[service.copy]\nparallel = 1\n"
	s.configure()
	s.start()

	// c by its priority, then a and b as the file has them. They serve all the while.
	s.untilQueued(1, 2, 0)
	models := make([]*model, len(names))
	rng := rand.New(rand.NewPCG(3, 3))
	churn := func() {
		for i, name := range names {
			host := shell(t, s.front(name))
			models[i].churn(ctx, host, rng, 0, size, 10)
			must(t, host.Close())
		}
	}
	for i := range names {
		models[i] = newModel(t, olds[i].Path, 512)
	}
	churn()
	s.until("c", "copying", func(st status) bool { return st.Copied > 0 })
	for _, name := range names[:2] {
		if st := s.status(name); st.Phase != "migrating" || st.Copied != 0 || st.InitiatorWritten == 0 {
			t.Errorf("%s, which waits: %+v", name, st)
		}
	}
	if text := s.run("status"); !strings.Contains(text, "migrating, queued (1)") || !strings.Contains(text, "migrating, queued (2)") {
		t.Errorf("status shows\n%s", text)
	}
	if text := s.run("status", "b"); !strings.Contains(text, "migrating, queued (2)") {
		t.Errorf("status b shows\n%s", text)
	}

	// The order is the same after a crash.
	s.kill()
	s.start()
	s.untilQueued(1, 2, 0)
	churn()

	// Who is paused is passed over; a reload gives b the turn.
	s.run("pause", "c")
	s.untilQueued(0, 1, 0)
	s.volumes[1].more = strings.Replace(s.volumes[1].more, "priority = 0", "priority = 99", 1)
	s.configure()
	if text := s.run("reload"); text != "volume[b].copy.priority: changed\n" {
		t.Errorf("reload tells %q", text)
	}
	s.untilQueued(1, 0, 0)
	s.run("resume", "c")
	s.untilQueued(2, 0, 1)

	// All at once, but at one rate for all: 16 MiB/s.
	s.more = "[service.copy]\nparallel = 0\nrate = \"16MiB\"\n"
	for i := range s.volumes {
		s.volumes[i].more = "autostart = true\n"
	}
	s.configure()
	s.run("reload")
	s.untilQueued(0, 0, 0)
	left := uint64(0)
	for _, name := range names {
		st := s.status(name)
		left += min(st.Remaining, st.Allocated-min(st.Allocated, st.Copied+st.InitiatorWritten)) // what is unallocated is not read
	}
	began := time.Now()
	for _, name := range names {
		s.run("wait", name, "--for", "synced", "--timeout", "60s")
	}
	if took, least := time.Since(began), time.Duration(float64(left)/(16*mib)*0.7*float64(time.Second)); took < least {
		t.Errorf("%d bytes took %v at 16 MiB/s for all", left, took)
	}
	for i, name := range names {
		s.run("cutover", name)
		models[i].sameAs(news[i].Path)
	}
	s.stop()
}
