package iscsi

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

func vectors(segs ...[]byte) (v []syscall.Iovec) {
	for _, p := range segs {
		v = vector(v, p)
	}
	return v
}

// sockets are the two ends of a TCP connection.
func sockets(t testing.TB) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	a.SetDeadline(time.Now().Add(30 * time.Second))
	return a, b
}

func TestReaderThatWaitsAndWriterThatSentHoldNoBuffer(t *testing.T) {
	a, b := sockets(t)
	var mu sync.Mutex
	w := NewWriter(a, &mu)
	r := NewReader(b, blockSize)
	for round := range 3 {
		mu.Lock()
		h, data := w.Frame(5)
		copy(data, "hello")
		h.SetITT(uint32(round))
		w.Commit(h, data)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if w.cur != nil {
			t.Error("a writer that sent everything holds memory")
		}
		mu.Unlock()
		got, err := r.Next()
		if err != nil || got.ITT() != uint32(round) {
			t.Fatalf("round %d: %v", round, err)
		}
		if p, err := r.Data(); err != nil || string(p) != "hello" {
			t.Fatalf("round %d: %q, %v", round, p, err)
		}
		b.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := r.Next(); err == nil {
			t.Fatal("a PDU out of nothing")
		}
		b.SetReadDeadline(time.Time{})
		if r.buf != nil {
			t.Error("a reader that waits for nothing half read holds a buffer")
		}
	}
}

func TestReaderKeepsWhatItReadWhenItsBufferChanges(t *testing.T) {
	a, b := sockets(t)
	var wire bytes.Buffer
	var mu sync.Mutex
	w := NewWriter(&wire, &mu)
	mu.Lock()
	for n := range 8 {
		h, data := w.Frame(1000)
		for i := range data {
			data[i] = byte(n)
		}
		w.Commit(h, data)
	}
	w.Flush()
	mu.Unlock()
	r := NewReader(b, 4096)
	sent := wire.Bytes()
	if _, err := a.Write(sent[:3000]); err != nil {
		t.Fatal(err)
	}
	go func() {
		time.Sleep(20 * time.Millisecond) // what is there is read first
		a.Write(sent[3000:])
		a.(*net.TCPConn).CloseWrite()
	}()
	for n := range 8 {
		if n < 5 {
			r.Resize([]int{blockSize, 4096, 5000, blockSize, blockSize}[n])
		}
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
		if p, err := r.Data(); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{byte(n)}, 1000)) {
			t.Fatalf("PDU %d arrived wrong, or %v", n, err)
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	r.Close()
}

// BenchmarkDigest shows that digests are as fast as the processor's instruction: some
// GB/s, where a table would give less than one.
func BenchmarkDigest(b *testing.B) {
	for _, n := range []int{48, 4096, 256 << 10} {
		b.Run(fmt.Sprintf("%dB", n), func(b *testing.B) {
			p := make([]byte, n)
			b.SetBytes(int64(n))
			for b.Loop() {
				crc32.Checksum(p, castagnoli)
			}
		})
	}
}

// asked records how much each read asks for.
type asked struct {
	r     io.Reader
	sizes []int
}

func (a *asked) Read(p []byte) (int, error) {
	a.sizes = append(a.sizes, len(p))
	return a.r.Read(p)
}

func TestLongSegmentsAreNotCopied(t *testing.T) {
	var stream bytes.Buffer
	var mu sync.Mutex
	w := NewWriter(&stream, &mu)
	mu.Lock()
	sizes := []int{200 << 10, 200 << 10, 70 << 10, 16, 200 << 10}
	for i, n := range sizes {
		var h BHS
		h.SetOpcode(OpDataOut)
		w.Append(&h, nil, bytes.Repeat([]byte{byte(i + 1)}, n), nil)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	mu.Unlock()
	a := &asked{r: &stream}
	r := NewReader(a, 256<<10)
	r.MaxData = 1 << 20
	for i, n := range sizes {
		first := len(a.sizes)
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, n)
		if err := r.ReadData(p); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{byte(i + 1)}, n)) {
			t.Fatalf("segment %d: %v", i, err)
		}
		// The first read takes up a part of the second segment as well.
		if long := i > 1 && sizes[i-1] >= 64<<10; long && (len(a.sizes) == first || a.sizes[first] > 8<<10) {
			t.Errorf("segment %d behind a long one begins with reads of %v", i, a.sizes[first:])
		}
	}
}
