package target

import (
	"encoding/binary"
	"fmt"
)

// PERSISTENT RESERVE IN service actions (SPC-4 6.15.1).
const (
	prReadKeys        = 0x00
	prReadReservation = 0x01
	prCapabilities    = 0x02
	prReadFullStatus  = 0x03
)

// persistentReserveIn is PERSISTENT RESERVE IN (SPC-4 6.15).
func persistentReserveIn(t *task) error {
	p := t.u.reserved.persistent.Load()
	n := int(binary.BigEndian.Uint16(t.cdb[7:]))
	if t.cdb[1]&0x1f == prCapabilities {
		return t.reply(capabilities(t.u, p), n)
	}
	b := binary.BigEndian.AppendUint32(nil, p.generation)
	b = binary.BigEndian.AppendUint32(b, 0)
	switch t.cdb[1] & 0x1f {
	case prReadKeys:
		for _, r := range p.regs {
			b = binary.BigEndian.AppendUint64(b, r.key)
		}
	case prReadReservation:
		if p.kind != 0 {
			key := uint64(0) // of all registrants
			for _, r := range p.regs {
				if r.holder {
					key = r.key
				}
			}
			b = binary.BigEndian.AppendUint64(b, key)
			b = append(b, 0, 0, 0, 0, 0, p.kind, 0, 0)
		}
	case prReadFullStatus:
		for _, r := range p.regs {
			id := transportID(t.u, r.nexus)
			b = binary.BigEndian.AppendUint64(b, r.key)
			d := make([]byte, 16)
			if p.holds(&r) {
				d[4], d[5] = 0x01, p.kind // R_HOLDER
			}
			binary.BigEndian.PutUint16(d[10:], t.u.port(r.group))
			binary.BigEndian.PutUint32(d[12:], uint32(len(id)))
			b = append(append(b, d...), id...)
		}
	}
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8))
	return t.reply(b, n)
}

// capabilities are those of SPC-4 6.15.4.
func capabilities(u *unit, p *persistent) []byte {
	b := make([]byte, 8)
	b[1] = 8
	b[2] = 0x10 | 0x08 | 0x04 // CRH, SIP_C, ATP_C
	if u.Reservations != nil {
		b[2] |= 0x01 // PTPL_C
	}
	b[3] = 0x80 | 3<<4 // TMV, ALLOW COMMANDS
	if p.aptpl {
		b[3] |= 0x01 // PTPL_A
	}
	binary.BigEndian.PutUint16(b[4:], typeMask)
	return b
}

// transportID names an initiator port, or an initiator where registrations are those of a
// name (SPC-4 7.6.4.6).
func transportID(u *unit, n nexus) []byte {
	format, name := byte(1), fmt.Sprintf("%s,i,0x%x", n.name, n.isid[:])
	if u.ReservationsByName {
		format, name = 0, n.name
	}
	b := append([]byte{format<<6 | 5, 0, 0, 0}, name...)
	for b = append(b, 0); len(b)%4 != 0 || len(b) < 24; {
		b = append(b, 0)
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-4))
	return b
}
