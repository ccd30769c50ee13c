package target

import (
	"net"
	"net/netip"
	"slices"
	"strings"

	"lunshift/iscsi"
)

// Initiator is whom a logical unit admits.
type Initiator struct {
	// Name is an iSCSI name, or the beginning of names when it ends in "*".
	Name string
	// Networks are where it may come from; empty is anywhere.
	Networks []netip.Prefix
	// Authentication is what it must prove; nil for nothing.
	Authentication *Authentication
}

// Authentication is CHAP (RFC 7143 12.1.3) of one initiator.
type Authentication struct {
	// Initiator is what the initiator proves to know.
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
	if len(u.PortalGroups) > 0 && !slices.Contains(u.PortalGroups, group) {
		return nil
	}
	if len(u.Initiators) == 0 {
		if from.IsLoopback() {
			return &loopbackOnly
		}
		return nil
	}
	for i := range u.Initiators {
		if u.Initiators[i].matches(name, from) {
			return &u.Initiators[i]
		}
	}
	return nil
}

var loopbackOnly = Initiator{Name: "*"}

// remote is the IP address of the other end; the zero Addr where there is none.
func remote(nc net.Conn) netip.Addr {
	a, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return a.AddrPort().Addr().Unmap()
}

// units are the logical units that the session sees, by number. c.mu is held, or
// the session has not begun.
func (c *conn) units() map[uint64]*unit {
	all := c.node.units.Load()
	if all != c.mapped {
		c.mapped, c.visible = all, make(map[uint64]*unit, len(*all))
		for id, u := range *all {
			if u.entry(c.initiator, c.from, c.group) != nil {
				c.visible[id] = u
			}
		}
	}
	return c.visible
}
