package lun

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// block is a block device of this host as a logical unit, used with O_DIRECT so
// that what another host or path wrote is seen, and so that a write that
// returned has reached the device.
type block struct {
	locked
	path string
	info Info
	ro   bool

	open sync.RWMutex // as in file
	fd   int          // -1 once closed

	scsi    bool        // SG_IO reaches a SCSI logical unit whose LBAs are ours
	punch   bool        // zeroing by deallocation works
	discard bool        // BLKDISCARD works
	failed  atomic.Bool // an fsync failed
	// align is what memory and length of O_DIRECT must be a multiple of, in bytes.
	align  int
	bounce sync.Pool // *[]byte of bounceSize, aligned
}

// bounceSize is the aligned buffer for callers whose own is not, in bytes.
const bounceSize = 1 << 20

func openBlock(path string, opts Options) (Device, error) {
	// O_EXCL on a block device is refused while it is mounted, in a RAID or held
	// the same way by another process.
	flags := unix.O_RDWR | unix.O_EXCL
	if opts.ReadOnly {
		flags = unix.O_RDONLY
	}
	fd, err := retryInt(func() (int, error) { return unix.Open(path, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0) })
	if errors.Is(err, unix.EBUSY) {
		err = ErrInUse
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	b := &block{path: path, fd: fd, ro: opts.ReadOnly}
	b.bounce.New = func() any { p := alignedBuffer(bounceSize); return &p }
	if err := b.setUp(); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return b, nil
}

func (b *block) setUp() error {
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return errors.New("no longer a block device")
	}
	bs, err := unix.IoctlGetInt(b.fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("ask for the block size: %w", err)
	}
	var size uint64
	if err := ioctlPtr(b.fd, unix.BLKGETSIZE64, unsafe.Pointer(&size)); err != nil {
		return fmt.Errorf("ask for the size: %w", err)
	}
	if bs < 512 || bs > 65536 || bs&(bs-1) != 0 {
		return fmt.Errorf("block size of %d bytes is not a power of two from 512 to 65536", bs)
	}
	if size == 0 || size%uint64(bs) != 0 {
		return fmt.Errorf("size of %d bytes is not a multiple of the block size %d", size, bs)
	}
	major, minor := unix.Major(st.Rdev), unix.Minor(st.Rdev)
	sys := fmt.Sprintf("/sys/dev/block/%d:%d", major, minor)
	b.info = Info{
		BlockSize:     uint32(bs),
		Blocks:        size / uint64(bs),
		ID:            fmt.Sprintf("block:%d:%d", major, minor),
		VolatileCache: sysAttr(sys, "queue/write_cache") != "write through",
	}
	if phys, err := unix.IoctlGetInt(b.fd, unix.BLKPBSZGET); err == nil {
		for n := phys / bs; n > 1 && b.info.PhysicalExponent < 15; n /= 2 {
			b.info.PhysicalExponent++
		}
	}
	b.align = max(bs, directAlign)
	if n, err := strconv.Atoi(sysAttr(sys, "queue/dma_alignment")); err == nil && n >= 0 && n < directAlign {
		b.align = max(bs, n+1)
	}
	b.identify(sys)
	b.discard = sysNumber(sys, "queue/discard_max_bytes") > 0
	b.punch = b.discard && sysNumber(sys, "queue/write_zeroes_max_bytes") > 0
	b.info.Thin = b.discard
	b.info.UnmapZeroes = b.punch
	b.info.UnmapGranularity = uint32(sysNumber(sys, "queue/discard_granularity") / uint64(bs))
	if b.scsi {
		b.info.ReportsAllocation = reportsAllocation(&b.info, func(cdb, answer []byte) (int, error) { return sgRead(b.fd, cdb, answer) })
	}
	return nil
}

