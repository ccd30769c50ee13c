package torture

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/tests/peer"
)

const (
	groupName    = "erp"
	groupWriters = 4
	groupVolume  = 4 << 20
	// groupRate keeps the copies going while the group is to be stepped in mid-migration.
	groupRate = 256 << 10
)

var groupVolumes = []string{"a", "b", "c"}

// groupLife is three volumes that step together, and writers of records to all of them.
type groupLife struct {
	t   *testing.T
	s   *service
	r   *peer.Records
	rng *rand.Rand
	sum *sum

	sources, destinations []func() []byte
	faults                peer.Findings
}

// TestGroupsStepAtOneInstantHoweverTheyAreKilled kills the service at each place within a step
// of a group, under load: the step is taken of all volumes or of none, and the image of the three
// at its instant has no record whose predecessor on another is missing.
//
// Caught, in the first run: a transaction for each volume; in the third: commands to one volume
// held alone (the turn of the flags of the others is refused).
func TestGroupsStepAtOneInstantHoweverTheyAreKilled(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	r := tierOf(t, 6, 100)
	sum := sum{crashes: map[string]int{}}
	defer func() { tell(t, r, sum) }()
	rng := rand.New(rand.NewPCG(r.seed, 4))
	for began := time.Now(); sum.cycles < int64(r.cycles) || time.Since(began) < r.lasts/4; {
		t.Run(fmt.Sprint("life ", sum.cycles), func(t *testing.T) { newGroupLife(t, rng, &sum).live() })
		if t.Failed() {
			return
		}
	}
}

func newGroupLife(t *testing.T, rng *rand.Rand, sum *sum) *groupLife {
	g := &groupLife{t: t, rng: rng, sum: sum, r: peer.NewRecords(len(groupVolumes), groupWriters, groupVolume)}
	dir := t.TempDir()
	var volumes []volume
	var olds, news []peer.Unit
	for _, name := range groupVolumes {
		old, fresh := filepath.Join(dir, name+".old"), filepath.Join(dir, name+".new")
		_, err := peer.SparseFile(old, groupVolume, 1, rng.Uint64()|1<<40)
		must(t, err)
		must(t, peer.EmptyFile(fresh, groupVolume))
		g.sources, g.destinations = append(g.sources, content(t, old)), append(g.destinations, content(t, fresh))
		olds = append(olds, peer.Unit{Path: old, BlockSize: 512, Thin: true})
		news = append(news, peer.Unit{Path: fresh, BlockSize: 512, Thin: true})
		volumes = append(volumes, volume{name, old, fresh, fmt.Sprintf("mirror = %v\nlogout_timeout = \"1s\"\n", rng.IntN(3) == 0)})
	}
	if rng.IntN(2) == 0 {
		d := peer.StartTgtd(t)
		for side, units := range map[string][]peer.Unit{"old": olds, "new": news} {
			must(t, d.AddTarget(t.Context(), "iqn.2001-04.com.example:"+side, units))
		}
		for i := range volumes {
			volumes[i].source = d.LUN("iqn.2001-04.com.example:old", uint64(i+1)).URL()
			volumes[i].destination = d.LUN("iqn.2001-04.com.example:new", uint64(i+1)).URL()
		}
	}
	volumes[len(volumes)-1].more += fmt.Sprintf("[[group]]\nname = %q\nvolumes = [\"a\", \"b\", \"c\"]\nhold_limit = \"30s\"\n", groupName)
	g.s = newService(t, "", volumes...)
	return g
}

// groupStep is a step of the group.
type groupStep struct {
	name  string
	to    proxy.Phase
	after proxy.Phase // may follow by itself
	do    func(context.Context, *groupLife) error
}

var (
	groupRollback = groupStep{"rollback", proxy.RollingBack, proxy.RolledBack, func(ctx context.Context, g *groupLife) error {
		_, err := g.s.client.RollbackGroup(ctx, groupName, proxy.RollbackOptions{})
		return err
	}}
	groupCutover = groupStep{"cutover", proxy.Cutover, proxy.Cutover, func(ctx context.Context, g *groupLife) error {
		_, err := g.s.client.CutoverGroup(ctx, groupName, proxy.CutoverOptions{Force: true})
		return err
	}}
)

// live takes the group forward and back a few times, at times in mid-migration, and then to
// the cutover. Each step is killed until it was taken.
func (g *groupLife) live() {
	ctx := g.t.Context()
	g.s.start("")
	for i := range 3 {
		rate, from := uint64(0), proxy.Synced
		if i < 2 && g.rng.IntN(3) == 0 {
			rate, from = groupRate, proxy.Migrating
		}
		for _, name := range groupVolumes {
			_, err := g.s.client.Throttle(ctx, name, rate)
			must(g.t, err)
		}
		_, err := g.s.client.StartGroup(ctx, groupName, proxy.StartOptions{Reuse: true})
		must(g.t, err)
		begin := g.r.Acknowledged()
		g.until(from)
		if from == proxy.Synced {
			begin = nil // the copies have the records of before as well
		}
		step := groupRollback
		if i == 2 {
			step = groupCutover
		}
		for tries := 0; !g.crash(step, begin, tries >= 3); tries++ {
		}
		if i == 2 {
			break
		}
		for _, name := range groupVolumes {
			_, err := g.s.client.Throttle(ctx, name, 0)
			must(g.t, err)
		}
		g.until(proxy.RolledBack)
		g.check("rolled back", g.sources, nil, g.r.Acknowledged())
		g.sum.rollbacks += int64(len(groupVolumes))
	}
	for _, n := range g.r.Acknowledged() {
		g.sum.acked += n
	}
}

