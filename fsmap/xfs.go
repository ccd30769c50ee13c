package fsmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	xfsSector   = 512                                        // a basic block, in bytes
	xfsIncompat = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 // known incompatible features
	xfsROCompat = 0x1 | 0x2 | 0x4 | 0x8                      // known read-only compatible ones
	xfsMetaUUID = 0x4                                        // incompatible: blocks have another UUID
	xfsLogMagic = 0xfeedbabe                                 // of a log record's header
	xfsUnmount  = 0x20                                       // flag of an unmount record
	xfsWindow   = 4096                                       // basic blocks around the log's head that are looked at
	xfsLevels   = 9                                          // a B+tree is no higher
	xfsAGs      = 1 << 20                                    // more allocation groups are not read
	xfsLogShort = 2 * 1024                                   // basic blocks that an unmount record takes at the most
)

// xfs is the superblock of an XFS.
type xfs struct {
	s                       *space
	v5                      bool
	bs, blocks, sector      uint64
	agBlocks, agCount       uint64
	uuid                    []byte // of metadata
	logAG, logAt, logBlocks uint64
	logUUID                 []byte
}

// readXFS reads the trees of free space of all allocation groups.
func readXFS(ctx context.Context, s *space) (f fs, err error) {
	f.kind = "XFS"
	x := &xfs{s: s}
	if err = x.superblock(ctx); err != nil {
		return f, err
	}
	if err = x.clean(ctx); err != nil {
		return f, err
	}
	f.size, f.free.least = x.blocks*x.bs, leastFree
	for ag := range x.agCount {
		err = x.group(ctx, ag, func(r byteRun) {
			f.free.add(r.at*x.bs, r.length*x.bs)
			f.freeBytes += r.length * x.bs
		})
		if err != nil {
			return f, err
		}
	}
	return f, nil
}

// sealed tells whether the CRC at an offset of b is right.
func (x *xfs) sealed(b []byte, at int) bool {
	crc := crc32.Update(0, castagnoli, b[:at])
	crc = crc32.Update(crc, castagnoli, []byte{0, 0, 0, 0})
	return !x.s.m.wrong(crc32.Update(crc, castagnoli, b[at+4:]), le.Uint32(b[at:]))
}

func (x *xfs) superblock(ctx context.Context) error {
	b, err := x.s.get(ctx, 0, 512)
	if err != nil {
		return err
	}
	wrong := errors.New("its superblock is inconsistent")
	x.bs, x.blocks, x.sector = uint64(be.Uint32(b[4:])), be.Uint64(b[8:]), uint64(be.Uint16(b[102:]))
	x.agBlocks, x.agCount = uint64(be.Uint32(b[84:])), uint64(be.Uint32(b[88:]))
	power := func(n uint64, log byte, least, most uint64) bool {
		return n >= least && n <= most && log < 32 && n == 1<<log
	}
	if !power(x.bs, b[120], 512, 64<<10) || !power(x.sector, b[121], 512, 32<<10) || x.sector > x.bs {
		return wrong
	}
	if b, err = x.s.get(ctx, 0, x.sector); err != nil {
		return err
	}
	version := be.Uint16(b[100:]) & 0xf
	x.uuid = b[32:48]
	x.logUUID = b[32:48]
	switch version {
	case 4:
	case 5:
		x.v5 = true
		if !x.sealed(b, 224) {
			return errors.New("the checksum of its superblock is wrong")
		}
		incompat := be.Uint32(b[216:])
		if incompat&^xfsIncompat != 0 || be.Uint32(b[212:])&^xfsROCompat != 0 || be.Uint32(b[208:]) != 0 {
			return errors.New("features that are not known, or it needs a repair")
		}
		if be.Uint32(b[220:]) != 0 {
			return errors.New("log not clean")
		}
		if incompat&xfsMetaUUID != 0 {
			x.uuid = b[248:264]
		}
	default:
		return errors.New("a version that is not known")
	}
	agLog := b[124]
	if x.agBlocks < 64 || x.agBlocks > 1<<31 || agLog > 31 || x.agBlocks > 1<<agLog || x.agCount == 0 || x.agCount > xfsAGs ||
		x.blocks <= (x.agCount-1)*x.agBlocks || x.blocks > x.agCount*x.agBlocks {
		return wrong
	}
	if x.blocks > x.s.size/x.bs {
		return errors.New("it is larger than what it lies in")
	}
	if b[126] != 0 {
		return errors.New("it is still being made")
	}
	if be.Uint64(b[16:]) != 0 {
		return errors.New("it has a realtime device")
	}
	log := be.Uint64(b[48:])
	x.logAG, x.logAt, x.logBlocks = log>>agLog, log&(1<<agLog-1), uint64(be.Uint32(b[96:]))
	switch {
	case log == 0:
		return errors.New("its log is on another device")
	case x.logAG >= x.agCount || x.logBlocks < 16 || x.logAt+x.logBlocks > x.agLength(x.logAG):
		return wrong
	}
	return nil
}

