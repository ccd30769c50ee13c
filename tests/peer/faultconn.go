package peer

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"lunshift/iscsi"
)

// faultyConn is one connection.
type faultyConn struct {
	p         *FaultyPortal
	from, to  net.Conn
	queue     chan delivery // to the initiator, in order
	attention bool          // CAPACITY DATA HAS CHANGED is to be told; p.mu protects it

	once sync.Once
	gone chan struct{}

	mu    sync.Mutex // protects tasks
	tasks map[uint32]*faultyTask
}

// delivery is a PDU on its way to the initiator.
type delivery struct {
	pdu  []byte
	due  time.Time
	half bool // half of it comes, then a reset
}

// faultyTask is a command under way.
type faultyTask struct {
	fault    Fault
	lba      uint64 // of a BadBlock
	op       byte
	withheld bool   // the target does not see it
	answer   *reply // what takes the place of the target's answer; nil is nothing
	expected int
	received int // Data-In bytes from the target
	cut      int // of it was kept back
}

// reply is the end of a command.
type reply struct {
	status, key, asc, ascq byte
	info                   uint64 // LBA; noInfo is none
	residual               int    // underflow
}

const noInfo = 1 << 32

func (c *faultyConn) close() {
	c.once.Do(func() {
		close(c.gone)
		c.from.Close()
		c.to.Close()
	})
}

// reset closes the connection as a crash of either end does.
func (c *faultyConn) reset() {
	c.from.(*net.TCPConn).SetLinger(0)
	c.to.(*net.TCPConn).SetLinger(0)
	c.close()
}

// heard waits while the portal is silent, and tells whether it was; not ok says that the
// connection is gone.
func (c *faultyConn) heard() (held, ok bool) {
	for ; ; held = true {
		f, _, over := c.p.now()
		if f != Silent && f != Gone {
			return held, true
		}
		if !held {
			c.p.hits.Add(1)
		}
		select {
		case <-over:
		case <-c.gone:
			return held, false
		}
		if f == Gone {
			c.reset()
			return held, false
		}
	}
}

// requests passes on what the initiator sends.
func (c *faultyConn) requests() {
	r := iscsi.NewReader(c.from, 64<<10)
	r.MaxData = 16 << 20
	for {
		h, data, err := next(r)
		if err != nil {
			return
		}
		held, ok := c.heard()
		if !ok {
			return
		}
		if held && h.Opcode() != iscsi.OpLoginRequest {
			time.Sleep(lateness)
		}
		switch h.Opcode() {
		case iscsi.OpSCSICommand:
			if t := c.begin(h, data); t.withheld {
				// The target gets a TEST UNIT READY instead, so that the numbers go on.
				h.SetFlags(iscsi.FlagFinal | h.Flags()&iscsi.FlagAttrMask)
				h.SetExpectedLength(0)
				clear(h.CDB())
				data = nil
			}
		case iscsi.OpDataOut:
			if t := c.task(h.ITT()); t != nil && t.withheld {
				continue
			}
		}
		pdu := frame(h, r.AHS(), data)
		if f, _, _ := c.p.now(); f == Cutting && len(data) >= 512 && c.p.hits.Add(1)%4 == 0 {
			c.to.Write(pdu[:len(pdu)-len(data)/2])
			c.reset()
			return
		}
		if _, err := c.to.Write(pdu); err != nil {
			return
		}
	}
}

func next(r *iscsi.Reader) (*iscsi.BHS, []byte, error) {
	p, err := r.Next()
	if err != nil {
		return nil, nil, err
	}
	h := *p
	data, err := r.Data()
	return &h, append([]byte(nil), data...), err
}

// frame is a PDU as bytes.
func frame(h *iscsi.BHS, ahs, data []byte) []byte {
	h.SetDataLength(len(data))
	h.SetAHSLength(len(ahs))
	b := append(append(append([]byte(nil), h[:]...), ahs...), data...)
	return append(b, make([]byte, -len(data)&3)...)
}

func (c *faultyConn) task(itt uint32) *faultyTask {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tasks[itt]
}

