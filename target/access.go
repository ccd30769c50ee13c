package target

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"lunshift/iscsi"
)

// Initiator is whom a logical unit admits.
type Initiator struct {
	// Name is an iSCSI name, or the beginning of names when it ends in "*". Capitals count
	// as small letters here and in what an initiator sends (RFC 7143 4.2.7.2).
	Name string
	// Networks are where it may come from; empty is anywhere.
	Networks []netip.Prefix
	// Authentication is what it must prove; nil for nothing.
	Authentication *Authentication
}

// Authentication is CHAP (RFC 7143 12.1.3) of one initiator.
type Authentication struct {
	// Initiator is what the initiator proves to know. An empty Name is the
	// initiator's iSCSI name in small letters. Without a Secret nobody can prove it.
	Initiator iscsi.Credentials
	// Target is what the target proves in turn to an initiator that asks for it; its
	// Secret is empty where the target has none.
	Target iscsi.Credentials
}

// matches tells whether a connection of that initiator name and address is meant.
func (i *Initiator) matches(name string, from netip.Addr) bool {
	if prefix, many := strings.CutSuffix(i.Name, "*"); many {
		if !strings.HasPrefix(name, prefix) {
			return false
		}
	} else if name != i.Name {
		return false
	}
	return len(i.Networks) == 0 || slices.ContainsFunc(i.Networks, func(p netip.Prefix) bool { return p.Contains(from) })
}

// entry is the rule by which the unit admits an initiator through a portal group;
// nil where it does not.
func (u *unit) entry(name string, from netip.Addr, group uint16) *Initiator {
	a := u.rules.Load()
	if !a.in(group) {
		return nil
	}
	return admitting(a.initiators, name, from)
}

// rules are who may see a unit, and through which portals. They do not change once made;
// Server.Admit replaces them whole.
type rules struct {
	initiators   []Initiator
	portalGroups []uint16
}

// in tells whether a portal group leads to the unit.
func (a *rules) in(group uint16) bool {
	return len(a.portalGroups) == 0 || slices.Contains(a.portalGroups, group)
}

// in tells whether a portal group leads to the unit.
func (u *unit) in(group uint16) bool { return u.rules.Load().in(group) }

// admits is the rule that an initiator matches, by whatever portal; nil where there is none.
func (u *unit) admits(p *peer) *Initiator {
	return admitting(u.rules.Load().initiators, p.initiator, p.from)
}

// Admit replaces who may see a logical unit and through which portal groups, as Unit has
// them. Sessions for which nothing changes go on and notice nothing; one that begins to see
// the unit, or sees it no more, learns it by a unit attention; one that sees no unit of
// the target any more is dropped. Commands that passed before end by themselves.
func (s *Server) Admit(iqn string, lun uint64, initiators []Initiator, portalGroups []uint16) error {
	if err := checkRules(initiators); err != nil {
		return fmt.Errorf("%s LUN %d: %w", iqn, lun, err)
	}
	if slices.Contains(portalGroups, 0) {
		return fmt.Errorf("%s LUN %d: a portal group is 1 to 65535", iqn, lun)
	}
	fresh := &rules{foldNames(initiators), slices.Clone(portalGroups)}
	s.mu.Lock()
	n, u, err := s.mapped(iqn, lun)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	old := u.rules.Load()
	s.networks.count(fresh.initiators, 1)
	s.networks.count(old.initiators, -1)
	u.rules.Store(fresh)
	// Another map, though equal: sessions look again at what they see.
	units := maps.Clone(*n.units.Load())
	n.units.Store(&units)
	s.mu.Unlock()
	for _, c := range s.sessions(iqn) {
		if c.node != n {
			continue
		}
		before, now := old.admits(&c.peer), u.sees(&c.peer)
		if before && !now {
			c.unitGone(u)
		}
		switch {
		case !n.sees(&c.peer):
			c.close(fmt.Errorf("%s is not admitted to target %s any more", c.initiator, iqn))
		case now && !before:
			c.lunsChanged(u)
		case before && !now:
			c.lunsChanged(nil)
		}
	}
	return nil
}

