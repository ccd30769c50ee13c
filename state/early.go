package state

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// settleDelay is how long notes gather before they go into the database together, as
	// its syncs and those of the journal hold each other up. Who waits for one of them does
	// not wait for this.
	settleDelay = 100 * time.Millisecond
	// settleAt is how many notes do not wait for others.
	settleAt = 1024
	// mostEarly bounds the notes that the database does not have yet, of all volumes.
	mostEarly = 4096
	// wideNote is of how many regions a note is that is looked at for every block.
	wideNote = 8
)

// note is flags that are in the journal and not in the database yet.
type note struct {
	f       *Flags
	clear   bool // the flags are taken away
	kinds   Kinds
	runs    []Run
	entry   *entry
	settled chan struct{} // closed when the database has it
}

// early are the notes of one volume, which readers see as they see its flags.
type early struct {
	count atomic.Int64

	mu    sync.RWMutex       // guards all below
	near  map[uint64][]*note // by the regions they concern
	wide  []*note            // those that concern many
	clear bool               // that the notes do, all of them: they are of one turn
	shift uint               // log2 of the blocks of a region
}

// regions calls each for the regions that n concerns, and reports false for a wide note.
func (y *early) regions(n *note, each func(g uint64)) bool {
	count := 0
	for _, r := range n.runs {
		if r.Blocks > 0 {
			count += int(min((r.end()-1)>>y.shift-r.Start>>y.shift, wideNote)) + 1
		}
	}
	if count > wideNote {
		return false
	}
	for _, r := range n.runs {
		for g := r.Start >> y.shift; r.Blocks > 0 && g <= (r.end()-1)>>y.shift; g++ {
			each(g)
		}
	}
	return true
}

func (y *early) add(n *note) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.count.Add(1)
	y.clear = n.clear
	if !y.regions(n, func(g uint64) { y.near[g] = append(y.near[g], n) }) {
		y.wide = append(y.wide, n)
	}
}

// remove takes notes out that the database has; readers find the flags there by now. In
// one with that the notes leave their turn, so that who finds none left can turn, and who
// notes in the next turn finds none left.
func (y *early) remove(gone []*note) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, n := range gone {
		is := func(m *note) bool { return m == n }
		near := y.regions(n, func(g uint64) {
			if left := slices.DeleteFunc(y.near[g], is); len(left) > 0 {
				y.near[g] = left
			} else {
				delete(y.near, g)
			}
		})
		if !near {
			y.wide = slices.DeleteFunc(y.wide, is)
		}
	}
	for _, n := range gone {
		n.f.leave()
	}
	y.count.Add(-int64(len(gone)))
}

// each calls do with every note that may concern a block of r, some of them more than
// once; mu is held.
func (y *early) each(r Run, do func(*note)) {
	for _, n := range y.wide {
		do(n)
	}
	if r.Blocks == 0 {
		return
	}
	first, last := r.Start>>y.shift, (r.end()-1)>>y.shift
	if last-first < uint64(len(y.near)) {
		for g := first; g <= last; g++ {
			for _, n := range y.near[g] {
				do(n)
			}
		}
		return
	}
	for g, notes := range y.near {
		if g >= first && g <= last {
			for _, n := range notes {
				do(n)
			}
		}
	}
}

// within gives the parts of r that notes give a kind of k, or take it from where clear is
// true, in order and apart.
func (y *early) within(k Kinds, r Run) (runs []Run, clear bool) {
	if y.count.Load() == 0 {
		return nil, false
	}
	y.mu.RLock()
	defer y.mu.RUnlock()
	return y.joined(k, r), y.clear
}

// joined is within without clear; mu is held.
func (y *early) joined(k Kinds, r Run) (runs []Run) {
	y.each(r, func(n *note) {
		if n.kinds&k == 0 {
			return
		}
		for _, m := range n.runs {
			if start, end := max(m.Start, r.Start), min(m.end(), r.end()); start < end {
				runs = append(runs, Run{start, end - start})
			}
		}
	})
	if len(runs) < 2 {
		return runs
	}
	slices.SortFunc(runs, func(a, b Run) int { return cmp.Compare(a.Start, b.Start) })
	apart := runs[:1]
	for _, m := range runs[1:] {
		if last := &apart[len(apart)-1]; m.Start <= last.end() {
			last.Blocks = max(last.end(), m.end()) - last.Start
		} else {
			apart = append(apart, m)
		}
	}
	return apart
}

