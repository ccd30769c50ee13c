package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/tests/peer"
)

// backward is what these tests read of status --json besides.
type backward struct {
	Phase        string    `json:"phase"`
	CopiedBack   uint64    `json:"copied_back_bytes"`
	Remaining    uint64    `json:"remaining_bytes"`
	RollbackAt   time.Time `json:"rollback_at"`
	RolledBackAt time.Time `json:"rolled_back_at"`
	Mirror       *struct {
		State  string `json:"state"`
		Behind uint64 `json:"behind_bytes"`
		Marked uint64 `json:"marked_bytes"`
	} `json:"mirror"`
}

func (s *service) backward(name string) (b backward) {
	s.t.Helper()
	must(s.t, json.Unmarshal([]byte(s.run("status", name, "--json")), &b))
	return b
}

// mirror waits until the mirror of a volume is in that state.
func (s *service) mirror(name, state string) {
	s.t.Helper()
	var b backward
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if b = s.backward(name); b.Mirror != nil && b.Mirror.State == state {
			return
		}
	}
	s.t.Fatalf("the mirror of %s is not %s within a minute: %+v", name, state, b)
}

// load is initiators that write to the volume db01 and know what each block may hold.
type load struct {
	s           *service
	o           *peer.Oracle
	rng         *rand.Rand
	findings    peer.Findings
	acks, reads atomic.Int64
	within      uint64 // the blocks from the first on that are written to; 0 is all
}

func newLoad(s *service, p *pair) *load {
	before, err := os.ReadFile(p.sourcePath)
	must(s.t, err)
	return &load{s: s, o: peer.NewOracle(before, int(p.block)), rng: rand.New(rand.NewPCG(p.size, 11))}
}

// during runs the initiators until do returns; where that killed the service, what was not
// answered may have been done.
func (l *load) during(do func()) {
	l.s.t.Helper()
	const clients = 4
	ctx, leave := context.WithCancel(l.s.t.Context())
	defer leave()
	load, stop := context.WithCancel(ctx)
	defer stop()
	share := cmp.Or(l.within, uint64(len(l.o.Cells))) / clients
	var running sync.WaitGroup
	for i := range clients {
		c := &peer.Client{ID: i, Oracle: l.o, From: uint64(i) * share, Blocks: share, Region: 64 * kib,
			Rand: rand.New(rand.NewPCG(l.rng.Uint64(), uint64(i))), Findings: &l.findings, Acks: &l.acks, Reads: &l.reads, Pace: time.Millisecond}
		h := seedHost(l.s.t, l.s, i)
		running.Go(func() {
			defer h.Close()
			c.Run(ctx, load, h)
		})
	}
	do()
	stop()
	if l.s.cmd == nil {
		leave()
	}
	running.Wait()
}

// more waits for so many further acknowledged writes.
func (l *load) more(n int64) {
	l.s.t.Helper()
	from := l.acks.Load()
	for deadline := time.Now().Add(time.Minute); l.acks.Load() < from+n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.s.t.Fatalf("%d writes within a minute, want %d", l.acks.Load()-from, n)
		}
	}
}

// holds compares an image with what was acknowledged, block by block.
func (l *load) holds(path string) {
	l.s.t.Helper()
	image, err := os.ReadFile(path)
	must(l.s.t, err)
	image = image[:len(l.o.Cells)*l.o.BlockSize]
	if list := append(l.findings.List(), l.o.Check(image, 0, false, 16)...); len(list) > 0 {
		l.s.t.Fatalf("%s: %d faults:\n%s", path, len(list), strings.Join(list, "\n"))
	}
}

// readBack compares what initiators read with what was acknowledged.
func (l *load) readBack() {
	l.s.t.Helper()
	h := seedHost(l.s.t, l.s, 0)
	defer h.Close()
	_, wrong, err := l.o.ReadBack(l.s.t.Context(), h, false)
	must(l.s.t, err)
	if len(wrong) > 0 {
		l.s.t.Fatalf("%d faults:\n%s", len(wrong), strings.Join(wrong, "\n"))
	}
}

// stays logs in once, and gives what demands that this very session is still there: other initiators of
// these tests log in again by themselves.
func (s *service) stays(name string) func() {
	s.t.Helper()
	i, err := s.front(name).Login(s.t.Context(), iscsi.ISID{0x80, 7})
	must(s.t, err)
	s.t.Cleanup(func() { i.Close() })
	return func() {
		s.t.Helper()
		defer i.Close()
		for range 4 { // unit attentions come first
			a, err := i.Do(make([]byte, 6), nil, 0)
			if err != nil {
				s.t.Errorf("the session has ended: %v", err)
				return
			}
			if a.Status == iscsi.StatusGood {
				return
			}
		}
		s.t.Error("TEST UNIT READY fails")
	}
}

