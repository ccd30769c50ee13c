package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/control"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/tests/peer"
)

// backEndFault is one way in which an array misbehaves, and what initiators may see of it.
type backEndFault struct {
	what  string
	fault peer.Fault
	lasts time.Duration // at least
	// impatient: the fault lasts for more than io_timeout, until initiators were refused.
	impatient bool
	// refused: initiators may be told to try again; without it they wait.
	refused bool
	// destinationOnly: the source never meets it.
	destinationOnly bool
}

var shortFaults = []backEndFault{
	{what: "gone for 1 s", fault: peer.Gone, lasts: time.Second},
	{what: "silent for 1 s", fault: peer.Silent, lasts: time.Second},
	{what: "refusing connections for 1 s", fault: peer.Refusing, lasts: time.Second},
	{what: "BUSY for 1 s", fault: peer.Busy, lasts: time.Second},
	{what: "TASK SET FULL for 1 s", fault: peer.TaskSetFull, lasts: time.Second},
	{what: "connection reset in mid-transfer", fault: peer.Cutting, lasts: time.Second},
	{what: "1 s per command", fault: peer.Slow, lasts: 2500 * time.Millisecond},
	{what: "MEDIUM ERROR on one LBA", fault: peer.BadBlock, lasts: 500 * time.Millisecond},
	{what: "reads cut short with a residual", fault: peer.ShortIn, lasts: time.Second, refused: true},
	{what: "reads cut short without a residual", fault: peer.ShortInUntold, lasts: time.Second, refused: true},
	{what: "writes cut short with a residual", fault: peer.ShortOut, lasts: time.Second, refused: true, destinationOnly: true},
	{what: "writes not asked for", fault: peer.ShortOutUntold, lasts: time.Second, refused: true, destinationOnly: true},
	{what: "data at a wrong offset", fault: peer.Misplaced, lasts: time.Second},
	{what: "data with a wrong number", fault: peer.Misnumbered, lasts: time.Second},
	{what: "half the size for 1 s", fault: peer.Smaller, lasts: time.Second, refused: true},
	{what: "gone for ever", fault: peer.Gone, impatient: true},
	{what: "silent for ever, then all comes late", fault: peer.Silent, impatient: true},
	{what: "refusing connections for ever", fault: peer.Refusing, impatient: true},
	{what: "BUSY for ever", fault: peer.Busy, impatient: true},
	{what: "TASK SET FULL for ever", fault: peer.TaskSetFull, impatient: true},
}

// The long ones are for `make torture`.
var longFaults = []backEndFault{
	{what: "gone for 30 s", fault: peer.Gone, lasts: 30 * time.Second},
	{what: "refusing connections for 30 s", fault: peer.Refusing, lasts: 30 * time.Second},
	{what: "BUSY for 30 s", fault: peer.Busy, lasts: 30 * time.Second},
	{what: "connection reset in mid-transfer for 30 s", fault: peer.Cutting, lasts: 30 * time.Second},
	{what: "1 s per command for 30 s", fault: peer.Slow, lasts: 30 * time.Second},
	{what: "half the size for 30 s", fault: peer.Smaller, lasts: 30 * time.Second, refused: true},
	{what: "gone for 30 times io_timeout", fault: peer.Gone, lasts: 30 * time.Second, impatient: true},
	{what: "BUSY for 30 times io_timeout", fault: peer.Busy, lasts: 30 * time.Second, impatient: true},
}

const (
	faultySize    = 4 * mib
	faultyRegion  = 64 * kib
	faultyClients = 4
	faultyRate    = 128 * kib // copies little in the time before a fault
	badLBA        = 8000      // of BadBlock, which is allocated
	// beyond is where the clients' ranges end; what follows is for BadBlock.
	beyond = 7936
)

