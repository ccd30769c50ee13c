package target

import (
	"encoding/binary"
	"fmt"
	"slices"

	"lunshift/lun"
)

// AccessState is the asymmetric access state of a unit's target ports (SPC-4 5.15.2): how
// well an initiator does to come this way. It is the same at every portal. Changes come by
// themselves (implicit ALUA): an initiator cannot set the state.
type AccessState byte

// The states, as REPORT TARGET PORT GROUPS codes them.
const (
	ActiveOptimized    AccessState = 0x0
	ActiveNonOptimized AccessState = 0x1 // served, and another way is better
	Unavailable        AccessState = 0x3 // nothing that needs the medium is served
)

func (s AccessState) String() string {
	switch s {
	case ActiveOptimized:
		return "active/optimized"
	case ActiveNonOptimized:
		return "active/non-optimized"
	case Unavailable:
		return "unavailable"
	}
	return fmt.Sprintf("state %Xh", byte(s))
}

const (
	// targetPortGroup is the one that all ports of this target are in. Arrays count theirs
	// from 0 or 1, and an initiator that meets a unit here and at an array under one identity
	// takes ports of the same group for one.
	targetPortGroup = 0x4c53
	// foreignPort is added to the relative target port identifiers of a unit that has the
	// identity of another, whose ports are counted from 1 as well.
	foreignPort = 0x8000
)

// port is the relative target port identifier of a portal group: its tag, raised where the
// unit has the identity of another. Every tag of that is below foreignPort (see checkPorts).
func (u *unit) port(group uint16) uint16 {
	if u.inq.Load().identity == nil {
		return group
	}
	return group | foreignPort
}

// checkPorts refuses an identity where portal groups would be one port.
func (s *Server) checkPorts(i *lun.Identity) error {
	if i == nil {
		return nil
	}
	for _, p := range s.cfg.Portals {
		if p.Group >= foreignPort {
			return fmt.Errorf("portal group %d: a unit with the identity of another has portal groups up to %d", p.Group, foreignPort-1)
		}
	}
	return nil
}

// SetAccess makes state that of a logical unit, and tells every I_T nexus of it where that is
// news. It waits for no command.
func (s *Server) SetAccess(iqn string, lun uint64, state AccessState) error {
	s.mu.Lock()
	_, u, err := s.mapped(iqn, lun)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if AccessState(u.state.Swap(uint32(state))) != state {
		u.changed.Store(true)
		u.tellAll(s, attnAccessChanged)
	}
	return nil
}

// SetIdentity gives a logical unit the identity of another, or its own for nil, and tells
// every I_T nexus of it where that is news. It waits for no command.
func (s *Server) SetIdentity(iqn string, lun uint64, i *lun.Identity) error {
	s.mu.Lock()
	_, u, err := s.mapped(iqn, lun)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if i != nil {
		if err := i.Check(); err != nil {
			return fmt.Errorf("%s LUN %d: %w", iqn, lun, err)
		}
	}
	if err := s.checkPorts(i); err != nil {
		return fmt.Errorf("%s LUN %d: %w", iqn, lun, err)
	}
	if u.inq.Load().identity.Equal(i) {
		return nil
	}
	u.inq.Store(newInquiryData(u, i))
	u.tellAll(s, attnInquiryChanged)
	return nil
}

// tellAll establishes a unit attention for every I_T nexus that the unit knows, on its
// sessions or for when it returns.
func (u *unit) tellAll(s *Server, what sense) {
	r := u.reserved
	r.mu.Lock() // so that a session that comes or goes meanwhile meets it, here or there
	defer r.mu.Unlock()
	for _, c := range s.sessions(u.IQN) {
		c.mu.Lock()
		if !c.closing && c.units()[u.LUN] == u {
			c.attend(u.LUN, what)
		}
		c.mu.Unlock()
	}
	for n, waiting := range r.departed {
		r.departed[n] = establish(slices.Clone(waiting), what)
	}
}

// shut is what a command gets that finds the unit retired or removed. NOT READY, BECOMING
// READY has an initiator try again here, unless it is to take another way.
func (u *unit) shut() error {
	if AccessState(u.state.Load()) == Unavailable {
		return senseUnavailable
	}
	return senseBecomingReady
}

// reportPortGroups is REPORT TARGET PORT GROUPS (SPC-4 6.37): one group of all ports that
// lead to the unit.
func reportPortGroups(t *task) error {
	format := t.cdb[1] >> 5
	if format > 1 {
		return badField{at: 1, bit: 7}
	}
	const supported = 1<<0 | 1<<1 | 1<<3 // AO_SUP, AN_SUP, U_SUP
	b := make([]byte, 4)
	if format == 1 { // extended header; a transition takes no time
		b = append(b, 0x10, 0, 0, 0)
	}
	state, altered := AccessState(t.u.state.Load()), byte(0)
	if t.u.changed.Load() {
		altered = 0x02 // STATUS CODE: altered by implicit asymmetric logical unit access behavior
	}
	var preferred byte
	if state == ActiveOptimized {
		preferred = 0x80
	}
	groups := t.u.portGroups(t.c.srv)
	b = append(b, preferred|byte(state), supported, targetPortGroup>>8, targetPortGroup&0xff, 0, altered, 0, byte(len(groups)))
	for _, g := range groups {
		b = binary.BigEndian.AppendUint16(append(b, 0, 0), t.u.port(g))
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return t.reply(b, allocation32(t.cdb[6:]))
}
