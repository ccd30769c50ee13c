package target

import (
	"encoding/binary"
	"fmt"

	"lunshift/iscsi"
	"lunshift/lun"
)

// command takes a SCSI Command PDU (RFC 7143 11.3). What must not wait here
// goes to a worker.
func (c *conn) command(h *iscsi.BHS) error {
	if h.ITT() == iscsi.NoTag {
		return c.malformed(h, "SCSI Command with the reserved task tag")
	}
	ignore, err := c.inOrder(h)
	if ignore || err != nil {
		return err
	}
	if c.tasks[h.ITT()] != nil {
		c.reject(h, iscsi.RejectTaskInProgress)
		return fmt.Errorf("protocol error: task tag %08Xh is in use", h.ITT())
	}
	if h.Immediate() && c.immediate >= mostImmediate {
		c.reject(h, iscsi.RejectTooManyImmed)
		return nil
	}
	if done := c.readNow(h); done {
		return nil
	}
	t := c.newTask(h)
	err = c.check(t)
	if err == nil {
		err = c.attribute(t)
	}
	if err != nil {
		c.finish(t, err)
		return nil
	}
	if t.flags&iscsi.FlagWrite == 0 || t.want == 0 {
		c.start(t)
		return nil
	}
	return c.beginDataOut(t, h)
}

// newTask enters a task in the session's books. c.mu is held.
func (c *conn) newTask(h *iscsi.BHS) *task {
	t := taskPool.Get().(*task)
	t.c = c
	t.itt = h.ITT()
	t.lunField = h.LUN()
	t.flags = h.Flags()
	t.expected = h.ExpectedLength()
	copy(t.cdb[:], h.CDB())
	t.isImmed = h.Immediate()
	if t.isImmed {
		c.immediate++
	} else {
		c.inFlight++
	}
	c.tasks[t.itt] = t
	if len(c.tasks) > 1 {
		c.lonely = -lonelyAfter
	} else if c.lonely < 0 {
		c.lonely++
	}
	return t
}

// check finds the unit and the operation, and decodes the CDB. What it refuses moves
// no data. c.mu is held.
func (c *conn) check(t *task) error {
	t.op = lookup(t.cdb[:])
	var id uint64
	var known bool
	if id, known = iscsi.DecodeLUN(t.lunField); known {
		t.u = c.units()[id]
	}
	if t.op == nil {
		t.op = &unknownOperation
	}
	if t.u == nil && !t.op.anyLUN {
		return senseNoUnit
	}
	if t.u != nil && !t.op.noAttention {
		if a := c.attention[id]; len(a) > 0 {
			c.clearAttention(id)
			return a[0]
		}
	}
	if t.op == &unknownOperation || !t.op.anyLUN && !t.op.offered(t.u) {
		if len(index[t.cdb[0]]) > 0 && index[t.cdb[0]][0].service >= 0 {
			return badField{at: 1, bit: 4} // the service action is not known (SPC-4 4.3.4.1)
		}
		return senseInvalidOpcode
	}
	if t.flags&iscsi.FlagRead != 0 && t.flags&iscsi.FlagWrite != 0 || c.r.Bidirectional() {
		return senseInvalidIU // no command here moves data both ways
	}
	if t.u != nil && t.u.conflicts(c, t.access()) {
		return lun.ErrConflict
	}
	if n, err := c.r.ExtendedCDB(); err != nil || n != nil {
		return senseInvalidField
	}
	if err := t.op.reserved(t.cdb[:]); err != nil {
		return err
	}
	if at := t.op.control(); t.cdb[at]&0x04 != 0 { // NACA: there is no ACA (SAM-5 5.2)
		return badField{at: at, bit: 2}
	}
	if t.op.decode != nil {
		if err := t.op.decode(t); err != nil {
			return err
		}
	}
	expected := int(t.expected)
	if t.flags&iscsi.FlagWrite == 0 {
		expected = 0
	}
	switch {
	case t.op.exact && t.want != expected:
		return senseInvalidIU
	case t.want <= expected:
	case t.op.partial:
		// The blocks that the initiator sends whole are written; the residual
		// tells it what was not (RFC 7143 11.4.5.1).
		t.whole = t.want
		t.want = expected >> t.u.shift << t.u.shift
	default:
		return senseInvalidIU
	}
	return nil
}

