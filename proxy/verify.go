package proxy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/state"
)

const (
	// verifyChunk is how much of each side is compared at a time, in bytes.
	verifyChunk = 256 << 10
	// verifyDepth is how many chunks are under way.
	verifyDepth = 4
	// mostDifferences is how many differing extents a report lists.
	mostDifferences = 1000
	// sampleLimit bounds the comparison before a cutover.
	sampleLimit = 30 * time.Second
	// differenceLimit bounds the writing of what a comparison found that was ended.
	differenceLimit = 10 * time.Second
)

// VerifyOptions say how much is compared, and how fast.
type VerifyOptions struct {
	// Sample is how many bytes to compare, at places chosen at random; 0 is all.
	Sample uint64 `json:"sample_bytes"`
	// Rate is how many bytes per second are read of each side; 0 is no limit.
	Rate uint64 `json:"rate"`
}

// VerifyReport is the outcome of a comparison of source and destination. Sizes are
// bytes.
type VerifyReport struct {
	StartedAt time.Time `json:"started_at"`
	EndedAt   time.Time `json:"ended_at"`
	// Sample is true where not everything was to be compared.
	Sample bool `json:"sample"`
	// Compared was read of both sides. Unallocated is without storage on both, and so
	// reads as zeroes on both. Unused was free by a file system of the source at the start and was
	// not copied. Written was not compared, as
	// initiators wrote it or it was given up as unreadable.
	Compared    uint64 `json:"compared_bytes"`
	Unallocated uint64 `json:"unallocated_bytes"`
	Unused      uint64 `json:"unused_bytes"`
	Written     uint64 `json:"initiator_written_bytes"`
	// Different is what differs; Extents are the first places, in rising order, and
	// More says that there are others.
	Different uint64     `json:"different_bytes"`
	Extents   []BlockRun `json:"different_extents"`
	More      bool       `json:"more"`
}

// VerifyStatus is how far a comparison is, or how the last one ended. Sizes are bytes.
type VerifyStatus struct {
	Running bool `json:"running"`
	// Total is what is to be looked at, Done what was, while Running.
	Total uint64 `json:"total_bytes,omitempty"`
	Done  uint64 `json:"done_bytes,omitempty"`
	// Last is the last comparison that came to its end; null where there was none.
	Last *state.Verified `json:"last"`
	// LastAll is the last of everything, LastSample that of a part; null where there was none.
	LastAll    *state.Verified `json:"last_all"`
	LastSample *state.Verified `json:"last_sample"`
}

// verification is one comparison under way.
type verification struct {
	v        *Volume
	throttle *copier.Throttle
	accepted []lun.Extent // what the source cannot read
	total    atomic.Uint64
	looked   atomic.Uint64

	mu     sync.Mutex // protects report
	report VerifyReport

	sums *summing // nil where a part is compared
}

// Verify compares source and destination block by block while initiators go on,
// leaving out what they wrote since the start: what differs elsewhere was copied
// wrongly, or was changed behind lunshift's back. Only in phase synced, one at a time.
// It changes nothing. An error says that it did not come to its end.
//
// Where everything is compared its checksums are kept (ReadChecksums).
func (v *Volume) Verify(ctx context.Context, o VerifyOptions) (VerifyReport, error) {
	if v.Phase() != Synced {
		return VerifyReport{}, v.notAllowed("verify", fmt.Sprintf("source and destination are compared in phase %s", Synced))
	}
	if o.Sample >= v.info.Size() {
		o.Sample = 0
	}
	x := &verification{v: v, throttle: copier.NewThrottle(o.Rate)}
	v.mu.Lock()
	x.accepted = extents(v.record.Accepted)
	v.mu.Unlock()
	x.report = VerifyReport{StartedAt: time.Now(), Sample: o.Sample > 0, Extents: []BlockRun{}}
	if !v.verifying.CompareAndSwap(nil, x) {
		return VerifyReport{}, v.errorf("a comparison is under way already: wait for its end (lunshift status %s)", v.cfg.Name)
	}
	defer v.verifying.Store(nil)
	if err := x.run(ctx, o.Sample); err != nil {
		return VerifyReport{}, errors.Join(v.errorf("verify: %w", err), x.keepDifference(ctx))
	}
	x.report.EndedAt = time.Now()
	slices.SortFunc(x.report.Extents, func(a, b BlockRun) int { return cmp.Compare(a.LBA, b.LBA) })
	r := x.report
	var unkept error
	if x.sums != nil {
		unkept = x.keepChecksums(ctx)
	}
	err := v.save(ctx, func(rec *state.Record) {
		rec.Verified = r.verified(r.EndedAt)
		if r.Sample {
			rec.VerifiedSample = rec.Verified
		} else {
			rec.VerifiedAll = rec.Verified
		}
		switch {
		case r.Different > 0:
			rec.Different = rec.Verified
		case !r.Sample:
			rec.Different = nil
		}
	})
	v.showDifference()
	return r, errors.Join(unkept, err)
}

