package torture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/proxy"
	"lunshift/target"
	"lunshift/tests/peer"
)

// volatileArray is an array with a volatile write cache (WCE), served by lunshift's own
// target, that loses its power.
type volatileArray struct {
	t      *testing.T
	iqn    string
	naa    uint64
	unit   *luntest.Memory
	server *target.Server
	served chan error
	portal string
	lost   int // blocks
}

func newVolatileArray(t *testing.T, name string, naa uint64, content []byte) *volatileArray {
	a := &volatileArray{t: t, naa: 3<<60 | naa, iqn: "iqn.2001-04.com.example:" + name, unit: luntest.NewThinMemory(512, uint64(len(content))/512), portal: "127.0.0.1:0"}
	const run = 64 << 10
	for at := 0; at < len(content); at += run {
		if part := content[at:min(at+run, len(content))]; !allZero(part) {
			must(t, a.unit.WriteAt(t.Context(), part, lun.LBA(at/512)))
		}
	}
	must(t, a.unit.Flush(t.Context()))
	// Flushes take a while, so that losses come between a write and its flush.
	a.unit.Intercept(func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush {
			time.Sleep(time.Duration(rand.IntN(4)) * time.Millisecond)
		}
		return nil
	})
	a.on()
	t.Cleanup(a.off)
	return a
}

// on serves the unit, as after a power loss: nobody is registered or logged in.
func (a *volatileArray) on() {
	log := logrus.New()
	log.SetOutput(io.Discard)
	for deadline := time.Now().Add(peer.Patience); ; time.Sleep(time.Millisecond) {
		s, err := target.New(target.Config{Portals: []target.Portal{{Address: a.portal}}, Log: log})
		must(a.t, err)
		if err := s.Listen(); err != nil {
			if time.Now().After(deadline) {
				a.t.Fatal(err)
			}
			continue
		}
		must(a.t, s.AddUnit(target.Unit{IQN: a.iqn, Device: lun.Serialize(a.unit), Serial: a.iqn, NAA: a.naa}))
		a.server, a.portal, a.served = s, s.Addrs()[0].String(), make(chan error, 1)
		go func() { a.served <- s.Serve(context.Background()) }()
		return
	}
}

// off ends every connection; what is under way is not answered.
func (a *volatileArray) off() {
	if err := a.server.Close(); err != nil {
		a.t.Error(err)
	}
	if err := <-a.served; err != nil && !errors.Is(err, target.ErrClosed) {
		a.t.Error(err)
	}
}

// cut is a loss of power and its return: of what was not flushed a random part is
// gone.
func (a *volatileArray) cut(rng *rand.Rand) {
	a.off()
	share := rng.IntN(4)
	a.lost += a.unit.PowerLoss(func(lun.LBA) bool { return rng.IntN(4) < share })
	a.on()
}

func (a *volatileArray) url() string { return fmt.Sprintf("iscsi://%s/%s/0", a.portal, a.iqn) }

// content is what it shows now.
func (a *volatileArray) content() []byte {
	info := a.unit.Info()
	p := make([]byte, info.Bytes(info.All()))
	must(a.t, a.unit.ReadAt(a.t.Context(), p, 0))
	return p
}

// TestPowerLossOfTheArraysLosesNothingThatWasDurable: after it a block may hold what
// it held when it was last made durable (its first write, a write with FUA, a SYNCHRONIZE
// CACHE) or anything written since; nothing else. Where the other array lost its power than
// the one that serves, nothing may be gone, and a mirror comes to the same content on both. In
// a part of the cycles lunshift is killed at the same instant.
//
// Caught: no flush of first writes, and no look at the cache that was lost between a first
// write and its flush, in the first run; between copies and theirs, in the second; between
// a write with FUA and its own, in the third; what either side of a mirror lost taken for
// equal, in the second.
func TestPowerLossOfTheArraysLosesNothingThatWasDurable(t *testing.T) {
	r := tierOf(t, 6, 120)
	sum := sum{crashes: map[string]int{}}
	defer func() { tell(t, r, sum) }()
	rng := rand.New(rand.NewPCG(r.seed, 3))
	variants := []volatiles{{destination: true}, {destination: true, mirror: true}, {source: true, mirror: true}, {true, true, true}, {source: true}}
	for began, i := time.Now(), rng.IntN(len(variants)); sum.cycles < int64(r.cycles) || time.Since(began) < r.lasts/4; i++ {
		v := variants[i%len(variants)]
		t.Run(v.String(), func(t *testing.T) { volatileLife(t, v, rng, &sum) })
		if t.Failed() {
			return
		}
	}
}