// admits tells whether a session of the peer saw the unit by this.
func (a *rules) admits(p *peer) bool {
	rule := admitting(a.initiators, p.initiator, p.from)
	return a.in(p.group) && rule != nil && p.satisfies(rule)
}

// behind tells whether one of the portals leads to the unit.
func (u *unit) behind(portals []portal) bool {
	return slices.ContainsFunc(portals, func(p portal) bool { return u.in(p.group) })
}

// admitting is the first rule that an initiator matches; nil where there is none. A name that
// some rule has in full is admitted by such rules alone: else whoever comes in by a "*" could
// take the name of a host that is listed, and with it its place and its reservations.
func admitting(rules []Initiator, name string, from netip.Addr) *Initiator {
	if len(rules) == 0 {
		if from.IsLoopback() {
			return &loopbackOnly
		}
		return nil
	}
	inFull := slices.ContainsFunc(rules, func(r Initiator) bool { return r.Name == name })
	for i := range rules {
		if inFull == (rules[i].Name == name) && rules[i].matches(name, from) {
			return &rules[i]
		}
	}
	return nil
}

// lists tells whether a unit of the target admits the initiator by its name in full.
func (n *node) lists(p *peer) bool {
	for _, u := range *n.units.Load() {
		if rule := u.entry(p.initiator, p.from, p.group); rule != nil && rule.Name == p.initiator && p.satisfies(rule) {
			return true
		}
	}
	return false
}

// loopbackOnly stands for no list; constant.
var loopbackOnly = Initiator{Name: "*"}

// credentials are what an initiator of that iSCSI name must prove.
func (a *Authentication) credentials(name string) iscsi.Credentials {
	c := a.Initiator
	if c.Name == "" {
		c.Name = name
	}
	return c
}

// checkRules holds the rules of a unit against what they can mean.
func checkRules(rules []Initiator) error {
	for _, r := range rules {
		if err := checkName(r.Name); err != nil {
			return fmt.Errorf("initiator %q: %w", r.Name, err)
		}
		if r.Authentication != nil {
			if err := r.Authentication.check(); err != nil {
				return fmt.Errorf("initiator %s: %w", r.Name, err)
			}
		}
	}
	return nil
}

// check refuses what could not be proven, or would prove nothing.
func (a *Authentication) check() error {
	switch {
	case a.Initiator.Secret == "":
		return errors.New("an initiator that must authenticate needs a CHAP secret")
	case a.Initiator.Secret == a.Target.Secret:
		// RFC 7143 9.2.1: else a target could be made to answer for an initiator.
		return errors.New("the CHAP secrets of initiator and target must differ")
	}
	return nil
}

// peer is an initiator as far as access goes: who it says it is, where it came from and
// to, and what it proved. It does not change once the login is over.
type peer struct {
	initiator string // its iSCSI name, folded
	from      netip.Addr
	group     uint16 // of the portal it came to
	// proved is what it showed to know by CHAP; the zero value where it proved nothing.
	proved iscsi.Credentials
	// trusted is set in a discovery session that proved the server's discovery
	// credentials: what units ask for is not asked again just to list them.
	trusted bool
}

// sees tells whether the unit admits the initiator. A session proves one identity:
// units that ask for another stay invisible to it, those that ask for none do not.
func (u *unit) sees(p *peer) bool {
	rule := u.entry(p.initiator, p.from, p.group)
	return rule != nil && p.satisfies(rule)
}

// satisfies tells whether the initiator proved what a rule asks.
func (p *peer) satisfies(rule *Initiator) bool {
	a := rule.Authentication
	return a == nil || p.trusted || p.proved.Secret != "" && p.proved == a.credentials(p.initiator)
}

