package iscsi

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"net"
	"sync"
	"syscall"
)

const (
	// MaxFrame is the longest data segment, in bytes, that Frame takes; longer
	// ones go through Append.
	MaxFrame = 64 << 10

	// maxSegments keeps one batch within one writev of the kernel (IOV_MAX 1024).
	maxSegments = 1000
	// maxReferenced bounds the data a batch refers to, in bytes.
	maxReferenced = 8 << 20
)

// Releaser is told that a Writer has no further use for the data it was given.
// It must not block, and not call the Writer.
type Releaser interface{ Release() }

// Writer gathers PDUs and sends them in as few writes as it can. While one
// goroutine is in a write the others go on gathering; what they gathered goes out
// with the next write of the same goroutine. It holds memory only for what is
// gathered and not sent.
//
// All methods are called with the lock held that NewWriter was given.
// Reserve, Flush and Drain give it up while they wait.
type Writer struct {
	// HeaderDigest and DataDigest are on when negotiated.
	HeaderDigest, DataDigest bool

	w        io.Writer
	direct   *direct // to w; nil where w is no socket
	lock     sync.Locker
	idle     *sync.Cond // no write is under way
	cur      *batch     // nil while nothing is gathered
	flushing bool
	writes   uint64
	err      error
}

// batch is what one write sends.
type batch struct {
	arena      []byte // headers, short data, padding, digests; never grows
	open       int    // where in arena the segment begins that is not in segs yet
	segs       net.Buffers
	out        net.Buffers // what WriteTo consumes; segs keeps the memory
	vectors    []syscall.Iovec
	owners     []Releaser
	referenced int
}

var batches = sync.Pool{New: func() any {
	return &batch{arena: make([]byte, 0, blockSize), segs: make(net.Buffers, 0, 64)}
}}

// NewWriter makes a Writer to w whose state lock protects.
func NewWriter(w io.Writer, lock sync.Locker) *Writer {
	return &Writer{w: w, direct: newDirect(w), lock: lock, idle: sync.NewCond(lock)}
}

// batch is what PDUs are gathered in.
func (w *Writer) batch() *batch {
	if w.cur == nil {
		w.cur = batches.Get().(*batch)
	}
	return w.cur
}

// Reserve waits until a PDU with n bytes of data surely fits, sending what is
// gathered where it must. Without it Frame and Append may give up the lock.
func (w *Writer) Reserve(n int) {
	for !w.cur.room(n) {
		if w.flushing {
			w.idle.Wait()
		} else {
			w.Flush()
		}
	}
}

// Room tells whether a PDU with n bytes of data fits at once: Reserve would not wait.
func (w *Writer) Room(n int) bool { return w.cur.room(n) }

// Taken counts what the other side took: the bytes that it acknowledged, or the writes
// that are done where w is no socket. left says that it did not take all that there is.
func (w *Writer) Taken() (n uint64, left bool) {
	left = w.flushing || w.Pending()
	if w.direct == nil {
		return w.writes, left
	}
	sent, queued := w.direct.sent.Load(), w.direct.queued()
	return sent - queued, left || queued > 0
}

func (b *batch) room(n int) bool {
	if b == nil || len(b.arena) == 0 && len(b.segs) == 0 {
		return true
	}
	need := BHSLength + maxAHS + 2*DigestLength + 3
	if n <= MaxFrame {
		need += n
	}
	return len(b.arena)+need <= cap(b.arena) && len(b.segs)+4 <= maxSegments && b.referenced+n <= maxReferenced
}

// Frame begins a PDU with n bytes of data, at most MaxFrame, that the caller
// fills in place. header is zero but for DataSegmentLength; data is not cleared.
// Both are valid until Commit or Cancel, one of which must follow before the lock
// is given up.
func (w *Writer) Frame(n int) (header *BHS, data []byte) {
	w.Reserve(n)
	b := w.batch()
	at := len(b.arena)
	head := BHSLength
	if w.HeaderDigest {
		head += DigestLength
	}
	size := head
	if n > 0 {
		size += (n + 3) &^ 3
		if w.DataDigest {
			size += DigestLength
		}
	}
	b.arena = b.arena[:at+size]
	header = (*BHS)(b.arena[at:])
	*header = BHS{}
	header.SetDataLength(n)
	return header, b.arena[at+head : at+head+n : at+head+n]
}

// Commit ends the PDU that Frame began.
func (w *Writer) Commit(header *BHS, data []byte) {
	if !w.HeaderDigest && !w.DataDigest && len(data)&3 == 0 {
		return
	}
	b := w.cur
	tail := b.arena[len(b.arena)-w.tail(len(data)):]
	w.finish(tail, data)
	if w.HeaderDigest {
		at := len(b.arena) - len(tail) - len(data) - DigestLength
		binary.LittleEndian.PutUint32(b.arena[at:], crc32.Checksum(header[:], castagnoli))
	}
}

