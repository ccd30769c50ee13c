package target

import (
	"encoding/binary"
	"errors"

	"lunshift/iscsi"
	"lunshift/lun"
)

// Limits of EXTENDED COPY, as RECEIVE COPY OPERATING PARAMETERS reports them.
const (
	maxCSCDs    = 8  // CSCD descriptors of one command
	maxSegments = 32 // segment descriptors of one command
	// maxCopyList is the longest list of descriptors, in bytes.
	maxCopyList = maxCSCDs*cscdLength + maxSegments*segmentLength
	// maxSegmentBytes is the most that one segment copies.
	maxSegmentBytes = 256 << 20
	// maxCopies is how many EXTENDED COPY commands of a session run at a time. Each has
	// one buffer of copyChunk bytes.
	maxCopies = 4
	copyChunk = 1 << 20

	copyHeader    = 16
	cscdLength    = 32
	segmentLength = 28

	cscdIdentification  = 0xe4 // SPC-4 6.4.5.4
	segmentBlockToBlock = 0x02 // SPC-4 6.4.6.2
)

var (
	senseTooManyCSCDs     = sense{keyIllegalRequest, 0x26, 0x06}
	senseCSCDType         = sense{keyIllegalRequest, 0x26, 0x07}
	senseTooManySegments  = sense{keyIllegalRequest, 0x26, 0x08}
	senseSegmentType      = sense{keyIllegalRequest, 0x26, 0x09}
	senseCopyInProgress   = sense{keyIllegalRequest, 0x00, 0x16} // OPERATION IN PROGRESS
	copyNoReason          = [2]byte{0x00, 0x00}
	copyUnreachable       = [2]byte{0x08, 0x04} // UNREACHABLE COPY TARGET
	copyDeviceFailure     = [2]byte{0x0d, 0x01} // THIRD PARTY DEVICE FAILURE
	copyNotReachable      = [2]byte{0x0d, 0x02} // COPY TARGET DEVICE NOT REACHABLE
	copyUnexpectedInexact = [2]byte{0x26, 0x0a} // UNEXPECTED INEXACT SEGMENT
)

// copyAborted is COPY ABORTED at a segment (SPC-4 6.4.4.3). What a copy source or a copy
// destination answered is in it.
type copyAborted struct {
	why     [2]byte // additional sense code and qualifier
	segment int
	field   int // byte of the segment descriptor that is at fault; -1 none
	// source and destination are status byte and sense data; empty where there is no error.
	source, destination []byte
}

func (e *copyAborted) Error() string {
	return sense{keyCopyAborted, e.why[0], e.why[1]}.Error()
}

func (e *copyAborted) detail() (sense, []byte) {
	s := sense{keyCopyAborted, e.why[0], e.why[1]}
	data := s.fixed()
	for i, of := range [][]byte{e.source, e.destination} {
		if len(of) > 0 {
			data[8+i] = byte(len(data))
			data = append(data, of...)
		}
	}
	binary.BigEndian.PutUint16(data[10:], uint16(e.segment))
	if e.field >= 0 {
		data[15] = 0xa0 // SKSV, SD: the field is one of the segment descriptor
		binary.BigEndian.PutUint16(data[16:], uint16(e.field))
	}
	data[7] = byte(len(data) - 8)
	return s, data
}

func decodeExtendedCopy(t *task) error {
	n := binary.BigEndian.Uint32(t.cdb[10:])
	switch {
	case n > copyHeader+maxCopyList, n > 0 && n < copyHeader:
		return senseParamLength
	}
	t.want = int(n)
	return nil
}

// copyPlan is the parameter list of an EXTENDED COPY.
type copyPlan struct {
	id       byte
	usage    byte    // LIST ID USAGE
	cscds    []*unit // nil where the session sees no such unit
	segments []copySegment
}

// copySegment copies blocks to blocks.
type copySegment struct {
	from, to       int // CSCD descriptors
	byDestination  bool
	blocks         uint64 // of the source, or byDestination of the destination
	source, target lun.LBA
}

const (
	usageDiscard = 2
	usageNoID    = 3
)

