package fsmap

import (
	"bytes"
	"context"
	"errors"
	"slices"
)

const (
	// Records of the master file table.
	ntfsMFT, ntfsLog, ntfsVolume, ntfsBitmap = 0, 2, 3, 6
	// Attribute types.
	ntfsAttributeList, ntfsVolumeInformation, ntfsData, ntfsEnd = 0x20, 0x70, 0x80, 0xffffffff
	ntfsNoClient                                                = 0xffff
	ntfsVolumeClean                                             = 0x2 // of a restart area's flags
	ntfsBitmapRead                                              = 256 << 10
	ntfsMaxRuns                                                 = 1 << 16
)

// ntfs is the boot sector of an NTFS.
type ntfs struct {
	s                         *space
	sector, cluster, clusters uint64 // bytes, bytes, count
	record                    uint64 // bytes of a record
	mft                       byteRun
	mirrorAt                  uint64
	metadata                  []byteRun // clusters that must not be free
}

// readNTFS reads $Bitmap. The restart area of $LogFile must say that the volume was dismounted
// (log version 1.1; Windows has 2.0 while it is mounted or hibernated). A log that was
// emptied, as other drivers leave it also while mounted, says nothing.
func readNTFS(ctx context.Context, s *space) (f fs, err error) {
	f.kind = "NTFS"
	x := &ntfs{s: s}
	if err = x.boot(ctx); err != nil {
		return f, err
	}
	if err = x.clean(ctx); err != nil {
		return f, err
	}
	if err = x.mirror(ctx); err != nil {
		return f, err
	}
	f.size, f.free.least = x.clusters*x.cluster, leastFree
	err = x.bitmap(ctx, func(at, n uint64) {
		f.free.add(at*x.cluster, n*x.cluster)
		f.freeBytes += n * x.cluster
	})
	return f, err
}

var errNTFS = errors.New("its metadata is inconsistent")

func (x *ntfs) boot(ctx context.Context) error {
	b, err := x.s.get(ctx, 0, 512)
	if err != nil {
		return err
	}
	x.sector = uint64(le.Uint16(b[11:]))
	per := uint64(b[13])
	if per > 0x80 { // a negative power
		if per < 0xe1 {
			return errNTFS
		}
		per = 1 << (256 - per)
	}
	if x.sector < 512 || x.sector > 4096 || x.sector&(x.sector-1) != 0 || per == 0 || per&(per-1) != 0 || per*x.sector > 2<<20 {
		return errNTFS
	}
	x.cluster = per * x.sector
	switch n := int8(b[0x40]); {
	case n > 0:
		x.record = uint64(n) * x.cluster
	case n >= -16 && n <= -9:
		x.record = 1 << -n
	}
	if x.record < 512 || x.record > 64<<10 || x.record < x.sector || x.record&(x.record-1) != 0 {
		return errNTFS
	}
	sectors := le.Uint64(b[0x28:])
	if sectors > x.s.size/x.sector {
		return errors.New("it is larger than what it lies in")
	}
	x.clusters = sectors / per
	if x.clusters == 0 {
		return errNTFS
	}
	if err := x.copy(ctx, b); err != nil {
		return err
	}
	// The first records, all that are needed, lie at the beginning of the table, which record 0
	// confirms.
	x.mft = byteRun{le.Uint64(b[0x30:]), (16*x.record + x.cluster - 1) / x.cluster}
	if x.mft.at >= x.clusters || x.mft.length > x.clusters-x.mft.at {
		return errNTFS
	}
	r, err := x.readRecord(ctx, ntfsMFT)
	if err != nil {
		return err
	}
	_, list, _, err := x.attribute(r, ntfsData)
	if err != nil {
		return err
	}
	if len(list) == 0 || list[0].at != x.mft.at || list[0].length < x.mft.length {
		return errNTFS
	}
	x.metadata = append(x.metadata, byteRun{0, 1}) // the boot sector
	x.metadata = append(x.metadata, list...)
	x.mirrorAt = le.Uint64(b[0x38:])
	return nil
}

