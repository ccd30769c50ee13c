package fsmap

import (
	"bytes"
	"context"
	"encoding/binary"
	"strings"
)

// headBytes is how much of a space is looked at to tell what is in it.
const headBytes = 68 << 10

var (
	le = binary.LittleEndian
	be = binary.BigEndian
)

// signature is how something is told by what lies at fixed places.
type signature struct {
	kind string
	at   int
	text string
}

// signatures are of what can be told. Those without a reader count as allocated; they are here
// because what they belong to may leave the rests of a file system in sight.
var signatures = []signature{
	{"XFS", 0, "XFSB"},
	{"NTFS", 3, "NTFS    "},
	{"ext", 1024 + 0x38, "\x53\xef"},
	{"LVM2", 0, "LABELONE"}, {"LVM2", 512, "LABELONE"}, {"LVM2", 1024, "LABELONE"}, {"LVM2", 1536, "LABELONE"},
	{"LUKS", 0, "LUKS\xba\xbe"}, {"LUKS", 0x4000, "SKUL\xba\xbe"},
	{"BitLocker", 3, "-FVE-FS-"},
	{"ReFS", 3, "ReFS\x00\x00\x00\x00"},
	{"exFAT", 3, "EXFAT   "}, {"FAT", 54, "FAT1"}, {"FAT", 82, "FAT32"},
	{"swap", 4086, "SWAPSPACE2"}, {"swap", 4086, "SWAP-SPACE"}, {"swap", 65526, "SWAPSPACE2"},
	{"Btrfs", 65536 + 64, "_BHRfS_M"},
	{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{"MD RAID", 0, mdMagic}, {"MD RAID", 4096, mdMagic},
	{"JFS", 32 << 10, "JFS1"},
	{"ReiserFS", 64<<10 + 52, "ReIsEr"}, {"ReiserFS", 8<<10 + 52, "ReIsEr"},
	{"GFS2", 64 << 10, "\x01\x16\x19\x70"},
	{"UFS", 8<<10 + 1372, "\x54\x19\x01\x00"}, {"UFS", 8<<10 + 1372, "\x00\x01\x19\x54"},
	{"UFS", 64<<10 + 1372, "\x19\x01\x54\x19"}, {"UFS", 64<<10 + 1372, "\x19\x54\x01\x19"},
	{"F2FS", 1 << 10, "\x10\x20\xf5\xf2"}, {"HFS+", 1 << 10, "H+\x00\x04"}, {"HFS+", 1 << 10, "HX\x00\x05"},
	{"Stratis", 512 + 4, "!Stra0tis"}, {"Oracle ASM", 32, "ORCLDISK"},
	{"bcachefs", 4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"},
	{"OCFS2", 1 << 10, "OCFSV2"}, {"OCFS2", 2 << 10, "OCFSV2"}, {"OCFS2", 4 << 10, "OCFSV2"}, {"OCFS2", 8 << 10, "OCFSV2"},
	{"ISO 9660", 32<<10 + 1, "CD001"}, {"UDF", 32<<10 + 1, "BEA01"}, {"Reiser4", 64 << 10, "ReIsEr4"},
	{"VxFS", 1 << 10, "\xf5\xfc\x01\xa5"}, {"VxFS", 8 << 10, "\xa5\x01\xfc\xf5"},
}

// ZFS leaves the first 8 KiB to others. Each of its labels, two at either end, has a ring of
// uberblocks in its second half, which begin with this at multiples of 1 KiB.
const (
	zfsLabel          = 256 << 10
	zfsLittle, zfsBig = "\x0c\xb1\xba\x00\x00\x00\x00\x00", "\x00\x00\x00\x00\x00\xba\xb1\x0c"
)

const mdMagic = "\xfc\x4e\x2b\xa9"

// disk reads the whole unit: a partition table, or what lies there without one.
func (m *mapper) disk(ctx context.Context, s *space) error {
	head, kinds, err := s.kinds(ctx)
	if err != nil {
		return m.unread("unknown content", s, err)
	}
	table := isTable(head, kinds)
	if table && len(kinds) > 0 {
		kinds = append([]string{"a partition table"}, kinds...)
	} else if table {
		return m.partitions(ctx, s, head)
	}
	return m.content(ctx, s, kinds, true)
}

// unread reports an error of what lies in s, or returns it where it ends the whole.
func (m *mapper) unread(kind string, s *space, err error) error {
	if fatal(err) {
		return err
	}
	m.find(Finding{Kind: kind, Where: s.where, Text: err.Error()})
	return nil
}

// contents reads what lies in a partition or a logical volume.
func (m *mapper) contents(ctx context.Context, s *space, volumes bool) error {
	head, kinds, err := s.kinds(ctx)
	if err != nil {
		return m.unread("unknown content", s, err)
	}
	if isTable(head, kinds) { // the disk of a guest
		if len(kinds) == 0 {
			m.find(Finding{Kind: "a partition table", Where: s.where, Text: "not read"})
			return nil
		}
		kinds = append([]string{"a partition table"}, kinds...)
	}
	return m.content(ctx, s, kinds, volumes)
}

// content reads what is of one of kinds; logical volumes only where volumes says so.
func (m *mapper) content(ctx context.Context, s *space, kinds []string, volumes bool) error {
	switch {
	case len(kinds) == 0:
		m.find(Finding{Kind: "unknown content", Where: s.where, Text: "not one of ext2, ext3, ext4, XFS, NTFS, LVM2"})
	case len(kinds) > 1:
		m.find(Finding{Kind: "ambiguous content", Where: s.where, Text: "signs of " + strings.Join(kinds, " and of ")})
	case kinds[0] == "ext":
		return m.fileSystem(s, func() (fs, error) { return readExt(ctx, s) })
	case kinds[0] == "XFS":
		return m.fileSystem(s, func() (fs, error) { return readXFS(ctx, s) })
	case kinds[0] == "NTFS":
		return m.fileSystem(s, func() (fs, error) { return readNTFS(ctx, s) })
	case kinds[0] == "LVM2" && volumes:
		return m.volumeGroup(ctx, s)
	default:
		m.find(Finding{Kind: kinds[0], Where: s.where, Text: "not read"})
	}
	return nil
}

// kinds gives the beginning of a space, and what the signatures there say; each kind once.
func (s *space) kinds(ctx context.Context) (head []byte, kinds []string, err error) {
	head = make([]byte, headBytes)
	if err := s.read(ctx, head[:min(s.size, headBytes)], 0); err != nil {
		return nil, nil, err
	}
	seen := map[string]bool{}
	say := func(kind string) {
		if !seen[kind] {
			seen[kind] = true
			kinds = append(kinds, kind)
		}
	}
	for _, g := range signatures {
		if bytes.HasPrefix(head[g.at:], []byte(g.text)) {
			say(g.kind)
		}
	}
	// Metadata 1.0 and 0.90 lie at the end.
	for _, at := range [...]uint64{(s.size - min(s.size, 8<<10)) &^ (4<<10 - 1), s.size&^(64<<10-1) - min(s.size&^(64<<10-1), 64<<10)} {
		if !s.holds(at, 4) {
			continue
		}
		tail, err := s.get(ctx, at, 4)
		if err != nil {
			return nil, nil, err
		}
		if string(tail) == mdMagic || string(tail) == "\xa9\x2b\x4e\xfc" {
			say("MD RAID")
		}
	}
	for _, label := range [...]uint64{0, s.size&^(zfsLabel-1) - min(s.size&^(zfsLabel-1), zfsLabel)} {
		if !s.holds(label+zfsLabel/2, zfsLabel/2) {
			continue
		}
		ring, err := s.get(ctx, label+zfsLabel/2, zfsLabel/2)
		if err != nil {
			return nil, nil, err
		}
		for ; len(ring) >= 1<<10; ring = ring[1<<10:] {
			if bytes.HasPrefix(ring, []byte(zfsLittle)) || bytes.HasPrefix(ring, []byte(zfsBig)) {
				say("ZFS")
			}
		}
	}
	return head, kinds, nil
}