// over gives the notes that concern a block of r, some of them more than once.
func (y *early) over(r Run) (notes []*note) {
	if y.count.Load() == 0 {
		return nil
	}
	y.mu.RLock()
	defer y.mu.RUnlock()
	y.each(r, func(n *note) {
		if slices.ContainsFunc(n.runs, func(m Run) bool { return m.Start < r.end() && r.Start < m.end() }) {
			notes = append(notes, n)
		}
	})
	return notes
}

// Note gives the blocks of the runs the kinds in k, as Set does, or in a backward turn
// takes them away, as Clear does, but by the journal: it returns once the journal holds that on stable storage and readers see
// it, and the database has it some milliseconds later (Await). It takes about one fdatasync.
// Of more than MostSums runs it is Set or Clear.
//
// On an error none of this call's flags is visible; after a crash they may be.
func (f *Flags) Note(ctx context.Context, k Kinds, runs ...Run) error {
	runs = slices.DeleteFunc(slices.Clone(runs), func(r Run) bool { return r.Blocks == 0 && f.holds(r) })
	if len(runs) == 0 || len(runs) > MostSums {
		return f.change(ctx, k, f.Backward(), runs)
	}
	if err := f.checkRuns(k, runs); err != nil {
		return err
	}
	if err := f.enter(); err != nil {
		return wrap(f.volume, "note flags", err)
	}
	e := &entry{kind: noteEntry, turn: f.turnID(), kinds: k}
	for _, r := range runs {
		e.sums = append(e.sums, Sum{Run: r})
	}
	if err := f.journal(ctx, e); err != nil {
		f.leave()
		return wrap(f.volume, "note flags", err)
	}
	f.take(e)
	return nil
}

// take makes what the journal holds visible and has it settled; the turn is left then.
func (f *Flags) take(e *entry) {
	f.store.settler.take(&note{
		f: f, clear: f.Backward(), kinds: e.kinds, runs: e.runs(), entry: e, settled: make(chan struct{}),
	})
}

// Intent is a write that is under way to blocks that are not valid. Either Keep or Withdraw
// ends it.
type Intent struct {
	f     *Flags
	entry *entry
}

// Intend makes durable what a write is going to leave in blocks that are not valid, so
// that the write itself can be under way at the same time: after a crash, whoever opens the
// volume compares the destination with the sums and so learns whether the write was
// finished (Unproven). There are 1 to MostSums sums. In a backward turn it is the same of the
// source, and of blocks that are valid or dirty.
//
// Until the flags of a kept intent are in the database (Await), nothing else may be
// written to its blocks: the content would not match, and the write be taken for unfinished.
func (f *Flags) Intend(ctx context.Context, sums ...Sum) (*Intent, error) {
	if len(sums) == 0 || len(sums) > MostSums {
		return nil, fmt.Errorf("volume %s: intend %d runs: want 1 to %d", f.volume, len(sums), MostSums)
	}
	if slices.ContainsFunc(sums, func(s Sum) bool { return s.Blocks == 0 }) {
		return nil, fmt.Errorf("volume %s: intend a run of no blocks", f.volume)
	}
	i := &Intent{f, &entry{
		kind: intentEntry, number: f.store.settler.numbers.Add(1),
		kinds: Valid | Dirty, sums: slices.Clone(sums),
	}}
	if err := f.checkRuns(Valid|Dirty, i.entry.runs()); err != nil {
		return nil, err
	}
	if err := f.enter(); err != nil {
		return nil, wrap(f.volume, "intend a write", err)
	}
	i.entry.turn = f.turnID()
	if err := f.store.journal.admit(ctx, i.entry); err != nil {
		f.leave()
		return nil, wrap(f.volume, "intend a write", err)
	}
	if err := f.journal(ctx, i.entry); err != nil {
		f.leave()
		f.store.journal.keep(i.entry)
		return nil, wrap(f.volume, "intend a write", err)
	}
	return i, nil
}

// Keep says that the destination has the content on stable storage: from its return on
// the blocks are valid and dirty. In a backward turn it is the source, and they are neither.
func (i *Intent) Keep() {
	i.f.store.journal.keep(i.entry)
	i.f.take(i.entry)
}