// readNow answers a READ on the spot when its blocks can be had without waiting:
// they go from the device straight into what is sent. c.mu is held.
func (c *conn) readNow(h *iscsi.BHS) bool {
	cdb := h.CDB()
	var lba, blocks uint64
	switch cdb[0] {
	case opRead10:
		lba, blocks = uint64(binary.BigEndian.Uint32(cdb[2:])), uint64(binary.BigEndian.Uint16(cdb[7:]))
		if cdb[1]&^dpo != 0 || cdb[6] != 0 || cdb[9] != 0 {
			return false
		}
	case opRead16:
		lba, blocks = binary.BigEndian.Uint64(cdb[2:]), uint64(binary.BigEndian.Uint32(cdb[10:]))
		if cdb[1]&^dpo != 0 || cdb[14] != 0 || cdb[15] != 0 {
			return false
		}
	default:
		return false
	}
	id, known := iscsi.DecodeLUN(h.LUN())
	u := c.units()[id]
	if !known || u == nil || u.prober == nil || blocks == 0 || blocks > maxTransfer>>u.shift {
		return false
	}
	n := int(blocks << u.shift)
	if h.Flags()&iscsi.FlagRead == 0 || h.ExpectedLength() != uint32(n) || h.AHSLength() > 0 || h.DataLength() > 0 ||
		lba >= u.info.Blocks || blocks > u.info.Blocks-lba ||
		n > int(min(c.params.PeerMaxRecv, c.params.MaxBurstLength)) {
		return false
	}
	// To make room may give up the lock: until the answer the command has its place in
	// the window, or what is sent meanwhile promises the place to another.
	place := uint32(1)
	if h.Immediate() {
		place = 0
	}
	c.inFlight += place
	c.w.Reserve(n)
	c.inFlight -= place
	if len(c.attention[id]) > 0 || u.conflicts(c, accessRead) || len(c.fences[u]) > 0 ||
		h.Flags()&iscsi.FlagAttrMask > iscsi.AttrSimple || !u.gate.enter() {
		return false
	}
	defer u.gate.leave()
	itt := h.ITT()
	if n > iscsi.MaxFrame {
		if !c.bytes.take(cost(n)) {
			return false
		}
		b := newBuffer(n)
		b.from, b.n = &c.bytes, cost(n)
		if ok, err := u.prober.TryReadAt(b.b, lun.LBA(lba)); !ok || err != nil {
			b.Release()
			return false
		}
		var r iscsi.BHS
		c.dataIn(&r, itt, 0, 0, true)
		c.status(&r)
		c.w.Append(&r, nil, b.b, b)
		return true
	}
	r, data := c.w.Frame(n)
	if ok, err := u.prober.TryReadAt(data, lun.LBA(lba)); !ok || err != nil {
		c.w.Cancel(data)
		return false // the worker meets the error again, or waits
	}
	c.dataIn(r, itt, 0, 0, true)
	c.status(r)
	c.w.Commit(r, data)
	return true
}

// dataIn fills the header of a Data-In PDU (RFC 7143 11.7); last carries GOOD.
func (c *conn) dataIn(r *iscsi.BHS, itt, sn, offset uint32, last bool) {
	r.SetOpcode(iscsi.OpDataIn)
	if last {
		r.SetFlags(iscsi.FlagFinal | iscsi.FlagStatus)
	}
	r.SetITT(itt)
	r.SetTTT(iscsi.NoTag)
	r.SetDataSN(sn)
	r.SetBufferOffset(offset)
}

// start sends a task without data-out on its way. c.mu is held.
func (c *conn) start(t *task) {
	if t.op.quick && len(t.behind) == 0 && t.fence == nil {
		t.running = true
		var err error
		c.unlocked(func() { err = t.perform() })
		c.finish(t, err)
		return
	}
	if n := t.need(); n > 0 && !c.admitNow(t, n) && !c.admit(t, n, true) {
		return
	}
	c.dispatch(t)
}

// need is how much of BytesInFlight the task takes.
func (t *task) need() int64 {
	n := int64(t.op.scratch)
	if t.op.bulk && t.alloc > 0 {
		n += cost(t.alloc)
	}
	if t.want > 0 {
		n += cost(t.want)
	}
	return min(n, maxNeed)
}

// admitNow is admit for a task that does not wait; nothing is allocated. c.mu is held.
func (c *conn) admitNow(t *task, n int64) bool {
	if !c.bytes.take(n) {
		return false
	}
	t.credit, t.admitted = n, true
	return true
}

// admitEarly takes n bytes for data of a task that waits for its memory, of which a
// session has half at most. c.mu is held.
func (c *conn) admitEarly(t *task, n int64) bool {
	if c.early+n > c.srv.cfg.BytesInFlight/8 || !c.srv.bytes.takeEarly(n) {
		return false
	}
	c.early += n
	t.earlyCredit = n
	return true
}

func (c *conn) releaseEarly(t *task) {
	if n := t.earlyCredit; n > 0 {
		t.earlyCredit = 0
		c.early -= n
		c.srv.bytes.early.Add(n)
	}
}

