package target

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"lunshift/iscsi"
)

// textExchange is a sequence of text requests and responses, of which a session has one at
// a time (RFC 7143 11.10).
type textExchange struct {
	itt uint32
	ttt uint32 // of the request that is due; 0 when none is
	in  []byte // of requests with the C bit
	out []byte // rest of the answer
	// listed: SendTargets was answered. It makes much of little, so it is answered once.
	listed bool
}

// textRequest answers SendTargets and the few keys that may change in full feature
// phase (RFC 7143 11.10, 13.3). What cannot be taken is rejected, and its exchange ends.
func (c *conn) textRequest(h *iscsi.BHS) error {
	head := *h
	reject := func(reason byte) error {
		c.exchange = textExchange{}
		c.reject(&head, reason)
		return nil
	}
	// Of text that is too long no byte is kept: the reader skips it.
	long := len(c.exchange.in)+head.DataLength() > c.srv.cfg.MaxText
	var data []byte
	if !long {
		var err error
		c.unlocked(func() { data, err = c.r.Data() })
		if err != nil {
			return err
		}
	}
	if ignore, err := c.inOrder(&head); ignore || err != nil {
		return err
	}
	more, final := head.Flags()&iscsi.FlagContinue != 0, head.Final()
	x := &c.exchange
	switch ttt := head.TTT(); {
	case more && final:
		return reject(iscsi.RejectProtocol)
	case long:
		return reject(iscsi.RejectOutOfResources)
	case ttt == iscsi.NoTag: // a new exchange; the rest of an older one is dropped
		*x = textExchange{itt: head.ITT()}
	case x.ttt == 0 || ttt != x.ttt || head.ITT() != x.itt || len(x.out) > 0 && (more || len(data) > 0):
		return reject(iscsi.RejectInvalidPDUField)
	}
	x.in = append(x.in, data...)
	if !more && len(x.in) > 0 {
		pairs, err := iscsi.ParseText(x.in)
		if err != nil {
			return fmt.Errorf("protocol error: %w", err)
		}
		x.in, x.out = nil, c.textAnswer(pairs)
	}
	n := min(len(x.out), int(c.params.PeerMaxRecv), iscsi.MaxFrame)
	r, out := c.w.Frame(n)
	copy(out, x.out)
	x.out = x.out[n:]
	r.SetOpcode(iscsi.OpTextResponse)
	r.SetLUN(head.LUN())
	r.SetITT(head.ITT())
	switch {
	case len(x.out) > 0:
		x.ttt = c.newTTT()
		r.SetFlags(iscsi.FlagContinue)
		r.SetTTT(x.ttt)
	case !final: // the initiator has more to say
		x.ttt = c.newTTT()
		r.SetTTT(x.ttt)
	default:
		*x = textExchange{}
		r.SetFlags(iscsi.FlagFinal)
		r.SetTTT(iscsi.NoTag)
	}
	c.status(r)
	c.w.Commit(r, out)
	return nil
}

func (c *conn) textAnswer(pairs []iscsi.Pair) []byte {
	var out []byte
	for _, p := range pairs {
		switch p.Key {
		case "SendTargets":
			if c.exchange.listed {
				out = iscsi.AppendText(out, iscsi.Pair{Key: p.Key, Value: iscsi.RejectValue})
				continue
			}
			c.exchange.listed = true
			c.unlocked(func() { out = c.sendTargets(out, p.Value) })
		case "InitiatorAlias":
		case "MaxRecvDataSegmentLength":
			n := iscsi.NewNegotiation(c.params)
			if _, _, err := n.Respond(p); err != nil {
				out = iscsi.AppendText(out, iscsi.Pair{Key: p.Key, Value: iscsi.RejectValue})
				continue
			}
			c.params.PeerMaxRecv = n.Params.PeerMaxRecv
		default:
			v := iscsi.NotUnderstood
			if _, known, _ := iscsi.NewNegotiation(c.params).Respond(p); known {
				v = iscsi.RejectValue
			}
			out = iscsi.AppendText(out, iscsi.Pair{Key: p.Key, Value: v})
		}
	}
	return out
}

