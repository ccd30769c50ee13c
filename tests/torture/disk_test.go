package torture

import (
	"context"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	page   = 4096
	sector = 512
	noPage = math.MaxInt64
)

// disk is a file system in memory that knows what was synced. Cut makes of it what a
// power loss leaves: what was synced, and of the rest nothing, or some sectors.
//
// A file's content and size are durable once it is synced, and so is the name that it was
// created with, as on ext4, XFS and btrfs; every other change of names is once its
// directory is synced. A file that was made shorter is so as a whole after the cut, or has
// all that it had before: a file system with a journal gives storage back with the size,
// and writes no zeroes in its place. (POSIX promises less of a new name. Badger relies on it for its
// tables.) The kernel's page cache stays on, so that files can be mapped; what it has not
// written back yet was never synced, and goes to files that nobody can reach any more.
type disk struct {
	dir string // where it is mounted

	mu   sync.Mutex // guards all below and every inode
	root *inode
	ino  uint64
	gen  uint64 // one for each cut
	lost int64  // pages that cuts took back
}

// inode is a file or a directory.
type inode struct {
	ino, gen uint64
	mode     uint32
	changed  time.Time
	dead     bool // of the time before the last cut

	data  []byte
	holes map[int64]bool // pages without storage
	// parent and name are where it was created; nil once that is durable.
	parent *inode
	name   string
	// before is what each page changed since the last sync held then, zeroes beyond
	// the end, nil for a hole; synced is the size then.
	before map[int64][]byte
	synced int64
	// short is the first page that was cut off since then; noPage where none was.
	short int64

	entries map[string]*inode // of a directory
	names   map[string]*inode // the entries as of the last sync
	log     []change          // made since
}

// change is a name that came or went; nil is gone. A rename is two at one instant.
type change map[string]*inode

// newDisk mounts an empty disk until the test ends.
func newDisk(t *testing.T) *disk {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("POWER LOSS IS NOT TESTED: there is no /dev/fuse here (load the module fuse, and run as root)")
	}
	dir, err := os.MkdirTemp("", "disk")
	must(t, err)
	d := &disk{dir: dir, ino: 1}
	d.root = d.newInode(syscall.S_IFDIR | 0o755)
	var zero time.Duration
	server, err := fs.Mount(dir, &node{d: d}, &fs.Options{
		EntryTimeout: &zero, AttrTimeout: &zero, NegativeTimeout: &zero,
		MountOptions: fuse.MountOptions{DirectMountStrict: true, ExplicitDataCacheControl: true, FsName: "disk", Name: "disk"},
	})
	if err != nil {
		os.Remove(dir)
		t.Skipf("POWER LOSS IS NOT TESTED: /dev/fuse cannot be mounted here: %v (run as root)", err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			return
		}
		os.Remove(dir)
	})
	return d
}

func (d *disk) newInode(mode uint32) *inode {
	d.ino++
	return &inode{
		ino: d.ino, gen: d.gen, mode: mode, changed: time.Now(), holes: map[int64]bool{}, before: map[int64][]byte{}, short: noPage,
		entries: map[string]*inode{}, names: map[string]*inode{},
	}
}