// verified is what the state keeps of a comparison.
func (r VerifyReport) verified(at time.Time) *state.Verified {
	return &state.Verified{At: at, Sample: r.Sample, ComparedBytes: r.Compared, DifferentBytes: r.Different,
		UnallocatedBytes: r.Unallocated, UnusedBytes: r.Unused, WrittenBytes: r.Written}
}

// keepDifference keeps what a comparison found that did not come to its end.
func (x *verification) keepDifference(ctx context.Context) error {
	var found *state.Verified
	x.count(func(r *VerifyReport) { found = r.verified(time.Now()) })
	if found.DifferentBytes == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), differenceLimit)
	defer cancel()
	err := x.v.save(ctx, func(r *state.Record) { r.Different = found })
	x.v.showDifference()
	return err
}

// difference is what a comparison found, as long as it counts; nil where nothing is known to differ.
func (v *Volume) difference() error {
	v.mu.Lock()
	d := v.record.Different
	v.mu.Unlock()
	if d == nil || v.Phase() != Synced {
		return nil
	}
	of := "everything"
	if d.Sample {
		of = "a sample"
	}
	return fmt.Errorf("%d bytes differed between source and destination when %s was compared at %s: compare everything again (lunshift verify %s), go back (lunshift rollback %s), or take the destination as it is (lunshift cutover %s --no-verify)",
		d.DifferentBytes, of, d.At.Format(time.RFC3339), v.cfg.Name, v.cfg.Name, v.cfg.Name)
}

// showDifference has the status show it.
func (v *Volume) showDifference() {
	v.showing.Lock()
	defer v.showing.Unlock()
	v.fault("comparison", v.difference())
}

// run compares what has storage on either side.
func (x *verification) run(ctx context.Context, sample uint64) error {
	runs, err := x.allocated(ctx)
	if err != nil {
		return err
	}
	bs := uint64(x.v.info.BlockSize)
	var stored, blocks, chunks uint64
	for _, r := range runs {
		stored += r.Blocks
	}
	runs = lun.Without(runs, x.v.leftOut())
	for _, r := range runs {
		blocks += r.Blocks
		chunks += (r.Blocks + verifyChunk/bs - 1) / (verifyChunk / bs)
	}
	x.report.Unallocated, x.report.Unused = (x.v.info.Blocks-stored)*bs, (stored-blocks)*bs
	x.total.Store(blocks * bs)
	var chosen map[uint64]bool // by number; nil is all
	if n := (sample + verifyChunk - 1) / verifyChunk; sample > 0 && n < chunks {
		chosen = make(map[uint64]bool, n)
		for uint64(len(chosen)) < n {
			chosen[rand.Uint64N(chunks)] = true
		}
		x.total.Store(n * verifyChunk)
	}
	if sample == 0 {
		x.sums = newSumming(x.v.info, x.v.raw().Any, x.v.leftOut(), x.accepted)
	}
	parts, gctx := errgroup.WithContext(ctx)
	parts.SetLimit(verifyDepth)
	number := uint64(0)
	// Chunks are compared side by side and summed up one after another: each waits for the one
	// before it, which was begun earlier and so does not wait for it.
	before := make(chan struct{})
	close(before)
	for _, r := range runs {
		for ; !r.Empty() && gctx.Err() == nil; number++ {
			c := lun.Extent{Start: r.Start, Blocks: min(r.Blocks, verifyChunk/bs)}
			r.Start, r.Blocks = c.End(), r.Blocks-c.Blocks
			if chosen != nil && !chosen[number] {
				continue
			}
			summed, last := make(chan struct{}), before
			before = summed
			parts.Go(func() error {
				defer x.looked.Add(c.Blocks * bs)
				defer close(summed)
				content, uncovered, err := x.chunk(gctx, c)
				if err != nil || x.sums == nil {
					return err
				}
				select {
				case <-last:
					x.sums.add(c, content, uncovered)
					return nil
				case <-gctx.Done():
					return gctx.Err()
				}
			})
		}
	}
	return parts.Wait()
}

