package target

import (
	"container/list"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/iscsi"
)

// readBuffer is how much a connection reads at a time, in bytes.
const readBuffer = 256 << 10

// firstBuffer is the same during the login.
const firstBuffer = 4 << 10

// mostImmediate bounds the immediate commands of a session, which the command
// window does not count.
const mostImmediate = 32

// conn is one connection and the session on it.
//
// One goroutine at a time reads PDUs and answers what can be answered without waiting;
// tasks that may wait run on the connection's workers, or on the reader where they
// are alone (inline.go).
type conn struct {
	srv   *Server
	nc    net.Conn
	log   logrus.FieldLogger
	since time.Time
	done  chan struct{} // closed when nothing of the connection is left

	// peer has the address and the portal group from the beginning, the rest by the
	// login.
	peer
	place   *list.Element // among those that log in; under Server.mu
	counted bool          // among the sessions; under Server.mu

	// Set by the login, constant afterwards; loggedIn is under Server.mu.
	loggedIn bool
	isid     iscsi.ISID
	tsih     uint16
	cid      uint16
	node     *node // nil in a discovery session
	params   iscsi.Params

	copies copyRecords // of EXTENDED COPY

	bytes share         // of the server's
	r     *iscsi.Reader // the reader's
	ready *task         // what the PDU at hand made ready to run; the reader's, under mu
	watch *watch        // nil where no task runs on the reader; the reader's
	heard atomic.Uint64 // counts PDUs received

	mu        sync.Mutex // protects what follows, and the writer
	w         *iscsi.Writer
	statSN    uint32
	expCmdSN  uint32
	window    uint32
	inFlight  uint32 // non-immediate tasks
	immediate uint32 // immediate tasks
	tasks     map[uint32]*task
	mapped    *map[uint64]*unit  // the units that visible is made from
	visible   map[uint64]*unit   // the units of the target that the session sees
	fences    map[*unit][]*fence // ORDERED and HEAD OF QUEUE commands that hold up newer ones; nil until one comes
	closing   bool               // no task begins any more
	full      bool               // the login is answered: other PDUs may be sent
	draining  bool               // what runs is answered before the connection closes
	cause     error
	attention map[uint64][]sense // unit attentions by unit number
	arrived   bool               // what awaited the I_T nexus was taken
	told      bool               // an Asynchronous Message waits for room
	skipped   map[uint32]bool    // CmdSNs of commands aborted before they came; nil until one is
	ping      uint32             // TTT of the NOP-In that was not answered; 0 none
	pingHeard uint64
	taken     uint64 // bytes that the initiator had taken at the last look
	stuck     int    // looks in a row that found it taking nothing
	nextTTT   uint32
	exchange  textExchange

	inline bool   // the reader runs a task
	reader uint64 // counts how often the role of the reader was handed over
	lonely int    // not negative when the latest tasks came one at a time

	readers sync.WaitGroup // those that the role was handed over to
	readEnd chan error     // buffered 1: what ended the reading

	early   int64      // bytes held by data of tasks that wait for memory
	queue   chan *task // tasks for the workers; never full; nil until one is needed
	idle    int        // workers that wait, less tasks on their way to them
	backlog int        // tasks in queue that no idle worker waits for
	workers sync.WaitGroup
	started int            // workers
	claims  sync.WaitGroup // claims on the server's bytes, and other helpers
}

func newConn(s *Server, nc net.Conn, group uint16) *conn {
	c := &conn{
		srv: s, nc: nc, peer: peer{from: remote(nc), group: group}, since: time.Now(), done: make(chan struct{}),
		log:    s.log.WithField("address", nc.RemoteAddr().String()),
		window: uint32(s.cfg.CommandsPerSession),
		tasks:  map[uint32]*task{}, attention: map[uint64][]sense{},
		readEnd: make(chan error, 1),
	}
	c.bytes.a = s.bytes
	c.r = iscsi.NewReader(nc, firstBuffer)
	c.r.MaxAHS = 0 // until the login is done
	c.w = iscsi.NewWriter(nc, &c.mu)
	return c
}

