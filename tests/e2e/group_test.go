package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// records are what writers write to the volumes of a group (peer.Records), each on sessions of its
// own.
type records struct {
	*peer.Records
	s       *service
	names   []string
	paths   []string // of the destinations
	writers sync.WaitGroup
	stop    context.CancelFunc
}

const recordVolume = 4 * mib

// begin has writers write until end.
func (r *records) begin(writers int) {
	r.s.t.Helper()
	ctx, stop := context.WithCancel(r.s.t.Context())
	r.stop = stop
	r.Records = peer.NewRecords(len(r.names), writers, recordVolume)
	for w := range writers {
		var devices []lun.Device
		for _, name := range r.names {
			front := r.s.front(name)
			dev, err := lun.Open(r.s.t.Context(), front.URL(), lun.Options{InitiatorName: fmt.Sprintf("%s%d", front.Initiator, w), IOTimeout: 5 * time.Minute})
			must(r.s.t, err)
			devices = append(devices, dev)
		}
		r.writers.Go(func() {
			defer func() {
				for _, dev := range devices {
					_ = dev.Close() // after a cutover there is nobody to log out of
				}
			}()
			if err := r.Write(ctx, w, devices); err != nil && ctx.Err() == nil {
				r.s.t.Error(err)
			}
		})
	}
}

// end ends the writers; what is under way is given up.
func (r *records) end() {
	r.stop()
	r.writers.Wait()
}

// more waits for so many further records of each writer, as far as there is room.
func (r *records) more(n int64) {
	r.s.t.Helper()
	from := r.Acknowledged()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.s.t.Fatalf("the writers do not get on: %v", r.Acknowledged())
		}
		slow := false
		for w, now := range r.Acknowledged() {
			slow = slow || now < min(from[w]+n, int64(r.Room()))
		}
		if !slow {
			return
		}
	}
}

// image looks at the destinations, which are as they were at the instant of the step: nobody
// writes to them after it. They have at least what was acknowledged before.
func (r *records) image(what string, before []int64) {
	r.s.t.Helper()
	var images [][]byte
	for _, path := range r.paths {
		b, err := os.ReadFile(path)
		must(r.s.t, err)
		images = append(images, b)
	}
	have, err := r.Check(images, nil, before)
	if err != nil {
		r.s.t.Fatalf("%s: %v", what, err)
	}
	r.s.t.Logf("%s: records there %v, acknowledged before %v", what, have, before)
}

// phases are those of the volumes.
func (r *records) phases() []string {
	r.s.t.Helper()
	var list []string
	for _, name := range r.names {
		list = append(list, r.s.status(name).Phase)
	}
	return list
}

// killed takes a step, kills the service in the middle of it, and again until it was taken. It
// was taken of all volumes or of none. Then it gives what was acknowledged before.
func (r *records) killed(rng *rand.Rand, within time.Duration, taken []string, args ...string) []int64 {
	r.s.t.Helper()
	before := r.Acknowledged()
	cmd := exec.Command(binary, append([]string{"--config", r.s.config()}, args...)...)
	must(r.s.t, cmd.Start())
	time.Sleep(time.Duration(rng.Int64N(int64(within)))) // the instant of the kill
	r.s.kill()
	_ = cmd.Wait() // it may have failed with the service
	r.s.start()
	phases := r.phases()
	all := !slices.ContainsFunc(phases, func(p string) bool { return !slices.Contains(taken, p) })
	none := !slices.ContainsFunc(phases, func(p string) bool { return p != "synced" })
	if !all && !none {
		r.s.t.Fatalf("%v, killed: the volumes are %v", args, phases)
	}
	r.s.t.Logf("%v, killed: the volumes are %v", args, phases)
	if none {
		before = r.Acknowledged()
		r.s.run(args...)
	}
	return before
}

