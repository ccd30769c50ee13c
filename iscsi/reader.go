package iscsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// castagnoli is the polynomial of the iSCSI digests (RFC 7143 13.1). The table
// is constant; crc32 uses the processor's instruction for it.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// DigestLength is the length of a header or data digest in bytes.
const DigestLength = 4

// Errors of what arrived. A connection on which one occurred is not usable on.
var (
	// ErrDigest: a header or data digest does not match (RFC 7143 7.7, 7.8).
	ErrDigest = errors.New("digest mismatch")
	// ErrTooLong: a data segment is longer than was declared acceptable.
	ErrTooLong = errors.New("data segment longer than MaxRecvDataSegmentLength")
	// ErrAHS: the additional header segments are malformed or too long.
	ErrAHS = errors.New("bad additional header segment")
)

// headerRead is how much is read where a header and long data are expected, in bytes.
const headerRead = 4096

// maxAHS is how many bytes of additional header a PDU may bring; an extended
// CDB and a bidirectional length need less (RFC 7143 11.2.2).
const maxAHS = 1020

// Reader takes PDUs off a byte stream. It reads as much at a time as its buffer
// holds, so that many PDUs arrive in one read, and large data segments go
// straight to where the caller wants them. It has its buffer only while there is
// something to read: one that waits on a socket with nothing half read holds none.
// It is for one goroutine.
type Reader struct {
	// HeaderDigest and DataDigest are on when negotiated; they take effect with
	// the next call of Next.
	HeaderDigest, DataDigest bool
	// MaxData is the longest data segment accepted, in bytes.
	MaxData int
	// MaxAHS is the most additional header accepted, in bytes.
	MaxAHS int

	r          io.Reader
	direct     *direct // to r; nil where r is no socket
	size       int     // of buf, bytes
	buf        []byte  // nil while nothing is read
	start, end int     // what was read and not taken
	bhs        BHS
	ahs        []byte
	left       int // bytes of the data segment not taken yet, without padding
	trailer    int // padding and digest behind them
	crc        uint32
	// long says that the data segment was a long one, so that more of the kind are
	// likely: then little is read beyond a header, and no long segment is copied.
	long bool
}

// NewReader makes a Reader with a buffer of size bytes, at least 4096. It accepts
// data segments of 8192 bytes, as a login may use, until MaxData is changed.
func NewReader(r io.Reader, size int) *Reader {
	x := &Reader{r: r, direct: newDirect(r), size: max(size, 4096), MaxData: 8192, MaxAHS: maxAHS}
	if x.direct != nil {
		x.r = x.direct
	}
	return x
}

// Resize gives the Reader a buffer of size bytes, at least 4096, from the next read on.
func (r *Reader) Resize(size int) {
	r.size = max(size, 4096, r.end-r.start)
	if r.buf == nil {
		return
	}
	old, rest := r.buf, r.buf[r.start:r.end]
	r.buf = nil
	if len(rest) > 0 {
		r.buf = newBuffer(r.size)
		copy(r.buf, rest)
	}
	r.start, r.end = 0, len(rest)
	freeBuffer(old)
}

// Close lets go of the buffer and of what is in it. The Reader is not used after it.
func (r *Reader) Close() {
	if r.buf != nil {
		freeBuffer(r.buf)
	}
	r.buf, r.start, r.end = nil, 0, 0
}

