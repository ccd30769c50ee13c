package target

import (
	"fmt"
	"math/bits"

	"lunshift/iscsi"
)

// operation is one SCSI command that the target knows.
type operation struct {
	opcode  byte
	service int // service action in the low five bits of CDB byte 1; -1 where there is none
	name    string
	// usage is the CDB usage data of REPORT SUPPORTED OPERATION CODES (SPC-4
	// 6.34.3): a bit is set where the field is evaluated. Bits that are not set
	// must be zero in a CDB, or it is refused. Its length is that of the CDB.
	usage []byte
	// decode checks the CDB and says how much data moves, before any does.
	decode func(*task) error
	handle func(*task) error

	anyLUN      bool // served where there is no logical unit
	noAttention bool // does not report unit attentions
	noDevice    bool // is of the target alone: served for a unit that is retired as well
	quick       bool // never waits: runs on the reader
	unordered   bool // waits for no other command, whatever the task attributes
	bulk        bool // data-in is charged to BytesInFlight
	scratch     int  // bytes of memory besides the data that moves; charged as well
	partial     bool // less data-out than the CDB says is done as far as it goes
	exact       bool // data-out is as long as the CDB says, or the command is refused
	thin        bool // only for a unit that is thin

	access access // how it fares under a reservation; see reservation_access.go
}

// Opcodes that the hot path names.
const (
	opRead10 = 0x28
	opRead16 = 0x88
)

// rwFlags are the bits of byte 1 of READ and WRITE that are taken: DPO and FUA
// (SBC-3 5.7). Protection fields are refused, as is what is reserved.
const rwFlags = 0x18

// operations is the whole command set. What is absent answers ILLEGAL REQUEST,
// INVALID COMMAND OPERATION CODE.
//
// Ops marked core are gotgt's, found through the logical unit's DeviceProtocol.
// The others replace gotgt's, which lose data or misreport (WRITE SAME answers
// GOOD and writes nothing; a back-end error becomes BUSY; VERIFY without BYTCHK
// verifies nothing; SYNCHRONIZE CACHE, UNMAP and GET LBA STATUS are hollow;
// reservations are forgotten), read a CDB wrongly (REQUEST SENSE, START STOP
// UNIT), or keep global state on the hot path.
var operations []operation

// index finds operations by opcode; those with service actions are chained.
var index [256][]*operation

// Both tables are constant from here on. They are filled here because REPORT
// SUPPORTED OPERATION CODES, one of them, reads them.
func init() {
	operations = commandSet()
	plain := len(operations)
	operations = append(operations, reservationCommands()...)
	for i := range operations {
		o := &operations[i]
		if len(o.usage) < 6 || o.handle == nil {
			panic(fmt.Sprintf("operation %s is incomplete", o.name))
		}
		o.access = accessOf(o)
		o.unordered = i >= plain
		index[o.opcode] = append(index[o.opcode], o)
	}
}

