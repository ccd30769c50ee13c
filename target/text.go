package target

import (
	"fmt"
	"maps"
	"net"
	"slices"

	"lunshift/iscsi"
)

// textRequest answers SendTargets and the few keys that may change in full feature
// phase (RFC 7143 11.10, 13.3).
func (c *conn) textRequest(h *iscsi.BHS) error {
	head := *h
	var data []byte
	var err error
	c.unlocked(func() { data, err = c.r.Data() })
	if err != nil {
		return err
	}
	if ignore, err := c.inOrder(&head); ignore || err != nil {
		return err
	}
	if head.Flags()&iscsi.FlagContinue != 0 {
		c.reject(&head, iscsi.RejectNotSupported)
		return nil
	}
	switch ttt := head.TTT(); {
	case ttt == iscsi.NoTag: // a new exchange; the rest of an older answer is dropped
		pairs, err := iscsi.ParseText(data)
		if err != nil {
			return fmt.Errorf("protocol error: %w", err)
		}
		c.text, c.textTTT = c.textAnswer(pairs), 0
	case c.textTTT == 0 || ttt != c.textTTT || len(data) > 0:
		c.reject(&head, iscsi.RejectInvalidPDUField)
		return nil
	}
	n := min(len(c.text), int(c.params.PeerMaxRecv), iscsi.MaxFrame)
	r, out := c.w.Frame(n)
	copy(out, c.text)
	c.text = c.text[n:]
	r.SetOpcode(iscsi.OpTextResponse)
	r.SetLUN(head.LUN())
	r.SetITT(head.ITT())
	if len(c.text) > 0 {
		c.textTTT = c.newTTT()
		r.SetFlags(iscsi.FlagContinue)
		r.SetTTT(c.textTTT)
	} else {
		c.textTTT = 0
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
			out = c.sendTargets(out, p.Value)
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

// sendTargets lists targets with the portals that are listened on, no others. A
// portal on all addresses is listed with the address the initiator came to.
func (c *conn) sendTargets(out []byte, which string) []byte {
	s := c.srv
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, iqn := range slices.Sorted(maps.Keys(s.targets)) {
		switch {
		case s.targets[iqn].gone:
			continue
		case which == "All":
			if c.node != nil { // only in a discovery session
				continue
			}
		case which == "":
			if c.node == nil || c.node.iqn != iqn {
				continue
			}
		case which != iqn:
			continue
		}
		out = iscsi.AppendText(out, iscsi.Pair{Key: "TargetName", Value: iqn})
		var listed []string
		for _, l := range s.listeners {
			a := portalAddress(l.Addr(), c.nc.LocalAddr())
			if !slices.Contains(listed, a) {
				listed = append(listed, a)
				out = iscsi.AppendText(out, iscsi.Pair{Key: "TargetAddress", Value: fmt.Sprintf("%s,%d", a, l.group)})
			}
		}
	}
	return out
}

func portalAddress(portal, local net.Addr) string {
	p, ok1 := portal.(*net.TCPAddr)
	l, ok2 := local.(*net.TCPAddr)
	if ok1 && ok2 && p.IP.IsUnspecified() {
		return net.JoinHostPort(l.IP.String(), fmt.Sprint(p.Port))
	}
	return portal.String()
}
