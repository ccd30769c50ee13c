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
		if (n > 0 || t.unsolicited) && !c.admitEarly(t, cost(min(first, t.want))) {
			c.finish(t, errTaskSetFull) // and its data is dropped
			return nil
		}
		c.admit(t, need)
	}
	return c.take(t, h, n, true)
}

// dataOut takes a Data-Out PDU (RFC 7143 11.7).
func (c *conn) dataOut(h *iscsi.BHS) error {
	n := c.r.Left()
	t := c.tasks[h.ITT()]
	if t == nil || t.running || t.aborted {
		// The rest of a transfer whose task has ended.
		return nil
	}
	if t.reading { // its R2T is not even on its way
		return c.malformed(h, "Data-Out that was not asked for")
	}
	offset := int(h.BufferOffset())
	if h.DataSN() != t.outSN {
		return c.lost(t, h)
	}
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

// lost fails a task of whose data a part did not arrive; what still comes of it is
// dropped (RFC 7143 7.9, 11.4.7.2). c.mu is held.
func (c *conn) lost(t *task, h *iscsi.BHS) error {
	if t.claim != nil {
		if !c.bytes.cancel(t.claim) {
			return c.malformed(h, "Data-Out %d of a command was lost", h.DataSN())
		}
		t.claim = nil
		c.claims.Done()
	}
	c.finish(t, senseDataLost)
	return nil
}

// take reads n bytes of data into the task's memory and goes on with the task when
// they are the last of a sequence. c.mu is held.
func (c *conn) take(t *task, h *iscsi.BHS, n int, last bool) error {
	n = min(n, t.want-t.received) // more than the CDB wants is dropped
	var err error
	if n > 0 || c.r.Left() > 0 {
		dst := t.room(n)
		t.reading = true
		c.unlocked(func() {
			// To the end of the segment: only there is its digest.
			if err = c.r.ReadData(dst); err == nil {
				err = c.r.Discard()
			}
		})
		t.reading = false
		t.received += n
	}
	switch damaged := errors.Is(err, iscsi.ErrDigest); {
	case damaged && h.Opcode() != iscsi.OpDataOut:
		// Without the command the numbers that follow have a gap, which nothing fills at
		// error recovery level 0: the session is to recover (RFC 7143 7.8).
		c.reject(h, iscsi.RejectDataDigest)
	case damaged && !c.closing:
		c.reject(h, iscsi.RejectDataDigest)
		err = nil
		if !t.aborted {
			return c.lost(t, h)
		}
	}
	switch {
	case t.aborted:
		if t.claim != nil {
			if !c.bytes.cancel(t.claim) {
				return err // granted is on its way and ends it
			}
			t.claim = nil
			c.claims.Done()
		}
		c.end(t)
	case err != nil:
		if !c.closing {
			t.abort()
		}
	case t.unsolicited || !last:
		t.since = time.Now()
	case !t.admitted:
		t.since = time.Time{}
	default:
		c.proceed(t, c.dispatch)
	}
	if err != nil {
		return fmt.Errorf("data of a command: %w", err)
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

// dataMissing tells whether data-out is due for longer than DataTimeout.
func (c *conn) dataMissing(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.tasks {
		if !t.running && !t.since.IsZero() && now.Sub(t.since) > c.srv.cfg.DataTimeout {
			return true
		}
	}
	return false
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
			t.reading = true // keeps the task while room is made
			c.w.Reserve(0)
			t.reading = false
			if t.aborted {
				c.end(t)
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
