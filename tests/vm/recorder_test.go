package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"lunshift/tests/peer"
)

// recorder stands before lunshift's portal, at 10.0.0.21:3260.
type recorder struct {
	t *testing.T
	*peer.Recorder
}

func startRecorder(t *testing.T) *recorder {
	t.Helper()
	r, err := peer.NewRecorder(recorded+":3260", direct+":3260", 64<<10)
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return &recorder{t, r}
}

// keep ends the recording, and writes what the initiator sent where LUNSHIFT_VM_CAPTURE says.
func (r *recorder) keep(name string) {
	r.t.Helper()
	exchanges := r.Finish()
	dir := os.Getenv("LUNSHIFT_VM_CAPTURE")
	if dir == "" {
		return
	}
	must(r.t, os.MkdirAll(dir, 0o755))
	for i, e := range exchanges {
		must(r.t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%d", name, i+1)), e.Sent, 0o644))
	}
}
