package lun

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// PERSISTENT RESERVE IN and OUT, their service actions and the one type of reservation
// that is taken (SPC-4 6.15, 6.16).
const (
	opPersistentIn  = 0x5e
	opPersistentOut = 0x5f

	prReadKeys        = 0x00
	prReadReservation = 0x01
	prReadFullStatus  = 0x03

	prReserve        = 0x01
	prPreempt        = 0x04
	prPreemptAbort   = 0x05
	prRegisterAnyhow = 0x06 // REGISTER AND IGNORE EXISTING KEY

	prWriteExclusiveRO = 5
	prPersist          = 0x01 // APTPL
)

// nexus sends commands on one session, whose I_T nexus is what registrations belong to.
type nexus struct {
	*remote
	s *session
	// urgent: the session is not open to others yet.
	urgent bool
}

func (r *remote) nexus(s *session) nexus { return nexus{remote: r, s: s} }

// do runs c and turns its status into an error, as run does for the device.
func (n nexus) do(ctx context.Context, c *Command) error {
	c.urgent = n.urgent
	return n.runOn(ctx, c, n.s)
}

// in is PERSISTENT RESERVE IN: what follows the generation and the length, all of it.
func (n nexus) in(ctx context.Context, action byte) ([]byte, error) {
	c := Command{}
	for room := 4096; ; {
		c.CDB = [16]byte{0: opPersistentIn, 1: action}
		binary.BigEndian.PutUint16(c.CDB[7:], uint16(room))
		c.In = make([]byte, room)
		if err := n.do(ctx, &c); err != nil {
			if refused(err) {
				return nil, fmt.Errorf("persistent reservations: %w (%w)", ErrUnsupported, err)
			}
			return nil, err
		}
		p := c.In[:c.Received]
		if len(p) < 8 {
			return nil, fmt.Errorf("PERSISTENT RESERVE IN answered %d bytes", len(p))
		}
		length := uint64(binary.BigEndian.Uint32(p[4:]))
		if length+8 <= uint64(len(p)) {
			return p[8 : 8+length], nil
		}
		if len(p) < room {
			return nil, fmt.Errorf("PERSISTENT RESERVE IN answered %d of %d bytes", len(p)-8, length)
		}
		if room == 0xffff {
			return p[8:], nil // there is no more room in the CDB
		}
		room = 0xffff
	}
}

// held is the reservation, without the registrants.
func (n nexus) held(ctx context.Context) (Reservations, error) {
	p, err := n.in(ctx, prReadReservation)
	if err != nil || len(p) == 0 {
		return Reservations{}, err
	}
	if len(p) < 16 {
		return Reservations{}, fmt.Errorf("READ RESERVATION answered %d bytes", len(p))
	}
	return Reservations{Key: binary.BigEndian.Uint64(p), Type: p[13] & 0xf}, nil
}

// keys are those of all registrations, one for each.
func (n nexus) keys(ctx context.Context) ([]uint64, error) {
	p, err := n.in(ctx, prReadKeys)
	var keys []uint64
	for ; len(p) >= 8; p = p[8:] {
		keys = append(keys, binary.BigEndian.Uint64(p))
	}
	return keys, err
}

// registrants are all registrations, with the initiators where the device tells them.
func (n nexus) registrants(ctx context.Context) ([]Registrant, error) {
	p, err := n.in(ctx, prReadFullStatus)
	if err == nil {
		return parseFullStatus(p), nil
	}
	if !errors.Is(err, ErrUnsupported) {
		return nil, err
	}
	keys, err := n.keys(ctx)
	var all []Registrant
	for _, k := range keys {
		all = append(all, Registrant{Key: k})
	}
	return all, err
}

// parseFullStatus reads full status descriptors (SPC-4 6.15.5.2).
func parseFullStatus(p []byte) []Registrant {
	var all []Registrant
	for len(p) >= 24 {
		x := Registrant{Key: binary.BigEndian.Uint64(p), Holder: p[12]&0x01 != 0}
		length := uint64(binary.BigEndian.Uint32(p[20:]))
		id := p[24:]
		id = id[:min(length, uint64(len(id)))]
		x.Port = transportID(id)
		all = append(all, x)
		p = p[24+len(id):]
	}
	return all
}

// transportID is a TransportID in words (SPC-4 7.6.4): the name of an iSCSI initiator or
// initiator port, else the identifier in hexadecimal digits.
func transportID(p []byte) string {
	if len(p) < 4 {
		return ""
	}
	const protocolISCSI = 5
	if p[0]&0xf != protocolISCSI {
		return fmt.Sprintf("protocol %d, %x", p[0]&0xf, bytes.TrimRight(p[1:], "\x00"))
	}
	name := p[4:]
	name = name[:min(len(name), int(binary.BigEndian.Uint16(p[2:])))]
	name, _, _ = bytes.Cut(name, []byte{0})
	return strings.ToValidUTF8(string(bytes.Map(func(c rune) rune {
		if c <= ' ' || c >= 0x7f && c < 0xa0 {
			return '?'
		}
		return c
	}, name)), "?")
}

// out is PERSISTENT RESERVE OUT.
func (n nexus) out(ctx context.Context, action byte, key, actionKey uint64, flags byte) error {
	c := Command{CDB: [16]byte{0: opPersistentOut, 1: action}}
	if action != prRegisterAnyhow {
		c.CDB[2] = prWriteExclusiveRO
	}
	c.Out = make([]byte, 24)
	binary.BigEndian.PutUint32(c.CDB[5:], uint32(len(c.Out)))
	binary.BigEndian.PutUint64(c.Out, key)
	binary.BigEndian.PutUint64(c.Out[8:], actionKey)
	c.Out[20] = flags
	return n.do(ctx, &c)
}

// register registers the nexus under key; 0 ends its registration. It outlives a loss of
// power where the device can keep it.
func (n nexus) register(ctx context.Context, key uint64) error {
	if key != 0 && !n.fence.volatile.Load() {
		err := n.out(ctx, prRegisterAnyhow, 0, key, prPersist)
		if !refused(err) {
			return err
		}
	}
	err := n.out(ctx, prRegisterAnyhow, 0, key, 0)
	switch {
	case refused(err):
		return fmt.Errorf("persistent reservations: %w (%w)", ErrUnsupported, err)
	case err == nil && key != 0:
		n.fence.volatile.Store(true)
	}
	return err
}

func (n nexus) reserve(ctx context.Context, key uint64) error {
	return n.out(ctx, prReserve, key, 0, 0)
}

// preempt takes the registrations under victim away, and the reservation if it is
// theirs; abort ends their commands as well, where the device can.
func (n nexus) preempt(ctx context.Context, key, victim uint64, abort bool) error {
	if abort {
		if err := n.out(ctx, prPreemptAbort, key, victim, 0); !refused(err) {
			return err
		}
	}
	return n.out(ctx, prPreempt, key, victim, 0)
}

// reserved is the error for a reservation of somebody else.
func (n nexus) reserved(ctx context.Context, held Reservations) error {
	var err error
	if held.Registrants, err = n.registrants(ctx); err != nil {
		return err
	}
	return &ReservedError{held}
}

// registeredAs counts the registrations under key.
func registeredAs(keys []uint64, key uint64) int {
	n := 0
	for _, k := range keys {
		if k == key {
			n++
		}
	}
	return n
}
