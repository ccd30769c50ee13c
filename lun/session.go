package lun

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/iscsi"
)

// Back-off between attempts to log in again.
const (
	backoffMin = 50 * time.Millisecond
	backoffMax = 2 * time.Second
	// steady is how long a connection must last for its loss to be news: the next login
	// then follows at once. newsEvery bounds how often losses are logged.
	steady    = 5 * time.Second
	newsEvery = 10 * time.Second
)

// abortWait is how long a target may take to confirm that a task is gone before
// the connection is dropped instead, and logoutWait how long Close waits for
// commands in flight and for the answer to Logout.
const (
	abortWait  = 2 * time.Second
	logoutWait = time.Second
)

// session is one I_T nexus: at any time it has one connection, or none and is
// logging in again. Commands survive the loss of a connection: what was not
// answered is sent again on the next one, in the old order.
//
// That is safe because the new login carries the same ISID: the target ends the
// old session and its tasks before it answers (session reinstatement, RFC 7143
// 6.3.5), so a task of the lost connection cannot take effect after one that is
// sent on the new connection, and because a caller does not return before its
// command is known to be done or gone.
type session struct {
	endpoint
	lunField uint64
	log      logrus.FieldLogger
	// verify runs on each new connection before commands of callers do.
	verify func(ctx context.Context, s *session) error
	// onLoss, unless nil, runs for each lost connection before its commands are sent
	// again, and before the next one is open to callers: the target may have lost power
	// in between as well, and told it while it was verified. It must not block.
	onLoss func()
	// period is the grain of time-outs.
	period time.Duration
	start  time.Time
	// delay is the pause before the next login, told when a loss was last logged; both
	// are the manager's alone.
	delay time.Duration
	told  time.Time

	mu      sync.Mutex // protects all that follows, and the fields of commands
	c       *conn      // nil while there is none
	open    bool       // c takes commands of all
	wasOpen bool       // ... or some connection before it did
	queue   commandList
	flight  commandList
	sending bool // somebody is sending; others leave their commands in queue
	// lonely is not negative when the latest commands came one at a time.
	lonely  int
	closing bool
	closed  bool
	downErr error // why there is no connection
	tick    int64 // periods since start
	// zombies counts writes that were given up while there was no connection:
	// they may still take effect until the next login.
	zombies int
	upCh    chan struct{} // closed while open

	wake    chan struct{} // to the sender goroutine, buffered 1
	stop    context.CancelFunc
	stopCtx context.Context
	done    chan struct{} // the manager has ended
}

