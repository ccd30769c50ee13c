package iscsi

import (
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// direct reads from and writes to a socket without telling the scheduler of each system
// call. The sockets of package net never block, so there is nothing for the
// scheduler to do in between; but each call that it is told of after an idle moment
// wakes its monitor thread, which costs more than the call. Where a call would block,
// the goroutine waits in the runtime's poller as always. Deadlines and Close work as on
// the net.Conn.
type direct struct {
	raw  syscall.RawConn
	sent atomic.Uint64 // bytes written

	in, out side
}

// side is a read or a write under way; each is one goroutine's at a time.
type side struct {
	p   []byte
	of  *Reader // whose buffer p is; nil where p is somebody else's
	iov []syscall.Iovec
	n   int
	err error
	do  func(fd uintptr) bool
}

// newDirect gives nil where s is no socket.
func newDirect(s any) *direct {
	if _, ok := s.(*net.TCPConn); !ok {
		return nil
	}
	raw, err := s.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil
	}
	d := &direct{raw: raw}
	d.in.do = d.in.read
	d.out.do = func(fd uintptr) bool { return d.out.write(fd, &d.sent) }
	return d
}

// Read implements io.Reader.
func (d *direct) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	d.in.p = p
	return d.read()
}

// readFor reads into the Reader's buffer, which the Reader has only once there is
// something to put into it.
func (d *direct) readFor(r *Reader) (int, error) {
	d.in.of = r
	n, err := d.read()
	d.in.of = nil
	return n, err
}

func (d *direct) read() (int, error) {
	s := &d.in
	s.n, s.err = 0, nil
	err := d.raw.Read(s.do)
	s.p = nil
	switch {
	case err != nil:
		return 0, err
	case s.err != nil:
		return 0, os.NewSyscallError("read", s.err)
	case s.n == 0:
		return 0, io.EOF
	}
	return s.n, nil
}

func (s *side) read(fd uintptr) bool {
	for {
		if s.of != nil {
			s.p = s.of.room()
		}
		n, e := rawRead(fd, s.p)
		switch e {
		case 0:
			s.n = n
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			if s.of != nil {
				s.of.rest()
				s.p = nil
			}
			return false
		default:
			s.err = e
			return true
		}
	}
}

// vector appends p to what writeAll is to write.
func vector(to []syscall.Iovec, p []byte) []syscall.Iovec {
	if len(p) == 0 {
		return to
	}
	return append(to, syscall.Iovec{Base: unsafe.SliceData(p), Len: uint64(len(p))})
}

// writeAll writes what the vectors point to, one after the other; it uses them up.
func (d *direct) writeAll(vectors []syscall.Iovec) error {
	s := &d.out
	s.iov, s.err = vectors, nil
	err := d.raw.Write(s.do)
	s.iov = nil
	if err == nil && s.err != nil {
		err = os.NewSyscallError("writev", s.err)
	}
	return err
}

// queued is how many of the bytes written the other side did not acknowledge yet; 0 where
// that is not known.
func (d *direct) queued() uint64 {
	n := 0
	d.raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return uint64(max(n, 0))
}

// write goes on until all is written or the socket takes no more.
func (s *side) write(fd uintptr, sent *atomic.Uint64) bool {
	for len(s.iov) > 0 {
		beforeWrite()
		n, _, e := syscall.RawSyscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(s.iov))), uintptr(min(len(s.iov), maxVectors)))
		switch e {
		case 0:
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return false
		default:
			s.err = e
			return true
		}
		sent.Add(uint64(n))
		for n > 0 {
			v := &s.iov[0]
			if left := uintptr(v.Len); n < left {
				v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
				v.SetLen(int(left - n))
				break
			}
			n -= uintptr(v.Len)
			s.iov = s.iov[1:]
		}
	}
	return true
}

// maxVectors is IOV_MAX of the kernel.
const maxVectors = 1024
