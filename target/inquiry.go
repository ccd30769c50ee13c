package target

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"

	"lunshift/iscsi"
	"lunshift/lun"
)

// inquiryData is what INQUIRY answers for a unit: the standard data and the vital
// product data pages by page code.
type inquiryData struct {
	identity *lun.Identity // whose it is; nil for the unit's own
	standard []byte
	pages    map[byte][]byte
	unit     []byte // the designators of the unit in page 83h
}

// Block sizes and limits are in blocks; optimalTransfer is bytes.
const optimalTransfer = 1 << 20

// newInquiryData is what a unit says of itself, or as the unit whose identity it has.
func newInquiryData(u *unit, identity *lun.Identity) *inquiryData {
	d := &inquiryData{identity: identity, standard: standardInquiry(u.Vendor, u.Product, u.Revision), unit: ownDesignators(u)}
	serial := []byte(u.Serial)
	if identity != nil {
		copy(d.standard[8:36], identity.Standard)
		serial, d.unit = identity.Serial, identity.Designators
	}
	d.standard[5] |= 0x10 // TPGS: implicit asymmetric logical unit access
	d.pages = map[byte][]byte{
		0x80: serial,
		0x83: nil, // depends on the portal group of the session
		0x86: extended(u),
		0x8f: thirdPartyCopy(),
		0xb0: blockLimits(u),
		0xb1: make([]byte, 60), // block device characteristics: nothing is reported (SBC-3 6.6.2)
		0xb2: provisioning(u),
	}
	if serial == nil {
		delete(d.pages, 0x80)
	}
	list := slices.Sorted(maps.Keys(d.pages))
	d.pages[0x00] = append([]byte{0x00}, list...)
	for code, body := range d.pages {
		d.pages[code] = page(code, body)
	}
	return d
}

// page is a vital product data page of a disk (SPC-4 7.8.2).
func page(code byte, body []byte) []byte {
	return append([]byte{0, code, byte(len(body) >> 8), byte(len(body))}, body...)
}

// standardInquiry is the standard INQUIRY data (SPC-4 6.6.2) of a disk.
func standardInquiry(vendor, product, revision string) []byte {
	b := make([]byte, 74)
	b[2] = 0x06 // SPC-4
	b[3] = 0x12 // HISUP, response data format 2
	b[4] = byte(len(b) - 5)
	b[5] = 0x08 // 3PC: EXTENDED COPY and RECEIVE COPY RESULTS
	b[7] = 0x02 // CMDQUE
	pad(b[8:16], vendor)
	pad(b[16:32], product)
	pad(b[32:36], revision)
	for i, v := range []uint16{0x00a0, 0x0960, 0x0460, 0x04c0} { // SAM-5, iSCSI, SPC-4, SBC-3
		binary.BigEndian.PutUint16(b[58+2*i:], v)
	}
	return b
}

func pad(b []byte, s string) {
	for i := copy(b, s); i < len(b); i++ {
		b[i] = ' '
	}
}

// designator appends a designation descriptor of at most 255 bytes (SPC-4 7.8.6.1).
func designator(b []byte, set, kind byte, value []byte) []byte {
	return append(append(b, set, kind, 0, byte(len(value))), value...)
}

// ownDesignators name the unit by NAA and by T10 vendor identification.
func ownDesignators(u *unit) []byte {
	vendor := make([]byte, 8)
	pad(vendor, u.Vendor)
	b := designator(nil, 0x01, 0x03, binary.BigEndian.AppendUint64(nil, u.NAA))
	return designator(b, 0x02, 0x01, append(vendor, u.Serial...))
}

