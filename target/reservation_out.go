package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"maps"
	"slices"

	"lunshift/iscsi"
	"lunshift/lun"
)

// PERSISTENT RESERVE OUT service actions (SPC-4 6.16.2).
const (
	prRegister        = 0x00
	prReserve         = 0x01
	prRelease         = 0x02
	prClear           = 0x03
	prPreempt         = 0x04
	prPreemptAbort    = 0x05
	prRegisterAnyhow  = 0x06 // REGISTER AND IGNORE EXISTING KEY
	prRegisterAndMove = 0x07
)

const (
	prListLength = 24      // of the parameter list without additional data, in bytes
	prListMost   = 1 << 16 // of the whole, in bytes: TransportIDs for every registration
)

// prRequest is one PERSISTENT RESERVE OUT, decoded.
type prRequest struct {
	action, scope, kind byte
	key, newKey         uint64 // RESERVATION KEY, SERVICE ACTION RESERVATION KEY
	aptpl, unregister   bool
	specifies           bool // SPEC_I_PT
	from                nexus
	// others are further I_T nexuses to be registered, named by ALL_TG_PT and SPEC_I_PT:
	// ports those of from at other target ports, specified those of TransportIDs.
	ports, specified []nexus
	to               nexus // of REGISTER AND MOVE
}

// notice is a unit attention for an I_T nexus.
type notice struct {
	nexus
	sense
}

// outcome is what a service action leads to.
type outcome struct {
	*persistent
	notices   []notice
	preempted []nexus
}

func decodePersistentOut(t *task) error {
	n := binary.BigEndian.Uint32(t.cdb[5:])
	if n < prListLength || n > prListMost {
		return senseParamLength
	}
	t.want = int(n)
	return nil
}

// persistentReserveOut is PERSISTENT RESERVE OUT (SPC-4 6.16). Whatever it changes is
// saved first and counts then; if it cannot be saved nothing has changed.
func persistentReserveOut(t *task) error {
	u, r := t.u, t.u.reserved
	q, err := u.decodeRequest(t)
	if err != nil {
		return err
	}
	if q.aptpl && r.store == nil {
		return senseParamField
	}
	if err := r.begin(t); err != nil {
		return err
	}
	preempted, err := u.change(t, t.c, q)
	r.end()
	if err != nil || q.action != prPreemptAbort {
		return err
	}
	return u.abortTasks(t, preempted)
}

