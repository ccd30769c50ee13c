// Package iscsi is RFC 7143 on the wire, for initiators and targets alike: the
// basic header segment and its fields, PDUs read and written in bulk, digests,
// text keys and their negotiation, serial numbers, LUN addresses and CHAP.
//
// It opens no sockets and keeps no session: a Reader reads from any io.Reader,
// a Writer gathers PDUs and writes them to any io.Writer. What arrives is
// checked against limits before memory is taken for it, and no input panics.
package iscsi

import (
	"encoding/binary"
	"fmt"
)

// Port is the registered TCP port of iSCSI (RFC 7143 4.2.7.1).
const Port = 3260

// BHSLength is the length of the basic header segment in bytes (RFC 7143 11.2.1).
const BHSLength = 48

// Opcode is the low six bits of a PDU's first byte (RFC 7143 11.2.1.2).
type Opcode byte

// The opcodes (RFC 7143 11.2.1.2).
const (
	OpNopOut       Opcode = 0x00 // 11.18
	OpSCSICommand  Opcode = 0x01 // 11.3
	OpTaskMgmt     Opcode = 0x02 // 11.5
	OpLoginRequest Opcode = 0x03 // 11.12
	OpTextRequest  Opcode = 0x04 // 11.10
	OpDataOut      Opcode = 0x05 // 11.7
	OpLogout       Opcode = 0x06 // 11.14
	OpSNACK        Opcode = 0x10 // 11.16

	OpNopIn         Opcode = 0x20 // 11.19
	OpSCSIResponse  Opcode = 0x21 // 11.4
	OpTaskMgmtResp  Opcode = 0x22 // 11.6
	OpLoginResponse Opcode = 0x23 // 11.13
	OpTextResponse  Opcode = 0x24 // 11.11
	OpDataIn        Opcode = 0x25 // 11.7
	OpLogoutResp    Opcode = 0x26 // 11.15
	OpR2T           Opcode = 0x31 // 11.8
	OpAsync         Opcode = 0x32 // 11.9
	OpReject        Opcode = 0x3f // 11.17
)

var opcodeNames = map[Opcode]string{
	OpNopOut: "NOP-Out", OpSCSICommand: "SCSI Command", OpTaskMgmt: "Task Management Function Request",
	OpLoginRequest: "Login Request", OpTextRequest: "Text Request", OpDataOut: "SCSI Data-Out",
	OpLogout: "Logout Request", OpSNACK: "SNACK Request", OpNopIn: "NOP-In", OpSCSIResponse: "SCSI Response",
	OpTaskMgmtResp: "Task Management Function Response", OpLoginResponse: "Login Response",
	OpTextResponse: "Text Response", OpDataIn: "SCSI Data-In", OpLogoutResp: "Logout Response",
	OpR2T: "Ready To Transfer", OpAsync: "Asynchronous Message", OpReject: "Reject",
}

func (o Opcode) String() string {
	if s, ok := opcodeNames[o]; ok {
		return s
	}
	return fmt.Sprintf("opcode %02Xh", byte(o))
}

// FlagImmediate is the I bit of the first byte (RFC 7143 11.2.1.1).
const FlagImmediate = 0x40

// Flags of byte 1.
const (
	FlagFinal byte = 0x80 // F, in every PDU that has it

	// SCSI Command (RFC 7143 11.3.1)
	FlagRead      byte = 0x40
	FlagWrite     byte = 0x20
	FlagAttrMask  byte = 0x07
	AttrUntagged  byte = 0
	AttrSimple    byte = 1
	AttrOrdered   byte = 2
	AttrHeadQueue byte = 3
	AttrACA       byte = 4

	// SCSI Response (11.4.1) and Data-In (11.7.2)
	FlagBidiOverflow  byte = 0x10
	FlagBidiUnderflow byte = 0x08
	FlagOverflow      byte = 0x04
	FlagUnderflow     byte = 0x02
	FlagStatus        byte = 0x01 // S, Data-In only
	FlagAcknowledge   byte = 0x40 // A, Data-In only

	// Login (11.12, 11.13) and Text (11.10)
	FlagTransit  byte = 0x80
	FlagContinue byte = 0x40
)

// Login stages, CSG and NSG (RFC 7143 11.12.3).
const (
	StageSecurity    = 0
	StageOperational = 1
	StageFullFeature = 3
)

// Task management functions (RFC 7143 11.5.1).
const (
	TMFAbortTask       = 1
	TMFAbortTaskSet    = 2
	TMFClearACA        = 3
	TMFClearTaskSet    = 4
	TMFLUNReset        = 5
	TMFTargetWarmReset = 6
	TMFTargetColdReset = 7
	TMFTaskReassign    = 8
)

