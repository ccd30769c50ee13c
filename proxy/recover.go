package proxy

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"lunshift/lun"
	"lunshift/state"
)

// recoverDepth is how many blocks of the destination are looked at at a time.
const recoverDepth = 16

// recover finds out which writes to blocks that were not valid were finished when the
// service ended without a word: those of which the destination has the content. They may
// have been acknowledged, so their blocks become valid; all others were not, and their
// blocks stay with the source. While the destination cannot read one of them nobody can
// tell, and the volume is not served.
func (v *Volume) recover(ctx context.Context) error {
	unproven := v.flags.Unproven()
	if len(unproven) > 0 {
		v.log.Infof("looks which of %d writes under way at the last end the destination has", len(unproven))
	}
	for range mostRepeats {
		era := v.destination.Resets()
		written, err := v.finished(ctx, unproven)
		if err == nil && len(written) > 0 {
			err = v.destinationFlush.Flush(ctx)
		}
		if err != nil {
			return v.errorf("take up writes that were under way: destination: %w", err)
		}
		if v.destination.Resets() == era {
			return v.flags.Prove(ctx, written...)
		}
	}
	return v.errorf("take up writes that were under way: destination: lost its cache %d times meanwhile: %w", mostRepeats, lun.ErrUnavailable)
}

// finished gives the runs whose content is on the destination.
func (v *Volume) finished(ctx context.Context, unproven []state.Sum) (written []state.Run, err error) {
	var mu sync.Mutex // guards written
	var looks errgroup.Group
	looks.SetLimit(recoverDepth)
	for _, s := range unproven {
		looks.Go(func() error {
			e := extent(s.Run)
			if err := v.info.Check(e); err != nil {
				return err
			}
			p := make([]byte, v.info.Bytes(e))
			if err := v.destination.ReadAt(ctx, p, e.Start); err != nil {
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
	return written, looks.Wait()
}
