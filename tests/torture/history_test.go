package torture

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/tests/peer"
)

// What is recorded of a command, for each block that it touches.
type (
	// input is the command.
	input struct {
		block uint64
		kind  rune       // 'r' read, 'w' write, 'c' compare and write
		want  peer.Value // what 'c' compares with
		v     peer.Value // what 'w' and 'c' write
	}
	// output is the answer.
	output struct {
		v     peer.Value // what 'r' read
		wrote bool       // what 'c' did
		// unknown: nobody answered. The command may take effect at any time after its
		// invocation, or never.
		unknown bool
	}
)

// register is one logical block: what it holds is what was last written.
var register = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		blocks := map[uint64][]porcupine.Operation{}
		for _, op := range history {
			b := op.Input.(input).block
			blocks[b] = append(blocks[b], op)
		}
		var parts [][]porcupine.Operation
		for _, part := range blocks {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() any { return peer.Original },
	Step: func(state, in, out any) (bool, any) {
		now, i, o := state.(peer.Value), in.(input), out.(output)
		switch i.kind {
		case 'w':
			return true, i.v
		case 'c':
			switch {
			case o.unknown && now == i.want, o.wrote && now == i.want:
				return true, i.v
			case o.unknown: // it found something else, if it came at all
				return true, now
			}
			return !o.wrote && now != i.want, now
		}
		return o.v == now, now
	},
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v → %+v", in, out) },
}

// history is what concurrent clients saw.
type history struct {
	mu    sync.Mutex // guards ops
	ops   []porcupine.Operation
	began time.Time
}

func (h *history) now() int64 { return int64(time.Since(h.began)) }

// add notes a command on a block. Reads that nobody answered say nothing.
func (h *history) add(client int, in input, out output, call int64) {
	back := h.now()
	if out.unknown {
		if in.kind == 'r' {
			return
		}
		back = math.MaxInt64
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Output: out, Call: call, Return: back})
}

// check wants the history to be linearizable, block by block.
func (h *history) check(limit time.Duration) porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(register, h.ops, limit)
}

// explain shows where the history of a block goes wrong: the last commands of the
// shortest beginning of it that is not linearizable.
func (h *history) explain(t *testing.T) {
	for _, part := range register.Partition(h.ops) {
		slices.SortFunc(part, func(a, b porcupine.Operation) int { return cmp.Compare(a.Return, b.Return) })
		begin := func(n int) *history {
			var cut history
			for i, op := range part {
				if i >= n && op.Call >= part[n-1].Return {
					continue
				}
				if i >= n { // under way then
					op.Return = math.MaxInt64
					in := op.Input.(input)
					if in.kind == 'r' {
						continue
					}
					op.Output = output{unknown: true}
				}
				cut.ops = append(cut.ops, op)
			}
			return &cut
		}
		n := sort.Search(len(part), func(i int) bool { return begin(i+1).check(10*time.Second) == porcupine.Illegal })
		if n == len(part) {
			continue
		}
		for _, op := range part[max(0, n-25):min(n+6, len(part))] {
			t.Logf("%12d to %12d client %d: %+v → %+v", op.Call, op.Return, op.ClientId, op.Input, op.Output)
		}
		for _, op := range part {
			if op.Output.(output).unknown {
				t.Logf("%12d, unanswered, client %d: %+v", op.Call, op.ClientId, op.Input)
			}
		}
	}
}

// rival is a client that shares its blocks with the others.
type rival struct {
	id       int
	o        *peer.Oracle
	hot      []uint64 // pairs of adjacent blocks begin here
	sequence uint64
	rng      *rand.Rand
	h        *history
	faults   *peer.Findings
	seen     map[uint64]peer.Value // what it last saw in a block, for its comparisons
}

func (c *rival) run(ctx context.Context, h peer.Host) {
	for ctx.Err() == nil {
		if err := c.step(ctx, h); err != nil {
			if !errors.Is(err, peer.ErrGone) {
				c.faults.Add("client %d: %v", c.id, err)
			}
			return
		}
	}
}