// readRecord reads one of the first 16 records, and undoes its fixups.
func (x *ntfs) readRecord(ctx context.Context, number uint64) ([]byte, error) {
	b, err := x.s.get(ctx, x.mft.at*x.cluster+number*x.record, x.record)
	if err != nil {
		return nil, err
	}
	if string(b[:4]) != "FILE" || !x.fixup(b) {
		return nil, errNTFS
	}
	used := le.Uint32(b[0x18:])
	const inUse = 1
	if le.Uint16(b[0x16:])&inUse == 0 || used > uint32(len(b)) || uint64(le.Uint32(b[0x1c:])) != x.record || le.Uint64(b[0x20:]) != 0 {
		return nil, errNTFS
	}
	if le.Uint16(b[4:]) >= 0x30 && uint64(le.Uint32(b[0x2c:])) != number {
		return nil, errNTFS
	}
	return b[:used], nil
}

// fixup restores the last two bytes of each 512, and tells whether all were written together.
func (x *ntfs) fixup(b []byte) bool {
	at, count := int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	if count != len(b)/512+1 || at < 8 || at%2 != 0 || at+2*count > 510 {
		return false
	}
	for i := 1; i < count; i++ {
		end := b[i*512-2 : i*512]
		if !bytes.Equal(end, b[at:at+2]) {
			return false
		}
		copy(end, b[at+2*i:at+2*i+2])
	}
	return true
}

// attribute finds the one unnamed attribute of a type: its value, or where it lies and its size.
func (x *ntfs) attribute(record []byte, kind uint32) (value []byte, list []byteRun, size uint64, err error) {
	found := false
	if len(record) < 0x30 {
		return nil, nil, 0, errNTFS
	}
	for at := uint64(le.Uint16(record[0x14:])); ; {
		if at%8 != 0 || at+8 > uint64(len(record)) {
			return nil, nil, 0, errNTFS
		}
		t, length := le.Uint32(record[at:]), uint64(le.Uint32(record[at+4:]))
		if t == ntfsEnd {
			break
		}
		if length < 24 || length > uint64(len(record))-at {
			return nil, nil, 0, errNTFS
		}
		a := record[at : at+length]
		at += length
		if t == ntfsAttributeList {
			return nil, nil, 0, errors.New("its metadata is too fragmented")
		}
		if t != kind || a[9] != 0 {
			continue
		}
		if found {
			return nil, nil, 0, errNTFS
		}
		found = true
		const compressedEncryptedSparse = 0x1 | 0x4000 | 0x8000
		if le.Uint16(a[12:])&compressedEncryptedSparse != 0 {
			return nil, nil, 0, errNTFS
		}
		if a[8] == 0 { // resident
			n, from := uint64(le.Uint32(a[16:])), uint64(le.Uint16(a[20:]))
			if n > length || from > length-n {
				return nil, nil, 0, errNTFS
			}
			value = a[from : from+n]
			continue
		}
		if length < 64 {
			return nil, nil, 0, errNTFS
		}
		if list, size, err = x.runList(a); err != nil {
			return nil, nil, 0, err
		}
	}
	if !found {
		return nil, nil, 0, errNTFS
	}
	return value, list, size, nil
}

// runList decodes where an attribute that is not resident lies, in clusters, and its size in bytes.
func (x *ntfs) runList(a []byte) (list []byteRun, size uint64, err error) {
	from, size := int(le.Uint16(a[32:])), le.Uint64(a[48:])
	if le.Uint64(a[16:]) != 0 || from < 64 || from > len(a) || le.Uint64(a[56:]) > size {
		return nil, 0, errNTFS
	}
	number := func(p []byte, signed bool) (n int64) {
		for i := len(p) - 1; i >= 0; i-- {
			n = n<<8 | int64(p[i])
		}
		if k := len(p); signed && k > 0 && k < 8 && p[k-1]&0x80 != 0 {
			n -= 1 << (8 * k)
		}
		return n
	}
	var lcn int64
	var total uint64
	for p := a[from:]; ; {
		if len(p) == 0 {
			return nil, 0, errNTFS
		}
		l, o := int(p[0]&0xf), int(p[0]>>4)
		if p[0] == 0 {
			break
		}
		if l == 0 || l > 7 || o == 0 || o > 7 || len(p) < 1+l+o || len(list) >= ntfsMaxRuns {
			return nil, 0, errNTFS
		}
		n := number(p[1:1+l], false)
		lcn += number(p[1+l:1+l+o], true)
		if n <= 0 || lcn < 0 || uint64(lcn) >= x.clusters || uint64(n) > x.clusters-uint64(lcn) {
			return nil, 0, errNTFS
		}
		list = append(list, byteRun{uint64(lcn), uint64(n)})
		total += uint64(n)
		p = p[1+l+o:]
	}
	if !apart(slices.Clone(list)) || size > total*x.cluster {
		return nil, 0, errNTFS
	}
	return list, size, nil
}