// Withdraw says that the write failed. Once it returns nil, whatever the destination holds
// will not be taken for it. Where the journal has no room, it fails with ErrNoSpace and
// is made again by itself once there is some.
func (i *Intent) Withdraw() error {
	err := i.withdraw()
	switch {
	case errors.Is(err, ErrForgotten):
		i.f.store.journal.release(i.entry)
	case errors.Is(err, ErrNoSpace):
		i.f.store.settler.again(i)
	}
	return wrap(i.f.volume, "withdraw a write", err)
}

// withdraw tries it once.
func (i *Intent) withdraw() error {
	err := i.f.journal(context.Background(), &entry{kind: withdrawEntry, number: i.entry.number, turn: i.entry.turn, ends: i.entry})
	if err == nil {
		i.f.leave()
	}
	return err
}

// journal appends an entry of these flags.
func (f *Flags) journal(ctx context.Context, e *entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if f.gone.Load() {
		return ErrForgotten
	}
	// A withdrawal leaves less to be settled.
	if e.kind != withdrawEntry {
		if err := f.store.checkFree(); err != nil {
			return err
		}
		if err := f.store.settler.room(ctx, f); err != nil {
			return err
		}
	}
	return f.store.journal.append(e)
}

func (f *Flags) checkRuns(k Kinds, runs []Run) error {
	if k == 0 || k >= 1<<kindCount {
		return fmt.Errorf("volume %s: flags: no such kinds %#x", f.volume, uint8(k))
	}
	for _, r := range runs {
		if !f.holds(r) {
			return fmt.Errorf("volume %s: flags of blocks %d+%d of %d: %w", f.volume, r.Start, r.Blocks, f.geo.Blocks, ErrRange)
		}
	}
	return nil
}

// Unsettled tells whether a flag of a block of r is not in the database yet.
func (f *Flags) Unsettled(r Run) bool { return len(f.early.over(r)) > 0 }

// Await returns once the database has every flag of r that was noted or kept before the
// call. It fails with what keeps flags out of the database, ErrNoSpace, ErrFailed or
// ErrClosed.
func (f *Flags) Await(ctx context.Context, r Run) error {
	for _, n := range f.early.over(r) {
		if err := f.store.settler.await(ctx, n); err != nil {
			return wrap(f.volume, "settle flags", err)
		}
	}
	return nil
}

// settler takes notes from the journal into the database, many at a time.
type settler struct {
	store   *Store
	delay   time.Duration
	numbers atomic.Uint64 // of intents
	wake    chan struct{} // holds a token when notes are to be settled now
	some    chan struct{} // holds a token when there are notes again
	closing chan struct{} // closed: what is left is settled and the settler ends
	stopped chan struct{}

	mu       sync.Mutex // guards all below
	notes    []*note
	pending  int              // notes that are not settled, those of an attempt under way as well
	problem  error            // why the last attempt failed for all
	problems map[*Flags]error // and for one volume alone
	tried    chan struct{}    // closed and replaced after each attempt
	ending   bool
	repeats  sync.WaitGroup // of withdrawals
}

func newSettler(s *Store, delay time.Duration) *settler {
	return &settler{
		store: s, delay: cmp.Or(delay, settleDelay), wake: make(chan struct{}, 1), some: make(chan struct{}, 1), closing: make(chan struct{}),
		stopped: make(chan struct{}), tried: make(chan struct{}),
		problems: make(map[*Flags]error),
	}
}

// take makes the note visible and has it settled by and by.
func (t *settler) take(n *note) {
	t.mu.Lock()
	n.f.early.add(n) // in one with the next, so that who sees it can have it settled
	t.notes = append(t.notes, n)
	t.pending++
	count := len(t.notes)
	t.mu.Unlock()
	switch count {
	case 1:
		select {
		case t.some <- struct{}{}:
		default:
		}
	case settleAt:
		t.now()
	}
}

// now has what there is settled at once.
func (t *settler) now() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// again repeats a withdrawal that found no room.
func (t *settler) again(i *Intent) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ending {
		return
	}
	t.repeats.Go(func() {
		for err := ErrNoSpace; errors.Is(err, ErrNoSpace); err = i.withdraw() {
			t.mu.Lock()
			tried := t.tried
			t.mu.Unlock()
			t.now()
			select {
			case <-tried:
			case <-t.closing:
				return
			}
		}
	})
}

