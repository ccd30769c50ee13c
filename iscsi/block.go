package iscsi

import "sync"

// blockSize is the size, in bytes, of the buffers that Readers and Writers share: one
// is had only while something is read or gathered, so that idle connections cost
// none.
const blockSize = 256 << 10

var blocks = sync.Pool{New: func() any { return new([blockSize]byte) }}

// newBuffer gives n bytes, of the shared ones where n is their size.
func newBuffer(n int) []byte {
	if n != blockSize {
		return make([]byte, n)
	}
	return blocks.Get().(*[blockSize]byte)[:]
}

// freeBuffer takes back what newBuffer gave.
func freeBuffer(b []byte) {
	if len(b) == blockSize {
		blocks.Put((*[blockSize]byte)(b))
	}
}
