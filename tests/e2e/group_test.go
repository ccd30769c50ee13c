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
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// records are what writers write: each numbers its records, writes record n to volume n mod 3, on
// a session of its own, and begins none before the one before was acknowledged. So an image of
// the volumes at one instant has of each writer the records up to some number, and no others.
type records struct {
	s       *service
	names   []string
	paths   []string // of the destinations
	acked   []atomic.Int64
	writers sync.WaitGroup
	stop    context.CancelFunc
}

const recordVolume = 4 * mib

// begin has writers write until end.
func (r *records) begin(writers int) {
	r.s.t.Helper()
	ctx, stop := context.WithCancel(r.s.t.Context())
	r.stop = stop
	r.acked = make([]atomic.Int64, writers)
	share := uint64(recordVolume / 512 / writers)
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
			block := make([]byte, 512)
			for n := uint64(0); n/3 < share; n++ {
				at := uint64(w)*share + n/3
				peer.Stamp(block, 512, at, uint64(w+1), n+1)
				if err := devices[n%3].WriteAt(ctx, block, lun.LBA(at)); err != nil {
					if ctx.Err() == nil {
						r.s.t.Errorf("writer %d, record %d: %v", w, n, err)
					}
					return
				}
				r.acked[w].Store(int64(n + 1))
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
	from := r.count()
	share := int64(recordVolume / 512 / len(r.acked))
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.s.t.Fatalf("the writers do not get on: %v", r.count())
		}
		slow := false
		for w, now := range r.count() {
			slow = slow || now < min(from[w]+n, 3*share)
		}
		if !slow {
			return
		}
	}
}

func (r *records) count() []int64 {
	var list []int64
	for w := range r.acked {
		list = append(list, r.acked[w].Load())
	}
	return list
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
	share := uint64(recordVolume / 512 / len(r.acked))
	var have []uint64
	for w := range r.acked {
		missing, last := ^uint64(0), uint64(0)
		for n := uint64(0); n/3 < share; n++ {
			at := uint64(w)*share + n/3
			version, ok := peer.Stamped(images[n%3][at*512:(at+1)*512], at, uint64(w+1))
			if ok = ok && version == n+1; !ok {
				missing = min(missing, n)
				continue
			}
			if last = n + 1; missing < n {
				r.s.t.Fatalf("%s: record %d of writer %d is on volume %s, but record %d is not on volume %s", what, n, w, r.names[n%3], missing, r.names[missing%3])
			}
		}
		if last < uint64(before[w]) {
			r.s.t.Fatalf("%s: writer %d has %d records there, and %d were acknowledged before", what, w, last, before[w])
		}
		have = append(have, last)
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
	before := r.count()
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
		before = r.count()
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
			s.fails(wrongPhase, []string{"group erp: cutover not done", "volume a: cutover is not allowed", "volume b: ", "volume c: "}, "cutover", "erp", "--force")
			start := []string{"start", "erp"}
			back := []string{"rolling-back", "rolled-back"}
			for round := range 4 {
				s.run(start...)
				start = []string{"start", "erp", "--reuse"}
				s.run("wait", "erp", "--for", "synced", "--timeout", "60s")
				r.more(30)
				before := r.count()
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
			before := r.count()
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
