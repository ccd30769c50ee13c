// Package target is an iSCSI target: it accepts initiators on its portals and
// hands each CDB to a logical unit.
//
// A command is answered GOOD only after the logical unit did what its CDB says; a
// command that the target does not know is refused, an aborted one is not
// answered. Sessions have one connection and error recovery level 0 (RFC 7143
// 7.1.5). The types: a Server listens and holds the targets; a Unit is one logical
// unit with its place; a conn is one session; a task is one command.
//
// The SCSI core is gotgt's (command, logical unit and op types); which ops are
// gotgt's own and which replace them is in the table of ops.go.
package target

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sirupsen/logrus"

	"lunshift/iscsi"
)

// SessionInfo is one session as people see it.
type SessionInfo struct {
	Initiator string    `json:"initiator"`
	Address   string    `json:"address"`
	Since     time.Time `json:"since"`
	// PortalGroup is the group of the portal it came to.
	PortalGroup uint16 `json:"portal_group"`
	// CHAPUser is the CHAP name it proved; empty where it proved nothing.
	CHAPUser string `json:"chap_user,omitempty"`
}

// Errors of a Server.
var (
	// ErrClosed: the server was shut down or closed.
	ErrClosed = errors.New("target: server closed")
	// ErrNoUnit: there is no such logical unit.
	ErrNoUnit = errors.New("no such logical unit")
	// ErrExists: the place is taken.
	ErrExists = errors.New("logical unit exists")
)

// Server accepts initiators. All methods may be called concurrently.
//
// Lock order: conn.mu, of one connection at a time; then Server.mu or admission.mu.
type Server struct {
	cfg   Config
	log   logrus.FieldLogger
	bytes *admission
	// What follows has locks of its own, which are the last to be taken.
	failures   *failures
	challenges *challenges
	notices    *notices
	refusals   chan struct{} // one for each connection that is being refused

	ending  chan struct{} // closed when Shutdown or Close begins
	ended   sync.Once
	pending sync.WaitGroup // every goroutine of the server

	mu        sync.Mutex // protects what follows
	listeners []portal
	targets   map[string]*node
	redirects map[string]*Redirection
	conns     map[*conn]struct{}
	places    places
	networks  networks
	closed    bool
	serving   bool
	watcher   *watcher // constant once serving; nil before
}

// node is one target: a name and its logical units.
type node struct {
	iqn   string
	units atomic.Pointer[map[uint64]*unit] // by unit number; replaced whole
	// gone is set when the last unit was retired, leaving while its initiators are asked to
	// leave (both under Server.mu).
	gone    bool
	leaving *Departure
	alias   string
}

// watch pings silent sessions and drops those that do not answer.
func (s *Server) watch() {
	if s.cfg.NopInterval < 0 {
		return
	}
	tick := time.NewTicker(max(s.cfg.NopInterval/2, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-s.ending:
			return
		case <-tick.C:
			for _, c := range s.sessions("") {
				if err := c.guarded(c.keepAlive); err != nil {
					c.close(err)
				}
			}
		}
	}
}

// watchData drops sessions that do not send the data that they announced.
func (s *Server) watchData() {
	tick := time.NewTicker(max(s.cfg.DataTimeout/2, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-s.ending:
			return
		case now := <-tick.C:
			for _, c := range s.sessions("") {
				if err := c.guarded(func() error { return c.dataMissing(now) }); err != nil {
					c.close(err)
				}
			}
		}
	}
}

// Shutdown stops accepting, lets the commands that are running finish and be
// answered, and closes every session. When ctx ends first it closes what is left
// and gives ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stopListening()
	for _, c := range s.all() {
		c.drain()
	}
	done := make(chan struct{})
	go func() { s.finish(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		s.drop()
		<-done
		return ctx.Err()
	}
}

// Close stops accepting and drops every session; commands in flight are
// cancelled. It returns when they have ended.
func (s *Server) Close() error {
	s.stopListening()
	s.drop()
	s.finish()
	return nil
}

// finish returns when nothing of the server runs any more.
func (s *Server) finish() {
	s.pending.Wait()
	s.mu.Lock()
	w := s.watcher
	s.watcher = nil
	s.mu.Unlock()
	if w != nil {
		w.close()
	}
}

