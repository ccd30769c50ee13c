package state

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"lunshift/failpoint"
)

// The journal holds what first writes wait for until the database has it: flags (notes),
// and what a write that is under way is going to leave on the destination (intents). One
// pwrite and one fdatasync over space that is there already make an entry durable; a
// transaction of the database costs twice that and three hand-overs between goroutines.
//
// It is three files, segments, written one after the other and round again. What is
// appended at one time is a frame, in slots of its own, so that a torn frame takes none
// before it along. Each time a segment begins the epoch grows by one; frames of the
// newest epoch and of the one before count, those of the third segment are left over, and
// it is the one to be written next. A new epoch that is two ahead leaves nothing that counts.
//
// Frame, little endian: "lsjf" | CRC-32C of the rest uint32 | epoch uint64 | number of the
// frame uint64 | length of the entries uint32 | entries.
const (
	slotSize     = 4 << 10
	segmentSlots = 512
	segmentCount = 3
	segmentSize  = slotSize * segmentSlots
	frameMagic   = "lsjf"
	frameHead    = 28
	// frameSlots bounds a frame.
	frameSlots = 64
	// mostEntry bounds one entry in bytes.
	mostEntry = 4 << 10
	// mostUnderWay bounds the intents of writes under way, in bytes: one frame carries
	// them from one segment to the next.
	mostUnderWay = frameSlots*slotSize - frameHead
)

func segmentName(i int) string { return fmt.Sprintf("journal.%d", i) }

// journal appends entries. append and release may be called concurrently; the rest is of
// Open and Close.
type journal struct {
	head *head
	// stuck is why entries do not leave the journal at the moment, nil while they do.
	stuck func() error
	// kick has the entries leave now.
	kick func()

	journaled, frames atomic.Uint64 // Stats

	freed chan struct{} // holds a token when a segment was released
	// synced, of tests, is called with the name of a segment that was synced.
	synced func(name string)

	// Of the one who leads.
	segments [segmentCount]segment
	current  int
	epoch    uint64
	number   uint64 // of the last frame
	buffer   []byte

	mu      sync.Mutex    // guards all below
	idle    *sync.Cond    // signalled when nobody leads any more
	bytes   int           // of the intents under way, those not appended yet as well
	ended   chan struct{} // closed and replaced when one of them ended
	waiting []*appending
	led     bool
	failed  error
	closed  bool
}

// segment is one of the files.
type segment struct {
	file *os.File
	next int                 // the slot to write
	live map[*entry]struct{} // entries that still count; guarded by mu
}

// appending is an entry that waits for its frame.
type appending struct {
	entry *entry
	bytes []byte
	turn  chan bool // true to lead, false when err is set
	err   error
}

// append makes an entry durable. Notes and intents count until they are released.
// Who comes while nobody appends leads: it writes what waits, then hands the lead on.
//
// ErrNoSpace leaves nothing written; after any other error the outcome is unknown, and
// nothing more is appended.
func (j *journal) append(e *entry) error {
	j.mu.Lock()
	if err := j.refusal(); err != nil {
		j.mu.Unlock()
		return err
	}
	a := &appending{entry: e, bytes: e.encode(), turn: make(chan bool, 1)}
	j.waiting = append(j.waiting, a)
	if j.led {
		j.mu.Unlock()
		if !<-a.turn {
			return a.err
		}
		j.mu.Lock()
	}
	j.led = true
	n, size := 0, frameHead
	for n < len(j.waiting) && (n == 0 || size+len(j.waiting[n].bytes) <= frameSlots*slotSize) {
		size += len(j.waiting[n].bytes)
		n++
	}
	batch := append([]*appending(nil), j.waiting[:n]...)
	refused := j.refusal()
	j.mu.Unlock()

	err := refused
	if err == nil {
		err = j.write(batch, size)
	}

	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil && refused == nil && !errors.Is(err, ErrNoSpace) {
		j.failed = fmt.Errorf("%w: %w: restart the service when the disk is in order", ErrFailed, err)
		err = j.failed
	}
	for _, b := range batch {
		b.err = err
		if b != a {
			b.turn <- false
		}
	}
	clear(j.waiting[:n])
	if j.waiting = j.waiting[n:]; len(j.waiting) > 0 {
		j.waiting[0].turn <- true
	} else {
		j.waiting, j.led = nil, false
		j.idle.Broadcast()
	}
	return err
}

