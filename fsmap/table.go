package fsmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

const (
	// A protective entry (UEFI 2.10, 5.2.3) and the containers of logical partitions.
	mbrProtective = 0xee
	maxLogical    = 128
	maxEntries    = 1024
)

// Partition types that are one file system or physical volume each. Others may be parts of
// something larger (dynamic disks), and are not looked into.
var (
	mbrTypes = []byte{0x07, 0x83, 0x8e}
	gptTypes = map[string]string{
		"0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux",
		"e6d6d379-f507-44c2-a23c-238f2a3df928": "LVM2",
		"ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "basic data",
		"4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "root, x86-64",
		"b921b045-1df0-41c3-af44-4c6f280d3fae": "root, ARM 64",
		"933ac7e1-2eb4-4f13-b844-0e14e2aef915": "/home",
		"3b8f8425-20e0-4f3b-907f-1a25a76f98e8": "/srv",
		"4d21b016-b534-45c2-a9fb-5c16e091fd2d": "/var",
		"bc13c2ff-59e6-4262-a352-b275fd6f7172": "/boot",
	}
)

// partition is one entry of a table, in blocks of the unit.
type partition struct {
	number        int
	first, blocks uint64
	readable      bool // its type is one of those above
	kind          string
}

// isTable tells whether a unit that begins with head has a partition table.
func isTable(head []byte, kinds []string) bool {
	if head[510] != 0x55 || head[511] != 0xaa {
		return false
	}
	// These begin with a boot sector of the same form, which has code, text or zeroes there. Tools
	// that make a table leave what lies before it, the name of one of these too.
	boots := slices.ContainsFunc(kinds, func(kind string) bool {
		return slices.Contains([]string{"NTFS", "BitLocker", "exFAT", "FAT", "ReFS"}, kind)
	})
	used := false
	for i := range 4 {
		e := head[446+16*i:][:16]
		if boots && (e[0]&0x7f != 0 || e[4] != 0 && (le.Uint32(e[8:]) == 0 || le.Uint32(e[12:]) == 0)) {
			return false
		}
		used = used || e[4] != 0
	}
	return used
}

// partitions reads a partition table and what lies in each partition.
func (m *mapper) partitions(ctx context.Context, s *space, head []byte) error {
	var list []partition
	var err error
	kind := "MBR partition table"
	gpt := false
	for i := range 4 {
		gpt = gpt || head[446+16*i+4] == mbrProtective
	}
	if gpt {
		kind = "GPT partition table"
		list, err = m.readGPT(ctx, s, head)
	} else {
		list, err = m.readMBR(ctx, s, head)
	}
	if err == nil {
		var taken []byteRun
		for _, p := range list {
			taken = append(taken, byteRun{p.first, p.blocks})
		}
		if !apart(taken) {
			err = errors.New("partitions overlap")
		}
	}
	if err != nil {
		return m.unread(kind, s, err)
	}
	if len(list) == 0 {
		m.find(Finding{Kind: kind, Where: s.where, Text: "no partitions"})
	}
	bs := uint64(m.info.BlockSize)
	for _, p := range list {
		in := s.part(fmt.Sprintf("partition %d", p.number), p.first*bs, p.blocks*bs)
		if !p.readable {
			m.find(Finding{Kind: "partition type " + p.kind, Where: in.where, Text: "not read"})
			continue
		}
		if err := m.contents(ctx, in, true); err != nil {
			return err
		}
	}
	return nil
}

// readMBR reads primary and logical partitions.
func (m *mapper) readMBR(ctx context.Context, s *space, head []byte) (list []partition, err error) {
	// The first sector is not a partition's.
	var extended *partition
	for i := range 4 {
		p, used, err := m.mbrEntry(head[446+16*i:], 0, partition{first: 1, blocks: m.info.Blocks - 1})
		if err != nil {
			return nil, err
		}
		if !used {
			continue
		}
		p.number = i + 1
		if t := head[446+16*i+4]; t == 0x05 || t == 0x0f || t == 0x85 {
			if extended != nil {
				return nil, errors.New("two extended partitions")
			}
			extended = &p
			continue
		}
		list = append(list, p)
	}
	if extended == nil {
		return list, nil
	}
	for _, p := range list {
		if p.first < extended.first+extended.blocks && extended.first < p.first+p.blocks {
			return nil, errors.New("partitions overlap")
		}
	}
	bs := uint64(m.info.BlockSize)
	at := extended.first
	for number := 5; ; number++ {
		if number-5 >= maxLogical {
			return nil, fmt.Errorf("more than %d logical partitions", maxLogical)
		}
		sector, err := s.get(ctx, at*bs, 512)
		if err != nil {
			return nil, err
		}
		if sector[510] != 0x55 || sector[511] != 0xaa {
			return nil, fmt.Errorf("the logical partition table at block %d has no signature", at)
		}
		p, used, err := m.mbrEntry(sector[446:], at, *extended)
		if err != nil {
			return nil, err
		}
		if used {
			// Its own table must not be a part of it.
			p.number = number
			list = append(list, p)
		}
		next, more, err := m.mbrEntry(sector[446+16:], extended.first, *extended)
		if err != nil {
			return nil, err
		}
		if !more {
			return list, nil
		}
		if next.first <= at {
			return nil, errors.New("the chain of logical partitions goes backwards")
		}
		at = next.first
	}
}