// serve is the life of the connection.
func (c *conn) serve() {
	defer close(c.done)
	err := c.guarded(c.login)
	if err == nil {
		c.r.Resize(readBuffer)
		c.watched(c.srv.watcher)
		err = c.lead()
	}
	c.mu.Lock()
	drained := c.draining && !c.closing
	c.mu.Unlock()
	if drained {
		c.finishRunning()
		err = ErrClosed
	}
	c.close(err)
	c.claims.Wait()
	c.readers.Wait()
	c.unwatched()
	c.mu.Lock()
	if c.queue != nil {
		close(c.queue)
	}
	c.mu.Unlock()
	c.workers.Wait()
	c.depart()
	c.mu.Lock()
	c.w.Close(net.ErrClosed)
	cause := c.cause
	c.mu.Unlock()
	c.r.Close()
	c.bytes.leave()
	c.srv.mu.Lock()
	delete(c.srv.conns, c)
	c.srv.places.leave(c)
	was := c.loggedIn && c.node != nil // a discovery session tells neither beginning nor end
	c.loggedIn = false
	c.srv.mu.Unlock()
	c.report(cause, was)
}

// guarded is the last defence: a panic ends this connection only.
func (c *conn) guarded(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal fault: %v", p)
			c.log.WithField("stack", string(debug.Stack())).Errorf("connection dropped: internal fault: %v", p)
		}
	}()
	return f()
}

var errLoggedOut = errors.New("logged out")

func (c *conn) report(cause error, session bool) {
	switch {
	case cause == nil, errors.Is(cause, io.EOF), errors.Is(cause, errLoggedOut), errors.Is(cause, ErrClosed), errors.Is(cause, errLoginRefused), errors.Is(cause, errDisplaced):
		if session {
			c.log.Info("session ended")
		}
	case !session: // strangers can cause these at will
		c.srv.notices.tell(c.log, fmt.Sprintf("discovery session ended: %v", cause))
	default:
		c.log.WithError(cause).Warn("connection dropped")
	}
}

// close ends the connection at once; its tasks are cancelled and not answered.
// The first cause stays.
func (c *conn) close(cause error) {
	defer c.nc.Close()
	c.guarded(func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.closing {
			c.closing = true
			c.cause = cause
		}
		// Every time: the reader may have begun a task since.
		for _, t := range c.tasks {
			t.abort()
		}
		return nil
	})
}

// drain makes the connection end once the tasks that run are answered.
func (c *conn) drain() {
	c.mu.Lock()
	c.draining = true
	c.mu.Unlock()
	c.nc.SetReadDeadline(time.Unix(1, 0))
}

// finishRunning gives up the tasks that wait for data, waits for the others and
// sends what is left to send.
func (c *conn) finishRunning() {
	all := make(chan struct{})
	c.mu.Lock()
	b := &barrier{}
	for _, t := range c.tasks {
		t.join(b)
		if !t.running {
			t.abort()
		}
	}
	b.arm(func() { close(all) })
	c.mu.Unlock()
	<-all
	c.mu.Lock()
	c.lastWords()
	c.mu.Unlock()
}

// lastWords sends what is left to send before the connection is closed. An initiator
// that takes nothing is not waited for long. c.mu is held.
func (c *conn) lastWords() {
	c.nc.SetWriteDeadline(time.Now().Add(5 * time.Second))
	c.w.Drain()
}

// receive takes PDUs in full feature phase until the connection ends or another
// goroutine has become the reader.
func (c *conn) receive() error {
	for {
		h, err := c.r.Next()
		if err != nil {
			return err
		}
		c.heard.Add(1)
		t, err := c.pdu(h)
		if err == nil && t != nil {
			err = c.runHere(t)
		}
		if err != nil {
			return err
		}
	}
}

// unlocked calls f without the lock, which is held again afterwards whatever f does.
func (c *conn) unlocked(f func()) {
	c.mu.Unlock()
	defer c.mu.Lock()
	f()
}

// pdu handles one PDU, and sends what there is to send when no other PDU is there
// already. An error ends the connection. A task that it gives is to be run.
func (c *conn) pdu(h *iscsi.BHS) (*task, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.handle(h); err != nil {
		if c.ready != nil {
			c.enqueue(c.ready)
			c.ready = nil
		}
		c.lastWords()
		return nil, err
	}
	t := c.alone()
	if c.r.Ready() {
		return nil, nil
	}
	if err := c.w.Flush(); err != nil {
		if t != nil {
			c.enqueue(t)
		}
		return nil, err
	}
	if t != nil {
		// Before the watcher is set: what it tells when nothing is inline is lost.
		c.inline, t.reader = true, c.reader
	}
	return t, nil
}

