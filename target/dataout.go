package target

import (
	"errors"
	"fmt"
	"time"

	"lunshift/iscsi"
)

// Data-out comes as immediate data with the command, as unsolicited Data-Out PDUs
// up to FirstBurstLength, and as answers to R2Ts (RFC 7143 4.2.5.2). It is read
// straight into the memory that the device writes from, which a task has from
// its first byte on: what is only announced takes none. A task that must wait for memory
// keeps what comes unsolicited in early.

// r2t is an R2T whose data did not all arrive.
type r2t struct {
	ttt uint32
	end int // the buffer offset where it ends
}

// beginDataOut takes the immediate data of a task that wants data-out. c.mu is
// held.
func (c *conn) beginDataOut(t *task, h *iscsi.BHS) error {
	n := c.r.Left()
	first := min(int(c.params.FirstBurstLength), int(t.expected))
	final := h.Final()
	switch {
	case n > 0 && !c.params.ImmediateData:
		return c.malformed(h, "immediate data where none was agreed")
	case n > first:
		return c.malformed(h, "%d bytes of immediate data, at most %d", n, first)
	case !final && c.params.InitialR2T:
		return c.malformed(h, "unsolicited data where none was agreed")
	}
	t.unsolicited = !final
	t.offset = uint32(n)
	if need := t.need(); !c.admitNow(t, need) {
		early := n > 0 || t.unsolicited
		if !c.admit(t, need, !early) && early {
			// It must wait for its memory, and its data does not.
			if !c.admitEarly(t, cost(min(first, t.want))) {
				c.finish(t, errTaskSetFull) // and its data is dropped
				return nil
			}
			c.admit(t, need, true)
		}
	}
	return c.take(t, h, n, true)
}

// dataOut takes a Data-Out PDU (RFC 7143 11.7).
func (c *conn) dataOut(h *iscsi.BHS) error {
	n := c.r.Left()
	t := c.tasks[h.ITT()]
	switch {
	case t == nil || t.running || t.aborted:
		return c.drop(h) // the rest of a transfer whose task has ended
	case t.reading: // its R2T is not even on its way
		return c.malformed(h, "Data-Out that was not asked for")
	case t.lost || h.DataSN() != t.outSN:
		return c.lose(t, h)
	}
	offset := int(h.BufferOffset())
	t.outSN++
	if h.Final() {
		t.outSN = 0 // of the next sequence
	}
	if h.TTT() == iscsi.NoTag {
		switch {
		case !t.unsolicited || offset != int(t.offset):
			return c.malformed(h, "unsolicited Data-Out out of order")
		case offset+n > min(int(c.params.FirstBurstLength), int(t.expected)):
			return c.malformed(h, "unsolicited data beyond FirstBurstLength")
		}
		t.offset += uint32(n)
		t.unsolicited = !h.Final()
		return c.take(t, h, n, h.Final())
	}
	// The R2Ts of a task are answered in their order (RFC 7143 11.8).
	switch {
	case len(t.open) == 0 || h.TTT() != t.open[0].ttt || offset != t.received:
		return c.malformed(h, "Data-Out does not follow its R2T")
	case offset+n > t.open[0].end:
		return c.malformed(h, "Data-Out beyond its R2T")
	case h.Final() != (offset+n == t.open[0].end):
		return c.malformed(h, "Data-Out ends before its R2T does")
	}
	if h.Final() {
		t.open = t.open[:copy(t.open, t.open[1:])]
	}
	return c.take(t, h, n, h.Final())
}

// drop passes over the data of a PDU that nobody wants; where it is damaged as well the
// initiator is told so. c.mu is held.
func (c *conn) drop(h *iscsi.BHS) error {
	if c.r.Left() == 0 {
		return nil
	}
	var err error
	c.unlocked(func() { err = c.r.Discard() })
	if errors.Is(err, iscsi.ErrDigest) {
		c.reject(h, iscsi.RejectDataDigest)
		return nil
	}
	return err
}

// lose fails a task of whose data a part did not arrive, once the initiator has ended all
// the sequences that it was asked for (RFC 7143 7.8, 7.9); what comes of them is dropped.
// c.mu is held.
func (c *conn) lose(t *task, h *iscsi.BHS) error {
	t.lost = true
	var err error
	if !c.kept(t, func() { err = c.drop(h) }) || err != nil {
		return err
	}
	if h.Final() {
		if h.TTT() == iscsi.NoTag {
			t.unsolicited = false
		}
		for k, r := range t.open {
			if r.ttt == h.TTT() {
				t.open = t.open[:copy(t.open, t.open[k+1:])]
				break
			}
		}
	}
	c.giveUp(t)
	return nil
}

// giveUp answers a task whose data was lost, if no more of it is due. c.mu is held.
func (c *conn) giveUp(t *task) {
	if t.unsolicited || len(t.open) > 0 {
		t.since = time.Now()
		return
	}
	if c.withdraw(t) {
		c.finish(t, senseDataLost)
	}
}

