package state

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What is written to a directory that was removed is lost with the process, so nothing is
// acknowledged any more, and the next Open is not of that state.
//
// Caught: no look at whether HEAD still has a name ("its files, note").
func TestNothingIsAcknowledgedOnceTheDirectoryIsRemoved(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{
		"the directory": os.RemoveAll,
		"its files": func(dir string) error {
			names, err := filepath.Glob(filepath.Join(dir, "*"))
			for _, n := range names {
				if err == nil {
					err = os.RemoveAll(n)
				}
			}
			return err
		},
	} {
		for _, how := range []string{"set", "note"} {
			t.Run(name+", "+how, func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(t.TempDir(), "state")
				s := open(t, dir)
				f, err := s.Flags("v", Geometry{Blocks: 1 << 16, RegionBlocks: 128})
				if err != nil {
					t.Fatal(err)
				}
				write := f.Set
				if how == "note" {
					write = f.Note
				}
				if err := write(context.Background(), Valid, Run{0, 8}); err != nil {
					t.Fatal(err)
				}
				if err := remove(dir); err != nil {
					t.Fatal(err)
				}
				if err := write(context.Background(), Valid, Run{64, 8}); err == nil {
					t.Error("acknowledged")
				} else if text := err.Error(); strings.Count(text, "state directory") != 1 {
					t.Errorf("the directory is to be named once: %s", text)
				}
				s.Close() // whatever it says
			})
		}
	}
}
