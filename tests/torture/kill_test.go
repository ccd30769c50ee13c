package torture

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/proxy"
	"lunshift/tests/peer"
)

const (
	clients    = 12
	volumeSize = 24 << 20
	// copyRate keeps the copy going for as long as it is to be crashed.
	copyRate = 1 << 20
	// mayBeCopied is where the copier has not come, which was paused at once, in bytes.
	mayBeCopied = 64 * regionSize
	// settleTime is how long a mirror takes at most to clear what both sides have for a while.
	settleTime = 2500 * time.Millisecond
)

// stage is where in the volume's life a crash comes, and at which points.
type stage struct {
	name   string
	points []string
	// begin sets off what the crash is to meet; nil is nothing.
	begin func(context.Context, *service)
}

// Points of each persist step, write step and copy step.
var (
	statePoints = []string{"state.begin", "state.written", "state.synced", "state.noted"}
	// The journal takes what first writes wait for.
	journalPoints = []string{"journal.begin", "journal.written", "journal.synced"}
	writePoints   = []string{"write.dirty", "write.intended", "write.unflushed", "write.stable", "write.flagged"}
	copyPoints    = []string{"copy.written", "copy.stable", "copy.flagged"}
	mirrorPoints  = []string{"mirror.source", "mirror.destination", "mirror.settled"}
	// A step that holds commands.
	stepPoints = []string{"step.ready", "step.held", "step.settled", "step.released"}
)

func phasePoints(from, to proxy.Phase) []string {
	return []string{"phase.leaving." + string(from), "phase.saved." + string(to), "phase.taken." + string(to)}
}

var (
	inReady     = stage{name: "ready"}
	atStart     = stage{"start", slices.Concat(phasePoints(proxy.Ready, proxy.Migrating), statePoints, []string{"phase.taken.ready"}), startVolume}
	inMigrating = stage{"migrating", slices.Concat(statePoints, journalPoints, writePoints, copyPoints), nil}
	atSynced    = stage{"becoming synced", slices.Concat(phasePoints(proxy.Migrating, proxy.Synced), statePoints, copyPoints), unthrottle}
	inSynced    = stage{"synced", slices.Concat(statePoints, journalPoints, []string{"write.dirty"}), nil}
	atCutover   = stage{"cutover", slices.Concat(phasePoints(proxy.Synced, proxy.Cutover), statePoints, stepPoints), cutOver}

	fromMigrating = stage{"rollback from migrating", slices.Concat(phasePoints(proxy.Migrating, proxy.RollingBack), statePoints, stepPoints), rollBack}
	fromSynced    = stage{"rollback from synced", slices.Concat(phasePoints(proxy.Synced, proxy.RollingBack), statePoints, stepPoints), rollBack}
	inRollingBack = stage{"rolling back", slices.Concat(statePoints, journalPoints, writePoints, copyPoints), nil}
	atRolledBack  = stage{"becoming rolled-back", slices.Concat(phasePoints(proxy.RollingBack, proxy.RolledBack), statePoints, copyPoints), unthrottle}
	inRolledBack  = stage{name: "rolled back"}
	// With a mirror.
	inMirrored = stage{"migrating with a mirror", slices.Concat(inMigrating.points, mirrorPoints), nil}
	inWhole    = stage{"synced with a mirror", slices.Concat(inSynced.points, copyPoints, mirrorPoints), nil}
	switching  = stage{"switching the mirror", slices.Concat(statePoints, mirrorPoints), switchMirror}
)

// A crash may cut these calls short; what came of them is seen after the restart.
func startVolume(ctx context.Context, s *service) {
	s.client.Start(ctx, volumeName, proxy.StartOptions{Reuse: s.reuse})
}

func unthrottle(ctx context.Context, s *service) { s.client.Throttle(ctx, volumeName, 0) }

func rollBack(ctx context.Context, s *service) {
	s.client.Rollback(ctx, volumeName, proxy.RollbackOptions{})
}

func switchMirror(ctx context.Context, s *service) {
	for on := false; ctx.Err() == nil; on = !on {
		s.client.Mirror(ctx, volumeName, on)
		time.Sleep(50 * time.Millisecond)
	}
}

func cutOver(ctx context.Context, s *service) {
	s.client.Cutover(ctx, volumeName, proxy.CutoverOptions{})
}

// sum is what a test did.
type sum struct {
	cycles, acked, readBack, violations int64
	// rollbacks that came to their end, and mirrors that were found whole
	rollbacks, mirrors int64
	crashes            map[string]int // by stage and point
}

