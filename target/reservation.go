package target

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"lunshift/iscsi"
	"lunshift/lun"
)

// Reservations of a logical unit: persistent ones (SPC-4 5.12) and those of RESERVE and
// RELEASE (SPC-2 5.5). A command is held against one pointer, nil while nothing is
// reserved. What a persistent reservation is made of never changes in place; a service
// action makes it anew (reservation_out.go), it is saved, and only then does it count.

const (
	// sharedRegistrations bounds the registrations of a unit: as many as sessions that a
	// unit takes by default, twice, because those of initiators that are gone stay. Past
	// it a REGISTER is refused (SPC-4 5.12.7: INSUFFICIENT REGISTRATION RESOURCES).
	sharedRegistrations = 512
	// mostRegistrations bounds them together with those that have room beyond: of an
	// initiator that registers itself and of whose name there is none. Only who is
	// registered can take others out, so a table that is full of initiators that are gone
	// must let one in.
	mostRegistrations = 2 * sharedRegistrations
	// mostDeparted bounds the I_T nexuses that a unit remembers after their session
	// ended. All that are registered have room.
	mostDeparted = 2 * mostRegistrations
	// reservationSchema is the form of what a ReservationStore keeps.
	reservationSchema = 2
)

var (
	senseInvalidRelease  = sense{keyIllegalRequest, 0x26, 0x04} // INVALID RELEASE OF PERSISTENT RESERVATION
	senseNoRegistrations = sense{keyIllegalRequest, 0x55, 0x04} // INSUFFICIENT REGISTRATION RESOURCES
)

// Persistent reservation types (SPC-4 6.15.3.4).
const (
	typeWriteExclusive        = 1
	typeExclusiveAccess       = 3
	typeWriteRegistrantsOnly  = 5
	typeAccessRegistrantsOnly = 6
	typeWriteAllRegistrants   = 7
	typeAccessAllRegistrants  = 8
	typeMask                  = 0xea01 // PERSISTENT RESERVATION TYPE MASK (SPC-4 6.15.4)
)

func typeKnown(kind byte) bool {
	switch kind {
	case typeWriteExclusive, typeExclusiveAccess, typeWriteRegistrantsOnly, typeAccessRegistrantsOnly, typeWriteAllRegistrants, typeAccessAllRegistrants:
		return true
	}
	return false
}

func allRegistrants(kind byte) bool {
	return kind == typeWriteAllRegistrants || kind == typeAccessAllRegistrants
}

// registrants tells whether every registered I_T nexus has access: the types registrants
// only and all registrants.
func registrants(kind byte) bool {
	return allRegistrants(kind) || kind == typeWriteRegistrantsOnly || kind == typeAccessRegistrantsOnly
}

// nexus names an I_T nexus: initiator port and target port (RFC 7143 4.4.1). Where
// registrations are those of an initiator name its ISID is zero.
type nexus struct {
	name  string
	isid  iscsi.ISID
	group uint16 // target portal group tag, which tells the target port (see unit.port)
}

// nexus is the I_T nexus of a session at this unit.
func (u *unit) nexus(c *conn) nexus { return u.named(nexus{c.initiator, c.isid, c.group}) }

func (u *unit) named(n nexus) nexus {
	if u.ReservationsByName {
		n.isid = iscsi.ISID{}
	}
	return n
}

// registration is one I_T nexus with its reservation key.
type registration struct {
	nexus
	key    uint64
	holder bool // of a reservation that is not for all registrants
}

// persistent is the persistent reservations of a unit. It is constant.
type persistent struct {
	generation uint32 // PRGENERATION: begins at 0 with every start, whatever APTPL is (SPC-4 6.15.2)
	aptpl      bool   // activate persist through power loss
	kind       byte   // 0: no reservation
	regs       []registration
	byNexus    map[nexus]int // index of regs
}

func (p *persistent) find(n nexus) *registration {
	if i, ok := p.byNexus[n]; ok {
		return &p.regs[i]
	}
	return nil
}

// holds tells whether a registration is a persistent reservation holder (SPC-4 5.12.10).
func (p *persistent) holds(r *registration) bool {
	return p.kind != 0 && (allRegistrants(p.kind) || r.holder)
}

// rule is what commands are held against; constant.
type rule struct {
	*persistent
	reserver *conn // that did RESERVE; nil none
}