// allocated gives the runs that have storage on either side, in rising order. What
// initiators allocate meanwhile they wrote, and so it is left out either way.
func (x *verification) allocated(ctx context.Context) ([]lun.Extent, error) {
	var both []lun.Extent
	for _, u := range []*unit{x.v.source, x.v.destination} {
		info := u.Info()
		all := x.v.info.All()
		if !info.ReportsAllocation || !info.UnmapZeroes {
			return []lun.Extent{all}, nil
		}
		m, err := copier.Survey(ctx, u, all, nil)
		if err != nil {
			return nil, err
		}
		both = append(both, m.Within(all)...)
	}
	slices.SortFunc(both, byStart)
	merged := both[:0]
	for _, e := range both {
		if n := len(merged); n > 0 && e.Start <= merged[n-1].End() {
			merged[n-1].Blocks = max(merged[n-1].Blocks, uint64(e.End()-merged[n-1].Start))
			continue
		}
		merged = append(merged, e)
	}
	return merged, nil
}

// chunk compares what initiators did not write of e. It gives the content of e where all of it
// is equal, and otherwise says why there is none that counts.
func (x *verification) chunk(ctx context.Context, e lun.Extent) (content []byte, uncovered string, err error) {
	clean, err := x.clean(e)
	if err != nil {
		return nil, "", err
	}
	left := e.Blocks
	for _, c := range clean {
		left -= c.Blocks
		if err := x.throttle.Wait(ctx, int(x.v.info.Bytes(c))); err != nil {
			return nil, "", err
		}
		read, differ, err := x.differ(ctx, c, false)
		if err != nil {
			return nil, "", err
		}
		x.count(func(r *VerifyReport) { r.Compared += x.v.info.Bytes(c) })
		content = append(content, read...)
		for _, d := range differ {
			uncovered = UncoveredDifferent
			if err := x.again(ctx, d); err != nil {
				return nil, "", err
			}
		}
	}
	if left > 0 {
		uncovered = UncoveredWritten
	}
	x.count(func(r *VerifyReport) { r.Written += left * uint64(x.v.info.BlockSize) })
	if uncovered != "" {
		return nil, uncovered, nil
	}
	return content, "", nil
}

// again compares e once more with writes to it kept out, and enters what differs and is not
// dirty: a write between the look at the flags and the reads may have come to both sides by
// now, in one after the other.
func (x *verification) again(ctx context.Context, e lun.Extent) error {
	_, differ, err := x.differ(ctx, e, true)
	if err != nil {
		return err
	}
	for _, d := range differ {
		still, err := x.clean(d)
		if err != nil {
			return err
		}
		x.differs(still)
	}
	return nil
}

