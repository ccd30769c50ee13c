package lun

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// Operation codes (SPC-4 6.1, SBC-3 5.1).
const (
	opTestUnitReady  = 0x00
	opRequestSense   = 0x03
	opInquiry        = 0x12
	opModeSense6     = 0x1a
	opReadCapacity10 = 0x25
	opRead10         = 0x28
	opWrite10        = 0x2a
	opSyncCache10    = 0x35
	opUnmap          = 0x42
	opRead16         = 0x88
	opWrite16        = 0x8a
	opSyncCache16    = 0x91
	opWriteSame16    = 0x93
	opServiceIn16    = 0x9e // READ CAPACITY (16) and GET LBA STATUS
	opReportLUNs     = 0xa0

	serviceReadCapacity16 = 0x10
	serviceGetLBAStatus   = 0x12
)

// Status codes (SAM-5 5.3.1).
const (
	statusGood                = 0x00
	statusCheckCondition      = 0x02
	statusConditionMet        = 0x04
	statusBusy                = 0x08
	statusReservationConflict = 0x18
	statusTaskSetFull         = 0x28
	statusACAActive           = 0x30
	statusTaskAborted         = 0x40
)

// rwCDB is READ or WRITE of n blocks, in the 16 byte form where wide, otherwise in
// the 10 byte form.
func rwCDB(cdb *[16]byte, write, wide bool, start LBA, n uint32) int {
	*cdb = [16]byte{}
	if wide {
		cdb[0] = opRead16
		if write {
			cdb[0] = opWrite16
		}
		binary.BigEndian.PutUint64(cdb[2:], uint64(start))
		binary.BigEndian.PutUint32(cdb[10:], n)
		return 16
	}
	cdb[0] = opRead10
	if write {
		cdb[0] = opWrite10
	}
	binary.BigEndian.PutUint32(cdb[2:], uint32(start))
	binary.BigEndian.PutUint16(cdb[7:], uint16(n))
	return 10
}

// writeSameZeroes is WRITE SAME (16) of n blocks (SBC-3 5.51). With ndob there is
// no data and the blocks become zeroes.
func writeSameZeroes(cdb *[16]byte, start LBA, n uint32, unmap, ndob bool) {
	*cdb = [16]byte{0: opWriteSame16}
	if unmap {
		cdb[1] |= 0x08
	}
	if ndob {
		cdb[1] |= 0x01
	}
	binary.BigEndian.PutUint64(cdb[2:], uint64(start))
	binary.BigEndian.PutUint32(cdb[10:], n)
}

// unmapCDB is UNMAP with a parameter list of n bytes (SBC-3 5.28).
func unmapCDB(cdb *[16]byte, n int) {
	*cdb = [16]byte{0: opUnmap}
	binary.BigEndian.PutUint16(cdb[7:], uint16(n))
}

// unmapList is the UNMAP parameter list of one or more extents, each at most
// 2^32-1 blocks.
func unmapList(extents ...Extent) []byte {
	p := make([]byte, 8+16*len(extents))
	binary.BigEndian.PutUint16(p[0:], uint16(len(p)-2))
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)-8))
	for i, e := range extents {
		d := p[8+16*i:]
		binary.BigEndian.PutUint64(d, uint64(e.Start))
		binary.BigEndian.PutUint32(d[8:], uint32(e.Blocks))
	}
	return p
}

// getLBAStatusCDB is GET LBA STATUS with room for n bytes (SBC-3 5.6).
func getLBAStatusCDB(cdb *[16]byte, start LBA, n int) {
	*cdb = [16]byte{0: opServiceIn16, 1: serviceGetLBAStatus}
	binary.BigEndian.PutUint64(cdb[2:], uint64(start))
	binary.BigEndian.PutUint32(cdb[10:], uint32(n))
}

func readCapacity16CDB(cdb *[16]byte, n int) {
	*cdb = [16]byte{0: opServiceIn16, 1: serviceReadCapacity16}
	binary.BigEndian.PutUint32(cdb[10:], uint32(n))
}

// inquiryCDB asks for VPD page when vpd, otherwise for the standard data.
func inquiryCDB(cdb *[16]byte, vpd bool, page byte, n int) {
	*cdb = [16]byte{0: opInquiry, 2: page}
	if vpd {
		cdb[1] = 1
	}
	binary.BigEndian.PutUint16(cdb[3:], uint16(n))
}

