package vm

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// recorder stands before lunshift's portal at 10.0.0.21:3260 and keeps what initiators send,
// one capture for each connection.
type recorder struct {
	t     *testing.T
	l     net.Listener
	conns sync.WaitGroup
	mu    sync.Mutex
	sent  [][]byte // what the initiators sent, one for each connection; mu protects it
}

// captureLimit is the length in bytes after which the rest of a connection is not kept.
const captureLimit = 64 << 10

func startRecorder(t *testing.T) *recorder {
	t.Helper()
	l, err := net.Listen("tcp", recorded+":3260")
	must(t, err)
	r := &recorder{t: t, l: l}
	r.conns.Go(r.serve)
	t.Cleanup(func() { l.Close() })
	return r
}

func (r *recorder) serve() {
	for {
		from, err := r.l.Accept()
		if err != nil {
			return
		}
		r.conns.Go(func() {
			defer from.Close()
			to, err := net.Dial("tcp", direct+":3260")
			if err != nil {
				return
			}
			defer to.Close()
			var back sync.WaitGroup
			back.Go(func() {
				io.Copy(from, to)
				from.(*net.TCPConn).CloseWrite()
			})
			kept := &bounded{}
			io.Copy(to, io.TeeReader(from, kept))
			to.(*net.TCPConn).CloseWrite()
			back.Wait()
			r.mu.Lock()
			defer r.mu.Unlock()
			r.sent = append(r.sent, kept.b)
		})
	}
}

type bounded struct{ b []byte }

func (w *bounded) Write(p []byte) (int, error) {
	w.b = append(w.b, p[:min(len(p), captureLimit-len(w.b))]...)
	return len(p), nil
}

// keep ends the recording, and writes it where LUNSHIFT_VM_CAPTURE says.
func (r *recorder) keep(name string) {
	r.t.Helper()
	must(r.t, r.l.Close())
	r.conns.Wait()
	dir := os.Getenv("LUNSHIFT_VM_CAPTURE")
	if dir == "" {
		return
	}
	must(r.t, os.MkdirAll(dir, 0o755))
	for i, b := range r.sent {
		must(r.t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%d", name, i+1)), b, 0o644))
	}
}
