package fsmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// Each file system keeps copies of what it begins with, all over its space, and never gives their
// places to files. What took the space over later and spared the beginning, as many things do, is
// told by a copy that is gone. A copy that is not there for another reason costs only that
// everything is copied.

// maxCopies bounds how many copies of an ext superblock are looked at. With sparse_super no file
// system has as many.
const maxCopies = 64

// copies holds the copies of the superblock against it, and the inode of the root directory.
func (x *ext) copies(ctx context.Context, groups []extGroup) error {
	var have []uint64
	for g := uint64(1); g < x.groups; g++ {
		if x.hasSuper(g) {
			have = append(have, g)
		}
	}
	step := max(1, (len(have)+maxCopies-1)/maxCopies)
	for i := 0; i < len(have); i += step {
		g := have[i]
		b, err := x.s.get(ctx, x.groupFirst(g)*x.bs, 1024)
		if err != nil {
			return err
		}
		// Geometry and UUID stay over its life. A kernel that grew it mounted left the number of
		// the group as it is in the first one.
		number := le.Uint16(b[0x5a:])
		if string(b[0x38:0x3a]) != "\x53\xef" || number != uint16(g) && number != 0 ||
			!bytes.Equal(b[0x68:0x78], x.sb[0x68:0x78]) || !bytes.Equal(b[0x14:0x28], x.sb[0x14:0x28]) {
			return fmt.Errorf("the copy of its superblock in block group %d is gone: something else may have taken its place", g)
		}
	}
	const root, directory = 2, 0x4000
	if x.inodes < root {
		return errors.New("its superblock is inconsistent")
	}
	inode, err := x.s.get(ctx, groups[0].inodes*x.bs+(root-1)*x.inodeSize, x.inodeSize)
	if err != nil {
		return err
	}
	gone := errors.New("its root directory is gone: something else may have taken its place")
	if le.Uint16(inode)&0xf000 != directory || x.ro&extMetaCsum != 0 && !x.inodeSum(inode, root) {
		return gone
	}
	if le.Uint32(inode[0x20:])&extInlineData != 0 {
		return nil
	}
	at, ok, err := x.firstBlock(ctx, inode)
	if err != nil {
		return err
	}
	if !ok || at <= x.first || at >= x.blocks {
		return gone
	}
	b, err := x.s.get(ctx, at*x.bs, 12)
	if err != nil {
		return err
	}
	if le.Uint32(b) != root || le.Uint16(b[4:]) != 12 || b[6] != 1 || b[8] != '.' {
		return gone
	}
	return nil
}

// copy holds the copy of the superblock at the beginning of an allocation group against it, and
// makes sure that the group has the header of its inodes.
func (x *xfs) copy(ag uint64, b, inodes []byte) error {
	if string(inodes[:4]) != "XAGI" || be.Uint32(inodes[4:]) != 1 || uint64(be.Uint32(inodes[8:])) != ag || uint64(be.Uint32(inodes[12:])) != x.agLength(ag) ||
		x.v5 && (!x.sealed(inodes, 312) || !bytes.Equal(inodes[296:312], x.uuid)) {
		return fmt.Errorf("the inodes of allocation group %d are gone: something else may have taken their place", ag)
	}
	// The size of a block; the UUID; blocks of a group.
	if string(b[:4]) != "XFSB" || be.Uint32(b[4:]) != uint32(x.bs) || !bytes.Equal(b[32:48], x.logUUID) || be.Uint32(b[84:]) != uint32(x.agBlocks) {
		return fmt.Errorf("the copy of its superblock in allocation group %d is gone: something else may have taken its place", ag)
	}
	return nil
}

// copy holds the copy of the boot sector against it. It lies behind the last cluster, but where a
// file system was resized, at the end of what it lies in.
func (x *ntfs) copy(ctx context.Context, boot []byte) error {
	for _, at := range [...]uint64{le.Uint64(boot[0x28:]) * x.sector, (x.s.size/x.sector - 1) * x.sector} {
		if !x.s.holds(at, 512) {
			continue
		}
		b, err := x.s.get(ctx, at, 512)
		if err != nil {
			return err
		}
		// All up to the serial number but where the partition lies, which tools that move it mend in one.
		if bytes.Equal(b[3:0x18], boot[3:0x18]) && bytes.Equal(b[0x28:0x50], boot[0x28:0x50]) {
			return nil
		}
	}
	return errors.New("the copy of its boot sector is gone: something else may have taken its place")
}

// mirror holds $MFTMirr, the copies of the first records, against them.
func (x *ntfs) mirror(ctx context.Context) error {
	const records = 4
	m := byteRun{x.mirrorAt, (records*x.record + x.cluster - 1) / x.cluster}
	if m.at >= x.clusters || m.length > x.clusters-m.at {
		return errNTFS
	}
	x.metadata = append(x.metadata, m)
	for i := range uint64(records) {
		r, err := x.readRecord(ctx, i)
		if err != nil {
			return err
		}
		other, err := x.s.get(ctx, m.at*x.cluster+i*x.record, x.record)
		if err != nil {
			return err
		}
		attributes := int(le.Uint16(r[0x14:]))
		if attributes > len(r) {
			return errNTFS
		}
		if string(other[:4]) != "FILE" || !x.fixup(other) || !bytes.Equal(r[attributes:], other[attributes:len(r)]) {
			return errors.New("its $MFTMirr is gone: something else may have taken its place")
		}
	}
	return nil
}