// handle is called with c.mu held, as is all that it calls.
func (c *conn) handle(h *iscsi.BHS) error {
	if c.node == nil { // discovery session (RFC 7143 4.3)
		switch h.Opcode() {
		case iscsi.OpTextRequest, iscsi.OpLogout, iscsi.OpNopOut:
		default:
			return c.malformed(h, "%v in a discovery session", h.Opcode())
		}
	}
	switch h.Opcode() {
	case iscsi.OpSCSICommand:
		return c.command(h)
	case iscsi.OpDataOut:
		return c.dataOut(h)
	case iscsi.OpNopOut:
		return c.nopOut(h)
	case iscsi.OpTaskMgmt:
		return c.taskManagement(h)
	case iscsi.OpTextRequest:
		return c.textRequest(h)
	case iscsi.OpLogout:
		return c.logout(h)
	case iscsi.OpSNACK:
		return c.malformed(h, "SNACK at error recovery level 0")
	}
	return c.malformed(h, "%v from an initiator", h.Opcode())
}

// malformed answers with a Reject and gives the error that ends the connection. c.mu
// is held.
func (c *conn) malformed(h *iscsi.BHS, format string, args ...any) error {
	c.reject(h, iscsi.RejectProtocol)
	return fmt.Errorf("protocol error: "+format, args...)
}

// reject queues a Reject for the PDU (RFC 7143 11.17). c.mu is held.
func (c *conn) reject(h *iscsi.BHS, reason byte) {
	bad := *h
	r, data := c.w.Frame(iscsi.BHSLength)
	copy(data, bad[:])
	r.SetOpcode(iscsi.OpReject)
	r.SetFlags(iscsi.FlagFinal)
	r.SetResponse(reason)
	r.SetITT(iscsi.NoTag)
	c.status(r)
	c.w.Commit(r, data)
}

// status gives a PDU its StatSN and the command window. c.mu is held.
func (c *conn) status(h *iscsi.BHS) {
	h.SetStatSN(c.statSN)
	c.statSN++
	c.numbers(h)
}

// numbers gives a PDU the command window. c.mu is held.
//
// MaxCmdSN never falls: a command that arrives moves expCmdSN and inFlight
// together.
func (c *conn) numbers(h *iscsi.BHS) {
	h.SetExpCmdSN(c.expCmdSN)
	h.SetMaxCmdSN(c.expCmdSN + c.window - c.inFlight - 1)
}

// inOrder holds the CmdSN of a PDU against the window and moves the window for it.
// ignore says that the PDU is to be dropped in silence (RFC 7143 4.2.2.1). c.mu
// is held.
func (c *conn) inOrder(h *iscsi.BHS) (ignore bool, err error) {
	if h.Immediate() {
		return false, nil
	}
	sn := h.CmdSN()
	switch {
	case sn == c.expCmdSN && c.inFlight < c.window:
		c.expCmdSN++
		c.skip()
		return false, nil
	case iscsi.SNLess(sn, c.expCmdSN) || iscsi.SNLess(c.expCmdSN+c.window-c.inFlight-1, sn):
		return true, nil
	}
	// On one connection commands arrive in order; a gap would never be filled.
	return false, fmt.Errorf("protocol error: CmdSN %d where %d is next", sn, c.expCmdSN)
}

// nopOut answers a ping or takes the answer to one (RFC 7143 11.18).
func (c *conn) nopOut(h *iscsi.BHS) error {
	head := *h
	n := min(c.r.Left(), int(c.params.PeerMaxRecv), iscsi.MaxFrame)
	var echo []byte
	if head.ITT() != iscsi.NoTag && n > 0 {
		echo = make([]byte, n)
		var err error
		c.unlocked(func() { err = c.r.ReadData(echo) })
		if err != nil {
			return err
		}
	}
	if head.ITT() == iscsi.NoTag {
		if !head.Immediate() {
			return fmt.Errorf("protocol error: NOP-Out without a task tag is not immediate")
		}
		if head.TTT() != iscsi.NoTag && head.TTT() == c.ping {
			c.ping = 0
		}
		return nil
	}
	if ignore, err := c.inOrder(&head); ignore || err != nil {
		return err
	}
	r, data := c.w.Frame(len(echo))
	copy(data, echo)
	r.SetOpcode(iscsi.OpNopIn)
	r.SetFlags(iscsi.FlagFinal)
	r.SetLUN(head.LUN())
	r.SetITT(head.ITT())
	r.SetTTT(iscsi.NoTag)
	c.status(r)
	c.w.Commit(r, data)
	return nil
}

