package peer

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Fault is one way in which an array misbehaves.
type Fault int

const (
	Sound Fault = iota
	// Silent: nothing comes through, either way, and no connection is refused. What was
	// sent meanwhile comes when it is over, as TCP has it, commands a while after new logins.
	Silent
	// Gone: the same, but what was sent meanwhile never comes.
	Gone
	// Refusing: connections are reset, new ones at once.
	Refusing
	// BadBlock: one block gives MEDIUM ERROR; of the writes that touch it every other one is
	// done all the same.
	BadBlock
	// Busy and TaskSetFull are the status of all that reads, changes or flushes the medium.
	Busy
	TaskSetFull
	// Cutting: connections are reset in the middle of data, one way or the other.
	Cutting
	// Slow: each command takes a second longer.
	Slow
	// ShortIn: a read ends with GOOD and a residual when half of its last PDU came;
	// ShortInUntold: without a residual.
	ShortIn
	ShortInUntold
	// ShortOut: a write ends with GOOD and its whole length as residual; every other one is
	// done all the same. ShortOutUntold: it ends with GOOD and no residual, though its
	// data was not asked for.
	ShortOut
	ShortOutUntold
	// Misplaced: the halves of a Data-In go to each other's place; Misnumbered: it has the
	// number of another.
	Misplaced
	Misnumbered
	// Smaller: the unit has half of its size.
	Smaller
)

// lateness is how long after Silent comes what was held back, but for logins.
const lateness = 500 * time.Millisecond

// slowness is what Slow adds to each command.
const slowness = time.Second

// FaultyPortal stands before a portal and passes on what initiators and the target send, but
// for the fault that it has at the time. Digests must be off, and targets have one unit
// that is used. Its methods may be called concurrently.
type FaultyPortal struct {
	l    net.Listener
	to   string
	all  sync.WaitGroup
	hits atomic.Int64

	mu     sync.Mutex // protects what follows
	fault  Fault
	lba    uint64
	blocks uint64        // of the unit, as it last said
	over   chan struct{} // closed when the fault changes
	conns  map[*faultyConn]struct{}
	closed bool
}

// NewFaultyPortal listens before the portal to, without a fault, until the test ends.
func NewFaultyPortal(t testing.TB, to string) *FaultyPortal {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &FaultyPortal{l: l, to: to, over: make(chan struct{}), conns: map[*faultyConn]struct{}{}}
	p.all.Go(p.serve)
	t.Cleanup(p.close)
	return p
}

// Portal is the host:port where it listens.
func (p *FaultyPortal) Portal() string { return p.l.Addr().String() }

// Begin has the portal misbehave, where it is BadBlock at lba.
func (p *FaultyPortal) Begin(f Fault, lba uint64) {
	p.mu.Lock()
	p.fault, p.lba = f, lba
	p.hits.Store(0)
	close(p.over)
	p.over = make(chan struct{})
	var lost []*faultyConn
	for c := range p.conns {
		c.attention = f == Smaller
		if f == Refusing {
			lost = append(lost, c)
		}
	}
	p.mu.Unlock()
	for _, c := range lost {
		p.hits.Add(1)
		c.reset()
	}
}

// End has it behave again.
func (p *FaultyPortal) End() { p.Begin(Sound, 0) }

// Hits counts what the fault did since Begin: PDUs, commands or connections.
func (p *FaultyPortal) Hits() int64 { return p.hits.Load() }

func (p *FaultyPortal) close() {
	p.End()
	p.mu.Lock()
	p.closed = true
	for c := range p.conns {
		c.close()
	}
	p.mu.Unlock()
	p.l.Close()
	p.all.Wait()
}

func (p *FaultyPortal) now() (f Fault, lba uint64, over chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault, p.lba, p.over
}

func (p *FaultyPortal) serve() {
	for {
		from, err := p.l.Accept()
		if err != nil {
			return
		}
		if f, _, _ := p.now(); f == Refusing {
			p.hits.Add(1)
			from.(*net.TCPConn).SetLinger(0)
			from.Close()
			continue
		}
		p.all.Go(func() { p.pass(from) })
	}
}

func (p *FaultyPortal) pass(from net.Conn) {
	to, err := net.Dial("tcp", p.to)
	if err != nil {
		from.Close()
		return
	}
	c := &faultyConn{p: p, from: from, to: to, gone: make(chan struct{}), tasks: map[uint32]*faultyTask{}, queue: make(chan delivery, 4096)}
	p.mu.Lock()
	closed := p.closed
	if !closed {
		p.conns[c] = struct{}{}
	}
	p.mu.Unlock()
	if closed {
		c.close()
		return
	}
	var back sync.WaitGroup
	back.Go(c.answers)
	back.Go(c.deliver)
	c.requests()
	c.close()
	back.Wait()
	p.mu.Lock()
	delete(p.conns, c)
	p.mu.Unlock()
}
