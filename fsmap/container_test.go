package fsmap

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// place copies an image to an offset of another.
func place(t testing.TB, from, to string, at int64) {
	t.Helper()
	p, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(p); i += mib {
		if q := p[i:min(len(p), i+mib)]; len(bytes.Trim(q, "\x00")) > 0 {
			change(t, to, at+int64(i), q)
		}
	}
}

func moved(runs []byteRun, by uint64) (out []byteRun) {
	for _, r := range runs {
		out = append(out, byteRun{r.at + by, r.length})
	}
	return out
}

// table writes a partition table by sfdisk.
func table(t testing.TB, path, script string) {
	t.Helper()
	peer.Need(t, "sfdisk")
	if err := peer.Partition(t.Context(), path, script); err != nil {
		t.Fatal(err)
	}
}

func small(t testing.TB) string { return image(t, 20*mib, "mkfs.ext4", "-q", "-F") }

// TestPartitionsAreFound puts file systems into the tables that sfdisk makes.
func TestPartitionsAreFound(t *testing.T) {
	ext := small(t)
	inside := dumpe2fs(t, ext)
	for _, c := range []struct {
		name, script string
		at           []int64 // of file systems, in MiB
		where        []string
		spoil        map[string]int64 // a byte of the table
	}{
		{"gpt", "label: gpt\nstart=2MiB,size=20MiB,type=linux\nstart=30MiB,size=20MiB,type=linux\nstart=60MiB,size=4MiB,type=swap\n", []int64{2, 30},
			[]string{"ext4 on partition 1: clean", "ext4 on partition 2: clean", "on partition 3: not read: counts as allocated"},
			map[string]int64{"first header": 512 + 40, "entries": 1024 + 32, "second header": 100*mib - 512 + 40, "second entries": 100*mib - 33*512 + 32, "protective MBR": 446 + 16 + 4}},
		{"mbr", "label: dos\nstart=2MiB,size=20MiB,type=83\nstart=30MiB,size=60MiB,type=5\nstart=31MiB,size=20MiB,type=83\nstart=60MiB,size=21MiB,type=83\n", []int64{2, 31, 60},
			[]string{"ext4 on partition 1: clean", "ext4 on partition 5: clean", "ext4 on partition 6: clean"},
			map[string]int64{"status": 446, "first block": 446 + 11, "logical table": 30*mib + 510}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := image(t, 100*mib, "")
			table(t, disk, c.script)
			var want []byteRun
			for _, at := range c.at {
				place(t, ext, disk, at*mib)
				want = append(want, moved(inside, uint64(at)*mib)...)
			}
			free, report := read(t, disk, 512, Use{})
			wantRuns(t, free, want)
			for i, w := range c.where {
				if i >= len(report) || !strings.Contains(report[i].String(), w) {
					t.Errorf("report %v, want %q", report, w)
				}
			}
			for name, at := range c.spoil {
				spoilt := same(t, disk)
				flip(t, spoilt, at)
				t.Log(name)
				wantNone(t, spoilt, "partition table")
			}
		})
	}
}

// TestBrokenTablesCountAsAllocated has chains that go round, and partitions that overlap.
func TestBrokenTablesCountAsAllocated(t *testing.T) {
	ext := small(t)
	entry := func(status, kind byte, first, blocks uint32) []byte {
		e := make([]byte, 16)
		e[0], e[4] = status, kind
		binary.LittleEndian.PutUint32(e[8:], first)
		binary.LittleEndian.PutUint32(e[12:], blocks)
		return e
	}
	const m = mib / 512
	for name, c := range map[string]struct {
		word    string
		entries [][]byte
		logical [][]byte // at 30 MiB
	}{
		"overlap":      {"overlap", [][]byte{entry(0, 0x83, 2*m, 20*m), entry(0, 0x83, 10*m, 20*m)}, nil},
		"out of range": {"out of range", [][]byte{entry(0, 0x83, 2*m, 200*m)}, nil},
		"two extended": {"two extended", [][]byte{entry(0, 5, 30*m, 10*m), entry(0, 5, 50*m, 10*m)}, nil},
		"round":        {"backwards", [][]byte{entry(0, 5, 30*m, 10*m)}, [][]byte{entry(0, 0x83, 8, 8), entry(0, 5, 0, 10*m)}},
		"outside":      {"out of range", [][]byte{entry(0, 5, 30*m, 10*m)}, [][]byte{entry(0, 0x83, 8, 20*m)}},
	} {
		t.Run(name, func(t *testing.T) {
			disk := image(t, 100*mib, "")
			place(t, ext, disk, 2*mib)
			change(t, disk, 446, bytes.Join(c.entries, nil))
			change(t, disk, 510, []byte{0x55, 0xaa})
			if name == "round" {
				// Its own block as the next one.
				binary.LittleEndian.PutUint32(c.logical[1][8:], 1)
				change(t, disk, 30*mib+512+446, append(entry(0, 0x83, 8, 8), entry(0, 5, 1, 10)...))
				change(t, disk, 30*mib+512+510, []byte{0x55, 0xaa})
				binary.LittleEndian.PutUint32(c.logical[1][12:], 10)
			}
			change(t, disk, 30*mib+446, bytes.Join(c.logical, nil))
			change(t, disk, 30*mib+510, []byte{0x55, 0xaa})
			wantNone(t, disk, c.word)
		})
	}
}

