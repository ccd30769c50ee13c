package state

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// FuzzStoredFlags: no stored bytes make loading panic, and a region that loads is
// written back as it was read.
func FuzzStoredFlags(f *testing.F) {
	f.Add(uint64(0), []byte{1, 0, 1, 0, 0, 0, 0, 0, 0})
	f.Add(uint64(3), []byte{3 | sameBitmap, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add(uint64(3), []byte{1 | asRuns, 2, 3, 1, 4, 5})
	f.Add(uint64(3), []byte{3 | asRuns, 1, 0, 1, 1, 63, 1})
	f.Add(uint64(15), append([]byte{3}, make([]byte, 16)...))
	f.Add(uint64(0), make([]byte, chunkWords*8))
	f.Add(uint64(0), []byte(`{"schema":1,"generation":7,"blocks":10,"region_blocks":8,"chunk_regions":8192}`))
	f.Add(uint64(0), []byte(`{"schema":3,"generation":7,"blocks":10,"region_blocks":8,"chunk_regions":8192,"turn":3,"backward":true}`))
	f.Fuzz(func(t *testing.T, n uint64, value []byte) {
		flags := newFlags(nil, "v", 1, Geometry{Blocks: 1000, RegionBlocks: 64})
		flags.loadChunk(int(n%3), n/3, value)
		if err := flags.loadRegion(n, value, nil); err == nil {
			bitmaps, _ := decodeRegion(value, flags.words, nil)
			for _, compact := range []bool{false, true} {
				again, err := decodeRegion(encodeRegion(bitmaps, compact), flags.words, nil)
				if err != nil {
					t.Fatal(err)
				}
				for i := range bitmaps {
					if (bitmaps[i] == nil) != (again[i] == nil) || bitmaps[i] != nil && !equalWords(bitmaps[i], again[i]) {
						t.Fatalf("kind %d: %x, then %x", i, bitmaps[i], again[i])
					}
				}
			}
		}
		if h, err := decodeHeader(value); err == nil && (h.Turn > 0) != (h.Schema == turnSchema) {
			t.Fatal(h)
		}
		s := &Store{dir: "/d"}
		if rec, err := s.decodeRecord("v", value); err == nil && rec.Volume != "v" {
			t.Fatal(rec)
		}
	})
}

// FuzzFiles: no content of a file makes the check before opening panic.
func FuzzFiles(f *testing.F) {
	s := open(f, f.TempDir())
	flags, err := s.Flags("v", Geometry{Blocks: 1000, RegionBlocks: 64})
	if err != nil {
		f.Fatal(err)
	}
	if err := flags.Set(f.Context(), Valid, Run{3, 100}); err != nil {
		f.Fatal(err)
	}
	log, err := os.ReadFile(filepath.Join(s.dir, badgerDir, "00001.mem"))
	if err != nil {
		f.Fatal(err)
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.TrimRight(log, "\x00"))
	for _, pattern := range []string{"HEAD", "badger/*.sst", "badger/MANIFEST"} {
		names, _ := filepath.Glob(filepath.Join(s.dir, pattern))
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		for _, name := range []string{"x", headName, "MANIFEST"} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, "x")
		verifyFile(path, verifyTable)
		verifyFile(path, verifyLog)
		readManifest(dir)
		if h, err := openHead(dir); err == nil {
			h.file.Close()
		}
	})
}
