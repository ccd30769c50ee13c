package fsmap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"lunshift/lun"
	"lunshift/tests/peer"
)

const mib = 1 << 20

// image makes a file of so many bytes, and runs a tool with its path as the last argument.
func image(t testing.TB, size int64, tool string, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	if tool != "" {
		run(t, tool, append(args, path)...)
	}
	return path
}

func run(t testing.TB, tool string, args ...string) string {
	t.Helper()
	peer.Need(t, tool)
	out, err := peer.Run(t.Context(), tool, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// tree makes files of many sizes, about 24 MiB, some of which drop is to remove again.
func tree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(7, 7))
	for i := range 120 {
		p := make([]byte, rng.IntN(400<<10))
		for j := range p {
			p[j] = byte(rng.Uint32())
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%03d", i)), p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// read is Allocated of an image.
func read(t testing.TB, path string, block uint32, use Use) ([]byteRun, Report) {
	t.Helper()
	d, err := lun.Open(t.Context(), path, lun.Options{BlockSize: block})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	m, r, err := Allocated(t.Context(), d, d.Info().All(), use)
	if err != nil {
		t.Fatal(err)
	}
	var list []byteRun
	for _, e := range m.Free {
		list = append(list, byteRun{uint64(e.Start) * uint64(block), e.Blocks * uint64(block)})
	}
	return list, r
}

// change writes bytes at an offset of an image.
func change(t testing.TB, path string, at int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, at); err != nil {
		t.Fatal(err)
	}
}

// bytesAt reads n bytes of an image.
func bytesAt(t testing.TB, path string, at int64, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, at); err != nil {
		t.Fatal(err)
	}
	return p
}

// flip changes one byte of an image.
func flip(t testing.TB, path string, at int64) {
	t.Helper()
	change(t, path, at, []byte{^bytesAt(t, path, at, 1)[0]})
}

// same is a copy of an image.
func same(t testing.TB, path string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	run(t, "cp", "--sparse=always", path, to)
	return to
}

// scribble writes what a file system must not mind into the runs of an image: to both ends of
// each, and to a part of each 64 KiB between.
func scribble(t testing.TB, path string, runs []byteRun, with byte) {
	t.Helper()
	p := bytes.Repeat([]byte{with}, 4096)
	for _, r := range runs {
		for at := r.at; at+4096 <= r.end(); at += 64 << 10 {
			change(t, path, int64(at), p)
		}
		change(t, path, int64(r.end())-4096, p)
	}
}

// long leaves out runs that are too short to be told, and puts the others in order.
func long(runs []byteRun) []byteRun {
	runs = slices.DeleteFunc(runs, func(r byteRun) bool { return r.length < leastFree })
	slices.SortFunc(runs, func(a, b byteRun) int { return int(a.at) - int(b.at) })
	return runs
}

func wantRuns(t testing.TB, have, want []byteRun) {
	t.Helper()
	if len(want) == 0 {
		t.Fatal("the tool tells no free runs")
	}
	if !slices.Equal(have, want) {
		t.Errorf("free are %v, the tool says %v", have, want)
	}
}

// wantNone demands that nothing counts as free, for a reason that holds a word.
func wantNone(t testing.TB, path string, word string) {
	t.Helper()
	free, report := read(t, path, 512, Use{Idle: true})
	if len(free) > 0 {
		t.Errorf("%d runs are free, none should be: %v", len(free), report)
	}
	if !strings.Contains(fmt.Sprint(report), word) {
		t.Errorf("%v does not say %q", report, word)
	}
	for _, f := range report {
		if !strings.HasSuffix(f.String(), ": counts as allocated") {
			t.Errorf("%v does not say that it counts as allocated", f)
		}
	}
}

// dumpe2fs gives the free runs that e2fsprogs sees, in bytes.
func dumpe2fs(t testing.TB, path string) []byteRun {
	t.Helper()
	out := run(t, "dumpe2fs", path)
	bs, err := strconv.ParseUint(regexp.MustCompile(`Block size: +(\d+)`).FindStringSubmatch(out)[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	cluster := uint64(1) // a run's end is told as the first block of its last cluster
	if m := regexp.MustCompile(`Cluster size: +(\d+)`).FindStringSubmatch(out); m != nil {
		if cluster, err = strconv.ParseUint(m[1], 10, 64); err != nil {
			t.Fatal(err)
		}
		cluster /= bs
	}
	var r runs
	for _, m := range regexp.MustCompile(`(?m)^  Free blocks: (.+)$`).FindAllStringSubmatch(out, -1) {
		for _, part := range strings.Split(m[1], ", ") {
			var a, b uint64
			if n, _ := fmt.Sscanf(part, "%d-%d", &a, &b); n == 1 {
				b = a
			} else if n != 2 {
				continue
			}
			r.add(a*bs, (b-a+cluster)*bs)
		}
	}
	return long(r.list)
}

// TestExtFreeBlocksAreThoseOfDumpe2fs holds each layout that mkfs makes against e2fsprogs, and
// scribbles over all that is called free: e2fsck and every file must not mind.
// Caught: group descriptors of meta_bg looked for behind the copy of the superblock always.
func TestExtFreeBlocksAreThoseOfDumpe2fs(t *testing.T) {
	files := tree(t)
	removals := filepath.Join(t.TempDir(), "removals")
	var rm strings.Builder
	for i := 0; i < 120; i += 7 {
		fmt.Fprintf(&rm, "rm f%03d\n", i)
	}
	if err := os.WriteFile(removals, []byte(rm.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		kind string
		args string
	}{
		{"ext2", "-t ext2"},
		{"ext3", "-t ext3"},
		{"ext4", "-t ext4"},
		{"ext4", "-t ext4 -b 1024"},
		{"ext4", "-t ext4 -O ^metadata_csum,uninit_bg"},
		{"ext4", "-t ext4 -O ^metadata_csum,uninit_bg,^64bit -b 1024"},
		{"ext4", "-t ext4 -O ^metadata_csum,^uninit_bg"},
		{"ext4", "-t ext4 -O meta_bg,^resize_inode -b 1024 -g 1024"},
		{"ext4", "-t ext4 -O meta_bg,^resize_inode,^sparse_super -b 1024 -g 1024"},
		{"ext4", "-t ext4 -O bigalloc -C 16384"},
		{"ext4", "-t ext4 -O bigalloc -C 16384 -b 1024"},
		{"ext4", "-t ext4 -O ^flex_bg,^64bit"},
		{"ext4", "-t ext4 -O sparse_super2 -b 1024"},
		{"ext4", "-t ext4 -O ^sparse_super,^resize_inode -b 1024"},
		{"ext4", "-t ext4 -O mmp,inline_data,metadata_csum_seed"},
		{"ext4", "-t ext4 -O ^has_journal -g 8192"},
	} {
		t.Run(c.args, func(t *testing.T) {
			t.Parallel()
			path := image(t, 120*mib+3<<10, "mkfs.ext4", append([]string{"-q", "-F", "-d", files}, strings.Fields(c.args)...)...)
			if !strings.Contains(c.args, "mmp") { // which has debugfs wait long
				run(t, "debugfs", "-w", "-f", removals, path)
			}
			run(t, "e2fsck", "-fn", path)
			free, report := read(t, path, 512, Use{})
			wantRuns(t, free, dumpe2fs(t, path))
			if len(report) != 1 || !report[0].Read || report[0].Kind != c.kind || !strings.HasPrefix(report[0].String(), c.kind+" on the whole unit: clean, ") {
				t.Errorf("report %v, want a clean %s", report, c.kind)
			}
			scribble(t, path, free, 0xa5)
			run(t, "e2fsck", "-fn", path)
			out := t.TempDir()
			run(t, "debugfs", "-R", "rdump / "+out, path)
			for _, i := range []int{1, 50, 118} {
				name := fmt.Sprintf("f%03d", i)
				want, err := os.ReadFile(filepath.Join(files, name))
				if err != nil {
					t.Fatal(err)
				}
				if have, err := os.ReadFile(filepath.Join(out, name)); err != nil || !bytes.Equal(have, want) {
					t.Errorf("%s is another file: %v", name, err)
				}
			}
		})
	}
}

// firstBlock is where the content of an inode begins, in blocks.
func firstBlock(t testing.TB, path string, inode int) int64 {
	t.Helper()
	for _, line := range strings.Split(run(t, "debugfs", "-R", fmt.Sprintf("bmap <%d> 0", inode), path), "\n") {
		if n, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64); err == nil {
			return n
		}
	}
	t.Fatalf("inode %d has no first block", inode)
	return 0
}

// TestExtNotCleanCountsAsAllocated spoils one thing after another.
func TestExtNotCleanCountsAsAllocated(t *testing.T) {
	clean := image(t, 64*mib, "mkfs.ext4", "-q", "-F", "-b", "1024")
	protected := image(t, 64*mib, "mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "mmp")
	number := func(path, field string) int64 {
		m := regexp.MustCompile(field + `\D*(\d+)`).FindStringSubmatch(run(t, "dumpe2fs", path))
		n, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	bitmap, journal, mmp := number(clean, "Block bitmap at"), firstBlock(t, clean, 8), number(protected, "MMP block number:")
	tool := func(commands ...string) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			list := filepath.Join(t.TempDir(), "commands")
			if err := os.WriteFile(list, []byte(strings.Join(commands, "\n")+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, "debugfs", "-w", "-f", list, path)
		}
	}
	for _, c := range []struct {
		name, word string
		spoil      func(*testing.T, string)
	}{
		{"mounted without a journal", "mounted", tool("ssv state 0")},
		{"errors", "recorded errors", tool("ssv state 3")},
		{"an error once", "recorded errors", tool("ssv error_count 1")},
		{"journal not empty", "its journal is not empty", tool("feature needs_recovery")},
		{"orphans", "orphaned", tool("ssv last_orphan 12")},
		{"unknown feature", "not known", tool("feature FEATURE_I30")},
		{"superblock's checksum", "checksum of its superblock", func(t *testing.T, p string) { flip(t, p, 1024+0x30) }},
		{"descriptor's checksum", "checksum of block group 0", func(t *testing.T, p string) { flip(t, p, 2048+0x0c) }},
		{"bitmap's checksum", "checksum of the bitmap", func(t *testing.T, p string) { flip(t, p, bitmap*1024+700) }},
		{"free count", "by its descriptor", tool("set_bg 0 free_blocks_count 3", "set_bg 0 checksum calc")},
		{"free count of a group without a bitmap", "without its metadata", tool("set_bg 1 free_blocks_count 3", "set_bg 1 checksum calc")},
		{"bitmap elsewhere", "checksum of the bitmap", tool("set_bg 0 block_bitmap 5000", "set_bg 0 checksum calc")},
		{"bitmaps in one place", "overlaps", tool(fmt.Sprintf("set_bg 1 block_bitmap %d", bitmap), "set_bg 1 checksum calc")},
		{"bitmap out of range", "out of range", tool("set_bg 1 block_bitmap 99999999", "set_bg 1 checksum calc")},
		{"journal with a transaction", "its journal is not empty", func(t *testing.T, p string) { change(t, p, journal*1024+0x1c, []byte{0, 0, 0, 9}) }},
		{"journal is none", "journal is inconsistent", func(t *testing.T, p string) { flip(t, p, journal*1024) }},
		{"mounted by its MMP", "multiple mount", func(t *testing.T, p string) { flip(t, p, mmp*1024+4) }},
		{"larger than the unit", "larger than what it lies in", func(t *testing.T, p string) {
			if err := os.Truncate(p, 63*mib); err != nil {
				t.Fatal(err)
			}
		}},
		{"a member of a mirror", "MD RAID", func(t *testing.T, p string) {
			if err := os.Truncate(p, 65*mib); err != nil {
				t.Fatal(err)
			}
			change(t, p, 65*mib-8<<10, []byte(mdMagic))
		}},
		{"signs of another", "signs of", func(t *testing.T, p string) { change(t, p, 0, []byte("XFSB")) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := clean
			if strings.Contains(c.name, "MMP") {
				from = protected
			}
			path := same(t, from)
			if free, _ := read(t, path, 512, Use{}); len(free) == 0 {
				t.Error("nothing is free where nothing is spoilt: this shows nothing")
			}
			c.spoil(t, path)
			wantNone(t, path, c.word)
		})
	}
	if free, _ := read(t, clean, 512, Use{}); len(free) == 0 {
		t.Error("nothing is free where nothing is spoilt: the test shows nothing")
	}
}

// freesp gives the free runs that xfsprogs sees, in bytes.
func freesp(t testing.TB, path string) []byteRun {
	t.Helper()
	sb := run(t, "xfs_db", "-r", "-c", "sb 0", "-c", "p blocksize agblocks", path)
	var bs, ag uint64
	if _, err := fmt.Sscanf(strings.ReplaceAll(sb, "\n", " "), "blocksize = %d agblocks = %d", &bs, &ag); err != nil {
		t.Fatal(err)
	}
	var list []byteRun
	for _, line := range strings.Split(run(t, "xfs_db", "-r", "-c", "freesp -d", path), "\n") {
		var no, at, n uint64
		if strings.Contains(line, "from") {
			break
		}
		if k, _ := fmt.Sscan(line, &no, &at, &n); k == 3 {
			list = append(list, byteRun{(no*ag + at) * bs, n * bs})
		}
	}
	return long(list)
}

// TestXFSFreeBlocksAreThoseOfXfsDb holds each layout that mkfs makes against xfsprogs.
// Caught: the free blocks of every allocation group counted from the first one's start.
func TestXFSFreeBlocksAreThoseOfXfsDb(t *testing.T) {
	files := tree(t)
	proto := filepath.Join(t.TempDir(), "proto")
	var b strings.Builder
	b.WriteString("/dev/null\n0 0\nd--755 0 0\n")
	for i := range 120 {
		fmt.Fprintf(&b, "f%03d ---644 0 0 %s/f%03d\n", i, files, i)
	}
	b.WriteString("$\n")
	if err := os.WriteFile(proto, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{
		"", "-m crc=0", "-b size=1024", "-s size=4096 -m rmapbt=1", "-d agcount=2,su=64k,sw=2 -l size=64m,su=64k", "-b size=512 -m crc=0", "-m bigtime=0,inobtcount=0,finobt=0,reflink=0",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			path := image(t, 320*mib, "mkfs.xfs", append([]string{"-q", "-p", proto}, strings.Fields(args)...)...)
			free, report := read(t, path, 512, Use{Idle: true})
			wantRuns(t, free, freesp(t, path))
			if len(report) != 1 || !report[0].Read || !strings.HasPrefix(report[0].String(), "XFS on the whole unit: clean, ") {
				t.Errorf("report %v, want a clean XFS", report)
			}
			if free, report := read(t, path, 512, Use{}); len(free) > 0 || !strings.Contains(fmt.Sprint(report), "may have had it mounted") {
				t.Errorf("%v are free, and it may be mounted: %v", free, report)
			}
			scribble(t, path, free, 0xa5)
			run(t, "xfs_repair", "-n", path)
		})
	}
}

// TestXFSNotCleanCountsAsAllocated spoils one thing after another.
func TestXFSNotCleanCountsAsAllocated(t *testing.T) {
	clean := image(t, 320*mib, "mkfs.xfs", "-q")
	at := func(args ...string) int64 {
		var where []string
		for _, a := range args {
			where = append(where, "-c", a)
		}
		out := run(t, "xfs_db", append(append([]string{"-r"}, where...), "-c", "daddr", clean)...)
		n, err := strconv.ParseInt(strings.Fields(strings.TrimPrefix(out, "current daddr is "))[0], 10, 64)
		if err != nil {
			t.Fatal(err, out)
		}
		return 512 * n
	}
	var start int64
	if _, err := fmt.Sscanf(run(t, "xfs_db", "-r", "-c", "sb 0", "-c", "p logstart", clean), "logstart = %d", &start); err != nil {
		t.Fatal(err)
	}
	log := at(fmt.Sprintf("fsblock %d", start))
	tree := at("agf 1", "addr bnoroot")
	agf := at("agf 1")
	record := bytesAt(t, clean, log, 512)
	if binary.BigEndian.Uint32(record) != xfsLogMagic {
		t.Fatal("the log does not begin with a record")
	}
	for _, c := range []struct {
		name, word string
		spoil      func(*testing.T, string)
	}{
		// Behind the unmount record follows what a mount wrote.
		{"mounted", "log not clean", func(t *testing.T, p string) {
			next := bytes.Clone(record)
			binary.BigEndian.PutUint32(next[20:], 2)
			change(t, p, log+1024, next)
		}},
		{"mounted, a block of it alone", "log not clean", func(t *testing.T, p string) { change(t, p, log+700*512, []byte{0, 0, 0, 1}) }},
		{"no unmount record", "log not clean", func(t *testing.T, p string) { change(t, p, log+512+9, []byte{0}) }},
		{"several operations", "log not clean", func(t *testing.T, p string) { change(t, p, log+40, []byte{0, 0, 0, 2}) }},
		{"another's log", "log not clean", func(t *testing.T, p string) { flip(t, p, log+304) }},
		{"an empty log", "log not clean", func(t *testing.T, p string) { change(t, p, log, make([]byte, 2*mib)) }},
		{"tree's checksum", "checksum of a tree", func(t *testing.T, p string) { flip(t, p, tree+60) }},
		{"group's checksum", "checksum of allocation group 1", func(t *testing.T, p string) { flip(t, p, agf+52) }},
		{"superblock's checksum", "checksum of its superblock", func(t *testing.T, p string) { flip(t, p, 144) }},
		{"needs a repair", "repair", func(t *testing.T, p string) {
			run(t, "xfs_db", "-x", "-c", "sb 0", "-c", "write features_incompat 0x1b", p)
		}},
		{"larger than the unit", "larger than what it lies in", func(t *testing.T, p string) {
			if err := os.Truncate(p, 300*mib); err != nil {
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
