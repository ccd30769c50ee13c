package lun

import (
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"lunshift/iscsi"
)

const (
	// copyLimit is the data, in bytes, that is copied behind its header rather than
	// referred to: one buffer is cheaper to write than three.
	copyLimit = 16 << 10
	// pingITT is the task tag of our own NOP-Out, logoutITT that of Logout, and that of a
	// request to abort is abortITT with the one of its task: an answer that comes after the
	// task's own must not be taken for that of the slot's next one.
	pingITT   = 0xfffe0000
	logoutITT = 0xfffe0001
	abortITT  = 0x80000000
	// generations keeps task tags, and those of requests to abort, below pingITT.
	generations = 0x7ff0
	maxEchoes   = 16
	maxEcho     = 4096
	// maxR2T bounds the R2Ts a target may leave with us unanswered.
	maxR2T = 4096
)

// conn is one connection in full feature phase. Its fields are protected by the
// session's lock except those of the receiver.
type conn struct {
	s  *session
	nc net.Conn
	w  *iscsi.Writer
	r  *iscsi.Reader // the receiver's alone
	p  iscsi.Params
	// scratch is the header of a PDU while it is put into w; w copies it.
	scratch iscsi.BHS

	since  time.Time     // when it was logged in
	opened bool          // callers' commands were let in
	served bool          // ... and one was answered
	err    error         // why it is lost
	lost   chan struct{} // closed with err

	cmdSN     uint32
	expStatSN uint32
	maxCmdSN  uint32

	// The role of the receiver is its goroutine's, or that of the caller of a lone
	// command, or for a moment nobody's; see receive.go. Only its holder uses r.
	receiving bool
	summoned  bool       // the receiver goroutine is to take the role
	role      *sync.Cond // receiving, summoned or err changed

	slots []*Command
	gens  []uint16
	free  []uint16

	r2ts    []transfer // data the target asked for, in the order it asked, from r2tHead on
	r2tHead int
	aborts  []uint32 // tags of tasks to abort
	echoes  []echo   // NOP-Ins to answer
	ping    bool     // a NOP-Out of ours is to be sent
	pinging bool     // ... or unanswered
	logout  bool     // Logout is to be sent
	left    bool     // Logout was sent: nothing may follow it
	// leaving is set once the target asked for a Logout: no command of a caller is sent,
	// and Logout follows when none is in flight or at drainBy. At leaveBy the connection goes.
	leaving          bool
	drainBy, leaveBy time.Time
	loggedOut        chan struct{}
	wanted           bool          // the receiver found something for the sender
	heard            atomic.Uint64 // counts PDUs received
}

// transfer is a part of a command's Out that the target asked for.
type transfer struct {
	itt, ttt uint32
	off, n   uint32
	dataSN   uint32
}

type echo struct {
	lun  uint64
	ttt  uint32
	data []byte
}

func newConn(s *session, l *link) *conn {
	c := &conn{
		s: s, since: time.Now(), nc: l.nc, r: l.r, p: l.params, lost: make(chan struct{}), loggedOut: make(chan struct{}),
		cmdSN: l.cmdSN, expStatSN: l.expStatSN, maxCmdSN: l.maxCmdSN,
		role: sync.NewCond(&s.mu), summoned: true,
	}
	c.w = iscsi.NewWriter(l.nc, &s.mu)
	c.w.HeaderDigest, c.w.DataDigest = l.params.HeaderDigest, l.params.DataDigest
	// Some slots more than callers may use are kept for the session's own commands.
	n := s.opts.QueueDepth + 8
	c.slots, c.gens = make([]*Command, n), make([]uint16, n)
	for i := n - 1; i >= 0; i-- {
		c.free = append(c.free, uint16(i))
	}
	s.mu.Lock()
	s.c = c
	s.mu.Unlock()
	return c
}

// fail marks the connection as lost with its first error. The lock is held.
func (c *conn) fail(err error) {
	if c.err == nil {
		c.err = err
		c.nc.Close()
		close(c.lost)
		c.role.Broadcast()
	}
}

// find gives the command with that tag, or nil.
func (c *conn) find(itt uint32) *Command {
	slot := int(itt & 0xffff)
	if slot >= len(c.slots) {
		return nil
	}
	if t := c.slots[slot]; t != nil && t.itt == itt {
		return t
	}
	return nil
}