// parseLBAStatus reads the answer of GET LBA STATUS for a command that began at
// at, and gives the runs that lie in e, in order. A device may describe blocks
// before the first asked for and after the last; a run that does not join the
// one before ends the answer.
func parseLBAStatus(p []byte, e Extent) ([]Allocation, error) {
	if len(p) < 8 {
		return nil, fmt.Errorf("GET LBA STATUS answered %d bytes", len(p))
	}
	// PARAMETER DATA LENGTH counts what follows it (SBC-3 5.6.2).
	n := min(uint64(binary.BigEndian.Uint32(p))+4, uint64(len(p)))
	var out []Allocation
	at := e.Start
	for d := p[8:max(n, 8)]; len(d) >= 16 && at < e.End(); d = d[16:] {
		start, blocks := LBA(binary.BigEndian.Uint64(d)), uint64(binary.BigEndian.Uint32(d[8:]))
		status := d[12] & 0xf
		if blocks == 0 || start > at || uint64(start)+blocks <= uint64(at) || start > start+LBA(blocks) {
			break
		}
		end := min(start+LBA(blocks), e.End())
		// 0 is mapped or unknown; 1 deallocated; 2 anchored, without data but with
		// storage set aside, reads like deallocated; others count as allocated.
		out = appendRun(out, Allocation{Extent: Extent{at, uint64(end - at)}, Allocated: status != 1 && status != 2})
		at = end
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("GET LBA STATUS described no block at LBA %d", e.Start)
	}
	return out, nil
}

// capacity is the answer of READ CAPACITY (16) (SBC-3 5.16.2).
type capacity struct {
	blocks      uint64
	blockSize   uint32
	exponent    uint8
	provisioned bool // LBPME: thin or resource provisioned
	readsZeroes bool // LBPRZ
}

func parseCapacity16(p []byte) (capacity, error) {
	if len(p) < 12 {
		return capacity{}, fmt.Errorf("READ CAPACITY (16) answered %d bytes", len(p))
	}
	c := capacity{blocks: binary.BigEndian.Uint64(p) + 1, blockSize: binary.BigEndian.Uint32(p[8:])}
	if len(p) >= 16 {
		c.exponent = p[13] & 0xf
		c.provisioned = p[14]&0x80 != 0
		c.readsZeroes = p[14]&0x40 != 0
	}
	return c, c.check()
}

func parseCapacity10(p []byte) (capacity, error) {
	if len(p) < 8 {
		return capacity{}, fmt.Errorf("READ CAPACITY (10) answered %d bytes", len(p))
	}
	c := capacity{blocks: uint64(binary.BigEndian.Uint32(p)) + 1, blockSize: binary.BigEndian.Uint32(p[4:])}
	return c, c.check()
}

// check keeps byte offsets within 63 bits.
func (c capacity) check() error {
	if c.blockSize < 256 || c.blockSize > 65536 || c.blockSize&(c.blockSize-1) != 0 {
		return fmt.Errorf("block size of %d bytes is not a power of two from 256 to 65536", c.blockSize)
	}
	if c.blocks == 0 || c.blocks > 1<<62/uint64(c.blockSize) {
		return fmt.Errorf("capacity of %d blocks is out of range", c.blocks)
	}
	return nil
}

// inquiry is the standard INQUIRY data (SPC-4 6.6.2).
type inquiry struct {
	qualifier, deviceType     byte
	vendor, product, revision string
}

func parseInquiry(p []byte) (inquiry, error) {
	if len(p) < 5 {
		return inquiry{}, fmt.Errorf("INQUIRY answered %d bytes", len(p))
	}
	i := inquiry{qualifier: p[0] >> 5, deviceType: p[0] & 0x1f}
	if len(p) >= 36 {
		i.vendor, i.product, i.revision = ascii(p[8:16]), ascii(p[16:32]), ascii(p[32:36])
	}
	return i, nil
}

// vpdBody is the page without its header, nil unless p holds that page.
func vpdBody(p []byte, page byte) []byte {
	if len(p) < 4 || p[1] != page {
		return nil
	}
	return p[4:min(4+int(binary.BigEndian.Uint16(p[2:])), len(p))]
}

// hasVPD tells whether the answer of VPD page 00h names page.
func hasVPD(supported []byte, page byte) bool {
	return bytes.IndexByte(vpdBody(supported, 0x00), page) >= 0
}

func parseSerial(p []byte) string { return ascii(vpdBody(p, 0x80)) }

// parseDesignator gives the name of the logical unit from VPD page 83h (SPC-4
// 7.8.6): of the designators with association "logical unit" the strongest, NAA
// before EUI-64 before T10 vendor ID before SCSI name. Empty when there is none.
func parseDesignator(p []byte) string {
	best, rank := "", 0
	for d := vpdBody(p, 0x83); len(d) >= 4; {
		n := int(d[3])
		if 4+n > len(d) {
			break
		}
		codeSet, association, kind, id := d[0]&0xf, d[1]>>4&3, d[1]&0xf, d[4:4+n]
		d = d[4+n:]
		if association != 0 || n == 0 {
			continue
		}
		name, r := "", 0
		switch {
		case kind == 3 && codeSet == 1 && (n == 8 || n == 16) && !allZero(id):
			// The longer forms 6h hold more of the device's own number.
			name, r = "naa."+hex.EncodeToString(id), 40+n
		case kind == 2 && codeSet == 1 && (n == 8 || n == 12 || n == 16) && !allZero(id):
			name, r = "eui."+hex.EncodeToString(id), 30
		case kind == 1 && n > 8:
			name, r = "t10."+text(id), 20
		case kind == 8:
			name, r = "name."+text(id), 10
		}
		if r > rank {
			best, rank = name, r
		}
	}
	return best
}

