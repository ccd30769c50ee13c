package proxy

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// engineClients is how many commands of initiators are under way at once, at the most.
const engineClients = 4

// register is one block as initiators see it: every state in which one disk could be after
// what was sent and answered so far. A disk may do a command at any one instant between
// the two.
type register struct {
	states []registerState
	ops    [engineClients]*registerOp // by slot; nil where none is under way
	// kept are the values that a power loss may bring back: what the block may have held at
	// any time since it was last known to be stable.
	kept []uint64
	// failed are writes that failed in this life of the service since the last that did not.
	failed []uint64
}

type registerState struct {
	value uint64
	done  uint8                 // slots of commands that were done
	seen  [engineClients]uint64 // what they found
}

type registerOp struct {
	reads, writes bool
	value         uint64 // written
	lost          bool   // a cache was lost meanwhile, and with it perhaps what it did or saw
	alone         bool   // no other write was under way at any time
	first         bool   // the block was not valid when it was sent
}

func newRegister(value uint64) *register {
	return &register{states: []registerState{{value: value}}, kept: []uint64{value}}
}

// close adds every state that the commands under way can lead to.
func (r *register) close() {
	for i := 0; i < len(r.states); i++ {
		s := r.states[i]
		for slot, op := range r.ops {
			if op == nil || s.done>>slot&1 != 0 {
				continue
			}
			n := s
			n.done |= 1 << slot
			if op.reads {
				n.seen[slot] = s.value
			}
			if op.writes {
				n.value = op.value
			}
			if !slices.Contains(r.states, n) {
				r.states = append(r.states, n)
			}
		}
	}
	r.kept = union(r.kept, r.values())
}

func (r *register) values() (values []uint64) {
	for _, s := range r.states {
		values = union(values, []uint64{s.value})
	}
	return values
}

func union(a, b []uint64) []uint64 {
	for _, v := range b {
		if !slices.Contains(a, v) {
			a = append(a, v)
		}
	}
	return a
}

func (r *register) send(slot int, op registerOp) {
	op.alone = true
	for _, o := range r.ops {
		if o != nil && o.writes && op.writes {
			o.alone, op.alone = false, false
		}
	}
	r.ops[slot] = &op
	r.close()
}

// answer is the command's success; saw is what it found, if it reads.
func (r *register) answer(slot int, saw uint64, durable bool) error {
	op := r.ops[slot]
	before := r.values()
	if !op.lost || op.writes && durable {
		r.states = slices.DeleteFunc(r.states, func(s registerState) bool {
			return s.done>>slot&1 == 0 || op.reads && !op.lost && s.seen[slot] != saw
		})
	}
	if len(r.states) == 0 {
		if op.reads {
			return fmt.Errorf("found version %d where it can be one of %d", saw, before)
		}
		return fmt.Errorf("version %d was acknowledged and cannot be there", op.value)
	}
	if op.writes {
		r.failed = nil
	}
	r.forget(slot)
	if durable {
		r.kept = r.values()
	}
	return nil
}

// fail is the command's failure: it was done or not, and never will be.
func (r *register) fail(slot int) {
	if op := r.ops[slot]; op.writes {
		r.failed = append(r.failed, op.value)
	}
	r.forget(slot)
}

func (r *register) forget(slot int) {
	r.ops[slot] = nil
	old := r.states
	r.states = nil
	for _, s := range old {
		s.done &^= 1 << slot
		s.seen[slot] = 0
		if !slices.Contains(r.states, s) {
			r.states = append(r.states, s)
		}
	}
}

// powerLoss takes back what was not known to be stable.
func (r *register) powerLoss() {
	r.states = nil
	for _, v := range r.kept {
		r.states = append(r.states, registerState{value: v})
	}
	for _, op := range r.ops {
		if op != nil {
			op.lost = true
		}
	}
	r.close()
}

// versionOf is the version of a whole block, as stamp makes it.
func versionOf(p []byte, at uint64) (uint64, error) {
	place, version := binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])
	for i := 16; i < len(p); i += 16 {
		if binary.BigEndian.Uint64(p[i:]) != place || binary.BigEndian.Uint64(p[i+8:]) != version {
			return 0, fmt.Errorf("block %d is torn", at)
		}
	}
	if version != 0 && place != at || version == 0 && place != 0 {
		return 0, fmt.Errorf("block %d holds version %d of block %d", at, version, place)
	}
	return version, nil
}