// fail has nothing more appended: what the database holds is not known.
func (j *journal) fail(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.failed == nil {
		j.failed = err
	}
}

func (j *journal) refusal() error {
	if j.failed != nil {
		return j.failed
	}
	if j.closed {
		return ErrClosed
	}
	return nil
}

// admit waits, outside of the lead, until the intents under way leave room for e.
func (j *journal) admit(ctx context.Context, e *entry) error {
	for {
		j.mu.Lock()
		if err := j.refusal(); err != nil {
			j.mu.Unlock()
			return err
		}
		if j.bytes+e.size() <= mostUnderWay {
			j.bytes += e.size()
			j.mu.Unlock()
			return nil
		}
		ended := j.ended
		j.mu.Unlock()
		select {
		case <-ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// end says that the write of an intent that was admitted is not under way any more; mu
// is held.
func (j *journal) end(e *entry) {
	if !e.kept {
		e.kept = true
		j.bytes -= e.size()
		close(j.ended)
		j.ended = make(chan struct{})
	}
}

// keep says that the write of an intent is not under way any more, or never was as it was
// not appended: where it counts, it does until it is released, as a note does.
func (j *journal) keep(e *entry) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.end(e)
}

// release tells that an entry counts no more.
func (j *journal) release(e *entry) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.remove(e)
}

// remove is release; mu is held.
func (j *journal) remove(e *entry) {
	if e.underWay() {
		j.end(e)
	}
	delete(j.segments[e.segment].live, e)
	if len(j.segments[e.segment].live) == 0 {
		select {
		case j.freed <- struct{}{}:
		default:
		}
	}
}

// write appends a frame of the batch, size bytes long.
func (j *journal) write(batch []*appending, size int) error {
	slots := (size + slotSize - 1) / slotSize
	if j.segments[j.current].next+slots > segmentSlots {
		if err := j.turnOver(); err != nil {
			return err
		}
	}
	content := make([][]byte, len(batch))
	for i, a := range batch {
		content[i] = a.bytes
	}
	if err := j.put(content, slots); err != nil {
		return err
	}
	j.frames.Add(1)
	j.journaled.Add(uint64(len(batch)))
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, a := range batch {
		if a.entry.kind == withdrawEntry {
			// Before another can turn over, and carry the intent past its withdrawal.
			j.remove(a.entry.ends)
			continue
		}
		a.entry.segment = j.current
		j.segments[j.current].live[a.entry] = struct{}{}
	}
	return nil
}

// turnOver goes on in the next segment. The entries of the one before this count no more
// then: notes and kept intents must have left it, which needs no entry of others, and
// intents of writes under way are carried over, which admit keeps to one frame.
func (j *journal) turnOver() error {
	before := (j.current + segmentCount - 1) % segmentCount
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		carried, size, ok := j.carried(before)
		if !ok {
			j.kick()
			select {
			case <-j.freed:
			case <-look.C:
			}
			if err := j.stuck(); err != nil {
				return fmt.Errorf("the journal is full: %w: %w", ErrNoSpace, err)
			}
			continue
		}
		j.next(1)
		if len(carried) == 0 {
			return nil
		}
		content := make([][]byte, len(carried))
		for i, e := range carried {
			content[i] = e.encode()
		}
		err := j.put(content, (size+slotSize-1)/slotSize)
		j.mu.Lock()
		defer j.mu.Unlock()
		for _, e := range carried {
			if _, still := j.segments[before].live[e]; still {
				delete(j.segments[before].live, e)
				e.segment = j.current
				j.segments[j.current].live[e] = struct{}{}
			}
		}
		return err
	}
}

