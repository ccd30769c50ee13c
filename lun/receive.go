package lun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"

	"lunshift/iscsi"
)

// A PDU that arrives is taken by who has the role of the receiver. While commands
// come one at a time that is the caller who waits for the answer: no goroutine has to
// wake another. Otherwise it is the receiver goroutine, which also looks after an idle
// connection. Whenever a command is in flight somebody has the role or the goroutine
// is summoned. Neither sends, so that two ends that both have full buffers do not
// wait for each other.

// lonelyAfter is how many commands must have come one at a time, since several were
// last in flight, before their callers receive.
const lonelyAfter = 16

// receiver is the receiver goroutine. It ends when the connection is lost and nobody
// uses the reader or a caller's buffer any more.
func (c *conn) receiver() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for {
		for c.receiving || !c.summoned && c.err == nil {
			c.role.Wait()
		}
		if c.err != nil {
			return
		}
		c.receiving, c.summoned = true, false
		c.receive(nil)
	}
}

// receiveFor makes the caller of t, the only command there is, the receiver until t
// ended or the connection is lost. The lock is held, and given up in between.
func (c *conn) receiveFor(t *Command) {
	c.receiving = true
	c.receive(t)
	if c.s.flight.n > 0 || c.s.queue.n > 0 || c.leaving || c.r.Ready() {
		c.summon()
	}
}

// summon has the receiver goroutine take the role unless somebody has it. The lock is
// held.
func (c *conn) summon() {
	if !c.receiving && !c.summoned {
		c.summoned = true
		c.role.Broadcast()
	}
}

// receive takes PDUs until the connection is lost, or until t ended; where t is nil,
// until callers may receive themselves. Then it gives the role up. The lock is held, and
// given up while there is nothing to take.
func (c *conn) receive(t *Command) {
	s := c.s
	for c.err == nil {
		s.mu.Unlock()
		h, err := c.r.Next()
		if err == nil {
			c.heard.Add(1)
			err = c.take(h)
		}
		s.mu.Lock()
		if err != nil {
			if !errors.Is(err, ErrUnavailable) {
				err = fmt.Errorf("%w: receive: %w", ErrUnavailable, err)
			}
			c.fail(err)
			break
		}
		if t != nil && t.list != &s.flight {
			break
		}
		if c.r.Ready() {
			continue
		}
		// What one read brought is answered with one write.
		if c.wanted {
			c.wanted = false
			s.wakeSender()
		}
		if t == nil && s.flight.n == 0 && s.queue.n == 0 && s.lonely >= 0 && c.opened && !s.closing && !c.leaving {
			break
		}
		if s.flight.n > 2 {
			// Those who were answered go on first; meanwhile more answers come.
			s.mu.Unlock()
			runtime.Gosched()
			s.mu.Lock()
		}
	}
	if c.wanted {
		c.wanted = false
		s.wakeSender()
	}
	c.receiving = false
	if c.err != nil {
		c.role.Broadcast()
	}
}