// After each of many rollbacks and cutovers of a group, some killed in the middle, the image of
// its three volumes is one that a crash of all hosts at one instant could have left.
//
// Caught, at the first run: one volume after another; commands to one volume held alone (the turn
// of the flags of the others is refused).
func TestAGroupStepsAtOneInstant(t *testing.T) {
	needTools(t)
	for run := range 2 {
		t.Run(fmt.Sprint(run), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(run), 5))
			dir := t.TempDir()
			var olds, news []peer.Unit
			r := &records{names: []string{"a", "b", "c"}}
			for _, name := range r.names {
				olds = append(olds, peer.Unit{Path: emptyFile(t, dir, name+".old", recordVolume), BlockSize: 512, Thin: true})
				news = append(news, peer.Unit{Path: emptyFile(t, dir, name+".new", recordVolume), BlockSize: 512, Thin: true})
				r.paths = append(r.paths, news[len(news)-1].Path)
			}
			from, to := newArray(t, "old", olds...), newArray(t, "new", news...)
			var volumes []volume
			for i, name := range r.names {
				volumes = append(volumes, volume{name: name, source: from.unit(uint64(i + 1)).URL(), destination: to.unit(uint64(i + 1)).URL(), more: "logout_timeout = \"1s\"\n"})
			}
			volumes[1].more += "mirror = true\n"
			volumes[2].more += "[[group]]\nname = \"erp\"\nvolumes = [\"a\", \"b\", \"c\"]\nhold_limit = \"30s\"\n"
			s := newService(t, volumes...)
			r.s = s
			s.start()
			r.begin(4)
			defer r.end()
			s.fails(wrongPhase, []string{"group erp: cutover not begun", "volume a: cutover is not allowed", "volume b: ", "volume c: "}, "cutover", "erp", "--force")
			start := []string{"start", "erp"}
			back := []string{"rolling-back", "rolled-back"}
			for round := range 4 {
				s.run(start...)
				start = []string{"start", "erp", "--reuse"}
				s.run("wait", "erp", "--for", "synced", "--timeout", "60s")
				r.more(30)
				before := r.Acknowledged()
				if round%2 == 0 {
					if text := s.run("rollback", "erp"); !strings.Contains(text, "group erp: 3 volume(s)") || !strings.Contains(text, " ms at the last step") {
						t.Errorf("rollback tells %q", text)
					}
				} else {
					before = r.killed(rng, 150*time.Millisecond, back, "rollback", "erp")
				}
				r.more(30)
				r.image(fmt.Sprintf("rollback %d", round), before)
				s.run("wait", "erp", "--for", "rolled-back", "--timeout", "60s")
			}
			s.run(start...)
			s.run("wait", "erp", "--for", "synced", "--timeout", "60s")
			s.fails(usage, []string{"volume a: it is in group erp", "--alone"}, "cutover", "a")
			r.more(30)
			before := r.Acknowledged()
			if run == 0 {
				s.run("cutover", "erp", "--force")
			} else {
				before = r.killed(rng, 150*time.Millisecond, []string{"cutover"}, "cutover", "erp", "--force", "--no-verify")
			}
			r.end()
			r.image("cutover", before)
			s.stop()
		})
	}
}

// Commands of one volume that take longer than hold_limit keep all of the group from the step: it is
// undone, said, and nobody waits longer.
//
// Caught: the limit of the configuration that does not reach the step.
func TestAGroupStepThatHoldsTooLongIsUndone(t *testing.T) {
	needTools(t)
	s := newService(t)
	var slow *peer.FaultyPortal
	for _, name := range []string{"a", "b"} {
		p := sides{block: 512, sourceFile: true, sourceThin: true, destinationThin: true, size: 16 * mib}.make(t)
		v := p.volume(name)
		if name == "b" {
			slow = peer.NewFaultyPortal(t, p.new.Portal())
			v.destination = strings.Replace(v.destination, p.new.Portal(), slow.Portal(), 1)
		}
		s.volumes = append(s.volumes, v)
	}
	s.volumes[1].more = "[[group]]\nname = \"erp\"\nvolumes = [\"a\", \"b\"]\nhold_limit = \"400ms\"\n"
	s.configure()
	s.start()
	s.run("start", "erp")
	s.run("wait", "erp", "--for", "synced", "--timeout", "60s")
	open := func(name string) lun.Device {
		dev, err := lun.Open(t.Context(), s.front(name).URL(), lun.Options{IOTimeout: time.Minute})
		must(t, err)
		t.Cleanup(func() { _ = dev.Close() })
		return dev
	}
	a, b := open("a"), open("b")
	load, stop := context.WithCancel(t.Context())
	defer stop()
	slow.Begin(peer.Slow, 0) // each command takes a second
	var writers sync.WaitGroup
	for i := range 8 { // of one or the other there is always much left
		writers.Go(func() {
			for load.Err() == nil {
				if err := b.WriteAt(t.Context(), make([]byte, 4096), lun.LBA(64*i)); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Duration(i) * 10 * time.Millisecond)
			}
		})
	}
	for deadline := time.Now().Add(time.Minute); slow.Hits() < 8; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no commands are slow")
		}
	}
	s.fails(failed, []string{"group erp: rollback not done", "volume b: commands in flight did not end within 400ms"}, "rollback", "erp")
	began := time.Now()
	must(t, a.WriteAt(t.Context(), make([]byte, 4096), 64))
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("held for %v though it is undone", took)
	}
	for _, name := range []string{"a", "b"} {
		if st := s.status(name); st.Phase != "synced" {
			t.Errorf("volume %s is %s", name, st.Phase)
		}
		if text := s.run("history", name); !strings.Contains(text, "did not end within 400ms") {
			t.Errorf("the trail of %s does not tell:\n%s", name, text)
		}
	}
	stop()
	writers.Wait()
	slow.End()
	s.run("rollback", "erp", "--wait", "--timeout", "60s")
	s.stop()
}
