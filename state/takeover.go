package state

import (
	"context"
	"errors"
)

// takeOverBytes bounds a transaction of entries; Badger's own bound is 15 % of
// memTableSize.
const takeOverBytes = 1 << 20

// keepEntries puts what the journal held into the database, under the generations of the
// flags: what was noted is set when the flags are loaded, and what was intended is held
// against the destination then. Entries of forgotten flags, of turns before the present
// one and of withdrawn writes are left out.
func (s *Store) keepEntries(entries [][]byte, named map[uint64]uint64) error {
	withdrawn := map[uint64]bool{}
	decoded := make([]entry, len(entries))
	for i, b := range entries {
		e, err := decodeEntry(b)
		if err != nil {
			return damaged(s.dir, err)
		}
		decoded[i] = e
		if e.kind == withdrawEntry {
			withdrawn[e.number] = true
		}
	}
	var ops []op
	for i, e := range decoded {
		gen, now := named[e.turn]
		if e.kind == withdrawEntry || !now || e.kind == intentEntry && withdrawn[e.number] {
			continue
		}
		ops = append(ops, op{entryKey(gen, entries[i]), entries[i]})
	}
	return s.submitEntries(ops)
}

// setNoted sets what the journal had noted, or clears it in a backward turn. Intents wait
// for Prove.
func (f *Flags) setNoted() error {
	var errs []error
	keep := 0
	var settled []op
	for i, e := range f.kept {
		// What was set apart in an earlier turn was settled in that turn.
		if e.turn != f.turnID() {
			settled = append(settled, op{key: f.entries[i]})
			continue
		}
		runs := e.runs()
		if err := f.checkRuns(e.kinds, runs); err != nil {
			errs = append(errs, damaged(f.store.dir, err))
			continue
		}
		if e.kind != noteEntry {
			f.kept[keep], f.entries[keep] = e, f.entries[i]
			keep++
			continue
		}
		errs = append(errs, f.change(context.Background(), e.kinds, f.Backward(), runs))
		settled = append(settled, op{key: f.entries[i]})
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	f.kept, f.entries = f.kept[:keep], f.entries[:keep]
	if keep > 0 {
		f.open.Add(1) // until Prove
	}
	return f.store.submitEntries(settled)
}

// submitEntries writes or deletes entries, in transactions that the database takes. Each
// entry counts for itself.
func (s *Store) submitEntries(ops []op) error {
	for len(ops) > 0 {
		n, size := 0, 0
		for n < len(ops) && (n == 0 || size+len(ops[n].value) <= takeOverBytes) && n < maxBatch {
			size += len(ops[n].value)
			n++
		}
		if err := s.submit(context.Background(), &request{records: ops[:n]}); err != nil {
			return err
		}
		ops = ops[n:]
	}
	return nil
}

// Unproven gives the intents of writes that were under way, or acknowledged a moment
// before, when the service ended without a word: a run whose blocks the destination, or the
// source in a backward turn, holds with that sum was written. Runs that are settled are
// left out. After a Clear of Dirty one may be told again that was settled before; to take
// it for written only makes its blocks dirty again. Nothing may be read or written by these
// flags before Prove. It is for the one who loaded the flags.
func (f *Flags) Unproven() (sums []Sum) {
	for _, e := range f.kept {
		for _, s := range e.sums {
			settled := f.All(Valid|Dirty, s.Run)
			if f.Backward() {
				settled = !f.Any(Valid|Dirty, s.Run)
			}
			if !settled {
				sums = append(sums, s)
			}
		}
	}
	return sums
}

// Prove makes the written runs valid and dirty, or neither in a backward turn, and forgets
// all that was unproven. The destination, or the source, has the runs on stable storage.
func (f *Flags) Prove(ctx context.Context, written ...Run) error {
	if err := f.change(ctx, Valid|Dirty, f.Backward(), written); err != nil {
		return err
	}
	ops := make([]op, len(f.entries))
	for i, key := range f.entries {
		ops[i].key = key
	}
	if err := f.store.submitEntries(ops); err != nil {
		return wrap(f.volume, "prove writes", err)
	}
	if len(f.kept) > 0 {
		f.open.Add(-1)
	}
	f.kept, f.entries = nil, nil
	return nil
}
