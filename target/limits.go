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

// origin is what limits by address count together: an IPv4 address, or the 64-bit network
// of an IPv6 address, as every host has 2^64 addresses of that.
func origin(a netip.Addr) netip.Addr {
	if a.Is4() {
		return a
	}
	p, err := a.Prefix(64)
	if err != nil {
		return a
	}
	return p.Addr()
}

// mostHandles is how many sessions can have a TSIH of their own (RFC 7143 11.12.6): it has
// 16 bits, and 0 is that of a session that has none yet.
const mostHandles = 1<<16 - 1

// places counts connections by origin: those that are logging in, discovery sessions
// among them, and those that are sessions. Server.mu protects it.
type places struct {
	loggingIn list.List // of *conn, the oldest first
	sessions  int
	byOrigin  map[netip.Addr]*presence
	handles   map[uint16]struct{} // TSIHs that are taken
	last      uint16              // the latest one
}

// presence is what one origin has.
type presence struct{ loggingIn, sessions int }

func (p *places) of(a netip.Addr) presence {
	if e := p.byOrigin[origin(a)]; e != nil {
		return *e
	}
	return presence{}
}

func (p *places) add(a netip.Addr, loggingIn, sessions int) {
	a = origin(a)
	if p.byOrigin == nil {
		p.byOrigin = map[netip.Addr]*presence{}
	}
	e := p.byOrigin[a]
	if e == nil {
		e = &presence{}
		p.byOrigin[a] = e
	}
	e.loggingIn += loggingIn
	e.sessions += sessions
	p.sessions += sessions
	if *e == (presence{}) {
		delete(p.byOrigin, a)
	}
}

// handle is a TSIH that no session has; 0 where all are taken. leave frees it.
func (p *places) handle() uint16 {
	if len(p.handles) >= mostHandles {
		return 0
	}
	if p.handles == nil {
		p.handles = map[uint16]struct{}{}
	}
	for {
		p.last++
		if _, taken := p.handles[p.last]; p.last != 0 && !taken {
			p.handles[p.last] = struct{}{}
			return p.last
		}
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

// leave frees whatever place the connection has, and its TSIH.
func (p *places) leave(c *conn) {
	p.vacate(c)
	if c.counted {
		c.counted = false
		p.add(c.from, 0, -1)
	}
	if c.tsih != 0 {
		delete(p.handles, c.tsih)
	}
}

func (p *places) vacate(c *conn) {
	if c.place != nil {
		p.loggingIn.Remove(c.place)
		c.place = nil
		p.add(c.from, -1, 0)
	}
}

// standing orders connections that want a place to log in.
type standing int

const (
	stranger standing = iota
	named             // a rule of some unit names a network with its address
	present           // its origin has sessions; discovery sessions are none
)

func (s *Server) standing(from netip.Addr) standing {
	switch {
	case s.places.of(from).sessions > 0:
		return present
	case s.networks.contains(from):
		return named
	}
	return stranger
}

// makeRoom finds a place to log in for a connection from an address, or says why there is none. The
// place of displaced is free; it is still to be closed. s.mu is held.
//
// Where all places are taken, the newcomer gets that of a connection of lower standing,
// or of one of its own standing whose origin has more places than its own has. Among these
// the lowest standing goes first, then the origin with the most places, then the
// oldest: silence keeps nobody out, wherever it comes from.
func (s *Server) makeRoom(from netip.Addr) (displaced *conn, why string) {
	p := &s.places
	mine := p.of(from)
	if mine.loggingIn >= s.cfg.ConnectionsPerAddress {
		return nil, fmt.Sprintf("%d of this address are logging in, the most allowed", mine.loggingIn)
	}
	if p.loggingIn.Len() < s.cfg.ConnectionsLoggingIn {
		return nil, ""
	}
	var low standing
	var weight int
	for e := p.loggingIn.Front(); e != nil; e = e.Next() {
		o := e.Value.(*conn)
		st, n := s.standing(o.from), p.of(o.from).loggingIn
		if displaced == nil || st < low || st == low && n > weight {
			displaced, low, weight = o, st, n
		}
	}
	if st := s.standing(from); displaced == nil || low > st || low == st && weight <= mine.loggingIn {
		return nil, fmt.Sprintf("%d are logging in, the most allowed", p.loggingIn.Len())
	}
	p.vacate(displaced)
	return displaced, ""
}

// networks counts the networks that the rules of the units name. Server.mu protects it.
type networks map[netip.Prefix]int

// count notes the networks of a list of rules, or with n = -1 forgets them.
func (w networks) count(rules []Initiator, n int) {
	add := func(p netip.Prefix) {
		if p = p.Masked(); w[p]+n == 0 {
			delete(w, p)
		} else {
			w[p] += n
		}
	}
	if len(rules) == 0 { // the loopback
		add(netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8))
		add(netip.PrefixFrom(netip.IPv6Loopback(), 128))
	}
	for i := range rules {
		for _, p := range rules[i].Networks {
			add(p)
		}
	}
}

// contains takes as many look-ups as an address has bits, however many networks there are.
func (w networks) contains(a netip.Addr) bool {
	for bits := range a.BitLen() + 1 {
		if p, err := a.Prefix(bits); err == nil && w[p] > 0 {
			return true
		}
	}
	return false
}

// roomForSession says why a session with a target would be one too many; "" when it is not.
// s.mu is held.
func (s *Server) roomForSession(c *conn) string {
	if n := s.places.sessions; n >= s.cfg.MaxConnections {
		return fmt.Sprintf("%d sessions exist, the most allowed", n)
	}
	if n := s.places.of(c.from).sessions; n >= s.cfg.ConnectionsPerAddress {
		return fmt.Sprintf("%d sessions of this address exist, the most allowed", n)
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

// failures counts logins that failed, by origin, within a minute from the first.
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
	e := f.failed[origin(from)]
	return e != nil && e.Value.(*failing).count >= f.most
}

// attempt counts a login that is about to be decided as failed, so that many at a time
// are no way around the limit; false where the address is blocked.
func (f *failures) attempt(from netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	f.expire(now)
	if e := f.failed[origin(from)]; e != nil && e.Value.(*failing).count >= f.most {
		return false
	}
	f.count(from, now)
	return true
}

// succeeded takes back what attempt counted.
func (f *failures) succeeded(from netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.failed[origin(from)]
	if e == nil {
		return
	}
	x := e.Value.(*failing)
	if x.count--; x.count <= 0 {
		delete(f.failed, x.from)
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
	from = origin(from)
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