// volatiles are the sides that lose their power.
type volatiles struct{ source, destination, mirror bool }

func (v volatiles) String() string {
	return map[volatiles]string{
		{false, true, false}: "the destination", {false, true, true}: "the destination of a mirror", {true, false, true}: "the source of a mirror",
		{true, true, true}: "both sides of a mirror", {true, false, false}: "the source",
	}[v]
}

func volatileLife(t *testing.T, v volatiles, rng *rand.Rand, sum *sum) {
	dir := t.TempDir()
	old, fresh := filepath.Join(dir, "old.img"), filepath.Join(dir, "new.img")
	before := image(t, old, rng.Uint64()|1<<40, 1)
	must(t, peer.EmptyFile(fresh, uint64(len(before))))
	sides := volume{volumeName, old, fresh, fmt.Sprintf("mirror = %v\n", v.mirror)}
	source, destination := content(t, old), content(t, fresh)
	var arrays []*volatileArray
	if v.source {
		a := newVolatileArray(t, "old", 1, before)
		arrays, source, sides.source = append(arrays, a), a.content, a.url()
	}
	if v.destination {
		a := newVolatileArray(t, "new", 2, make([]byte, len(before)))
		arrays, destination, sides.destination = append(arrays, a), a.content, a.url()
	}
	l := newLife(t, newService(t, "", sides), before, 512, rng, sum)
	l.source, l.destination, l.mirrored = source, destination, v.mirror
	l.power = func() {
		which := 1 + rng.IntN(1<<len(arrays)-1) // one of them, or both
		for i, a := range arrays {
			if which>>i&1 != 0 {
				a.cut(rng)
			}
		}
	}
	for _, c := range l.clients {
		c.Losses = func() (n uint64) {
			for _, a := range arrays {
				n += a.unit.Resets()
			}
			return n
		}
	}
	ctx := t.Context()
	l.s.start("")
	l.throttle(copyRate)
	l.startPaused()
	l.lasting = !v.destination
	l.uncopied = true
	for range 3 {
		l.lose("migrating, nothing copied")
	}
	l.uncopied = false
	_, err := l.s.client.Resume(ctx, volumeName)
	must(t, err)
	for range 3 {
		l.lose("migrating")
	}
	if rng.IntN(2) == 0 {
		unthrottle(ctx, l.s)
		l.lose("on the way to synced")
		l.until(proxy.Synced)
		for range 2 {
			l.lose("synced")
		}
	}
	if v.mirror {
		l.verifyMirror("power loss")
	}
	if rng.IntN(2) == 0 || !v.destination {
		l.throttle(copyRate / 4)
		l.rollBackQuietly()
		l.lasting = !v.source
		for range 3 {
			l.lose("rolling back, or rolled back")
		}
		unthrottle(ctx, l.s)
		l.until(proxy.RolledBack)
		l.lose("rolled back")
		l.sum.rollbacks++
	}
	l.sum.acked += l.acks.Load()
	lost := 0
	for _, a := range arrays {
		lost += a.lost
	}
	if lost == 0 {
		t.Error("no block was lost, which is no power loss")
	}
	t.Logf("%d blocks lost", lost)
}

// lose is one cycle: load, a power loss of arrays, and every block read back.
func (l *life) lose(when string) {
	l.first.Store(l.uncopied)
	w := l.work()
	time.Sleep(time.Duration(20+l.rng.IntN(200)) * time.Millisecond)
	if l.mirrored && l.rng.IntN(8) == 0 {
		time.Sleep(settleTime)
	}
	w.stop() // the commands under way meet the loss
	if l.rng.IntN(3) == 0 {
		when += ", lunshift killed"
		l.s.kill()
		w.end()
		l.power()
		l.s.start("")
	} else {
		l.power()
		w.drain()
	}
	l.sum.crashes["power loss, "+when]++
	l.sum.cycles++
	l.verify(when)
}
