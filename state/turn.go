package state

import (
	"context"
	"errors"
	"fmt"
)

// A turn is a time in which all that the journal tells of the flags of a volume has one
// direction: forward, as flags are at first, notes and intents set them; backward they clear
// them. So it does not matter in which order and how often entries of one turn are taken up
// again after a crash, and entries of the turns before must never be: their blocks may have
// gone the other way since. Each entry names its turn, and the header of the flags the
// present one. What is set apart in the database (settler.setApart) names it as well.
//
// Forward, Clear may take Dirty away, which the journal does not tell: an entry from
// before may make the block dirty again after a crash. That is allowed; it costs a copy.

// turnID is what entries of the journal name: the generation, which is random, and the
// turn in one.
func turnID(gen, turn uint64) uint64 { return gen + turn }

func (f *Flags) turnID() uint64 { return turnID(f.gen, f.turn.Load()) }

// Backward tells whether the present turn is one in which notes and intents clear flags.
func (f *Flags) Backward() bool { return f.backward.Load() }

// errTurning is what a call is refused with that comes while a turn begins.
var errTurning = errors.New("a turn begins: try again")

// turning is Flags.open while a turn begins.
const turning = -1

// enter keeps the present turn until leave. Notes and intents keep it until the database
// has them.
func (f *Flags) enter() error {
	for {
		n := f.open.Load()
		if n == turning {
			return errTurning
		}
		if f.open.CompareAndSwap(n, n+1) {
			return nil
		}
	}
}

func (f *Flags) leave() { f.open.Add(-1) }

// Turning is how a Turn changes the flags of one volume.
type Turning struct {
	Flags    *Flags
	Backward bool // the direction of the new turn
}

// Turn begins a new turn of each of the flags, and writes the records, all in one
// transaction. The flags themselves stay; what the journal holds of the turns before counts no
// more, also after a crash. Nothing of the flags may be under way: no call of Set, Clear,
// Note or Prove, no intent, nothing that is unsettled (Await), set apart or unproven. Else
// it is refused. Calls that come meanwhile are refused in turn.
//
// After an error the old turns go on; after ErrFailed a restart tells which.
func (s *Store) Turn(ctx context.Context, turns []Turning, records ...Record) error {
	ops, err := encodeRecords(records)
	if err != nil {
		return err
	}
	for _, t := range turns {
		f := t.Flags
		if f.store != s {
			return fmt.Errorf("volume %s: turn: flags of another state directory", f.volume)
		}
		if !f.open.CompareAndSwap(0, turning) {
			return fmt.Errorf("volume %s: turn: its flags are being changed, or not all of them are settled", f.volume)
		}
		defer f.open.Store(0)
	}
	return s.submit(ctx, &request{turns: turns, records: ops})
}

// turn is Turn.
func (c *committer) turn(r *request) error {
	ops := r.records
	for _, t := range r.turns {
		f := t.Flags
		if f.gone.Load() {
			return wrap(f.volume, "turn", ErrForgotten)
		}
		header, err := f.header(f.turn.Load()+1, t.Backward)
		if err != nil {
			return err
		}
		ops = append(ops, header)
	}
	if err := c.commit(ops); err != nil {
		return err
	}
	for _, t := range r.turns {
		t.Flags.compact = true // as the header says by now
		t.Flags.turn.Add(1)
		t.Flags.backward.Store(t.Backward)
	}
	return nil
}
