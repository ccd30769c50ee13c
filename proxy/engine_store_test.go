package proxy

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"lunshift/state"
)

// engineState is the state of one volume as it is on stable storage, and what a process
// has of it. It keeps the contract of the state package without its files: the engine
// decides when each call takes effect. TestEngineStoreKeepsTheContractOfTheState holds
// both to one test.
type engineState struct {
	call   func(what string, effect func()) error // parks a call; nil does it at once
	record func(r state.Record)                   // is told of each record that is stable

	mu          sync.Mutex
	saved       *state.Record
	geometry    state.Geometry
	flags       [2][]bool       // in the database: valid, dirty
	notes       []*engineNote   // in the journal
	intents     []*engineIntent // in the journal
	unproven    []state.Sum
	unused      []byte
	brought     []bool // made valid by a write, not by a copy
	backward    bool   // notes and intents clear
	reservation []byte
}

type engineNote struct {
	kinds   state.Kinds
	runs    []state.Run
	visible bool
	intent  *engineIntent
}

type engineIntent struct {
	s    *engineState
	sums []state.Sum
}

// reopen is what the next process finds; what the last one still does is in vain.
func (s *engineState) reopen() *engineState {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := &engineState{
		call: s.call, record: s.record, saved: s.saved, geometry: s.geometry,
		flags:    [2][]bool{slices.Clone(s.flags[0]), slices.Clone(s.flags[1])},
		backward: s.backward, unproven: slices.Clone(s.unproven), brought: slices.Clone(s.brought), reservation: s.reservation,
	}
	for _, o := range s.notes {
		if o.intent == nil {
			n.put(o.kinds, o.runs, !n.backward, true)
		}
	}
	for _, i := range s.intents {
		n.unproven = append(n.unproven, i.sums...)
	}
	return n
}

// write does what the database or the journal does with stable storage.
func (s *engineState) write(ctx context.Context, what string, effect func()) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.call == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		effect()
		return nil
	}
	return s.call(what, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		effect()
	})
}

func (s *engineState) put(k state.Kinds, runs []state.Run, value, brought bool) {
	for i := range s.flags {
		if k>>i&1 == 0 {
			continue
		}
		for _, r := range runs {
			for b := r.Start; b < r.Start+r.Blocks; b++ {
				if i == 0 && !s.flags[0][b] {
					s.brought[b] = brought
				}
				s.flags[i][b] = value
			}
		}
	}
}

// settle moves what is visible from the journal into the database; mu is held.
func (s *engineState) settle() {
	s.notes = slices.DeleteFunc(s.notes, func(n *engineNote) bool {
		if n.visible {
			s.put(n.kinds, n.runs, !s.backward, true)
			s.intents = slices.DeleteFunc(s.intents, func(i *engineIntent) bool { return i == n.intent })
		}
		return n.visible
	})
}

func (s *engineState) Record(string) (state.Record, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.saved == nil {
		return state.Record{}, false, nil
	}
	return *s.saved, true, nil
}

func (s *engineState) PutRecords(ctx context.Context, records ...state.Record) error {
	return s.write(ctx, "record "+records[0].Phase, func() {
		s.saved = &records[0]
		if s.record != nil {
			s.record(records[0])
		}
	})
}

func (s *engineState) Turn(ctx context.Context, turns []turning, records ...state.Record) error {
	if len(s.notes)+len(s.intents)+len(s.unproven) > 0 {
		return fmt.Errorf("a turn with %d notes, %d intents, %d unproven", len(s.notes), len(s.intents), len(s.unproven))
	}
	return s.write(ctx, "turn to "+records[0].Phase, func() {
		s.saved, s.backward = &records[0], turns[0].backward
		if s.record != nil {
			s.record(records[0])
		}
	})
}

func (s *engineState) Renew(_ string, instead ...state.Record) error {
	return s.write(context.Background(), "renew", func() {
		s.saved, s.flags, s.notes, s.intents, s.unproven, s.unused, s.backward = nil, [2][]bool{}, nil, nil, nil, nil, false
		if len(instead) > 0 {
			s.saved = &instead[0]
			if s.record != nil {
				s.record(instead[0])
			}
		}
	})
}