// agLength is how many blocks an allocation group has.
func (x *xfs) agLength(ag uint64) uint64 { return min(x.agBlocks, x.blocks-ag*x.agBlocks) }

// clean tells whether the last record of the log is that of an unmount. All around the log's head
// must be as a log that ended there leaves it. A record that goes round the log's end is not
// looked for.
func (x *xfs) clean(ctx context.Context) error {
	dirty := errors.New("log not clean")
	base := (x.logAG*x.agBlocks + x.logAt) * x.bs
	n := x.logBlocks * x.bs / xfsSector
	blocks := func(from, count uint64) ([]byte, error) {
		return x.s.get(ctx, base+from*xfsSector, count*xfsSector)
	}
	// The log is written round and round, each time under the next cycle number: blocks before
	// the head have the current one, the others the one before.
	b, err := blocks(0, 1)
	if err != nil {
		return err
	}
	cycle := xfsCycle(b)
	if cycle == 0 {
		return dirty
	}
	lo, head := uint64(0), n // lo has cycle, head does not
	for head-lo > 1 {
		mid := (lo + head) / 2
		if b, err = blocks(mid, 1); err != nil {
			return err
		}
		if xfsCycle(b) == cycle {
			lo = mid
		} else {
			head = mid
		}
	}
	from := head - min(head, xfsWindow)
	to := min(n, head+xfsWindow)
	if b, err = blocks(from, to-from); err != nil {
		return err
	}
	at := func(i uint64) []byte { return b[(i-from)*xfsSector:] }
	for i := from; i < to; i++ {
		want := cycle
		if i >= head {
			want--
		}
		if xfsCycle(at(i)) != want {
			return dirty
		}
	}
	if head < n {
		if b, err := blocks(n-1, 1); err != nil {
			return err
		} else if xfsCycle(b) != cycle-1 {
			return dirty
		}
	}
	record := head
	for {
		if record == from || head-record >= xfsLogShort {
			return dirty
		}
		if record--; be.Uint32(at(record)) == xfsLogMagic {
			break
		}
	}
	h := at(record)[:(head-record)*xfsSector]
	version, length, size := be.Uint32(h[8:]), uint64(be.Uint32(h[12:])), uint64(be.Uint32(h[320:]))
	headers := uint64(1)
	if version == 2 && size > 32<<10 {
		headers = (size + 32<<10 - 1) / (32 << 10)
	}
	body := (length + xfsSector - 1) / xfsSector
	if version != 1 && version != 2 || size > 256<<10 || length == 0 || length > 256<<10 ||
		be.Uint32(h[4:]) != cycle || be.Uint64(h[16:]) != uint64(cycle)<<32|record ||
		be.Uint32(h[40:]) != 1 || !bytes.Equal(h[304:320], x.logUUID) || record+headers+body != head {
		return dirty
	}
	op := h[headers*xfsSector:]
	if op[9]&xfsUnmount == 0 {
		return dirty
	}
	if x.v5 && le.Uint32(h[32:]) != 0 {
		return x.checkRecord(h, headers, op[:length])
	}
	return nil
}

// xfsCycle is the cycle number of a basic block.
func xfsCycle(b []byte) uint32 {
	if c := be.Uint32(b); c != xfsLogMagic {
		return c
	}
	return be.Uint32(b[4:])
}

// checkRecord holds a log record against its checksum, in either form that the header has in memory.
func (x *xfs) checkRecord(h []byte, headers uint64, body []byte) error {
	want := le.Uint32(h[32:])
	for _, size := range [...]int{328, 324} {
		crc := crc32.Update(0, castagnoli, h[:32])
		crc = crc32.Update(crc, castagnoli, []byte{0, 0, 0, 0})
		crc = crc32.Update(crc, castagnoli, h[36:size])
		for i := uint64(1); i < headers; i++ {
			crc = crc32.Update(crc, castagnoli, h[i*xfsSector:][:4+256])
		}
		if !x.s.m.wrong(crc32.Update(crc, castagnoli, body), want) {
			return nil
		}
	}
	return errors.New("the checksum of its log is wrong")
}

