package target

import (
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// task is one SCSI command from its arrival to its response. It is the context
// that the device gets: it ends when the task is aborted.
//
// A task belongs to its connection's reader while data arrives, to one worker while
// it runs (running), and is in conn.tasks until it ends. Whoever aborts a task ends it, on
// the spot, unless somebody keeps it: by running, held or reading. So a task is kept as long
// as it is still used after anything that may give up conn.mu: Reserve, Frame, Append
// and Flush of the writer without room before, unlocked, reject, malformed, drop. After
// finish, end, proceed, enqueue and start it is not used. Fields without a
// comment are set once at the beginning.
type task struct {
	life
	work
}

// work is what a task is about; it is cleared when the task ends.
type work struct {
	c        *conn
	u        *unit    // nil when there is no such logical unit
	behind   []*fence // what it must not begin before
	fence    *fence   // of an ORDERED or HEAD OF QUEUE command; nil once it has passed
	op       *operation
	itt      uint32
	lunField uint64
	cdb      [16]byte
	flags    byte
	isImmed  bool   // not counted by the command window
	expected uint32 // expected data transfer length, bytes

	// Decoded from the CDB.
	lba    uint64
	blocks uint64
	want   int // data-out bytes the CDB asks for
	alloc  int // data-in bytes the CDB allows, or transfers

	out []byte // data-out, want bytes
	in  []byte // data-in, what there is to send
	// whole is the data-in the CDB would transfer, in bytes, for the residual.
	whole  int
	outBuf *buffer
	inBuf  *buffer
	early  *buffer // data that came before the task was admitted

	// The transfer of data-out; the reader's, and under conn.mu where granted meets it.
	received    int    // bytes of out (or early) that are there
	offset      uint32 // next buffer offset of unsolicited data
	unsolicited bool   // unsolicited Data-Out PDUs are to come
	lost        bool   // a part of it did not arrive
	open        []r2t  // in their order, each from where the one before ends
	r2tSN       uint32
	outSN       uint32    // DataSN of the next Data-Out of the sequence
	since       time.Time // when data was last asked for or came; zero where none is due
	dataSN      uint32    // of the next Data-In
	claim       *claim    // that waits for bytes; nil none
	admitted    bool      // bytes were granted
	credit      int64     // bytes granted and not yet given to a buffer
	earlyCredit int64     // bytes for early data

	// Under conn.mu.
	reader  uint64 // conn.reader when it began to run on the reader
	running bool
	reading bool // the reader is putting data into the task's memory
	held    bool // its device is done with it; its answer is being queued
	past    bool // no device works for it any more, and none will
	left    bool // it is off the session's books
	aborted bool
	waiters []*barrier
	// followers are of ORDERED commands, which begin when the task is past.
	followers []*barrier
	// reaches are the units that an EXTENDED COPY reads and writes.
	reaches []*unit
}

var taskPool = sync.Pool{New: func() any { return new(task) }}

// barrier calls then once all tasks that joined it have ended. Its count is under
// the mutexes of the connections it spans and its own.
type barrier struct {
	mu   sync.Mutex // protects what follows
	n    int
	then func() // set by arm
}

// join makes b wait for t. conn.mu is held.
func (t *task) join(b *barrier) {
	b.mu.Lock()
	b.n++
	b.mu.Unlock()
	t.waiters = append(t.waiters, b)
}

// arm says that no further task joins; then is called once, here if nothing is
// waited for.
func (b *barrier) arm(then func()) { b.step(0, then) }

func (b *barrier) step(n int, then func()) {
	b.mu.Lock()
	b.n -= n
	if then != nil {
		b.then = then
	}
	then = b.then
	call := b.n == 0 && then != nil
	if call {
		b.then = nil
	}
	b.mu.Unlock()
	if call {
		then()
	}
}

// abort makes the task end without a response; what runs is cancelled and ends when
// its device returned. conn.mu is held.
func (t *task) abort() {
	if t.aborted {
		return
	}
	t.aborted = true
	t.cancel()
	if t.held || t.reading {
		// No device works for it, and none will: for whom waits for that it has ended,
		// however long its initiator takes nothing or sends nothing. Who holds it
		// disposes of it.
		t.c.leave(t)
		t.c.pass(t)
		t.tell()
		return
	}
	if t.running {
		return
	}
	if t.c.withdraw(t) {
		t.c.end(t)
	}
}

// end takes the task out of the session. conn.mu is held; t is not used after it.
func (c *conn) end(t *task) {
	if t.c != c {
		panic("task ended twice") // and may be another session's by now
	}
	c.leave(t)
	c.dispose(t)
}

// leave takes the task off the session's books: its place in the command window is
// free.
func (c *conn) leave(t *task) {
	if t.left {
		return
	}
	t.left = true
	if c.tasks[t.itt] == t {
		delete(c.tasks, t.itt)
	}
	if t.isImmed {
		c.immediate--
	} else {
		c.inFlight--
	}
}

// tell lets the barriers know that the task has ended. conn.mu is held.
func (t *task) tell() {
	for _, b := range t.waiters {
		b.step(1, nil)
	}
	t.waiters = t.waiters[:0]
}

// dispose gives back what the task holds.
func (c *conn) dispose(t *task) {
	c.pass(t)
	t.tell()
	for _, b := range [...]*buffer{t.outBuf, t.inBuf, t.early} {
		if b != nil {
			b.Release()
		}
	}
	if t.credit > 0 {
		c.bytes.release(t.credit)
	}
	c.releaseEarly(t)
	t.work = work{waiters: t.waiters[:0], followers: t.followers[:0], open: t.open[:0]}
	t.life.reset()
	taskPool.Put(t)
}

// dispatch makes the task run, once the PDU at hand is done with. Only the reader calls
// it. conn.mu is held.
func (c *conn) dispatch(t *task) {
	if c.ready != nil {
		c.enqueue(c.ready)
	}
	t.running = true
	c.ready = t
}

// enqueue hands the task to a worker. conn.mu is held.
func (c *conn) enqueue(t *task) {
	t.running = true
	switch {
	case c.idle > 0:
		c.idle--
	case c.started <= c.mostTasks(): // one of them may be sending
		if c.queue == nil {
			c.queue = make(chan *task, c.mostTasks()+1)
		}
		c.started++
		c.workers.Go(func() { c.work(c.queue) })
	default:
		c.backlog++
	}
	c.queue <- t
}

// mostTasks bounds the tasks of the session at a time.
func (c *conn) mostTasks() int { return int(c.window) + mostImmediate }

// restWorkers ends the workers that have nothing to do. c.mu is held.
func (c *conn) restWorkers() {
	for ; c.idle > 0; c.idle-- {
		c.started--
		c.queue <- nil
	}
}

// work runs tasks until the connection is gone, or until it gets none.
func (c *conn) work(queue <-chan *task) {
	for t := range queue {
		if t == nil {
			return
		}
		if err := c.guarded(func() error { c.run(t); return nil }); err != nil {
			c.close(err)
		}
		c.mu.Lock()
		// To send may take as long as the initiator likes: until it is done this worker is
		// not one that others may count on.
		err := c.w.Flush()
		if c.backlog > 0 {
			c.backlog--
		} else {
			c.idle++
		}
		c.mu.Unlock()
		if err != nil {
			c.close(fmt.Errorf("send: %w", err))
		}
	}
}

// run performs the task and queues its response.
func (c *conn) run(t *task) {
	err := t.perform()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finish(t, err)
}

// perform calls the handler. A panic in it is a failed command and no more.
func (t *task) perform() (err error) {
	defer func() {
		if p := recover(); p != nil {
			t.c.log.WithField("stack", string(debug.Stack())).Errorf("%s failed: internal fault: %v", t.op.name, p)
			err = senseInternal
		}
	}()
	if t.u == nil || t.op.noAttention {
		return t.op.handle(t) // reaches no device
	}
	if len(t.behind) > 0 || t.fence != nil {
		if err := t.turn(); err != nil {
			return err
		}
	}
	if !t.op.noDevice {
		if !t.u.gate.enter() {
			return t.u.shut()
		}
		defer t.u.gate.leave()
	}
	if err := t.Err(); err != nil {
		return err
	}
	return t.op.handle(t)
}

// finish answers the task, unless it was aborted, and ends it. conn.mu is held.
func (c *conn) finish(t *task, err error) {
	t.running, t.held = true, true
	c.pass(t)
	if !t.aborted && !c.closing {
		c.answer(t, err)
	}
	c.end(t)
}
