package torture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"lunshift/lun"
)

// Operation codes that the load sends (SBC-3 5.1).
const (
	opRead16         = 0x88
	opWrite16        = 0x8a
	opCompareWrite   = 0x89
	opWriteSame16    = 0x93
	opUnmap          = 0x42
	opSyncCache16    = 0x91
	fua              = 0x08 // byte 1 of READ, WRITE and COMPARE AND WRITE
	unmapBit         = 0x08 // byte 1 of WRITE SAME
	senseMiscompare  = 0xe
	senseAttention   = 0x6
	senseAborted     = 0xb
	senseNotReady    = 0x2
	longestTransfer  = 256 << 10
	longestCompare   = 4 // blocks
	verificationRead = 256 << 10
)

// mayBeCopied is where the copier has not come, which was paused at once, in bytes.
const mayBeCopied = 64 * regionSize

var (
	// errGone: nobody answered; whether the command was done is not known.
	errGone = errors.New("no answer")
	// errMiscompare: COMPARE AND WRITE found something else, and wrote nothing.
	errMiscompare = errors.New("miscompare")
)

// host is an initiator that sends CDBs as they are.
type host struct{ *lun.Initiator }

// do sends a command until it is taken. Errors are errGone, errMiscompare, or what makes
// a command fail that must not.
func (h host) do(ctx context.Context, op, flags byte, lba uint64, blocks uint32, out, in []byte) error {
	c := lun.Command{Out: out, In: in}
	c.CDB[0], c.CDB[1] = op, flags
	switch op {
	case opUnmap:
		binary.BigEndian.PutUint16(c.CDB[7:], uint16(len(out)))
	case opCompareWrite:
		binary.BigEndian.PutUint64(c.CDB[2:], lba)
		c.CDB[13] = byte(blocks)
	default:
		binary.BigEndian.PutUint64(c.CDB[2:], lba)
		binary.BigEndian.PutUint32(c.CDB[10:], blocks)
	}
	for deadline := time.Now().Add(patience); ; {
		if err := h.Do(ctx, &c); err != nil {
			return fmt.Errorf("%w: %w", errGone, err)
		}
		switch c.Status {
		case 0:
			if c.Residual != 0 || len(in) > 0 && c.Received != len(in) {
				return fmt.Errorf("GOOD with residual %d, %d of %d bytes received", c.Residual, c.Received, len(in))
			}
			return nil
		case 2:
			sense := c.CheckSense()
			switch {
			case sense.Key == senseMiscompare:
				return errMiscompare
			case sense.Key == senseAttention, sense.Key == senseAborted, sense.Key == senseNotReady:
			default:
				return sense
			}
		case 0x08, 0x28, 0x40: // BUSY, TASK SET FULL, TASK ABORTED
		default:
			return fmt.Errorf("status %02Xh", c.Status)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: not taken for %v, status %02Xh", errGone, patience, c.Status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", errGone, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// client owns a range of blocks and has one command at a time.
type client struct {
	id           int
	o            *oracle
	from, blocks uint64 // its range
	window       uint64 // where in it this cycle's commands are
	span         uint64
	sequence     uint64
	rng          *rand.Rand
	faults       *faults
	acks, reads  *atomic.Int64

	// firstStable says that from mayBeCopied on nobody but initiators makes blocks valid,
	// so that a first write to a block is durable when it is acknowledged.
	firstStable *atomic.Bool
}

// run sends commands until load ends, or nobody answers, or something is wrong. A command
// that was sent is waited for as long as ctx.
func (c *client) run(ctx, load context.Context, h host) {
	c.span = min(c.blocks, 4*regionSize/uint64(c.o.bs))
	c.window = c.rng.Uint64N(c.blocks - c.span + 1)
	for load.Err() == nil {
		err := c.step(ctx, h)
		if errors.Is(err, errGone) {
			return
		}
		if err != nil {
			c.faults.add("client %d: %v", c.id, err)
			return
		}
	}
}

func (c *client) step(ctx context.Context, h host) error {
	n := 1 + c.rng.Uint64N(16)
	if c.rng.IntN(16) == 0 {
		n = 1 + c.rng.Uint64N(2*regionSize/uint64(c.o.bs)) // over the ends of regions
	}
	n = min(n, c.span, longestTransfer/uint64(c.o.bs))
	kind := c.rng.IntN(100)
	if kind >= 90 {
		n = min(n, longestCompare)
	}
	lba := c.from + c.window + c.rng.Uint64N(c.span-n+1)
	cells := c.o.cells[lba : lba+n]
	switch {
	case kind < 30:
		return c.read(ctx, h, lba, n)
	case kind < 70:
		v := c.next()
		p := make([]byte, n*uint64(c.o.bs))
		c.each(p, lba, func(b []byte, lba uint64) { c.o.fill(b, lba, v) })
		var flags byte
		if c.rng.IntN(5) == 0 {
			flags = fua
		}
		return c.change(lba, cells, v, flags != 0, func() error { return h.do(ctx, opWrite16, flags, lba, uint32(n), p, nil) })
	case kind < 78:
		list := make([]byte, 24)
		binary.BigEndian.PutUint16(list, 22)
		binary.BigEndian.PutUint16(list[2:], 16)
		binary.BigEndian.PutUint64(list[8:], lba)
		binary.BigEndian.PutUint32(list[16:], uint32(n))
		return c.change(lba, cells, zeroes, false, func() error { return h.do(ctx, opUnmap, 0, 0, 0, list, nil) })
	case kind < 86:
		v, flags := c.next()|sameBit, byte(0)
		if c.rng.IntN(2) == 0 {
			v, flags = zeroes, unmapBit
		}
		p := make([]byte, c.o.bs)
		c.o.fill(p, lba, v)
		return c.change(lba, cells, v, false, func() error { return h.do(ctx, opWriteSame16, flags, lba, uint32(n), p, nil) })
	case kind < 90:
		if err := h.do(ctx, opSyncCache16, 0, 0, 0, nil, nil); err != nil {
			return err
		}
		own := c.o.cells[c.from : c.from+c.blocks]
		for i := range own {
			own[i].flushed()
		}
		return nil
	}
	return c.compareAndWrite(ctx, h, lba, n)
}

// change has do write v to the cells, which begin at lba.
func (c *client) change(lba uint64, cells []cell, v value, durable bool, do func() error) error {
	first := c.firstStable.Load() && lba >= mayBeCopied/uint64(c.o.bs)
	for i := range cells {
		cells[i].issue(v)
	}
	if err := do(); err != nil {
		return err
	}
	c.acks.Add(1)
	for i := range cells {
		cells[i].ack(v, durable || first && cells[i].acked == original)
	}
	return nil
}

func (c *client) read(ctx context.Context, h host, lba, n uint64) error {
	p := make([]byte, n*uint64(c.o.bs))
	if err := h.do(ctx, opRead16, 0, lba, uint32(n), nil, p); err != nil {
		return err
	}
	c.reads.Add(int64(n))
	if wrong := c.o.check(p, lba, false, 4); len(wrong) > 0 {
		return fmt.Errorf("read under load: %v", wrong)
	}
	return nil
}

func (c *client) compareAndWrite(ctx context.Context, h host, lba, n uint64) error {
	cells := c.o.cells[lba : lba+n]
	size := n * uint64(c.o.bs)
	p := make([]byte, 2*size)
	c.each(p[:size], lba, func(b []byte, lba uint64) { c.o.fill(b, lba, c.o.cells[lba].acked) })
	v := c.next()
	c.each(p[size:], lba, func(b []byte, lba uint64) { c.o.fill(b, lba, v) })
	if c.rng.IntN(5) == 0 {
		p[c.rng.Uint64N(size)] ^= 0x10
		if err := h.do(ctx, opCompareWrite, 0, lba, uint32(n), p, nil); !errors.Is(err, errMiscompare) {
			if err == nil {
				err = fmt.Errorf("COMPARE AND WRITE of %d blocks at %d is GOOD though a byte differs", n, lba)
			}
			return err
		}
		return c.read(ctx, h, lba, n)
	}
	lost := h.Resets()
	err := c.change(lba, cells, v, false, func() error { return h.do(ctx, opCompareWrite, 0, lba, uint32(n), p, nil) })
	if !errors.Is(err, errMiscompare) {
		return err
	}
	if h.Resets() == lost {
		return fmt.Errorf("COMPARE AND WRITE of %d blocks at %d: miscompare, though nobody else writes there", n, lba)
	}
	// The connection was lost, and the command sent again met its own outcome.
	return c.read(ctx, h, lba, n)
}

func (c *client) next() value {
	c.sequence++
	return made(c.id, c.sequence)
}

func (c *client) each(p []byte, lba uint64, do func([]byte, uint64)) {
	for ; len(p) > 0; p, lba = p[c.o.bs:], lba+1 {
		do(p[:c.o.bs], lba)
	}
}

// readBack reads every block and holds it to the oracle.
func (o *oracle) readBack(ctx context.Context, h host, power bool) (blocks int64, wrong []string, err error) {
	per := uint64(verificationRead / o.bs)
	p := make([]byte, verificationRead)
	for lba := uint64(0); lba < uint64(len(o.cells)); lba += per {
		n := min(per, uint64(len(o.cells))-lba)
		part := p[:n*uint64(o.bs)]
		if err := h.do(ctx, opRead16, 0, lba, uint32(n), nil, part); err != nil {
			return blocks, wrong, err
		}
		wrong = append(wrong, o.check(part, lba, power, 8)...)
		blocks += int64(n)
	}
	return blocks, wrong[:min(len(wrong), 16)], nil
}
