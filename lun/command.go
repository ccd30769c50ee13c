package lun

import (
	"sync/atomic"
)

// Command is one SCSI command and, after Initiator.Do, its outcome. It may be used
// again once Do returned, and then allocates nothing. At most one of Out and In is set.
type Command struct {
	// CDB is zero padded; longer CDBs are not served.
	CDB [16]byte
	// Out is the data to send, In where to put what comes; neither is used after
	// Do returned. Each is shorter than 2^32 bytes.
	Out, In []byte

	// Status is the SCSI status (SAM-5 5.3.1).
	Status byte
	// Received is how many bytes of In the device sent.
	Received int
	// Residual is the residual count in bytes: by how much the device took or sent less
	// than was expected, or, where Overflow, would have taken or sent more.
	Residual uint32
	Overflow bool
	// Sense is the sense data of a CHECK CONDITION; it is overwritten by the next Do.
	Sense []byte

	senseBuf [252]byte

	// What follows belongs to the session while the command is with it.

	// pending counts what must end before the command is done: its answer, and
	// each PDU that the writer may still read from Out. Whoever takes it to zero
	// signals done.
	pending atomic.Int32
	done    chan struct{} // buffered 1
	err     error         // of the transport; set before pending falls

	s     *session // and
	ender Ender    // the caller's context, while the caller receives

	prev, next *Command // in the queue or in flight
	list       *commandList

	itt       uint32
	cmdSN     uint32
	sent      bool   // a PDU of it went out on some connection
	offered   int    // bytes of Out that were sent on this connection
	asked     int    // bytes of Out that go unsolicited or were asked for by R2T
	dataSN    uint32 // of the next Data-In
	urgent    bool   // may be sent before the session is open to all
	born      int64  // session tick at submission
	aborting  bool   // an ABORT TASK is under way
	abortErr  error  // what the command fails with once it is known to be gone
	abortTick int64
}

// Ended aborts the command whose caller is receiving.
func (c *Command) Ended(err error) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.abort(c, err)
}

// Release tells that the writer has no further use for a part of Out.
func (c *Command) Release() { c.drop() }

func (c *Command) drop() {
	if c.pending.Add(-1) == 0 {
		c.done <- struct{}{}
	}
}

// CheckSense is the sense of a CHECK CONDITION.
func (c *Command) CheckSense() *SenseError { return parseSense(c.Sense) }

// commandList is a list in order of submission.
type commandList struct {
	head, tail *Command
	n          int
}

func (l *commandList) pushBack(c *Command) {
	c.list, c.prev, c.next = l, l.tail, nil
	if l.tail != nil {
		l.tail.next = c
	} else {
		l.head = c
	}
	l.tail = c
	l.n++
}

func (l *commandList) pushFront(c *Command) {
	c.list, c.prev, c.next = l, nil, l.head
	if l.head != nil {
		l.head.prev = c
	} else {
		l.tail = c
	}
	l.head = c
	l.n++
}

func (l *commandList) remove(c *Command) {
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		l.head = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	} else {
		l.tail = c.prev
	}
	c.list, c.prev, c.next = nil, nil, nil
	l.n--
}