// Cancel takes back the PDU that Frame began.
func (w *Writer) Cancel(data []byte) {
	size := BHSLength + len(data) + w.tail(len(data))
	if w.HeaderDigest {
		size += DigestLength
	}
	w.cur.arena = w.cur.arena[:len(w.cur.arena)-size]
	if len(w.cur.arena) == 0 {
		w.drop()
	}
}

// Append adds a PDU whose data stays where it is until owner, if any, is told.
// header is copied; its DataSegmentLength is set. ahs may be nil.
func (w *Writer) Append(header *BHS, ahs, data []byte, owner Releaser) {
	w.Reserve(len(data))
	b := w.batch()
	header.SetDataLength(len(data))
	header.SetAHSLength(len(ahs))
	at := len(b.arena)
	b.arena = append(append(b.arena, header[:]...), ahs...)
	if w.HeaderDigest {
		b.arena = binary.LittleEndian.AppendUint32(b.arena, crc32.Checksum(b.arena[at:], castagnoli))
	}
	if len(data) > 0 && len(data) <= 512 {
		b.arena = append(b.arena, data...)
	} else if len(data) > 0 {
		b.close()
		b.segs = append(b.segs, data)
		b.referenced += len(data)
	}
	if t := w.tail(len(data)); t > 0 {
		at := len(b.arena)
		b.arena = b.arena[:at+t]
		w.finish(b.arena[at:], data)
	}
	if owner != nil {
		b.owners = append(b.owners, owner)
	}
}

// tail is the length of padding and digest behind n bytes of data.
func (w *Writer) tail(n int) int {
	if n == 0 {
		return 0
	}
	if w.DataDigest {
		return -n&3 + DigestLength
	}
	return -n & 3
}

// finish writes padding and digest of data to tail.
func (w *Writer) finish(tail, data []byte) {
	pad := tail[:-len(data)&3]
	clear(pad)
	if w.DataDigest && len(data) > 0 {
		crc := crc32.Update(crc32.Checksum(data, castagnoli), castagnoli, pad)
		binary.LittleEndian.PutUint32(tail[len(pad):], crc)
	}
}

// Pending tells whether something is gathered and not being written.
func (w *Writer) Pending() bool { return w.cur != nil && len(w.cur.arena) > 0 }

// Flush sends what is gathered. If another goroutine is in a write it leaves the
// sending to that one and returns at once. The first error stays; everything
// after it is thrown away, and every Flush gives it.
func (w *Writer) Flush() error {
	if w.flushing {
		return w.err
	}
	for w.Pending() && w.err == nil {
		b := w.cur
		w.cur = nil
		w.flushing = true
		err := w.unlocked(b)
		w.flushing = false
		w.writes++
		if err != nil && w.err == nil {
			w.err = err
		}
		w.idle.Broadcast()
	}
	if w.err != nil {
		w.drop()
	}
	return w.err
}

// drop throws away what is gathered.
func (w *Writer) drop() {
	if w.cur != nil {
		w.cur.free()
		w.cur = nil
	}
}

// Drain is Flush that returns only when everything gathered before was sent, by
// whichever goroutine, or failed.
func (w *Writer) Drain() error {
	for w.err == nil && (w.Pending() || w.flushing) {
		if w.flushing {
			w.idle.Wait()
		} else {
			w.Flush()
		}
	}
	return w.err
}

// unlocked sends b without the lock.
func (w *Writer) unlocked(b *batch) error {
	w.lock.Unlock()
	defer w.lock.Lock()
	err := b.send(w.w, w.direct)
	b.free()
	return err
}

// Close makes every later PDU be thrown away, waits for a write under way and
// tells the owners of all data. The caller has made the write end, by closing
// the connection.
func (w *Writer) Close(err error) {
	if w.err == nil {
		w.err = err
	}
	for w.flushing {
		w.idle.Wait()
	}
	w.drop()
}

// close ends the segment of the arena that is being filled.
func (b *batch) close() {
	if b.open < len(b.arena) {
		b.segs = append(b.segs, b.arena[b.open:len(b.arena):len(b.arena)])
		b.open = len(b.arena)
	}
}

func (b *batch) send(w io.Writer, d *direct) error {
	if d != nil {
		b.close()
		for _, p := range b.segs {
			b.vectors = vector(b.vectors, p)
		}
		return d.writeAll(b.vectors)
	}
	if len(b.segs) == 0 {
		_, err := w.Write(b.arena)
		return err
	}
	b.close()
	b.out = b.segs
	_, err := b.out.WriteTo(w)
	return err
}

// free gives the batch back.
func (b *batch) free() {
	for i, o := range b.owners {
		o.Release()
		b.owners[i] = nil
	}
	// A batch that waits for its next use keeps nothing but its own memory.
	clear(b.segs)
	clear(b.vectors)
	b.arena, b.segs, b.owners, b.vectors = b.arena[:0], b.segs[:0], b.owners[:0], b.vectors[:0]
	b.out, b.open, b.referenced = nil, 0, 0
	batches.Put(b)
}