func (c *conn) take(h *iscsi.BHS) error {
	switch h.Opcode() {
	case iscsi.OpDataIn:
		return c.takeDataIn(h)
	case iscsi.OpSCSIResponse:
		return c.takeResponse(h)
	}
	head := *h
	var data []byte
	if c.r.Left() > 0 {
		if c.r.Left() > 64<<10 {
			return fmt.Errorf("%v with %d bytes", head.Opcode(), c.r.Left())
		}
		d, err := c.r.Data()
		if err != nil {
			return err
		}
		data = d
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	switch head.Opcode() {
	case iscsi.OpR2T:
		c.window(&head)
		return c.takeR2T(&head)
	case iscsi.OpNopIn:
		// A NOP-In that is no answer carries the next StatSN and uses none up.
		c.window(&head)
		if head.ITT() != iscsi.NoTag {
			if head.ITT() != pingITT {
				return fmt.Errorf("NOP-In for unknown task %08Xh", head.ITT())
			}
			c.status(&head)
			c.pinging = false
		} else if head.TTT() != iscsi.NoTag {
			if len(c.echoes) >= maxEchoes {
				return errors.New("too many NOP-Ins at once")
			}
			c.echoes = append(c.echoes, echo{head.LUN(), head.TTT(), append([]byte(nil), data[:min(len(data), maxEcho)]...)})
			c.wanted = true
		}
	case iscsi.OpTaskMgmtResp:
		c.status(&head)
		c.window(&head)
		return c.takeAborted(&head)
	case iscsi.OpLogoutResp:
		c.status(&head)
		select {
		case <-c.loggedOut:
		default:
			close(c.loggedOut)
		}
		if c.leaving {
			return fmt.Errorf("%w: the target asked for a logout", ErrUnavailable)
		}
		return errors.New("logged out")
	case iscsi.OpAsync:
		c.status(&head)
		c.window(&head)
		return c.takeAsync(&head)
	case iscsi.OpReject:
		return fmt.Errorf("the target rejected a PDU, reason %02Xh", head.Response())
	default:
		return fmt.Errorf("unexpected %v", head.Opcode())
	}
	return nil
}

// status takes the StatSN of a PDU that uses one up (RFC 7143 4.2.2.2).
func (c *conn) status(h *iscsi.BHS) {
	if next := h.StatSN() + 1; iscsi.SNLess(c.expStatSN, next) {
		c.expStatSN = next
	}
}

// window takes the command window (RFC 7143 4.2.2.1); one that moves back came late.
func (c *conn) window(h *iscsi.BHS) {
	exp, last := h.ExpCmdSN(), h.MaxCmdSN()
	if iscsi.SNLess(last, exp-1) || !iscsi.SNLess(c.maxCmdSN, last) {
		return
	}
	c.maxCmdSN = last
	if c.s.queue.head != nil {
		c.wanted = true
	}
}

// takeDataIn puts data straight into the caller's buffer.
func (c *conn) takeDataIn(h *iscsi.BHS) error {
	n := c.r.Left()
	final := h.Flags()&iscsi.FlagStatus != 0
	head := *h
	c.s.mu.Lock()
	t := c.find(head.ITT())
	if t == nil {
		c.s.mu.Unlock()
		return fmt.Errorf("Data-In for unknown task %08Xh", head.ITT())
	}
	// In order, as was negotiated: so a read with all its bytes has no gap.
	off := int64(head.BufferOffset())
	if off != int64(t.Received) || off+int64(n) > int64(len(t.In)) {
		c.s.mu.Unlock()
		return fmt.Errorf("Data-In of %d bytes at %d where %d of %d are wanted", n, off, t.Received, len(t.In))
	}
	if sn := head.DataSN(); sn != t.dataSN {
		c.s.mu.Unlock()
		return fmt.Errorf("Data-In number %d where %d is due", sn, t.dataSN)
	}
	t.dataSN++
	c.s.mu.Unlock()
	// The caller waits for the answer, and so its buffer stays, until retire.
	err := c.r.ReadData(t.In[off : off+int64(n)])
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if err != nil {
		return err
	}
	t.Received += n
	if final {
		c.status(&head)
		t.Status = head.Status()
		t.residual(&head)
		c.finish(t)
	}
	c.window(&head)
	return nil
}

// takeResponse ends a command with its status and sense.
func (c *conn) takeResponse(h *iscsi.BHS) error {
	head := *h
	data := []byte(nil)
	if left := c.r.Left(); left > 0 {
		if left > 64<<10 {
			return fmt.Errorf("SCSI Response with %d bytes", left)
		}
		d, err := c.r.Data()
		if err != nil {
			return err
		}
		data = d
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	t := c.find(head.ITT())
	if t == nil {
		return fmt.Errorf("SCSI Response for unknown task %08Xh", head.ITT())
	}
	c.status(&head)
	t.Status = head.Status()
	t.residual(&head)
	if head.Response() != iscsi.ResponseCompleted {
		t.err = fmt.Errorf("%w: the target failed the command, response %02Xh", ErrUnavailable, head.Response())
	}
	if len(data) >= 2 {
		n := min(int(binary.BigEndian.Uint16(data)), len(data)-2, len(t.senseBuf))
		t.Sense = t.senseBuf[:copy(t.senseBuf[:n], data[2:])]
	}
	c.finish(t)
	c.window(&head)
	return nil
}

func (t *Command) residual(h *iscsi.BHS) {
	t.Overflow = h.Flags()&iscsi.FlagOverflow != 0
	if t.Overflow || h.Flags()&iscsi.FlagUnderflow != 0 {
		t.Residual = h.Residual()
	}
}

// finish ends a command that was answered.
func (c *conn) finish(t *Command) {
	c.served = c.served || !t.urgent
	c.retire(t)
	if c.s.queue.head != nil {
		c.wanted = true
	}
	if c.leaving && c.s.flight.n == 0 {
		c.logOut()
	}
}

// logOut has Logout sent, once. The lock is held.
func (c *conn) logOut() {
	c.logout = !c.left
	c.wanted = true
}

func (c *conn) takeR2T(h *iscsi.BHS) error {
	t := c.find(h.ITT())
	if t == nil {
		return fmt.Errorf("R2T for unknown task %08Xh", h.ITT())
	}
	off, n := uint64(h.BufferOffset()), uint64(h.DesiredLength())
	if n == 0 || off+n > uint64(len(t.Out)) {
		return fmt.Errorf("R2T for %d bytes at %d of %d", n, off, len(t.Out))
	}
	// In order and each byte once, as DataSequenceInOrder says: so a write that is answered
	// with GOOD has been asked for in full.
	if off != uint64(t.asked) || n > uint64(c.p.MaxBurstLength) {
		return fmt.Errorf("R2T for %d bytes at %d where %d were asked for, at most %d at once", n, off, t.asked, c.p.MaxBurstLength)
	}
	if len(c.r2ts)-c.r2tHead >= maxR2T {
		return errors.New("too many R2Ts at once")
	}
	if len(c.r2ts) == cap(c.r2ts) && c.r2tHead > 0 {
		c.r2ts, c.r2tHead = c.r2ts[:copy(c.r2ts, c.r2ts[c.r2tHead:])], 0
	}
	t.asked += int(n)
	c.r2ts = append(c.r2ts, transfer{itt: h.ITT(), ttt: h.TTT(), off: uint32(off), n: uint32(n)})
	c.wanted = true
	return nil
}

// takeAborted takes the answer to ABORT TASK.
func (c *conn) takeAborted(h *iscsi.BHS) error {
	if h.ITT()&abortITT == 0 {
		return fmt.Errorf("task management response for unknown task %08Xh", h.ITT())
	}
	t := c.find(h.ITT() &^ abortITT)
	if t == nil || !t.aborting {
		return nil // the task's own answer came first
	}
	switch h.Response() {
	case iscsi.TMFComplete, iscsi.TMFNoTask:
		// "No such task" without an answer before it means the task never came
		// to be, or its answer was given up; either way nothing follows.
		t.err = t.abortErr
		c.finish(t)
		return nil
	}
	return fmt.Errorf("the target does not abort a task, response %d", h.Response())
}

func (c *conn) takeAsync(h *iscsi.BHS) error {
	switch e := h.AsyncEvent(); e {
	case iscsi.AsyncLogoutRequest, iscsi.AsyncNegotiate:
		// Parameter 3 is the time for it in seconds (RFC 7143 11.9.1); commands in flight
		// get half of that to end. A new login negotiates as well.
		if c.leaving {
			break
		}
		_, _, seconds := h.AsyncParameters()
		limit := time.Duration(seconds) * time.Second
		c.leaving, c.drainBy, c.leaveBy = true, time.Now().Add(limit/2), time.Now().Add(limit+logoutWait)
		if c.s.flight.n == 0 || seconds == 0 {
			c.logOut()
		}
	case iscsi.AsyncConnectionDrop, iscsi.AsyncSessionDrop:
		return fmt.Errorf("the target ends the connection, event %d", e)
	default:
		c.s.log.WithField("event", e).Debug("asynchronous message")
	}
	return nil
}