// carried gives the intents of a segment whose writes are under way, and the size of a frame
// of them; ok is false while anything else is left there.
func (j *journal) carried(of int) (entries []*entry, size int, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	size = frameHead
	for e := range j.segments[of].live {
		if !e.underWay() {
			return nil, 0, false
		}
		entries = append(entries, e)
		size += e.size()
	}
	return entries, size, true
}

// next begins the next segment, with an epoch that is ahead by so many.
func (j *journal) next(ahead uint64) {
	j.current = (j.current + 1) % segmentCount
	j.segments[j.current].next = 0
	j.epoch += ahead
}

// put writes the next frame and returns once it is on stable storage.
func (j *journal) put(entries [][]byte, slots int) error {
	in := &j.segments[j.current]
	if cap(j.buffer) < slots*slotSize {
		j.buffer = make([]byte, slots*slotSize)
	}
	b := append(j.buffer[:0], frameMagic...)
	b = append(b, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, j.epoch)
	b = binary.LittleEndian.AppendUint64(b, j.number+1)
	b = append(b, 0, 0, 0, 0)
	for _, e := range entries {
		b = append(b, e...)
	}
	binary.LittleEndian.PutUint32(b[24:], uint32(len(b)-frameHead))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	end := len(b)
	b = b[:slots*slotSize]
	clear(b[end:])

	failpoint.Here("journal.begin")
	if _, err := in.file.WriteAt(b, int64(in.next)*slotSize); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(in.file.Name()), reason(err))
	}
	failpoint.Here("journal.written")
	if err := j.sync(in.file); err != nil {
		return fmt.Errorf("sync %s: %w", filepath.Base(in.file.Name()), reason(err))
	}
	failpoint.Here("journal.synced")
	in.next += slots
	j.number++
	return j.head.journaled(j.number)
}

func (j *journal) sync(file *os.File) error {
	err := fdatasync(file)
	if err == nil && j.synced != nil {
		j.synced(file.Name())
	}
	return err
}

