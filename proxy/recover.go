package proxy

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"lunshift/lun"
	"lunshift/state"
)

// recoverDepth is how many blocks of the destination are looked at at a time.
const recoverDepth = 16

// recover finds out which writes to blocks that were not valid were finished when the
// service ended without a word: those of which to has the content. They may
// have been acknowledged, so their blocks become valid; all others were not, and their
// blocks stay with from. While to cannot read one of them nobody can
// tell, and the volume is not served, unless it is told that such a write may be lost
// (Config.Withdraw): then it counts as not finished, and its blocks stay with from.
func (w *pass) recover(ctx context.Context) error {
	v := w.v
	unproven := w.flags.Unproven()
	if len(unproven) > 0 {
		v.log.Infof("looks which of %d writes under way at the last end the %s has", len(unproven), w.to.role)
	}
	for range mostRepeats {
		era := w.to.Resets()
		written, unreadable, err := w.finished(ctx, unproven)
		if err == nil && len(written) > 0 {
			err = w.toFlush.Flush(ctx)
		}
		if err != nil {
			return v.errorf("take up writes that were under way: %s: %w", w.to.role, err)
		}
		if w.to.Resets() != era {
			continue
		}
		for _, r := range unreadable {
			v.log.Warnf("the write of %v, which was under way at the last end and which the %s cannot read, is withdrawn as told: if it was acknowledged it is lost, and the %s's blocks are in its place", extent(r), w.to.role, w.from.role)
		}
		if err := w.flags.Prove(ctx, written...); err != nil {
			return err
		}
		for _, r := range unreadable {
			v.cfg.Withdraw(BlockRun{LBA: r.Start, Blocks: r.Blocks})
		}
		return nil
	}
	return v.errorf("take up writes that were under way: %s: lost its cache %d times meanwhile: %w", w.to.role, mostRepeats, lun.ErrUnavailable)
}

// finished gives the runs whose content is on the destination, and those that it cannot read
// where that is put up with. A destination that does not answer is waited for all the same.
func (w *pass) finished(ctx context.Context, unproven []state.Sum) (written, unreadable []state.Run, err error) {
	v := w.v
	var mu sync.Mutex // guards written and unreadable
	var looks errgroup.Group
	looks.SetLimit(recoverDepth)
	for _, s := range unproven {
		looks.Go(func() error {
			e := extent(s.Run)
			if err := v.info.Check(e); err != nil {
				return err
			}
			p := make([]byte, v.info.Bytes(e))
			err := w.to.ReadAt(ctx, p, e.Start)
			switch medium := lun.MediumError(err); {
			case medium && v.cfg.Withdraw != nil:
				mu.Lock()
				defer mu.Unlock()
				unreadable = append(unreadable, s.Run)
				return nil
			case medium:
				return fmt.Errorf("read %v, which was being written when the service ended: %w: %w: mend the %s, or where it stays unreadable for good let such writes go (lunshift adopt %s --accept-unreadable-writes)", e, lun.ErrUnavailable, err, w.to.role, v.cfg.Name)
			case err != nil:
				return fmt.Errorf("read %v, which was being written when the service ended: %w: %w", e, lun.ErrUnavailable, err)
			}
			if state.SumOf(s.Run, p) == s {
				mu.Lock()
				defer mu.Unlock()
				written = append(written, s.Run)
			}
			return nil
		})
	}
	err = looks.Wait()
	slices.SortFunc(unreadable, func(a, b state.Run) int { return cmp.Compare(a.Start, b.Start) })
	return written, unreadable, err
}