// admit gives the command a tag and moves it from the queue to those in flight.
func (c *conn) admit(t *Command) {
	slot := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	// The generation tells a late answer from one to the slot's next command. It
	// stays below the tags that are no slots'.
	c.gens[slot] = (c.gens[slot] + 1) % generations
	t.itt = uint32(c.gens[slot])<<16 | uint32(slot)
	t.cmdSN = c.cmdSN
	c.cmdSN++
	t.sent, t.offered, t.dataSN = true, 0, 0
	c.slots[slot] = t
	c.s.queue.remove(t)
	c.s.flight.pushBack(t)
}

// retire takes an answered command off the connection and ends it.
func (c *conn) retire(t *Command) {
	slot := uint16(t.itt)
	c.slots[slot] = nil
	c.free = append(c.free, slot)
	c.s.flight.remove(t)
	t.drop()
}

// sender sends what no caller does: data the target asks for, answers, aborts,
// and commands that had to wait.
func (s *session) sender(c *conn) {
	for {
		select {
		case <-c.lost:
			return
		case <-s.wake:
		}
		s.mu.Lock()
		if s.c == c {
			s.send(1 << 30)
		}
		s.mu.Unlock()
	}
}

// send sends what can be sent, in at most that many rounds, unless somebody
// else does already; what is left goes to the sender. The lock is held, and given
// up while data is written.
func (s *session) send(rounds int) {
	if s.sending {
		return
	}
	c := s.c
	if c == nil || c.err != nil || !c.sendable() {
		return
	}
	s.sending = true
	if s.flight.n > 1 {
		// Others are about to submit as well: their commands go in the same write.
		s.mu.Unlock()
		runtime.Gosched()
		s.mu.Lock()
	}
	for ; rounds > 0 && c.err == nil && c.sendable(); rounds-- {
		c.gather()
		if err := c.w.Flush(); err != nil {
			c.fail(fmt.Errorf("%w: send: %w", ErrUnavailable, err))
		}
	}
	s.sending = false
	// By now there may be another connection, with commands that were left to us.
	if c = s.c; c != nil && c.err == nil && c.sendable() {
		s.wakeSender()
	}
}

// sendable tells whether there is something that may be sent now.
func (c *conn) sendable() bool {
	return !c.left && (len(c.echoes) > 0 || len(c.aborts) > 0 || len(c.r2ts) > c.r2tHead || c.ping || c.logout || c.nextCommand() != nil)
}

// nextCommand is the command that may be sent next: within the command window
// (RFC 7143 4.2.2.1), with a slot, and open to it.
func (c *conn) nextCommand() *Command {
	t := c.s.queue.head
	if t == nil || len(c.free) == 0 || iscsi.SNLess(c.maxCmdSN, c.cmdSN) {
		return nil
	}
	if !t.urgent && (!c.s.open || c.leaving || len(c.free) <= 8) {
		return nil
	}
	return t
}

// gatherLimit is how much goes into one write, in bytes of data.
const gatherLimit = 1 << 20

// gather puts PDUs into the writer until there are none or the write is large
// enough. It may give up the lock, so it looks at everything anew each time.
func (c *conn) gather() {
	for bytes := 0; c.err == nil && !c.left && bytes < gatherLimit; {
		switch {
		case c.ping:
			c.ping = false
			c.control(iscsi.OpNopOut, 0, pingITT, iscsi.NoTag, nil)
		case len(c.echoes) > 0:
			e := c.echoes[0]
			c.echoes = c.echoes[1:]
			c.control(iscsi.OpNopOut, e.lun, iscsi.NoTag, e.ttt, e.data)
		case len(c.aborts) > 0:
			itt := c.aborts[0]
			c.aborts = c.aborts[1:]
			c.sendAbort(itt)
		case len(c.r2ts) > c.r2tHead:
			bytes += c.sendRequested()
		case c.logout:
			c.logout, c.left = false, true
			h, data := c.w.Frame(0)
			h.SetOpcode(iscsi.OpLogout)
			h.SetImmediate()
			h.SetFlags(iscsi.FlagFinal | iscsi.LogoutCloseSession)
			h.SetITT(logoutITT)
			h.SetCmdSN(c.cmdSN)
			h.SetExpStatSN(c.expStatSN)
			c.w.Commit(h, data)
		default:
			t := c.nextCommand()
			if t == nil {
				return
			}
			bytes += 256 + c.sendCommand(t)
		}
	}
}

// control sends an immediate NOP-Out.
func (c *conn) control(op iscsi.Opcode, lun uint64, itt, ttt uint32, payload []byte) {
	h, data := c.w.Frame(len(payload))
	copy(data, payload)
	h.SetOpcode(op)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal)
	h.SetLUN(lun)
	h.SetITT(itt)
	h.SetTTT(ttt)
	h.SetCmdSN(c.cmdSN)
	h.SetExpStatSN(c.expStatSN)
	c.w.Commit(h, data)
}