func (s sum) String() string {
	return fmt.Sprintf("cycles %d, rollbacks %d, whole mirrors %d, acknowledged writes %d, blocks read back %d, violations %d",
		s.cycles, s.rollbacks, s.mirrors, s.acked, s.readBack, s.violations)
}

// life is one volume from ready to cutover, at times by way of a rollback.
type life struct {
	t       *testing.T
	s       *service
	o       *peer.Oracle
	rng     *rand.Rand
	clients []*peer.Client
	acks    atomic.Int64
	reads   atomic.Int64
	first   atomic.Bool
	faults  peer.Findings
	sum     *sum
	// uncopied says that nothing was copied from mayBeCopied on, and nothing is now.
	uncopied bool
	power    func() // cuts the power after a crash and restores it; nil leaves it on
	// lasting says that a loss of power takes nothing that was acknowledged.
	lasting  bool
	mirrored bool // there is a mirror, at times

	source, destination func() []byte // what the units hold
	afterStart          []byte        // the source once it takes no more writes
}

func newLife(t *testing.T, s *service, before []byte, bs int, rng *rand.Rand, sum *sum) *life {
	l := &life{t: t, s: s, o: peer.NewOracle(before, bs), rng: rng, sum: sum}
	share := uint64(len(l.o.Cells) / clients)
	for i := range clients {
		l.clients = append(l.clients, &peer.Client{
			ID: i, Oracle: l.o, From: uint64(i) * share, Blocks: share, Region: regionSize,
			Rand:     rand.New(rand.NewPCG(rng.Uint64(), uint64(i))),
			Findings: &l.faults, Acks: &l.acks, Reads: &l.reads,
			FirstStable: func(lba uint64) bool { return l.first.Load() && lba >= mayBeCopied/uint64(bs) },
		})
	}
	return l
}

// load is the clients at work.
type load struct {
	hosts []peer.Host
	stop  context.CancelFunc // no further commands
	leave context.CancelFunc // and those sent are given up
	wait  sync.WaitGroup
}

// work sets the clients to work; nil where the service is gone before.
func (l *life) work() *load {
	w := &load{}
	ctx, leave := context.WithCancel(l.t.Context())
	running, stop := context.WithCancel(ctx)
	w.stop, w.leave = stop, leave
	for i := range 2 {
		h, err := l.s.dial(ctx, fmt.Sprintf("host%d", i))
		if err != nil {
			w.end()
			select {
			case <-time.After(peer.Patience):
				l.t.Fatal(err)
			case why := <-l.s.exited:
				l.s.exited <- why
			}
			return nil
		}
		w.hosts = append(w.hosts, peer.Host{Initiator: h})
	}
	for i, c := range l.clients {
		w.wait.Go(func() { c.Run(ctx, running, w.hosts[i%len(w.hosts)]) })
	}
	return w
}

// end gives up what is under way.
func (w *load) end() {
	w.stop()
	w.leave()
	for _, h := range w.hosts {
		h.Close()
	}
	w.wait.Wait()
}

// drain waits for what is under way.
func (w *load) drain() {
	w.stop()
	w.wait.Wait()
	w.end()
}