const lvmGroup = `vg {
	id = "9LUrcw-tRFo-7Ik9-6rP1-JmWC-h6AH-3dEfnK"
	seqno = 2
	format = "lvm2"			# informational
	status = ["RESIZEABLE", "READ", "WRITE"]
	flags = []
	extent_size = 2048		# 1 Megabyte
	max_lv = 0
	max_pv = 0
	metadata_copies = 0
	physical_volumes {
		pv0 {
			id = "P2joIU-zA6g-nuG7-qYHN-bmxC-ocpD-UJi9K9"
			device = "/dev/sda"	# Hint only
			status = ["ALLOCATABLE"]
			flags = []
			dev_size = 204800
			pe_start = 2048
			pe_count = 98
		}
	}
	logical_volumes {
		root { id = "a" status = ["READ", "WRITE", "VISIBLE"] flags = [] creation_time = 1795410414 segment_count = 2
			segment1 { start_extent = 0 extent_count = 7 type = "striped" stripe_count = 1 stripes = [ "pv0", 40 ] }
			segment2 { start_extent = 7 extent_count = 13 type = "striped" stripe_count = 1 stripes = [ "pv0", 5 ] }
		}
		snapped { id = "b" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 1
			segment1 { start_extent = 0 extent_count = 20 type = "striped" stripe_count = 1 stripes = [ "pv0", 60 ] }
		}
		snapshot0 { id = "c" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 1
			segment1 { start_extent = 0 extent_count = 20 type = "snapshot" chunk_size = 8 origin = "snapped" cow_store = "snap" }
		}
		snap { id = "d" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count = 1
			segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 1 stripes = [ "pv0", 80 ] }
		}
	}
}
# Generated by LVM2
contents = "Text Format Volume Group"
version = 1
`

// physicalVolume writes label and metadata of LVM2, the text wrapped round the area's end.
func physicalVolume(t testing.TB, path, text string) {
	label := make([]byte, 512)
	copy(label, "LABELONE")
	binary.LittleEndian.PutUint64(label[8:], 1)
	binary.LittleEndian.PutUint32(label[20:], 32)
	copy(label[24:], "LVM2 001")
	copy(label[32:], "P2joIUzA6gnuG7qYHNbmxCocpDUJi9K9")
	const area, size = 4096, 64 << 10
	for i, n := range []uint64{100 * mib, mib, 0, 0, 0, area, size, 0, 0} {
		binary.LittleEndian.PutUint64(label[64+8*i:], n)
	}
	binary.LittleEndian.PutUint32(label[16:], lvmCRC(label[20:]))
	change(t, path, 512, label)
	at := size - 1024
	header := make([]byte, 512)
	copy(header[4:], lvmMagic)
	binary.LittleEndian.PutUint32(header[20:], 1)
	binary.LittleEndian.PutUint64(header[24:], area)
	binary.LittleEndian.PutUint64(header[32:], size)
	binary.LittleEndian.PutUint64(header[40:], uint64(at))
	binary.LittleEndian.PutUint64(header[48:], uint64(len(text)+1))
	binary.LittleEndian.PutUint32(header[56:], lvmCRC([]byte(text+"\x00")))
	binary.LittleEndian.PutUint32(header, lvmCRC(header[4:]))
	change(t, path, area, header)
	change(t, path, int64(area+at), []byte(text[:1024]))
	change(t, path, area+512, []byte(text[1024:]+"\x00"))
}