// identification is VPD page 83h (SPC-4 7.8.6): the designators of the unit, and the target
// port of the session by number, by its group and by name. The portal group is the port
// (RFC 7143 4.4.1).
func identification(u *unit, group uint16) []byte {
	b := slices.Clone(u.inq.Load().unit)
	add := func(set, kind byte, value []byte) { b = designator(b, set, kind, value) }
	const port = 0x90 // PIV, association with the target port
	number := u.port(group)
	add(0x51, port|0x04, []byte{0, 0, byte(number >> 8), byte(number)})
	add(0x51, port|0x05, []byte{0, 0, targetPortGroup >> 8, targetPortGroup & 0xff})
	name := fmt.Appendf(nil, "%s,t,0x%04x", u.IQN, group)
	for name = append(name, 0); len(name)%4 != 0; {
		name = append(name, 0)
	}
	add(0x53, port|0x08, name)
	return b
}

// extended is VPD page 86h, extended INQUIRY data (SPC-4 7.8.7).
func extended(u *unit) []byte {
	b := make([]byte, 60)
	b[1] = 0x07 // HEADSUP, ORDSUP, SIMPSUP
	if u.info.VolatileCache {
		b[2] = 0x01 // V_SUP
	}
	return b
}

// blockLimits is VPD page B0h (SBC-3 6.6.3).
func blockLimits(u *unit) []byte {
	p := make([]byte, 60)
	b := append(make([]byte, 4), p...)
	bs := u.info.BlockSize
	b[4] = 0x01 // WSNZ
	b[5] = byte(maxCompare(bs))
	binary.BigEndian.PutUint16(b[6:], uint16(1)<<min(u.info.PhysicalExponent, 15))
	binary.BigEndian.PutUint32(b[8:], maxTransfer/bs)
	binary.BigEndian.PutUint32(b[12:], optimalTransfer/bs)
	if u.info.Thin {
		binary.BigEndian.PutUint32(b[20:], maxUnmapBlocks)
		binary.BigEndian.PutUint32(b[24:], maxUnmapDescriptors)
		// One block is what every unit has; 0 is "not reported", which initiators that
		// take a granularity for more than one block bear better.
		if u.info.UnmapGranularity > 1 {
			binary.BigEndian.PutUint32(b[28:], u.info.UnmapGranularity)
		}
	}
	binary.BigEndian.PutUint64(b[36:], uint64(maxUnmap>>u.shift))
	return b[4:]
}

// provisioning is VPD page B2h (SBC-3 6.6.4).
func provisioning(u *unit) []byte {
	b := make([]byte, 4)
	if u.info.Thin {
		b[1] = 0xe0 // LBPU, LBPWS, LBPWS10
		if u.info.UnmapZeroes {
			b[1] |= 0x04 // LBPRZ
		}
		b[2] = 2 // thin provisioned
	}
	return b
}

// inquiry is INQUIRY (SPC-4 6.6). Where there is no unit the standard data says so by
// peripheral qualifier 011b.
func inquiry(t *task) error {
	n := int(binary.BigEndian.Uint16(t.cdb[3:]))
	evpd, code := t.cdb[1]&1 != 0, t.cdb[2]
	switch {
	case t.u == nil && evpd:
		return senseNoUnit
	case t.u == nil:
		b := standardInquiry("LUNSHIFT", "", "")
		b[0] = 0x7f
		return t.reply(b, n)
	case !evpd && code != 0:
		return badField{at: 2, bit: -1}
	case !evpd:
		return t.reply(t.u.inq.Load().standard, n)
	}
	b, ok := t.u.inq.Load().pages[code]
	if !ok {
		return badField{at: 2, bit: -1}
	}
	if code == 0x83 {
		b = page(code, identification(t.u, t.c.group))
	}
	return t.reply(b, n)
}

// reportLUNs is REPORT LUNS (SPC-4 6.33).
func reportLUNs(t *task) error {
	n := allocation32(t.cdb[6:])
	if n < 16 {
		return senseInvalidField
	}
	t.c.mu.Lock()
	ids := slices.Sorted(maps.Keys(t.c.units()))
	t.c.mu.Unlock()
	switch t.cdb[2] {
	case 0x00, 0x02: // all that are accessible
	case 0x01: // well known units: none
		ids = nil
	default:
		return senseInvalidField
	}
	b := make([]byte, 8, 8+8*len(ids))
	binary.BigEndian.PutUint32(b, uint32(8*len(ids)))
	for _, id := range ids {
		field, _ := iscsi.EncodeLUN(id)
		b = binary.BigEndian.AppendUint64(b, field)
	}
	t.c.inventoryKnown()
	return t.reply(b, n)
}