func (s *engineState) Forget(volume string, _ ...state.Record) error { return s.Renew(volume) }

func (s *engineState) Identity(context.Context) (state.Identity, error) {
	return state.Identity{1}, nil
}

func (s *engineState) Reservation(string) ([]byte, error) { return s.reservation, nil }

func (s *engineState) PutReservation(ctx context.Context, _ string, data []byte) error {
	return s.write(ctx, "reservation", func() { s.reservation = data })
}

func (s *engineState) Unused(string) ([]byte, error) { return s.unused, nil }

func (s *engineState) PutUnused(ctx context.Context, _ string, data []byte) error {
	return s.write(ctx, "unused", func() { s.unused = data })
}

func (s *engineState) Attach(ctx context.Context, _ string, _ state.Attachment, _ []byte) error {
	return s.write(ctx, "attachment", func() {})
}

func (s *engineState) Flags(_ string, g state.Geometry) (flags, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.geometry = g
	if s.flags[0] == nil {
		s.brought = make([]bool, g.Blocks)
		for i := range s.flags {
			s.flags[i] = make([]bool, g.Blocks)
		}
	}
	return (*engineFlags)(s), nil
}

// engineFlags is the engineState as flags.
type engineFlags engineState

func (f *engineFlags) state() *engineState { return (*engineState)(f) }

// has tells whether a block has one kind; mu is held.
func (f *engineFlags) has(i int, b uint64) bool {
	for _, n := range f.notes {
		if n.visible && n.kinds>>i&1 != 0 && slices.ContainsFunc(n.runs, func(r state.Run) bool { return r.Start <= b && b < r.Start+r.Blocks }) {
			return !f.backward
		}
	}
	return f.flags[i][b]
}

func (f *engineFlags) All(k state.Kinds, r state.Run) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.all(k, r)
}

func (f *engineFlags) all(k state.Kinds, r state.Run) bool {
	for b := r.Start; b < r.Start+r.Blocks; b++ {
		for i := range f.flags {
			if k>>i&1 != 0 && !f.has(i, b) {
				return false
			}
		}
	}
	return true
}

func (f *engineFlags) Any(k state.Kinds, r state.Run) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.any(k, r)
}

func (f *engineFlags) any(k state.Kinds, r state.Run) bool {
	for b := r.Start; b < r.Start+r.Blocks; b++ {
		for i := range f.flags {
			if k>>i&1 != 0 && f.has(i, b) {
				return true
			}
		}
	}
	return false
}

func (f *engineFlags) Runs(k state.Kinds, r state.Run, yield func(state.Run, bool) bool) error {
	f.mu.Lock()
	i := int(k) / 2 // one kind
	has := make([]bool, r.Blocks)
	for b := range has {
		has[b] = f.has(i, r.Start+uint64(b))
	}
	f.mu.Unlock()
	for b := 0; b < len(has); {
		n := b + 1
		for n < len(has) && has[n] == has[b] {
			n++
		}
		if !yield(state.Run{Start: r.Start + uint64(b), Blocks: uint64(n - b)}, has[b]) {
			return nil
		}
		b = n
	}
	return nil
}

func (f *engineFlags) Count(k state.Kinds) (n uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for b := range f.geometry.Blocks {
		if f.has(int(k)/2, b) {
			n++
		}
	}
	return n
}

// region counts by the database alone.
func (f *engineFlags) region(k state.Kinds, g uint64) (have, lack bool) {
	for b := g * f.geometry.RegionBlocks; b < min((g+1)*f.geometry.RegionBlocks, f.geometry.Blocks); b++ {
		if f.flags[int(k)/2][b] {
			have = true
		} else {
			lack = true
		}
	}
	return have, lack
}

func (f *engineFlags) Missing(k state.Kinds, from uint64) (uint64, bool) {
	return f.next(from, func(g uint64) bool { _, lack := f.region(k, g); return lack })
}

func (f *engineFlags) Next(k state.Kinds, from uint64) (uint64, bool) {
	return f.next(from, func(g uint64) bool { have, _ := f.region(k, g); return have })
}