// refuses tells whether a command with that access conflicts on the session.
func (r *rule) refuses(u *unit, c *conn, k access) bool {
	if r.reserver != nil {
		return k == accessReservation || r.reserver != c && k != accessAlways
	}
	if r.kind == 0 || k >= accessAllowed {
		return false
	}
	if reg := r.find(u.nexus(c)); reg != nil && (registrants(r.kind) || reg.holder) {
		return false
	}
	switch r.kind {
	case typeWriteExclusive, typeWriteRegistrantsOnly, typeWriteAllRegistrants:
		return k != accessRead
	}
	return true
}

// conflicts tells whether a reservation keeps the session from a command. It does not
// wait.
func (u *unit) conflicts(c *conn, k access) bool {
	r := u.reserved.rule.Load()
	return r != nil && r.refuses(u, c, k)
}

// reservations is the reservations of one unit.
type reservations struct {
	store  ReservationStore // may be nil
	saved  []byte           // what the store has; under turn
	unsure bool             // a Save failed: the store may have something else; under turn

	// turn is held, by a value in it, while a command changes reservations, also while it
	// waits for the store.
	turn chan struct{}
	rule atomic.Pointer[rule] // nil while nothing is reserved

	// mu protects what follows. Lock order: mu, then Server.mu or a conn.mu; neither is
	// held when mu is taken.
	mu         sync.Mutex
	persistent atomic.Pointer[persistent] // never nil; read without mu
	reserver   *conn
	departed   map[nexus][]sense // unit attentions of I_T nexuses without a session
}

// newReservations takes up what the unit's store has.
func newReservations(u *unit) (*reservations, error) {
	r := &reservations{store: u.Reservations, turn: make(chan struct{}, 1), departed: map[nexus][]sense{}}
	p := &persistent{}
	if r.store != nil {
		data, err := r.store.Load()
		if err == nil {
			p, err = decodeReservations(u, data)
		}
		if err != nil {
			return nil, fmt.Errorf("%s LUN %d: its persistent reservations cannot be read: %w", u.IQN, u.LUN, err)
		}
		r.saved = data
	}
	r.publish(p)
	return r, nil
}

// publish makes p count. mu is held, or nobody else has r yet.
func (r *reservations) publish(p *persistent) {
	r.persistent.Store(p)
	if p.kind == 0 && r.reserver == nil {
		r.rule.Store(nil)
	} else {
		r.rule.Store(&rule{p, r.reserver})
	}
}

// begin waits for the turn to change reservations; end gives it back.
func (r *reservations) begin(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := ctx.Err(); err != nil { // both came at once
		r.end()
		return err
	}
	return nil
}

func (r *reservations) end() { <-r.turn }

// save puts p on stable storage, where it is to survive a loss of power or replaces
// something that was, or may have been: a Save that failed may have kept what it was
// given all the same. The turn is held.
func (r *reservations) save(ctx context.Context, p *persistent) error {
	if r.store == nil {
		return nil
	}
	data, err := encodeReservations(p)
	if err != nil {
		return err
	}
	if !r.unsure && string(data) == string(r.saved) {
		return nil
	}
	r.unsure = true
	if err := r.store.Save(ctx, data); err != nil {
		return fmt.Errorf("save persistent reservations: %w", err)
	}
	r.saved, r.unsure = data, false
	return nil
}

// storedReservations is what a ReservationStore keeps: nothing at all where APTPL is
// zero, as a loss of power ends everything then (SPC-4 5.12.5). With mostRegistrations of
// the longest names it is shorter than MostReservationData.
type storedReservations struct {
	Schema        int                  `json:"schema"`
	Type          byte                 `json:"type,omitempty"`
	Registrations []storedRegistration `json:"registrations"`
}

type storedRegistration struct {
	Name   []byte     `json:"name"` // of the initiator, byte for byte: it need not be UTF-8
	ISID   iscsi.ISID `json:"isid"`
	Group  uint16     `json:"portal_group"`
	Key    uint64     `json:"key"`
	Holder bool       `json:"holder,omitempty"`
}

func encodeReservations(p *persistent) ([]byte, error) {
	if !p.aptpl || len(p.regs) == 0 {
		return nil, nil
	}
	s := storedReservations{Schema: reservationSchema, Type: p.kind}
	for _, r := range p.regs {
		s.Registrations = append(s.Registrations, storedRegistration{[]byte(r.name), r.isid, r.group, r.key, r.holder})
	}
	return json.Marshal(s)
}

