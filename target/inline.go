package target

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A command that is the only one of its session runs on the goroutine that read it: to
// hand it to a worker and back costs more than the command. Whoever does so still
// has the role of the reader, and must not keep it from a PDU that comes
// meanwhile (an abort, a ping, the next command). So the server's watcher looks at the
// socket for as long, and when something arrives gives the role to a new goroutine;
// the old one ends with its command.

// lonelyAfter is how many commands must have come one at a time, since several were
// last in flight, before they run on the reader.
const lonelyAfter = 16

// errHandedOver ends a reader that is the reader no more.
var errHandedOver = errors.New("another goroutine reads")

// watcher tells connections that run a command on their reader when something arrives.
type watcher struct {
	epoll int
	file  *os.File // owns epoll
	ended chan struct{}

	mu    sync.Mutex // protects what follows
	conns map[int32]*conn
	last  int32
}

func newWatcher() (*watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return nil, fmt.Errorf("target: epoll: %w", err)
	}
	return &watcher{epoll: fd, file: os.NewFile(uintptr(fd), "epoll"), ended: make(chan struct{}), conns: map[int32]*conn{}}, nil
}

// run tells connections until the watcher is closed.
func (w *watcher) run() {
	defer close(w.ended)
	raw, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	var events [64]unix.EpollEvent
	// The function asks and is asked again when the runtime finds the epoll readable.
	raw.Read(func(fd uintptr) bool {
		for {
			n, err := unix.EpollWait(int(fd), events[:], 0)
			if err != nil && err != unix.EINTR {
				return true
			}
			if n == 0 {
				return false
			}
			for _, e := range events[:max(n, 0)] {
				w.mu.Lock()
				c := w.conns[e.Fd]
				w.mu.Unlock()
				if c != nil {
					c.handOver()
				}
			}
		}
	})
}

// close ends run. No connection uses the watcher any more.
func (w *watcher) close() {
	w.file.Close()
	<-w.ended
}

// watch is a connection's place at the watcher.
type watch struct {
	w     *watcher
	raw   syscall.RawConn
	event unix.EpollEvent
	op    int
	err   error
	ctl   func(fd uintptr)
}

// watched enters c with the watcher. Without it c runs no command on its reader.
func (c *conn) watched(w *watcher) {
	sc, ok := c.nc.(syscall.Conn)
	if !ok || w == nil {
		return
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return
	}
	w.mu.Lock()
	for w.last++; w.conns[w.last] != nil; w.last++ {
	}
	id := w.last
	w.conns[id] = c
	w.mu.Unlock()
	x := &watch{w: w, raw: raw, op: unix.EPOLL_CTL_ADD}
	x.event.Fd = id
	x.ctl = func(fd uintptr) { x.err = unix.EpollCtl(w.epoll, x.op, int(fd), &x.event) }
	c.watch = x
	if x.set(0) {
		x.op = unix.EPOLL_CTL_MOD
		return
	}
	c.unwatched()
}

// unwatched takes c off the watcher; the epoll forgets the socket when it is closed.
func (c *conn) unwatched() {
	if c.watch == nil {
		return
	}
	c.watch.w.mu.Lock()
	delete(c.watch.w.conns, c.watch.event.Fd)
	c.watch.w.mu.Unlock()
	c.watch = nil
}

// set has the watcher tell once of events, or of nothing.
func (x *watch) set(events uint32) bool {
	x.event.Events = events | unix.EPOLLONESHOT
	return x.raw.Control(x.ctl) == nil && x.err == nil
}

// lead reads as long as the connection lives, on this goroutine and on those that the
// role is handed over to, and gives what ended it.
func (c *conn) lead() error {
	c.follow()
	return <-c.readEnd
}

// follow is one reader.
func (c *conn) follow() {
	if err := c.guarded(c.receive); err != errHandedOver {
		c.readEnd <- err
	}
}

// handOver makes a new goroutine the reader, if the one that is runs a command.
func (c *conn) handOver() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.inline {
		return
	}
	c.inline = false
	c.reader++
	c.lonely = -lonelyAfter
	c.readers.Go(c.follow)
}

// alone takes the task that the PDU at hand made ready to run, if it is to run on the
// reader; otherwise the task goes to a worker. c.mu is held.
func (c *conn) alone() *task {
	t := c.ready
	c.ready = nil
	if t == nil {
		return nil
	}
	if c.watch == nil || c.lonely < 0 || len(c.tasks) > 1 || c.r.Ready() {
		c.enqueue(t)
		return nil
	}
	return t
}

// runHere runs the task on the reader and sends what there is to send. It gives
// errHandedOver when the caller is the reader no more.
func (c *conn) runHere(t *task) error {
	me := t.reader
	var err error
	if c.watch.set(unix.EPOLLIN | unix.EPOLLRDHUP) {
		if err := c.guarded(func() error { c.run(t); return nil }); err != nil {
			c.close(err)
		}
		c.mu.Lock()
		err = c.w.Flush()
	} else {
		c.mu.Lock()
		c.enqueue(t)
	}
	// Until here others can take the role: to send may wait for the initiator, which may
	// wait for us to read.
	handed := c.reader != me
	if !handed {
		c.inline = false
	}
	c.mu.Unlock()
	if err != nil {
		c.close(fmt.Errorf("send: %w", err))
	}
	if handed {
		return errHandedOver
	}
	c.watch.set(0)
	return nil
}