// change does a service action. The turn to change reservations is held.
func (u *unit) change(ctx context.Context, c *conn, q *prRequest) (preempted []nexus, err error) {
	r := u.reserved
	r.mu.Lock()
	reserved := r.reserver != nil
	r.mu.Unlock()
	if reserved {
		// A RESERVE that came while the parameter list was on its way; from here on none
		// gets the turn.
		return nil, lun.ErrConflict
	}
	old := r.persistent.Load()
	out, err := old.serve(q)
	if err != nil {
		return nil, err
	}
	// What changes nothing is saved as well: it is answered with GOOD, and a Save that
	// failed may have left something else.
	if err := r.save(ctx, out.persistent); err != nil {
		return nil, err
	}
	if out.persistent == old {
		return nil, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publish(out.persistent)
	for _, n := range out.notices {
		u.tell(c.srv, n)
	}
	return out.preempted, nil
}

// tell establishes a unit attention for an I_T nexus, on its sessions or for when it
// returns. reservations.mu is held, so that a session that begins meanwhile meets either.
func (u *unit) tell(s *Server, n notice) {
	connected := false
	for _, o := range s.sessions(u.IQN) {
		if u.nexus(o) != n.nexus {
			continue
		}
		o.mu.Lock()
		if o.arrived && !o.closing && o.units()[u.LUN] == u { // else it finds it when it arrives
			o.attend(u.LUN, n.sense)
			connected = true
		}
		o.mu.Unlock()
	}
	if !connected {
		list, known := u.reserved.departed[n.nexus]
		if !known { // by this start
			list = []sense{attnPowerOn}
		}
		u.reserved.remember(n.nexus, establish(slices.Clone(list), n.sense))
	}
}

// abortTasks ends the tasks that preempted I_T nexuses have in the unit, all but t, and
// their copies that reach it, and returns when they have ended (SPC-4 5.12.11.5).
func (u *unit) abortTasks(t *task, preempted []nexus) error {
	b := &barrier{}
	for _, o := range t.c.srv.sessions(u.IQN) {
		if !slices.Contains(preempted, u.nexus(o)) {
			continue
		}
		o.mu.Lock()
		for _, x := range o.tasks {
			if x == t || x.u != u && !slices.Contains(x.reaches, u) {
				continue
			}
			of := x.u.LUN
			x.join(b)
			x.abort()
			if o != t.c && !o.closing {
				o.attend(of, attnCleared)
			}
		}
		o.mu.Unlock()
	}
	ended := make(chan struct{})
	b.arm(func() { close(ended) })
	select {
	case <-ended:
		return nil
	case <-t.Done():
		return t.Err()
	}
}

// decodeRequest reads CDB and parameter list (SPC-4 6.16.3, 6.16.4).
func (u *unit) decodeRequest(t *task) (*prRequest, error) {
	list := t.out
	q := &prRequest{
		action: t.cdb[1] & 0x1f, scope: t.cdb[2] >> 4, kind: t.cdb[2] & 0xf,
		key: binary.BigEndian.Uint64(list), newKey: binary.BigEndian.Uint64(list[8:]),
		from: u.nexus(t.c),
	}
	groups := u.portGroups(t.c.srv)
	if q.action == prRegisterAndMove {
		q.unregister, q.aptpl = list[17]&2 != 0, list[17]&1 != 0
		ids, err := transportIDs(u, list[24:], binary.BigEndian.Uint32(list[20:]))
		if err != nil {
			return nil, err
		}
		if len(ids) != 1 {
			return nil, senseParamField
		}
		q.to = ids[0]
		port := binary.BigEndian.Uint16(list[18:])
		at := slices.IndexFunc(groups, func(g uint16) bool { return u.port(g) == port })
		if at < 0 {
			return nil, senseParamField
		}
		q.to.group = groups[at]
		return q, nil
	}
	specified, allPorts := list[20]&8 != 0, list[20]&4 != 0
	register := q.action == prRegister || q.action == prRegisterAnyhow
	switch {
	case specified && q.action != prRegister:
		return nil, senseParamField
	case !specified && len(list) != prListLength:
		return nil, senseParamLength
	}
	if !register {
		return q, nil // ALL_TG_PT and APTPL are ignored
	}
	q.aptpl = list[20]&1 != 0
	if !allPorts {
		groups = []uint16{q.from.group}
	}
	for _, g := range groups {
		if g != q.from.group {
			n := q.from
			n.group = g
			q.ports = append(q.ports, n)
		}
	}
	if !specified {
		return q, nil
	}
	if len(list) < prListLength+4 {
		return nil, senseParamLength
	}
	q.specifies = true
	ids, err := transportIDs(u, list[28:], binary.BigEndian.Uint32(list[24:]))
	if err != nil {
		return nil, err
	}
	for _, n := range ids {
		if len(q.specified) > mostRegistrations { // more need not be told apart
			return nil, senseNoRegistrations
		}
		for _, g := range groups {
			n.group = g
			if n != q.from && !slices.Contains(q.ports, n) && !slices.Contains(q.specified, n) {
				q.specified = append(q.specified, n)
			}
		}
	}
	return q, nil
}

// portGroups are the target ports through which the unit is reached.
func (u *unit) portGroups(s *Server) []uint16 {
	var all []uint16
	for _, p := range s.cfg.Portals {
		if !slices.Contains(all, p.Group) && u.in(p.Group) {
			all = append(all, p.Group)
		}
	}
	return all
}

// transportIDs reads a list of TransportIDs of iSCSI that is declared to have length
// bytes (SPC-4 7.6.4.6). One without an ISID names no initiator port, so it is good only
// where registrations are those of a name.
func transportIDs(u *unit, b []byte, length uint32) ([]nexus, error) {
	if uint64(length) != uint64(len(b)) {
		return nil, senseParamLength
	}
	var all []nexus
	for len(b) > 0 {
		if len(b) < 24 {
			return nil, senseParamField
		}
		n := int(binary.BigEndian.Uint16(b[2:])) + 4
		format := b[0] >> 6
		if b[0]&0xf != 5 || format > 1 || n%4 != 0 || n < 24 || n > len(b) {
			return nil, senseParamField
		}
		name, rest, ended := bytes.Cut(b[4:n], []byte{0})
		if !ended || len(bytes.Trim(rest, "\x00")) > 0 {
			return nil, senseParamField
		}
		var id nexus
		if format == 1 {
			var digits []byte
			if name, digits, ended = bytes.Cut(name, []byte(",i,0x")); !ended || !parseISID(&id.isid, digits) {
				return nil, senseParamField
			}
		} else if !u.ReservationsByName {
			return nil, senseParamField
		}
		if id.name = fold(string(name)); checkName(string(name)) != nil || checkName(id.name) != nil { // as at login
			return nil, senseParamField
		}
		all = append(all, u.named(id))
		b = b[n:]
	}
	return all, nil
}

// parseISID reads up to 12 hexadecimal digits.
func parseISID(isid *iscsi.ISID, digits []byte) bool {
	if len(digits) == 0 || len(digits) > 2*len(isid) {
		return false
	}
	v := uint64(0)
	for _, d := range digits {
		switch {
		case d >= '0' && d <= '9':
			d -= '0'
		case d|0x20 >= 'a' && d|0x20 <= 'f':
			d = d | 0x20 - 'a' + 10
		default:
			return false
		}
		v = v<<4 | uint64(d)
	}
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	copy(isid[:], b[2:])
	return true
}

// serve works out what a service action makes of the reservations (SPC-4 5.12). An
// outcome with p itself changes nothing.
func (p *persistent) serve(q *prRequest) (*outcome, error) {
	reg := p.find(q.from)
	if q.action == prRegister || q.action == prRegisterAnyhow {
		return p.register(q, reg)
	}
	if reg == nil || reg.key != q.key {
		return nil, lun.ErrConflict
	}
	if q.action != prClear && q.action != prRegisterAndMove && q.action != prRelease && p.establishes(q) {
		if q.scope != 0 || !typeKnown(q.kind) {
			return nil, senseInvalidField
		}
	}
	switch q.action {
	case prReserve:
		if p.kind == 0 {
			out := p.copy()
			out.generation = p.generation // not counted (SPC-4 6.15.2)
			out.hold(q.from, q.kind)
			return out, nil
		}
		if p.holds(reg) && p.kind == q.kind {
			return &outcome{persistent: p}, nil
		}
		return nil, lun.ErrConflict
	case prRelease:
		if !p.holds(reg) {
			return &outcome{persistent: p}, nil
		}
		if q.scope != 0 || q.kind != p.kind {
			return nil, senseInvalidRelease
		}
		out := p.copy()
		out.generation = p.generation
		out.lift(q.from)
		return out, nil
	case prClear:
		out := p.copy()
		for _, r := range out.regs {
			if r.nexus != q.from {
				out.notices = append(out.notices, notice{r.nexus, attnReservationsPreempted})
			}
		}
		out.regs, out.kind = nil, 0
		return out.indexed(), nil
	case prPreempt, prPreemptAbort:
		return p.preempt(q)
	case prRegisterAndMove:
		return p.move(q, reg)
	}
	return nil, senseInvalidField
}

// copy begins an outcome: the same reservations, one generation on.
func (p *persistent) copy() *outcome {
	n := *p
	n.generation++
	n.regs = slices.Clone(p.regs)
	n.byNexus = maps.Clone(p.byNexus)
	return &outcome{persistent: &n}
}

func (o *outcome) indexed() *outcome {
	o.byNexus = make(map[nexus]int, len(o.regs))
	for i, r := range o.regs {
		o.byNexus[r.nexus] = i
	}
	return o
}

// put registers an I_T nexus or changes its key, as long as there are fewer than most.
func (o *outcome) put(n nexus, key uint64, most int) error {
	if r := o.find(n); r != nil {
		r.key = key
		return nil
	}
	if len(o.regs) >= most {
		return senseNoRegistrations
	}
	o.regs = append(o.regs, registration{nexus: n, key: key})
	o.indexed()
	return nil
}

// hold makes n the holder of a reservation.
func (o *outcome) hold(n nexus, kind byte) {
	o.kind = kind
	for i := range o.regs {
		o.regs[i].holder = !allRegistrants(kind) && o.regs[i].nexus == n
	}
}

// lift releases the reservation, of which by needs no telling (SPC-4 5.12.11.2).
func (o *outcome) lift(by nexus) {
	if registrants(o.kind) {
		for _, r := range o.regs {
			if r.nexus != by {
				o.notices = append(o.notices, notice{r.nexus, attnReservationsReleased})
			}
		}
	}
	o.kind = 0
	for i := range o.regs {
		o.regs[i].holder = false
	}
}

// remove takes registrations away; a reservation whose last holder goes with them is
// released (SPC-4 5.12.11.3).
func (o *outcome) remove(by nexus, those func(*registration) bool) (gone []nexus) {
	held := o.kind != 0
	o.regs = slices.DeleteFunc(o.regs, func(r registration) bool {
		if those(&r) {
			gone = append(gone, r.nexus)
			return true
		}
		return false
	})
	o.indexed()
	if held && !slices.ContainsFunc(o.regs, func(r registration) bool { return o.holds(&r) }) {
		o.lift(by)
	}
	return gone
}

// register is REGISTER and REGISTER AND IGNORE EXISTING KEY (SPC-4 5.12.7): all of the
// I_T nexuses or none.
func (p *persistent) register(q *prRequest, reg *registration) (*outcome, error) {
	anyhow := q.action == prRegisterAnyhow
	if !anyhow && (reg == nil && q.key != 0 || reg != nil && reg.key != q.key) {
		return nil, lun.ErrConflict
	}
	if q.specifies && reg != nil {
		return nil, senseInvalidField
	}
	if reg == nil && q.newKey == 0 {
		return &outcome{persistent: p}, nil
	}
	out := p.copy()
	out.aptpl = q.aptpl
	all := append([]nexus{q.from}, q.ports...)
	for _, n := range q.ports {
		if r := p.find(n); r != nil && !anyhow && r.key != q.key {
			return nil, lun.ErrConflict
		}
	}
	if q.newKey == 0 {
		out.remove(q.from, func(r *registration) bool { return slices.Contains(all, r.nexus) })
		return out, nil
	}
	for _, n := range q.specified {
		if p.find(n) != nil {
			return nil, senseParamField
		}
	}
	most := sharedRegistrations
	if !slices.ContainsFunc(p.regs, func(r registration) bool { return r.name == q.from.name }) {
		most = mostRegistrations
	}
	for _, n := range append(all, q.specified...) { // q.from comes first
		if err := out.put(n, q.newKey, most); err != nil {
			return nil, err
		}
		most = sharedRegistrations
	}
	return out, nil
}

// establishes tells whether a service action makes a new reservation: a PREEMPT does
// where its key is that of the holder (SPC-4 5.12.11.4.2).
func (p *persistent) establishes(q *prRequest) bool {
	if q.action == prReserve || p.kind == 0 {
		return q.action == prReserve
	}
	if allRegistrants(p.kind) {
		return q.newKey == 0
	}
	return slices.ContainsFunc(p.regs, func(r registration) bool { return r.holder && r.key == q.newKey })
}

// preempt is PREEMPT and the registrations' part of PREEMPT AND ABORT (SPC-4 5.12.11.4).
func (p *persistent) preempt(q *prRequest) (*outcome, error) {
	if q.newKey == 0 && !(p.kind != 0 && allRegistrants(p.kind)) {
		return nil, senseParamField
	}
	out := p.copy()
	if p.establishes(q) {
		everyone := q.newKey == 0
		// The old reservation ends without a word to those who lose their registration.
		out.kind = 0
		out.preempted = out.remove(q.from, func(r *registration) bool {
			return r.nexus != q.from && (everyone || r.key == q.newKey)
		})
		if p.kind != q.kind {
			for _, r := range out.regs {
				if r.nexus != q.from {
					out.notices = append(out.notices, notice{r.nexus, attnReservationsReleased})
				}
			}
		}
		out.hold(q.from, q.kind)
	} else {
		out.preempted = out.remove(q.from, func(r *registration) bool { return r.key == q.newKey })
		if len(out.preempted) == 0 {
			return nil, lun.ErrConflict
		}
	}
	for _, n := range out.preempted {
		if n != q.from {
			out.notices = append(out.notices, notice{n, attnRegistrationsPreempted})
		}
	}
	return out, nil
}

// move is REGISTER AND MOVE (SPC-4 5.12.8).
func (p *persistent) move(q *prRequest, reg *registration) (*outcome, error) {
	if p.kind == 0 || allRegistrants(p.kind) || !reg.holder {
		return nil, lun.ErrConflict
	}
	if q.newKey == 0 || q.to == q.from {
		return nil, senseParamField
	}
	out := p.copy()
	out.aptpl = q.aptpl
	if q.unregister {
		// The reservation is on its way to another holder: it is not released between.
		out.kind = 0
		out.remove(q.from, func(r *registration) bool { return r.nexus == q.from })
	}
	if err := out.put(q.to, q.newKey, sharedRegistrations); err != nil {
		return nil, err
	}
	out.hold(q.to, p.kind)
	return out, nil
}
