package lun

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// admit is what every command checks first.
func admit(ctx context.Context, info *Info, e Extent, n int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if n%int(info.BlockSize) != 0 {
		return fmt.Errorf("%d bytes are not a multiple of the block size %d", n, info.BlockSize)
	}
	return info.Check(e)
}

// preadAll fills p from descriptor fd.
func preadAll(ctx context.Context, fd int, p []byte, start LBA, info *Info) error {
	off := int64(start) * int64(info.BlockSize)
	for done := 0; done < len(p); {
		if done > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		n, err := unix.Pread(fd, p[done:min(done+ioChunk, len(p))], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		at := start + LBA(done/int(info.BlockSize))
		if err != nil {
			return fmt.Errorf("read: %w", readSense(err, at, true))
		}
		if n == 0 {
			// The file was made shorter behind our back.
			return fmt.Errorf("read: end of file: %w", readSense(unix.EIO, at, true))
		}
		done += n
	}
	return nil
}

// pwriteAll writes p to descriptor fd.
func pwriteAll(ctx context.Context, fd int, p []byte, start LBA, info *Info) error {
	off := int64(start) * int64(info.BlockSize)
	for done := 0; done < len(p); {
		if done > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		n, err := unix.Pwrite(fd, p[done:min(done+ioChunk, len(p))], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		at := start + LBA(done/int(info.BlockSize))
		if err != nil {
			return fmt.Errorf("write: %w", writeSense(err, at, true))
		}
		if n == 0 {
			return fmt.Errorf("write: nothing taken: %w", writeSense(unix.EIO, at, true))
		}
		done += n
	}
	return nil
}

// preadNoWait is preadv2 with RWF_NOWAIT.
func preadNoWait(fd int, p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	iov := unix.Iovec{Base: &p[0]}
	iov.SetLen(len(p))
	// The offset travels as two longs; a 64-bit kernel takes the whole from the first.
	n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1,
		uintptr(off), uintptr(off>>32>>(wordBits-32)), unix.RWF_NOWAIT)
	runtime.KeepAlive(p)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

const wordBits = 32 << (^uint(0) >> 63)

// zeroChunk is the buffer for zeroes that must be written out, in bytes.
const zeroChunk = 256 << 10

// writeZeroBuffers writes zeroes to e where the device has no command for it.
func writeZeroBuffers(ctx context.Context, e Extent, info *Info, write func(p []byte, at LBA) error) error {
	per := uint64(max(zeroChunk/info.BlockSize, 1))
	buf := alignedBuffer(int(min(per, e.Blocks)) * int(info.BlockSize))
	for at := e.Start; at < e.End(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(per, uint64(e.End()-at))
		if err := write(buf[:n*uint64(info.BlockSize)], at); err != nil {
			return err
		}
		at += LBA(n)
	}
	return nil
}

// directAlign is the memory alignment that every device takes for O_DIRECT, in bytes.
const directAlign = 4096

func alignedBuffer(n int) []byte {
	b := make([]byte, n+directAlign)
	skip := 0
	if r := int(uintptr(unsafe.Pointer(&b[0])) % directAlign); r != 0 {
		skip = directAlign - r
	}
	return b[skip : skip+n : skip+n]
}

// Sense keys (SPC-4 4.5.6).
const (
	senseRecovered      = 0x1
	senseNotReady       = 0x2
	senseMediumError    = 0x3
	senseIllegalRequest = 0x5
	senseUnitAttention  = 0x6
	senseDataProtect    = 0x7
	senseAborted        = 0xb
)

// readSense turns an error of the kernel into sense, where it has one.
func readSense(err error, at LBA, valid bool) error {
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.EREMOTEIO) || errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EILSEQ) {
		// UNRECOVERED READ ERROR
		return &SenseError{Key: senseMediumError, ASC: 0x11, LBA: at, Valid: valid}
	}
	return goneErr(err)
}

// writeSense is readSense for writes.
func writeSense(err error, at LBA, valid bool) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		// SPACE ALLOCATION FAILED WRITE PROTECT (SBC-3 4.7.3.6)
		return &SenseError{Key: senseDataProtect, ASC: 0x27, ASCQ: 0x07, LBA: at, Valid: valid}
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EREMOTEIO), errors.Is(err, unix.ENODATA), errors.Is(err, unix.EILSEQ):
		// WRITE ERROR
		return &SenseError{Key: senseMediumError, ASC: 0x0c, LBA: at, Valid: valid}
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EPERM):
		return errWriteProtected()
	}
	return goneErr(err)
}

func goneErr(err error) error {
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if errors.Is(err, unix.EBADE) {
		return ErrConflict
	}
	return err
}

func errWriteProtected() error {
	return &SenseError{Key: senseDataProtect, ASC: 0x27}
}

func retry(do func() error) error {
	for {
		if err := do(); err != unix.EINTR {
			return err
		}
	}
}

func retryInt(do func() (int, error)) (int, error) {
	for {
		if n, err := do(); err != unix.EINTR {
			return n, err
		}
	}
}