// begin notes a command and what is to become of it.
func (c *faultyConn) begin(h *iscsi.BHS, data []byte) *faultyTask {
	f, lba, _ := c.p.now()
	cdb := h.CDB()
	t := &faultyTask{fault: f, lba: lba, op: cdb[0], expected: int(h.ExpectedLength())}
	c.mu.Lock()
	c.tasks[h.ITT()] = t
	c.mu.Unlock()
	start, blocks, kind := decode(cdb, data)
	if kind == noMedium {
		return t
	}
	hit := func(withheld bool, a *reply) *faultyTask {
		c.p.hits.Add(1)
		t.withheld, t.answer = withheld, a
		return t
	}
	switch {
	case f == Busy:
		return hit(true, &reply{status: iscsi.StatusBusy})
	case f == TaskSetFull:
		return hit(true, &reply{status: iscsi.StatusTaskSetFull})
	case f == BadBlock && start <= lba && lba < start+blocks:
		if kind == reading {
			return hit(false, &reply{status: iscsi.StatusCheckCondition, key: 0x3, asc: 0x11, info: lba})
		}
		return hit(c.p.hits.Load()%2 == 0, &reply{status: iscsi.StatusCheckCondition, key: 0x3, asc: 0x0c, info: lba})
	case f == ShortOut && kind == writing:
		return hit(c.p.hits.Load()%2 == 0, &reply{residual: t.expected})
	case f == ShortOutUntold && kind == writing && h.Final() && len(data) < t.expected:
		return hit(true, &reply{})
	case f == Smaller:
		c.p.mu.Lock()
		told, half := !c.attention, c.p.blocks/2
		c.attention = false
		c.p.mu.Unlock()
		if !told {
			return hit(true, &reply{status: iscsi.StatusCheckCondition, key: senseAttention, asc: 0x2a, ascq: 0x09, info: noInfo})
		}
		if start+blocks > half {
			return hit(true, &reply{status: iscsi.StatusCheckCondition, key: 0x5, asc: 0x21, info: noInfo})
		}
	}
	return t
}

// Kinds of commands.
const (
	noMedium = iota
	reading
	writing
	zeroing // without data for each block
	flushing
)

// decode tells which blocks a command is about.
func decode(cdb, data []byte) (start, blocks uint64, kind int) {
	switch op := cdb[0]; op {
	case 0x28, 0x2a: // READ (10), WRITE (10)
		start, blocks, kind = uint64(binary.BigEndian.Uint32(cdb[2:])), uint64(binary.BigEndian.Uint16(cdb[7:])), reading
		if op == 0x2a {
			kind = writing
		}
	case OpRead16, OpWrite16, opWriteSame16:
		start, blocks = binary.BigEndian.Uint64(cdb[2:]), uint64(binary.BigEndian.Uint32(cdb[10:]))
		kind = map[byte]int{OpRead16: reading, OpWrite16: writing, opWriteSame16: zeroing}[op]
	case 0x9e: // GET LBA STATUS
		if cdb[1]&0x1f == 0x12 {
			return binary.BigEndian.Uint64(cdb[2:]), 1, flushing
		}
	case opUnmap:
		kind = zeroing
		if len(data) >= 24 {
			start, blocks = binary.BigEndian.Uint64(data[8:]), uint64(binary.BigEndian.Uint32(data[16:]))
		}
	case 0x35, opSyncCache16:
		kind = flushing
	}
	return start, blocks, kind
}

// answers passes on what the target sends.
func (c *faultyConn) answers() {
	defer close(c.queue)
	r := iscsi.NewReader(c.to, 64<<10)
	r.MaxData = 16 << 20
	for {
		h, data, err := next(r)
		if err != nil {
			if errors.Is(err, io.EOF) { // what is under way still comes
				c.queue <- delivery{}
			} else {
				c.close()
			}
			return
		}
		d := delivery{due: time.Now()}
		ends := h.Opcode() == iscsi.OpSCSIResponse || h.Opcode() == iscsi.OpDataIn && h.Flags()&iscsi.FlagStatus != 0
		if t := c.task(h.ITT()); t != nil && (ends || h.Opcode() == iscsi.OpDataIn) {
			data, d.half = c.spoil(t, h, data, ends)
			if t.fault == Misplaced && t.answer == nil {
				data = c.misplace(t, h, data, &d)
			}
			if t.answer != nil {
				if !ends {
					continue
				}
				h, data = t.answer.pdu(h)
			}
			if ends {
				c.mu.Lock()
				delete(c.tasks, h.ITT())
				c.mu.Unlock()
				if f, _, _ := c.p.now(); f == Slow {
					c.p.hits.Add(1)
					d.due = d.due.Add(slowness)
				}
			}
		}
		d.pdu = append(d.pdu, frame(h, r.AHS(), data)...)
		select {
		case c.queue <- d:
		case <-c.gone:
			return
		}
	}
}

