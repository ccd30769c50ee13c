package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"lunshift/tests/peer"
)

// TestFileSystemComesThroughWhole moves a real file system, the Go toolchain's
// own tree on ext4, while qemu-io writes to its free areas.
func TestFileSystemComesThroughWhole(t *testing.T) {
	needTools(t)
	peer.Need(t, "mkfs.ext4", "dumpe2fs", "e2fsck", "debugfs")
	ctx := t.Context()
	const size, block = 2048 * mib, 4096
	dir := t.TempDir()
	tree := goTree(t)

	from := emptyFile(t, dir, "old.img", size)
	tool(t, "mkfs.ext4", "-q", "-F", "-b", strconv.Itoa(block), "-d", tree, from)
	free := freeExtents(t, from)
	to := emptyFile(t, dir, "new.img", size)
	old := newArray(t, "old", peer.Unit{Path: from, Thin: true})
	new := newArray(t, "new", peer.Unit{Path: to, Thin: true})
	s := newService(t, volume{name: "fs", source: old.unit(1).URL(), destination: new.unit(1).URL()})
	s.start()
	s.run("throttle", "fs", "--rate", "40MiB")
	s.run("start", "fs")

	// Each file-system block written, with its pattern.
	wrote := map[uint64]byte{}
	rng := rand.New(rand.NewPCG(4, 4))
	host := shell(t, s.front("fs"))
	scribble := func(n int) {
		for range n {
			e := free[rng.IntN(len(free))]
			count := min(e.count, uint64(1+rng.IntN(64)))
			first := e.first + rng.Uint64N(e.count-count+1)
			pattern := byte(1 + rng.IntN(255))
			_, err := host.Do(ctx, peer.Write(pattern, first*block, count*block))
			must(t, err)
			for b := first; b < first+count; b++ {
				wrote[b] = pattern
			}
		}
	}
	for s.status("fs").Copied < 100*mib {
		scribble(50)
	}
	if st := s.status("fs"); st.Phase != "migrating" {
		t.Fatalf("the copy was over before the load: %+v", st)
	}
	s.run("throttle", "fs", "--rate", "0")
	for s.status("fs").Phase == "migrating" {
		scribble(20)
	}
	scribble(50)
	s.run("cutover", "fs")
	s.stop()
	t.Logf("wrote %d free blocks of %d bytes", len(wrote), block)
	need, err := peer.Allocated(from)
	must(t, err)
	have, err := peer.Allocated(to)
	must(t, err)
	if most := need + uint64(len(wrote))*block + need/50 + 2*mib; have > most {
		t.Errorf("the new LUN takes %d bytes, the old one %d and the load %d: it is not thin any more", have, need, len(wrote)*block)
	}
	must(t, new.Kill())
	must(t, new.Start(ctx)) // so that Close finds it

	tool(t, "e2fsck", "-fn", to)
	out := filepath.Join(dir, "out")
	must(t, os.Mkdir(out, 0o755))
	tool(t, "debugfs", "-R", "rdump / "+out, to)
	files := sameTrees(t, tree, out)
	t.Logf("%d files are the same", files)
	image, err := os.Open(to)
	must(t, err)
	defer image.Close()
	p := make([]byte, block)
	for b, pattern := range wrote {
		if _, err := image.ReadAt(p, int64(b*block)); err != nil || !filled(p, pattern) {
			t.Fatalf("block %d lost what was acknowledged (%v)", b, err)
		}
	}
}

// goTree is the Go toolchain's tree, or its sources where the whole is too large.
func goTree(t *testing.T) string {
	root := strings.TrimSpace(tool(t, "go", "env", "GOROOT"))
	size := int64(0)
	must(t, filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			var info fs.FileInfo
			if info, err = d.Info(); err == nil {
				size += info.Size()
			}
		}
		return err
	}))
	if size > 1300*mib {
		return filepath.Join(root, "src")
	}
	return root
}

// tool runs a program that must succeed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := peer.Run(t.Context(), name, args...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return out
}

type blocks struct{ first, count uint64 }

var freeLine = regexp.MustCompile(`(?m)^  Free blocks: (.+)$`)

// freeExtents are the runs of at least 16 free blocks of an ext4 image.
func freeExtents(t *testing.T, image string) []blocks {
	t.Helper()
	cmd := exec.Command("/sbin/dumpe2fs", image)
	out, err := cmd.Output()
	must(t, err)
	var list []blocks
	for _, m := range freeLine.FindAllStringSubmatch(string(out), -1) {
		for _, run := range strings.Split(m[1], ", ") {
			var e blocks
			first, last, isRun := strings.Cut(strings.TrimSpace(run), "-")
			if !isRun {
				continue
			}
			a, err := strconv.ParseUint(first, 10, 64)
			must(t, err)
			b, err := strconv.ParseUint(last, 10, 64)
			must(t, err)
			if e = (blocks{a, b - a + 1}); e.count >= 16 {
				list = append(list, e)
			}
		}
	}
	if len(list) == 0 {
		t.Fatal("dumpe2fs tells no free blocks")
	}
	return list
}

// sameTrees compares all files below two directories and tells how many there are.
func sameTrees(t *testing.T, want, have string) int {
	t.Helper()
	a, b := digests(t, want), digests(t, have)
	for path, digest := range a {
		if b[path] != digest {
			t.Errorf("%s: %s, want %s", path, b[path], digest)
		}
	}
	for path := range b {
		if _, ok := a[path]; !ok && path != "lost+found" {
			t.Errorf("%s is new", path)
		}
	}
	return len(a)
}

// digests says what is at each path below root.
func digests(t *testing.T, root string) map[string]string {
	t.Helper()
	m := map[string]string{}
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			m[name] = "directory"
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			m[name] = "link to " + to
		default:
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			m[name] = fmt.Sprintf("%x", h.Sum(nil))
		}
		return nil
	}))
	return m
}
