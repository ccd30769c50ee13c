package target

import (
	"errors"
	"slices"

	"lunshift/iscsi"
)

// taskManagement does a task management function (RFC 7143 11.5, SAM-5 7). Its
// response goes out when every task it aborted has ended: the device is done
// with them, and none of them is answered any more.
//
// Until then it counts as a command does: an immediate one among the immediate
// commands, which are refused past their bound, another one in the command window.
func (c *conn) taskManagement(h *iscsi.BHS) error {
	head := *h
	if ignore, err := c.inOrder(&head); ignore || err != nil {
		return err
	}
	count := &c.inFlight
	if head.Immediate() {
		if c.immediate >= mostImmediate {
			c.reject(&head, iscsi.RejectTooManyImmed)
			return nil
		}
		count = &c.immediate
	}
	*count++
	// Tasks of other sessions are reached under their locks, one at a time.
	c.unlocked(func() { c.manage(&head, count) })
	return nil
}

func (c *conn) manage(head *iscsi.BHS, count *uint32) {
	var u *unit
	id, known := iscsi.DecodeLUN(head.LUN())
	c.mu.Lock()
	mine := c.units() // a target reset is one of the units that the initiator may use
	if known {
		u = mine[id]
	}
	c.mu.Unlock()
	b := &barrier{}
	response := byte(iscsi.TMFComplete)
	var after func()
	abortOf := func(o *conn, all bool, attn sense) {
		o.mu.Lock()
		defer o.mu.Unlock()
		for _, t := range o.tasks {
			here := all && (t.u == nil && o == c || t.u != nil && mine[t.u.LUN] == t.u) || !all && sameUnit(t.lunField, head.LUN())
			// A reset ends the copies that reach the unit as well, though they belong to
			// the task set of another.
			copies := attn == attnLUNReset && slices.Contains(t.reaches, u) ||
				all && slices.ContainsFunc(t.reaches, func(u *unit) bool { return u != nil && mine[u.LUN] == u })
			if !here && !copies {
				continue
			}
			if !here && o != c && !o.closing {
				o.attend(t.u.LUN, attnCleared)
			}
			t.join(b)
			t.abort()
		}
		if attn != (sense{}) && !o.closing {
			if all {
				for id, u := range o.units() {
					if mine[id] == u {
						o.attend(id, attn)
					}
				}
			} else if o.units()[id] == u {
				o.attend(id, attn)
			}
		}
	}
	peers := c.srv.sessions(c.node.iqn)
	switch f := head.Function(); f {
	case iscsi.TMFAbortTask:
		response = c.abortTask(head, b)
	case iscsi.TMFAbortTaskSet, iscsi.TMFClearTaskSet, iscsi.TMFLUNReset:
		if u == nil {
			response = iscsi.TMFNoLUN
			break
		}
		if f != iscsi.TMFLUNReset {
			// The task set is that of the I_T nexus: to clear it is to abort it (SAM-5 7.6).
			abortOf(c, false, sense{})
			break
		}
		for _, o := range peers {
			abortOf(o, false, attnLUNReset)
		}
		u.reserved.release(nil) // no RESERVE that was aborted comes after this
	case iscsi.TMFTargetWarmReset, iscsi.TMFTargetColdReset:
		for _, o := range peers {
			abortOf(o, true, attnTargetReset)
		}
		for _, u := range mine {
			u.reserved.release(nil)
		}
		if f == iscsi.TMFTargetColdReset {
			after = func() {
				for _, o := range peers {
					o.mu.Lock()
					concerned := o == c
					for id, u := range o.units() {
						concerned = concerned || mine[id] == u
					}
					o.mu.Unlock()
					if concerned {
						o.close(errors.New("target cold reset"))
					}
				}
			}
		}
	case iscsi.TMFTaskReassign:
		response = iscsi.TMFNoReassign
	default: // CLEAR ACA among them: there is no ACA
		response = iscsi.TMFNotSupported
	}
	if head.Function() != iscsi.TMFAbortTask && response == iscsi.TMFComplete {
		c.log.WithField("function", tmfName(head.Function())).Info("task management")
	}
	c.claims.Add(1)
	b.arm(func() {
		// The barrier may fall under another connection's lock.
		go func() {
			defer c.claims.Done()
			c.mu.Lock()
			*count--
			if !c.closing {
				r, data := c.w.Frame(0)
				r.SetOpcode(iscsi.OpTaskMgmtResp)
				r.SetFlags(iscsi.FlagFinal)
				r.SetResponse(response)
				r.SetITT(head.ITT())
				c.status(r)
				c.w.Commit(r, data)
				c.w.Flush()
			}
			c.mu.Unlock()
			if after != nil {
				after()
			}
		}()
	})
}

// abortTask aborts the one task that is referred to. One that never came is taken for
// received, where its number is among those that may still come and is before the
// request's own (RFC 7143 11.6.1).
func (c *conn) abortTask(h *iscsi.BHS, b *barrier) byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.tasks[h.TTT()]; t != nil && sameUnit(t.lunField, h.LUN()) {
		t.join(b)
		t.abort()
		return iscsi.TMFComplete
	}
	ref := h.RefCmdSN()
	if iscsi.SNLess(ref, c.expCmdSN) || !iscsi.SNLess(ref, h.CmdSN()) || iscsi.SNLess(c.lastCmdSN(), ref) {
		return iscsi.TMFNoTask
	}
	if c.skipped == nil {
		c.skipped = map[uint32]bool{}
	}
	c.skipped[ref] = true // as many as the window, at most
	c.skip()
	return iscsi.TMFComplete
}

// lastCmdSN is MaxCmdSN. c.mu is held.
func (c *conn) lastCmdSN() uint32 { return c.expCmdSN + c.window - c.inFlight - 1 }

// skip moves the window over commands that were aborted before they came. c.mu is held.
func (c *conn) skip() {
	for c.skipped[c.expCmdSN] {
		delete(c.skipped, c.expCmdSN)
		c.expCmdSN++
	}
}

// sameUnit tells whether two LUN fields mean one unit, which has a number in the
// peripheral and in the flat space format (SAM-5 4.7.7).
func sameUnit(a, b uint64) bool {
	n, ok := iscsi.DecodeLUN(a)
	m, known := iscsi.DecodeLUN(b)
	return a == b || ok && known && n == m
}

func tmfName(f byte) string {
	names := [...]string{"", "ABORT TASK", "ABORT TASK SET", "CLEAR ACA", "CLEAR TASK SET",
		"LUN RESET", "TARGET WARM RESET", "TARGET COLD RESET", "TASK REASSIGN"}
	if int(f) < len(names) {
		return names[f]
	}
	return "reserved"
}