// identify takes the names of the device from what the kernel has read of it.
func (b *block) identify(sys string) {
	// A partition has a number of its own and another LBA 0 than its disk.
	partition := sysAttr(sys, "partition") != ""
	dev := filepath.Join(sys, "device")
	if partition {
		return
	}
	if mpath, ok := strings.CutPrefix(sysAttr(sys, "dm/uuid"), "mpath-"); ok {
		// The multipath UUID is the device type digit of scsi_id and the number.
		switch {
		case strings.HasPrefix(mpath, "3"):
			b.info.ID = "naa." + mpath[1:]
		case strings.HasPrefix(mpath, "2"):
			b.info.ID = "eui." + mpath[1:]
		}
		b.info.Identity = mapIdentity(sys)
		return
	}
	b.info.Vendor, b.info.Product = sysAttr(dev, "vendor"), sysAttr(dev, "model")
	b.info.Revision = sysAttr(dev, "rev")
	if page, err := os.ReadFile(filepath.Join(dev, "vpd_pg80")); err == nil {
		b.info.Serial = parseSerial(page)
	} else {
		b.info.Serial = sysAttr(dev, "serial")
	}
	if page, err := os.ReadFile(filepath.Join(dev, "vpd_pg83")); err == nil {
		if id := parseDesignator(page); id != "" {
			b.info.ID = id
		}
	} else if wwid := sysAttr(sys, "wwid"); wwid != "" {
		b.info.ID = wwid
	}
	b.scsi = sysAttr(dev, "scsi_level") != ""
	if b.scsi {
		b.info.Identity = deviceIdentity(dev)
	}
}

func (b *block) Info() Info { return b.info }

func (b *block) ReadAt(ctx context.Context, p []byte, start LBA) error {
	if err := b.enter(ctx, Extent{start, uint64(len(p)) / uint64(b.info.BlockSize)}, len(p)); err != nil {
		return err
	}
	defer b.open.RUnlock()
	if b.aligned(p) {
		return preadAll(ctx, b.fd, p, start, &b.info)
	}
	return b.bounced(p, start, func(buf, part []byte, at LBA) error {
		if err := preadAll(ctx, b.fd, buf, at, &b.info); err != nil {
			return err
		}
		copy(part, buf)
		return nil
	})
}

func (b *block) WriteAt(ctx context.Context, p []byte, start LBA) error {
	if err := b.enterWrite(ctx, Extent{start, uint64(len(p)) / uint64(b.info.BlockSize)}, len(p)); err != nil {
		return err
	}
	defer b.open.RUnlock()
	if b.aligned(p) {
		return pwriteAll(ctx, b.fd, p, start, &b.info)
	}
	return b.bounced(p, start, func(buf, part []byte, at LBA) error {
		copy(buf, part)
		return pwriteAll(ctx, b.fd, buf, at, &b.info)
	})
}

func (b *block) Flush(ctx context.Context) error {
	if err := b.enter(ctx, Extent{}, 0); err != nil {
		return err
	}
	defer b.open.RUnlock()
	if b.ro {
		return nil
	}
	if b.failed.Load() {
		return fmt.Errorf("flush %s: an earlier flush failed: %w", b.path, writeSense(unix.EIO, 0, false))
	}
	if err := retry(func() error { return unix.Fsync(b.fd) }); err != nil {
		b.failed.Store(true)
		return fmt.Errorf("flush %s: %w", b.path, writeSense(err, 0, false))
	}
	return nil
}

func (b *block) Unmap(ctx context.Context, e Extent) error {
	if !b.discard {
		if err := b.enter(ctx, e, 0); err != nil {
			return err
		}
		b.open.RUnlock()
		return fmt.Errorf("unmap %s: %w", b.path, ErrUnsupported)
	}
	if b.punch {
		return b.WriteZeroes(ctx, e)
	}
	if err := b.enterWrite(ctx, e, 0); err != nil {
		return err
	}
	defer b.open.RUnlock()
	return b.inSteps(ctx, e, func(off, n uint64) error {
		return ioctlPtr(b.fd, unix.BLKDISCARD, unsafe.Pointer(&[2]uint64{off, n}))
	})
}