// clean tells by $Volume and $LogFile whether it was dismounted.
func (x *ntfs) clean(ctx context.Context) error {
	r, err := x.readRecord(ctx, ntfsVolume)
	if err != nil {
		return err
	}
	info, _, _, err := x.attribute(r, ntfsVolumeInformation)
	if err != nil {
		return err
	}
	if len(info) < 12 || info[8] != 3 || info[9] != 1 {
		return errors.New("a version that is not known")
	}
	if le.Uint16(info[10:]) != 0 {
		return errors.New("it is marked dirty")
	}
	if r, err = x.readRecord(ctx, ntfsLog); err != nil {
		return err
	}
	_, list, size, err := x.attribute(r, ntfsData)
	if err != nil {
		return err
	}
	x.metadata = append(x.metadata, list...)
	const page = 4096
	if size < 2*page || len(list) == 0 || list[0].length*x.cluster < 2*page {
		return errNTFS
	}
	b, err := x.s.get(ctx, list[0].at*x.cluster, 2*page)
	if err != nil {
		return err
	}
	first, ok := x.restart(b[:page])
	second, also := x.restart(b[page:])
	if !ok || !also {
		return errors.New("$LogFile does not say that it was dismounted cleanly")
	}
	if !(first.clean || first.lsn < second.lsn) || !(second.clean || second.lsn < first.lsn) {
		return errors.New("mounted, hibernated or not dismounted cleanly, by $LogFile")
	}
	return nil
}

type ntfsRestart struct {
	lsn   uint64
	clean bool
}

// restart decodes a restart page; false where it is not one of version 1.1.
func (x *ntfs) restart(b []byte) (r ntfsRestart, ok bool) {
	if string(b[:4]) != "RSTR" || !x.fixup(b) || le.Uint32(b[16:]) != uint32(len(b)) || le.Uint32(b[20:]) != uint32(len(b)) {
		return r, false
	}
	at := int(le.Uint16(b[24:]))
	if le.Uint16(b[26:]) != 1 || le.Uint16(b[28:]) != 1 || at < 30 || at%8 != 0 || at+48 > 510 {
		return r, false
	}
	a := b[at:]
	r.lsn = le.Uint64(a)
	r.clean = le.Uint16(a[12:]) == ntfsNoClient || le.Uint16(a[14:])&ntfsVolumeClean != 0
	return r, true
}

// bitmap hands out the free runs, in clusters, in rising order.
func (x *ntfs) bitmap(ctx context.Context, yield func(at, n uint64)) error {
	r, err := x.readRecord(ctx, ntfsBitmap)
	if err != nil {
		return err
	}
	value, list, size, err := x.attribute(r, ntfsData)
	if err != nil {
		return err
	}
	if value != nil || size < (x.clusters+7)/8 {
		return errNTFS
	}
	used := append(slices.Clone(list), x.metadata...)
	if !apart(used) {
		return errNTFS
	}
	var last byteRun
	give := func(r byteRun) error {
		if last.length > 0 && last.end() == r.at {
			last.length += r.length
			return nil
		}
		if last.length > 0 {
			if overlap(used, []byteRun{last}) {
				return errors.New("its bitmap calls metadata free")
			}
			yield(last.at, last.length)
		}
		last = r
		return nil
	}
	first, left := uint64(0), x.clusters // bits
	buf := make([]byte, ntfsBitmapRead)
	for _, run := range list {
		for at, rest := run.at*x.cluster, run.length*x.cluster; rest > 0 && left > 0; {
			n := min(rest, ntfsBitmapRead)
			bits := min(left, 8*n)
			n = min(n, (bits+7)/8)
			if err := x.s.read(ctx, buf[:n], at); err != nil {
				return err
			}
			err := zeroBits(buf[:n], bits, func(i, k uint64) error { return give(byteRun{first + i, k}) })
			if err != nil {
				return err
			}
			first, left = first+bits, left-bits
			at, rest = at+n, rest-n
		}
	}
	if left > 0 {
		return errNTFS
	}
	return give(byteRun{})
}
