package fsmap

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"slices"
)

// Features of ext2, ext3 and ext4 (the superblock's s_feature fields).
const (
	extHasJournal   = 0x4 // compatible
	extSparse2      = 0x200
	extKnownCompat  = 0x1 | 0x2 | extHasJournal | 0x8 | 0x10 | 0x20 | extSparse2 | 0x400 | 0x800 | 0x1000
	extRecover      = 0x4 // incompatible
	extMetaBG       = 0x10
	ext64bit        = 0x80
	extMMP          = 0x100
	extCsumSeed     = 0x2000
	extKnownIncomp  = 0x2 | extRecover | extMetaBG | 0x40 | ext64bit | extMMP | 0x200 | 0x400 | extCsumSeed | 0x4000 | 0x8000 | 0x10000 | 0x20000
	extSparse       = 0x1 // read-only compatible
	extGDTCsum      = 0x10
	extBigalloc     = 0x200
	extMetaCsum     = 0x400
	extOrphans      = 0x10000
	extKnownROComp  = extSparse | 0x2 | 0x4 | 0x8 | extGDTCsum | 0x20 | 0x40 | 0x100 | extBigalloc | extMetaCsum | 0x1000 | 0x2000 | 0x8000 | extOrphans
	extBlockUninit  = 0x2     // bg_flags
	extUsesExtents  = 0x80000 // of an inode
	extInlineData   = 0x10000000
	mmpClean        = 0xff4d4d50
	maxGroups       = 1 << 20
	maxBitmapsAtOne = 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// rawCRC is CRC32C without the inversions at both ends, as ext4 and jbd2 use it.
func rawCRC(seed uint32, p []byte) uint32 { return ^crc32.Update(^seed, castagnoli, p) }

// crc16 is the checksum of group descriptors with uninit_bg (polynomial 8005h, reflected).
func crc16(crc uint16, p []byte) uint16 {
	for _, b := range p {
		crc ^= uint16(b)
		for range 8 {
			crc = crc>>1 ^ -(crc&1)&0xa001
		}
	}
	return crc
}

// ext is the superblock of an ext2, ext3 or ext4.
type ext struct {
	s                           *space
	sb                          []byte
	compat, incompat, ro        uint32
	bs, blocks, first           uint64 // block size in bytes; blocks; s_first_data_block
	perGroup, clusters, cluster uint64 // blocks and clusters of a group, blocks of a cluster
	inodes, inodeSize           uint64 // of a group; in bytes
	desc                        uint64 // bytes of a group descriptor
	groups                      uint64
	seed                        uint32 // of checksums
	metadata                    []byteRun
}

// extGroup is what is needed of a group descriptor.
type extGroup struct {
	bitmap uint64 // block
	inodes uint64 // first block of their table
	free   uint32 // clusters
	sum    uint32
	uninit bool
}

// readExt reads the block bitmaps of an ext2, ext3 or ext4.
func readExt(ctx context.Context, s *space) (f fs, err error) {
	f.kind, f.marks = "ext", true
	x := &ext{s: s}
	if x.sb, err = s.get(ctx, 1024, 1024); err != nil {
		return f, err
	}
	f.kind = x.name()
	if err = x.superblock(); err != nil {
		return f, err
	}
	if err = x.clean(ctx); err != nil {
		return f, err
	}
	groups, err := x.descriptors(ctx)
	if err != nil {
		return f, err
	}
	if err = x.copies(ctx, groups); err != nil {
		return f, err
	}
	if x.compat&extHasJournal != 0 {
		if err = x.journal(ctx, groups); err != nil {
			return f, err
		}
	}
	f.size, f.free.least = x.blocks*x.bs, leastFree
	err = x.bitmaps(ctx, groups, func(r byteRun) {
		f.free.add(r.at, r.length)
		f.freeBytes += r.length
	})
	return f, err
}

func (x *ext) u16(at int) uint64 { return uint64(le.Uint16(x.sb[at:])) }
func (x *ext) u32(at int) uint64 { return uint64(le.Uint32(x.sb[at:])) }

// name tells the kind by what is new in each.
func (x *ext) name() string {
	x.compat, x.incompat, x.ro = le.Uint32(x.sb[0x5c:]), le.Uint32(x.sb[0x60:]), le.Uint32(x.sb[0x64:])
	switch {
	case x.incompat&^(0x2|extRecover|0x8|extMetaBG) != 0 || x.ro&^(extSparse|0x2|0x4) != 0:
		return "ext4"
	case x.compat&extHasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

// superblock takes the geometry over and holds it against itself.
func (x *ext) superblock() error {
	if x.u32(0x4c) != 1 {
		return errors.New("a revision that is not known")
	}
	if x.compat&^extKnownCompat != 0 || x.incompat&^extKnownIncomp != 0 || x.ro&^extKnownROComp != 0 {
		return errors.New("features that are not known")
	}
	if x.ro&extMetaCsum != 0 {
		if x.ro&extGDTCsum != 0 || x.sb[0x175] != 1 {
			return errors.New("checksums of a kind that is not known")
		}
		if x.s.m.wrong(rawCRC(^uint32(0), x.sb[:0x3fc]), le.Uint32(x.sb[0x3fc:])) {
			return errors.New("the checksum of its superblock is wrong")
		}
	}
	if x.seed = rawCRC(^uint32(0), x.sb[0x68:0x78]); x.incompat&extCsumSeed != 0 {
		x.seed = le.Uint32(x.sb[0x270:])
	}
	wrong := errors.New("its superblock is inconsistent")
	log, logCluster := x.u32(0x18), x.u32(0x1c)
	if log > 6 {
		return wrong
	}
	x.bs, x.cluster = 1024<<log, 1
	x.blocks, x.first = x.u32(0x04), x.u32(0x14)
	x.perGroup, x.clusters = x.u32(0x20), x.u32(0x24)
	x.inodes, x.inodeSize, x.desc = x.u32(0x28), x.u16(0x58), 32
	if x.incompat&ext64bit != 0 {
		x.blocks |= x.u32(0x150) << 32
		if x.desc = x.u16(0xfe); x.desc < 64 || x.desc > 1024 || x.desc&(x.desc-1) != 0 {
			return wrong
		}
	}
	if x.ro&extBigalloc != 0 {
		if logCluster < log || logCluster > 20 {
			return wrong
		}
		x.cluster = 1 << (logCluster - log)
	} else if logCluster != log || x.clusters != x.perGroup {
		return wrong
	}
	wantFirst := uint64(0)
	if x.bs == 1024 && x.cluster == 1 {
		wantFirst = 1
	}
	if x.first != wantFirst || x.clusters == 0 || x.clusters > 8*x.bs || x.clusters%8 != 0 || x.perGroup != x.clusters*x.cluster {
		return wrong
	}
	if x.blocks <= x.first || x.blocks > x.s.size/x.bs {
		return errors.New("it is larger than what it lies in")
	}
	x.groups = (x.blocks - x.first + x.perGroup - 1) / x.perGroup
	if x.groups > maxGroups {
		return errors.New("more block groups than are read")
	}
	if x.inodeSize < 128 || x.inodeSize > x.bs || x.inodeSize&(x.inodeSize-1) != 0 ||
		x.inodes == 0 || x.inodes > 8*x.bs || x.u32(0) != x.inodes*x.groups {
		return wrong
	}
	return nil
}

// clean tells by the superblock, and the multiple mount protection, whether it was left clean.
func (x *ext) clean(ctx context.Context) error {
	const valid, orphanHead = 1, 0xe8
	switch {
	case x.incompat&extRecover != 0:
		return errors.New("mounted, or its journal is not empty")
	case x.u16(0x3a)&2 != 0 || x.u32(0x194) != 0:
		return errors.New("it has recorded errors")
	case x.u16(0x3a) != valid:
		return errors.New("mounted, or not unmounted cleanly")
	case x.u32(orphanHead) != 0 || x.ro&extOrphans != 0:
		return errors.New("it has orphaned inodes")
	}
	if x.incompat&extMMP == 0 {
		return nil
	}
	at := le.Uint64(x.sb[0x168:])
	if at <= x.first || at >= x.blocks {
		return errors.New("its multiple mount protection is inconsistent")
	}
	b, err := x.s.get(ctx, at*x.bs, 1024)
	if err != nil {
		return err
	}
	if le.Uint32(b) != 0x004d4d50 || x.ro&extMetaCsum != 0 && x.s.m.wrong(rawCRC(x.seed, b[:0x3fc]), le.Uint32(b[0x3fc:])) {
		return errors.New("its multiple mount protection is inconsistent")
	}
	if le.Uint32(b[4:]) != mmpClean {
		return errors.New("mounted, by its multiple mount protection")
	}
	return nil
}

// groupFirst is the first block of a group, groupBlocks how many it has.
func (x *ext) groupFirst(g uint64) uint64 { return x.first + g*x.perGroup }

func (x *ext) groupBlocks(g uint64) uint64 { return min(x.perGroup, x.blocks-x.groupFirst(g)) }

// hasSuper tells whether a group begins with a copy of the superblock.
func (x *ext) hasSuper(g uint64) bool {
	switch {
	case g == 0:
		return true
	case x.compat&extSparse2 != 0:
		return g == x.u32(0x24c) || g == x.u32(0x250)
	case g == 1 || x.ro&extSparse == 0:
		return true
	}
	for _, base := range [...]uint64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

// descriptors reads the group descriptors, and gathers all metadata they tell of.
func (x *ext) descriptors(ctx context.Context) ([]extGroup, error) {
	perBlock := x.bs / x.desc
	tables := (x.groups + perBlock - 1) / perBlock
	super := uint64(0)
	if x.bs == 1024 {
		super = 1
	}
	meta, firstMeta := x.incompat&extMetaBG != 0, x.u32(0x104)
	if meta && firstMeta > tables {
		return nil, errors.New("its superblock is inconsistent")
	}
	tableBlocks := (x.inodes*x.inodeSize + x.bs - 1) / x.bs
	groups := make([]extGroup, 0, x.groups)
	block := make([]byte, x.bs)
	claim := func(at, n uint64) error {
		if at < x.first || n > x.blocks || at > x.blocks-n {
			return fmt.Errorf("metadata of block group %d lies out of range", len(groups))
		}
		x.metadata = append(x.metadata, byteRun{at, n})
		return nil
	}
	for g := range x.groups {
		table := g / perBlock
		if g%perBlock == 0 {
			at := super + 1 + table
			if meta && table >= firstMeta {
				if at = x.groupFirst(g); x.hasSuper(g) {
					at++
				}
				if x.bs == 1024 && table == 0 && x.first == 0 {
					at++
				}
			}
			if at >= x.blocks {
				return nil, errors.New("its group descriptors lie out of range")
			}
			if err := x.s.read(ctx, block, at*x.bs); err != nil {
				return nil, err
			}
		}
		d := block[g%perBlock*x.desc:][:x.desc]
		if err := x.checkDescriptor(g, d); err != nil {
			return nil, err
		}
		wide := func(lo, hi int) uint64 {
			n := uint64(le.Uint32(d[lo:]))
			if x.desc >= 64 {
				n |= uint64(le.Uint32(d[hi:])) << 32
			}
			return n
		}
		half := func(lo, hi int) uint32 {
			n := uint32(le.Uint16(d[lo:]))
			if x.desc >= 64 {
				n |= uint32(le.Uint16(d[hi:])) << 16
			}
			return n
		}
		e := extGroup{bitmap: wide(0, 0x20), inodes: wide(8, 0x28), free: half(0x0c, 0x2c), sum: half(0x18, 0x38)}
		if x.ro&(extGDTCsum|extMetaCsum) != 0 {
			e.uninit = le.Uint16(d[0x12:])&extBlockUninit != 0
		}
		base := uint64(0)
		if x.hasSuper(g) {
			base = 1
			if g == 0 && x.first == 0 {
				base += super
			}
		}
		if !meta || table < firstMeta {
			if base > 0 && meta {
				base += firstMeta
			} else if base > 0 {
				base += tables + x.u16(0xce)
			}
		} else if in := g % perBlock; in == 0 || in == 1 || in == perBlock-1 {
			base++
		}
		for _, c := range [...][2]uint64{{x.groupFirst(g), base}, {e.bitmap, 1}, {wide(4, 0x24), 1}, {e.inodes, tableBlocks}} {
			if c[1] == 0 {
				continue
			}
			if err := claim(c[0], c[1]); err != nil {
				return nil, err
			}
		}
		groups = append(groups, e)
	}
	return groups, x.settle()
}

// settle puts the metadata in order, joins what touches, and rounds it to clusters.
func (x *ext) settle() error {
	if !apart(x.metadata) {
		return errors.New("its metadata overlaps")
	}
	joined := x.metadata[:0]
	for _, r := range x.metadata {
		at, end := r.at-(r.at-x.first)%x.cluster, r.end()
		end += (x.cluster - (end-x.first)%x.cluster) % x.cluster
		if n := len(joined); n > 0 && at <= joined[n-1].end() {
			joined[n-1].length = max(joined[n-1].end(), end) - joined[n-1].at
			continue
		}
		joined = append(joined, byteRun{at, end - at})
	}
	x.metadata = slices.Clip(joined)
	return nil
}

func (x *ext) checkDescriptor(g uint64, d []byte) error {
	number := le.AppendUint32(nil, uint32(g))
	var sum uint16
	switch {
	case x.ro&extMetaCsum != 0:
		crc := rawCRC(x.seed, number)
		crc = rawCRC(crc, d[:0x1e])
		crc = rawCRC(crc, []byte{0, 0})
		sum = uint16(rawCRC(crc, d[0x20:]))
	case x.ro&extGDTCsum != 0:
		crc := crc16(crc16(^uint16(0), x.sb[0x68:0x78]), number)
		crc = crc16(crc, d[:0x1e])
		if x.incompat&ext64bit != 0 {
			crc = crc16(crc, d[0x20:])
		}
		sum = crc
	default:
		return nil
	}
	if x.s.m.wrong(uint32(sum), uint32(le.Uint16(d[0x1e:]))) {
		return fmt.Errorf("the checksum of block group %d is wrong", g)
	}
	return nil
}

// journal makes sure that nothing is left in it.
func (x *ext) journal(ctx context.Context, groups []extGroup) error {
	const number = 8
	if x.u32(0xe0) != number {
		return errors.New("its journal is somewhere else")
	}
	if x.inodes < number {
		return errors.New("its superblock is inconsistent")
	}
	inode, err := x.s.get(ctx, groups[0].inodes*x.bs+(number-1)*x.inodeSize, x.inodeSize)
	if err != nil {
		return err
	}
	wrong := errors.New("its journal is inconsistent")
	if x.ro&extMetaCsum != 0 && !x.inodeSum(inode, number) {
		return errors.New("the checksum of its journal's inode is wrong")
	}
	if le.Uint16(inode)&0xf000 != 0x8000 {
		return wrong
	}
	at, ok, err := x.firstBlock(ctx, inode)
	if err != nil {
		return err
	}
	if !ok || at <= x.first || at >= x.blocks {
		return wrong
	}
	b, err := x.s.get(ctx, at*x.bs, 1024)
	if err != nil {
		return err
	}
	if t := be.Uint32(b[4:]); be.Uint32(b) != 0xc03b3998 || t != 3 && t != 4 {
		return wrong
	}
	if be.Uint32(b[4:]) == 4 && be.Uint32(b[0x28:])&0x18 != 0 {
		sum := be.Uint32(b[0xfc:])
		clear(b[0xfc:0x100])
		if x.s.m.wrong(rawCRC(^uint32(0), b), sum) {
			return errors.New("the checksum of its journal is wrong")
		}
	}
	if be.Uint32(b[0x1c:]) != 0 {
		return errors.New("its journal is not empty")
	}
	if be.Uint32(b[0x20:]) != 0 {
		return errors.New("its journal has recorded an error")
	}
	return nil
}

func (x *ext) inodeSum(inode []byte, number uint32) bool {
	have, mask := uint32(le.Uint16(inode[0x7c:])), uint32(0xffff)
	p := slices.Clone(inode)
	clear(p[0x7c:0x7e])
	if len(p) > 128 && le.Uint16(p[0x80:]) >= 4 {
		have |= uint32(le.Uint16(p[0x82:])) << 16
		mask = ^uint32(0)
		clear(p[0x82:0x84])
	}
	crc := rawCRC(x.seed, le.AppendUint32(nil, number))
	crc = rawCRC(rawCRC(crc, p[0x64:0x68]), p)
	return !x.s.m.wrong(crc&mask, have)
}

// firstBlock is where the content of an inode begins.
func (x *ext) firstBlock(ctx context.Context, inode []byte) (uint64, bool, error) {
	if le.Uint32(inode[0x20:])&extUsesExtents != 0 {
		return x.firstExtent(ctx, inode[0x28:0x28+60], 6)
	}
	return uint64(le.Uint32(inode[0x28:])), true, nil
}

// firstExtent is where logical block 0 is, by a node of an extent tree at most depth levels high.
func (x *ext) firstExtent(ctx context.Context, node []byte, depth uint16) (uint64, bool, error) {
	magic, entries, level := le.Uint16(node), le.Uint16(node[2:]), le.Uint16(node[6:])
	if magic != 0xf30a || entries == 0 || level >= depth || le.Uint32(node[12:]) != 0 {
		return 0, false, nil
	}
	if level == 0 {
		return uint64(le.Uint32(node[20:])) | uint64(le.Uint16(node[18:]))<<32, true, nil
	}
	at := uint64(le.Uint32(node[16:])) | uint64(le.Uint16(node[20:]))<<32
	if at <= x.first || at >= x.blocks {
		return 0, false, nil
	}
	child, err := x.s.get(ctx, at*x.bs, x.bs)
	if err != nil {
		return 0, false, err
	}
	return x.firstExtent(ctx, child, level)
}

// bitmaps hands out the free runs, in bytes, in rising order.
func (x *ext) bitmaps(ctx context.Context, groups []extGroup, yield func(byteRun)) error {
	var last byteRun // in blocks
	var given uint64 // clusters
	meta := x.metadata
	// free takes a free run of blocks; of uninitialised groups the metadata goes off, in others
	// it must not be free.
	free := func(r byteRun, uninit bool) error {
		give := func(r byteRun) {
			given += (r.length + x.cluster - 1) / x.cluster
			if last.length > 0 && last.end() == r.at {
				last.length += r.length
				return
			}
			if last.length > 0 {
				yield(byteRun{last.at * x.bs, last.length * x.bs})
			}
			last = r
		}
		for len(meta) > 0 && meta[0].end() <= r.at {
			meta = meta[1:]
		}
		for i := 0; i < len(meta) && meta[i].at < r.end(); i++ {
			if !uninit {
				return errors.New("its bitmaps call metadata free")
			}
			if meta[i].at > r.at {
				give(byteRun{r.at, meta[i].at - r.at})
			}
			end := min(meta[i].end(), r.end())
			r = byteRun{end, r.end() - end}
		}
		if r.length > 0 {
			give(r)
		}
		return nil
	}
	buf := make([]byte, maxBitmapsAtOne*x.bs)
	for g := uint64(0); g < x.groups; {
		if groups[g].uninit {
			given = 0
			if err := free(byteRun{x.groupFirst(g), x.groupBlocks(g)}, true); err != nil {
				return err
			}
			if given != uint64(groups[g].free) {
				return fmt.Errorf("block group %d has %d free clusters without its metadata and %d by its descriptor", g, given, groups[g].free)
			}
			g++
			continue
		}
		n := uint64(1)
		for n < maxBitmapsAtOne && g+n < x.groups && !groups[g+n].uninit && groups[g+n].bitmap == groups[g].bitmap+n {
			n++
		}
		if err := x.s.read(ctx, buf[:n*x.bs], groups[g].bitmap*x.bs); err != nil {
			return err
		}
		for i := range n {
			if err := x.bitmap(g+i, groups[g+i], buf[i*x.bs:(i+1)*x.bs], free); err != nil {
				return err
			}
		}
		g += n
	}
	if last.length > 0 {
		yield(byteRun{last.at * x.bs, last.length * x.bs})
	}
	return nil
}

// bitmap hands out the free runs of one group, in blocks.
func (x *ext) bitmap(g uint64, d extGroup, b []byte, free func(byteRun, bool) error) error {
	if x.ro&extMetaCsum != 0 {
		mask := uint32(0xffff)
		if x.desc >= 64 {
			mask = ^uint32(0)
		}
		if x.s.m.wrong(rawCRC(x.seed, b[:x.clusters/8])&mask, d.sum) {
			return fmt.Errorf("the checksum of the bitmap of block group %d is wrong", g)
		}
	}
	blocks := x.groupBlocks(g)
	clusters := (blocks + x.cluster - 1) / x.cluster
	var count uint64
	err := zeroBits(b, clusters, func(at, n uint64) error {
		count += n
		start := at * x.cluster
		return free(byteRun{x.groupFirst(g) + start, min(n*x.cluster, blocks-start)}, false)
	})
	if err != nil {
		return err
	}
	if count != uint64(d.free) {
		return fmt.Errorf("block group %d has %d free clusters by its bitmap and %d by its descriptor", g, count, d.free)
	}
	return nil
}

// zeroBits hands out the runs of zeroes among the first n bits of b, the lowest of a byte first.
func zeroBits(b []byte, n uint64, yield func(at, n uint64) error) error {
	// next is the first bit from i on that is as flip says: 0 a one, 0xff a zero.
	next := func(i uint64, flip byte) uint64 {
		for i < n {
			rest := (b[i/8] ^ flip) >> (i % 8)
			if rest != 0 {
				return min(n, i+uint64(bits.TrailingZeros8(rest)))
			}
			i += 8 - i%8
			for flip == 0 && i+64 <= n && le.Uint64(b[i/8:]) == 0 || flip != 0 && i+64 <= n && le.Uint64(b[i/8:]) == ^uint64(0) {
				i += 64
			}
		}
		return n
	}
	for at := next(0, 0xff); at < n; {
		end := next(at, 0)
		if err := yield(at, end-at); err != nil {
			return err
		}
		at = next(end, 0xff)
	}
	return nil
}