func commandSet() []operation {
	return []operation{
		{opcode: 0x00, service: -1, name: "TEST UNIT READY", usage: []byte{0x00, 0, 0, 0, 0, 0}, handle: core, quick: true},                                                                          // SPC-4 6.47
		{opcode: 0x03, service: -1, name: "REQUEST SENSE", usage: []byte{0x03, 0x01, 0, 0, 0xff, 0}, handle: requestSense, anyLUN: true, noAttention: true, quick: true},                             // SPC-4 6.39
		{opcode: 0x12, service: -1, name: "INQUIRY", usage: []byte{0x12, 0x01, 0xff, 0xff, 0xff, 0}, handle: inquiry, anyLUN: true, noAttention: true, quick: true},                                  // SPC-4 6.6
		{opcode: 0x1a, service: -1, name: "MODE SENSE (6)", usage: []byte{0x1a, 0x08, 0xff, 0xff, 0xff, 0}, handle: modeSense, quick: true},                                                          // SPC-4 6.13
		{opcode: 0x5a, service: -1, name: "MODE SENSE (10)", usage: []byte{0x5a, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0}, handle: modeSense, quick: true},                                          // SPC-4 6.14
		{opcode: 0xa0, service: -1, name: "REPORT LUNS", usage: []byte{0xa0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, handle: reportLUNs, anyLUN: true, noAttention: true, quick: true},      // SPC-4 6.33
		{opcode: 0xa3, service: 0x0a, name: "REPORT TARGET PORT GROUPS", usage: []byte{0xa3, 0xea, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, handle: reportPortGroups, quick: true, noDevice: true}, // SPC-4 6.37
		{opcode: 0xa3, service: 0x0c, name: "REPORT SUPPORTED OPERATION CODES", usage: []byte{0xa3, 0x0c, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, handle: reportOpcodes, quick: true}, // SPC-4 6.35
		{opcode: 0xa3, service: 0x0d, name: "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", usage: []byte{0xa3, 0x0d, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, handle: reportTMFs, quick: true},   // SPC-4 6.36

		{opcode: 0x25, service: -1, name: "READ CAPACITY (10)", usage: []byte{0x25, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0x01, 0}, decode: decodeReadCapacity10, handle: core, quick: true}, // SBC-3 5.15
		{opcode: 0x9e, service: 0x10, name: "READ CAPACITY (16)", usage: usage16(0x9e, 0x10, 0, 10, 4), handle: readCapacity16, quick: true},                                            // SBC-3 5.16
		{opcode: 0x9e, service: 0x12, name: "GET LBA STATUS", usage: usage16(0x9e, 0x12, 2, 10, 4), decode: decodeLBAStatus, handle: getLBAStatus},                                      // SBC-3 5.6

		{opcode: 0x08, service: -1, name: "READ (6)", usage: []byte{0x08, 0x1f, 0xff, 0xff, 0xff, 0}, decode: decodeRead, handle: read, bulk: true},                                       // SBC-3 5.10
		{opcode: 0x28, service: -1, name: "READ (10)", usage: usage10(0x28, rwFlags), decode: decodeRead, handle: read, bulk: true},                                                       // SBC-3 5.11
		{opcode: 0xa8, service: -1, name: "READ (12)", usage: usage12(0xa8, rwFlags), decode: decodeRead, handle: read, bulk: true},                                                       // SBC-3 5.12
		{opcode: 0x88, service: -1, name: "READ (16)", usage: usage16(0x88, rwFlags, 2, 10, 4), decode: decodeRead, handle: read, bulk: true},                                             // SBC-3 5.13
		{opcode: 0x0a, service: -1, name: "WRITE (6)", usage: []byte{0x0a, 0x1f, 0xff, 0xff, 0xff, 0}, decode: decodeWrite, handle: write, partial: true},                                 // SBC-3 5.32
		{opcode: 0x2a, service: -1, name: "WRITE (10)", usage: usage10(0x2a, rwFlags), decode: decodeWrite, handle: write, partial: true},                                                 // SBC-3 5.33
		{opcode: 0xaa, service: -1, name: "WRITE (12)", usage: usage12(0xaa, rwFlags), decode: decodeWrite, handle: write, partial: true},                                                 // SBC-3 5.34
		{opcode: 0x8a, service: -1, name: "WRITE (16)", usage: usage16(0x8a, rwFlags, 2, 10, 4), decode: decodeWrite, handle: write, partial: true},                                       // SBC-3 5.35
		{opcode: 0x2e, service: -1, name: "WRITE AND VERIFY (10)", usage: usage10(0x2e, 0x16), decode: decodeWriteVerify, handle: writeVerify, scratch: chunk, partial: true},             // SBC-3 5.37
		{opcode: 0xae, service: -1, name: "WRITE AND VERIFY (12)", usage: usage12(0xae, 0x16), decode: decodeWriteVerify, handle: writeVerify, scratch: chunk, partial: true},             // SBC-3 5.38
		{opcode: 0x8e, service: -1, name: "WRITE AND VERIFY (16)", usage: usage16(0x8e, 0x16, 2, 10, 4), decode: decodeWriteVerify, handle: writeVerify, scratch: chunk, partial: true},   // SBC-3 5.39
		{opcode: 0x2f, service: -1, name: "VERIFY (10)", usage: usage10(0x2f, 0x16), decode: decodeVerify, handle: verify, scratch: chunk},                                                // SBC-3 5.28
		{opcode: 0xaf, service: -1, name: "VERIFY (12)", usage: usage12(0xaf, 0x16), decode: decodeVerify, handle: verify, scratch: chunk},                                                // SBC-3 5.29
		{opcode: 0x8f, service: -1, name: "VERIFY (16)", usage: usage16(0x8f, 0x16, 2, 10, 4), decode: decodeVerify, handle: verify, scratch: chunk},                                      // SBC-3 5.30
		{opcode: 0x35, service: -1, name: "SYNCHRONIZE CACHE (10)", usage: usage10(0x35, 0x06), decode: decodeSync, handle: synchronizeCache},                                             // SBC-3 5.24
		{opcode: 0x91, service: -1, name: "SYNCHRONIZE CACHE (16)", usage: usage16(0x91, 0x06, 2, 10, 4), decode: decodeSync, handle: synchronizeCache},                                   // SBC-3 5.25
		{opcode: 0x42, service: -1, name: "UNMAP", usage: []byte{0x42, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0}, decode: decodeUnmap, handle: unmap, thin: true},                                  // SBC-3 5.27
		{opcode: 0x41, service: -1, name: "WRITE SAME (10)", usage: usage10(0x41, 0x08), decode: decodeWriteSame, handle: writeSame, scratch: chunk, exact: true},                         // SBC-3 5.43
		{opcode: 0x93, service: -1, name: "WRITE SAME (16)", usage: usage16(0x93, 0x09, 2, 10, 4), decode: decodeWriteSame, handle: writeSame, scratch: chunk, exact: true},               // SBC-3 5.44
		{opcode: 0x8b, service: -1, name: "ORWRITE (16)", usage: usage16(0x8b, rwFlags, 2, 10, 4), decode: decodeWrite, handle: orWrite, scratch: chunk, partial: true},                   // SBC-3 5.7
		{opcode: 0x34, service: -1, name: "PRE-FETCH (10)", usage: prefetchUsage(usage10(0x34, 0x02), 6), decode: decodePrefetch, handle: preFetch, scratch: chunk},                       // SBC-3 5.8
		{opcode: 0x90, service: -1, name: "PRE-FETCH (16)", usage: prefetchUsage(usage16(0x90, 0x02, 2, 10, 4), 14), decode: decodePrefetch, handle: preFetch, scratch: chunk},            // SBC-3 5.9
		{opcode: 0x37, service: -1, name: "READ DEFECT DATA (10)", usage: []byte{0x37, 0, 0x1f, 0, 0, 0, 0, 0xff, 0xff, 0}, handle: readDefectData, quick: true},                          // SBC-3 5.17
		{opcode: 0xb7, service: -1, name: "READ DEFECT DATA (12)", usage: []byte{0xb7, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, handle: readDefectData, quick: true},  // SBC-3 5.18
		{opcode: 0x1b, service: -1, name: "START STOP UNIT", usage: []byte{0x1b, 0x01, 0, 0, 0x01, 0}, decode: decodeStartStop, handle: startStop, quick: true},                           // SBC-3 5.23
		{opcode: 0x83, service: 0x00, name: "EXTENDED COPY (LID1)", usage: usage16(0x83, 0, 0, 10, 4), decode: decodeExtendedCopy, handle: extendedCopy, scratch: copyChunk, exact: true}, // SPC-4 6.4
		{opcode: 0x84, service: 0x00, name: "RECEIVE COPY STATUS (LID1)", usage: copyResultsUsage(0x00), decode: decodeCopyResults, handle: copyStatus, quick: true},                      // SPC-4 6.26
		{opcode: 0x84, service: 0x01, name: "RECEIVE COPY DATA (LID1)", usage: copyResultsUsage(0x01), decode: decodeCopyResults, handle: copyData, quick: true},                          // SPC-4 6.21
		{opcode: 0x84, service: 0x03, name: "RECEIVE COPY OPERATING PARAMETERS", usage: copyResultsUsage(0x03), decode: decodeCopyResults, handle: copyParameters, quick: true},           // SPC-4 6.23
		{opcode: 0x84, service: 0x04, name: "RECEIVE COPY FAILURE DETAILS (LID1)", usage: copyResultsUsage(0x04), decode: decodeCopyResults, handle: copyFailure, quick: true},            // SPC-4 6.22
		{opcode: 0x89, service: -1, name: "COMPARE AND WRITE", usage: usage16(0x89, rwFlags, 2, 13, 1), decode: decodeCompareWrite, handle: compareAndWrite, scratch: chunk, exact: true}, // SBC-3 5.2
	}
}

var unknownOperation = operation{service: -1, name: "unknown command", usage: make([]byte, 6), quick: true, handle: refuse}

// usage10, usage12 and usage16 are the usage data of block commands: flags is byte
// 1; LBA from byte 2; a length. The GROUP NUMBER counts as reserved.
func usage10(op, flags byte) []byte {
	return []byte{op, flags, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0}
}

func usage12(op, flags byte) []byte {
	return []byte{op, flags, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}
}

func usage16(op, flags byte, lba, length, n int) []byte {
	u := make([]byte, 16)
	u[0], u[1] = op, flags
	for i := range 8 {
		if lba > 0 {
			u[lba+i] = 0xff
		}
	}
	for i := range n {
		u[length+i] = 0xff
	}
	return u
}

// lookup finds the operation of a CDB; nil when there is none.
func lookup(cdb []byte) *operation {
	for _, o := range index[cdb[0]] {
		if o.service < 0 || o.service == int(cdb[1]&0x1f) {
			return o
		}
	}
	return nil
}

// control is where the CONTROL byte is (SAM-5 5.2).
func (o *operation) control() int { return len(o.usage) - 1 }

// reserved is nil for a CDB that keeps to the usage data; otherwise it names the first
// bit that should be 0.
func (o *operation) reserved(cdb []byte) error {
	for i := 1; i < len(o.usage)-1; i++ {
		if extra := cdb[i] &^ o.usage[i]; extra != 0 {
			return badField{at: i, bit: bits.Len8(extra) - 1}
		}
	}
	return nil
}

// offered tells whether the unit has the operation.
func (o *operation) offered(u *unit) bool { return !o.thin || u != nil && u.info.Thin }

func refuse(*task) error { return senseInvalidOpcode }

// reply makes data the data-in of a command with an allocation length in bytes
// (SPC-4 4.2.5.6).
func (t *task) reply(data []byte, allocation int) error {
	t.in = data[:min(len(data), allocation)]
	t.whole = len(t.in)
	return nil
}

// tmfs are the task management functions (SPC-4 6.36): ABORT TASK, ABORT TASK SET,
// CLEAR TASK SET, LOGICAL UNIT RESET, TARGET RESET.
func reportTMFs(t *task) error {
	n := allocation32(t.cdb[6:])
	if t.cdb[2]&0x80 != 0 { // REPD
		return t.reply([]byte{0xda, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, n)
	}
	return t.reply([]byte{0xda, 0, 0, 0}, n)
}

// reportOpcodes is REPORT SUPPORTED OPERATION CODES (SPC-4 6.35).
func reportOpcodes(t *task) error {
	timeouts := t.cdb[2]&0x80 != 0
	code := t.cdb[3]
	action := int(t.cdb[4])<<8 | int(t.cdb[5])
	n := allocation32(t.cdb[6:])
	noTimeout := []byte{0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	one := func(o *operation) error {
		if o == nil || !o.offered(t.u) {
			return t.reply([]byte{0, 0x01, 0, 0}, n) // SUPPORT 001b: not supported
		}
		out := []byte{0, 0x03, byte(len(o.usage) >> 8), byte(len(o.usage))}
		if timeouts {
			out[1] |= 0x80
		}
		out = append(out, o.usage...)
		if timeouts {
			out = append(out, noTimeout...)
		}
		return t.reply(out, n)
	}
	with := index[code]
	switch t.cdb[2] & 7 {
	case 0:
		out := make([]byte, 4)
		for i := range operations {
			o := &operations[i]
			if !o.offered(t.u) {
				continue
			}
			d := []byte{o.opcode, 0, 0, 0, 0, 0, 0, byte(len(o.usage))}
			if o.service >= 0 {
				d[3], d[5] = byte(o.service), 1
			}
			if timeouts {
				d[5] |= 2
				d = append(d, noTimeout...)
			}
			out = append(out, d...)
		}
		l := len(out) - 4
		out[0], out[1], out[2], out[3] = byte(l>>24), byte(l>>16), byte(l>>8), byte(l)
		return t.reply(out, n)
	case 1: // the opcode has no service actions
		if len(with) > 0 && with[0].service >= 0 {
			return badField{at: 2, bit: 2}
		}
		if len(with) == 0 {
			return one(nil)
		}
		return one(with[0])
	case 2: // it has
		if len(with) > 0 && with[0].service < 0 {
			return badField{at: 2, bit: 2}
		}
		for _, o := range with {
			if o.service == action {
				return one(o)
			}
		}
		return one(nil)
	case 3: // either
		for _, o := range with {
			if o.service < 0 && action == 0 || o.service == action {
				return one(o)
			}
		}
		return one(nil)
	}
	return badField{at: 2, bit: 2}
}

// requestSense is REQUEST SENSE (SPC-4 6.39): it reports a unit attention and
// clears it.
func requestSense(t *task) error {
	s := sense{}
	switch {
	case t.u == nil:
		s = senseNoUnit
	default:
		id, _ := iscsi.DecodeLUN(t.lunField)
		t.c.mu.Lock()
		if a := t.c.attention[id]; len(a) > 0 {
			s = a[0]
			t.c.clearAttention(id)
		}
		t.c.mu.Unlock()
	}
	if t.cdb[1]&1 != 0 { // DESC
		return t.reply([]byte{0x72, s.Key, s.ASC, s.ASCQ, 0, 0, 0, 0}, int(t.cdb[4]))
	}
	return t.reply(s.fixed(), int(t.cdb[4]))
}