// step is one command on one block or on two adjacent ones, at times over the end of a
// region. Each block is a register of its own: SCSI makes no promise that both change at
// one instant.
func (c *rival) step(ctx context.Context, h peer.Host) error {
	lba, n := c.hot[c.rng.IntN(len(c.hot))], 1+c.rng.Uint64N(2)
	if n == 1 {
		lba += c.rng.Uint64N(2)
	}
	p := make([]byte, n*uint64(c.o.BlockSize))
	call := c.h.now()
	kind := c.rng.IntN(10)
	switch {
	case kind < 5:
		err := h.Send(ctx, peer.OpRead16, 0, lba, uint32(n), nil, p)
		for again := 0; err == nil && again < 3 && c.torn(p, lba); again++ {
			// A file that is read while it is written may give bytes of both
			// (docs/reliability.md); that says nothing. The next read must be whole.
			call = c.h.now()
			err = h.Send(ctx, peer.OpRead16, 0, lba, uint32(n), nil, p)
		}
		for i := range n {
			v, known := c.o.Which(p[i*uint64(c.o.BlockSize):][:c.o.BlockSize], lba+i)
			if err == nil && !known {
				return fmt.Errorf("block %d holds %s", lba+i, c.o.Describe(p[i*uint64(c.o.BlockSize):][:c.o.BlockSize], lba+i))
			}
			c.seen[lba+i] = v
			c.h.add(c.id, input{block: lba + i, kind: 'r'}, output{v: v, unknown: err != nil}, call)
		}
		return err
	case kind < 8:
		c.sequence++
		v := peer.MakeValue(c.id, c.sequence)
		for i := range n {
			c.o.Fill(p[i*uint64(c.o.BlockSize):][:c.o.BlockSize], lba+i, v)
		}
		err := h.Send(ctx, peer.OpWrite16, 0, lba, uint32(n), p, nil)
		for i := range n {
			c.h.add(c.id, input{block: lba + i, kind: 'w', v: v}, output{unknown: err != nil}, call)
		}
		return err
	}
	// A comparison of two blocks would not be one of two registers.
	want, known := c.seen[lba]
	if !known {
		return nil
	}
	c.sequence++
	v := peer.MakeValue(c.id, c.sequence)
	p = make([]byte, 2*c.o.BlockSize)
	c.o.Fill(p[:c.o.BlockSize], lba, want)
	c.o.Fill(p[c.o.BlockSize:], lba, v)
	err := h.Send(ctx, peer.OpCompareWrite, 0, lba, 1, p, nil)
	refused := errors.Is(err, peer.ErrMiscompare)
	c.h.add(c.id, input{lba, 'c', want, v}, output{wrote: err == nil, unknown: err != nil && !refused}, call)
	if refused {
		return nil
	}
	return err
}

// torn tells whether a block of p, read from lba on, holds no value as a whole.
func (c *rival) torn(p []byte, lba uint64) bool {
	for ; len(p) > 0; p, lba = p[c.o.BlockSize:], lba+1 {
		if _, whole := c.o.Which(p[:c.o.BlockSize], lba); !whole {
			return true
		}
	}
	return false
}

// TestHistoriesAreLinearizable records what clients of a few hot blocks see while the
// service is killed and the volume changes its phase under them. It caught
// writes without the range lock in its first run.
func TestHistoriesAreLinearizable(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	r := tierOf(t, 1, 10)
	rng := rand.New(rand.NewPCG(r.seed, 1))
	pairs := []string{"tgtd to tgtd", "file to tgtd", "tgtd to file"}
	for i := range r.cycles {
		sum := sum{crashes: map[string]int{}}
		l := lifeOf(t, pairs[(i+rng.IntN(len(pairs)))%len(pairs)], rng, &sum)
		h := &history{began: time.Now()}
		l.record(h, 6)
		unknown := 0
		for _, op := range h.ops {
			if op.Output.(output).unknown {
				unknown++
			}
		}
		t.Logf("%d operations, %d of them unanswered, %d crashes", len(h.ops), unknown, sum.cycles)
		if unknown == 0 || len(h.ops) < 200 {
			t.Error("a history that says nothing")
		}
		if got := h.check(time.Minute); got != porcupine.Ok {
			h.explain(t)
			t.Fatalf("seed %d: the history is not linearizable: %v", r.seed, got)
		}
		if r.lasts > 0 {
			fmt.Printf("torture: seed %d: history of %d operations, %d unanswered, linearizable\n", r.seed, len(h.ops), unknown)
		}
	}
}

