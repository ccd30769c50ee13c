package target

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/lun"
)

// memory is a device in memory that can be made to hold its commands.
type memory struct {
	mu    sync.RWMutex // protects what follows
	data  []byte
	alloc []byte // 1 per block that is allocated
	ones  []byte // what alloc is filled with
	info  lun.Info
	fail  error

	flushes int

	// hold, when set, is waited on by ReadAt, WriteAt and Flush; entered gets one
	// value per command that begins to wait.
	hold    chan struct{}
	entered chan struct{}
}

func newMemory(bs uint32, blocks uint64) *memory {
	return &memory{
		data: make([]byte, uint64(bs)*blocks), alloc: make([]byte, blocks), ones: bytes.Repeat([]byte{1}, int(blocks)),
		info: lun.Info{BlockSize: bs, Blocks: blocks, ID: "memory:1", Thin: true, UnmapZeroes: true,
			ReportsAllocation: true, VolatileCache: true, PhysicalExponent: 0},
		entered: make(chan struct{}, 1000),
	}
}

func (m *memory) Info() lun.Info { return m.info }

func (m *memory) wait(ctx context.Context, e lun.Extent) error {
	if err := m.info.Check(e); err != nil {
		return err
	}
	m.mu.RLock()
	hold, fail := m.hold, m.fail
	m.mu.RUnlock()
	if hold != nil {
		m.entered <- struct{}{}
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if fail != nil {
		return fail
	}
	return ctx.Err()
}

func (m *memory) set(hold chan struct{}, fail error) {
	m.mu.Lock()
	m.hold, m.fail = hold, fail
	m.mu.Unlock()
}

// bytes is a copy of the blocks.
func (m *memory) bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Clone(m.data)
}

func (m *memory) flushed() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.flushes
}

func (m *memory) extent(p []byte, start lun.LBA) lun.Extent {
	return lun.Extent{Start: start, Blocks: uint64(len(p)) / uint64(m.info.BlockSize)}
}

func (m *memory) at(e lun.Extent) []byte {
	return m.data[uint64(e.Start)*uint64(m.info.BlockSize):][:m.info.Bytes(e)]
}

func (m *memory) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	e := m.extent(p, start)
	if err := m.wait(ctx, e); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.at(e))
	return nil
}

func (m *memory) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	e := m.extent(p, start)
	if err := m.wait(ctx, e); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(p, e)
	return nil
}

func (m *memory) put(p []byte, e lun.Extent) {
	copy(m.at(e), p)
	copy(m.alloc[e.Start:e.End()], m.ones)
}

func (m *memory) Flush(ctx context.Context) error {
	if err := m.wait(ctx, lun.Extent{}); err != nil {
		return err
	}
	m.mu.Lock()
	m.flushes++
	m.mu.Unlock()
	return nil
}

func (m *memory) Unmap(ctx context.Context, e lun.Extent) error { return m.WriteZeroes(ctx, e) }

func (m *memory) WriteZeroes(ctx context.Context, e lun.Extent) error {
	if err := m.wait(ctx, e); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.at(e))
	clear(m.alloc[e.Start:e.End()])
	return nil
}

func (m *memory) Extents(ctx context.Context, e lun.Extent) ([]lun.Allocation, error) {
	if err := m.wait(ctx, e); err != nil {
		return nil, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	var out []lun.Allocation
	for at := e.Start; at < e.End() && len(out) < 100; {
		a := m.alloc[at]
		n := bytes.IndexByte(m.alloc[at:e.End()], 1-a)
		if n < 0 {
			n = int(e.End() - at)
		}
		out = append(out, lun.Allocation{Extent: lun.Extent{Start: at, Blocks: uint64(n)}, Allocated: a == 1})
		at += lun.LBA(n)
	}
	return out, nil
}

func (m *memory) Update(ctx context.Context, e lun.Extent, modify func([]byte) error) error {
	if err := m.wait(ctx, e); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b := bytes.Clone(m.at(e))
	if err := modify(b); err != nil {
		return err
	}
	m.put(b, e)
	return nil
}

func (m *memory) Close() error { return nil }

// quick is a memory that can be read at once.
type quick struct{ *memory }

func (m quick) TryReadAt(p []byte, start lun.LBA) (bool, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.hold != nil || m.fail != nil {
		return false, nil
	}
	copy(p, m.at(m.extent(p, start)))
	return true, nil
}

const iqn = "iqn.2026-11.net.example:disk"

// logTo is a logger that writes to the test's log.
func logTo(t testing.TB) logrus.FieldLogger {
	l := logrus.New()
	l.SetLevel(logrus.DebugLevel)
	l.SetOutput(io.Discard)
	if testing.Verbose() {
		l.SetOutput(t.Output())
	}
	l.AddHook(faults{t})
	return l
}

// faults fails the test of which a connection is dropped for a fault of the target's own.
type faults struct{ t testing.TB }

func (faults) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

func (f faults) Fire(e *logrus.Entry) error {
	if strings.HasPrefix(e.Message, "connection dropped: internal fault") {
		f.t.Errorf("%s: %v", e.Message, e.Data["stack"])
	}
	return nil
}

// begin serves units and gives the server and its portal.
func begin(t testing.TB, cfg Config, units ...Unit) (*Server, string) {
	t.Helper()
	s, at := beginAt(t, cfg, []Portal{{Address: "127.0.0.1:0"}}, units...)
	return s, at[0]
}

// tool runs a program of libiscsi or QEMU; the test is skipped where that is not
// installed and LUNSHIFT_REQUIRE_TOOLS is not set.
func tool(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("LUNSHIFT_REQUIRE_TOOLS") == "" {
			t.Skipf("%s is not installed", name)
		}
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	return string(out), err
}

func mustTool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := tool(t, name, args...)
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out
}

func url(addr string, n int) string { return fmt.Sprintf("iscsi://%s/%s/%d", addr, iqn, n) }