func (c *conn) sendAbort(itt uint32) {
	c.w.Reserve(0)
	t := c.find(itt)
	if c.err != nil || t == nil {
		return
	}
	h, data := c.w.Frame(0)
	h.SetOpcode(iscsi.OpTaskMgmt)
	h.SetImmediate()
	h.SetFlags(iscsi.FlagFinal | iscsi.TMFAbortTask)
	h.SetLUN(c.s.lunField)
	h.SetITT(abortITT | itt)
	h.SetTTT(itt)
	h.SetCmdSN(c.cmdSN)
	h.SetExpStatSN(c.expStatSN)
	h.SetRefCmdSN(t.cmdSN)
	c.w.Commit(h, data)
}

// sendCommand sends t, the head of the queue, with its immediate and unsolicited
// data, and returns the bytes of data.
func (c *conn) sendCommand(t *Command) int {
	imm := 0
	if c.p.ImmediateData {
		imm = min(len(t.Out), int(c.p.PeerMaxRecv), int(c.p.FirstBurstLength))
	}
	c.w.Reserve(imm)
	if c.err != nil || c.nextCommand() != t {
		return 0
	}
	c.admit(t)
	first := imm
	if !c.p.InitialR2T {
		first = min(len(t.Out), int(c.p.FirstBurstLength))
	}
	t.asked = first
	flags := iscsi.AttrSimple
	if first == imm {
		flags |= iscsi.FlagFinal
	}
	length := 0
	if len(t.Out) > 0 {
		flags |= iscsi.FlagWrite
		length = len(t.Out)
	} else if len(t.In) > 0 {
		flags |= iscsi.FlagRead
		length = len(t.In)
	}
	c.scratch = iscsi.BHS{}
	h, data := &c.scratch, []byte(nil)
	if imm <= copyLimit {
		h, data = c.w.Frame(imm)
		copy(data, t.Out)
	}
	h.SetOpcode(iscsi.OpSCSICommand)
	h.SetFlags(flags)
	h.SetLUN(c.s.lunField)
	h.SetITT(t.itt)
	h.SetExpectedLength(uint32(length))
	h.SetCmdSN(t.cmdSN)
	h.SetExpStatSN(c.expStatSN)
	copy(h.CDB(), t.CDB[:])
	if imm <= copyLimit {
		c.w.Commit(h, data)
	} else {
		t.pending.Add(1)
		c.w.Append(h, nil, t.Out[:imm], t)
	}
	t.offered = imm
	// Unsolicited data follows its command before any other command's (RFC 7143
	// 4.2.4.2); sending keeps the others out even while the lock is given up.
	x := transfer{itt: t.itt, ttt: iscsi.NoTag, off: uint32(imm), n: uint32(first - imm)}
	for x.n > 0 && c.sendData(&x) > 0 {
	}
	return first
}

// sendRequested sends one PDU of the data that the target asked for first.
func (c *conn) sendRequested() int {
	x := c.r2ts[c.r2tHead]
	n := c.sendData(&x)
	// The reader only appends, and only one goroutine sends.
	if n > 0 && x.n > 0 {
		c.r2ts[c.r2tHead] = x
		return n
	}
	if c.r2tHead++; c.r2tHead == len(c.r2ts) {
		c.r2ts, c.r2tHead = c.r2ts[:0], 0
	}
	return n
}

// sendData sends the next Data-Out of x. It gives 0 when the command is no longer
// there, or has been answered.
func (c *conn) sendData(x *transfer) int {
	n := min(x.n, c.p.PeerMaxRecv)
	c.w.Reserve(int(n))
	t := c.find(x.itt)
	if c.err != nil || t == nil || t.aborting {
		return 0
	}
	c.scratch = iscsi.BHS{}
	h := &c.scratch
	h.SetOpcode(iscsi.OpDataOut)
	if n == x.n {
		h.SetFlags(iscsi.FlagFinal)
	}
	h.SetLUN(c.s.lunField)
	h.SetITT(x.itt)
	h.SetTTT(x.ttt)
	h.SetExpStatSN(c.expStatSN)
	h.SetDataSN(x.dataSN)
	h.SetBufferOffset(x.off)
	t.pending.Add(1)
	c.w.Append(h, nil, t.Out[x.off:x.off+n], t)
	t.offered += int(n)
	x.off, x.n, x.dataSN = x.off+n, x.n-n, x.dataSN+1
	return int(n)
}
