package target

import (
	"sync"
	"sync/atomic"

	"lunshift/iscsi"
)

// taskOrder keeps the task attributes (SAM-5 8.6) in the task set of a logical unit, which
// all I_T nexuses share. SIMPLE commands run in any order, as the control mode page says. An
// ORDERED command begins when all older ones have ended, and no newer one begins before
// it has ended. A HEAD OF QUEUE command begins at once, and no newer one before it has
// ended. Commands that reach no medium (INQUIRY, REPORT LUNS, REQUEST SENSE) are not held
// up.
//
// Where every command is SIMPLE this costs one atomic load for each.
type taskOrder struct {
	last atomic.Pointer[fence] // the newest; nil where there is none
	mu   sync.Mutex            // protects changes of last, and seq
	seq  uint64
}

// fence is an ORDERED or HEAD OF QUEUE command towards those that are newer.
type fence struct {
	seq    uint64                // grows from fence to fence of a unit
	before atomic.Pointer[fence] // an older one that may not have ended
	begin  chan struct{}         // closed when the command may begin
	done   chan struct{}         // closed when it has ended
}

func (f *fence) ended() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// attribute gives the task its place among the commands of its unit. c.mu is held, but not
// all of the time: the tasks of other sessions are looked at.
func (c *conn) attribute(t *task) error {
	a := t.flags & iscsi.FlagAttrMask
	if a > iscsi.AttrHeadQueue { // there is no ACA, and the rest is reserved
		return senseInvalidIU
	}
	if t.u == nil || t.op.noAttention {
		return nil
	}
	t.behind = t.u.order.last.Load()
	if a != iscsi.AttrOrdered && a != iscsi.AttrHeadQueue {
		return nil
	}
	f := &fence{begin: make(chan struct{}), done: make(chan struct{})}
	o := &t.u.order
	o.mu.Lock()
	o.seq++
	f.seq = o.seq
	f.before.Store(o.last.Load())
	o.last.Store(f)
	o.mu.Unlock()
	t.fence, t.behind = f, f.before.Load()
	if a == iscsi.AttrHeadQueue {
		t.behind = nil
		close(f.begin)
		return nil
	}
	u, b := t.u, &barrier{}
	t.running = true // an abort leaves it to this goroutine
	c.unlocked(func() {
		for _, s := range c.srv.sessions(u.IQN) {
			s.mu.Lock()
			for _, other := range s.tasks {
				if other != t && other.u == u && !other.newer(f) {
					other.join(b)
				}
			}
			s.mu.Unlock()
		}
		b.arm(func() { close(f.begin) })
	})
	t.running = false
	return t.Err()
}

// newer tells whether the task came after the command of f, which has not ended.
func (t *task) newer(f *fence) bool {
	if t.fence != nil {
		return t.fence.seq > f.seq
	}
	return t.behind != nil && t.behind.seq >= f.seq
}

// turn waits until the task may begin.
func (t *task) turn() error {
	for f := t.behind; f != nil; f = f.before.Load() {
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
		t.fence.forget()
	}
	return nil
}

// forget lets go of older fences that have ended: a run of them keeps no memory.
func (f *fence) forget() {
	b := f.before.Load()
	for b != nil && b.ended() {
		b = b.before.Load()
	}
	f.before.Store(b)
}

// end lets the newer commands begin.
func (o *taskOrder) end(f *fence) {
	f.forget()
	o.mu.Lock()
	if o.last.Load() == f {
		o.last.Store(f.before.Load())
	}
	o.mu.Unlock()
	close(f.done)
}