// next is the first region from from on of which is holds.
func (f *engineFlags) next(from uint64, is func(g uint64) bool) (uint64, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for g := from; g*f.geometry.RegionBlocks < f.geometry.Blocks; g++ {
		if is(g) {
			return g, true
		}
	}
	return 0, false
}

func (f *engineFlags) NextPartial(k state.Kinds, from uint64) (uint64, bool) {
	return f.next(from, func(g uint64) bool { have, lack := f.region(k, g); return have && lack })
}

func (f *engineFlags) Clear(ctx context.Context, k state.Kinds, runs ...state.Run) error {
	if len(runs) == 0 {
		return nil
	}
	return f.state().write(ctx, fmt.Sprintf("clear %d %v", k, runs), func() { f.state().put(k, runs, false, false) })
}

func (f *engineFlags) Set(ctx context.Context, k state.Kinds, runs ...state.Run) error {
	if len(runs) == 0 {
		return nil
	}
	return f.state().write(ctx, fmt.Sprintf("set %d %v", k, runs), func() { f.state().put(k, runs, true, k != state.Valid) })
}

func (f *engineFlags) Note(ctx context.Context, k state.Kinds, runs ...state.Run) error {
	n := &engineNote{kinds: k, runs: slices.Clone(runs)}
	err := f.state().write(ctx, fmt.Sprintf("note %d %v", k, runs), func() { f.notes = append(f.notes, n) })
	if err == nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		n.visible = true
	}
	return err
}

func (f *engineFlags) Intend(ctx context.Context, sums ...state.Sum) (intent, error) {
	i := &engineIntent{f.state(), slices.Clone(sums)}
	if err := f.state().write(ctx, fmt.Sprintf("intend %v", i.runs()), func() { f.intents = append(f.intents, i) }); err != nil {
		return nil, err
	}
	return i, nil
}

func (i *engineIntent) runs() (runs []state.Run) {
	for _, s := range i.sums {
		runs = append(runs, s.Run)
	}
	return runs
}

func (i *engineIntent) Keep() {
	i.s.mu.Lock()
	defer i.s.mu.Unlock()
	i.s.notes = append(i.s.notes, &engineNote{kinds: state.Valid | state.Dirty, runs: i.runs(), visible: true, intent: i})
}

func (i *engineIntent) Withdraw() error {
	return i.s.write(context.Background(), fmt.Sprintf("withdraw %v", i.runs()), func() {
		i.s.intents = slices.DeleteFunc(i.s.intents, func(o *engineIntent) bool { return o == i })
	})
}

func (f *engineFlags) Unsettled(r state.Run) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(f.notes, func(n *engineNote) bool {
		return n.visible && slices.ContainsFunc(n.runs, func(m state.Run) bool { return m.Start < r.Start+r.Blocks && r.Start < m.Start+m.Blocks })
	})
}

func (f *engineFlags) Await(ctx context.Context, r state.Run) error {
	if !f.Unsettled(r) {
		return nil
	}
	return f.state().write(ctx, fmt.Sprintf("await %v", r), f.state().settle)
}

func (f *engineFlags) Unproven() (sums []state.Sum) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.unproven {
		if f.backward && f.any(state.Valid|state.Dirty, s.Run) || !f.backward && !f.all(state.Valid|state.Dirty, s.Run) {
			sums = append(sums, s)
		}
	}
	return sums
}

func (f *engineFlags) Prove(ctx context.Context, written ...state.Run) error {
	put := f.Set
	if f.backward {
		put = f.Clear
	}
	if err := put(ctx, state.Valid|state.Dirty, written...); err != nil {
		return err
	}
	f.mu.Lock()
	none := len(f.unproven) == 0
	f.mu.Unlock()
	if none {
		return nil
	}
	return f.state().write(ctx, "proved", func() { f.unproven = nil })
}

// brings tells whether it was a write that made the block valid; mu is held.
func (s *engineState) brings(at uint64) bool {
	if s.flags[0][at] {
		return s.brought[at]
	}
	return (*engineFlags)(s).has(0, at)
}
