package target

import (
	"context"
	"slices"
	"sync"
	"time"

	"lunshift/lun"
)

// life is a context.Context that costs nothing until somebody waits for it, and
// that can begin again once the command it belongs to has ended.
type life struct {
	mu    sync.Mutex // protects what follows
	ch    chan struct{}
	err   error
	after []*func()
	ended lun.Ended // may be nil
}

var _ lun.Ender = (*life)(nil)

// Deadline is that of no command.
func (l *life) Deadline() (time.Time, bool) { return time.Time{}, false }

// Done is closed when the command is aborted.
func (l *life) Done() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ch == nil {
		l.ch = make(chan struct{})
		if l.err != nil {
			close(l.ch)
		}
	}
	return l.ch
}

// Err is context.Canceled once the command is aborted.
func (l *life) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Value has none.
func (l *life) Value(any) any { return nil }

// AfterFunc lets package context hang derived contexts on this one without a
// goroutine each.
func (l *life) AfterFunc(f func()) (stop func() bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		go f()
		return func() bool { return false }
	}
	entry := &f
	l.after = append(l.after, entry)
	return func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		i := slices.Index(l.after, entry)
		if i < 0 {
			return false
		}
		l.after = slices.Delete(l.after, i, i+1)
		return true
	}
}

// OnEnd implements lun.Ender. Lock order: the device's locks come after mu.
func (l *life) OnEnd(e lun.Ended) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e != nil && l.err != nil {
		return false
	}
	l.ended = e
	return true
}

func (l *life) cancel() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	l.err = context.Canceled
	if l.ch != nil {
		close(l.ch)
	}
	if l.ended != nil {
		l.ended.Ended(l.err)
	}
	for _, f := range l.after {
		go (*f)()
	}
	l.after = l.after[:0]
}

// reset begins a new life. A channel that is open stays: nobody waits for it any
// more.
func (l *life) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		l.ch = nil
	}
	l.err = nil
	clear(l.after)
	l.after = l.after[:0]
}
