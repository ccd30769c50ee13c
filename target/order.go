package target

import (
	"slices"

	"lunshift/iscsi"
)

// Task attributes (SAM-5 8.6) hold within a task set, and each I_T nexus has one of its own
// in each logical unit, as the control mode page says (TST 001b, SPC-4 7.5.8): a command
// whose data does not come, or whose answer is not taken, holds up its own initiator alone.
//
// SIMPLE commands run in any order. An ORDERED command begins when the device is done with
// all older ones, a HEAD OF QUEUE command at once; no newer one begins before the device is
// done with it. Commands that reach no medium (INQUIRY, REPORT LUNS, REQUEST SENSE) and those
// about reservations wait for nothing.
//
// Older commands never wait for newer ones, and the bytes that a session's commands wait for
// are given to them in the order of their arrival (share): so no command that an ORDERED one
// waits for, and not itself, waits for bytes of those that wait for it.

// fence is an ORDERED or HEAD OF QUEUE command towards those that are newer.
type fence struct {
	begin chan struct{} // closed when the command may begin
	done  chan struct{} // closed when the device is done with it
}

// attribute gives the task its place among the commands of the session to its unit. c.mu is
// held.
func (c *conn) attribute(t *task) error {
	a := t.flags & iscsi.FlagAttrMask
	if a > iscsi.AttrHeadQueue { // there is no ACA, and the rest is reserved
		return senseInvalidIU
	}
	if t.u == nil || t.op.noAttention {
		return nil
	}
	before := c.fences[t.u]
	if !t.op.unordered {
		t.behind = before
	}
	if a != iscsi.AttrOrdered && a != iscsi.AttrHeadQueue {
		return nil
	}
	f := &fence{begin: make(chan struct{}), done: make(chan struct{})}
	b := &barrier{}
	if a == iscsi.AttrHeadQueue || t.op.unordered {
		t.behind = nil
	} else {
		for _, older := range c.tasks {
			if older != t && older.u == t.u && !older.past {
				b.n++
				older.followers = append(older.followers, b)
			}
		}
	}
	b.arm(func() { close(f.begin) })
	t.fence = f
	if c.fences == nil {
		c.fences = map[*unit][]*fence{}
	}
	c.fences[t.u] = append(slices.Clip(before), f) // others wait for those in before
	return nil
}

// turn waits until the task may begin.
func (t *task) turn() error {
	for _, f := range t.behind {
		select {
		case <-f.done:
		case <-t.Done():
			return t.Err()
		}
	}
	if t.fence != nil {
		select {
		case <-t.fence.begin:
		case <-t.Done():
			return t.Err()
		}
	}
	return nil
}

// pass lets the commands begin that wait for the task: no device works for it, and none
// will. c.mu is held.
func (c *conn) pass(t *task) {
	t.past = true
	for _, b := range t.followers {
		b.step(1, nil)
	}
	clear(t.followers)
	t.followers = t.followers[:0]
	f := t.fence
	if f == nil {
		return
	}
	t.fence = nil
	close(f.done)
	left := slices.DeleteFunc(slices.Clone(c.fences[t.u]), func(o *fence) bool { return o == f })
	if len(left) > 0 {
		c.fences[t.u] = left
	} else {
		delete(c.fences, t.u)
	}
}