// put makes a directory of the root that is synced, with such files.
func (d *disk) put(name string, files map[string][]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	dir := d.newInode(syscall.S_IFDIR | 0o700)
	d.root.entries[name] = dir
	d.root.names[name] = dir
	for name, data := range files {
		f := d.newInode(syscall.S_IFREG | 0o600)
		f.data, f.synced = slices.Clone(data), int64(len(data))
		for at := int64(0); at < f.synced; at += page {
			if allZero(f.data[at:min(at+page, f.synced)]) {
				f.holes[at/page] = true
			}
		}
		dir.entries[name], dir.names[name] = f, f
	}
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// cut is a power loss, after which the disk is whole again with what was left. Half of
// them leave nothing that was not synced; after the others some of it is there, sector
// by sector. The processes that used the disk must have ended.
func (d *disk) cut(rng *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gen++
	keep := 0.0
	if rng.IntN(2) == 0 {
		keep = rng.Float64()
	}
	d.root = d.leave(d.root, rng, keep, map[*inode]*inode{})
}

// leave gives what a power loss leaves of an inode.
func (d *disk) leave(old *inode, rng *rand.Rand, keep float64, done map[*inode]*inode) *inode {
	if in := done[old]; in != nil {
		return in
	}
	old.dead = true
	in := &inode{ino: old.ino, gen: d.gen, mode: old.mode, changed: time.Now(), holes: old.holes, before: map[int64][]byte{}, short: noPage, entries: map[string]*inode{}}
	done[old] = in
	if old.isDir() {
		for _, c := range old.log[:int(keep*float64(len(old.log)+1))] {
			c.apply(old.names)
		}
		for name, child := range old.names {
			in.entries[name] = d.leave(child, rng, keep, done)
		}
		in.names = maps.Clone(in.entries)
		return in
	}
	in.data = old.data
	size, resized := old.synced, rng.Float64() < keep
	if resized {
		size = int64(len(old.data))
	}
	if grow := size - int64(len(in.data)); grow > 0 {
		in.data = append(in.data, make([]byte, grow)...)
	}
	numbers := slices.Sorted(maps.Keys(old.before)) // so that a seed has one outcome
	for _, n := range numbers {
		was := old.before[n]
		all, some := rng.Float64() < keep, rng.IntN(2) == 0
		if n >= old.short {
			if resized {
				was = nil // it was cut off: what is there now was written since
			} else {
				all = false
			}
		}
		if all && !some {
			continue
		}
		hole := was == nil
		if hole {
			was = make([]byte, page)
		}
		for s := int64(0); s < page; s += sector {
			at := n*page + s
			if at < int64(len(in.data)) && !(all && rng.IntN(2) == 0) {
				copy(in.data[at:min(at+sector, int64(len(in.data)))], was[s:])
			}
		}
		if hole = hole && !all; hole {
			in.holes[n] = true
		} else {
			delete(in.holes, n)
		}
		d.lost++
	}
	in.data = in.data[:size]
	in.synced = size
	return in
}

func (c change) apply(names map[string]*inode) {
	for name, in := range c {
		if in == nil {
			delete(names, name)
		} else {
			names[name] = in
		}
	}
}

func (in *inode) isDir() bool { return in.mode&syscall.S_IFMT == syscall.S_IFDIR }

// rename makes the change to a directory.
func (in *inode) rename(c change) {
	c.apply(in.entries)
	in.log = append(in.log, c)
	in.changed = time.Now()
}

func (in *inode) sync() {
	if in.isDir() {
		in.names, in.log = maps.Clone(in.entries), nil
		return
	}
	clear(in.before)
	in.synced, in.short = int64(len(in.data)), noPage
	if in.parent == nil {
		return
	}
	for _, c := range in.parent.log {
		made := c[in.name] == in
		delete(c, in.name)
		if made {
			in.parent.names[in.name] = in
			break
		}
	}
	in.parent = nil
}

// touch keeps what the pages of [from, to) held before they change.
func (in *inode) touch(from, to int64) {
	for n := from / page; n*page < to; n++ {
		if _, kept := in.before[n]; kept {
			continue
		}
		if in.holes[n] || n*page >= int64(len(in.data)) {
			in.before[n] = nil
			continue
		}
		was := make([]byte, page)
		copy(was, in.data[n*page:])
		in.before[n] = was
	}
}

func (in *inode) resize(size int64) {
	was := int64(len(in.data))
	if size < was {
		in.touch(size, was)
		in.short = min(in.short, (size+page-1)/page)
		clear(in.data[size:])
		in.data = in.data[:size]
		return
	}
	for n := (was + page - 1) / page; n*page < size; n++ {
		in.holes[n] = true
	}
	in.data = append(in.data, make([]byte, size-was)...)
}

func (in *inode) write(p []byte, at int64) {
	end := at + int64(len(p))
	if end > int64(len(in.data)) {
		in.resize(end)
	}
	in.touch(at, end)
	copy(in.data[at:], p)
	for n := at / page; n*page < end; n++ {
		delete(in.holes, n)
	}
}

// zero makes [at, end) read as zeroes; whole pages become holes.
func (in *inode) zero(at, end int64) {
	end = min(end, int64(len(in.data)))
	if at >= end {
		return
	}
	in.touch(at, end)
	clear(in.data[at:end])
	for n := (at + page - 1) / page; (n+1)*page <= end; n++ {
		in.holes[n] = true
	}
}

// node is an inode as the kernel sees it.
type node struct {
	fs.Inode
	d  *disk
	in *inode // nil for the root, which changes at each cut
}

func (n *node) inode() *inode {
	if n.in == nil {
		return n.d.root
	}
	return n.in
}

func (n *node) child(ctx context.Context, in *inode, out *fuse.EntryOut) *fs.Inode {
	in.attr(&out.Attr)
	return n.NewInode(ctx, &node{d: n.d, in: in}, fs.StableAttr{Mode: in.mode & syscall.S_IFMT, Ino: in.ino, Gen: in.gen})
}

func (in *inode) attr(a *fuse.Attr) {
	a.Ino, a.Mode, a.Nlink, a.Blksize = in.ino, in.mode, 1, page
	a.Size = uint64(len(in.data))
	a.Blocks = uint64((len(in.data)+page-1)/page-len(in.holes)) * (page / 512)
	a.SetTimes(&in.changed, &in.changed, &in.changed)
}

func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	in := n.inode().entries[name]
	if in == nil {
		return nil, syscall.ENOENT
	}
	return n.child(ctx, in, out), 0
}