// withdraw takes back what the task asked of the server's memory; with false that is on its
// way, and granted ends the task. c.mu is held.
func (c *conn) withdraw(t *task) bool {
	if t.claim != nil {
		if !c.bytes.cancel(t.claim) {
			return false
		}
		t.claim = nil
		c.claims.Done()
	}
	return true
}

// kept calls f, which may give up the lock, while the reader keeps t. With false t was
// aborted meanwhile and is not used any more. c.mu is held.
func (c *conn) kept(t *task, f func()) bool {
	t.reading = true
	f()
	t.reading = false
	if t.aborted && c.withdraw(t) {
		c.end(t)
		return false
	}
	return !t.aborted
}

// take reads n bytes of data into the task's memory and goes on with the task when
// they are the last of a sequence. c.mu is held.
func (c *conn) take(t *task, h *iscsi.BHS, n int, last bool) error {
	n = min(n, t.want-t.received) // more than the CDB wants is dropped
	var err error
	damaged := false
	if n > 0 || c.r.Left() > 0 {
		alive := c.kept(t, func() {
			dst := t.room(n)
			c.unlocked(func() {
				// To the end of the segment: only there is its digest.
				if err = c.r.ReadData(dst); err == nil {
					err = c.r.Discard()
				}
			})
			t.received += n
			if damaged = errors.Is(err, iscsi.ErrDigest); damaged {
				c.reject(h, iscsi.RejectDataDigest)
			}
		})
		if damaged && h.Opcode() == iscsi.OpDataOut {
			damaged, err = alive, nil
		}
		switch {
		case !alive && err == nil:
			return nil
		case err != nil:
			// That of damaged immediate data as well: without the command the numbers that
			// follow have a gap, which nothing fills at error recovery level 0: the session
			// is to recover (RFC 7143 7.8).
			if alive {
				t.abort()
			}
			return fmt.Errorf("data of a command: %w", err)
		case damaged:
			return c.lose(t, h)
		}
	}
	switch {
	case t.unsolicited || !last:
		t.since = time.Now()
	case !t.admitted:
		t.since = time.Time{}
	default:
		c.proceed(t, c.dispatch)
	}
	return nil
}

// room is the memory for the next n bytes of the task's data.
func (t *task) room(n int) []byte {
	switch {
	case n == 0:
		return nil
	case t.early != nil:
		return t.early.b[t.received : t.received+n]
	case t.out == nil && !t.admitted:
		t.early = newBuffer(min(int(t.c.params.FirstBurstLength), t.want))
		return t.early.b[:n]
	case t.out == nil:
		t.outBuf = t.buffer(t.want)
		t.out = t.outBuf.b
	}
	return t.out[t.received : t.received+n]
}

// dataMissing gives an error when data-out is due for longer than DataTimeout.
func (c *conn) dataMissing(now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.tasks {
		if !t.running && !t.since.IsZero() && now.Sub(t.since) > c.srv.cfg.DataTimeout {
			return fmt.Errorf("initiator did not send the data of a command within %v", c.srv.cfg.DataTimeout)
		}
	}
	return nil
}

// proceed asks for the data that is missing, or lets the task run. c.mu is held.
func (c *conn) proceed(t *task, run func(*task)) {
	switch {
	case t.received == t.want:
		if t.early != nil {
			t.out = t.early.b[:t.want]
		}
		t.since = time.Time{}
		run(t)
		return
	case t.early != nil:
		t.outBuf = t.buffer(t.want)
		t.out = t.outBuf.b
		copy(t.out, t.early.b[:t.received])
		t.early.Release()
		t.early = nil
		c.releaseEarly(t)
	}
	t.since = time.Now()
	for begin := true; len(t.open) < int(c.params.MaxOutstandingR2T); begin = false {
		at := t.received
		if n := len(t.open); n > 0 {
			at = t.open[n-1].end
		}
		if at == t.want {
			return
		}
		if begin {
			if !c.kept(t, func() { c.w.Reserve(0) }) {
				return
			}
		} else if !c.w.Room(0) {
			return // the rest is asked for when data of this has come
		}
		c.ask(t, at)
	}
}

// ask queues an R2T for the next burst, at a buffer offset (RFC 7143 11.8). There is
// room for it. c.mu is held.
func (c *conn) ask(t *task, at int) {
	n := min(t.want-at, int(c.params.MaxBurstLength))
	ttt := c.newTTT()
	t.open = append(t.open, r2t{ttt, at + n})
	r, data := c.w.Frame(0)
	r.SetOpcode(iscsi.OpR2T)
	r.SetFlags(iscsi.FlagFinal)
	r.SetLUN(t.lunField)
	r.SetITT(t.itt)
	r.SetTTT(ttt)
	// An R2T carries the next StatSN and does not use it up (RFC 7143 11.8.3).
	r.SetStatSN(c.statSN)
	c.numbers(r)
	r.SetDataSN(t.r2tSN)
	t.r2tSN++
	r.SetBufferOffset(uint32(at))
	r.SetDesiredLength(uint32(n))
	c.w.Commit(r, data)
}
