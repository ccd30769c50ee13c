package lun

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ioChunk is the most that goes to the kernel in one call, in bytes, so that a
// long command notices the end of its context.
const ioChunk = 4 << 20

// file is a regular file as a logical unit. A logical block of zeroes without
// storage is a hole.
type file struct {
	locked
	path string
	info Info
	ro   bool

	// open is held shared by every command and exclusively by Close, so that no
	// command uses a descriptor that was closed and given out anew.
	open sync.RWMutex
	fd   int // -1 once closed

	punch    bool        // fallocate PUNCH_HOLE works
	failed   atomic.Bool // an fdatasync failed
	flushing sync.Mutex  // one fdatasync at a time
	nowait   atomic.Bool // preadv2 RWF_NOWAIT works
	whole    stripes     // keep blocks whole: a read sees none that is half written
}

func openFile(path string, opts Options) (Device, error) {
	bs := opts.BlockSize
	if bs < 512 || bs > 65536 || bs&(bs-1) != 0 {
		return nil, fmt.Errorf("open %s: block size %d is not a power of two from 512 to 65536", path, bs)
	}
	flags, lock := unix.O_RDWR, unix.LOCK_EX
	if opts.ReadOnly {
		flags, lock = unix.O_RDONLY, unix.LOCK_SH
	}
	fd, err := retryInt(func() (int, error) { return unix.Open(path, flags|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f := &file{path: path, fd: fd, ro: opts.ReadOnly}
	if err := f.setUp(bs, lock); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return f, nil
}

func (f *file) setUp(bs uint32, lock int) error {
	if err := retry(func() error { return unix.Flock(f.fd, lock|unix.LOCK_NB) }); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrInUse
		}
		return fmt.Errorf("lock %s: %w", f.path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return fmt.Errorf("stat %s: %w", f.path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("open %s: no longer a regular file", f.path)
	}
	if st.Size == 0 {
		return fmt.Errorf("open %s: the file is empty; give it the size of the logical unit first (truncate -s)", f.path)
	}
	if st.Size%int64(bs) != 0 {
		return fmt.Errorf("open %s: size of %d bytes is not a multiple of the block size %d", f.path, st.Size, bs)
	}
	f.punch = f.probePunch(st.Size)
	f.nowait.Store(true)
	f.info = Info{
		BlockSize:         bs,
		Blocks:            uint64(st.Size) / uint64(bs),
		ID:                fmt.Sprintf("file:%d:%d", st.Dev, st.Ino),
		Thin:              f.punch,
		UnmapZeroes:       f.punch,
		ReportsAllocation: f.punch,
		VolatileCache:     true,
		UnmapGranularity:  uint32(max(int64(st.Blksize)/int64(bs), 1)),
	}
	for n := uint32(st.Blksize) / bs; n > 1 && st.Blksize <= 4096; n /= 2 {
		f.info.PhysicalExponent++
	}
	return nil
}

// probePunch tells whether the file system can make holes. A hole past the end
// of the file touches no data and is refused all the same where holes are not
// known.
func (f *file) probePunch(size int64) bool {
	if f.ro {
		// fallocate needs a writable descriptor; a file system that knows holes
		// reports one at the end of the file, all others too, so nothing is lost by
		// trusting SEEK_HOLE.
		_, err := unix.Seek(f.fd, 0, unix.SEEK_HOLE)
		return err == nil
	}
	return retry(func() error {
		return unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size+1<<20, 1<<20)
	}) == nil
}

func (f *file) Info() Info { return f.info }

func (f *file) ReadAt(ctx context.Context, p []byte, start LBA) error {
	if err := f.enter(ctx, Extent{start, f.blocksOf(p)}, len(p)); err != nil {
		return err
	}
	defer f.open.RUnlock()
	off, n := int64(start)*int64(f.info.BlockSize), int64(len(p))
	f.whole.rlock(off, n)
	defer f.whole.runlock(off, n)
	return preadAll(ctx, f.fd, p, start, &f.info)
}

func (f *file) WriteAt(ctx context.Context, p []byte, start LBA) error {
	if err := f.enterWrite(ctx, Extent{start, f.blocksOf(p)}, len(p)); err != nil {
		return err
	}
	defer f.open.RUnlock()
	return f.write(ctx, p, start)
}

// write keeps reads from seeing a block that is half written.
func (f *file) write(ctx context.Context, p []byte, start LBA) error {
	off, n := int64(start)*int64(f.info.BlockSize), int64(len(p))
	f.whole.lock(off, n)
	defer f.whole.unlock(off, n)
	return pwriteAll(ctx, f.fd, p, start, &f.info)
}

// TryReadAt implements Prober: it reads what the page cache holds.
func (f *file) TryReadAt(p []byte, start LBA) (bool, error) {
	if !f.nowait.Load() {
		return false, nil
	}
	if err := f.enter(context.Background(), Extent{start, f.blocksOf(p)}, len(p)); err != nil {
		return false, err
	}
	defer f.open.RUnlock()
	off := int64(start) * int64(f.info.BlockSize)
	if !f.whole.tryRLock(off, int64(len(p))) {
		return false, nil
	}
	defer f.whole.runlock(off, int64(len(p)))
	n, err := preadNoWait(f.fd, p, off)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		f.nowait.Store(false)
	}
	// Any error shows again, with its place, in the ReadAt that follows.
	return err == nil && n == len(p), nil
}

func (f *file) Flush(ctx context.Context) error {
	if err := f.enter(ctx, Extent{}, 0); err != nil {
		return err
	}
	defer f.open.RUnlock()
	if f.ro {
		return nil
	}
	// The kernel tells of a failure once: of two at a time the other one would be fine.
	f.flushing.Lock()
	defer f.flushing.Unlock()
	// After a failed fdatasync the kernel may have dropped what it could not
	// write, and a second call would say that all is well.
	if f.failed.Load() {
		return fmt.Errorf("flush %s: an earlier flush failed: %w", f.path, writeSense(unix.EIO, 0, false))
	}
	if err := retry(func() error { return unix.Fdatasync(f.fd) }); err != nil {
		f.failed.Store(true)
		return fmt.Errorf("flush %s: %w", f.path, writeSense(err, 0, false))
	}
	return nil
}

func (f *file) Unmap(ctx context.Context, e Extent) error {
	if !f.punch {
		if err := f.enter(ctx, e, 0); err != nil {
			return err
		}
		f.open.RUnlock()
		return fmt.Errorf("unmap %s: %w", f.path, ErrUnsupported)
	}
	return f.WriteZeroes(ctx, e)
}

func (f *file) WriteZeroes(ctx context.Context, e Extent) error {
	if err := f.enterWrite(ctx, e, 0); err != nil {
		return err
	}
	defer f.open.RUnlock()
	if e.Empty() {
		return nil
	}
	off, n := int64(e.Start)*int64(f.info.BlockSize), int64(f.info.Bytes(e))
	modes := [...]uint32{unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE}
	for i, mode := range modes {
		if i == 0 && !f.punch {
			continue
		}
		f.whole.lock(off, n)
		err := retry(func() error { return unix.Fallocate(f.fd, mode, off, n) })
		f.whole.unlock(off, n)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("zero %v of %s: %w", e, f.path, writeSense(err, e.Start, true))
		}
	}
	return writeZeroBuffers(ctx, e, &f.info, func(p []byte, at LBA) error { return f.write(ctx, p, at) })
}