// TestBackEndFaultsLoseNothing has every fault come over the source or over the destination
// of a volume of its own, first migrating and then synced, under load from two sessions. The
// volumes are served side by side, so that it also shows that one volume's fault stays its own.
//
// Caught, each in its first run: GOOD taken for GOOD whatever was transferred; data of a read
// put where its buffer offset does not say; BUSY and TASK SET FULL handed up at once; commands
// of a lost connection given up at once, or, after io_timeout, called GOOD; LBA OUT OF RANGE of
// a smaller unit handed up; CHECK CONDITION of a first write called GOOD; a failed write of the
// copier dropped; a region that failed once never copied again; a block with MEDIUM ERROR taken
// for one that was read; another ISID at each login, after which writes of the lost session came
// behind newer ones.
func TestBackEndFaultsLoseNothing(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	faults := shortFaults
	if os.Getenv("LUNSHIFT_TORTURE") != "" {
		faults = append(faults, longFaults...)
	}
	var patient, impatient []*faultyVolume
	array := newArray(t, "faulty")
	dir := t.TempDir()
	for i, f := range faults {
		for _, side := range []string{"source", "destination"} {
			if f.destinationOnly && side == "source" {
				continue
			}
			v := &faultyVolume{backEndFault: f, side: side, name: fmt.Sprintf("%s%02d", side, i),
				source: filepath.Join(dir, fmt.Sprintf("%s%02d.old", side, i)), destination: filepath.Join(dir, fmt.Sprintf("%s%02d.new", side, i))}
			must(t, os.WriteFile(v.source, faultyImage(uint64(i)+1<<40), 0o600))
			must(t, peer.EmptyFile(v.destination, faultySize))
			v.portal = peer.NewFaultyPortal(t, array.Portal())
			unit := peer.LUN{Portal: v.portal.Portal(), IQN: array.iqn + "." + v.name, Number: 1}
			v.config = volume{name: v.name, source: v.source, destination: v.destination, more: fmt.Sprintf("region_size = \"%dKiB\"\n", faultyRegion/kib)}
			path := v.source
			if side == "source" {
				v.config.source = unit.URL()
			} else {
				v.config.destination, path = unit.URL(), v.destination
			}
			must(t, array.AddTarget(t.Context(), unit.IQN, []peer.Unit{{Path: path, Thin: true}}))
			if f.impatient {
				impatient = append(impatient, v)
			} else {
				patient = append(patient, v)
			}
		}
	}
	var running sync.WaitGroup
	for _, part := range []struct {
		volumes   []*faultyVolume
		ioTimeout string
	}{{patient, "1m"}, {impatient, "1s"}} {
		var list []volume
		for _, v := range part.volumes {
			list = append(list, v.config)
		}
		s := newService(t, list...)
		s.ioTimeout = part.ioTimeout
		s.configure()
		s.start()
		for _, v := range part.volumes {
			v.s, v.client = s, control.NewClient(filepath.Join(s.dir, "control.sock"))
			running.Go(func() { t.Run(v.side+" "+v.what, v.live) })
		}
	}
	running.Wait()
	if os.Getenv("LUNSHIFT_TORTURE") != "" {
		var acks, readBack, violations int64
		for _, v := range append(patient, impatient...) {
			acks, readBack, violations = acks+v.acks.Load(), readBack+v.readBack, violations+v.violations
		}
		fmt.Printf("torture: back ends that misbehave: faults %d, acknowledged writes %d, blocks read back %d, violations %d\n",
			len(patient)+len(impatient), acks, readBack, violations)
	}
}

// faultyImage is the content of a source, every fourth region a hole.
func faultyImage(seed uint64) []byte {
	p := make([]byte, faultySize)
	for at := 0; at < faultySize; at += faultyRegion {
		if at/faultyRegion%4 != 3 {
			peer.Stamp(p[at:at+faultyRegion], 512, uint64(at/512), seed, 1)
		}
	}
	return p
}

// faultyVolume is a volume with one side behind a faulty portal.
type faultyVolume struct {
	backEndFault
	side, name          string
	source, destination string // images
	portal              *peer.FaultyPortal
	config              volume
	s                   *service
	client              *control.Client

	t           *testing.T
	o           *peer.Oracle
	clients     []*peer.Client
	acks, reads atomic.Int64
	findings    peer.Findings

	readBack, violations int64

	mu   sync.Mutex // protects told
	told map[string]int
}

