package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"lunshift/tests/peer"
)

// model is what a logical unit must hold: an image file that takes what the
// initiators did, after they were told that it was done.
type model struct {
	t     *testing.T
	path  string
	f     *os.File
	block uint64
	size  uint64
}

// newModel begins with the content of the image at from.
func newModel(t *testing.T, from string, block uint32) *model {
	t.Helper()
	path := from + ".model"
	clone(t, from, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	must(t, err)
	return &model{t, path, f, uint64(block), uint64(st.Size())}
}

// clone copies an image with its holes.
func clone(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}

func (m *model) write(pattern byte, offset, length uint64) {
	_, err := m.f.WriteAt(bytes.Repeat([]byte{pattern}, int(length)), int64(offset))
	must(m.t, err)
}

func (m *model) discard(offset, length uint64) {
	must(m.t, unix.Fallocate(int(m.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(offset), int64(length)))
}

// churn is count random changes within [from, to) through shell, each told to the
// model as well, mostly of one to some blocks and at times as long as 2 MiB;
// each one is read back at once.
func (m *model) churn(ctx context.Context, shell *peer.QemuShell, rng *rand.Rand, from, to uint64, count int) {
	m.t.Helper()
	for range count {
		length := m.block * uint64(1+rng.IntN(16))
		switch rng.IntN(10) {
		case 0:
			length = uint64(1+rng.IntN(32)) * 64 * kib
		case 1, 2, 3:
			length = m.block
		}
		length = min(length, to-from)
		offset := from + rng.Uint64N((to-from-length)/m.block+1)*m.block
		pattern := byte(1 + rng.IntN(255))
		command := peer.Write(pattern, offset, length)
		switch rng.IntN(12) {
		case 0:
			// Zeroes may be left without storage.
			pattern, command = 0, fmt.Sprintf("write -z -u %d %d", offset, length)
		case 1:
			pattern, command = 0, fmt.Sprintf("write -z %d %d", offset, length)
		}
		if _, err := shell.Do(ctx, command); err != nil {
			m.t.Fatalf("%s: %v", command, err)
		}
		if pattern == 0 {
			m.discard(offset, length)
		} else {
			m.write(pattern, offset, length)
		}
		for _, command := range m.reads(pattern, offset, length) {
			if _, err := shell.Do(ctx, command); err != nil {
				m.t.Fatalf("%s, just written: %v", command, err)
			}
		}
	}
}

// reads are the commands that read a range back. Before a read of 32 KiB or more
// QEMU asks for the status of almost 2 GiB, which is no multiple of 4096 bytes; on
// units of 4096-byte blocks it then fails its own assertion, so there each read is shorter.
func (m *model) reads(pattern byte, offset, length uint64) []string {
	if m.block == 512 {
		return []string{peer.Read(pattern, offset, length)}
	}
	var list []string
	for end := offset + length; offset < end; {
		n := min(end-offset, 28*kib)
		list = append(list, peer.Read(pattern, offset, n))
		offset += n
	}
	return list
}

// sameAs fails the test unless the image at path holds what the model does.
func (m *model) sameAs(path string) {
	m.t.Helper()
	if at, ok := sameImages(m.t, m.path, path, m.size); !ok {
		m.t.Errorf("%s: wrong content at byte %d", path, at)
	}
}

// sameImages compares the first size bytes of two images.
func sameImages(t *testing.T, a, b string, size uint64) (at uint64, same bool) {
	t.Helper()
	f, err := os.Open(a)
	must(t, err)
	defer f.Close()
	g, err := os.Open(b)
	must(t, err)
	defer g.Close()
	p, q := make([]byte, mib), make([]byte, mib)
	for at < size {
		n := min(uint64(len(p)), size-at)
		for _, r := range []struct {
			f *os.File
			p []byte
		}{{f, p[:n]}, {g, q[:n]}} {
			if _, err := r.f.ReadAt(r.p, int64(at)); err != nil && err != io.EOF {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(p[:n], q[:n]) {
			for i := range p[:n] {
				if p[i] != q[i] {
					return at + uint64(i), false
				}
			}
		}
		at += n
	}
	return at, true
}

func shell(t *testing.T, l peer.LUN) *peer.QemuShell {
	t.Helper()
	s, err := l.Shell(t.Context())
	must(t, err)
	t.Cleanup(s.Kill)
	return s
}