// keepAlive pings the initiator when it was silent since the last call but one. It gives an
// error when a ping went unanswered for that long, or when of what is on its way to
// the initiator nothing was taken for two calls, whether or not it talks.
func (c *conn) keepAlive() error {
	heard := c.heard.Load()
	c.mu.Lock()
	defer c.mu.Unlock()
	silent := heard == c.pingHeard
	c.pingHeard = heard
	if !silent {
		c.ping = 0
	}
	if c.closing || !c.full {
		return nil
	}
	before := c.taken
	var left bool
	if c.taken, left = c.w.Taken(); left {
		// What is on its way says more than a ping, which would come behind it.
		if c.taken != before {
			c.ping, c.stuck = 0, 0
		} else if c.stuck++; c.stuck > 1 || c.ping != 0 {
			return fmt.Errorf("initiator took nothing of what was sent within %v", c.srv.cfg.NopInterval)
		}
		return nil
	}
	c.stuck = 0
	if !silent {
		return nil
	}
	c.restWorkers()
	if c.ping != 0 {
		return fmt.Errorf("initiator did not answer a ping within %v", c.srv.cfg.NopInterval/2)
	}
	c.ping = c.newTTT()
	// There is room, as nothing is left to send: this goroutine serves every session and
	// must not wait for one.
	r, data := c.w.Frame(0)
	r.SetOpcode(iscsi.OpNopIn)
	r.SetFlags(iscsi.FlagFinal)
	r.SetITT(iscsi.NoTag)
	r.SetTTT(c.ping)
	// An unsolicited NOP-In carries the next StatSN and does not use it up.
	r.SetStatSN(c.statSN)
	c.numbers(r)
	c.w.Commit(r, data)
	c.claims.Go(func() {
		c.mu.Lock()
		c.w.Flush()
		c.mu.Unlock()
	})
	return nil
}

// newTTT gives a target transfer tag that is not in use. c.mu is held.
func (c *conn) newTTT() uint32 {
	c.nextTTT++
	if c.nextTTT == iscsi.NoTag || c.nextTTT == 0 {
		c.nextTTT = 1
	}
	return c.nextTTT
}

// logout ends the session once its tasks have ended (RFC 7143 11.14).
func (c *conn) logout(h *iscsi.BHS) error {
	head := *h
	if ignore, err := c.inOrder(&head); ignore || err != nil {
		return err
	}
	response := byte(iscsi.LogoutOK)
	switch head.Function() {
	case iscsi.LogoutCloseSession:
	case iscsi.LogoutCloseConnection:
		if head.CID() != c.cid {
			response = iscsi.LogoutNoCID
		}
	case iscsi.LogoutForRecovery:
		response = iscsi.LogoutNoRecovery
	default:
		c.reject(&head, iscsi.RejectInvalidPDUField)
		return nil
	}
	ended := make(chan struct{})
	if response == iscsi.LogoutOK {
		b := &barrier{}
		for _, t := range c.tasks {
			t.join(b)
			t.abort()
		}
		b.arm(func() { close(ended) })
		c.unlocked(func() { <-ended })
	}
	r, data := c.w.Frame(0)
	r.SetOpcode(iscsi.OpLogoutResp)
	r.SetFlags(iscsi.FlagFinal)
	r.SetResponse(response)
	r.SetITT(head.ITT())
	c.status(r)
	r.SetLogoutTimes(0, 0)
	c.w.Commit(r, data)
	if response == iscsi.LogoutOK {
		return errLoggedOut
	}
	return nil
}

// askLogout sends the Asynchronous Message that requests a logout within so many
// seconds (RFC 7143 11.9.1, event 1). It does not wait for an initiator that takes
// nothing. It is false where the session has not begun yet.
func (c *conn) askLogout(seconds uint16) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing || !c.full {
		return false
	}
	c.claims.Go(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.w.Reserve(0)
		if c.closing {
			return
		}
		r, data := c.w.Frame(0)
		r.SetOpcode(iscsi.OpAsync)
		r.SetFlags(iscsi.FlagFinal)
		r.SetITT(iscsi.NoTag)
		c.status(r)
		r.SetAsync(iscsi.AsyncLogoutRequest, 0, 0, 0, seconds)
		c.w.Commit(r, data)
		c.w.Flush()
	})
	return true
}