// clean gives the runs of e that no initiator wrote and that were not given up.
func (x *verification) clean(e lun.Extent) ([]lun.Extent, error) {
	out := []lun.Extent{}
	err := x.v.raw().Runs(state.Dirty, run(e), func(r state.Run, dirty bool) bool {
		if !dirty {
			out = append(out, extent(r))
		}
		return true
	})
	if err != nil {
		return nil, x.v.unknown(err)
	}
	for _, lost := range x.accepted {
		out = lun.Subtract(out, lost)
	}
	return out, nil
}

// differ reads e of both sides, alone with no write to it beside, and gives what the destination
// has and the runs in which they differ.
func (x *verification) differ(ctx context.Context, e lun.Extent, alone bool) (read []byte, out []lun.Extent, err error) {
	v := x.v
	if err := v.gate.enter(ctx); err != nil {
		return nil, nil, err
	}
	defer v.gate.leave()
	if v.Phase() != Synced {
		return nil, nil, fmt.Errorf("the volume is in phase %s now", v.Phase())
	}
	if alone {
		held, err := v.writes.Lock(ctx, e)
		if err != nil {
			return nil, nil, err
		}
		defer v.writes.Unlock(held)
	}
	n := v.info.Bytes(e)
	a, b := make([]byte, n), make([]byte, n)
	sides, gctx := errgroup.WithContext(ctx)
	sides.Go(func() error { return v.source.ReadAt(gctx, a, e.Start) })
	sides.Go(func() error { return v.destination.ReadAt(gctx, b, e.Start) })
	if err := sides.Wait(); err != nil {
		return nil, nil, err
	}
	if bytes.Equal(a, b) {
		return b, nil, nil
	}
	bs := uint64(v.info.BlockSize)
	for i := range e.Blocks {
		if !bytes.Equal(a[i*bs:(i+1)*bs], b[i*bs:(i+1)*bs]) {
			out = lun.Join(out, lun.Extent{Start: e.Start + lun.LBA(i), Blocks: 1})
		}
	}
	return b, out, nil
}

// differs enters runs that differ in the report.
func (x *verification) differs(runs []lun.Extent) {
	x.count(func(r *VerifyReport) {
		for _, d := range runs {
			r.Different += x.v.info.Bytes(d)
			if len(r.Extents) < mostDifferences {
				r.Extents = append(r.Extents, BlockRun{LBA: uint64(d.Start), Blocks: d.Blocks})
			} else {
				r.More = true
			}
		}
	})
}

// count changes the report.
func (x *verification) count(do func(*VerifyReport)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	do(&x.report)
}

// verified is the state of the comparison for Status; v.mu is held.
func (v *Volume) verified() *VerifyStatus {
	s := &VerifyStatus{Last: v.record.Verified, LastAll: v.record.VerifiedAll, LastSample: v.record.VerifiedSample}
	if x := v.verifying.Load(); x != nil {
		s.Running, s.Total, s.Done = true, x.total.Load(), x.looked.Load()
	} else if s.Last == nil {
		return nil
	}
	return s
}

// verifySample compares a part before a cutover, as far as it comes within
// sampleLimit, and refuses where it differs.
func (v *Volume) verifySample(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, sampleLimit)
	defer cancel()
	r, err := v.Verify(ctx, VerifyOptions{Sample: v.set().VerifySample})
	switch {
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil:
		v.log.Warnf("the sample before the cutover was not compared within %v", sampleLimit)
		return v.difference() // that it found until then
	case err != nil:
		return fmt.Errorf("a sample of source and destination could not be compared: %w", err)
	case r.Different > 0:
		return v.refuse("%d bytes of a sample of %d differ between source and destination, first at LBA %d: compare everything (lunshift verify %s); somebody may have written to one of them", r.Different, r.Compared, r.Extents[0].LBA, v.cfg.Name)
	}
	return nil
}

func (v *Volume) refuse(format string, args ...any) error {
	return &Refusal{fmt.Sprintf("volume %s: "+format, append([]any{v.cfg.Name}, args...)...)}
}
