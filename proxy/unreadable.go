package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/state"
)

// mostUnreadable bounds the list of runs that the source cannot read. What is beyond
// it is tried again and again, but cannot be given up.
const mostUnreadable = 10000

// Unreadable implements copier.Ledger: bad takes the place of what was known of e.
func (w *pass) Unreadable(ctx context.Context, e lun.Extent, bad []lun.Extent) {
	v := w.v
	if w != v.way() {
		return // a mirror that is behind; its fault shows it
	}
	renew := func(known []state.Run) []state.Run {
		list := append(lun.Subtract(extents(known), e), bad...)
		slices.SortFunc(list, byStart)
		return runs(list[:min(len(list), mostUnreadable)])
	}
	v.mu.Lock()
	known := v.record.Unreadable
	v.mu.Unlock()
	if len(known) == 0 && len(bad) == 0 || slices.Equal(renew(known), known) {
		return
	}
	// A failure is shown, and what is not recorded is found again. Other workers do
	// the same for other extents.
	_ = v.save(ctx, func(r *state.Record) { r.Unreadable = renew(r.Unreadable) })
}

// unreadable gives the runs that the side which is copied from cannot read and no initiator
// wrote since.
func (v *Volume) unreadable() []lun.Extent {
	v.mu.Lock()
	known := v.record.Unreadable
	v.mu.Unlock()
	var left []lun.Extent
	for _, r := range known {
		invalid, err := v.way().invalid(extent(r))
		if err != nil { // shown by the volume; what is not known counts as not read
			invalid = []lun.Extent{extent(r)}
		}
		left = append(left, invalid...)
	}
	return left
}

// onlyUnreadable tells whether all that keeps the volume from being synced is what the
// source cannot read.
func (v *Volume) onlyUnreadable() bool {
	lost, any, w := v.unreadable(), false, v.way()
	for from := uint64(0); ; {
		region, missing := w.flags.Missing(state.Valid, from)
		if !missing {
			return any
		}
		left, err := w.invalid(v.region(region))
		if err != nil {
			return false
		}
		any = any || len(left) > 0
		for _, e := range lost {
			left = lun.Subtract(left, e)
		}
		if len(left) > 0 {
			return false
		}
		from = region + 1
	}
}

// acceptUnreadable gives up what the source cannot read: the blocks read as zeroes
// from here on. The caller holds step.
func (v *Volume) acceptUnreadable(ctx context.Context) error {
	lost := v.unreadable()
	// Before the blocks are valid, so that what was given up is on record for sure.
	err := v.save(ctx, func(r *state.Record) {
		list := append(extents(r.Accepted), lost...)
		slices.SortFunc(list, byStart)
		r.Accepted = runs(list)
	})
	if err != nil {
		return err
	}
	w := v.way()
	for _, e := range lost {
		if err := w.zero(ctx, e); err != nil {
			return v.errorf("give up %v: %w", e, err)
		}
	}
	v.log.Warnf("%d runs of blocks that the %s cannot read were given up; they read as zeroes", len(lost), w.from.role)
	return nil
}

// zero makes the blocks of e that are not valid read as zeroes on the destination, and
// valid.
func (w *pass) zero(ctx context.Context, e lun.Extent) error {
	for range mostRepeats {
		release, err := w.Exclude(ctx, e)
		if err != nil {
			return err
		}
		var zeroed []copier.Copied
		era := w.Begin(e)
		parts, err := w.Invalid(e)
		for _, part := range parts {
			err = errors.Join(err, w.to.WriteZeroes(ctx, part))
			zeroed = append(zeroed, copier.Copied{Extent: part, Era: era})
		}
		release()
		if err == nil {
			err = w.Commit(ctx, zeroed)
		}
		if err != nil {
			return err
		}
		if left, err := w.Invalid(e); err != nil || len(left) == 0 {
			return err
		}
	}
	return fmt.Errorf("%s: lost its cache %d times: %w", w.to.role, mostRepeats, lun.ErrUnavailable)
}

func byStart(a, b lun.Extent) int { return cmp.Compare(a.Start, b.Start) }

func extents(list []state.Run) []lun.Extent {
	out := make([]lun.Extent, len(list))
	for i, r := range list {
		out[i] = extent(r)
	}
	return out
}

func runs(list []lun.Extent) []state.Run {
	out := make([]state.Run, len(list))
	for i, e := range list {
		out[i] = run(e)
	}
	return out
}

// shown gives runs as people see them, and their size in bytes.
func (v *Volume) shown(list []lun.Extent) (out []BlockRun, size uint64) {
	out = []BlockRun{}
	for _, e := range list {
		out = append(out, BlockRun{LBA: uint64(e.Start), Blocks: e.Blocks})
		size += v.info.Bytes(e)
	}
	return out, size
}
