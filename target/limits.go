package target

import (
	"container/list"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// errDisplaced is the end of a connection that did not log in while others waited.
var errDisplaced = errors.New("connection gave its place to another while it was logging in")

// places counts connections by address: those that are logging in and those that are
// sessions. Server.mu protects it.
type places struct {
	loggingIn list.List // of *conn, the oldest first
	sessions  int
	byAddress map[netip.Addr]*presence
}

// presence is what one address has.
type presence struct{ loggingIn, sessions int }

func (p *places) of(a netip.Addr) presence {
	if e := p.byAddress[a]; e != nil {
		return *e
	}
	return presence{}
}

func (p *places) add(a netip.Addr, loggingIn, sessions int) {
	if p.byAddress == nil {
		p.byAddress = map[netip.Addr]*presence{}
	}
	e := p.byAddress[a]
	if e == nil {
		e = &presence{}
		p.byAddress[a] = e
	}
	e.loggingIn += loggingIn
	e.sessions += sessions
	p.sessions += sessions
	if *e == (presence{}) {
		delete(p.byAddress, a)
	}
}

// enter gives a new connection a place to log in.
func (p *places) enter(c *conn) {
	c.place = p.loggingIn.PushBack(c)
	p.add(c.from, 1, 0)
}

// loggedIn makes it the place of a session.
func (p *places) loggedIn(c *conn) {
	p.vacate(c)
	p.add(c.from, 0, 1)
	c.counted = true
}

// leave frees whatever place the connection has.
func (p *places) leave(c *conn) {
	p.vacate(c)
	if c.counted {
		c.counted = false
		p.add(c.from, 0, -1)
	}
}

func (p *places) vacate(c *conn) {
	if c.place != nil {
		p.loggingIn.Remove(c.place)
		c.place = nil
		p.add(c.from, -1, 0)
	}
}

// makeRoom finds a place to log in for a connection from an address, or says why there
// is none. The place of displaced is free; it is still to be closed. s.mu is held.
func (s *Server) makeRoom(from netip.Addr) (displaced *conn, why string) {
	p := &s.places
	mine := p.of(from)
	if mine.loggingIn >= s.cfg.ConnectionsPerAddress {
		return nil, fmt.Sprintf("%d of this address are logging in, the most allowed", mine.loggingIn)
	}
	if p.loggingIn.Len() < s.cfg.ConnectionsLoggingIn {
		return nil, ""
	}
	// The address with the most places, those without sessions before the others.
	var most presence
	var heaviest netip.Addr
	for a, e := range p.byAddress {
		if e.loggingIn == 0 {
			continue
		}
		idle, mostIdle := e.sessions == 0, most.loggingIn > 0 && most.sessions == 0
		if most.loggingIn == 0 || idle && !mostIdle || idle == mostIdle && e.loggingIn > most.loggingIn {
			most, heaviest = *e, a
		}
	}
	known, stranger := mine.sessions > 0, most.sessions == 0
	if heaviest == from || !(known && stranger) && !(known == !stranger && most.loggingIn > mine.loggingIn+1) {
		return nil, fmt.Sprintf("%d are logging in, the most allowed", p.loggingIn.Len())
	}
	for e := p.loggingIn.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*conn); c.from == heaviest {
			p.vacate(c)
			return c, ""
		}
	}
	return nil, "no place to log in"
}

// roomForSession says why a session would be one too many; "" when it is not. s.mu is
// held.
func (s *Server) roomForSession(c *conn) string {
	if n := s.places.sessions; n >= s.cfg.MaxConnections {
		return fmt.Sprintf("%d sessions exist, the most allowed", n)
	}
	if n := s.places.of(c.from).sessions; n >= s.cfg.ConnectionsPerAddress {
		return fmt.Sprintf("%d sessions of this address exist, the most allowed", n)
	}
	if c.node == nil {
		return ""
	}
	var there []*conn
	for o := range s.conns {
		if o.loggedIn && o.node == c.node {
			there = append(there, o)
		}
	}
	if len(there) < s.cfg.SessionsPerUnit {
		return "" // no unit has more sessions than its target
	}
	for id, u := range *c.node.units.Load() {
		if !u.sees(&c.peer) {
			continue
		}
		n := 0
		for _, o := range there {
			if u.sees(&o.peer) {
				n++
			}
		}
		if n >= s.cfg.SessionsPerUnit {
			return fmt.Sprintf("%d sessions of LUN %d exist, the most allowed", n, id)
		}
	}
	return ""
}