// A rollback in the middle of the copy, under load and with a kill in the middle of the way
// back, leaves every acknowledged write on the source; then a start anew moves all of it again.
//
// Caught, at the first run: commands not routed back; a service that comes back and takes the
// direction for forward; sessions dropped by the step; all of the source copied back; a start anew
// that copies what it could compare.
func TestARollbackUnderLoadLeavesEveryWriteOnTheSource(t *testing.T) {
	needTools(t)
	for _, p := range []sides{
		{name: "thin arrays", block: 512, sourceThin: true, destinationThin: true, size: 32 * mib},
		{name: "thick source with 4096-byte blocks", block: 4096, destinationThin: true, size: 32 * mib},
	} {
		t.Run(p.name, func(t *testing.T) {
			p := p.make(t)
			v := p.volume("db01")
			v.more = "region_size = \"256KiB\"\n"
			s := newService(t, v)
			s.start()
			l := newLoad(s, p)
			s.fails(wrongPhase, []string{"rollback is not allowed in phase ready"}, "rollback", "db01")
			s.run("throttle", "db01", "--rate", "4MiB")
			l.during(func() {
				l.more(20)
				s.run("start", "db01")
				l.more(300)
				s.run("throttle", "db01", "--rate", "64KiB")
			})
			l.during(func() { // elsewhere, so that not all is written again before it is copied back
				l.more(50)
				stays := s.stays("db01")
				s.run("rollback", "db01")
				s.run("pause", "db01")
				stays()
				s.run("rollback", "db01")
				if b := s.backward("db01"); b.Phase != "rolling-back" || b.Remaining == 0 {
					t.Errorf("after the rollback: %+v", b)
				}
				l.more(50)
				s.kill()
			})
			s.start()
			l.readBack()
			l.during(func() {
				if b := s.backward("db01"); b.Phase != "rolling-back" {
					t.Errorf("after the kill: %+v", b)
				}
				s.fails(wrongPhase, []string{"wait for phase synced"}, "wait", "db01", "--for", "synced")
				l.more(100)
				stays := s.stays("db01")
				s.run("throttle", "db01", "--rate", "0")
				s.run("resume", "db01")
				s.run("rollback", "db01", "--wait", "--timeout", "60s")
				stays()
				l.more(100)
			})
			// Initiators wrote to 1 MiB at each of two times before the rollback.
			if b := s.backward("db01"); b.Phase != "rolled-back" || b.CopiedBack == 0 || b.CopiedBack > 2*mib || b.Remaining != 0 {
				t.Errorf("in the end: %+v", b)
			}
			l.readBack()
			l.holds(p.sourcePath)

			s.fails(failed, []string{"not blank", "--reuse"}, "start", "db01")
			l.during(func() {
				s.run("start", "db01", "--reuse")
				l.more(100)
				s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
			})
			if st := s.status("db01"); !st.Compare || st.Equal == 0 {
				t.Errorf("--reuse after a rollback: %+v", st)
			}
			s.run("cutover", "db01")
			l.holds(p.destinationPath)
			s.stop()
		})
	}
}

// A mirror brings both sides to the same content after a kill, and after the source was away; a
// rollback copies nothing then.
//
// Caught, at the first run: nothing written to the source; what is dirty after a kill not brought to
// it; a source that is back not asked; extents that may have been lost with the source's cache called
// whole.
func TestMirroredSidesAreTheSameAfterAKillAndAnOutage(t *testing.T) {
	needTools(t)
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 16 * mib}.make(t)
	v := p.volume("db01")
	v.more = "mirror = true\nregion_size = \"256KiB\"\n"
	s := newService(t, v)
	s.ioTimeout = "30s"
	s.configure()
	s.start()
	l := newLoad(s, p)
	same := func(when string) {
		t.Helper()
		s.mirror("db01", "whole")
		source, err := os.ReadFile(p.sourcePath)
		must(t, err)
		destination, err := os.ReadFile(p.destinationPath)
		must(t, err)
		if !bytes.Equal(source, destination[:len(source)]) {
			t.Fatalf("%s: the two sides differ", when)
		}
		l.holds(p.sourcePath)
	}
	s.run("start", "db01")
	for range 2 {
		l.during(func() {
			s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
			l.more(200)
			// What both sides had for a while is not brought over again.
			most := uint64(0)
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
				marked := s.backward("db01").Mirror.Marked
				if most = max(most, marked); marked < most {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%d bytes stay marked", marked)
				}
			}
			s.kill()
		})
		s.start()
		same("after a kill")
	}
	l.during(func() {
		if text := s.run("mirror", "db01", "off"); strings.Contains(text, "mirror") || s.backward("db01").Mirror != nil {
			t.Errorf("mirror off: %s", text)
		}
		l.more(100)
		if text := s.run("mirror", "db01", "on"); !strings.Contains(text, "db01: synced, mirror ") {
			t.Errorf("mirror on: %s", text)
		}
		l.more(50)
	})
	same("after it was off for a while")
	l.during(func() {
		l.more(50)
		must(t, p.old.Kill())
		s.mirror("db01", "broken")
		l.more(200) // initiators do not notice
		if text := s.run("status", "db01"); !strings.Contains(text, "broken, the source is") {
			t.Errorf("status does not tell:\n%s", text)
		}
		must(t, p.old.Start(t.Context()))
		for deadline := time.Now().Add(time.Minute); s.backward("db01").Mirror.State == "broken"; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Error("the mirror stays broken")
				return
			}
		}
		l.more(50)
	})
	same("after the source was away")
	before := s.backward("db01")
	s.run("rollback", "db01", "--wait", "--timeout", "30s")
	after := s.backward("db01")
	if took := after.RolledBackAt.Sub(after.RollbackAt); after.CopiedBack != before.CopiedBack || took > 5*time.Second {
		t.Errorf("with a whole mirror %d bytes were copied back in %v", after.CopiedBack-before.CopiedBack, took)
	} else {
		t.Logf("rolled back in %v", took)
	}
	l.holds(p.sourcePath)
	s.stop()
}