// extendedCopy is EXTENDED COPY (LID1): the segments are copied in their order, among the
// logical units that the session sees.
func extendedCopy(t *task) error {
	if t.want == 0 {
		return nil
	}
	p, err := parseCopy(t)
	if err != nil {
		return err
	}
	// From here on who resets or fences one of the units finds the copy, and waits for its
	// end. No conflict is looked for before, so that none is overlooked.
	t.c.mu.Lock()
	t.reaches = p.cscds
	t.c.mu.Unlock()
	rec, err := t.c.copies.begin(t.lunField, p)
	if err != nil {
		return err
	}
	err = copySegments(t, p, rec)
	t.c.copies.end(rec, failureOf(t, err))
	return err
}

// failureOf is status and sense of a copy that failed; nil of one that did not.
func failureOf(t *task, err error) []byte {
	if err == nil {
		return nil
	}
	code, data := statusOf(t, err)
	return append([]byte{code}, data...)
}

func parseCopy(t *task) (*copyPlan, error) {
	list := t.out
	bad := func(at, bit int) error { return badField{at: at, bit: bit, list: true} }
	cscds, segments := int(binary.BigEndian.Uint16(list[2:])), binary.BigEndian.Uint32(list[8:])
	if uint64(cscds)+uint64(segments) > uint64(len(list)-copyHeader) {
		return nil, senseParamLength
	}
	if binary.BigEndian.Uint32(list[12:]) != 0 {
		return nil, bad(12, -1) // MAXIMUM INLINE DATA LENGTH is 0
	}
	if cscds%cscdLength != 0 {
		return nil, bad(2, -1)
	}
	p := &copyPlan{id: list[0], usage: list[1] >> 3 & 3}
	switch {
	case p.usage == 1:
		return nil, bad(1, 4)
	case p.usage == usageNoID && p.id != 0:
		return nil, bad(0, -1)
	case cscds/cscdLength > maxCSCDs:
		return nil, senseTooManyCSCDs
	case int(segments)/segmentLength > maxSegments:
		return nil, senseTooManySegments
	}
	for at := copyHeader; at < copyHeader+cscds; at += cscdLength {
		d := list[at : at+cscdLength]
		if d[0] != cscdIdentification {
			return nil, senseCSCDType
		}
		if d[1]&0x1f != 0 {
			return nil, bad(at+1, 4) // not a direct access block device
		}
		if d[5]>>4&3 != 0 {
			return nil, bad(at+5, 5) // a designator of something else than a logical unit
		}
		if d[7] > 20 {
			return nil, bad(at+7, -1)
		}
		u := t.c.designated(d[4]&0x0f, d[5]&0x0f, d[8:8+d[7]])
		if u != nil && uint32(d[29])<<16|uint32(d[30])<<8|uint32(d[31]) != u.info.BlockSize {
			return nil, bad(at+29, -1)
		}
		p.cscds = append(p.cscds, u)
	}
	for at, end := copyHeader+cscds, copyHeader+cscds+int(segments); at < end; at += segmentLength {
		d := list[at:end]
		if d[0] != segmentBlockToBlock {
			return nil, senseSegmentType
		}
		if len(d) < segmentLength {
			return nil, senseParamLength
		}
		if binary.BigEndian.Uint16(d[2:]) != segmentLength-4 {
			return nil, bad(at+2, -1)
		}
		p.segments = append(p.segments, copySegment{
			from: int(binary.BigEndian.Uint16(d[4:])), to: int(binary.BigEndian.Uint16(d[6:])),
			byDestination: d[1]&0x02 != 0, blocks: uint64(binary.BigEndian.Uint16(d[10:])),
			source: lun.LBA(binary.BigEndian.Uint64(d[12:])), target: lun.LBA(binary.BigEndian.Uint64(d[20:])),
		})
	}
	return p, nil
}

// designated is the unit that the session sees under a designator of VPD page 83h; nil
// where there is none.
func (c *conn) designated(set, kind byte, value []byte) *unit {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, u := range c.units() {
		for d := identification(u, c.group); len(d) > 0; d = d[4+int(d[3]):] {
			if d[1]>>4&3 == 0 && d[0]&0x0f == set && d[1]&0x0f == kind && string(d[4:4+int(d[3])]) == string(value) {
				return u
			}
		}
	}
	return nil
}

