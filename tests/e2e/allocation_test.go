package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"lunshift/tests/peer"
)

// TestThickHalfFullFileSystemCopiesHalf moves a LUN whose array does not tell what is allocated: every
// free block of its ext4 holds rests, and is not copied. The file system is whole afterwards, and so is
// what was written meanwhile; verify and the cutover's sample do not mind.
// Caught: a source that is copied as a whole.
func TestThickHalfFullFileSystemCopiesHalf(t *testing.T) {
	needTools(t)
	peer.Need(t, "mkfs.ext4", "dumpe2fs", "e2fsck", "debugfs", "sfdisk")
	const size, start, files = 256 * mib, 2 * mib, 60
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	must(t, os.Mkdir(tree, 0o755))
	rng := rand.New(rand.NewPCG(8, 8))
	var used uint64
	for i := range files {
		p := make([]byte, mib+rng.IntN(2*mib))
		for j := 0; j+8 <= len(p); j += 8 {
			copy(p[j:], fmt.Sprintf("%08x", rng.Uint32()))
		}
		used += uint64(len(p))
		must(t, os.WriteFile(filepath.Join(tree, fmt.Sprintf("file%02d", i)), p, 0o644))
	}
	fs := emptyFile(t, dir, "fs.img", size-4*mib)
	tool(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-d", tree, fs)
	from := emptyFile(t, dir, "old.img", size)
	must(t, peer.Partition(t.Context(), from, fmt.Sprintf("label: gpt\nstart=%d,size=%d,type=linux\n", start/512, (size-4*mib)/512)))
	content, err := os.ReadFile(fs)
	must(t, err)
	for _, e := range freeExtents(t, fs) {
		rest := content[e.first*4096 : (e.first+e.count)*4096]
		copy(rest, bytes.Repeat([]byte("rests   "), len(rest)/8))
	}
	old, err := os.OpenFile(from, os.O_WRONLY, 0)
	must(t, err)
	_, err = old.WriteAt(content, start)
	must(t, err)
	must(t, old.Close())

	to := emptyFile(t, dir, "new.img", size)
	oldArray := newArray(t, "old", peer.Unit{Path: from})
	newArray := newArray(t, "new", peer.Unit{Path: to, Thin: true})
	s := newService(t, volume{name: "fs", source: oldArray.unit(1).URL(), destination: newArray.unit(1).URL()})
	if out := s.run("check"); !strings.Contains(out, "as the file systems of the source tell") || !strings.Contains(out, "ext4 on partition 1: clean, ") {
		t.Errorf("check does not say what tells the allocation:\n%s", out)
	}
	var told struct {
		Volumes []struct {
			Allocated uint64 `json:"allocated_bytes"`
		} `json:"volumes"`
	}
	must(t, json.Unmarshal([]byte(s.run("check", "--json")), &told))
	s.start()
	s.run("start", "fs")
	host := shell(t, s.front("fs"))
	written := freeExtents(t, fs)[0].first*4096 + start
	_, err = host.Do(t.Context(), peer.Write(0x5a, written, 64*kib))
	must(t, err)
	s.run("wait", "fs", "--for", "synced")
	st := s.status("fs")
	t.Logf("copied %d MiB of %d, %d MiB are files; left out %d MiB", st.Copied/mib, size/mib, used/mib, st.Unused/mib)
	if st.Copied < used-2*mib || st.Copied > used+used/5 || st.Unused < size*2/5 {
		t.Errorf("copied %d, left out %d, of %d bytes in files", st.Copied, st.Unused, used)
	}
	if len(told.Volumes) != 1 || told.Volumes[0].Allocated != size-st.Unused {
		t.Errorf("check said that %+v bytes are to be copied, %d were left out of %d", told.Volumes, st.Unused, size)
	}
	if out := s.run("status", "fs"); !strings.Contains(out, "ext4 on partition 1: clean, ") {
		t.Errorf("status does not say what was found:\n%s", out)
	}
	if out := s.run("verify", "fs"); !strings.Contains(out, "no difference") {
		t.Errorf("verify: %s", out)
	}
	s.run("cutover", "fs")
	s.stop()

	image, err := os.ReadFile(to)
	must(t, err)
	if p := image[written : written+64*kib]; !filled(p, 0x5a) {
		t.Error("what was written meanwhile is lost")
	}
	back := filepath.Join(dir, "back.img")
	must(t, os.WriteFile(back, image[start:start+size-4*mib], 0o600))
	tool(t, "e2fsck", "-fn", back)
	out := filepath.Join(dir, "out")
	must(t, os.Mkdir(out, 0o755))
	tool(t, "debugfs", "-R", "rdump / "+out, back)
	if n := sameTrees(t, tree, out); n < files {
		t.Errorf("%d files are the same, want %d", n, files)
	}
	if bytes.Contains(image, []byte("rests   rests   ")) {
		t.Error("a free block was copied")
	}
}
