package fsmap

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// TestTakenOverSpaceCountsAsAllocated: something that no signature tells took a unit over. It left
// the first 8 KiB, the descriptors and all bitmaps as they were, and wrote elsewhere.
//
// Caught: copies of the superblock that are not looked at, or only the first; no look at the root
// directory, its entries, the headers of inodes, the mirror.
func TestTakenOverSpaceCountsAsAllocated(t *testing.T) {
	stranger := bytes.Repeat([]byte("not of a file system. "), 4096/22)
	ext := image(t, 200*mib, "mkfs.ext4", "-q", "-F", "-b", "1024") // 25 groups
	old := image(t, 200*mib, "mkfs.ext2", "-q", "-F", "-b", "1024")
	two := image(t, 200*mib, "mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "sparse_super2")
	xfs := image(t, 300*mib, "mkfs.xfs", "-q")
	xfs4 := image(t, 300*mib, "mkfs.xfs", "-q", "-m", "crc=0")
	windowsDisk := image(t, 20*mib, "mkntfs", "-Q", "-q", "-F", "-p", "0", "-H", "0", "-S", "0")
	windows(t, windowsDisk, nil)
	number := func(text, field string) int64 {
		n, err := strconv.ParseInt(regexp.MustCompile(field + `\D*(\d+)`).FindStringSubmatch(text)[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	mirror := int64(0)
	inNTFS(t, windowsDisk, func(_ context.Context, x *ntfs) { mirror = int64(x.mirrorAt * x.cluster) })
	blocks, length := number(run(t, "xfs_db", "-r", "-c", "sb 0", "-c", "p agblocks", xfs), "agblocks"), int64(4096)
	const group = 8192 * 1024
	for _, c := range []struct {
		name, from string
		at         int64
		word       string
	}{
		{"ext4, group 1", ext, group + 1024, "superblock in block group 1 "},
		{"ext4, group 9", ext, 9*group + 1024, "superblock in block group 9 "},
		{"ext4, group 7", ext, 7*group + 1024, "superblock in block group 7 "},
		{"ext2, group 5", old, 5*group + 1024, "superblock in block group 5 "},
		{"sparse_super2, the last", two, 24*group + 1024, "superblock in block group 24 "},
		{"ext2, root directory", old, number(run(t, "dumpe2fs", old), "Inode table at") * 1024, "root directory"},
		{"ext4, root directory", ext, number(run(t, "dumpe2fs", ext), "Inode table at") * 1024, "root directory"},
		{"ext2, root directory's entries", old, firstBlock(t, old, 2) * 1024, "root directory"},
		{"ext4, root directory's entries", ext, firstBlock(t, ext, 2) * 1024, "root directory"},
		{"XFS, inodes", xfs, 3*blocks*length + 1024, "inodes of allocation group 3 "},
		{"XFS, inodes without checksums", xfs4, 2*blocks*length + 1024, "inodes of allocation group 2 "},
		{"NTFS, mirror", windowsDisk, mirror + 1024, "$MFTMirr"},
		{"XFS", xfs, 2 * blocks * length, "superblock in allocation group 2 "},
		{"XFS without checksums", xfs4, blocks * length, "superblock in allocation group 1 "},
		{"NTFS", windowsDisk, 20*mib - 512, "boot sector"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := same(t, c.from)
			if free, report := read(t, path, 512, Use{Idle: true}); len(free) == 0 {
				t.Fatalf("nothing is free where nothing is spoilt, this shows nothing: %v", report)
			}
			change(t, path, c.at, stranger[:512]) // the superblock of XFS and the boot sector are so long
			wantNone(t, path, c.word)
		})
	}
	// One of another file system that was there before, with the same layout.
	other := image(t, 200*mib, "mkfs.ext4", "-q", "-F", "-b", "1024")
	before := same(t, ext)
	change(t, before, 3*group+1024, bytesAt(t, other, 3*group+1024, 1024))
	wantNone(t, before, "superblock in block group 3 ")
	// A copy that belongs elsewhere, as where what moved the file system did not end.
	shifted := same(t, ext)
	change(t, shifted, 5*group+1024, bytesAt(t, ext, 3*group+1024, 1024))
	wantNone(t, shifted, "superblock in block group 5 ")
}

// TestFileSystemsThatLivedAreRead: their copies are as tools leave them that change a file system.
func TestFileSystemsThatLivedAreRead(t *testing.T) {
	for i, tools := range [][]string{
		{"truncate -s 400M $0", "resize2fs -f $0"},
		{"e2fsck -fy $0", "resize2fs -f $0 100M", "truncate -s 100M $0"},
		{"tune2fs -U random $0", "tune2fs -L other $0"},
		{"tune2fs -O ^has_journal $0", "e2fsck -fy $0"},
	} {
		for _, layout := range []string{"ext4", "ext4 -b 1024", "ext4 -O sparse_super2", "ext4 -O meta_bg,^resize_inode", "ext3", "ext2 -O ^sparse_super,^resize_inode"} {
			t.Run(fmt.Sprintf("%d %s", i, layout), func(t *testing.T) {
				t.Parallel()
				path := filepath.Join(t.TempDir(), "disk")
				run(t, "sh", "-ec", "truncate -s 200M $0; mkfs.ext4 -q -F -t "+layout+" $0", path)
				for _, tool := range tools {
					run(t, "sh", "-c", tool+" || test $? -le 1", path) // e2fsck mended something
				}
				run(t, "e2fsck", "-fn", path)
				free, report := read(t, path, 512, Use{})
				wantRuns(t, free, dumpe2fs(t, path))
				if len(report) != 1 || !report[0].Read {
					t.Errorf("%v", report)
				}
			})
		}
	}
	t.Run("XFS", func(t *testing.T) {
		path := image(t, 300*mib, "mkfs.xfs", "-q")
		run(t, "xfs_admin", "-L", "other", path)
		if free, report := read(t, path, 512, Use{Idle: true}); len(free) == 0 {
			t.Errorf("%v", report)
		}
	})
	t.Run("NTFS", func(t *testing.T) { // as ntfsresize leaves it: its size is rounded to clusters
		path := image(t, 20*mib, "mkntfs", "-Q", "-q", "-F", "-p", "0", "-H", "0", "-S", "0")
		windows(t, path, nil)
		boot := bytesAt(t, path, 0, 512)
		change(t, path, 20*mib-512, make([]byte, 512))
		if err := os.Truncate(path, 20*mib+2048); err != nil {
			t.Fatal(err)
		}
		change(t, path, 20*mib+1536, boot)
		if free, report := read(t, path, 512, Use{Idle: true}); len(free) == 0 {
			t.Errorf("%v", report)
		}
	})
	t.Run("grown while it was mounted", func(t *testing.T) { // as kernels before 6.0 leave it
		path := image(t, 200*mib, "mkfs.ext4", "-q", "-F")
		change(t, path, 128*mib+0x5a, []byte{0, 0})
		if free, report := read(t, path, 512, Use{}); len(free) == 0 {
			t.Errorf("%v", report)
		}
	})
}