// trouble is why notes of f do not get into the database, or nil; mu is held.
func (t *settler) trouble(f *Flags) error {
	if t.problem != nil {
		return t.problem
	}
	return t.problems[f]
}

// stuck is why the last attempt failed for all, or nil.
func (t *settler) stuck() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.problem
}

// room waits while as many notes as may be wait to be settled.
func (t *settler) room(ctx context.Context, f *Flags) error {
	for {
		t.mu.Lock()
		err, full, tried := t.trouble(f), t.pending >= mostEarly, t.tried
		t.mu.Unlock()
		if err != nil || !full {
			return err
		}
		t.now()
		select {
		case <-tried:
		case <-t.stopped:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// await returns once n is in the database, or with the reason why it does not get there.
func (t *settler) await(ctx context.Context, n *note) error {
	for {
		t.mu.Lock()
		err, tried := t.trouble(n.f), t.tried
		t.mu.Unlock()
		select {
		case <-n.settled:
			return nil
		default:
		}
		if err != nil {
			return err
		}
		t.now()
		select {
		case <-n.settled:
			return nil
		case <-tried:
		case <-t.stopped:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (t *settler) run() {
	defer close(t.stopped)
	due := time.NewTimer(t.delay)
	defer due.Stop()
	for closing := false; !closing; {
		select {
		case <-t.some:
			due.Reset(t.delay)
			continue
		case <-t.wake:
		case <-due.C:
		case <-t.closing:
			closing = true
		}
		if left := t.settle(); left {
			due.Reset(t.delay)
		}
	}
	t.mu.Lock()
	t.ending = true
	t.mu.Unlock()
	t.repeats.Wait()
}

// settle tries to bring every note into the database, and tells whether some are left.
func (t *settler) settle() (left bool) {
	t.mu.Lock()
	notes := t.notes
	t.notes = nil
	t.mu.Unlock()
	type target struct {
		f *Flags
		k Kinds
	}
	requests := map[target]*request{}
	for _, n := range notes {
		at := target{n.f, n.kinds}
		if requests[at] == nil {
			requests[at] = &request{flags: n.f, kinds: n.kinds, clear: n.clear}
		}
		requests[at].runs = append(requests[at].runs, n.runs...)
	}
	var sent sync.WaitGroup
	for _, r := range requests {
		sent.Go(func() { r.err = t.store.submit(context.Background(), r) })
	}
	sent.Wait()

	var problem error
	problems := map[*Flags]error{}
	var staying, apart []*note
	gone := map[*Flags][]*note{}
	for _, n := range notes {
		err := requests[target{n.f, n.kinds}].err
		switch {
		case err == nil || errors.Is(err, ErrForgotten):
			gone[n.f] = append(gone[n.f], n)
			continue
		case errors.Is(err, ErrNoSpace) || errors.Is(err, ErrFailed) || errors.Is(err, ErrClosed):
			problem = err
		default:
			problems[n.f] = err
			apart = append(apart, n)
		}
		staying = append(staying, n)
	}
	if err := t.setApart(apart); err != nil && problem == nil {
		problem = err
	}
	for f, notes := range gone {
		f.early.remove(notes)
		for _, n := range notes {
			close(n.settled)
			t.store.journal.release(n.entry)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if problem != nil && t.problem == nil {
		t.store.log.Errorf("state: flags stay in the journal: %v", problem)
	}
	for f, err := range problems {
		if t.problems[f] == nil {
			t.store.log.Errorf("state: flags are set apart: %v", err)
		}
	}
	t.notes, t.problem, t.problems = append(staying, t.notes...), problem, problems
	for _, notes := range gone {
		t.pending -= len(notes)
	}
	close(t.tried)
	t.tried = make(chan struct{})
	return len(t.notes) > 0
}

// setApart keeps notes that cannot be settled, for a reason of their volume alone, in the
// database as they were in the journal (keepEntries), so that they hold up no other
// volume. They stay visible, and are tried again.
func (t *settler) setApart(notes []*note) error {
	var ops []op
	for _, n := range notes {
		b := n.entry.encode()
		ops = append(ops, op{entryKey(n.f.gen, b), b})
	}
	if err := t.store.submitEntries(ops); err != nil {
		return err
	}
	for _, n := range notes {
		t.store.journal.release(n.entry)
	}
	return nil
}