// Task management responses (RFC 7143 11.6.1).
const (
	TMFComplete        = 0
	TMFNoTask          = 1
	TMFNoLUN           = 2
	TMFStillAllegiant  = 3
	TMFNoReassign      = 4
	TMFNotSupported    = 5
	TMFAuthFailed      = 6
	TMFRejected        = 255
	ResponseCompleted  = 0 // SCSI Response: command completed at target (11.4.3)
	ResponseTargetFail = 1
)

// SCSI status codes (SAM-5 5.3.1).
const (
	StatusGood                = 0x00
	StatusCheckCondition      = 0x02
	StatusConditionMet        = 0x04
	StatusBusy                = 0x08
	StatusReservationConflict = 0x18
	StatusTaskSetFull         = 0x28
	StatusACAActive           = 0x30
	StatusTaskAborted         = 0x40
)

// Login status, class in the high byte and detail in the low (RFC 7143 11.13.5).
const (
	LoginSuccess            = 0x0000
	LoginMovedTemporarily   = 0x0101
	LoginMovedPermanently   = 0x0102
	LoginInitiatorError     = 0x0200
	LoginAuthFailed         = 0x0201
	LoginForbidden          = 0x0202
	LoginNotFound           = 0x0203
	LoginTargetRemoved      = 0x0204
	LoginUnsupportedVersion = 0x0205
	LoginTooManyConnections = 0x0206
	LoginMissingParameter   = 0x0207
	LoginCannotInclude      = 0x0208
	LoginBadSessionType     = 0x0209
	LoginNoSession          = 0x020a
	LoginInvalidRequest     = 0x020b
	LoginTargetError        = 0x0300
	LoginServiceUnavailable = 0x0301
	LoginOutOfResources     = 0x0302
)

// Logout reasons and responses (RFC 7143 11.14.1, 11.15.1).
const (
	LogoutCloseSession    = 0
	LogoutCloseConnection = 1
	LogoutForRecovery     = 2

	LogoutOK          = 0
	LogoutNoCID       = 1
	LogoutNoRecovery  = 2
	LogoutCleanupFail = 3
)

// Asynchronous events (RFC 7143 11.9.1).
const (
	AsyncSCSI           = 0
	AsyncLogoutRequest  = 1
	AsyncConnectionDrop = 2
	AsyncSessionDrop    = 3
	AsyncNegotiate      = 4
)

// Reject reasons (RFC 7143 11.17.1).
const (
	RejectDataDigest      = 0x02
	RejectSNACK           = 0x03
	RejectProtocol        = 0x04
	RejectNotSupported    = 0x05
	RejectTooManyImmed    = 0x06
	RejectTaskInProgress  = 0x07
	RejectInvalidDataAck  = 0x08
	RejectInvalidPDUField = 0x09
	RejectOutOfResources  = 0x0a
	RejectLogout          = 0x0c
)

// NoTag is the reserved task tag (RFC 7143 11.2.1.8).
const NoTag uint32 = 0xffffffff

// BHS is a basic header segment. Its methods read and write fields in place;
// which of them a PDU has is in the section of its opcode.
type BHS [BHSLength]byte

// Opcode is the operation, without the I bit.
func (h *BHS) Opcode() Opcode { return Opcode(h[0] & 0x3f) }

// SetOpcode sets the operation and clears the I bit.
func (h *BHS) SetOpcode(o Opcode) { h[0] = byte(o) }

// Immediate is the I bit.
func (h *BHS) Immediate() bool { return h[0]&FlagImmediate != 0 }

// SetImmediate sets the I bit.
func (h *BHS) SetImmediate() { h[0] |= FlagImmediate }

// Flags is byte 1.
func (h *BHS) Flags() byte { return h[1] }

// SetFlags sets byte 1.
func (h *BHS) SetFlags(f byte) { h[1] = f }

// Final is the F bit.
func (h *BHS) Final() bool { return h[1]&FlagFinal != 0 }

// AHSLength is the length of the additional header segments in bytes, 0 to 1020.
func (h *BHS) AHSLength() int { return int(h[4]) * 4 }

// SetAHSLength sets TotalAHSLength; n is in bytes, a multiple of 4 up to 1020.
func (h *BHS) SetAHSLength(n int) { h[4] = byte(n / 4) }

// DataLength is DataSegmentLength in bytes, without padding, 0 to 2^24-1.
func (h *BHS) DataLength() int { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }

// SetDataLength sets DataSegmentLength.
func (h *BHS) SetDataLength(n int) { h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n) }

