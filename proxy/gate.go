package proxy

import (
	"context"
	"sync"

	"lunshift/lun"
)

// gate lets commands through, and can hold new ones while those inside leave: at
// that instant the volume changes its phase. The zero value is open.
type gate struct {
	mu      sync.Mutex // protects the fields below
	inside  int
	closed  bool
	held    chan struct{} // not nil while held; closed at release
	drained chan struct{} // not nil while a hold waits; closed when inside falls to 0
}

// enter waits while the gate is held. Each enter that returned nil needs one leave.
func (g *gate) enter(ctx context.Context) error {
	for {
		g.mu.Lock()
		held := g.held
		if g.closed {
			g.mu.Unlock()
			return lun.ErrClosed
		}
		if held == nil {
			g.inside++
			g.mu.Unlock()
			return nil
		}
		g.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tryEnter is enter that does not wait.
func (g *gate) tryEnter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held != nil || g.closed {
		return false
	}
	g.inside++
	return true
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside--
	if g.inside == 0 && g.drained != nil {
		close(g.drained)
		g.drained = nil
	}
}

// hold keeps new commands out and waits until those inside have left. When ctx ends
// first the gate opens again and hold returns ctx's error. One hold at a time: the
// caller sees to that.
func (g *gate) hold(ctx context.Context) error {
	g.mu.Lock()
	g.held = make(chan struct{})
	if g.inside == 0 {
		g.mu.Unlock()
		return nil
	}
	drained := make(chan struct{})
	g.drained = drained
	g.mu.Unlock()
	select {
	case <-drained:
		return nil
	case <-ctx.Done():
		g.release()
		return ctx.Err()
	}
}

// close makes every later enter fail with lun.ErrClosed.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

// release lets held commands in.
func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.held)
	g.held, g.drained = nil, nil
}

// turn is a mutex that is held over writes to the state: who waits for it can give up.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

// take returns nil once the caller has the turn, which it must give back, or ctx's error.
func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) give() { <-t }
