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
	unit   *luntest.Memory
	server *target.Server
	served chan error
	portal string
	lost   int // blocks
}

const volatileIQN = "iqn.2001-04.com.example:volatile"

func newVolatileArray(t *testing.T, blocks uint64) *volatileArray {
	a := &volatileArray{t: t, unit: luntest.NewThinMemory(512, blocks), portal: "127.0.0.1:0"}
	// Flushes take a while, so that losses come between a write and its flush.
	a.unit.Before = func(_ context.Context, op luntest.Op, _ lun.Extent) error {
		if op == luntest.Flush {
			time.Sleep(time.Duration(rand.IntN(4)) * time.Millisecond)
		}
		return nil
	}
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
		must(a.t, s.AddUnit(target.Unit{IQN: volatileIQN, Device: lun.Serialize(a.unit), Serial: "volatile", NAA: 3<<60 | 1}))
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

func (a *volatileArray) url() string { return fmt.Sprintf("iscsi://%s/%s/0", a.portal, volatileIQN) }

// TestPowerLossOfTheDestinationLosesNothingThatWasDurable: after it a block may hold what
// it held when it was last made durable (its first write, a write with FUA, a SYNCHRONIZE
// CACHE) or anything written since; nothing else. In a part of the cycles lunshift is killed
// at the same instant.
//
// Caught: no flush of first writes, and no look at the cache that was lost between a first
// write and its flush, in the first run; between copies and theirs, in the second; between
// a write with FUA and its own, in the third.
func TestPowerLossOfTheDestinationLosesNothingThatWasDurable(t *testing.T) {
	r := tierOf(t, 10, 200)
	sum := sum{crashes: map[string]int{}}
	defer func() { tell(t, r, sum) }()
	rng := rand.New(rand.NewPCG(r.seed, 3))
	for began := time.Now(); sum.cycles < int64(r.cycles) || time.Since(began) < r.lasts/4; {
		t.Run(fmt.Sprint("life ", sum.cycles), func(t *testing.T) { volatileLife(t, rng, &sum) })
		if t.Failed() {
			return
		}
	}
}

func volatileLife(t *testing.T, rng *rand.Rand, sum *sum) {
	path := filepath.Join(t.TempDir(), "old.img")
	before := image(t, path, rng.Uint64()|1<<40, 1)
	a := newVolatileArray(t, uint64(len(before))/512)
	l := newLife(t, newService(t, "", path, a.url()), before, 512, rng, sum)
	l.power = func() { a.cut(rng) }
	for _, c := range l.clients {
		c.Losses = a.unit.Resets
	}
	l.s.start("")
	_, err := l.s.client.Throttle(t.Context(), volumeName, copyRate)
	must(t, err)
	l.startPaused()
	l.uncopied = true
	for range 3 {
		l.lose("migrating, nothing copied")
	}
	l.uncopied = false
	_, err = l.s.client.Resume(t.Context(), volumeName)
	must(t, err)
	for range 4 {
		l.lose("migrating")
	}
	unthrottle(t.Context(), l.s)
	l.lose("on the way to synced")
	l.until(proxy.Synced)
	for range 2 {
		l.lose("synced")
	}
	l.sum.acked += l.acks.Load()
	if a.lost == 0 {
		t.Error("no block was lost, which is no power loss")
	}
	t.Logf("%d blocks lost", a.lost)
}

// lose is one cycle: load, a power loss of the destination, and every block read back.
func (l *life) lose(when string) {
	l.first.Store(l.uncopied)
	w := l.work()
	time.Sleep(time.Duration(20+l.rng.IntN(200)) * time.Millisecond)
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
	l.sum.crashes["power loss of the destination, "+when]++
	l.sum.cycles++
	l.verify(when)
}