// failures counts logins that failed, by address, within a minute from the first.
// It keeps the latest mostAddresses that failed.
type failures struct {
	most int

	mu     sync.Mutex // protects what follows
	order  list.List  // of *failing, by since
	failed map[netip.Addr]*list.Element
}

type failing struct {
	from  netip.Addr
	since time.Time
	count int
}

const (
	failurePeriod = time.Minute
	mostAddresses = 8192
)

func newFailures(most int) *failures {
	return &failures{most: most, failed: map[netip.Addr]*list.Element{}}
}

// expire forgets minutes that are over. f.mu is held.
func (f *failures) expire(now time.Time) {
	for e := f.order.Front(); e != nil; e = f.order.Front() {
		if x := e.Value.(*failing); now.Sub(x.since) >= failurePeriod || f.order.Len() > mostAddresses {
			delete(f.failed, x.from)
			f.order.Remove(e)
			continue
		}
		return
	}
}

// blocked tells whether logins of the address are refused now.
func (f *failures) blocked(from netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expire(time.Now())
	e := f.failed[from]
	return e != nil && e.Value.(*failing).count >= f.most
}

// attempt counts a login that is about to be decided as failed, so that many at a time
// are no way around the limit; false where the address is blocked.
func (f *failures) attempt(from netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	f.expire(now)
	if e := f.failed[from]; e != nil && e.Value.(*failing).count >= f.most {
		return false
	}
	f.count(from, now)
	return true
}

// succeeded takes back what attempt counted.
func (f *failures) succeeded(from netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.failed[from]
	if e == nil {
		return
	}
	x := e.Value.(*failing)
	if x.count--; x.count <= 0 {
		delete(f.failed, from)
		f.order.Remove(e)
	}
}

// note counts a login that failed.
func (f *failures) note(from netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count(from, time.Now())
}

// count is called with f.mu held.
func (f *failures) count(from netip.Addr, now time.Time) {
	e := f.failed[from]
	if e == nil {
		e = f.order.PushBack(&failing{from: from, since: now})
		f.failed[from] = e
	}
	e.Value.(*failing).count++
	f.expire(now)
}

// challenges are the CHAP challenges that the server has open: none of them is answered
// by the server itself when it comes back on whatever connection (RFC 7143 9.2.1). They
// are as many as connections are logging in at most.
type challenges struct {
	mu   sync.Mutex // protects what follows
	open map[string]struct{}
}

func newChallenges() *challenges { return &challenges{open: map[string]struct{}{}} }

func (c *challenges) issue(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[string(b)] = struct{}{}
}

func (c *challenges) issued(b []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.open[string(b)]
	return ok
}

func (c *challenges) forget(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, string(b))
}

// notices keeps what strangers can cause at will from filling the log: one line a
// second, which tells how many were left out before it.
type notices struct {
	mu   sync.Mutex // protects what follows
	last time.Time
	left int
}

func newNotices() *notices { return &notices{} }

func (n *notices) tell(log logrus.FieldLogger, message string) {
	n.mu.Lock()
	now := time.Now()
	if now.Sub(n.last) < time.Second {
		n.left++
		n.mu.Unlock()
		return
	}
	left := n.left
	n.last, n.left = now, 0
	n.mu.Unlock()
	if left > 0 {
		message = fmt.Sprintf("%s (and %d more since the last such line)", message, left)
	}
	log.Warn(message)
}