// crash is one cycle: the service under load, its end, and every block read back from
// the next one, which it leaves running.
func (l *life) crash(st stage) {
	t := l.t
	point, armed := "", ""
	if len(st.points) > 0 && l.rng.IntN(8) > 0 {
		point = st.points[l.rng.IntN(len(st.points))]
		count := 1
		if !strings.HasPrefix(point, "phase.") {
			count += l.rng.IntN(1 << l.rng.IntN(8)) // often soon, at times late
		}
		armed = fmt.Sprintf("%s:%d", point, count)
		l.s.kill()
	}
	if l.s.cmd == nil {
		l.s.start(armed)
	}
	l.first.Store(l.uncopied)
	var w *load
	if !l.s.dead() {
		w = l.work()
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var begun sync.WaitGroup
	if st.begin != nil {
		time.Sleep(time.Duration(l.rng.IntN(50)) * time.Millisecond)
		begun.Go(func() { st.begin(ctx, l.s) })
	}
	within := time.Duration(20+l.rng.IntN(300)) * time.Millisecond
	if point != "" {
		within += time.Second
	}
	if point == "mirror.settled" || l.settles(st) {
		within += settleTime
	}
	select {
	case err := <-l.s.exited:
		l.s.exited <- err
	case <-time.After(within):
	}
	// In half of the cycles initiators come back and send again what was not answered;
	// in the others they are gone as well.
	again := w != nil && l.power == nil && st.name != atCutover.name && l.rng.IntN(2) == 0
	l.s.dead() // fails the test where it ended otherwise
	l.s.kill()
	cancel()
	begun.Wait()
	name := st.name + ", at random"
	if at := l.s.point(); at != "" {
		name = st.name + ", " + at
	}
	l.sum.crashes[name]++
	l.sum.cycles++
	if w != nil && !again {
		w.end()
	}
	if l.power != nil {
		l.power()
	}
	l.s.start("")
	if again {
		// Some of what was sent again is answered, and new commands.
		from, deadline := l.acks.Load(), time.Now().Add(peer.Patience)
		for l.acks.Load() < from+2*clients && len(l.faults.List()) == 0 && l.phase() != proxy.Cutover {
			time.Sleep(time.Millisecond)
			if time.Now().After(deadline) {
				t.Fatal("the load stands still after a restart")
			}
		}
		w.drain()
	}
	l.verify(name)
}

func (l *life) phase() proxy.Phase { return l.s.mustStatus().Phase }

// verify holds every block to the oracle, as initiators read it, and a side that is to have
// everything as well.
func (l *life) verify(after string) {
	t := l.t
	wrong := l.faults.List()
	if l.phase() == proxy.Cutover {
		// It was flushed before that was written down, with no command under way, so it has
		// everything acknowledged whatever happened to the power.
		l.report(after, append(wrong, l.holds("the destination", l.destination())...))
		return
	}
	dialed, err := l.s.dial(t.Context(), "reader")
	must(t, err)
	defer dialed.Close()
	blocks, more, err := l.o.ReadBack(t.Context(), peer.Host{Initiator: dialed}, l.power != nil && !l.lasting)
	if err != nil {
		t.Fatalf("read back: %v", err)
	}
	l.sum.readBack += blocks
	l.report(after, append(wrong, more...))
	switch st := l.s.mustStatus(); {
	case st.Phase == proxy.RolledBack:
		l.report(after, l.holds("the source", l.source()))
	case st.Mirror != nil && l.rng.IntN(6) == 0:
		l.verifyMirror(after)
	}
}

// verifyMirror has a mirror be whole, with the copy paused so that this is soon. Then the source
// has everything, and what the destination has.
func (l *life) verifyMirror(after string) {
	ctx := l.t.Context()
	rate := l.s.mustStatus().RateLimit
	if !l.uncopied && l.phase() == proxy.Migrating {
		_, err := l.s.client.Pause(ctx, volumeName)
		must(l.t, err)
		defer func() {
			_, err := l.s.client.Resume(ctx, volumeName)
			must(l.t, err)
		}()
	}
	l.throttle(0)
	l.whole(after)
	l.throttle(rate)
}

// whole waits until the mirror is whole. Then the source has everything, and what the
// destination has. Nobody writes meanwhile.
func (l *life) whole(after string) {
	var st proxy.Status
	for deadline := time.Now().Add(peer.Patience); st.Mirror == nil || st.Mirror.State != "whole"; time.Sleep(5 * time.Millisecond) {
		if st = l.s.mustStatus(); time.Now().After(deadline) {
			l.t.Fatalf("after a crash (%s): the mirror is not whole within %v: %+v", after, peer.Patience, st.Mirror)
		}
	}
	source := l.source()
	wrong := l.holds("the source", source)
	if len(wrong) == 0 && st.Phase == proxy.Synced && !bytes.Equal(source, l.destination()) {
		wrong = l.holds("the destination", l.destination())
		wrong = append(wrong, "the mirror is whole, and the two sides differ")
	}
	l.sum.mirrors++
	l.report(after, wrong)
}

// holds compares a whole image with what initiators read last.
func (l *life) holds(of string, image []byte) (wrong []string) {
	for lba := 0; lba < len(l.o.Cells) && len(wrong) < 16; lba += 512 {
		end := min(lba+512, len(l.o.Cells))
		for _, text := range l.o.Check(image[lba*l.o.BlockSize:end*l.o.BlockSize], uint64(lba), false, 8) {
			wrong = append(wrong, of+": "+text)
		}
	}
	l.sum.readBack += int64(len(l.o.Cells))
	return wrong
}

func (l *life) report(after string, wrong []string) {
	if len(wrong) == 0 {
		return
	}
	l.sum.violations += int64(len(wrong))
	l.t.Fatalf("after a crash (%s): %d violations:\n%s", after, len(wrong), strings.Join(wrong[:min(len(wrong), 16)], "\n"))
}

// until waits for a phase.
func (l *life) until(p proxy.Phase) {
	l.t.Helper()
	if _, err := l.s.client.Wait(l.t.Context(), volumeName, p, peer.Patience); err != nil {
		l.t.Fatal(err)
	}
}

// live takes the volume through its life, with a crash in every phase and at every
// change of phase, migrating several times; in half of the lives to the source and back first.
func (l *life) live() {
	t := l.t
	ctx := t.Context()
	l.s.start("")
	l.throttle(copyRate)
	l.crash(inReady)
	migrating, synced, again := inMigrating, inSynced, 5
	if l.mirrored {
		migrating, synced = inMirrored, inWhole
	}
	l.begin()
	if l.rng.IntN(2) == 0 {
		again = 3
		l.crash(migrating)
		from := fromMigrating
		if l.rng.IntN(2) == 0 {
			unthrottle(ctx, l.s)
			l.until(proxy.Synced)
			l.crash(synced)
			from = fromSynced
		}
		l.back(from)
		l.s.reuse = true
		l.throttle(copyRate)
		l.begin()
	}
	for range again {
		if l.phase() == proxy.Migrating {
			l.crash(migrating)
		}
	}
	if l.mirrored && l.rng.IntN(2) == 0 {
		l.switched()
	}
	l.crash(atSynced)
	unthrottle(ctx, l.s)
	l.until(proxy.Synced)
	if l.mirrored && l.rng.IntN(2) == 0 {
		l.switched()
	}
	l.crash(synced)
	l.crash(atCutover)
	before := l.mirrored && l.phase() == proxy.Synced
	if before {
		l.verifyMirror("cutover")
	}
	cutOver(ctx, l.s)
	l.until(proxy.Cutover)
	l.verify("cutover")
	l.s.kill()
	switch {
	case before:
		if !bytes.Equal(l.source(), l.destination()) {
			l.report("cutover", []string{"the mirror was whole at the cutover, and the two sides differ"})
		}
	case !l.mirrored && !bytes.Equal(l.source(), l.afterStart):
		l.report("start", []string{"the source was written after the start"})
	}
	l.sum.acked += l.acks.Load()
}

// begin starts the volume, with a crash at that; where the power fails, often paused.
func (l *life) begin() {
	paused := l.power != nil && l.rng.IntN(3) > 0
	if paused {
		l.startPaused()
	} else {
		l.crash(atStart)
		startVolume(l.t.Context(), l.s) // where the crash came before
	}
	l.until(proxy.Migrating)
	l.afterStart = l.source()
	if paused {
		l.beforeCopy()
	}
}

// back rolls the volume back, with crashes all the way.
func (l *life) back(from stage) {
	ctx := l.t.Context()
	l.throttle(copyRate / 4)
	if l.power != nil && l.rng.IntN(2) == 0 {
		l.rollBackQuietly()
	} else {
		l.crash(from)
		rollBack(ctx, l.s)
	}
	l.until(proxy.RollingBack)
	for range 3 {
		if l.phase() == proxy.RollingBack {
			l.crash(inRollingBack)
		}
	}
	if l.phase() == proxy.RollingBack {
		l.crash(atRolledBack)
	}
	unthrottle(ctx, l.s)
	l.until(proxy.RolledBack)
	l.crash(inRolledBack)
	l.sum.rollbacks++
}

// settles tells, at random, whether a mirror under load is to come to clear what both sides have.
func (l *life) settles(st stage) bool {
	return (st.name == inMirrored.name || st.name == inWhole.name) && l.rng.IntN(3) == 0
}

// rollBackQuietly rolls the volume back after some writes, with nobody writing meanwhile: what
// either side alone is to have is durable there.
func (l *life) rollBackQuietly() {
	w := l.work()
	time.Sleep(100 * time.Millisecond)
	w.drain()
	_, err := l.s.client.Rollback(l.t.Context(), volumeName, proxy.RollbackOptions{})
	must(l.t, err)
	for i := range l.o.Cells {
		l.o.Cells[i].Flushed()
	}
}

// switched crashes the volume while its mirror is switched off and on, which ends on.
func (l *life) switched() {
	l.crash(switching)
	_, err := l.s.client.Mirror(l.t.Context(), volumeName, true)
	must(l.t, err)
}

func (l *life) throttle(rate uint64) {
	_, err := l.s.client.Throttle(l.t.Context(), volumeName, rate)
	must(l.t, err)
}

// content is what an image holds.
func content(t testing.TB, path string) func() []byte {
	return func() []byte {
		b, err := os.ReadFile(path)
		must(t, err)
		return b
	}
}

// mirror is what the configuration of a life says of a mirror: a third have one.
func mirror(rng *rand.Rand) (mirrored bool, more string) {
	mirrored = rng.IntN(3) == 0
	return mirrored, fmt.Sprintf("mirror = %v\n", mirrored)
}

// image makes the content of a source and gives it.
func image(t *testing.T, path string, seed uint64, share float64) []byte {
	t.Helper()
	_, err := peer.SparseFile(path, volumeSize, share, seed)
	must(t, err)
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

// TestKillsLoseNoAcknowledgedWrite is the short tier of `make torture`: ten crashes or
// more. It caught, in its first run each: the flag committed before the data; a write
// acknowledged before its flag; a copier that does not ask again which blocks are
// still to be copied; a rewrite of a copied block that is not noted as dirty, by what the cutover compares. In the third:
// a write with a mirror acknowledged before the source has it.
func TestKillsLoseNoAcknowledgedWrite(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	r := tierOf(t, 10, 200)
	sum := sum{crashes: map[string]int{}}
	defer func() { tell(t, r, sum) }()
	rng := rand.New(rand.NewPCG(r.seed, 0))
	began := time.Now()
	for i := rng.IntN(4); sum.cycles < int64(r.cycles) || time.Since(began) < r.lasts; i++ {
		pair := []string{"file to tgtd", "tgtd to file", "tgtd to tgtd", "file to file"}[i%4]
		t.Run(pair, func(t *testing.T) { lifeOf(t, pair, rng, &sum).live() })
		if t.Failed() {
			return
		}
	}
}

// tell is the summary, one line, on standard output too in the long tier.
func tell(t *testing.T, r tier, sum sum) {
	whole.Lock()
	whole.sum.cycles += sum.cycles
	whole.sum.rollbacks += sum.rollbacks
	whole.sum.mirrors += sum.mirrors
	whole.sum.acked += sum.acked
	whole.sum.readBack += sum.readBack
	whole.sum.violations += sum.violations
	whole.Unlock()
	line := fmt.Sprintf("torture: seed %d: %v", r.seed, sum)
	t.Log(line)
	names := make([]string, 0, len(sum.crashes))
	for name, n := range sum.crashes {
		names = append(names, fmt.Sprintf("%4d %s", n, name))
	}
	slices.Sort(names)
	t.Logf("crashes:\n%s", strings.Join(names, "\n"))
	if r.lasts > 0 {
		fmt.Println(line)
	}
}

// lifeOf makes a pair of units and the service in front of them.
func lifeOf(t *testing.T, pair string, rng *rand.Rand, sum *sum) *life {
	dir := t.TempDir()
	old, fresh := filepath.Join(dir, "old.img"), filepath.Join(dir, "new.img")
	before := image(t, old, rng.Uint64()|1<<40, 0.8)
	must(t, peer.EmptyFile(fresh, volumeSize))
	bs := 512
	source, destination := old, fresh
	if pair == "tgtd to tgtd" && rng.IntN(2) == 0 {
		bs = 4096 // files have 512
	}
	from, to, _ := strings.Cut(pair, " to ")
	if from == "tgtd" {
		source = array(t, "old", old, bs)
	}
	if to == "tgtd" {
		destination = array(t, "new", fresh, bs)
	}
	mirrored, more := mirror(rng)
	l := newLife(t, newService(t, "", volume{volumeName, source, destination, more}), before, bs, rng, sum)
	l.source, l.destination, l.mirrored = content(t, old), content(t, fresh), mirrored
	return l
}

// array serves an image through a tgtd and gives its address.
func array(t *testing.T, name, path string, bs int) string {
	d := peer.StartTgtd(t)
	iqn := "iqn.2001-04.com.example:" + name
	must(t, d.AddTarget(t.Context(), iqn, []peer.Unit{{Path: path, BlockSize: uint32(bs), Thin: true}}))
	return d.LUN(iqn, 1).URL()
}