// LUN is the eight-byte LUN field as it stands; see DecodeLUN.
func (h *BHS) LUN() uint64 { return binary.BigEndian.Uint64(h[8:]) }

// SetLUN sets the eight-byte LUN field; see EncodeLUN.
func (h *BHS) SetLUN(l uint64) { binary.BigEndian.PutUint64(h[8:], l) }

// ITT is the initiator task tag.
func (h *BHS) ITT() uint32 { return h.u32(16) }

// SetITT sets the initiator task tag.
func (h *BHS) SetITT(v uint32) { h.put32(16, v) }

// TTT is the target transfer tag; the referenced task tag in a task management
// request, the SNACK tag in a SCSI Response.
func (h *BHS) TTT() uint32 { return h.u32(20) }

// SetTTT sets bytes 20 to 23.
func (h *BHS) SetTTT(v uint32) { h.put32(20, v) }

// ExpectedLength is the expected data transfer length of a SCSI Command in bytes.
func (h *BHS) ExpectedLength() uint32 { return h.u32(20) }

// SetExpectedLength sets the expected data transfer length.
func (h *BHS) SetExpectedLength(v uint32) { h.put32(20, v) }

// CmdSN is the command sequence number, in PDUs of the initiator.
func (h *BHS) CmdSN() uint32 { return h.u32(24) }

// SetCmdSN sets CmdSN.
func (h *BHS) SetCmdSN(v uint32) { h.put32(24, v) }

// ExpStatSN is the next status number the initiator expects.
func (h *BHS) ExpStatSN() uint32 { return h.u32(28) }

// SetExpStatSN sets ExpStatSN.
func (h *BHS) SetExpStatSN(v uint32) { h.put32(28, v) }

// StatSN is the status sequence number, in PDUs of the target.
func (h *BHS) StatSN() uint32 { return h.u32(24) }

// SetStatSN sets StatSN.
func (h *BHS) SetStatSN(v uint32) { h.put32(24, v) }

// ExpCmdSN is the next command number the target expects.
func (h *BHS) ExpCmdSN() uint32 { return h.u32(28) }

// SetExpCmdSN sets ExpCmdSN.
func (h *BHS) SetExpCmdSN(v uint32) { h.put32(28, v) }

// MaxCmdSN is the last command number the target takes.
func (h *BHS) MaxCmdSN() uint32 { return h.u32(32) }

// SetMaxCmdSN sets MaxCmdSN.
func (h *BHS) SetMaxCmdSN(v uint32) { h.put32(32, v) }

// RefCmdSN is the CmdSN of the task a task management request refers to.
func (h *BHS) RefCmdSN() uint32 { return h.u32(32) }

// SetRefCmdSN sets RefCmdSN.
func (h *BHS) SetRefCmdSN(v uint32) { h.put32(32, v) }

// DataSN is DataSN, R2TSN or ExpDataSN, by the opcode.
func (h *BHS) DataSN() uint32 { return h.u32(36) }

// SetDataSN sets bytes 36 to 39.
func (h *BHS) SetDataSN(v uint32) { h.put32(36, v) }

// BufferOffset is where the data of a Data-In, Data-Out or R2T begins, in bytes.
func (h *BHS) BufferOffset() uint32 { return h.u32(40) }

// SetBufferOffset sets BufferOffset.
func (h *BHS) SetBufferOffset(v uint32) { h.put32(40, v) }

// DesiredLength is how much an R2T asks for, in bytes.
func (h *BHS) DesiredLength() uint32 { return h.u32(44) }

// SetDesiredLength sets DesiredLength.
func (h *BHS) SetDesiredLength(v uint32) { h.put32(44, v) }

// Residual is the residual count of a Data-In or SCSI Response, in bytes.
func (h *BHS) Residual() uint32 { return h.u32(44) }

// SetResidual sets the residual count.
func (h *BHS) SetResidual(v uint32) { h.put32(44, v) }

// CDB is the sixteen-byte CDB field of a SCSI Command, a view into h.
func (h *BHS) CDB() []byte { return h[32:48:48] }

// Status is the SCSI status of a SCSI Response or of a Data-In with the S bit.
func (h *BHS) Status() byte { return h[3] }

// SetStatus sets the SCSI status.
func (h *BHS) SetStatus(s byte) { h[3] = s }

// Response is byte 2: the response of a SCSI, task management or logout
// response, the reason of a Reject.
func (h *BHS) Response() byte { return h[2] }

// SetResponse sets byte 2.
func (h *BHS) SetResponse(r byte) { h[2] = r }