func (g *groupLife) until(p proxy.Phase) {
	g.t.Helper()
	_, err := g.s.client.WaitGroup(g.t.Context(), groupName, p, peer.Patience, true)
	must(g.t, err)
}

// crash is one cycle: the step under load, and the end of the service at some place within it or,
// with finish, after it. It tells whether the step was taken. begin is as from of Check.
func (g *groupLife) crash(step groupStep, begin []int64, finish bool) (taken bool) {
	t := g.t
	from := g.phase("a")
	// Within the transaction of the step: after all have come to it.
	transaction := fmt.Sprintf("phase.leaving.%s:%d,", from, len(groupVolumes))
	point, count := "", 1
	switch g.rng.IntN(3) {
	case 0:
		point = stepPoints[g.rng.IntN(len(stepPoints))]
	case 1:
		point, count = phasePoints(from, step.to)[g.rng.IntN(3)], 1+g.rng.IntN(len(groupVolumes)) // each passes it
	case 2:
		point = transaction + statePoints[g.rng.IntN(len(statePoints))]
	}
	armed := ""
	if !finish {
		armed = fmt.Sprintf("%s:%d", point, count)
	}
	g.s.kill()
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var writers, stepping sync.WaitGroup
	if !g.s.start(armed) {
		t.Fatalf("the service came to %s before the step", armed)
	}
	g.write(ctx, &writers, step.to)
	time.Sleep(time.Duration(20+g.rng.IntN(200)) * time.Millisecond)
	before := g.r.Acknowledged()
	done := make(chan error, 1)
	stepping.Go(func() { done <- step.do(ctx, g) })
	select {
	case err := <-done:
		if finish {
			must(t, err)
		}
		time.Sleep(time.Duration(g.rng.IntN(30)) * time.Millisecond) // what follows on it
	case err := <-g.s.exited:
		g.s.exited <- err
	case <-time.After(peer.Patience):
		t.Fatalf("%s of the group does not end", step.name)
	}
	g.s.dead() // fails the test where it ended otherwise
	g.s.kill()
	leave()
	writers.Wait()
	stepping.Wait()
	if wrong := g.faults.List(); len(wrong) > 0 {
		t.Fatal(wrong)
	}
	where := "after it"
	if at := g.s.point(); at != "" {
		where = at
	}
	name := fmt.Sprintf("group %s from %s, %s", step.name, from, where)
	g.sum.crashes[name]++
	g.sum.cycles++
	g.s.start("")
	var phases []proxy.Phase
	there := 0
	for _, name := range groupVolumes {
		p := g.phase(name)
		if phases = append(phases, p); p == step.to || p == step.after {
			there++
		}
	}
	if there != 0 && there != len(groupVolumes) {
		g.violation(name, fmt.Errorf("the volumes are %v", phases))
	}
	least := before
	if there == 0 {
		least = g.r.Acknowledged() // the destinations take the writes still
	}
	g.check(name, g.destinations, begin, least)
	return there > 0
}

// write has the writers write until ctx ends, or until they are shut out by a cutover.
func (g *groupLife) write(ctx context.Context, writers *sync.WaitGroup, to proxy.Phase) {
	for w := range groupWriters {
		var devices []lun.Device
		for _, name := range groupVolumes {
			dev, err := lun.Open(ctx, g.s.url(name), lun.Options{InitiatorName: fmt.Sprintf("iqn.2026-11.net.example:writer%d", w), IOTimeout: peer.Patience})
			must(g.t, err)
			devices = append(devices, dev)
		}
		writers.Go(func() {
			defer func() {
				for _, dev := range devices {
					_ = dev.Close() // there is nobody to log out of
				}
			}()
			if err := g.r.Write(ctx, w, devices); err != nil && ctx.Err() == nil && to != proxy.Cutover {
				g.faults.Add("%v", err)
			}
		})
	}
}

func (g *groupLife) phase(volume string) proxy.Phase {
	st, err := g.s.client.Status(g.t.Context(), volume)
	must(g.t, err)
	return st.Phase
}

func (g *groupLife) check(when string, images []func() []byte, from, least []int64) {
	var list [][]byte
	for _, image := range images {
		list = append(list, image())
	}
	g.sum.readBack += int64(len(list)) * groupVolume / 512
	have, err := g.r.Check(list, from, least)
	if err != nil {
		g.violation(when, err)
	}
	g.t.Logf("%s: records there %v, at least %v", when, have, least)
}

func (g *groupLife) violation(when string, err error) {
	g.sum.violations++
	g.t.Fatalf("%s: %v", when, err)
}