// live takes the volume from its start to its cutover.
func (v *faultyVolume) live(t *testing.T) {
	v.t = t
	ctx := t.Context()
	before, err := os.ReadFile(v.source)
	must(t, err)
	v.o = peer.NewOracle(before, 512)
	_, err = v.client.Throttle(ctx, v.name, faultyRate)
	must(t, err)
	_, err = v.client.Start(ctx, v.name)
	must(t, err)

	load, stop := context.WithCancel(ctx)
	defer stop()
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	hosts := []peer.Host{v.dial("a"), v.dial("b")}
	const share = beyond / faultyClients
	work := func(c *peer.Client) {
		h := hosts[len(v.clients)%len(hosts)]
		v.clients = append(v.clients, c)
		running.Go(func() { c.Run(ctx, load, h) })
	}
	span := uint64(share)
	if v.fault == peer.Silent && v.side == "destination" {
		span = 24 // so that what comes late finds something newer
	}
	for i := range faultyClients {
		work(v.newClient(i, uint64(i)*share, span))
	}
	v.progress("before the fault", 10)

	// The copier meets the fault at full speed.
	v.strike(hosts[0], true, func() {
		if v.fault == peer.BadBlock && v.side == "destination" {
			// Its first writes of blocks meet the fault.
			c := v.newClient(faultyClients, badLBA-10, 20)
			c.MayFail = badBlock
			work(c)
		}
		_, err := v.client.Throttle(ctx, v.name, 0)
		must(t, err)
	})
	if v.fault == peer.BadBlock && v.side == "source" {
		// Without this the copier tries the block again after minutes.
		c := v.newClient(faultyClients, badLBA, 1)
		c.Acks = new(atomic.Int64)
		mend, mended := context.WithCancel(ctx)
		defer mended()
		running.Go(func() { c.Run(ctx, mend, hosts[0]) })
		v.until("a write of the bad block", func() bool { return c.Acks.Load() > 0 })
		mended()
	}
	if _, err := v.client.Wait(ctx, v.name, proxy.Synced, time.Minute); err != nil {
		st, _ := v.client.Status(ctx, v.name)
		t.Fatalf("the copier does not go on by itself: %v: %+v", err, st)
	}
	v.progress("after the fault", 10)
	if v.side == "destination" {
		v.strike(hosts[0], true, func() {})
	} else {
		v.strike(hosts[0], false, func() { v.progress("without the source", 10) })
	}
	v.progress("after the fault in synced", 10)
	stop()
	running.Wait()

	blocks, wrong, err := v.o.ReadBack(ctx, hosts[0], false)
	must(t, err)
	v.readBack += blocks
	if list := append(v.findings.List(), wrong...); len(list) > 0 {
		v.violations += int64(len(list))
		t.Fatalf("%d faults:\n%s", len(list), strings.Join(list, "\n"))
	}
	for _, h := range hosts {
		h.Close()
	}
	v.until("the session that comes back", func() bool {
		_, err = v.client.Cutover(ctx, v.name, proxy.CutoverOptions{})
		return err == nil || !strings.Contains(err.Error(), "not ready for the cutover")
	})
	must(t, err)
	after, err := os.ReadFile(v.destination)
	must(t, err)
	v.readBack += int64(len(v.o.Cells))
	if wrong := v.o.Check(after, 0, false, 16); len(wrong) > 0 {
		v.violations += int64(len(wrong))
		t.Errorf("the destination is wrong:\n%s", strings.Join(wrong, "\n"))
	}
	if at, same := sameBytes(before, v.source); !same {
		t.Errorf("the source was written, at byte %d", at)
	}
	t.Logf("%d changes acknowledged, %d blocks read under load, refused: %v", v.acks.Load(), v.reads.Load(), v.told)
}

func sameBytes(want []byte, path string) (at int, same bool) {
	have, err := os.ReadFile(path)
	if err != nil || len(have) != len(want) {
		return 0, false
	}
	for i := range want {
		if want[i] != have[i] {
			return i, false
		}
	}
	return 0, true
}

// dial opens a session with the volume.
func (v *faultyVolume) dial(name string) peer.Host {
	v.t.Helper()
	front := v.s.front(v.name)
	addr, err := lun.ParseAddress(front.URL())
	must(v.t, err)
	i, err := lun.DialInitiator(v.t.Context(), addr, lun.Options{InitiatorName: front.Initiator + name, IOTimeout: 5 * time.Minute, LoginTimeout: time.Minute, PingInterval: time.Minute})
	must(v.t, err)
	v.t.Cleanup(func() { i.Close() })
	return peer.Host{Initiator: i, Refused: v.refused, Patience: 5 * time.Minute}
}