// TestLinearLogicalVolumesAreFound: one of two pieces is; the origin of a snapshot is not, as the
// snapshot has what the origin's file system has free.
// Caught: the origin's free blocks taken for free.
func TestLinearLogicalVolumesAreFound(t *testing.T) {
	if got := crc32.ChecksumIEEE(nil); got != 0 {
		t.Fatal(got)
	}
	ext := small(t)
	disk := image(t, 100*mib, "")
	root, err := os.ReadFile(ext)
	if err != nil {
		t.Fatal(err)
	}
	change(t, disk, 41*mib, root[:7*mib])
	change(t, disk, 6*mib, root[7*mib:])
	place(t, ext, disk, 61*mib)
	physicalVolume(t, disk, lvmGroup)
	var r runs
	for _, f := range dumpe2fs(t, ext) {
		for at := f.at; at < f.end(); at += 512 {
			if at < 7*mib {
				r.add(at+41*mib, 512)
			} else {
				r.add(at-mib, 512)
			}
		}
	}
	free, report := read(t, disk, 512, Use{})
	wantRuns(t, free, long(r.list))
	if s := fmt.Sprint(report); !strings.Contains(s, "ext4 on logical volume vg/root: clean") || !strings.Contains(s, "vg/snapped: not a linear one that stands alone: counts as allocated") {
		t.Errorf("report %v", s)
	}
	for name, c := range map[string]struct{ word, old, new string }{
		"several physical volumes": {"other physical volumes", "physical_volumes {", "physical_volumes { pv1 { id = \"x\" }"},
		"striped":                  {"not a linear one", "extent_count = 7 type = \"striped\" stripe_count = 1 stripes = [ \"pv0\", 40 ]", "extent_count = 8 type = \"striped\" stripe_count = 2 stripes = [ \"pv0\", 40, \"pv0\", 30 ]"},
		"overlap":                  {"overlap", "\"pv0\", 5 ]", "\"pv0\", 35 ]"},
		"out of range":             {"inconsistent", "\"pv0\", 5 ]", "\"pv0\", 90 ]"},
		"a gap":                    {"inconsistent", "start_extent = 7", "start_extent = 8"},
		"another's":                {"inconsistent", "P2joIU-", "Q2joIU-"},
		"being moved":              {"not a linear one", "root { id = \"a\" status = [", "root { id = \"a\" status = [\"LOCKED\", "},
		"exported":                 {"not in a usual state", "[\"RESIZEABLE\"", "[\"EXPORTED\", \"RESIZEABLE\""},
		"huge":                     {"inconsistent", "pe_count = 98", "pe_count = 9800000000000000000"},
		"no end":                   {"cannot be read", "seqno = 2", "seqno = [2"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(lvmGroup, c.old, c.new, 1)
			if text == lvmGroup {
				t.Fatal("nothing is changed")
			}
			if name == "striped" {
				text = strings.Replace(text, "start_extent = 7", "start_extent = 8", 1)
			}
			spoilt := same(t, disk)
			physicalVolume(t, spoilt, text)
			wantNone(t, spoilt, c.word)
		})
	}
	flip(t, disk, 512+33)
	wantNone(t, disk, "checksum of its label")
}

// windows stamps an NTFS as Windows leaves it: both restart pages of $LogFile say that there is no
// client (mkntfs leaves the log empty, as other drivers do while it is mounted).
func windows(t testing.TB, path string, change2 func(page []byte)) int64 {
	t.Helper()
	at := logFile(t, path)
	page := make([]byte, 4096)
	copy(page, "RSTR")
	put16 := func(at int, n uint16) { binary.LittleEndian.PutUint16(page[at:], n) }
	put32 := func(at int, n uint32) { binary.LittleEndian.PutUint32(page[at:], n) }
	put16(4, 30)
	put16(6, 9)
	put32(16, 4096)
	put32(20, 4096)
	put16(24, 48)
	put16(26, 1)
	put16(28, 1)
	put16(48+8, 1)
	put16(48+10, 0)
	put16(48+12, ntfsNoClient)
	put16(48+14, 0)
	if change2 != nil {
		change2(page)
	}
	for i := 1; i <= 8; i++ {
		copy(page[30+2*i:], page[512*i-2:512*i])
		put16(512*i-2, 7)
	}
	put16(30, 7)
	change(t, path, at, page)
	change(t, path, at+4096, page)
	return at
}

// logFile is where $LogFile begins, in bytes.
func logFile(t testing.TB, path string) (at int64) {
	t.Helper()
	inNTFS(t, path, func(ctx context.Context, x *ntfs) {
		r, err := x.readRecord(ctx, ntfsLog)
		if err != nil {
			t.Fatal(err)
		}
		_, list, _, err := x.attribute(r, ntfsData)
		if err != nil {
			t.Fatal(err)
		}
		at = int64(list[0].at * x.cluster)
	})
	return at
}