// blockLimits is VPD page B0h (SBC-3 6.5.3), in blocks; 0 is not reported.
type blockLimits struct {
	maxTransfer      uint32
	maxUnmapBlocks   uint32
	maxUnmapRuns     uint32
	unmapGranularity uint32
	maxWriteSame     uint64
	maxCompare       uint8 // COMPARE AND WRITE; 0 where the unit does not have it
	present          bool
}

func parseBlockLimits(p []byte) blockLimits {
	b := vpdBody(p, 0xb0)
	l := blockLimits{}
	if len(b) >= 8 {
		l.maxTransfer, l.maxCompare, l.present = binary.BigEndian.Uint32(b[4:]), b[1], true
	}
	if len(b) >= 40 {
		l.maxUnmapBlocks = binary.BigEndian.Uint32(b[16:])
		l.maxUnmapRuns = binary.BigEndian.Uint32(b[20:])
		l.unmapGranularity = binary.BigEndian.Uint32(b[24:])
		l.maxWriteSame = binary.BigEndian.Uint64(b[32:])
	}
	return l
}

// provisioning is VPD page B2h (SBC-3 6.5.4).
type provisioning struct {
	unmap, writeSame, readsZeroes bool
	thin                          bool
	present                       bool
}

func parseProvisioning(p []byte) provisioning {
	b := vpdBody(p, 0xb2)
	if len(b) < 4 {
		return provisioning{}
	}
	return provisioning{
		unmap:     b[1]&0x80 != 0, // LBPU
		writeSame: b[1]&0x40 != 0, // LBPWS
		// LBPRZ is one bit in SBC-3 and three in SBC-4, where xx1b means zeroes.
		readsZeroes: b[1]&0x04 != 0,
		thin:        b[2]&7 == 2,
		present:     true,
	}
}

// parseWriteCache finds WCE in the answer of MODE SENSE (6) for the caching
// page (SBC-3 6.4.5); false, false when the page is not there.
func parseWriteCache(p []byte) (wce, ok bool) {
	if len(p) < 4 {
		return false, false
	}
	p = p[:min(len(p), int(p[0])+1)]
	if len(p) < 4 || 4+int(p[3]) > len(p) {
		return false, false
	}
	for m := p[4+int(p[3]):]; len(m) >= 3; {
		if m[0]&0x40 != 0 { // subpage format
			return false, false
		}
		if m[0]&0x3f == 0x08 {
			return m[2]&0x04 != 0, true
		}
		n := 2 + int(m[1])
		if n > len(m) {
			break
		}
		m = m[n:]
	}
	return false, false
}

// parseSense reads fixed and descriptor format sense data (SPC-4 4.5). Data too
// short to hold a key becomes a HARDWARE ERROR rather than none.
func parseSense(p []byte) *SenseError {
	s := &SenseError{Key: 0x4, ASC: 0x44} // INTERNAL TARGET FAILURE
	if len(p) < 3 {
		return s
	}
	s.Deferred = p[0]&0x7f == 0x71 || p[0]&0x7f == 0x73
	switch p[0] & 0x7f {
	case 0x70, 0x71:
		s.Key, s.ASC, s.ASCQ = p[2]&0xf, 0, 0
		if len(p) >= 14 {
			s.ASC, s.ASCQ = p[12], p[13]
		}
		if p[0]&0x80 != 0 && len(p) >= 7 {
			s.LBA, s.Valid = LBA(binary.BigEndian.Uint32(p[3:])), true
		}
	case 0x72, 0x73:
		s.Key, s.ASC, s.ASCQ = p[1]&0xf, p[2], 0
		if len(p) >= 4 {
			s.ASCQ = p[3]
		}
		if len(p) < 8 {
			return s
		}
		for d := p[8:min(len(p), 8+int(p[7]))]; len(d) >= 2; {
			n := 2 + int(d[1])
			if n > len(d) {
				break
			}
			if d[0] == 0 && n >= 12 && d[2]&0x80 != 0 {
				s.LBA, s.Valid = LBA(binary.BigEndian.Uint64(d[4:])), true
			}
			d = d[n:]
		}
	}
	return s
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// ascii is p without padding and without what would spoil a log line.
func ascii(p []byte) string { return strings.TrimSpace(text(p)) }

func text(p []byte) string {
	s := bytes.Map(func(r rune) rune {
		switch {
		case r == 0:
			return -1
		case r < ' ' || r >= 0x7f:
			return '.'
		}
		return r
	}, p)
	return strings.TrimRight(string(s), " ")
}
