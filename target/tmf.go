package target

import (
	"errors"

	"lunshift/iscsi"
)

// taskManagement does a task management function (RFC 7143 11.5, SAM-5 7). Its
// response goes out when every task it aborted has ended: the device is done
// with them, and none of them is answered any more.
func (c *conn) taskManagement(h *iscsi.BHS) error {
	head := *h
	if ignore, err := c.inOrder(&head); ignore || err != nil {
		return err
	}
	// Tasks of other sessions are reached under their locks, one at a time.
	c.unlocked(func() { c.manage(&head) })
	return nil
}

func (c *conn) manage(head *iscsi.BHS) {
	var u *unit
	id, known := iscsi.DecodeLUN(head.LUN())
	if known {
		c.mu.Lock()
		u = c.units()[id]
		c.mu.Unlock()
	}
	b := &barrier{}
	response := byte(iscsi.TMFComplete)
	var after func()
	abortOf := func(o *conn, all bool, attn sense) {
		o.mu.Lock()
		defer o.mu.Unlock()
		for _, t := range o.tasks {
			if all || sameUnit(t.lunField, head.LUN()) {
				t.join(b)
				t.abort()
			}
		}
		if attn != (sense{}) && !o.closing {
			if all {
				for id := range o.units() {
					o.attend(id, attn)
				}
			} else {
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
		if f == iscsi.TMFAbortTaskSet {
			abortOf(c, false, sense{})
			break
		}
		for _, o := range peers {
			switch {
			case f == iscsi.TMFLUNReset:
				abortOf(o, false, attnLUNReset)
			case o == c:
				abortOf(o, false, sense{})
			default:
				abortOf(o, false, attnCleared)
			}
		}
	case iscsi.TMFTargetWarmReset, iscsi.TMFTargetColdReset:
		for _, o := range peers {
			abortOf(o, true, attnTargetReset)
		}
		if f == iscsi.TMFTargetColdReset {
			after = func() {
				for _, o := range peers {
					o.close(errors.New("target cold reset"))
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

// abortTask aborts the one task that is referred to.
func (c *conn) abortTask(h *iscsi.BHS, b *barrier) byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.tasks[h.TTT()]
	if t == nil {
		return iscsi.TMFNoTask
	}
	if !sameUnit(t.lunField, h.LUN()) {
		return iscsi.TMFNoTask
	}
	t.join(b)
	t.abort()
	return iscsi.TMFComplete
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