// copySegments copies segment by segment and tells rec how far it is.
func copySegments(t *task, p *copyPlan, rec *copyRecord) error {
	buf := newBuffer(copyChunk)
	defer buf.Release()
	for i, s := range p.segments {
		fail := func(why [2]byte, field int) error {
			return &copyAborted{why: why, segment: i, field: field}
		}
		if s.from >= len(p.cscds) {
			return fail(copyUnreachable, 4)
		}
		if s.to >= len(p.cscds) {
			return fail(copyUnreachable, 6)
		}
		from, to := p.cscds[s.from], p.cscds[s.to]
		if from == nil {
			return fail(copyNotReachable, 4)
		}
		if to == nil {
			return fail(copyNotReachable, 6)
		}
		if err := copyConflict(t, i, from, to); err != nil {
			return err
		}
		n := s.blocks << from.shift
		if s.byDestination {
			n = s.blocks << to.shift
		}
		if n>>from.shift<<from.shift != n || n>>to.shift<<to.shift != n {
			return fail(copyUnexpectedInexact, 10)
		}
		if n > maxSegmentBytes {
			return fail(copyNoReason, 10)
		}
		if err := copySegmentData(t, i, s, from, to, n, buf.b, rec); err != nil {
			return err
		}
		rec.segments.Add(1)
	}
	return nil
}

// copyConflict fails where another's reservation keeps the session from reading the
// source or writing the destination.
func copyConflict(t *task, i int, from, to *unit) error {
	e := &copyAborted{why: copyDeviceFailure, segment: i, field: -1}
	switch {
	case from.conflicts(t.c, accessRead):
		e.source = []byte{iscsi.StatusReservationConflict}
	case to.conflicts(t.c, accessWrite):
		e.destination = []byte{iscsi.StatusReservationConflict}
	default:
		return nil
	}
	return e
}

// copySegmentData copies n bytes. Where they overlap what is written last is what was
// there first.
func copySegmentData(t *task, i int, s copySegment, from, to *unit, n uint64, buf []byte, rec *copyRecord) error {
	aborted := func(err error, destination bool) error {
		if t.Err() != nil {
			return t.Err()
		}
		e := &copyAborted{why: copyDeviceFailure, segment: i, field: -1}
		if errors.Is(err, lun.ErrUnavailable) {
			e.why = copyNotReachable
		}
		of := &e.source
		if destination {
			of = &e.destination
		}
		*of = failureOf(t, err)
		return e
	}
	for _, end := range []struct {
		u     *unit
		at    lun.LBA
		field int
	}{{from, s.source, 12}, {to, s.target, 20}} {
		if end.u.info.Check(lun.Extent{Start: end.at, Blocks: n >> end.u.shift}) != nil {
			e := &copyAborted{why: copyNoReason, segment: i, field: end.field}
			if end.u == from && end.field == 12 {
				e.source = failureOf(t, senseLBARange)
			} else {
				e.destination = failureOf(t, senseLBARange)
			}
			return e
		}
	}
	backwards := from == to && s.target > s.source && uint64(s.target-s.source) < n>>from.shift
	for done := uint64(0); done < n; {
		if err := t.Err(); err != nil {
			return err
		}
		if err := copyConflict(t, i, from, to); err != nil {
			return err
		}
		part := buf[:min(n-done, uint64(len(buf)))]
		at := done
		if backwards {
			at = n - done - uint64(len(part))
		}
		if err := t.inUnit(from, func() error {
			return from.Device.ReadAt(t, part, s.source+lun.LBA(at>>from.shift))
		}); err != nil {
			return aborted(err, false)
		}
		if err := t.inUnit(to, func() error { return putBlocks(t, to, part, s.target+lun.LBA(at>>to.shift)) }); err != nil {
			return aborted(err, true)
		}
		done += uint64(len(part))
		rec.bytes.Add(uint64(len(part)))
	}
	return nil
}

// putBlocks writes what was copied; zeroes without data transfer, so that a thin copy
// stays thin.
func putBlocks(t *task, u *unit, data []byte, at lun.LBA) error {
	if u.info.Thin && u.info.UnmapZeroes && allZero(data) {
		return u.Device.WriteZeroes(t, lun.Extent{Start: at, Blocks: uint64(len(data)) >> u.shift})
	}
	return u.Device.WriteAt(t, data, at)
}
