package target

import (
	"maps"
	"slices"

	"lunshift/iscsi"
)

// Unit attention conditions wait in a queue for each I_T nexus and logical unit (SAM-5
// 5.14). A queue holds each condition once, and the target has few of them: that is its
// bound. Conditions of an I_T nexus without a session wait in reservations.departed.

var (
	attnNexusLoss              = sense{keyUnitAttention, 0x29, 0x07}
	attnReservationsPreempted  = sense{keyUnitAttention, 0x2a, 0x03}
	attnReservationsReleased   = sense{keyUnitAttention, 0x2a, 0x04}
	attnRegistrationsPreempted = sense{keyUnitAttention, 0x2a, 0x05}
	attnAccessChanged          = sense{keyUnitAttention, 0x2a, 0x06}
	attnInquiryChanged         = sense{keyUnitAttention, 0x3f, 0x03}
)

// precedence orders the conditions of ASC 29h: power on tells more than a reset, a reset
// more than the loss of the I_T nexus (SAM-5 5.14.1). 0 for any other condition.
func precedence(s sense) int {
	switch s {
	case attnPowerOn:
		return 4
	case attnTargetReset:
		return 3
	case attnLUNReset:
		return 2
	case attnNexusLoss:
		return 1
	}
	return 0
}

// establish adds a condition to a queue. One of ASC 29h goes first and takes the place of
// those that it says more than; a power on or reset also that of conditions that an
// initiator looks for after it anyway. What concerns registrations stays: no reset
// changes these.
func establish(list []sense, s sense) []sense {
	if slices.Contains(list, s) {
		return list
	}
	rank := precedence(s)
	if rank == 0 {
		return append(list, s)
	}
	if len(list) > 0 && precedence(list[0]) > rank {
		return list
	}
	list = slices.DeleteFunc(list, func(o sense) bool {
		return precedence(o) > 0 || o == attnCleared || rank > 1 && o == attnLUNsChanged
	})
	return slices.Insert(list, 0, s)
}

// attend establishes a unit attention condition, once. c.mu is held.
func (c *conn) attend(id uint64, s sense) {
	c.attention[id] = establish(c.attention[id], s)
}

// arrive establishes what awaits the I_T nexus on each unit. The session is among those
// of the server already: what happens from now on is told to it.
func (c *conn) arrive() {
	c.mu.Lock()
	units := c.units()
	c.arrived = true
	c.mu.Unlock()
	for id, u := range units {
		waiting := u.reserved.arrive(u.nexus(c))
		c.mu.Lock()
		for _, s := range waiting {
			c.attend(id, s)
		}
		c.mu.Unlock()
	}
}

// depart is the loss of the I_T nexus: RESERVE is undone, and what the initiator was not
// told waits for its return. No task of the session is left.
func (c *conn) depart() {
	if !c.arrived {
		return
	}
	c.mu.Lock()
	units, unsaid := c.units(), c.attention
	c.attention = map[uint64][]sense{}
	c.mu.Unlock()
	for id, u := range units {
		u.reserved.release(c)
		u.reserved.depart(u.nexus(c), unsaid[id])
	}
}

// unitGone is the loss of the I_T nexus with a unit that the session does not see any more.
func (c *conn) unitGone(u *unit) {
	c.mu.Lock()
	arrived, unsaid := c.arrived, c.attention[u.LUN]
	delete(c.attention, u.LUN)
	c.mu.Unlock()
	u.reserved.release(c)
	if arrived {
		u.reserved.depart(u.nexus(c), unsaid)
	}
}

// lunsChanged establishes REPORTED LUNS DATA HAS CHANGED on every unit of the session,
// and says so at once; on a unit that it sees from now on, what awaits it there. added may be nil.
func (c *conn) lunsChanged(added *unit) {
	var waiting []sense
	c.mu.Lock()
	arrived := c.arrived // else arrive takes that
	c.mu.Unlock()
	if added != nil && arrived {
		waiting = establish(added.reserved.arrive(added.nexus(c)), attnPowerOn)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var some uint64
	changed := false
	units := c.units()
	maps.DeleteFunc(c.attention, func(id uint64, _ []sense) bool { return units[id] == nil })
	for id, u := range units {
		if u != added {
			c.attend(id, attnLUNsChanged)
			some, changed = id, true
		}
	}
	for _, s := range waiting {
		c.attend(added.LUN, s)
	}
	if changed {
		c.announce(some, attnLUNsChanged)
	}
}

// announce sends the Asynchronous Message that carries a SCSI event (RFC 7143 11.9.1,
// event 0). It does not wait for an initiator that takes nothing: while one such message
// waits, a further one is left out, as the unit attention tells all the same. c.mu is
// held.
func (c *conn) announce(id uint64, s sense) {
	if c.closing || !c.full || c.told {
		return
	}
	c.told = true
	c.claims.Go(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.w.Reserve(0)
		c.told = false
		if c.closing {
			return
		}
		data := s.fixed()
		r, out := c.w.Frame(2 + len(data))
		out[0], out[1] = 0, byte(len(data))
		copy(out[2:], data)
		r.SetOpcode(iscsi.OpAsync)
		r.SetFlags(iscsi.FlagFinal)
		field, _ := iscsi.EncodeLUN(id)
		r.SetLUN(field)
		r.SetITT(iscsi.NoTag)
		c.status(r)
		r.SetAsync(iscsi.AsyncSCSI, 0, 0, 0, 0)
		c.w.Commit(r, out)
		c.w.Flush()
	})
}

// clearAttention takes the first unit attention off. c.mu is held.
func (c *conn) clearAttention(id uint64) {
	if a := c.attention[id]; len(a) > 1 {
		c.attention[id] = a[1:]
	} else {
		delete(c.attention, id)
	}
}

// inventoryKnown takes REPORTED LUNS DATA HAS CHANGED off every unit: the initiator has
// the inventory now (SPC-4 6.33).
func (c *conn) inventoryKnown() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, list := range c.attention {
		list = slices.DeleteFunc(slices.Clone(list), func(s sense) bool { return s == attnLUNsChanged })
		if len(list) == 0 {
			delete(c.attention, id)
		} else {
			c.attention[id] = list
		}
	}
}