// startSession logs in for the first time and begins to serve.
func startSession(ctx context.Context, e endpoint, lunField uint64, verify func(context.Context, *session) error, onLoss func()) (*session, error) {
	l, err := e.login(ctx)
	if err != nil {
		return nil, err
	}
	s := newSession(e, lunField, verify)
	s.onLoss = onLoss
	first := make(chan error, 1)
	go s.manage(l, first)
	select {
	case err = <-first:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func newSession(e endpoint, lunField uint64, verify func(context.Context, *session) error) *session {
	s := &session{
		endpoint: e, lunField: lunField, verify: verify,
		log:    e.opts.Log.WithField("target", e.addr.String()),
		period: min(max(min(e.opts.IOTimeout, e.opts.PingInterval)/10, 5*time.Millisecond), 500*time.Millisecond),
		start:  time.Now(),
		upCh:   make(chan struct{}), wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	s.stopCtx, s.stop = context.WithCancel(context.Background())
	return s
}

// do runs c to its end. Its error is one of the transport: ErrUnavailable,
// ErrClosed or ctx's; the SCSI status is in c.
func (s *session) do(ctx context.Context, c *Command) error {
	if c.done == nil {
		c.done = make(chan struct{}, 1)
	}
	c.pending.Store(1)
	c.err, c.abortErr, c.aborting, c.sent = nil, nil, false, false
	c.Status, c.Received, c.Residual, c.Overflow, c.Sense = 0, 0, 0, false, nil

	s.mu.Lock()
	if s.closing && !c.urgent || s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	if s.flight.n+s.queue.n > 0 {
		s.lonely = -lonelyAfter
	} else if s.lonely < 0 {
		s.lonely++
	}
	c.born = s.tick
	if c.urgent {
		s.queue.pushFront(c)
	} else {
		s.queue.pushBack(c)
	}
	s.send(2)
	// To be watched takes the lock away for a moment, so the question is put twice.
	if s.lone(c) && s.watched(ctx, c) && s.lone(c) {
		s.c.receiveFor(c)
	} else if s.c != nil {
		s.c.summon()
	}
	s.mu.Unlock()
	if c.ender != nil {
		c.ender.OnEnd(nil)
		c.ender = nil
	}

	if ctx.Done() == nil {
		<-c.done
		return c.outcome()
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		s.mu.Lock()
		s.abort(c, ctx.Err())
		s.mu.Unlock()
		<-c.done
	}
	return c.outcome()
}

// lone tells whether c is all there is, so that its caller may receive. The lock is held.
func (s *session) lone(c *Command) bool {
	return s.c != nil && s.c.err == nil && !s.c.receiving && !s.c.summoned &&
		c.list == &s.flight && s.flight.n == 1 && s.queue.n == 0 && s.lonely >= 0
}

// watched makes sure that the end of ctx aborts c while its caller receives. The lock is
// held.
func (s *session) watched(ctx context.Context, c *Command) bool {
	e, ok := ctx.(Ender)
	if !ok {
		return ctx.Done() == nil
	}
	c.s, c.ender = s, e
	// Ended takes the lock, so it must not run within.
	s.mu.Unlock()
	ok = e.OnEnd(c)
	s.mu.Lock()
	if !ok {
		c.ender = nil
	}
	return ok
}

// outcome is the error of a command that ended.
func (c *Command) outcome() error {
	if c.err == nil && c.aborting && c.Status != statusGood {
		return c.abortErr
	}
	return c.err
}

// abort makes c end with err: at once when it was not sent, otherwise when the
// target confirms that the task is gone, or the connection is. The lock is held.
func (s *session) abort(c *Command, err error) {
	switch {
	case c.list == nil || c.aborting: // ended already, or about to
	case c.list == &s.queue:
		s.queue.remove(c)
		s.bury(c, err)
	default:
		c.aborting, c.abortErr, c.abortTick = true, err, s.tick
		s.c.aborts = append(s.c.aborts, c.itt)
		s.wakeSender()
	}
}

// bury ends a command that is on no connection.
func (s *session) bury(c *Command, err error) {
	if c.sent && !s.open && !s.closed && c.mayChange() {
		s.zombies++
	}
	c.err = err
	c.drop()
}

// mayChange tells whether the command can change what the device holds.
func (c *Command) mayChange() bool {
	switch c.CDB[0] {
	case opRead10, opRead16, opInquiry, opReadCapacity10, opServiceIn16, opTestUnitReady, opModeSense6, opSyncCache10, opSyncCache16:
		return false
	}
	return true
}

// settle waits until no write that was given up can take effect any more.
func (s *session) settle(ctx context.Context, timeout time.Duration) error {
	s.mu.Lock()
	zombies, up := s.zombies, s.upCh
	s.mu.Unlock()
	if zombies == 0 {
		return nil
	}
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case <-up:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.done:
		return ErrClosed
	case <-t.C:
		return fmt.Errorf("%w: an earlier write is not settled", ErrUnavailable)
	}
}

// manage owns the session's connections from the first to Close.
func (s *session) manage(l *link, first chan<- error) {
	defer close(s.done)
	for {
		c := newConn(s, l)
		ctx, cancel := context.WithCancel(s.stopCtx)
		verified := make(chan error, 1)
		var carriers, qualifier sync.WaitGroup
		carriers.Go(c.receiver)
		carriers.Go(func() { s.sender(c) })
		qualifier.Go(func() { verified <- s.qualify(ctx, c) })
		err := s.watch(c, verified, first)
		cancel()
		s.lose(c, err)
		carriers.Wait()
		if s.onLoss != nil {
			s.onLoss()
		}
		// No buffer of a caller is in use any more.
		s.requeue()
		qualifier.Wait()
		s.mu.Lock()
		// Connections may be lost faster than a ticker ticks.
		s.keepTime()
		end := s.closing || !s.wasOpen
		switch {
		case c.opened && time.Since(c.since) >= steady:
			s.delay = 0
		case c.served:
			s.delay = min(s.delay, backoffMin)
		}
		s.mu.Unlock()
		if s.stopCtx.Err() != nil || end {
			break
		}
		first = nil
		if l = s.relogin(err); l == nil {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.open = false
	for s.queue.head != nil {
		c := s.queue.head
		s.queue.remove(c)
		s.bury(c, ErrClosed)
	}
}

// qualify checks on a new connection that the logical unit is the one it was,
// then opens the session to all.
func (s *session) qualify(ctx context.Context, c *conn) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.LoginTimeout)
	defer cancel()
	if err := s.verify(ctx, s); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if s.wasOpen && s.onLoss != nil {
		s.onLoss()
	}
	s.open, s.wasOpen, s.zombies, s.downErr = true, true, 0, nil
	c.opened = true
	close(s.upCh)
	s.wakeSender()
	return nil
}

// watch keeps time for a connection until it is lost; it gives the reason.
// first, unless nil, is told once whether the session could be opened.
func (s *session) watch(c *conn, verified <-chan error, first chan<- error) (err error) {
	defer func() {
		if first != nil {
			first <- err
		}
	}()
	ticker := time.NewTicker(s.period)
	defer ticker.Stop()
	quiet, heard := time.Duration(0), c.heard.Load()
	for {
		select {
		case <-s.stopCtx.Done():
			return ErrClosed
		case <-c.lost:
			s.mu.Lock()
			defer s.mu.Unlock()
			return c.err
		case err := <-verified:
			verified = nil
			if err != nil {
				return err
			}
			if first != nil {
				first <- nil
				first = nil
			}
		case <-ticker.C:
			if n := c.heard.Load(); n != heard {
				heard, quiet = n, 0
			} else {
				quiet += s.period
			}
			if quiet >= 2*s.opts.PingInterval {
				return fmt.Errorf("%w: no answer for %v", ErrUnavailable, quiet)
			}
			s.mu.Lock()
			c.summon()
			if quiet >= s.opts.PingInterval && !c.pinging {
				c.pinging, c.ping = true, true
				s.wakeSender()
			}
			late := s.keepTime()
			if late == nil {
				late = c.leave()
			}
			s.mu.Unlock()
			if late != nil {
				return late
			}
		}
	}
}

// leave keeps time for a connection that the target asked to end. The lock is held.
func (c *conn) leave() error {
	switch now := time.Now(); {
	case !c.leaving || now.Before(c.drainBy):
	case now.After(c.leaveBy):
		return fmt.Errorf("%w: the target asked for a logout and does not answer it", ErrUnavailable)
	case !c.left:
		c.logOut()
		c.s.wakeSender()
	}
	return nil
}

// keepTime reads the clock and gives up commands whose time is over. The lock is held.
// It returns an error when the connection must go because the target does not confirm
// an abort.
func (s *session) keepTime() error {
	s.tick = int64(time.Since(s.start) / s.period)
	limit := s.tick - int64(s.opts.IOTimeout/s.period) - 1
	timeout := func() error {
		if s.downErr != nil {
			return s.downErr
		}
		return fmt.Errorf("%w: no answer within %v", ErrUnavailable, s.opts.IOTimeout)
	}
	for c := s.queue.head; c != nil; {
		next := c.next
		if c.born < limit {
			s.queue.remove(c)
			s.bury(c, timeout())
		}
		c = next
	}
	abortLimit := s.tick - int64(abortWait/s.period) - 1
	for c := s.flight.head; c != nil; c = c.next {
		if c.aborting && c.abortTick < abortLimit {
			return fmt.Errorf("%w: no answer to ABORT TASK within %v", ErrUnavailable, abortWait)
		}
		if !c.aborting && c.born < limit {
			s.abort(c, timeout())
		}
	}
	return nil
}

// lose marks c as gone: nothing more is sent on it.
func (s *session) lose(c *conn, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.fail(err)
	c.w.Close(err)
	if s.open {
		s.open = false
		s.upCh = make(chan struct{})
	}
	s.downErr = err
	if !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrClosed) {
		s.downErr = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
}

// requeue takes the commands of a lost connection, whose goroutines have ended,
// back to the head of the queue.
func (s *session) requeue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.c = nil
	for s.flight.tail != nil {
		c := s.flight.tail
		s.flight.remove(c)
		switch {
		case c.aborting:
			s.bury(c, c.abortErr)
		case c.urgent:
			s.bury(c, s.downErr)
		default:
			c.Received, c.Residual, c.Overflow, c.Sense = 0, 0, false, nil
			s.queue.pushFront(c)
		}
	}
	for c := s.queue.head; c != nil; {
		next := c.next
		if c.urgent {
			s.queue.remove(c)
			s.bury(c, s.downErr)
		}
		c = next
	}
}

// relogin tries until it succeeds or the session is closed; then it gives nil.
func (s *session) relogin(why error) *link {
	level := logrus.DebugLevel
	if time.Since(s.told) >= newsEvery {
		level, s.told = logrus.WarnLevel, time.Now()
	}
	s.log.WithError(why).Log(level, "iSCSI session lost; logging in again")
	for attempt := 1; ; attempt++ {
		// A login after which the connection did no good counts as a failure too.
		if s.delay > 0 {
			pause, cancel := context.WithTimeout(s.stopCtx, s.delay)
			s.tickUntil(pause.Done())
			cancel()
		}
		if s.stopCtx.Err() != nil {
			return nil
		}
		s.delay = min(max(2*s.delay, backoffMin), backoffMax)
		var l *link
		var err error
		tried := make(chan struct{})
		go func() {
			defer close(tried)
			l, err = s.login(s.stopCtx)
		}()
		s.tickUntil(tried)
		if err == nil {
			if level == logrus.WarnLevel {
				level = logrus.InfoLevel
			}
			s.log.WithField("attempts", attempt).Log(level, "iSCSI target is back")
			return l
		}
		if s.stopCtx.Err() != nil {
			return nil
		}
		s.mu.Lock()
		if attempt == 1 {
			level = logrus.WarnLevel
			s.log.WithError(err).Warn("iSCSI login failed; trying on")
		}
		s.downErr = err
		if !errors.Is(err, ErrUnavailable) {
			s.downErr = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		s.mu.Unlock()
	}
}

// tickUntil lets commands expire while there is no connection.
func (s *session) tickUntil(end <-chan struct{}) {
	ticker := time.NewTicker(s.period)
	defer ticker.Stop()
	for {
		select {
		case <-end:
			return
		case <-ticker.C:
			s.mu.Lock()
			s.keepTime()
			s.mu.Unlock()
		}
	}
}

// close ends the session: commands in flight get a moment to finish, then
// those that are left fail with ErrClosed.
func (s *session) close() {
	s.mu.Lock()
	first := !s.closing
	s.closing = true
	c := s.c
	s.mu.Unlock()
	if first && c != nil {
		s.logout(c)
	}
	s.stop()
	<-s.done
}

// logout waits for what is in flight, then asks the target to end the session.
func (s *session) logout(c *conn) {
	deadline := time.NewTimer(logoutWait)
	defer deadline.Stop()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for {
		s.mu.Lock()
		if c.err != nil || !s.open {
			s.mu.Unlock()
			return
		}
		if s.flight.n == 0 && s.queue.n == 0 {
			c.logout = true
			s.wakeSender()
			s.mu.Unlock()
			break
		}
		s.mu.Unlock()
		select {
		case <-poll.C:
		case <-deadline.C:
			return
		case <-c.lost:
			return
		}
	}
	select {
	case <-c.loggedOut:
	case <-c.lost:
	case <-deadline.C:
	}
}

// reachable is nil while the session takes commands of all, otherwise why it does not.
func (s *session) reachable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing || s.closed:
		return ErrClosed
	case s.open && s.c.err == nil:
		return nil
	case s.open && errors.Is(s.c.err, ErrUnavailable):
		return s.c.err
	case s.downErr != nil:
		return s.downErr
	}
	return fmt.Errorf("%w: the session is being set up", ErrUnavailable)
}

// inFlight is how many commands are with the session.
func (s *session) inFlight() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.queue.n + s.flight.n
}

// wakeSender has the sender goroutine look for what there is to send, and sees to it
// that the answers are received. The lock is held.
func (s *session) wakeSender() {
	if s.c != nil && s.c.err == nil {
		s.c.summon()
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

var _ iscsi.Releaser = (*Command)(nil)