func (s *Server) stopListening() {
	s.mu.Lock()
	s.closed = true
	ls := s.listeners
	s.mu.Unlock()
	s.ended.Do(func() {
		close(s.ending)
		for _, l := range ls {
			l.Close()
		}
	})
}

func (s *Server) drop() {
	for _, c := range s.all() {
		c.close(ErrClosed)
	}
}

func (s *Server) all() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.conns))
}

// sessions are the connections in full feature phase, of one target or of all.
func (s *Server) sessions(iqn string) []*conn {
	iqn = fold(iqn)
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*conn
	for c := range s.conns {
		if c.loggedIn && (iqn == "" || c.node != nil && c.node.iqn == iqn) {
			out = append(out, c)
		}
	}
	return out
}

// AddUnit puts a logical unit on a target, which begins to exist with its first.
// Sessions of the target learn of it by a unit attention.
func (s *Server) AddUnit(u Unit) error {
	if err := checkUnit(u); err != nil {
		return err
	}
	u.IQN, u.Initiators = fold(u.IQN), foldNames(u.Initiators)
	made, err := newUnit(u)
	if err != nil {
		return err
	}
	if err := s.checkPorts(u.Identity); err != nil {
		return fmt.Errorf("%s LUN %d: %w", u.IQN, u.LUN, err)
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	n := s.targets[u.IQN]
	if n == nil || n.gone {
		n = &node{iqn: u.IQN, alias: u.Alias}
		n.units.Store(&map[uint64]*unit{})
		s.targets[u.IQN] = n
	}
	old := *n.units.Load()
	if o := old[u.LUN]; o != nil && !o.gate.closed() {
		s.mu.Unlock()
		return fmt.Errorf("%s LUN %d: %w", u.IQN, u.LUN, ErrExists)
	}
	made.node = n
	if o := old[u.LUN]; o != nil {
		s.networks.count(o.rules.Load().initiators, -1)
	}
	s.networks.count(u.Initiators, 1)
	units := maps.Clone(old)
	units[u.LUN] = made
	n.units.Store(&units)
	s.mu.Unlock()
	for _, c := range s.sessions(u.IQN) {
		if made.sees(&c.peer) { // to others nothing changed
			c.lunsChanged(made)
		}
	}
	return nil
}

func checkUnit(u Unit) error {
	where := fmt.Sprintf("%s LUN %d", u.IQN, u.LUN)
	if err := checkName(u.IQN); err != nil {
		return fmt.Errorf("target name %q: %w", u.IQN, err)
	}
	if _, ok := iscsi.EncodeLUN(u.LUN); !ok {
		return fmt.Errorf("%s: a LUN is 0 to 16383", where)
	}
	for _, f := range []struct {
		name, value string
		most        int
	}{{"vendor", u.Vendor, 8}, {"product", u.Product, 16}, {"revision", u.Revision, 4}, {"serial", u.Serial, 64}} {
		if len(f.value) > f.most {
			return fmt.Errorf("%s: %s %q is longer than %d characters", where, f.name, f.value, f.most)
		}
		if strings.ContainsFunc(f.value, func(r rune) bool { return r < ' ' || r > '~' }) {
			return fmt.Errorf("%s: %s %q is not plain ASCII", where, f.name, f.value)
		}
	}
	if u.Identity != nil {
		if err := u.Identity.Check(); err != nil {
			return fmt.Errorf("%s: identity: %w", where, err)
		}
	}
	if u.Device == nil {
		return fmt.Errorf("%s: no device", where)
	}
	if err := checkRules(u.Initiators); err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	if slices.Contains(u.PortalGroups, 0) {
		return fmt.Errorf("%s: a portal group is 1 to 65535", where)
	}
	return nil
}

// checkName holds a name against RFC 7143 4.2.7. Names come into logs and onto screens: marks
// that turn or hide text are refused with the control characters.
func checkName(name string) error {
	if len(name) == 0 || len(name) > longestName {
		return fmt.Errorf("an iSCSI name has 1 to 223 bytes")
	}
	if !utf8.ValidString(name) {
		return fmt.Errorf("an iSCSI name is UTF-8")
	}
	if strings.ContainsFunc(name, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.Is(unicode.C, r) || r == '=' || r == ','
	}) {
		return fmt.Errorf("an iSCSI name has no spaces, control or format characters, = or comma")
	}
	return nil
}

// fold is the form in which names are compared (RFC 7143 4.2.7.2).
func fold(name string) string { return strings.ToLower(name) }