func fdatasync(file *os.File) error {
	for {
		err := unix.Fdatasync(int(file.Fd()))
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// createJournal makes the segments that are missing, full of zeroes: what is written over
// them later needs no new space and no new length.
func createJournal(dir string) error {
	for i := range segmentCount {
		path := filepath.Join(dir, segmentName(i))
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		tmp := filepath.Join(dir, "."+segmentName(i))
		file, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err == nil {
			_, err = file.Write(make([]byte, segmentSize))
			err = errors.Join(err, file.Sync(), file.Close())
		}
		if err == nil {
			err = os.Rename(tmp, path)
		}
		if err != nil {
			return fmt.Errorf("create %s: %w", segmentName(i), reason(err))
		}
	}
	return syncPath(dir)
}

// openJournal reads what the journal holds and gives the entries that count, oldest
// first. Nothing may be appended before begin.
func openJournal(dir string, head *head) (_ *journal, entries [][]byte, err error) {
	j := &journal{head: head, freed: make(chan struct{}, 1), ended: make(chan struct{})}
	j.idle = sync.NewCond(&j.mu)
	defer func() {
		if err != nil {
			j.closeFiles()
		}
	}()
	var frames [segmentCount][]frame
	for i := range j.segments {
		name := segmentName(i)
		file, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, damaged(dir, fmt.Errorf("%s is missing", name))
		}
		if err != nil {
			return nil, nil, fmt.Errorf("state directory %s: %s: %w: give this user the directory", dir, name, reason(err))
		}
		j.segments[i].file, j.segments[i].live = file, make(map[*entry]struct{})
		b := make([]byte, segmentSize+1)
		n, err := file.ReadAt(b, 0)
		if err != nil && err != io.EOF {
			return nil, nil, damaged(dir, fmt.Errorf("%s: %w", name, reason(err)))
		}
		if n != segmentSize {
			return nil, nil, damaged(dir, fmt.Errorf("%s is not %d bytes long", name, segmentSize))
		}
		frames[i] = findFrames(b[:n])
	}
	counting, newest, err := countingFrames(frames)
	if err != nil {
		return nil, nil, damaged(dir, err)
	}
	j.current = newest
	for _, f := range counting {
		j.epoch, j.number = f.epoch, f.number
		more, err := splitEntries(f.entries)
		if err != nil {
			return nil, nil, damaged(dir, fmt.Errorf("frame %d of the journal: %w", f.number, err))
		}
		entries = append(entries, more...)
	}
	if j.number < head.frame {
		return nil, nil, damaged(dir, fmt.Errorf("the journal ends at frame %d, but frame %d was acknowledged", j.number, head.frame))
	}
	return j, entries, nil
}

// frame is one that was found in a segment, whole.
type frame struct {
	slot, slots   int
	epoch, number uint64
	entries       []byte
}

// findFrames gives every whole frame that begins at a slot of b.
func findFrames(b []byte) (found []frame) {
	for slot := 0; slot < segmentSlots; slot++ {
		p := b[slot*slotSize:]
		if string(p[:4]) != frameMagic {
			continue
		}
		length := uint64(binary.LittleEndian.Uint32(p[24:]))
		if length > uint64(len(p)-frameHead) || length > frameSlots*slotSize ||
			binary.LittleEndian.Uint32(p[4:]) != crc32.Checksum(p[8:frameHead+length], castagnoli) {
			continue
		}
		found = append(found, frame{
			slot: slot, slots: (frameHead + int(length) + slotSize - 1) / slotSize,
			epoch: binary.LittleEndian.Uint64(p[8:]), number: binary.LittleEndian.Uint64(p[16:]),
			entries: p[frameHead : frameHead+length],
		})
	}
	return found
}

// countingFrames gives the frames of the newest epoch and of the one before, in order, and
// the segment of the newest. Each frame was synced before the next was written, so one
// that lacks a predecessor says that the journal is damaged.
func countingFrames(found [segmentCount][]frame) (all []frame, at int, err error) {
	var newest uint64
	for i := range found {
		for _, f := range found[i] {
			if f.epoch > newest {
				newest, at = f.epoch, i
			}
		}
	}
	if newest == 0 {
		return nil, 0, nil
	}
	for _, old := range []uint64{1, 0} {
		slot := 0
		for _, f := range found[(at+segmentCount-int(old))%segmentCount] {
			switch {
			case f.epoch != newest-old:
				continue
			case f.slot != slot || len(all) > 0 && all[len(all)-1].number+1 != f.number,
				// Only a frame that leaves all behind is empty.
				len(all) == 0 && old == 0 && len(f.entries) > 0:
				return nil, 0, fmt.Errorf("frame %d of the journal follows one that fails its checksum", f.number)
			}
			slot += f.slots
			all = append(all, f)
		}
	}
	return all, at, nil
}

// begin leaves behind all that the journal held; it is in the database, or of no use.
func (j *journal) begin() error {
	j.next(2)
	return j.put(nil, 1)
}

// close gives the files up; clean says that every entry that was taken is in the database.
func (j *journal) close(clean bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for i := range j.segments {
		clean = clean && len(j.segments[i].live) == 0
	}
	var err error
	if clean && j.failed == nil {
		err = j.begin()
	}
	return errors.Join(err, j.closeFiles())
}

// shut refuses appending from here on and waits for what is under way.
func (j *journal) shut() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.closed = true
	for j.led {
		j.idle.Wait()
	}
}

func (j *journal) closeFiles() (err error) {
	for i := range j.segments {
		if f := j.segments[i].file; f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}