func (n *node) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	var list []fuse.DirEntry
	for name, in := range n.inode().entries {
		list = append(list, fuse.DirEntry{Mode: in.mode, Name: name, Ino: in.ino})
	}
	return fs.NewListDirStream(list), 0
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	n.inode().attr(&out.Attr)
	return 0
}

func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	i := n.inode()
	if size, ok := in.GetSize(); ok && !i.dead {
		i.resize(int64(size))
	}
	if mode, ok := in.GetMode(); ok {
		i.mode = i.mode&syscall.S_IFMT | mode&^syscall.S_IFMT
	}
	i.attr(&out.Attr)
	return 0
}

func (n *node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if i := n.inode(); flags&syscall.O_TRUNC != 0 && !i.dead {
		i.resize(0)
	}
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *node) create(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if n.inode().dead {
		return nil, syscall.EIO
	}
	in := n.d.newInode(mode)
	in.parent, in.name = n.inode(), name
	n.inode().rename(change{name: in})
	return n.child(ctx, in, out), 0
}

func (n *node) Create(ctx context.Context, name string, _, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	in, errno := n.create(ctx, name, syscall.S_IFREG|mode&0o777, out)
	return in, nil, fuse.FOPEN_KEEP_CACHE, errno
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return n.create(ctx, name, syscall.S_IFDIR|mode&0o777, out)
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if n.inode().entries[name] == nil {
		return syscall.ENOENT
	}
	n.inode().rename(change{name: nil})
	return 0
}

// Rename serves a rename within a directory, which is all that a state has.
func (n *node) Rename(_ context.Context, name string, parent fs.InodeEmbedder, to string, flags uint32) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	in := n.inode().entries[name]
	switch {
	case flags != 0 || parent.(*node).inode() != n.inode():
		return syscall.EXDEV
	case in == nil:
		return syscall.ENOENT
	}
	n.inode().rename(change{name: nil, to: in})
	return 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, p []byte, at int64) (fuse.ReadResult, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	data := n.inode().data
	if at >= int64(len(data)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(p[:copy(p, data[at:])]), 0
}

func (n *node) Write(_ context.Context, _ fs.FileHandle, p []byte, at int64) (uint32, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if i := n.inode(); !i.dead {
		i.write(p, at)
	}
	return uint32(len(p)), 0
}

func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if i := n.inode(); !i.dead {
		i.sync()
	}
	return 0
}

func (n *node) Allocate(_ context.Context, _ fs.FileHandle, at, size uint64, mode uint32) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	i := n.inode()
	if mode != unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE {
		return syscall.EOPNOTSUPP
	}
	if !i.dead {
		i.zero(int64(at), int64(at+size))
	}
	return 0
}

func (n *node) Lseek(_ context.Context, _ fs.FileHandle, at uint64, whence uint32) (uint64, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	i := n.inode()
	size := uint64(len(i.data))
	if at >= size {
		return 0, syscall.ENXIO
	}
	for ; at < size; at = (at/page + 1) * page {
		if i.holes[int64(at/page)] == (whence == unix.SEEK_HOLE) {
			return at, 0
		}
	}
	if whence == unix.SEEK_HOLE {
		return size, 0
	}
	return 0, syscall.ENXIO
}

func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = page, page, 255
	out.Blocks, out.Bfree, out.Bavail = 1<<24, 1<<23, 1<<23
	return 0
}
