package target

import (
	"encoding/binary"
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// maxCopyRecords bounds what a session keeps of the copies that ended.
const maxCopyRecords = 32

// copyRecord is what RECEIVE COPY RESULTS knows of one EXTENDED COPY.
type copyRecord struct {
	unit     uint64 // LUN field it came to
	id       byte
	segments atomic.Uint32 // done
	bytes    atomic.Uint64 // copied

	// Under copyRecords.mu.
	ended   bool
	failure []byte // status and sense data of one that failed
}

// copyRecords are the copies of one session. List identifiers are those of an I_T nexus
// and logical unit (SPC-4 6.4.3).
type copyRecords struct {
	mu      sync.Mutex // protects what follows; no other lock is taken under it
	running int
	kept    []*copyRecord // with a list identifier, oldest first
}

// begin enters a copy. It fails where the list identifier is in use, or as many copies
// run as may.
func (r *copyRecords) begin(unit uint64, p *copyPlan) (*copyRecord, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := &copyRecord{unit: unit, id: p.id}
	if p.usage != usageNoID {
		if old := r.find(unit, p.id); old != nil && !old.ended {
			return nil, senseCopyInProgress
		}
	}
	if r.running == maxCopies {
		return nil, busy
	}
	r.running++
	if p.usage != usageNoID {
		r.kept = slices.DeleteFunc(r.kept, func(o *copyRecord) bool { return o.unit == unit && o.id == p.id })
		r.kept = append(r.kept, rec)
		if len(r.kept) > maxCopyRecords {
			if i := slices.IndexFunc(r.kept, func(o *copyRecord) bool { return o.ended }); i >= 0 {
				r.kept = slices.Delete(r.kept, i, i+1)
			}
		}
	}
	return rec, nil
}

// end tells that the copy is over; failure is empty when all was copied.
func (r *copyRecords) end(rec *copyRecord, failure []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	rec.ended, rec.failure = true, failure
}

// find is under r.mu.
func (r *copyRecords) find(unit uint64, id byte) *copyRecord {
	for _, rec := range r.kept {
		if rec.unit == unit && rec.id == id {
			return rec
		}
	}
	return nil
}

// copyResultsUsage is the usage data of RECEIVE COPY RESULTS.
func copyResultsUsage(service byte) []byte {
	u := usage16(0x84, service, 0, 10, 4)
	if service != 0x03 {
		u[2] = 0xff // LIST IDENTIFIER
	}
	return u
}

func decodeCopyResults(t *task) error {
	t.alloc = allocation32(t.cdb[10:])
	return nil
}

// of calls reply with the record that the CDB names; without one the list identifier is
// not valid.
func (r *copyRecords) of(t *task, reply func(*copyRecord) []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.find(t.lunField, t.cdb[2])
	if rec == nil {
		return badField{at: 2, bit: -1}
	}
	data := reply(rec)
	if data == nil {
		return badField{at: 2, bit: -1}
	}
	return t.reply(data, t.alloc)
}

// copyStatus is COPY STATUS (SPC-4 6.26).
func copyStatus(t *task) error {
	return t.c.copies.of(t, func(rec *copyRecord) []byte {
		b := make([]byte, 12)
		b[3] = 8
		switch {
		case rec.ended && rec.failure != nil:
			b[4] = 2
		case rec.ended:
			b[4] = 1
		}
		binary.BigEndian.PutUint16(b[5:], uint16(rec.segments.Load()))
		n := rec.bytes.Load()
		if n > math.MaxUint32 {
			b[7], n = 1, n>>10 // in KiB
		}
		binary.BigEndian.PutUint32(b[8:], uint32(n))
		return b
	})
}

// copyData is RECEIVE DATA (SPC-4 6.21): no copy holds data. While it runs there is no
// answer.
func copyData(t *task) error {
	return t.c.copies.of(t, func(rec *copyRecord) []byte {
		if !rec.ended {
			return nil
		}
		return make([]byte, 4)
	})
}

// copyFailure is FAILED SEGMENT DETAILS (SPC-4 6.22).
func copyFailure(t *task) error {
	return t.c.copies.of(t, func(rec *copyRecord) []byte {
		switch {
		case !rec.ended:
			return nil
		case rec.failure == nil:
			return make([]byte, 4)
		}
		b := make([]byte, 60)
		b[56] = rec.failure[0]
		binary.BigEndian.PutUint16(b[58:], uint16(len(rec.failure)-1))
		b = append(b, rec.failure[1:]...)
		binary.BigEndian.PutUint32(b, uint32(len(b)-4))
		return b
	})
}

// copyParameters is OPERATING PARAMETERS (SPC-4 6.23).
func copyParameters(t *task) error {
	b := make([]byte, 44)
	b[4] = 1 // SNLID: LIST ID USAGE 11b is taken
	binary.BigEndian.PutUint16(b[8:], maxCSCDs)
	binary.BigEndian.PutUint16(b[10:], maxSegments)
	binary.BigEndian.PutUint32(b[12:], maxCopyList)
	binary.BigEndian.PutUint32(b[16:], maxSegmentBytes)
	binary.BigEndian.PutUint16(b[34:], maxCopies)
	b[36] = maxCopies
	b[37] = byte(t.u.shift) // data segments are of whole blocks
	b = append(b, segmentBlockToBlock, cscdIdentification)
	b[43] = byte(len(b) - 44)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return t.reply(b, t.alloc)
}

// thirdPartyCopy is VPD page 8Fh (SPC-4 7.8.17): commands, limits and descriptors.
func thirdPartyCopy() []byte {
	var b []byte
	add := func(kind uint16, data []byte) {
		for len(data)%4 != 0 {
			data = append(data, 0)
		}
		b = binary.BigEndian.AppendUint16(b, kind)
		b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
		b = append(b, data...)
	}
	add(0x0001, []byte{9, 0x83, 1, 0x00, 0x84, 4, 0x00, 0x01, 0x03, 0x04}) // Supported Commands
	limits := make([]byte, 28)                                             // Parameter Data
	binary.BigEndian.PutUint16(limits[4:], maxCSCDs)
	binary.BigEndian.PutUint16(limits[6:], maxSegments)
	binary.BigEndian.PutUint32(limits[8:], maxCopyList)
	add(0x0004, limits)
	add(0x0008, []byte{2, segmentBlockToBlock, cscdIdentification}) // Supported Descriptors
	add(0x000c, []byte{0, 0})                                       // Supported CSCD Descriptor IDs: none beside the list's own
	general := make([]byte, 32)                                     // General Copy Operations
	binary.BigEndian.PutUint32(general, maxCopies)
	binary.BigEndian.PutUint32(general[4:], maxCopies)
	binary.BigEndian.PutUint32(general[8:], maxSegmentBytes)
	general[12] = 9 // data segments are of whole blocks, 512 bytes at least
	add(0x8001, general)
	return b
}
