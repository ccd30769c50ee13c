package lun_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// cutter forwards connections to a portal and cuts each after some bytes, in
// either direction, in the middle of whatever is on its way.
type cutter struct {
	ln   net.Listener
	to   string
	cuts atomic.Int64
	off  atomic.Bool
	wg   sync.WaitGroup

	mu   sync.Mutex // protects rnd and open
	rnd  *rand.Rand
	open map[net.Conn]bool
}

func newCutter(t *testing.T, to string, seed uint64) *cutter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{ln: ln, to: to, rnd: rand.New(rand.NewPCG(seed, 2)), open: map[net.Conn]bool{}}
	c.wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			c.wg.Go(func() { c.forward(in) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		c.mu.Lock()
		for nc := range c.open {
			nc.Close()
		}
		c.mu.Unlock()
		c.wg.Wait()
	})
	return c
}

func (c *cutter) forward(in net.Conn) {
	defer in.Close()
	out, err := net.Dial("tcp", c.to)
	if err != nil {
		return
	}
	defer out.Close()
	c.mu.Lock()
	c.open[in], c.open[out] = true, true
	budget := [2]int64{4000 + c.rnd.Int64N(1<<21), 4000 + c.rnd.Int64N(1<<21)}
	c.mu.Unlock()
	if c.off.Load() {
		budget = [2]int64{1 << 40, 1 << 40}
	}
	var both sync.WaitGroup
	both.Go(func() {
		io.CopyN(out, in, budget[0])
		in.Close()
		out.Close()
	})
	both.Go(func() {
		io.CopyN(in, out, budget[1])
		in.Close()
		out.Close()
	})
	both.Wait()
	c.cuts.Add(1)
	c.mu.Lock()
	delete(c.open, in)
	delete(c.open, out)
	c.mu.Unlock()
}

// TestBlocksStayRightWhileConnectionsAreCut keeps an oracle of each block: what
// was acknowledged last, and what cancelled writes after that may have left. A
// read must find one of these, and once it did, nothing older.
func TestBlocksStayRightWhileConnectionsAreCut(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	d := peer.StartTgtd(t)
	l := serve(t, d, 8<<20, peer.Unit{Thin: true})
	c := newCutter(t, l.Portal, seed)
	l.Portal = c.ln.Addr().String()
	var dev lun.Device
	for deadline := time.Now().Add(10 * time.Second); ; {
		var err error
		if dev, err = lun.Open(t.Context(), l.URL(), lun.Options{Sessions: 2, IOTimeout: 30 * time.Second}); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer dev.Close()
	const workers, spots, blocks, bs = 6, 24, 16, 512
	end := time.Now().Add(4 * time.Second)
	var done, cancelled atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)+10))
			// may[s][b] are the versions that block b of spot s may hold.
			var may [spots][blocks]map[uint64]bool
			p, want := make([]byte, blocks*bs), make([]byte, bs)
			for version := uint64(1); time.Now().Before(end) && !t.Failed(); version++ {
				s := rnd.IntN(spots)
				start := lun.LBA((w*spots + s) * blocks)
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if rnd.IntN(4) == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(rnd.IntN(3000))*time.Microsecond)
				}
				op := rnd.IntN(8)
				var err error
				switch {
				case op < 3:
					err = dev.ReadAt(ctx, p, start)
				case op == 3:
					err = dev.WriteZeroes(ctx, lun.Extent{Start: start, Blocks: blocks})
				default:
					peer.Stamp(p, bs, uint64(start), seed, version)
					err = dev.WriteAt(ctx, p, start)
				}
				cancel()
				if err != nil && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("worker %d, operation %d: %v", w, op, err)
					return
				}
				if err != nil {
					cancelled.Add(1)
				}
				done.Add(1)
				left := version
				if op == 3 {
					left = 0
				}
				for b := range blocks {
					set := may[s][b]
					if set == nil {
						set = map[uint64]bool{0: true}
						may[s][b] = set
					}
					switch {
					case op < 3 && err == nil:
						found := false
						for v := range set {
							if clear(want); v > 0 {
								peer.Stamp(want, bs, uint64(start)+uint64(b), seed, v)
							}
							if bytes.Equal(p[b*bs:(b+1)*bs], want) {
								found = true
								may[s][b] = map[uint64]bool{v: true}
								break
							}
						}
						if !found {
							t.Errorf("LBA %d holds none of the versions %v", int(start)+b, fmt.Sprint(set))
							return
						}
					case op >= 3 && err == nil:
						may[s][b] = map[uint64]bool{left: true}
					case op >= 3:
						set[left] = true
					}
				}
			}
		})
	}
	wg.Wait()
	c.off.Store(true)
	t.Logf("%d commands, %d cancelled, %d connections cut", done.Load(), cancelled.Load(), c.cuts.Load())
	if c.cuts.Load() < 5 {
		t.Error("hardly a connection was cut: the test shows nothing")
	}
}