func (b *block) WriteZeroes(ctx context.Context, e Extent) error {
	if err := b.enterWrite(ctx, e, 0); err != nil {
		return err
	}
	defer b.open.RUnlock()
	return b.inSteps(ctx, e, func(off, n uint64) error {
		if b.punch {
			// On a block device this zeroes by deallocation, and fails rather than
			// leave other data where it cannot.
			err := unix.Fallocate(b.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
			if !errors.Is(err, unix.EOPNOTSUPP) {
				return err
			}
		}
		return ioctlPtr(b.fd, unix.BLKZEROOUT, unsafe.Pointer(&[2]uint64{off, n}))
	})
}

// inSteps does a command of the kernel on e, at most 1 GiB at a time.
func (b *block) inSteps(ctx context.Context, e Extent, do func(off, n uint64) error) error {
	step := uint64(1<<30) / uint64(b.info.BlockSize)
	for at := e.Start; at < e.End(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		part := Extent{at, min(step, uint64(e.End()-at))}
		err := retry(func() error { return do(uint64(at)*uint64(b.info.BlockSize), b.info.Bytes(part)) })
		if err != nil {
			return fmt.Errorf("zero or discard %v of %s: %w", part, b.path, writeSense(err, at, true))
		}
		at = part.End()
	}
	return nil
}

func (b *block) Extents(ctx context.Context, e Extent) ([]Allocation, error) {
	if err := b.enter(ctx, e, 0); err != nil {
		return nil, err
	}
	defer b.open.RUnlock()
	if e.Empty() {
		return nil, nil
	}
	if !b.info.ReportsAllocation {
		return []Allocation{{Extent: e, Allocated: true}}, nil
	}
	runs, err := b.lbaStatus(e)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", b.path, err)
	}
	return runs, nil
}

func (b *block) lbaStatus(e Extent) ([]Allocation, error) {
	return askLBAStatus(e, func(cdb, answer []byte) (int, error) { return sgRead(b.fd, cdb, answer) })
}

// reportsAllocation tells whether a SCSI device says which of its blocks are
// deallocated, and reads those as zeroes: a device without LBPRZ may give anything.
func reportsAllocation(i *Info, read func(cdb, answer []byte) (int, error)) bool {
	var cdb [16]byte
	answer := make([]byte, 32)
	readCapacity16CDB(&cdb, len(answer))
	n, err := read(cdb[:], answer)
	if err != nil {
		return false
	}
	capa, err := parseCapacity16(answer[:n])
	if err != nil || !capa.provisioned || !capa.readsZeroes || capa.blocks != i.Blocks || capa.blockSize != i.BlockSize {
		return false
	}
	_, err = askLBAStatus(Extent{Blocks: min(i.Blocks, 1<<31)}, read)
	return err == nil
}

// askLBAStatus gives the runs at the beginning of e.
func askLBAStatus(e Extent, read func(cdb, answer []byte) (int, error)) ([]Allocation, error) {
	var cdb [16]byte
	answer := make([]byte, 8+16*256)
	getLBAStatusCDB(&cdb, e.Start, len(answer))
	n, err := read(cdb[:], answer)
	if err != nil {
		return nil, err
	}
	return parseLBAStatus(answer[:n], e)
}

func (b *block) Close() error {
	b.open.Lock()
	defer b.open.Unlock()
	if b.fd < 0 {
		return nil
	}
	fd := b.fd
	b.fd = -1
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close %s: %w", b.path, err)
	}
	return nil
}

func (b *block) enter(ctx context.Context, e Extent, n int) error {
	b.open.RLock()
	err := admit(ctx, &b.info, e, n)
	if b.fd < 0 {
		err = ErrClosed
	}
	if err != nil {
		b.open.RUnlock()
		return fmt.Errorf("%s: %w", b.path, err)
	}
	return nil
}

func (b *block) enterWrite(ctx context.Context, e Extent, n int) error {
	if err := b.enter(ctx, e, n); err != nil {
		return err
	}
	if b.ro {
		b.open.RUnlock()
		return fmt.Errorf("%s: %w", b.path, errWriteProtected())
	}
	return nil
}

func (b *block) aligned(p []byte) bool {
	return len(p) == 0 || int(uintptr(unsafe.Pointer(&p[0])))&(b.align-1) == 0
}

// bounced goes through p in parts, each with an aligned buffer of its length.
func (b *block) bounced(p []byte, start LBA, do func(buf, part []byte, at LBA) error) error {
	buf := b.bounce.Get().(*[]byte)
	defer b.bounce.Put(buf)
	for done := 0; done < len(p); {
		part := p[done:min(done+bounceSize, len(p))]
		if err := do((*buf)[:len(part)], part, start+LBA(done/int(b.info.BlockSize))); err != nil {
			return err
		}
		done += len(part)
	}
	return nil
}

func ioctlPtr(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func sysAttr(dir, name string) string {
	p, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(p))
}

func sysNumber(dir, name string) uint64 {
	n, err := strconv.ParseUint(sysAttr(dir, name), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
