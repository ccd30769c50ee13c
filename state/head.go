package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	headName  = "HEAD"
	headMagic = "lunshift"
	headSize  = 32
	// headSizeOf1 is the length in version 1.
	headSizeOf1 = 24

	// formatVersion is the layout of the directory and of the keys: 1 had no journal.
	formatVersion = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// head is the file that says what a directory is, and from which commit on it
// must not fall back. It is written in place after each commit and each frame of the
// journal, and synced only at
// Close: the page reaches the disk at the earliest after the commit did, so
// whatever it says was durable. A database or a journal that has lost its end, to damage
// or a lost file, is told by it.
//
// Layout, little endian: "lunshift" | version uint32 | CRC-32C of the rest
// uint32 | number of the last commit uint64 | number of the journal's last frame uint64.
type head struct {
	dir     string
	version uint32 // as it was found

	mu    sync.Mutex // guards all below
	file  *os.File
	seq   uint64 // of the last commit
	frame uint64 // the number of the journal's last frame
}

// openHead reads the head, or writes a new one. A new one is on stable storage
// before the journal and the database come into being.
func openHead(dir string) (*head, error) {
	path := filepath.Join(dir, headName)
	h := &head{dir: dir, version: formatVersion}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return h, h.create()
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w: give this user the directory", dir, err)
	}
	var b [slotSize]byte
	n, err := file.ReadAt(b[:], 0)
	size := headSize
	if n >= 12 {
		if h.version = binary.LittleEndian.Uint32(b[8:]); h.version == 1 {
			size = headSizeOf1
		}
	}
	switch {
	case err != nil && err != io.EOF:
		err = fmt.Errorf("state directory %s: %w", dir, err)
	case (n < len(headMagic) || string(b[:len(headMagic)]) != headMagic) && holdsState(dir):
		err = damaged(dir, fmt.Errorf("%s begins with something else", headName))
	case n < len(headMagic) || string(b[:len(headMagic)]) != headMagic:
		err = fmt.Errorf("state directory %s: %w: its %s is not one of lunshift's: name another directory", dir, ErrForeign, headName)
	case n < headSizeOf1:
		err = damaged(dir, fmt.Errorf("%s is cut off", headName))
	case h.version > formatVersion && headSum(b[:n]) == binary.LittleEndian.Uint32(b[12:]):
		err = fmt.Errorf("state directory %s has format version %d, this lunshift knows up to %d: %w: run the newer one",
			dir, h.version, formatVersion, ErrVersion)
	case n != size || headSum(b[:n]) != binary.LittleEndian.Uint32(b[12:]) || h.version == 0 || h.version > formatVersion:
		err = damaged(dir, fmt.Errorf("%s fails its checksum", headName))
	default:
		h.file, h.seq = file, binary.LittleEndian.Uint64(b[16:])
		if h.version > 1 {
			h.frame = binary.LittleEndian.Uint64(b[24:])
		}
		return h, nil
	}
	file.Close()
	return nil, err
}

// holdsState tells whether the directory has what goes with a head.
func holdsState(dir string) bool {
	for _, name := range []string{badgerDir, segmentName(0)} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return true
		}
	}
	return false
}

// create writes the head anew, in the newest version, in the place of what is there.
func (h *head) create() error {
	err := h.replace()
	if err != nil {
		return fmt.Errorf("state directory %s: create %s: %w", h.dir, headName, reason(err))
	}
	return nil
}

func (h *head) replace() error {
	tmp, path := filepath.Join(h.dir, "."+headName), filepath.Join(h.dir, headName)
	file, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	b := h.encode()
	_, err = file.Write(b[:])
	if err = errors.Join(err, file.Sync()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = syncPath(h.dir)
	}
	if err == nil {
		err = syncPath(filepath.Dir(h.dir))
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	if h.file != nil {
		err = h.file.Close()
	}
	h.file, h.version = file, formatVersion
	return err
}

func (h *head) encode() (b [headSize]byte) {
	copy(b[:], headMagic)
	binary.LittleEndian.PutUint32(b[8:], formatVersion)
	binary.LittleEndian.PutUint64(b[16:], h.seq)
	binary.LittleEndian.PutUint64(b[24:], h.frame)
	binary.LittleEndian.PutUint32(b[12:], headSum(b[:]))
	return b
}

// headSum is the checksum of a head, but for the bytes that hold it.
func headSum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:12], castagnoli), castagnoli, b[16:])
}

// advance notes that commit seq is on stable storage.
func (h *head) advance(seq uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seq = seq
	return h.write()
}

// journaled notes that a frame of the journal is on stable storage.
func (h *head) journaled(frame uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.frame = frame
	if err := h.write(); err != nil {
		return fmt.Errorf("state directory %s: %w", h.dir, err)
	}
	return nil
}

// write fails as well where the file is no longer in any directory: what is written to a
// state that was removed is lost with the process.
func (h *head) write() error {
	b := h.encode()
	var st unix.Stat_t
	if err := unix.Fstat(int(h.file.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", headName, err)
	}
	if st.Nlink == 0 {
		return errRemoved
	}
	if _, err := h.file.WriteAt(b[:], 0); err != nil {
		return fmt.Errorf("write %s: %w", headName, reason(err))
	}
	return nil
}

func (h *head) close() error {
	return errors.Join(h.file.Sync(), h.file.Close())
}
