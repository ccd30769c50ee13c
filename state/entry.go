package state

import (
	"encoding/binary"
	"fmt"

	"github.com/cespare/xxhash/v2"
)

// Sum is what the blocks of a run hold, or are going to: a hash of their content. Contents
// that differ have equal sums with a chance of 2⁻⁶⁴.
type Sum struct {
	Run
	Hash uint64
}

// SumOf is the sum of a run whose blocks hold p.
func SumOf(r Run, p []byte) Sum { return Sum{r, xxhash.Sum64(p)} }

// entryKind is the first byte of a journal entry.
type entryKind byte

const (
	// noteEntry: the blocks of the runs have the kinds, or in a backward turn have them not.
	noteEntry entryKind = 1 + iota
	// intentEntry: the blocks of each sum are valid and dirty if the destination holds
	// that content; in a backward turn neither, if the source holds it.
	intentEntry
	// withdrawEntry: the intent of that number counts no more.
	withdrawEntry
)

// entry is one of the journal.
//
// Stored: kind byte | length of the rest uint32 | number uint64 | turn uint64 |
// kinds byte | for each sum start uint64, blocks uint64, and of an intent its hash uint64;
// all little endian.
type entry struct {
	kind   entryKind
	number uint64 // of the intent
	turn   uint64 // turnID of the flags
	kinds  Kinds
	sums   []Sum

	// What follows is the journal's.
	segment int    // that it is in
	kept    bool   // an intent whose write is done
	ends    *entry // of a withdrawal: the intent
}

// underWay tells whether e is an intent of a write that has not ended.
func (e *entry) underWay() bool { return e.kind == intentEntry && !e.kept }

const (
	entryHead  = 5
	entryFixed = 17
	// MostSums bounds the runs of one note or intent.
	MostSums = (mostEntry - entryHead - entryFixed) / 24
)

// size is the length of the entry as it is stored, in bytes.
func (e *entry) size() int {
	if e.kind == intentEntry {
		return entryHead + entryFixed + 24*len(e.sums)
	}
	return entryHead + entryFixed + 16*len(e.sums)
}

func (e *entry) encode() []byte {
	b := make([]byte, entryHead, e.size())
	b[0] = byte(e.kind)
	b = binary.LittleEndian.AppendUint64(b, e.number)
	b = binary.LittleEndian.AppendUint64(b, e.turn)
	b = append(b, byte(e.kinds))
	for _, s := range e.sums {
		b = binary.LittleEndian.AppendUint64(b, s.Start)
		b = binary.LittleEndian.AppendUint64(b, s.Blocks)
		if e.kind == intentEntry {
			b = binary.LittleEndian.AppendUint64(b, s.Hash)
		}
	}
	binary.LittleEndian.PutUint32(b[1:], uint32(len(b)-entryHead))
	return b
}

// splitEntries cuts a frame's content into entries.
func splitEntries(b []byte) (entries [][]byte, err error) {
	for len(b) > 0 {
		if len(b) < entryHead {
			return nil, errCutOff
		}
		n := uint64(entryHead) + uint64(binary.LittleEndian.Uint32(b[1:]))
		if n > uint64(len(b)) {
			return nil, errCutOff
		}
		entries = append(entries, b[:n])
		b = b[n:]
	}
	return entries, nil
}

func decodeEntry(b []byte) (e entry, err error) {
	if len(b) < entryHead+entryFixed {
		return e, errCutOff
	}
	e.kind = entryKind(b[0])
	e.number = binary.LittleEndian.Uint64(b[entryHead:])
	e.turn = binary.LittleEndian.Uint64(b[entryHead+8:])
	e.kinds = Kinds(b[entryHead+16])
	b = b[entryHead+entryFixed:]
	size := 16
	switch {
	case e.kind < noteEntry || e.kind > withdrawEntry:
		return e, fmt.Errorf("unknown kind of entry %d", e.kind)
	case e.kind == intentEntry:
		size = 24
	}
	if len(b)%size != 0 || e.kinds >= 1<<kindCount {
		return e, fmt.Errorf("an entry of kind %d with %d bytes of runs", e.kind, len(b))
	}
	for ; len(b) > 0; b = b[size:] {
		s := Sum{Run: Run{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}}
		if size == 24 {
			s.Hash = binary.LittleEndian.Uint64(b[16:])
		}
		e.sums = append(e.sums, s)
	}
	return e, nil
}

// runs are those of the sums.
func (e *entry) runs() []Run {
	runs := make([]Run, len(e.sums))
	for i, s := range e.sums {
		runs[i] = s.Run
	}
	return runs
}