// decodeReadCapacity10 refuses what gotgt's op takes for a request.
func decodeReadCapacity10(t *task) error {
	t.alloc = 8
	if t.cdb[8]&1 == 0 && strings.Trim(string(t.cdb[2:6]), "\x00") != "" {
		return senseInvalidField
	}
	return nil
}

// readCapacity16 is READ CAPACITY (16) (SBC-3 5.16).
func readCapacity16(t *task) error {
	b := make([]byte, 32)
	binary.BigEndian.PutUint64(b, t.u.info.Blocks-1)
	binary.BigEndian.PutUint32(b[8:], t.u.info.BlockSize)
	b[13] = min(t.u.info.PhysicalExponent, 15)
	if t.u.info.Thin {
		b[14] = 0x80 // LBPME
		if t.u.info.UnmapZeroes {
			b[14] |= 0x40 // LBPRZ
		}
	}
	return t.reply(b, allocation32(t.cdb[10:]))
}

// modeSense is MODE SENSE (SPC-4 6.13, 6.14): the caching, control and
// informational exceptions pages. Nothing is changeable, nothing can be saved.
func modeSense(t *task) error {
	short := t.cdb[0] == 0x1a
	control, page, sub := t.cdb[2]>>6, t.cdb[2]&0x3f, t.cdb[3]
	if control == 3 {
		return senseSavingParams
	}
	var pages []byte
	found := false
	for _, p := range modePages(t.u) {
		if page != 0x3f && page != p[0] || sub != 0 && sub != 0xff {
			continue
		}
		found = true
		if control == 1 {
			clear(p[2:])
		}
		pages = append(pages, p...)
	}
	if !found {
		return senseInvalidField
	}
	var desc []byte
	long := false
	if t.cdb[1]&0x08 == 0 { // DBD
		long = !short && t.cdb[1]&0x10 != 0 // LLBAA
		if long {
			desc = binary.BigEndian.AppendUint64(nil, t.u.info.Blocks)
			desc = append(desc, 0, 0, 0, 0)
		} else {
			desc = binary.BigEndian.AppendUint32(nil, uint32(min(t.u.info.Blocks, 1<<32-1)))
		}
		desc = binary.BigEndian.AppendUint32(desc, t.u.info.BlockSize)
	}
	const dpofua = 0x10
	var b []byte
	var n int
	if short {
		b = []byte{byte(3 + len(desc) + len(pages)), 0, dpofua, byte(len(desc))}
		n = int(t.cdb[4])
	} else {
		l := 6 + len(desc) + len(pages)
		b = []byte{byte(l >> 8), byte(l), 0, dpofua, 0, 0, 0, byte(len(desc))}
		if long {
			b[4] = 1
		}
		n = int(binary.BigEndian.Uint16(t.cdb[7:]))
	}
	return t.reply(append(append(b, desc...), pages...), n)
}

// modePages are the mode pages of a unit, in the order of their codes.
func modePages(u *unit) [][]byte {
	caching := make([]byte, 20) // SBC-3 6.5.5
	caching[0], caching[1] = 0x08, 18
	if u.info.VolatileCache {
		caching[2] = 0x04 // WCE
	}
	control := make([]byte, 12) // SPC-4 7.5.8
	control[0], control[1] = 0x0a, 10
	control[2] = 0x20              // TST 001b: one task set per I_T nexus
	control[3] = 0x10              // unrestricted reordering
	exceptions := make([]byte, 12) // SPC-4 7.5.11
	exceptions[0], exceptions[1] = 0x1c, 10
	return [][]byte{caching, control, exceptions}
}
