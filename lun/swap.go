package lun

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// Swapper is a Device that can compare blocks with what they are expected to hold and write
// them in one step, which no other command of anybody comes into, on whatever path.
type Swapper interface {
	Device
	// Swap makes the blocks from start on hold what becomes has if they hold what is has,
	// and otherwise writes nothing and gives false. Both are of one length, a multiple of
	// BlockSize. It fails with ErrUnsupported where the device cannot do that for so many
	// blocks. Where the device was away meanwhile, false may be of blocks that this command
	// has written.
	Swap(ctx context.Context, start LBA, is, becomes []byte) (bool, error)
}

// mostSwaps is how often UpdateShared tries anew when another write came between.
const mostSwaps = 100

// UpdateShared is Updater.Update of a device that others write to as well.
func UpdateShared(ctx context.Context, dev Swapper, e Extent, modify func([]byte) error) error {
	size := dev.Info().Bytes(e)
	is := make([]byte, size)
	becomes := make([]byte, size)
	for range mostSwaps {
		if err := dev.ReadAt(ctx, is, e.Start); err != nil {
			return err
		}
		copy(becomes, is)
		if err := modify(becomes); err != nil {
			return err
		}
		if done, err := dev.Swap(ctx, e.Start, is, becomes); done || err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: %v changed each of the %d times that it was to be changed", ErrUnavailable, e, mostSwaps)
}

const (
	opCompareAndWrite = 0x89
	senseMiscompare   = 0xe
)

// Swap implements Swapper by COMPARE AND WRITE (SBC-3 5.2).
func (r *remote) Swap(ctx context.Context, start LBA, is, becomes []byte) (bool, error) {
	e := Extent{start, uint64(len(is)) / uint64(r.info.BlockSize)}
	if err := r.admit(ctx, e, len(is), true); err != nil {
		return false, err
	}
	if e.Empty() {
		return true, nil
	}
	if len(is) != len(becomes) || e.Blocks > uint64(r.limits.maxCompare) {
		return false, fmt.Errorf("%s: COMPARE AND WRITE on %v, of %d blocks at most: %w", r.addr, e, r.limits.maxCompare, ErrUnsupported)
	}
	c := r.get()
	defer r.put(c)
	c.CDB = [16]byte{0: opCompareAndWrite, 13: byte(e.Blocks)}
	binary.BigEndian.PutUint64(c.CDB[2:], uint64(start))
	c.Out = append(append(make([]byte, 0, 2*len(is)), is...), becomes...)
	err := r.run(ctx, c)
	var sense *SenseError
	switch {
	case err == nil:
		return true, nil
	case errors.As(err, &sense) && sense.Key == senseMiscompare:
		return false, nil
	case refused(err):
		return false, fmt.Errorf("%s: COMPARE AND WRITE: %w: %w", r.addr, ErrUnsupported, err)
	}
	return false, r.failed(c, e, err)
}