// refused notes what initiators are told in the place of GOOD.
func (v *faultyVolume) refused(c *lun.Command) {
	what := fmt.Sprintf("status %02Xh", c.Status)
	if c.Status == 2 {
		s := c.CheckSense()
		what = fmt.Sprintf("%X/%02X/%02Xh", s.Key, s.ASC, s.ASCQ)
		if s.Key == 6 && s.ASC == 0x29 { // POWER ON OCCURRED begins every session
			return
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.told == nil {
		v.told = map[string]int{}
	}
	v.told[what]++
}

// outcomes gives what refused noted since the last call.
func (v *faultyVolume) outcomes() map[string]int {
	v.mu.Lock()
	defer v.mu.Unlock()
	was := v.told
	v.told = nil
	return was
}

// badBlock tells whether a command ended with the bad block's own sense, which names it.
func badBlock(err error) bool {
	s, ok := err.(*lun.SenseError)
	return ok && s.Key == 3 && s.Valid && s.LBA == badLBA && (s.ASC == 0x11 || s.ASC == 0x0c)
}

// allowed tells whether initiators may see an outcome of the fault.
func (v *faultyVolume) allowed(what string) bool {
	switch what {
	case "2/04/01h":
		return v.backEndFault.refused || v.impatient
	case "3/11/00h", "3/0C/00h":
		return v.fault == peer.BadBlock
	}
	return false
}

// progress waits until initiators are served.
func (v *faultyVolume) progress(when string, count int64) {
	v.t.Helper()
	from := v.acks.Load()
	v.until(fmt.Sprintf("%d acknowledged changes %s", count, when), func() bool { return v.acks.Load() >= from+count })
}

// settle waits until what is under way has ended.
func (v *faultyVolume) settle() {
	v.t.Helper()
	for _, c := range v.clients {
		from := c.Ended.Load()
		v.until("the end of what is under way", func() bool { return c.Ended.Load() >= from+2 })
	}
}

func (v *faultyVolume) until(what string, is func() bool) {
	v.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if list := v.findings.List(); len(list) > 0 {
			v.violations += int64(len(list))
			v.t.Fatalf("waiting for %s: %s", what, strings.Join(list, "\n"))
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("waited in vain for %s: refused %v", what, v.outcomes())
		}
	}
}

// strike has the fault, for its time and until it did harm, unless it is to do none.
func (v *faultyVolume) strike(host peer.Host, harm bool, during func()) {
	t := v.t
	t.Helper()
	v.settle()
	if was := v.outcomes(); len(was) > 0 && !v.impatient { // where a busy machine is enough
		t.Errorf("without a fault initiators are told %v", was)
	}
	v.portal.Begin(v.fault, badLBA)
	over := time.After(v.lasts)
	during()
	if harm {
		v.until("the fault", func() bool { return v.portal.Hits() > 0 })
	}
	var probe sync.WaitGroup
	if harm && v.impatient {
		probe.Go(func() { // of a block that nobody has written, so that it is on the source
			p := make([]byte, 512)
			if err := host.Send(t.Context(), peer.OpRead16, 0, badLBA, 1, nil, p); err != nil || !v.o.Holds(p, badLBA, peer.Original) {
				t.Errorf("read of block %d: %v", badLBA, err)
			}
		})
		v.until("a refusal", func() bool {
			v.mu.Lock()
			defer v.mu.Unlock()
			return v.told["2/04/01h"] > 0
		})
	}
	<-over
	if v.fault == peer.BadBlock && harm {
		v.meetBadBlock(host)
	}
	hits := v.portal.Hits()
	v.portal.End()
	probe.Wait()
	v.settle()
	was := v.outcomes()
	for what := range was {
		if !v.allowed(what) || !harm && !v.impatient {
			t.Errorf("initiators are told %v", was)
			break
		}
	}
	t.Logf("the fault struck %d times; told: %v", hits, was)
}

// meetBadBlock has initiators meet the bad block: its command fails with its own sense, its
// neighbours are there.
func (v *faultyVolume) meetBadBlock(h peer.Host) {
	t := v.t
	t.Helper()
	if v.side == "destination" {
		v.until("a failed write of the bad block", func() bool {
			v.mu.Lock()
			defer v.mu.Unlock()
			return v.told["3/0C/00h"] > 0
		})
		return
	}
	p := make([]byte, 8*512)
	if err := h.Send(t.Context(), peer.OpRead16, 0, badLBA-4, 8, nil, p); !badBlock(err) {
		t.Errorf("a read over the bad block of the source: %v", err)
	}
	for _, at := range []uint64{badLBA - 8, badLBA + 1} {
		must(t, h.Send(t.Context(), peer.OpRead16, 0, at, 8, nil, p))
		if wrong := v.o.Check(p, at, false, 8); len(wrong) > 0 {
			t.Errorf("beside the bad block: %v", wrong)
		}
	}
	v.until("the record of the bad block", func() bool {
		st, err := v.client.Status(t.Context(), v.name)
		must(t, err)
		return len(st.UnreadableRuns) == 1 && st.UnreadableRuns[0] == proxy.BlockRun{LBA: badLBA, Blocks: 1}
	})
}

func (v *faultyVolume) newClient(id int, from, blocks uint64) *peer.Client {
	return &peer.Client{ID: id, Oracle: v.o, From: from, Blocks: blocks, Region: faultyRegion,
		Rand: rand.New(rand.NewPCG(rand.Uint64(), uint64(id))), Findings: &v.findings,
		Acks: &v.acks, Reads: &v.reads, Pace: 20 * time.Millisecond}
}