// Function is the low seven bits of byte 1: the task management function or the
// logout reason.
func (h *BHS) Function() byte { return h[1] & 0x7f }

// ISID is the initiator part of the session identifier of a login PDU (RFC 7143 11.12.5).
func (h *BHS) ISID() ISID { return ISID(h[8:14]) }

// SetISID sets ISID.
func (h *BHS) SetISID(i ISID) { copy(h[8:14], i[:]) }

// TSIH is the target session identifying handle of a login PDU.
func (h *BHS) TSIH() uint16 { return binary.BigEndian.Uint16(h[14:]) }

// SetTSIH sets TSIH.
func (h *BHS) SetTSIH(v uint16) { binary.BigEndian.PutUint16(h[14:], v) }

// CID is the connection identifier of a login or logout request.
func (h *BHS) CID() uint16 { return binary.BigEndian.Uint16(h[20:]) }

// SetCID sets CID.
func (h *BHS) SetCID(v uint16) { binary.BigEndian.PutUint16(h[20:], v) }

// CSG and NSG are the stages of a login PDU.
func (h *BHS) CSG() int { return int(h[1]>>2) & 3 }

// NSG is the next stage of a login PDU with the T bit.
func (h *BHS) NSG() int { return int(h[1]) & 3 }

// LoginStatus is status class and detail of a Login Response.
func (h *BHS) LoginStatus() uint16 { return binary.BigEndian.Uint16(h[36:]) }

// SetLoginStatus sets status class and detail.
func (h *BHS) SetLoginStatus(v uint16) { binary.BigEndian.PutUint16(h[36:], v) }

// AsyncEvent is the event of an Asynchronous Message.
func (h *BHS) AsyncEvent() byte { return h[36] }

// SetAsync sets event and parameters of an Asynchronous Message.
func (h *BHS) SetAsync(event, vcode byte, p1, p2, p3 uint16) {
	h[36], h[37] = event, vcode
	binary.BigEndian.PutUint16(h[38:], p1)
	binary.BigEndian.PutUint16(h[40:], p2)
	binary.BigEndian.PutUint16(h[42:], p3)
}

// AsyncParameters are the three parameters of an Asynchronous Message.
func (h *BHS) AsyncParameters() (p1, p2, p3 uint16) {
	return binary.BigEndian.Uint16(h[38:]), binary.BigEndian.Uint16(h[40:]), binary.BigEndian.Uint16(h[42:])
}

// LogoutTimes are Time2Wait and Time2Retain of a Logout Response, in seconds.
func (h *BHS) LogoutTimes() (wait, retain uint16) {
	return binary.BigEndian.Uint16(h[40:]), binary.BigEndian.Uint16(h[42:])
}

// SetLogoutTimes sets Time2Wait and Time2Retain.
func (h *BHS) SetLogoutTimes(wait, retain uint16) {
	binary.BigEndian.PutUint16(h[40:], wait)
	binary.BigEndian.PutUint16(h[42:], retain)
}

func (h *BHS) u32(at int) uint32      { return binary.BigEndian.Uint32(h[at:]) }
func (h *BHS) put32(at int, v uint32) { binary.BigEndian.PutUint32(h[at:], v) }

// ISID is the initiator part of the session identifier (RFC 7143 11.12.5).
type ISID [6]byte

func (i ISID) String() string { return fmt.Sprintf("%x", i[:]) }

// Serial numbers (RFC 7143 4.2.2, RFC 1982): a is before b when the way from a
// up to b is shorter than half the circle.

// SNLess tells whether a comes before b.
func SNLess(a, b uint32) bool { return int32(a-b) < 0 }

// SNLessEq tells whether a is b or comes before it.
func SNLessEq(a, b uint32) bool { return int32(a-b) <= 0 }

// EncodeLUN gives the eight-byte LUN field of a unit number: peripheral device
// addressing below 256, flat space addressing below 16384 (SAM-5 4.7.7). ok is
// false above.
func EncodeLUN(n uint64) (field uint64, ok bool) {
	switch {
	case n < 256:
		return n << 48, true
	case n < 16384:
		return (0x4000 | n) << 48, true
	}
	return 0, false
}

// DecodeLUN gives the unit number of an eight-byte LUN field of one level. ok is
// false for other forms.
func DecodeLUN(field uint64) (n uint64, ok bool) {
	if field&0xffffffffffff != 0 {
		return 0, false
	}
	w := field >> 48
	switch w >> 14 {
	case 0: // peripheral device, bus 0
		return w & 0xff, w>>8 == 0
	case 1: // flat space
		return w & 0x3fff, true
	}
	return 0, false
}