// mbrEntry decodes one entry whose start counts from base, and holds it against where it may lie.
func (m *mapper) mbrEntry(e []byte, base uint64, in partition) (partition, bool, error) {
	t, first, blocks := e[4], uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
	if t == 0 {
		return partition{}, false, nil
	}
	if e[0]&0x7f != 0 {
		return partition{}, false, errors.New("an entry has a status that there is not")
	}
	p := partition{first: base + first, blocks: blocks, readable: slices.Contains(mbrTypes, t), kind: fmt.Sprintf("%02xh", t)}
	if first == 0 || blocks == 0 || p.first < in.first || p.first+p.blocks > in.first+in.blocks {
		return partition{}, false, errors.New("a partition lies out of range")
	}
	return p, true, nil
}

// readGPT reads both copies, which must agree (UEFI 2.10, 5.3).
func (m *mapper) readGPT(ctx context.Context, s *space, head []byte) ([]partition, error) {
	for i := range 4 {
		if t := head[446+16*i+4]; t != 0 && t != mbrProtective {
			return nil, errors.New("a protective MBR with partitions of its own")
		}
	}
	primary, err := m.gptHeader(ctx, s, 1)
	if err != nil {
		return nil, fmt.Errorf("first header: %w", err)
	}
	backup, err := m.gptHeader(ctx, s, primary.other)
	if err != nil {
		return nil, fmt.Errorf("second header: %w", err)
	}
	a, b := primary, backup
	if b.other != 1 || a.first != b.first || a.last != b.last || a.guid != b.guid || a.count != b.count || a.size != b.size || a.sum != b.sum || !bytes.Equal(a.entries, b.entries) {
		return nil, errors.New("its two copies differ")
	}
	if a.first < 2 || a.last < a.first || a.last >= m.info.Blocks {
		return nil, errors.New("its usable blocks lie out of range")
	}
	var list []partition
	for i := range a.count {
		e := a.entries[i*a.size:]
		t := guid(e[:16])
		if t == guid(make([]byte, 16)) {
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if first < a.first || last < first || last > a.last {
			return nil, fmt.Errorf("partition %d lies out of range", i+1)
		}
		_, readable := gptTypes[t]
		list = append(list, partition{number: int(i) + 1, first: first, blocks: last - first + 1, readable: readable, kind: t})
	}
	return list, nil
}

type gptHeader struct {
	other, first, last uint64
	guid               string
	count, size        uint64
	sum                uint32
	entries            []byte
}

func (m *mapper) gptHeader(ctx context.Context, s *space, at uint64) (h gptHeader, err error) {
	bs := uint64(m.info.BlockSize)
	if at < 1 || at >= m.info.Blocks {
		return h, errors.New("it lies out of range")
	}
	b, err := s.get(ctx, at*bs, bs)
	if err != nil {
		return h, err
	}
	length := le.Uint32(b[12:])
	if string(b[:8]) != "EFI PART" || length < 92 || uint64(length) > bs || le.Uint64(b[24:]) != at {
		return h, errors.New("it is not one")
	}
	sum := le.Uint32(b[16:])
	clear(b[16:20])
	if m.wrong(crc32.ChecksumIEEE(b[:length]), sum) {
		return h, errors.New("its checksum is wrong")
	}
	h = gptHeader{other: le.Uint64(b[32:]), first: le.Uint64(b[40:]), last: le.Uint64(b[48:]), guid: guid(b[56:72]),
		count: uint64(le.Uint32(b[80:])), size: uint64(le.Uint32(b[84:])), sum: le.Uint32(b[88:])}
	entries := le.Uint64(b[72:])
	if h.count > maxEntries || h.size < 128 || h.size > 4096 || h.size&(h.size-1) != 0 {
		return h, errors.New("its entries have a size or number that is not usual")
	}
	// No entry may lie where partitions do.
	blocks := (h.count*h.size + bs - 1) / bs
	if entries >= m.info.Blocks || entries <= h.last && entries+blocks > h.first {
		return h, errors.New("its entries lie out of range")
	}
	if h.entries, err = s.get(ctx, entries*bs, h.count*h.size); err != nil {
		return h, err
	}
	if m.wrong(crc32.ChecksumIEEE(h.entries), h.sum) {
		return h, errors.New("the checksum of its entries is wrong")
	}
	return h, nil
}

// guid writes a GUID the usual way (RFC 4122; its first three fields are little-endian).
func guid(b []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}