// spoil changes a PDU of a command's answer as its fault wants.
func (c *faultyConn) spoil(t *faultyTask, h *iscsi.BHS, data []byte, ends bool) (left []byte, half bool) {
	if h.Opcode() != iscsi.OpDataIn {
		if t.cut > 0 && t.fault == ShortIn {
			h.SetFlags(h.Flags() | iscsi.FlagUnderflow)
			h.SetResidual(uint32(t.cut))
		}
		return data, false
	}
	t.received += len(data)
	f, _, _ := c.p.now()
	c.capacity(t, data, f)
	if t.op != OpRead16 && t.op != 0x28 || len(data) < 512 {
		return data, false
	}
	switch {
	case f == Cutting && c.p.hits.Add(1)%4 == 0:
		return data, true
	case (t.fault == ShortIn || t.fault == ShortInUntold) && t.received == t.expected:
		c.p.hits.Add(1)
		t.cut = len(data) / 2
		data = data[:len(data)-t.cut]
		if ends && t.fault == ShortIn {
			h.SetFlags(h.Flags() | iscsi.FlagUnderflow)
			h.SetResidual(uint32(t.cut))
		}
	case t.fault == Misnumbered:
		c.p.hits.Add(1)
		h.SetDataSN(h.DataSN() + 1)
	}
	return data, false
}

// misplace makes two of a PDU that brings all data of a read: the first half of the data at
// the place of the second, and, given back in h, the other way round.
func (c *faultyConn) misplace(t *faultyTask, h *iscsi.BHS, data []byte, d *delivery) []byte {
	if h.Opcode() != iscsi.OpDataIn || t.op != OpRead16 && t.op != 0x28 || len(data) != t.expected || len(data)%1024 != 0 {
		return data
	}
	c.p.hits.Add(1)
	middle := len(data) / 2
	first := *h
	first.SetFlags(0)
	first.SetStatSN(0)
	first.SetBufferOffset(uint32(middle))
	d.pdu = frame(&first, nil, data[:middle])
	h.SetDataSN(1)
	return data[middle:] // at offset 0
}

// capacity notes the answer of READ CAPACITY, or makes it half as much.
func (c *faultyConn) capacity(t *faultyTask, data []byte, f Fault) {
	if t.op != 0x9e || len(data) != 32 {
		return
	}
	if f == Smaller {
		c.p.hits.Add(1)
		binary.BigEndian.PutUint64(data, c.p.half()-1)
		return
	}
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	c.p.blocks = binary.BigEndian.Uint64(data) + 1
}

func (p *FaultyPortal) half() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.blocks / 2
}

// pdu is the SCSI Response in the place of h, with which the target ended the command.
func (a *reply) pdu(h *iscsi.BHS) (*iscsi.BHS, []byte) {
	var out iscsi.BHS
	out.SetOpcode(iscsi.OpSCSIResponse)
	flags := iscsi.FlagFinal
	if a.residual > 0 {
		flags |= iscsi.FlagUnderflow
		out.SetResidual(uint32(a.residual))
	}
	out.SetFlags(flags)
	out.SetStatus(a.status)
	out.SetITT(h.ITT())
	out.SetStatSN(h.StatSN())
	out.SetExpCmdSN(h.ExpCmdSN())
	out.SetMaxCmdSN(h.MaxCmdSN())
	if a.status != iscsi.StatusCheckCondition {
		return &out, nil
	}
	// Fixed format (SPC-4 4.5.3) behind its length.
	sense := [20]byte{1: 18, 2: 0x70, 4: a.key, 9: 10, 14: a.asc, 15: a.ascq}
	if a.info < noInfo {
		sense[2] |= 0x80
		binary.BigEndian.PutUint32(sense[5:], uint32(a.info))
	}
	return &out, sense[:]
}

// deliver sends the initiator what is in the queue, when it is due.
func (c *faultyConn) deliver() {
	defer func() {
		c.close()
		for range c.queue { // answers must not be kept
		}
	}()
	for d := range c.queue {
		if wait := time.Until(d.due); wait > 0 {
			select {
			case <-time.After(wait):
			case <-c.gone:
				return
			}
		}
		if _, ok := c.heard(); !ok || d.pdu == nil {
			return
		}
		if d.half {
			c.from.Write(d.pdu[:len(d.pdu)/2])
			c.reset()
			return
		}
		if _, err := c.from.Write(d.pdu); err != nil {
			return
		}
	}
}