// sendTargets lists the targets that have something for this initiator, each with the
// portals that lead there (RFC 7143 4.3, 13.3, appendix C).
func (c *conn) sendTargets(out []byte, which string) []byte {
	all, listeners := c.srv.offers()
	local := c.nc.LocalAddr()
	for _, o := range all {
		switch {
		case which == "All":
			if c.node != nil { // only in a discovery session
				continue
			}
		case which == "":
			if c.node == nil || c.node.iqn != o.iqn {
				continue
			}
		case fold(which) != o.iqn, c.node != nil && c.node.iqn != o.iqn:
			continue
		}
		portals := o.portalsTo(&c.peer, listeners, local)
		if len(portals) == 0 {
			continue
		}
		out = iscsi.AppendText(out, iscsi.Pair{Key: "TargetName", Value: o.iqn})
		for _, p := range portals {
			out = iscsi.AppendText(out, iscsi.Pair{Key: "TargetAddress", Value: p})
		}
	}
	return out
}

// offer is a target as it was when discovery asked.
type offer struct {
	iqn   string
	node  *node // nil where a redirection alone is left
	moved *Redirection
	gone  bool
}

// offers are all targets and redirections by name, and the portals. Who may know of them is
// found out without a lock: strangers cause that at will.
func (s *Server) offers() ([]offer, []portal) {
	s.mu.Lock()
	all := make([]offer, 0, len(s.targets)+len(s.redirects))
	for iqn, n := range s.targets {
		all = append(all, offer{iqn, n, s.redirects[iqn], n.gone})
	}
	for iqn, r := range s.redirects {
		if s.targets[iqn] == nil {
			all = append(all, offer{iqn: iqn, moved: r})
		}
	}
	listeners := slices.Clone(s.listeners)
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b offer) int { return strings.Compare(a.iqn, b.iqn) })
	return all, listeners
}

// portalsTo are the portals, each with its group, by which an initiator that came to the
// address local gets to the target; none where it may not.
func (o *offer) portalsTo(p *peer, listeners []portal, local net.Addr) (out []string) {
	if r := o.moved; r != nil {
		if !r.over() && r.isFor(o.node, p) {
			out = append(out, fmt.Sprintf("%s,%d", r.Address, r.Group))
		}
		return out
	}
	if o.node == nil || o.gone {
		return nil
	}
	var seen []*unit
	for _, u := range *o.node.units.Load() {
		if rule := u.admits(p); rule != nil && p.satisfies(rule) {
			seen = append(seen, u)
		}
	}
	for _, l := range listeners {
		if !slices.ContainsFunc(seen, func(u *unit) bool { return u.in(l.group) }) {
			continue
		}
		a, ok := portalAddress(l.Addr(), local, p.from)
		if !ok {
			continue
		}
		if v := fmt.Sprintf("%s,%d", a, l.group); !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	return out
}

// sees tells whether the initiator sees a unit of the target.
func (n *node) sees(p *peer) bool {
	for _, u := range *n.units.Load() {
		if u.sees(p) {
			return true
		}
	}
	return false
}

// isFor tells whether a redirection is for the initiator; n is the target, nil for none.
func (r *Redirection) isFor(n *node, p *peer) bool {
	if len(r.Initiators) > 0 || n == nil {
		rule := admitting(r.Initiators, p.initiator, p.from)
		return rule != nil && p.satisfies(rule)
	}
	for _, u := range *n.units.Load() {
		if rule := u.admits(p); rule != nil && p.satisfies(rule) {
			return true
		}
	}
	return false
}

// portalAddress is the address of a portal as an initiator at from, which came to the
// address local, can reach it. A portal on all addresses is the one it came to; to
// another host loopback is none.
func portalAddress(portal, local net.Addr, from netip.Addr) (string, bool) {
	p, ok1 := portal.(*net.TCPAddr)
	l, ok2 := local.(*net.TCPAddr)
	if !ok1 || !ok2 {
		return portal.String(), true
	}
	ip := p.IP
	if ip.IsUnspecified() {
		// Listening on 0.0.0.0 takes IPv4 alone, on [::] IPv6 alone.
		if ip = l.IP; (p.IP.To4() != nil) != (ip.To4() != nil) {
			return "", false
		}
	}
	if ip.IsLoopback() && !from.IsLoopback() {
		return "", false
	}
	return net.JoinHostPort(ip.String(), fmt.Sprint(p.Port)), true
}