// group hands out the free runs of one allocation group, in blocks of the file system, in rising order.
func (x *xfs) group(ctx context.Context, ag uint64, yield func(byteRun)) error {
	start, length := ag*x.agBlocks, x.agLength(ag)
	wrong := fmt.Errorf("allocation group %d is inconsistent", ag)
	if length*x.bs < 4*x.sector {
		return wrong
	}
	head, err := x.s.get(ctx, start*x.bs, 3*x.sector)
	if err != nil {
		return err
	}
	agf := head[x.sector:][:x.sector]
	if err := x.copy(ag, head[:x.sector], head[2*x.sector:]); err != nil {
		return err
	}
	if x.v5 && (!x.sealed(agf, 216) || !bytes.Equal(agf[64:80], x.uuid)) {
		return fmt.Errorf("the checksum of allocation group %d is wrong", ag)
	}
	root, levels := uint64(be.Uint32(agf[16:])), be.Uint32(agf[28:])
	if string(agf[:4]) != "XAGF" || be.Uint32(agf[4:]) != 1 || uint64(be.Uint32(agf[8:])) != ag || uint64(be.Uint32(agf[12:])) != length ||
		levels == 0 || levels > xfsLevels {
		return wrong
	}
	t := &xfsTree{x: x, ag: ag, start: start, length: length, wrong: wrong}
	t.yield = func(r byteRun) error {
		if r.at < t.next || r.length == 0 || r.end() > length {
			return wrong
		}
		t.next = r.end()
		t.free += r.length
		if n := len(t.runs); n > 0 && t.runs[n-1].end() == r.at {
			return wrong // the file system would have made one of them
		}
		t.runs = append(t.runs, r)
		return nil
	}
	if err := t.walk(ctx, root, levels-1); err != nil {
		return err
	}
	if t.free != uint64(be.Uint32(agf[52:])) {
		return wrong
	}
	t.blocks = append(t.blocks, byteRun{0, (4*x.sector + x.bs - 1) / x.bs})
	if ag == x.logAG {
		t.blocks = append(t.blocks, byteRun{x.logAt, x.logBlocks})
	}
	if !apart(t.blocks) || overlap(t.blocks, t.runs) {
		return fmt.Errorf("allocation group %d calls metadata free", ag)
	}
	for _, r := range t.runs {
		yield(byteRun{start + r.at, r.length})
	}
	return nil
}

// xfsTree is a walk through the tree of free space by block number. What it gathers is bounded by
// what may be read.
type xfsTree struct {
	x                 *xfs
	ag, start, length uint64
	wrong             error
	yield             func(byteRun) error
	next, free        uint64
	runs, blocks      []byteRun
}

func (t *xfsTree) walk(ctx context.Context, at uint64, level uint32) error {
	x := t.x
	if at == 0 || at >= t.length {
		return t.wrong
	}
	b, err := x.s.get(ctx, (t.start+at)*x.bs, x.bs)
	if err != nil {
		return err
	}
	t.blocks = append(t.blocks, byteRun{at, 1})
	magic, header := "ABTB", uint64(16)
	if x.v5 {
		magic, header = "AB3B", 56
		if !x.sealed(b, 52) || be.Uint64(b[16:]) != (t.start+at)*x.bs/xfsSector || !bytes.Equal(b[32:48], x.uuid) || uint64(be.Uint32(b[48:])) != t.ag {
			return fmt.Errorf("the checksum of a tree of allocation group %d is wrong", t.ag)
		}
	}
	count := uint64(be.Uint16(b[6:]))
	if string(b[:4]) != magic || uint32(be.Uint16(b[4:])) != level {
		return t.wrong
	}
	records := b[header:]
	if level == 0 {
		if count > uint64(len(records))/8 {
			return t.wrong
		}
		for i := range count {
			if err := t.yield(byteRun{uint64(be.Uint32(records[8*i:])), uint64(be.Uint32(records[8*i+4:]))}); err != nil {
				return err
			}
		}
		return nil
	}
	most := uint64(len(records)) / 12
	if count == 0 || count > most {
		return t.wrong
	}
	// A block that comes twice would be read twice; the records of its leaves do not rise then.
	// Leaves without any are only in an empty tree.
	for i := range count {
		before := len(t.runs)
		if err := t.walk(ctx, uint64(be.Uint32(records[8*most+4*i:])), level-1); err != nil {
			return err
		}
		if len(t.runs) == before || t.runs[before].at != uint64(be.Uint32(records[8*i:])) {
			return t.wrong
		}
	}
	return nil
}