// foldNames gives the rules with names to compare.
func foldNames(rules []Initiator) []Initiator {
	rules = slices.Clone(rules)
	for i := range rules {
		rules[i].Name = fold(rules[i].Name)
	}
	return rules
}

// mapped gives a logical unit and its target; s.mu is held.
func (s *Server) mapped(iqn string, lun uint64) (*node, *unit, error) {
	if n := s.targets[fold(iqn)]; n != nil {
		if u := (*n.units.Load())[lun]; u != nil {
			return n, u, nil
		}
	}
	return nil, nil, fmt.Errorf("%s LUN %d: %w", iqn, lun, ErrNoUnit)
}

// RemoveUnit takes a logical unit off: no new command reaches its device, and it
// returns when those in flight have ended. The target goes with its last unit, and
// its sessions are dropped then.
func (s *Server) RemoveUnit(iqn string, lun uint64) error {
	s.mu.Lock()
	n, u, err := s.mapped(iqn, lun)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	units := maps.Clone(*n.units.Load())
	delete(units, lun)
	s.networks.count(u.rules.Load().initiators, -1)
	n.units.Store(&units)
	last := len(units) == 0
	if last {
		delete(s.targets, n.iqn)
	}
	s.mu.Unlock()
	u.gate.close()
	<-u.gate.drained
	for _, c := range s.sessions(iqn) {
		if last && c.node == n {
			c.close(fmt.Errorf("target %s removed", iqn))
		} else if u.sees(&c.peer) {
			c.lunsChanged(nil)
		}
	}
	return nil
}

// Retire ends a logical unit for good, for a cutover: from its call on no new
// command reaches the device, and commands in flight finish first. Commands
// that still come get NOT READY, LOGICAL UNIT IS IN PROCESS OF BECOMING READY
// (04h/01h), which initiators retry, on another path if they have one, rather than
// report as lost; or NOT READY, TARGET PORT IN UNAVAILABLE STATE (04h/0Ch) where SetAccess
// said so, which has them take another path at once. When the last unit of a target is
// retired its sessions are asked to log out, logins to it end with status 0204h (target
// removed), and SendTargets lists it no more. Retire returns when these sessions are gone;
// when ctx ends first it drops them and gives ctx's error. Retiring twice is no error.
func (s *Server) Retire(ctx context.Context, iqn string, lun uint64) error {
	s.mu.Lock()
	n, u, err := s.mapped(iqn, lun)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	u.gate.close()
	live := false
	for _, o := range *n.units.Load() {
		live = live || !o.gate.closed()
	}
	n.gone = !live
	s.mu.Unlock()

	select {
	case <-u.gate.drained:
	case <-ctx.Done():
		if !live {
			s.dropTarget(n)
		}
		return ctx.Err()
	}
	if live {
		return nil
	}
	left := s.sessions(iqn)
	seconds := uint16(3)
	if d, ok := ctx.Deadline(); ok {
		seconds = uint16(min(max(time.Until(d).Seconds(), 1), 60))
	}
	for _, c := range left {
		c.askLogout(seconds)
	}
	for _, c := range left {
		select {
		case <-c.done:
		case <-ctx.Done():
			s.dropTarget(n)
			return ctx.Err()
		}
	}
	return nil
}

// dropTarget ends the sessions of a target and waits until they are gone.
func (s *Server) dropTarget(n *node) {
	left := s.sessions(n.iqn)
	left = slices.DeleteFunc(left, func(c *conn) bool { return c.node != n })
	for _, c := range left {
		c.close(fmt.Errorf("target %s removed", n.iqn))
	}
	for _, c := range left {
		<-c.done
	}
}

// Sessions lists the sessions of a target, oldest first.
func (s *Server) Sessions(iqn string) []SessionInfo {
	return infos(s.sessions(iqn))
}

// infos are the sessions as people see them, oldest first.
func infos(all []*conn) []SessionInfo {
	out := []SessionInfo{}
	for _, c := range all {
		out = append(out, SessionInfo{Initiator: c.initiator, Address: c.nc.RemoteAddr().String(), Since: c.since,
			PortalGroup: c.group, CHAPUser: c.proved.Name})
	}
	slices.SortFunc(out, func(a, b SessionInfo) int { return a.Since.Compare(b.Since) })
	return out
}
