package luntest

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"sync"

	"lunshift/lun"
)

// Op names a Device method for Memory.Intercept.
type Op string

// The commands of a Memory.
const (
	Read    Op = "read"
	Write   Op = "write"
	Flush   Op = "flush"
	Unmap   Op = "unmap"
	Zero    Op = "zero"
	Extents Op = "extents"
)

// Memory is a Device that keeps its blocks in memory, for tests: it is thin,
// it can lose its volatile cache, and Intercept can delay or fail any command.
type Memory struct {
	info lun.Info

	mu     sync.Mutex // protects the fields below
	before func(context.Context, Op, lun.Extent) error
	closed bool
	blocks map[lun.LBA][]byte // allocated blocks, as reads see them
	stable map[lun.LBA][]byte // as they would be after a power loss
	counts map[Op]int
	resets uint64
}

// NewMemory makes a blank Memory. Zero fields of info that must not be are filled in.
func NewMemory(info lun.Info) *Memory {
	if info.BlockSize == 0 {
		info.BlockSize = 512
	}
	m := &Memory{blocks: map[lun.LBA][]byte{}, stable: map[lun.LBA][]byte{}, counts: map[Op]int{}}
	if info.ID == "" {
		info.ID = fmt.Sprintf("memory:%p", m)
	}
	m.info = info
	return m
}

// NewThinMemory makes a blank thin Memory with a volatile cache.
func NewThinMemory(blockSize uint32, blocks uint64) *Memory {
	return NewMemory(lun.Info{BlockSize: blockSize, Blocks: blocks, Thin: true, UnmapZeroes: true, ReportsAllocation: true, VolatileCache: true})
}

// Intercept has before called before each command takes effect, from the next command on;
// its error is the command's, and with ErrAfter the command takes effect all the same. Nil
// ends it. It may be called while commands run.
func (m *Memory) Intercept(before func(ctx context.Context, op Op, e lun.Extent) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before = before
}

// PowerLoss drops what was not flushed, but for the blocks that kept, if given, is true
// of: they had reached the medium by chance. It gives how many were dropped.
func (m *Memory) PowerLoss(kept ...func(lun.LBA) bool) (dropped int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	after := maps.Clone(m.stable)
	had := maps.Clone(m.blocks)
	for at := range m.stable {
		if _, ok := had[at]; !ok {
			had[at] = nil // unmapped
		}
	}
	for at, p := range had {
		if bytes.Equal(p, m.stable[at]) {
			continue
		}
		switch {
		case len(kept) == 0 || !kept[0](at):
			dropped++
		case p == nil:
			delete(after, at)
		default:
			after[at] = p
		}
	}
	m.blocks, m.stable = after, maps.Clone(after)
	m.resets++
	return dropped
}

// Resets implements lun.Resetter: it counts the power losses.
func (m *Memory) Resets() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resets
}

// Reopen is the device after a restart of its user: Close undone.
func (m *Memory) Reopen() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = false
	return m
}

// Clone is another device with what this one holds now, and with its identity.
func (m *Memory) Clone() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Memory{info: m.info, blocks: maps.Clone(m.blocks), counts: map[Op]int{}, resets: m.resets}
	if c.stable = c.blocks; m.info.VolatileCache {
		c.stable = maps.Clone(m.stable)
	}
	return c
}

// Allocated is how many blocks have storage.
func (m *Memory) Allocated() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return uint64(len(m.blocks))
}

// Count is how many commands of a kind there were.
func (m *Memory) Count(op Op) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counts[op]
}

// Info implements lun.Device.
func (m *Memory) Info() lun.Info { return m.info }

// ReadAt implements lun.Device.
func (m *Memory) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	e, bs := m.extent(p, start), int(m.info.BlockSize)
	return m.command(ctx, Read, e, func() {
		for i := range int(e.Blocks) {
			part := p[i*bs : (i+1)*bs]
			clear(part)
			copy(part, m.blocks[start+lun.LBA(i)])
		}
	})
}

// WriteAt implements lun.Device.
func (m *Memory) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	e, bs := m.extent(p, start), int(m.info.BlockSize)
	return m.command(ctx, Write, e, func() {
		for i := range int(e.Blocks) {
			m.blocks[start+lun.LBA(i)] = append([]byte(nil), p[i*bs:(i+1)*bs]...)
		}
		m.settle()
	})
}

// Flush implements lun.Device.
func (m *Memory) Flush(ctx context.Context) error {
	return m.command(ctx, Flush, lun.Extent{}, func() { m.stable = maps.Clone(m.blocks) })
}

// Unmap implements lun.Device.
func (m *Memory) Unmap(ctx context.Context, e lun.Extent) error {
	if !m.info.Thin {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.closed {
			return lun.ErrClosed
		}
		return lun.ErrUnsupported
	}
	return m.command(ctx, Unmap, e, func() { m.free(e) })
}

// WriteZeroes implements lun.Device.
func (m *Memory) WriteZeroes(ctx context.Context, e lun.Extent) error {
	return m.command(ctx, Zero, e, func() { m.free(e) })
}

// Extents implements lun.Device.
func (m *Memory) Extents(ctx context.Context, e lun.Extent) ([]lun.Allocation, error) {
	var list []lun.Allocation
	err := m.command(ctx, Extents, e, func() {
		for at := e.Start; at < e.End(); at++ {
			_, allocated := m.blocks[at]
			allocated = allocated || !m.info.ReportsAllocation
			if n := len(list); n > 0 && list[n-1].Allocated == allocated {
				list[n-1].Blocks++
			} else if n == 64 {
				return
			} else {
				list = append(list, lun.Allocation{Extent: lun.Extent{Start: at, Blocks: 1}, Allocated: allocated})
			}
		}
	})
	return list, err
}

// Close implements lun.Device.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}

func (m *Memory) extent(p []byte, start lun.LBA) lun.Extent {
	return lun.Extent{Start: start, Blocks: uint64(len(p)) / uint64(m.info.BlockSize)}
}

func (m *Memory) command(ctx context.Context, op Op, e lun.Extent, do func()) error {
	if err := m.info.Check(e); err != nil {
		return err
	}
	m.mu.Lock()
	before := m.before
	m.mu.Unlock()
	if before != nil {
		if err := before(ctx, op, e); err != nil {
			if after, ok := err.(*ErrAfter); ok {
				m.mu.Lock()
				defer m.mu.Unlock()
				do()
				return after.Err
			}
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return lun.ErrClosed
	}
	m.counts[op]++
	do()
	return nil
}

// ErrAfter makes a command take effect and fail nevertheless.
type ErrAfter struct{ Err error }

func (e *ErrAfter) Error() string { return e.Err.Error() }

func (m *Memory) free(e lun.Extent) {
	for at := e.Start; at < e.End(); at++ {
		delete(m.blocks, at)
	}
	m.settle()
}

// settle makes every change stable at once where the cache is not volatile.
func (m *Memory) settle() {
	if !m.info.VolatileCache {
		m.stable = m.blocks
	}
}
