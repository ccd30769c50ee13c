package target

import "slices"

// Unit attention conditions wait in a queue for each I_T nexus and logical unit (SAM-5
// 5.14).

// attend establishes a unit attention condition, once. c.mu is held.
func (c *conn) attend(id uint64, s sense) {
	for _, have := range c.attention[id] {
		if have == s {
			return
		}
	}
	c.attention[id] = append(c.attention[id], s)
}

// lunsChanged establishes REPORTED LUNS DATA HAS CHANGED on every unit of the
// session.
func (c *conn) lunsChanged(added uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range c.units() {
		if id != added {
			c.attend(id, attnLUNsChanged)
		} else {
			c.attend(id, attnPowerOn)
		}
	}
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