func inNTFS(t testing.TB, path string, do func(context.Context, *ntfs)) {
	t.Helper()
	d, err := lun.Open(t.Context(), path, lun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	m := &mapper{dev: d, info: d.Info(), left: 1 << 30}
	x := &ntfs{s: &space{m: m, size: d.Info().Size(), pieces: []piece{{length: d.Info().Size()}}}}
	if err := x.boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	do(t.Context(), x)
}

// TestNTFSFreeClustersAreThoseOfNtfscat holds what is free against $Bitmap as ntfs-3g reads it.
func TestNTFSFreeClustersAreThoseOfNtfscat(t *testing.T) {
	peer.Need(t, "ntfscat", "ntfscp", "ntfsinfo")
	file := image(t, 3*mib, "")
	change(t, file, 0, bytes.Repeat([]byte("content "), 3*mib/8))
	for _, args := range []string{"-c 4096", "-c 512", "-c 65536", "-s 4096 -c 4096"} {
		t.Run(args, func(t *testing.T) {
			path := image(t, 80*mib, "mkntfs", append([]string{"-Q", "-q", "-F", "-p", "0", "-H", "0", "-S", "0"}, strings.Fields(args)...)...)
			for i := range 4 {
				run(t, "ntfscp", "-q", path, file, fmt.Sprintf("file%d", i))
			}
			wantNone(t, path, "$LogFile") // empty: it may be mounted
			windows(t, path, nil)
			// ntfs-3g agrees that it is clean.
			info := run(t, "ntfsinfo", "-m", path)
			cluster, err := strconv.ParseUint(regexp.MustCompile(`Cluster Size: +(\d+)`).FindStringSubmatch(info)[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			count, err := strconv.ParseUint(regexp.MustCompile(`Volume Size in Clusters: +(\d+)`).FindStringSubmatch(info)[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "ntfscat", "-f", path, "$Bitmap")
			bits, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			var want runs
			for i := range count {
				if bits[i/8]>>(i%8)&1 == 0 {
					want.add(i*cluster, cluster)
				}
			}
			free, report := read(t, path, 512, Use{Idle: true})
			wantRuns(t, free, long(want.list))
			if len(report) != 1 || !strings.HasPrefix(report[0].String(), "NTFS on the whole unit: clean, ") {
				t.Errorf("report %v, want a clean NTFS", report)
			}
			if free, _ := read(t, path, 512, Use{}); len(free) > 0 {
				t.Error("it may be mounted, and its blocks count as free")
			}
			scribble(t, path, free, 0xa5)
			for i := range 4 {
				cmd := exec.CommandContext(t.Context(), "ntfscat", "-f", path, fmt.Sprintf("file%d", i))
				if out, err := cmd.Output(); err != nil || !bytes.Equal(out, bytes.Repeat([]byte("content "), 3*mib/8)) {
					t.Errorf("file%d is another one: %v", i, err)
				}
			}
		})
	}
}

// TestNTFSNotCleanCountsAsAllocated spoils one thing after another.
func TestNTFSNotCleanCountsAsAllocated(t *testing.T) {
	clean := image(t, 40*mib, "mkntfs", "-Q", "-q", "-F", "-p", "0", "-H", "0", "-S", "0")
	var mft int64
	var bitmap int64
	inNTFS(t, clean, func(ctx context.Context, x *ntfs) {
		mft = int64(x.mft.at * x.cluster)
		r, err := x.readRecord(ctx, ntfsBitmap)
		if err != nil {
			t.Fatal(err)
		}
		_, list, _, err := x.attribute(r, ntfsData)
		if err != nil {
			t.Fatal(err)
		}
		bitmap = int64(list[0].at * x.cluster)
	})
	log := windows(t, clean, nil)
	page := func(at int, n uint16) func(*testing.T, string) {
		return func(t *testing.T, p string) {
			windows(t, p, func(b []byte) { binary.LittleEndian.PutUint16(b[at:], n) })
		}
	}
	for _, c := range []struct {
		name, word string
		spoil      func(*testing.T, string)
	}{
		{"mounted", "mounted", page(48+12, 0)},
		{"mounted by Windows 8 and later, or hibernated", "$LogFile", page(26, 2)},
		{"an empty log", "$LogFile", func(t *testing.T, p string) { change(t, p, log, bytes.Repeat([]byte{0xff}, 8192)) }},
		{"a torn restart page", "$LogFile", func(t *testing.T, p string) { flip(t, p, log+4096+1022) }},
		{"a torn record", "inconsistent", func(t *testing.T, p string) { flip(t, p, mft+6*1024+510) }},
		{"marked dirty", "marked dirty", func(t *testing.T, p string) {
			r := bytesAt(t, p, mft+3*1024, 1024)
			i := bytes.Index(r, []byte{3, 1, 0, 0}) // version 3.1, no flags
			change(t, p, mft+3*1024+int64(i)+2, []byte{1})
		}},
		{"bitmap frees itself", "metadata free", func(t *testing.T, p string) { change(t, p, bitmap, make([]byte, 1024)) }},
		{"bitmap frees the boot sector", "metadata free", func(t *testing.T, p string) {
			change(t, p, bitmap, []byte{bytesAt(t, p, bitmap, 1)[0] &^ 1})
		}},
		{"bitmap frees the log", "metadata free", func(t *testing.T, p string) {
			change(t, p, bitmap+log/4096/8+1, make([]byte, 16))
		}},
		{"larger than the unit", "larger than what it lies in", func(t *testing.T, p string) {
			if err := os.Truncate(p, 39*mib); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := same(t, clean)
			c.spoil(t, path)
			wantNone(t, path, c.word)
		})
	}
	if free, _ := read(t, clean, 512, Use{Idle: true}); len(free) == 0 {
		t.Error("nothing is free where nothing is spoilt: the test shows nothing")
	}
}

// TestWhatIsNotUnderstoodCountsAsAllocated.
func TestWhatIsNotUnderstoodCountsAsAllocated(t *testing.T) {
	wantNone(t, image(t, 10*mib, ""), "unknown content")
	wantNone(t, image(t, 10*mib, "mkswap", "-q"), "swap")
	wantNone(t, image(t, 512, ""), "unknown content")
	disk := image(t, 10*mib, "")
	change(t, disk, 0, []byte("LUKS\xba\xbe"))
	wantNone(t, disk, "LUKS")
}

// TestAnOldFileSystemBesideSomethingElseCountsAsAllocated: what came after it left its beginning
// alone. Caught: a partition that is not asked for a table; no look for ZFS; a boot sector's name that
// has a table count as code.
func TestAnOldFileSystemBesideSomethingElseCountsAsAllocated(t *testing.T) {
	ext := small(t)
	if free, _ := read(t, ext, 512, Use{}); len(free) == 0 {
		t.Fatal("nothing is free in what is to be spoilt: the test shows nothing")
	}
	for _, ring := range []int64{128 << 10, 20*mib - 128<<10} {
		for _, magic := range []string{zfsLittle, zfsBig} {
			pool := same(t, ext)
			change(t, pool, ring+5<<10, []byte(magic))
			wantNone(t, pool, "ambiguous content")
		}
	}
	for at, magic := range map[int64]string{32 << 10: "JFS1", 64<<10 + 52: "ReIsEr2Fs", 64 << 10: "\x01\x16\x19\x70", 8<<10 + 1372: "\x54\x19\x01\x00", 8 << 10: "\xa5\x01\xfc\xf5",
		32: "ORCLDISK", 516: "!Stra0tis", 4<<10 + 24: "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", 4 << 10: "OCFSV2", 32<<10 + 1: "CD001"} {
		other := same(t, ext)
		change(t, other, at, []byte(magic))
		wantNone(t, other, "ambiguous content")
	}
	// A guest's disk in a partition that was a file system.
	guest := same(t, ext)
	run(t, "sh", "-c", "printf 'label: dos\\nstart=1MiB,size=10MiB,type=7\\n' | sfdisk -q --wipe never \"$0\"", guest)
	disk := image(t, 100*mib, "")
	table(t, disk, "label: gpt\nstart=2MiB,size=20MiB,type=linux\n")
	place(t, guest, disk, 2*mib)
	wantNone(t, disk, "ambiguous content")
	// sfdisk leaves the boot sector of an NTFS before the table that it writes, and a file system in
	// the partition leaves the rest.
	old := image(t, 60*mib, "mkntfs", "-Q", "-q", "-F", "-p", "0", "-H", "0", "-S", "0")
	windows(t, old, nil)
	if free, _ := read(t, old, 512, Use{Idle: true}); len(free) == 0 {
		t.Fatal("nothing is free in what is to be spoilt: the test shows nothing")
	}
	for _, magic := range []string{"\x10\x20\xf5\xf2", "H+\x00\x04", "HX\x00\x05"} {
		other := same(t, old)
		change(t, other, 1<<10, []byte(magic))
		wantNone(t, other, "ambiguous content")
	}
	table(t, old, "label: dos\nstart=1MiB,size=50MiB,type=83\n")
	place(t, image(t, 50*mib, "mkfs.ext4", "-q", "-F", "-b", "4096"), old, mib)
	if string(bytesAt(t, old, 3, 4)) != "NTFS" {
		t.Fatal("the boot sector is gone: the test shows nothing")
	}
	wantNone(t, old, "a partition table and of NTFS")
}