// extentsPerCall bounds what one Extents answers and the time it takes.
const extentsPerCall = 1024

func (f *file) Extents(ctx context.Context, e Extent) ([]Allocation, error) {
	if err := f.enter(ctx, e, 0); err != nil {
		return nil, err
	}
	defer f.open.RUnlock()
	if e.Empty() {
		return nil, nil
	}
	if !f.info.ReportsAllocation {
		return []Allocation{{Extent: e, Allocated: true}}, nil
	}
	bs := int64(f.info.BlockSize)
	end := int64(e.End()) * bs
	var out []Allocation
	for at := e.Start; at < e.End() && len(out) < extentsPerCall; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		off := int64(at) * bs
		data, err := unix.Seek(f.fd, off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			data = end
		case err != nil:
			return nil, fmt.Errorf("map %s: %w", f.path, readSense(err, at, true))
		}
		// A block that holds any data is allocated, so the run of holes ends at the
		// block the data begins in.
		if hole := LBA(min(data, end) / bs); hole > at {
			out = appendRun(out, Allocation{Extent: Extent{at, uint64(hole - at)}})
			at = hole
			continue
		}
		next, err := unix.Seek(f.fd, data, unix.SEEK_HOLE)
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return nil, fmt.Errorf("map %s: %w", f.path, readSense(err, at, true))
		}
		if err != nil || next <= data {
			next = data + bs // the file changed between the two calls
		}
		to := LBA((min(next, end) + bs - 1) / bs)
		out = appendRun(out, Allocation{Extent: Extent{at, uint64(to - at)}, Allocated: true})
		at = to
	}
	return out, nil
}

func (f *file) Close() error {
	f.open.Lock()
	defer f.open.Unlock()
	if f.fd < 0 {
		return nil
	}
	fd := f.fd
	f.fd = -1
	// Closing gives the flock up too.
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close %s: %w", f.path, err)
	}
	return nil
}

func (f *file) blocksOf(p []byte) uint64 { return uint64(len(p)) / uint64(f.info.BlockSize) }

// enter admits a command on e, with n bytes of data, and holds open shared.
func (f *file) enter(ctx context.Context, e Extent, n int) error {
	f.open.RLock()
	err := admit(ctx, &f.info, e, n)
	if f.fd < 0 {
		err = ErrClosed
	}
	if err != nil {
		f.open.RUnlock()
		return fmt.Errorf("%s: %w", f.path, err)
	}
	return nil
}

func (f *file) enterWrite(ctx context.Context, e Extent, n int) error {
	if err := f.enter(ctx, e, n); err != nil {
		return err
	}
	if f.ro {
		f.open.RUnlock()
		return fmt.Errorf("%s: %w", f.path, errWriteProtected())
	}
	return nil
}

func appendRun(out []Allocation, a Allocation) []Allocation {
	if n := len(out); n > 0 && out[n-1].Allocated == a.Allocated && out[n-1].End() == a.Start {
		out[n-1].Blocks += a.Blocks
		return out
	}
	return append(out, a)
}

// unwrapPath makes "path: reason" of an os error.
func unwrapPath(err error, path string) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return fmt.Errorf("%s: %w", path, pe.Err)
	}
	return err
}
