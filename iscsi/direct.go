package iscsi

import (
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"
)

// direct reads from and writes to a socket without telling the scheduler of each system
// call. The sockets of package net never block, so there is nothing for the
// scheduler to do in between; but each call that it is told of after an idle moment
// wakes its monitor thread, which costs more than the call. Where a call would block,
// the goroutine waits in the runtime's poller as always. Deadlines and Close work as on
// the net.Conn.
type direct struct {
	raw syscall.RawConn

	in, out side
	vectors []syscall.Iovec
}

// side is a read or a write under way; each is one goroutine's at a time.
type side struct {
	p   []byte
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
	d.in.do, d.out.do = d.in.read, d.out.write
	return d
}

// Read implements io.Reader.
func (d *direct) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s := &d.in
	s.p, s.n, s.err = p, 0, nil
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
		n, e := rawRead(fd, s.p)
		switch e {
		case 0:
			s.n = n
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			s.err = e
			return true
		}
	}
}

// writeAll writes the segments, which it does not change, one after the other.
func (d *direct) writeAll(segs ...[]byte) error {
	d.vectors = d.vectors[:0]
	for _, p := range segs {
		if len(p) > 0 {
			d.vectors = append(d.vectors, syscall.Iovec{Base: unsafe.SliceData(p), Len: uint64(len(p))})
		}
	}
	s := &d.out
	s.iov, s.err = d.vectors, nil
	err := d.raw.Write(s.do)
	s.iov = nil
	// The vectors keep what they point to; let go of it.
	clear(d.vectors)
	if err == nil && s.err != nil {
		err = os.NewSyscallError("writev", s.err)
	}
	return err
}

// write goes on until all is written or the socket takes no more.
func (s *side) write(fd uintptr) bool {
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
