package state

import (
	"os"
	"path/filepath"
	"testing"
)

// TestEmptyLogsOfAPowerLossDoNoHarm: the name of a new log can be on the disk before
// anything in it is. The next Open must neither refuse nor lose what was acknowledged.
func TestEmptyLogsOfAPowerLossDoNoHarm(t *testing.T) {
	dir := t.TempDir()
	g := Geometry{Blocks: 1 << 16, RegionBlocks: 128}
	s := open(t, dir)
	f, err := s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Set(t.Context(), Valid, Run{Start: 5, Blocks: 7}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"000077.vlog", "00099.mem"} {
		if err := os.WriteFile(filepath.Join(dir, badgerDir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, dir)
	f, err = s.Flags("v", g)
	if err != nil {
		t.Fatal(err)
	}
	if !f.All(Valid, Run{Start: 5, Blocks: 7}) {
		t.Error("acknowledged flags are gone")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