// decodeReservations is the inverse. Registrations that the unit takes for those of one
// I_T nexus, because it goes by names now, become one.
func decodeReservations(u *unit, data []byte) (*persistent, error) {
	p := &persistent{}
	if len(data) == 0 {
		return p, nil
	}
	var s storedReservations
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, err
	}
	if s.Schema != reservationSchema {
		return nil, fmt.Errorf("schema %d, this lunshift knows %d", s.Schema, reservationSchema)
	}
	if s.Type != 0 && !typeKnown(s.Type) || len(s.Registrations) > mostRegistrations {
		return nil, fmt.Errorf("type %d with %d registrations", s.Type, len(s.Registrations))
	}
	p.aptpl, p.kind = true, s.Type
	p.byNexus = map[nexus]int{}
	holders := 0
	for _, r := range s.Registrations {
		n := u.named(nexus{string(r.Name), r.ISID, r.Group})
		if r.Key == 0 || n.name == "" {
			return nil, fmt.Errorf("a registration of %q with key %d", n.name, r.Key)
		}
		if r.Holder {
			holders++
		}
		if i, ok := p.byNexus[n]; ok {
			if r.Holder { // it is worth most
				p.regs[i].key, p.regs[i].holder = r.Key, true
			}
			continue
		}
		p.byNexus[n] = len(p.regs)
		p.regs = append(p.regs, registration{n, r.Key, r.Holder})
	}
	want := 0
	if p.kind != 0 && !allRegistrants(p.kind) {
		want = 1
	}
	if holders != want || p.kind != 0 && len(p.regs) == 0 {
		return nil, fmt.Errorf("type %d with %d holders among %d registrations", p.kind, holders, len(p.regs))
	}
	return p, nil
}

// reserve is RESERVE (6) and (10) (SPC-2 7.21, 7.22). It reserves nothing where a
// persistent reservation gives the session the unit anyway, and conflicts wherever
// else somebody is registered (SPC-4 5.12.3).
func reserve(t *task) error {
	r := t.u.reserved
	if err := r.begin(t); err != nil {
		return err
	}
	defer r.end()
	r.mu.Lock()
	defer r.mu.Unlock()
	// A reset and a unit that is taken away release after they aborted, or closed the way here.
	if err := t.Err(); err != nil {
		return err
	}
	if !t.u.sees(&t.c.peer) {
		return senseNoUnit
	}
	p := r.persistent.Load()
	if len(p.regs) > 0 {
		if reg := p.find(t.u.nexus(t.c)); reg != nil && p.kind != 0 && (registrants(p.kind) || reg.holder) {
			return nil
		}
		return lun.ErrConflict
	}
	if r.reserver != nil && r.reserver != t.c {
		return lun.ErrConflict
	}
	r.reserver = t.c
	r.publish(p)
	return nil
}

// release is RELEASE (6) and (10) (SPC-2 7.18, 7.19): of no effect for whoever does not
// hold the reservation.
func release(t *task) error {
	p := t.u.reserved.persistent.Load()
	if len(p.regs) > 0 {
		if reg := p.find(t.u.nexus(t.c)); reg == nil || p.kind == 0 || !registrants(p.kind) && !reg.holder {
			return lun.ErrConflict
		}
		return nil
	}
	t.u.reserved.release(t.c)
	return nil
}

// release ends the reservation of RESERVE if c has it, or whoever has it where c is nil:
// at the end of its session and at a reset (SPC-2 7.21.1).
func (r *reservations) release(c *conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reserver != nil && (c == nil || r.reserver == c) {
		r.reserver = nil
		r.publish(r.persistent.Load())
	}
}

// arrive gives the unit attentions that await a session's I_T nexus: I_T NEXUS LOSS
// OCCURRED first where the unit knows it from before.
func (r *reservations) arrive(n nexus) []sense {
	r.mu.Lock()
	defer r.mu.Unlock()
	waiting, known := r.departed[n]
	if !known {
		return []sense{attnPowerOn}
	}
	delete(r.departed, n)
	return establish(slices.Clone(waiting), attnNexusLoss)
}

// depart remembers an I_T nexus whose session ended, with what it was not told. Of
// COMMANDS CLEARED the commands went with the session.
func (r *reservations) depart(n nexus, unsaid []sense) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := r.departed[n]
	for _, s := range unsaid {
		if s != attnCleared {
			list = establish(list, s)
		}
	}
	r.remember(n, list)
}

// remember keeps what awaits n. Past the bound an I_T nexus that is not registered is
// forgotten for it: it will be told of a power on when it returns. mu is held.
func (r *reservations) remember(n nexus, list []sense) {
	if _, known := r.departed[n]; !known && len(r.departed) >= mostDeparted {
		p := r.persistent.Load()
		for o := range r.departed {
			if p.find(o) == nil {
				delete(r.departed, o)
				break
			}
		}
	}
	r.departed[n] = list
}