// Next reads the next header and gives it; the data segment of the one before is
// skipped if it was not taken. The header is valid until the next call. io.EOF
// says that the stream ended between two PDUs.
func (r *Reader) Next() (*BHS, error) {
	if err := r.Discard(); err != nil {
		return nil, err
	}
	if err := r.fill(BHSLength); err != nil {
		if err == io.EOF && r.end > r.start {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	copy(r.bhs[:], r.buf[r.start:])
	n := r.bhs.AHSLength()
	if n > r.MaxAHS {
		return nil, fmt.Errorf("%v with %d bytes: %w", r.bhs.Opcode(), n, ErrAHS)
	}
	head := BHSLength + n
	whole := head
	if r.HeaderDigest {
		whole += DigestLength
	}
	if err := r.fill(whole); err != nil {
		return nil, unexpected(err)
	}
	if r.HeaderDigest {
		got := binary.LittleEndian.Uint32(r.buf[r.start+head:])
		if crc32.Checksum(r.buf[r.start:r.start+head], castagnoli) != got {
			return nil, fmt.Errorf("header: %w", ErrDigest)
		}
	}
	r.ahs = append(r.ahs[:0], r.buf[r.start+BHSLength:r.start+head]...)
	r.start += whole
	data := r.bhs.DataLength()
	if data > r.MaxData {
		return nil, fmt.Errorf("%v with %d bytes, at most %d: %w", r.bhs.Opcode(), data, r.MaxData, ErrTooLong)
	}
	r.left, r.trailer, r.crc = data, 0, 0
	r.long = data >= r.size/4
	if data > 0 {
		r.trailer = -data & 3
		if r.DataDigest {
			r.trailer += DigestLength
		}
	}
	return &r.bhs, nil
}

// AHS is the additional header segments of the current PDU, valid until Next.
func (r *Reader) AHS() []byte { return r.ahs }

// ExtendedCDB is the CDB beyond its first sixteen bytes, or nil (RFC 7143 11.2.2.3).
func (r *Reader) ExtendedCDB() ([]byte, error) {
	b, err := r.segment(1)
	if b != nil {
		b = b[4:]
	}
	return b, err
}

// Bidirectional tells whether the PDU brings the expected length of data that is to
// go the other way than its flags say (RFC 7143 11.2.2.4).
func (r *Reader) Bidirectional() bool {
	b, _ := r.segment(2)
	return b != nil
}

// segment is the additional header segment of that type, from its length on, or nil.
func (r *Reader) segment(kind byte) ([]byte, error) {
	for b := r.ahs; len(b) > 0; {
		if len(b) < 4 {
			return nil, ErrAHS
		}
		n := int(binary.BigEndian.Uint16(b)) // counts what follows the type byte
		if n < 1 || 3+n > len(b) {
			return nil, ErrAHS
		}
		if b[2] == kind {
			return b[:3+n], nil
		}
		b = b[min(len(b), (3+n+3)&^3):]
	}
	return nil, nil
}

// Left is how many bytes of the current data segment were not taken yet.
func (r *Reader) Left() int { return r.left }

// ReadData takes the next len(p) bytes of the data segment; with the last of
// them it checks padding and digest. Long segments are read into p without a copy.
func (r *Reader) ReadData(p []byte) error {
	if len(p) > r.left {
		return fmt.Errorf("%d bytes wanted of a data segment with %d left: %w", len(p), r.left, io.ErrUnexpectedEOF)
	}
	n := copy(p, r.buf[r.start:r.end])
	r.start += n
	if rest := p[n:]; len(rest) > 0 {
		if len(rest) >= r.size/2 || r.long && len(rest) >= r.size/8 {
			r.rest()
			if _, err := io.ReadFull(r.r, rest); err != nil {
				return unexpected(err)
			}
		} else {
			// What follows the segment comes with it in the same read.
			if err := r.fill(len(rest)); err != nil {
				return unexpected(err)
			}
			copy(rest, r.buf[r.start:])
			r.start += len(rest)
		}
	}
	return r.took(p)
}

// Data takes the rest of the data segment as a view of the Reader's buffer, valid
// until the next call of any method, or as a fresh slice when it is longer than
// the buffer.
func (r *Reader) Data() ([]byte, error) {
	if r.left == 0 {
		return nil, nil
	}
	if r.left > r.size-DigestLength-4 {
		p := make([]byte, r.left)
		return p, r.ReadData(p)
	}
	n := r.left
	if err := r.fill(n + r.trailer); err != nil {
		return nil, unexpected(err)
	}
	p := r.buf[r.start : r.start+n : r.start+n]
	r.start += n
	return p, r.took(p)
}

// Discard skips what is left of the data segment.
func (r *Reader) Discard() error {
	for r.left > 0 {
		if r.start == r.end {
			if err := r.fill(1); err != nil {
				return unexpected(err)
			}
		}
		n := min(r.left, r.end-r.start)
		p := r.buf[r.start : r.start+n]
		r.start += n
		if err := r.took(p); err != nil {
			return err
		}
	}
	return nil
}

// Ready tells whether a whole PDU, data included, is in the buffer already, so
// that Next and Data would not wait.
func (r *Reader) Ready() bool {
	have := r.end - r.start - r.left
	if r.left > 0 {
		have -= r.trailer
	}
	if have < BHSLength {
		return false
	}
	h := r.buf[r.end-have:]
	need := BHSLength + int(h[4])*4
	if r.HeaderDigest {
		need += DigestLength
	}
	if data := int(h[5])<<16 | int(h[6])<<8 | int(h[7]); data > 0 {
		need += (data + 3) &^ 3
		if r.DataDigest {
			need += DigestLength
		}
	}
	return have >= need
}

// took accounts for data that the caller got and ends the segment with its last.
func (r *Reader) took(p []byte) error {
	r.left -= len(p)
	if r.DataDigest {
		r.crc = crc32.Update(r.crc, castagnoli, p)
	}
	if r.left > 0 || r.trailer == 0 {
		return nil
	}
	if err := r.fill(r.trailer); err != nil {
		return unexpected(err)
	}
	t := r.buf[r.start : r.start+r.trailer]
	r.start += r.trailer
	r.trailer = 0
	if r.DataDigest {
		pad := t[:len(t)-DigestLength]
		if crc32.Update(r.crc, castagnoli, pad) != binary.LittleEndian.Uint32(t[len(pad):]) {
			return fmt.Errorf("data of %v: %w", r.bhs.Opcode(), ErrDigest)
		}
	}
	return nil
}

// fill makes at least n bytes available in the buffer; n fits in it.
func (r *Reader) fill(n int) error {
	if r.end-r.start >= n {
		return nil
	}
	if r.start == r.end {
		r.start, r.end = 0, 0
	} else if r.start+n > r.size {
		r.end = copy(r.buf, r.buf[r.start:r.end])
		r.start = 0
	}
	for r.end-r.start < n {
		got, err := r.more()
		r.end += got
		if err != nil && r.end-r.start < n {
			return err
		}
		if got == 0 && err == nil {
			return io.ErrNoProgress
		}
	}
	return nil
}

// more reads what there is behind what the buffer holds.
func (r *Reader) more() (int, error) {
	if r.direct != nil {
		return r.direct.readFor(r)
	}
	return r.r.Read(r.room())
}

// room is the free part of the buffer.
func (r *Reader) room() []byte {
	if r.buf == nil {
		r.buf = newBuffer(r.size)
	}
	if r.long && r.left == 0 {
		return r.buf[r.end:min(r.size, r.end+headerRead)]
	}
	return r.buf[r.end:]
}

// rest lets go of a buffer that holds nothing, for the time of a wait.
func (r *Reader) rest() {
	if r.start == r.end && len(r.buf) == blockSize {
		freeBuffer(r.buf)
		r.buf, r.start, r.end = nil, 0, 0
	}
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
