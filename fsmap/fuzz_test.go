package fsmap

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

var makeImages = flag.Bool("make-images", false, "write testdata/*.img.gz anew, with the tools of tests/install.sh")

// fuzzed are the images that inputs change, by name; they are small, so that the fuzzer needs no tools.
var fuzzed = []string{"ext4", "ext2", "xfs5", "xfs4", "ntfs", "gpt", "mbr", "lvm"}

// TestFuzzedImagesCountAsUnderstood: what the fuzzer changes is read to its end when it is not changed.
func TestFuzzedImagesCountAsUnderstood(t *testing.T) {
	if *makeImages {
		writeImages(t)
	}
	for _, name := range fuzzed {
		d := &patched{base: load(t, name)}
		m, report, err := Allocated(t.Context(), d, d.Info().All(), Use{Idle: true})
		if err != nil || len(m.Free) == 0 || !slices.ContainsFunc(report, func(f Finding) bool { return f.Read }) {
			t.Errorf("%s: %d free runs, %v, %v", name, len(m.Free), report, err)
		}
	}
}

// writeImages makes the images.
func writeImages(t *testing.T) {
	ext := small(t)
	for _, name := range fuzzed {
		var path string
		switch name {
		case "ext4":
			path = image(t, 4*mib, "mkfs.ext4", "-q", "-F", "-b", "1024", "-g", "1024", "-O", "mmp")
		case "ext2":
			path = image(t, 4*mib, "mkfs.ext2", "-q", "-F", "-g", "1024")
		case "xfs5":
			path = image(t, 16*mib, "mkfs.xfs", "-q", "--unsupported")
		case "xfs4":
			path = image(t, 16*mib, "mkfs.xfs", "-q", "--unsupported", "-m", "crc=0")
		case "ntfs":
			path = image(t, 4*mib, "mkntfs", "-Q", "-q", "-F", "-p", "0", "-H", "0", "-S", "0")
			windows(t, path, nil)
		case "gpt":
			path = image(t, 32*mib, "")
			table(t, path, "label: gpt\nstart=2MiB,size=20MiB,type=linux\nstart=24MiB,size=4MiB,type=linux\n")
			place(t, ext, path, 2*mib)
		case "mbr":
			path = image(t, 64*mib, "")
			table(t, path, "label: dos\nstart=2MiB,size=20MiB,type=83\nstart=30MiB,size=30MiB,type=5\nstart=31MiB,size=20MiB,type=83\nstart=55MiB,size=2MiB,type=83\n")
			place(t, ext, path, 2*mib)
		case "lvm":
			path = image(t, 100*mib, "")
			root, err := os.ReadFile(ext)
			if err != nil {
				t.Fatal(err)
			}
			change(t, path, 41*mib, root[:7*mib])
			change(t, path, 6*mib, root[7*mib:])
			physicalVolume(t, path, lvmGroup)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := z.Write(raw); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join("testdata", name+".img.gz"), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func load(t testing.TB, name string) []byte { return loadPart(t, name, 1<<30) }

// loadPart gives the first bytes of an image.
func loadPart(t testing.TB, name string, most int64) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".img.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(io.LimitReader(z, most))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// patched is a unit with a few bytes changed, which counts what is read.
type patched struct {
	lun.Device
	base    []byte
	patches []patch
	bytes   uint64
	fail    error // of each read
}

type patch struct {
	at   uint64
	with []byte
}

func (p *patched) Info() lun.Info { return lun.Info{BlockSize: 512, Blocks: uint64(len(p.base)) / 512} }

func (p *patched) ReadAt(_ context.Context, b []byte, start lun.LBA) error {
	from := uint64(start) * 512
	p.bytes += uint64(len(b))
	if p.fail != nil {
		return p.fail
	}
	copy(b, p.base[from:])
	for _, c := range p.patches {
		for i, x := range c.with {
			if at := c.at + uint64(i); at >= from && at < from+uint64(len(b)) {
				b[at-from] = x
			}
		}
	}
	return nil
}

// FuzzAllocated changes images at a few places. Whatever they say, nothing panics or goes on for ever,
// what is free lies within the unit and apart, and what is read is bounded.
func FuzzAllocated(f *testing.F) {
	var bases [][]byte
	for i, name := range fuzzed {
		bases = append(bases, load(f, name))
		for _, at := range []uint32{0, 512, 1024, 4096, 2 * mib} {
			for _, with := range []string{"\x00\x00\x00\x00", "\xff\xff\xff\xff\xff\xff\xff\xff"} {
				in := binary.LittleEndian.AppendUint32(nil, at+uint32(8*len(with)))
				f.Add(byte(i), true, append(append(in, byte(len(with))), with...))
			}
		}
	}
	f.Fuzz(func(t *testing.T, base byte, trust bool, changes []byte) {
		p := &patched{base: bases[int(base)%len(bases)]}
		for len(changes) > 5 {
			n := min(int(changes[4]), len(changes)-5)
			p.patches = append(p.patches, patch{uint64(binary.LittleEndian.Uint32(changes)) % uint64(len(p.base)), changes[5 : 5+n]})
			changes = changes[5+n:]
		}
		checkBounds(t, p, Use{Idle: true, trust: trust})
	})
}

// FuzzContent has units of any content.
func FuzzContent(f *testing.F) {
	f.Add(bytes.Repeat([]byte{0x55, 0xaa}, 300))
	for _, name := range fuzzed {
		f.Add(loadPart(f, name, 8<<10))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		p := &patched{base: append(content, make([]byte, 128<<10-len(content)%512)...)}
		p.base = p.base[:len(p.base)/512*512]
		checkBounds(t, p, Use{Idle: true, trust: true})
	})
}

func checkBounds(t *testing.T, p *patched, use Use) {
	t.Helper()
	m, report, err := Allocated(t.Context(), p, p.Info().All(), use)
	if err != nil {
		t.Fatal(err)
	}
	end := lun.LBA(0)
	for _, e := range m.Free {
		if e.Empty() || e.Start < end || uint64(e.End()) > p.Info().Blocks {
			t.Fatalf("free is %v after LBA %d of %d", e, end, p.Info().Blocks)
		}
		end = e.End()
	}
	if len(m.Free) > maxRuns || len(report) > maxFindings {
		t.Fatalf("%d runs, %d findings", len(m.Free), len(report))
	}
	if most := uint64(readFloor + len(p.base)/readShare); p.bytes > most {
		t.Fatalf("%d bytes were read, at most %d are to be", p.bytes, most)
	}
	for _, f := range report {
		if len(f.String()) > 400 {
			t.Fatalf("a finding of %d bytes: %.200q", len(f.String()), f.String())
		}
	}
}

// TestUnreachableIsNoFinding: a unit that cannot be asked now is asked again; one that has blocks
// which it cannot read is not.
func TestUnreachableIsNoFinding(t *testing.T) {
	p := &patched{base: load(t, "ext4"), fail: fmt.Errorf("away: %w", lun.ErrUnavailable)}
	if _, _, err := Allocated(t.Context(), p, p.Info().All(), Use{}); !errors.Is(err, lun.ErrUnavailable) {
		t.Errorf("%v, want that it is unavailable", err)
	}
	p.fail = &lun.SenseError{Key: 3, ASC: 0x11}
	m, report, err := Allocated(t.Context(), p, p.Info().All(), Use{})
	if err != nil || len(m.Free) > 0 || len(report) != 1 || report[0].Read {
		t.Errorf("%v, %v, %v: want that it counts as allocated", m, report, err)
	}
}

// TestRunsAreBounded drops the shortest of too many.
func TestRunsAreBounded(t *testing.T) {
	r := runs{least: 1}
	var want []byteRun
	for i := range uint64(3 * maxRuns) {
		n := uint64(600)
		if i%5 == 0 {
			n = 5000
			want = append(want, byteRun{i * 10000, n})
		}
		r.add(i*10000, n)
	}
	if have := r.sorted(); !slices.Equal(have, want) {
		t.Errorf("%d runs are left of %d long ones", len(have), len(want))
	}
}

// TestAnExtentAloneIsAnswered and a unit with blocks of 4096 bytes.
func TestAnExtentAloneIsAnswered(t *testing.T) {
	d := luntest.NewMemory(lun.Info{BlockSize: 4096, Blocks: 1024})
	base := load(t, "ext2")
	for at := 0; at < len(base); at += 4096 {
		if err := d.WriteAt(t.Context(), base[at:at+4096], lun.LBA(at/4096)); err != nil {
			t.Fatal(err)
		}
	}
	all, _, err := Allocated(t.Context(), d, d.Info().All(), Use{})
	if err != nil || len(all.Free) == 0 {
		t.Fatal(all, err)
	}
	of := lun.Extent{Start: all.Free[0].Start + 1, Blocks: 3}
	part, _, err := Allocated(t.Context(), d, of, Use{})
	if err != nil || !slices.Equal(part.Free, []lun.Extent{of}) {
		t.Errorf("free is %v of %v (%v)", part.Free, of, err)
	}
}