// admit takes n bytes of the server's for the task, now or, with false, later if it waits:
// then granted goes on with it. c.mu is held.
func (c *conn) admit(t *task, n int64, wait bool) bool {
	cl := &claim{}
	cl.granted = func() {
		defer c.claims.Done()
		if err := c.guarded(func() error { c.granted(t, n); return nil }); err != nil {
			c.close(err)
		}
	}
	if wait {
		t.claim = cl
		c.claims.Add(1)
	}
	if !c.bytes.acquire(n, cl, wait) {
		return false
	}
	if wait {
		c.claims.Done()
	}
	t.claim, t.credit, t.admitted = nil, n, true
	return true
}

// granted goes on with a task that waited for memory.
func (c *conn) granted(t *task, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t.claim, t.credit, t.admitted = nil, n, true
	switch {
	case t.reading: // whoever keeps it goes on with it
	case t.aborted:
		c.end(t)
	case t.lost:
		c.giveUp(t)
		c.w.Flush()
	case t.want == 0:
		c.enqueue(t)
	case !t.unsolicited:
		c.proceed(t, c.enqueue)
		c.w.Flush()
	}
}

// buffer gives memory for n bytes of data-in or data-out, charged to what the
// task was granted.
func (t *task) buffer(n int) *buffer {
	b := newBuffer(n)
	if t.credit > 0 {
		b.from, b.n, t.credit = &t.c.bytes, t.credit, 0
	}
	return b
}

// answer queues the response of a task: data and status, or status and sense. It stops
// where the task is aborted: nothing of it follows the response of its abort. c.mu is held.
func (c *conn) answer(t *task, err error) {
	status, sn := statusOf(t, err)
	expected := int(t.expected)
	moved := 0 // by the CDB
	if status == iscsi.StatusGood {
		moved = max(t.whole, t.want)
		if t.flags&iscsi.FlagRead == 0 {
			t.in = nil // the initiator takes no data
			if t.flags&iscsi.FlagWrite == 0 || t.whole > 0 && t.want == 0 && !t.op.partial {
				expected = 0
			}
		}
	} else {
		t.in = nil
	}
	var flags byte
	var residual int
	switch {
	case moved > expected:
		flags, residual = iscsi.FlagOverflow, moved-expected
	case moved < expected:
		flags, residual = iscsi.FlagUnderflow, expected-moved
	}
	data := t.in[:min(len(t.in), expected)]
	if len(data) == 0 {
		c.respond(t, status, sn, flags, residual)
		return
	}
	chunk := int(c.params.PeerMaxRecv)
	burst := int(c.params.MaxBurstLength)
	for at := 0; at < len(data); {
		n := min(chunk, len(data)-at, burst-at%burst)
		last := at+n == len(data)
		var r iscsi.BHS
		c.dataIn(&r, t.itt, t.dataSN, uint32(at), last)
		t.dataSN++
		if !c.room(t, n) {
			return
		}
		var owner iscsi.Releaser // of what is queued, whatever becomes of the rest
		if t.inBuf != nil {
			owner = t.inBuf
		}
		if last {
			c.leave(t)
			r.SetFlags(r.Flags() | flags)
			r.SetResidual(uint32(residual))
			c.status(&r)
			t.inBuf = nil
			c.w.Append(&r, nil, data[at:], owner)
			return
		}
		if t.inBuf != nil {
			t.inBuf.hold()
		}
		if (at+n)%burst == 0 {
			r.SetFlags(iscsi.FlagFinal)
		}
		c.numbers(&r)
		c.w.Append(&r, nil, data[at:at+n], owner)
		at += n
	}
}

// room waits until n bytes of the answer of a held task fit; false when it is not to be
// answered any more. c.mu is held.
func (c *conn) room(t *task, n int) bool {
	c.w.Reserve(n)
	return !t.aborted && !c.closing
}

// respond queues a SCSI Response (RFC 7143 11.4). c.mu is held.
func (c *conn) respond(t *task, status byte, sn []byte, flags byte, residual int) {
	n := 0
	if len(sn) > 0 {
		n = 2 + len(sn)
	}
	if !c.room(t, n) {
		return
	}
	c.leave(t)
	r, data := c.w.Frame(n)
	if n > 0 {
		binary.BigEndian.PutUint16(data, uint16(len(sn)))
		copy(data[2:], sn)
	}
	r.SetOpcode(iscsi.OpSCSIResponse)
	r.SetFlags(iscsi.FlagFinal | flags)
	r.SetResponse(iscsi.ResponseCompleted)
	r.SetStatus(status)
	r.SetITT(t.itt)
	r.SetDataSN(t.dataSN + t.r2tSN)
	r.SetResidual(uint32(residual))
	c.status(r)
	c.w.Commit(r, data)
}
