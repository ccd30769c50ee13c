package target

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"lunshift/iscsi"
)

// What must hold of reservations after any service action (SPC-4 5.12).
func consistent(p *persistent) error {
	holders := 0
	if len(p.byNexus) != len(p.regs) {
		return fmt.Errorf("%d indexed of %d", len(p.byNexus), len(p.regs))
	}
	for i, r := range p.regs {
		if p.byNexus[r.nexus] != i || r.key == 0 {
			return fmt.Errorf("registration %d: %+v", i, r)
		}
		if r.holder {
			holders++
		}
	}
	switch {
	case p.kind != 0 && len(p.regs) == 0:
		return fmt.Errorf("a reservation of nobody")
	case p.kind == 0 || allRegistrants(p.kind):
		if holders != 0 {
			return fmt.Errorf("type %d with %d holders", p.kind, holders)
		}
	case holders != 1:
		return fmt.Errorf("type %d with %d holders", p.kind, holders)
	}
	return nil
}

func TestReservationsStayConsistentWhateverIsAsked(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	var hosts []nexus
	for n := range 4 {
		hosts = append(hosts, nexus{name: fmt.Sprintf("iqn.2026-11.net.example:%d", n), group: 1})
	}
	kinds := []byte{0, 1, 3, 5, 6, 7, 8}
	p := &persistent{}
	done := map[byte]int{}
	for n := range 30000 {
		q := &prRequest{
			action: byte(rng.IntN(8)), kind: kinds[rng.IntN(len(kinds))], aptpl: rng.IntN(2) == 0,
			from: hosts[rng.IntN(4)], key: uint64(rng.IntN(4)), newKey: uint64(rng.IntN(4)),
			to: hosts[rng.IntN(4)], unregister: rng.IntN(2) == 0,
		}
		if r := p.find(q.from); r != nil && rng.IntN(4) > 0 {
			q.key = r.key
		}
		was, _ := encodeReservations(&persistent{aptpl: true, kind: p.kind, regs: p.regs})
		before := p.generation
		out, err := p.serve(q)
		if now, _ := encodeReservations(&persistent{aptpl: true, kind: p.kind, regs: p.regs}); string(now) != string(was) || p.generation != before {
			t.Fatalf("seed %d step %d: %+v changed the constant %s to %s", seed, n, q, was, now)
		}
		if err != nil {
			continue
		}
		done[q.action]++
		next := out.persistent
		if err := consistent(next); err != nil {
			t.Fatalf("seed %d step %d: %+v of %s: %v", seed, n, q, was, err)
		}
		counted := next != p && q.action != prReserve && q.action != prRelease
		if want := before; next.generation != want && !counted || counted && next.generation != want+1 {
			t.Fatalf("seed %d step %d: %+v: generation %d after %d", seed, n, q, next.generation, before)
		}
		for _, x := range out.notices {
			if x.nexus == q.from {
				t.Fatalf("seed %d step %d: %+v tells its sender", seed, n, q)
			}
			if (x.sense == attnReservationsReleased) != (next.find(x.nexus) != nil) {
				t.Fatalf("seed %d step %d: %+v: %v told %v", seed, n, q, x.nexus, x.sense)
			}
		}
		for _, v := range out.preempted {
			if next.find(v) != nil {
				t.Fatalf("seed %d step %d: %+v leaves %v registered", seed, n, q, v)
			}
		}
		// What is saved comes back.
		data, err := encodeReservations(next)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeReservations(&unit{}, data)
		if err != nil {
			t.Fatalf("seed %d step %d: %s: %v", seed, n, data, err)
		}
		if next.aptpl && len(next.regs) > 0 && (!slices.Equal(back.regs, next.regs) || back.kind != next.kind) {
			t.Fatalf("seed %d step %d: %+v came back as %+v", seed, n, next, back)
		}
		p = next
	}
	for action := range byte(8) {
		if done[action] < 20 {
			t.Errorf("seed %d: action %d was done %d times: the test shows nothing of it", seed, action, done[action])
		}
	}
}

// FuzzReserveOut feeds parameter lists to the decoder and the service actions.
func FuzzReserveOut(f *testing.F) {
	s, err := New(Config{Portals: []Portal{{Address: "127.0.0.1:0"}, {Address: "127.0.0.1:0", Group: 2}}})
	if err != nil {
		f.Fatal(err)
	}
	id := testID(nameB, isidOf(nameB))
	f.Add(byte(prRegister), byte(0), prList(0, 1, flagAllTG|flagAPTPL))
	f.Add(byte(prRegister), byte(0), prList(0, 1, flagSpecIP, append(binary.BigEndian.AppendUint32(nil, uint32(len(id))), id...)...))
	f.Add(byte(prPreempt), byte(1), prList(1, 1, 0))
	move := append(prList(1, 2, 0), id...)
	move[19], move[23] = 1, byte(len(id))
	f.Add(byte(prRegisterAndMove), byte(1), move)
	f.Fuzz(func(t *testing.T, action, kind byte, list []byte) {
		if len(list) < prListLength || len(list) > prListMost {
			return
		}
		for _, byName := range []bool{false, true} {
			u := &unit{Unit: Unit{IQN: iqn, ReservationsByName: byName}}
			u.inq.Store(&inquiryData{})
			u.rules.Store(&rules{})
			c := &conn{srv: s}
			c.initiator, c.isid, c.group = nameA, iscsi.ISID{1}, 1
			x := &task{work: work{u: u, out: list, c: c}}
			x.cdb[1], x.cdb[2] = action, kind
			q, err := u.decodeRequest(x)
			if err != nil {
				continue
			}
			p := &persistent{}
			for range 3 {
				out, err := p.serve(q)
				if err != nil {
					break
				}
				p = out.persistent
				if err := consistent(p); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