// record lets rivals loose on a life of the volume from ready to synced.
func (l *life) record(h *history, rivals int) {
	t := l.t
	ctx := t.Context()
	perRegion := uint64(regionSize / l.o.BlockSize)
	// The ends of regions that the copier comes to at different times.
	hot := []uint64{perRegion - 1, 100*perRegion + 7, 300*perRegion - 1}
	var all []*rival
	for i := range rivals {
		all = append(all, &rival{id: i, o: l.o, hot: hot, rng: rand.New(rand.NewPCG(l.rng.Uint64(), uint64(i))), h: h, faults: &l.faults, seen: map[uint64]peer.Value{}})
	}
	l.s.start("")
	_, err := l.s.client.Throttle(ctx, volumeName, 2*copyRate)
	must(t, err)
	steps := []func(){
		func() {},
		func() { startVolume(ctx, l.s) },
		func() { startVolume(ctx, l.s) },
		func() { unthrottle(ctx, l.s) },
		func() { l.until(proxy.Synced) },
	}
	if l.rng.IntN(2) == 0 {
		steps = slices.Insert(steps, 3,
			func() { rollBack(ctx, l.s) },
			func() { rollBack(ctx, l.s) },
			func() {
				l.until(proxy.RolledBack)
				l.s.reuse = true
				startVolume(ctx, l.s)
			})
		l.sum.rollbacks++
	}
	for _, step := range steps {
		round, leave := context.WithCancel(ctx)
		var hosts []*lun.Initiator
		var running sync.WaitGroup
		for i := range 3 {
			dialed, err := l.s.dial(ctx, fmt.Sprintf("rival%d", i))
			must(t, err)
			hosts = append(hosts, dialed)
		}
		for i, c := range all {
			running.Go(func() { c.run(round, peer.Host{Initiator: hosts[i%len(hosts)]}) })
		}
		time.Sleep(time.Duration(20+l.rng.IntN(40)) * time.Millisecond)
		step()
		time.Sleep(time.Duration(20+l.rng.IntN(100)) * time.Millisecond)
		l.s.kill()
		l.sum.cycles++
		// Nobody sends anything again: a write that took effect twice, with another
		// between, would be the initiator's doing.
		leave()
		for _, dialed := range hosts {
			dialed.Close()
		}
		running.Wait()
		if wrong := l.faults.List(); len(wrong) > 0 {
			t.Fatal(wrong)
		}
		l.s.start("")
	}
	// What the blocks hold in the end counts as well.
	dialed, err := l.s.dial(ctx, "reader")
	must(t, err)
	defer dialed.Close()
	for range 4 {
		last := &rival{id: rivals, o: l.o, h: h, seen: map[uint64]peer.Value{}}
		for _, lba := range hot {
			for at := lba; at < lba+2; at++ {
				p := make([]byte, l.o.BlockSize)
				call := h.now()
				must(t, peer.Host{Initiator: dialed}.Send(ctx, peer.OpRead16, 0, at, 1, nil, p))
				v, known := l.o.Which(p, at)
				if !known {
					t.Fatalf("block %d holds %s", at, l.o.Describe(p, at))
				}
				h.add(last.id, input{block: at, kind: 'r'}, output{v: v}, call)
			}
		}
	}
}

// TestWrongHistoriesAreRefused holds the check itself to histories that must not pass.
func TestWrongHistoriesAreRefused(t *testing.T) {
	const a, b = peer.Value(2), peer.Value(3)
	write := func(v peer.Value) input { return input{kind: 'w', v: v} }
	swap := func(want, v peer.Value) input { return input{kind: 'c', want: want, v: v} }
	read := input{kind: 'r'}
	gone := output{unknown: true}
	type step struct {
		in         input
		out        output
		call, back int64
	}
	const never = math.MaxInt64
	for _, tc := range []struct {
		name  string
		steps []step
		want  porcupine.CheckResult
	}{
		{"read of what was written", []step{{write(a), output{}, 1, 2}, {read, output{v: a}, 3, 4}}, porcupine.Ok},
		{"acknowledged write lost", []step{{write(a), output{}, 1, 2}, {read, output{v: peer.Original}, 3, 4}}, porcupine.Illegal},
		{"older than a read before", []step{{write(a), gone, 1, never}, {read, output{v: a}, 3, 4}, {read, output{v: peer.Original}, 5, 6}}, porcupine.Illegal},
		{"unanswered write that came late", []step{{write(a), gone, 1, never}, {read, output{v: peer.Original}, 3, 4}, {read, output{v: a}, 5, 6}}, porcupine.Ok},
		{"unanswered write that came twice", []step{{write(a), gone, 1, never}, {read, output{v: a}, 2, 3}, {write(b), output{}, 4, 5}, {read, output{v: a}, 6, 7}}, porcupine.Illegal},
		{"write seen before it was issued", []step{{read, output{v: a}, 1, 2}, {write(a), output{}, 3, 4}}, porcupine.Illegal},
		{"two comparisons that both win", []step{{swap(peer.Original, a), output{wrote: true}, 1, 5}, {swap(peer.Original, b), output{wrote: true}, 2, 6}}, porcupine.Illegal},
		{"comparison lost to another", []step{{swap(peer.Original, a), output{wrote: true}, 1, 5}, {swap(peer.Original, b), output{}, 2, 6}}, porcupine.Ok},
		{"comparison refused without a reason", []step{{swap(peer.Original, a), output{}, 1, 2}}, porcupine.Illegal},
		{"never written", []step{{read, output{v: b}, 1, 2}}, porcupine.Illegal},
	} {
		var h history
		for i, s := range tc.steps {
			h.ops = append(h.ops, porcupine.Operation{ClientId: i, Input: s.in, Output: s.out, Call: s.call, Return: s.back})
		}
		if got := h.check(time.Minute); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}
