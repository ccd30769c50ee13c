package target

import (
	"fmt"
	"time"

	"lunshift/iscsi"
)

// Data-out comes as immediate data with the command, as unsolicited Data-Out PDUs
// up to FirstBurstLength, and as answers to R2Ts (RFC 7143 4.2.5.2). It is read
// straight into the memory that the device writes from. A task that must wait for
// memory keeps what comes unsolicited in early.

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
	if t.want <= freely || c.admit(t, int64(t.want)) {
		t.admitted = true
		t.outBuf = t.buffer(t.want)
		t.out = t.outBuf.b
	} else if n > 0 || t.unsolicited {
		t.early = newBuffer(min(first, t.want))
	}
	return c.take(t, n)
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
		return c.take(t, n)
	}
	switch {
	case t.ttt == 0 || h.TTT() != t.ttt || offset != t.received:
		return c.malformed(h, "Data-Out does not follow its R2T")
	case offset+n > t.r2tEnd:
		return c.malformed(h, "Data-Out beyond its R2T")
	case h.Final() != (offset+n == t.r2tEnd):
		return c.malformed(h, "Data-Out ends before its R2T does")
	}
	if h.Final() {
		t.ttt = 0
	}
	return c.take(t, n)
}

// lost fails a task of whose data a part did not arrive; what still comes of it is
// dropped (RFC 7143 7.9, 11.4.7.2). c.mu is held.
func (c *conn) lost(t *task, h *iscsi.BHS) error {
	if t.claim != nil {
		if !c.bytes.cancel(t.claim) {
			return c.malformed(h, "Data-Out number %d where %d is next", h.DataSN(), t.outSN)
		}
		t.claim = nil
		c.claims.Done()
	}
	c.finish(t, senseDataLost)
	return nil
}

// take reads n bytes of data into the task's memory and goes on with the task when
// that is the end of a sequence. c.mu is held.
func (c *conn) take(t *task, n int) error {
	dst := t.out
	if dst == nil && t.early != nil {
		dst = t.early.b
	}
	n = min(n, len(dst)-t.received) // more than the CDB wants is dropped
	var err error
	if n > 0 || c.r.Left() > 0 {
		t.reading = true
		c.unlocked(func() {
			// To the end of the segment: only there is its digest.
			if err = c.r.ReadData(dst[t.received : t.received+n]); err == nil {
				err = c.r.Discard()
			}
		})
		t.reading = false
		t.received += n
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
	case t.unsolicited || t.ttt != 0:
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
	t.reading = true // keeps the task while room is made
	c.w.Reserve(0)
	t.reading = false
	if t.aborted {
		c.end(t)
		return
	}
	if t.out == nil {
		t.outBuf = t.buffer(t.want)
		t.out = t.outBuf.b
		if t.early != nil {
			copy(t.out, t.early.b[:t.received])
			t.early.Release()
			t.early = nil
		}
	}
	if t.received == t.want {
		t.since = time.Time{}
		run(t)
		return
	}
	t.since = time.Now()
	n := min(t.want-t.received, int(c.params.MaxBurstLength))
	t.ttt = c.newTTT()
	t.r2tEnd = t.received + n
	r, data := c.w.Frame(0)
	r.SetOpcode(iscsi.OpR2T)
	r.SetFlags(iscsi.FlagFinal)
	r.SetLUN(t.lunField)
	r.SetITT(t.itt)
	r.SetTTT(t.ttt)
	// An R2T carries the next StatSN and does not use it up (RFC 7143 11.8.3).
	r.SetStatSN(c.statSN)
	c.numbers(r)
	r.SetDataSN(t.r2tSN)
	t.r2tSN++
	r.SetBufferOffset(uint32(t.received))
	r.SetDesiredLength(uint32(n))
	c.w.Commit(r, data)
}