// terms are what a target asks of an initiator before it lets it in.
type terms struct {
	node  *node
	moved *Redirection // where it is sent once it proved what is asked
	gone  bool         // the target was retired
	// leaving is set while it is not decided where the initiators of the target are to go.
	leaving *Departure
	open    bool // there is something for who proves nothing
	asks    []Authentication
	trust   bool // proving gives a trusted peer
}

// ask notes what a rule asks for.
func (t *terms) ask(rule *Initiator, name string) {
	if rule.Authentication == nil {
		t.open = true
		return
	}
	a := *rule.Authentication
	a.Initiator = a.credentials(name)
	if !slices.Contains(t.asks, a) {
		t.asks = append(t.asks, a)
	}
}

// satisfied tells whether the initiator proved what one of the rules asks for.
func (t *terms) satisfied(p *peer) bool {
	return t.open || p.proved.Secret != "" && slices.ContainsFunc(t.asks, func(a Authentication) bool { return a.Initiator == p.proved })
}

// choose finds what a CHAP_N may prove: units may know one name by several secrets.
func (t *terms) choose(name string) (all []iscsi.CHAPSecrets) {
	for _, a := range t.asks {
		if a.Initiator.Name == name {
			all = append(all, iscsi.CHAPSecrets{Initiator: a.Initiator, Own: a.Target})
		}
	}
	return all
}

// admit gives the terms of a target; ok is false where no rule there admits the
// initiator, which is to learn no more than that it found nothing.
func (s *Server) admit(iqn string, p *peer) (t terms, ok bool) {
	s.mu.Lock()
	n, r := s.targets[fold(iqn)], s.redirects[fold(iqn)]
	var gone bool
	if n != nil {
		gone, t.leaving = n.gone, n.leaving
	}
	s.mu.Unlock() // strangers cause what follows, and others wait for nothing of it
	t.node, t.moved = n, r
	switch {
	case r != nil && (len(r.Initiators) > 0 || n == nil):
		if rule := admitting(r.Initiators, p.initiator, p.from); rule != nil && (len(r.PortalGroups) == 0 || slices.Contains(r.PortalGroups, p.group)) {
			t.ask(rule, p.initiator)
			ok = true
		}
	case n != nil:
		t.gone = gone
		units := *n.units.Load()
		for _, id := range slices.Sorted(maps.Keys(units)) {
			if rule := units[id].entry(p.initiator, p.from, p.group); rule != nil {
				t.ask(rule, p.initiator)
				ok = true
			}
		}
	}
	return t, ok
}

// admitToDiscovery gives the terms of a discovery session. Where the server asks for
// nothing, an initiator may still prove what units ask for, and then sees these as well.
func (s *Server) admitToDiscovery(p *peer) (t terms) {
	if d := s.cfg.Discovery; d != nil {
		t.ask(&Initiator{Authentication: d}, p.initiator)
		t.trust = true
		return t
	}
	t.open = true
	all, listeners := s.offers()
	for _, o := range all {
		if o.node == nil {
			continue
		}
		units := *o.node.units.Load()
		for _, id := range slices.Sorted(maps.Keys(units)) {
			if rule := units[id].admits(p); rule != nil && units[id].behind(listeners) {
				t.ask(rule, p.initiator)
			}
		}
	}
	return t
}

// remote is the IP address of the other end; the zero Addr where there is none.
func remote(nc net.Conn) netip.Addr {
	a, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	// A zone is this host's own affair, and no prefix contains an address with one.
	return a.AddrPort().Addr().Unmap().WithZone("")
}

// units are the logical units that the session sees, by number. c.mu is held, or
// the session has not begun.
func (c *conn) units() map[uint64]*unit {
	all := c.node.units.Load()
	if all != c.mapped {
		c.mapped, c.visible = all, make(map[uint64]*unit, len(*all))
		for id, u := range *all {
			if u.sees(&c.peer) {
				c.visible[id] = u
			}
		}
	}
	return c.visible
}
