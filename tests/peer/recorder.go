package peer

import (
	"io"
	"net"
	"sync"
)

// Recorder stands before a portal and keeps what goes over each connection.
type Recorder struct {
	l     net.Listener
	to    string
	limit int
	conns sync.WaitGroup
	mu    sync.Mutex // protects kept
	kept  []Exchange
}

// Exchange is one connection: what the initiator sent, and what the target answered.
type Exchange struct{ Sent, Answered []byte }

// NewRecorder listens on the address listen and passes connections on to the portal to. Of
// each direction of a connection it keeps the first limit bytes.
func NewRecorder(listen, to string, limit int) (*Recorder, error) {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, err
	}
	r := &Recorder{l: l, to: to, limit: limit}
	r.conns.Go(r.serve)
	return r, nil
}

// Portal is the host:port where it listens.
func (r *Recorder) Portal() string { return r.l.Addr().String() }

// Close stops listening; connections go on to their end.
func (r *Recorder) Close() error { return r.l.Close() }

// Finish stops listening, waits for the connections to end, and gives them in the order in
// which they ended.
func (r *Recorder) Finish() []Exchange {
	r.l.Close()
	r.conns.Wait()
	return r.kept
}

func (r *Recorder) serve() {
	for {
		from, err := r.l.Accept()
		if err != nil {
			return
		}
		r.conns.Go(func() { r.pass(from) })
	}
}

func (r *Recorder) pass(from net.Conn) {
	defer from.Close()
	to, err := net.Dial("tcp", r.to)
	if err != nil {
		return
	}
	defer to.Close()
	sent, answered := &bounded{limit: r.limit}, &bounded{limit: r.limit}
	var back sync.WaitGroup
	back.Go(func() {
		io.Copy(from, io.TeeReader(to, answered))
		from.(*net.TCPConn).CloseWrite()
	})
	io.Copy(to, io.TeeReader(from, sent))
	to.(*net.TCPConn).CloseWrite()
	back.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kept = append(r.kept, Exchange{sent.b, answered.b})
}

type bounded struct {
	b     []byte
	limit int
}

func (w *bounded) Write(p []byte) (int, error) {
	w.b = append(w.b, p[:min(len(p), w.limit-len(w.b))]...)
	return len(p), nil
}
