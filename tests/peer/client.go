package peer

import (
	"cmp"
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
	OpRead16         = 0x88
	OpWrite16        = 0x8a
	OpCompareWrite   = 0x89
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

// Patience is how long a Host sends a command again that is not taken, unless it says otherwise.
const Patience = 30 * time.Second

var (
	// ErrGone: nobody answered; whether the command was done is not known.
	ErrGone = errors.New("no answer")
	// ErrMiscompare: COMPARE AND WRITE found something else, and wrote nothing.
	ErrMiscompare = errors.New("miscompare")
	// errRepeated: ... after it had been refused and sent again.
	errRepeated = errors.New("repeated")
)

// Host is an initiator that sends CDBs as they are.
type Host struct {
	*lun.Initiator
	// Refused, unless nil, is told of each outcome after which the command is sent
	// again, or fails. It is called by all who send.
	Refused func(c *lun.Command)
	// Patience is how long a command is sent again that is not taken.
	Patience time.Duration
}

// Send sends a command until it is taken. Errors are ErrGone, ErrMiscompare, or what makes
// a command fail that must not; a *lun.SenseError is the sense of the device.
func (h Host) Send(ctx context.Context, op, flags byte, lba uint64, blocks uint32, out, in []byte) error {
	c := lun.Command{Out: out, In: in}
	c.CDB[0], c.CDB[1] = op, flags
	switch op {
	case opUnmap:
		binary.BigEndian.PutUint16(c.CDB[7:], uint16(len(out)))
	case OpCompareWrite:
		binary.BigEndian.PutUint64(c.CDB[2:], lba)
		c.CDB[13] = byte(blocks)
	default:
		binary.BigEndian.PutUint64(c.CDB[2:], lba)
		binary.BigEndian.PutUint32(c.CDB[10:], blocks)
	}
	patience := cmp.Or(h.Patience, Patience)
	for repeats, deadline := 0, time.Now().Add(patience); ; repeats++ {
		if err := h.Do(ctx, &c); err != nil {
			return fmt.Errorf("%w: %w", ErrGone, err)
		}
		if c.Status == 0 {
			if c.Residual != 0 || len(in) > 0 && c.Received != len(in) {
				return fmt.Errorf("GOOD with residual %d, %d of %d bytes received", c.Residual, c.Received, len(in))
			}
			return nil
		}
		if c.Status == 2 && c.CheckSense().Key == senseMiscompare {
			if repeats > 0 {
				return fmt.Errorf("%w, %w", ErrMiscompare, errRepeated)
			}
			return ErrMiscompare
		}
		if h.Refused != nil {
			h.Refused(&c)
		}
		switch c.Status {
		case 2:
			sense := c.CheckSense()
			switch sense.Key {
			case senseAttention, senseAborted, senseNotReady:
			default:
				return sense
			}
		case 0x08, 0x28, 0x40: // BUSY, TASK SET FULL, TASK ABORTED
		default:
			return fmt.Errorf("status %02Xh", c.Status)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: not taken for %v, status %02Xh", ErrGone, patience, c.Status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrGone, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// Client owns a range of blocks and has one command at a time.
type Client struct {
	ID           int
	Oracle       *Oracle
	From, Blocks uint64 // its range
	// Region is the volume's region size in bytes: some commands are longer.
	Region   uint64
	Rand     *rand.Rand
	Findings *Findings
	// Acks counts acknowledged changes, Reads blocks read.
	Acks, Reads *atomic.Int64
	// Pace is the pause after each command.
	Pace time.Duration
	// FirstStable, unless nil, tells that nobody but initiators makes the block at lba
	// valid, so that its first write is durable when it is acknowledged.
	FirstStable func(lba uint64) bool
	// Losses, unless nil, counts the power losses of the destination: a command during
	// which one came tells nothing of the content.
	Losses func() uint64
	// MayFail, unless nil, tells with which errors a command may end; its blocks then may
	// hold what it wrote or what was there before, and the client goes on.
	MayFail func(err error) bool

	// Ended counts the commands that ended, however they did.
	Ended atomic.Int64

	window, span uint64 // where in its range this run's commands are
	sequence     uint64
	losses       uint64 // when the step began, before the load could end
}

// Run sends commands until load ends, or nobody answers, or something is wrong. A command
// that was sent is waited for as long as ctx.
func (c *Client) Run(ctx, load context.Context, h Host) {
	c.span = min(c.Blocks, 4*c.Region/uint64(c.Oracle.BlockSize))
	c.window = c.Rand.Uint64N(c.Blocks - c.span + 1)
	for {
		c.losses = c.lossesNow()
		if load.Err() != nil {
			return
		}
		err := c.step(ctx, h)
		c.Ended.Add(1)
		if errors.Is(err, ErrGone) {
			return
		}
		if err != nil && (c.MayFail == nil || !c.MayFail(err)) {
			c.Findings.Add("client %d: %v", c.ID, err)
			return
		}
		if c.Pace > 0 {
			select {
			case <-load.Done():
			case <-time.After(c.Pace):
			}
		}
	}
}

func (c *Client) step(ctx context.Context, h Host) error {
	bs := uint64(c.Oracle.BlockSize)
	n := 1 + c.Rand.Uint64N(16)
	if c.Rand.IntN(16) == 0 {
		n = 1 + c.Rand.Uint64N(2*c.Region/bs) // over the ends of regions
	}
	n = min(n, c.span, longestTransfer/bs)
	kind := c.Rand.IntN(100)
	if kind >= 90 {
		n = min(n, longestCompare)
	}
	lba := c.From + c.window + c.Rand.Uint64N(c.span-n+1)
	cells := c.Oracle.Cells[lba : lba+n]
	switch {
	case kind < 30:
		return c.read(ctx, h, lba, n)
	case kind < 70:
		v := c.next()
		p := make([]byte, n*bs)
		c.each(p, lba, func(b []byte, lba uint64) { c.Oracle.Fill(b, lba, v) })
		var flags byte
		if c.Rand.IntN(5) == 0 {
			flags = fua
		}
		return c.change(lba, cells, v, flags != 0, func() error { return h.Send(ctx, OpWrite16, flags, lba, uint32(n), p, nil) })
	case kind < 78:
		list := make([]byte, 24)
		binary.BigEndian.PutUint16(list, 22)
		binary.BigEndian.PutUint16(list[2:], 16)
		binary.BigEndian.PutUint64(list[8:], lba)
		binary.BigEndian.PutUint32(list[16:], uint32(n))
		return c.change(lba, cells, Zeroes, false, func() error { return h.Send(ctx, opUnmap, 0, 0, 0, list, nil) })
	case kind < 86:
		v, flags := c.next()|sameBit, byte(0)
		if c.Rand.IntN(2) == 0 {
			v, flags = Zeroes, unmapBit
		}
		p := make([]byte, bs)
		c.Oracle.Fill(p, lba, v)
		return c.change(lba, cells, v, false, func() error { return h.Send(ctx, opWriteSame16, flags, lba, uint32(n), p, nil) })
	case kind < 90:
		if err := h.Send(ctx, opSyncCache16, 0, 0, 0, nil, nil); err != nil {
			return err
		}
		if c.lossesNow() != c.losses {
			return nil // as on any disk, what the cache lost is not flushed
		}
		own := c.Oracle.Cells[c.From : c.From+c.Blocks]
		for i := range own {
			own[i].Flushed()
		}
		return nil
	}
	return c.compareAndWrite(ctx, h, lba, n)
}

// change has do write v to the cells, which begin at lba.
func (c *Client) change(lba uint64, cells []Cell, v Value, durable bool, do func() error) error {
	first := c.FirstStable != nil && c.FirstStable(lba)
	for i := range cells {
		cells[i].issue(v)
	}
	if err := do(); err != nil {
		return err
	}
	c.Acks.Add(1)
	for i := range cells {
		cells[i].ack(v, durable || first && cells[i].acked == Original)
	}
	return nil
}

func (c *Client) read(ctx context.Context, h Host, lba, n uint64) error {
	p := make([]byte, n*uint64(c.Oracle.BlockSize))
	if err := h.Send(ctx, OpRead16, 0, lba, uint32(n), nil, p); err != nil {
		return err
	}
	if c.lossesNow() != c.losses {
		return nil // it may have been read before or after
	}
	c.Reads.Add(int64(n))
	if wrong := c.Oracle.Check(p, lba, false, 4); len(wrong) > 0 {
		return fmt.Errorf("read under load: %v", wrong)
	}
	return nil
}

func (c *Client) compareAndWrite(ctx context.Context, h Host, lba, n uint64) error {
	cells := c.Oracle.Cells[lba : lba+n]
	for i := range cells {
		if len(cells[i].pending) > 0 {
			return c.read(ctx, h, lba, n) // to know what to compare with
		}
	}
	size := n * uint64(c.Oracle.BlockSize)
	p := make([]byte, 2*size)
	c.each(p[:size], lba, func(b []byte, lba uint64) { c.Oracle.Fill(b, lba, c.Oracle.Cells[lba].acked) })
	v := c.next()
	c.each(p[size:], lba, func(b []byte, lba uint64) { c.Oracle.Fill(b, lba, v) })
	if c.Rand.IntN(5) == 0 {
		p[c.Rand.Uint64N(size)] ^= 0x10
		if err := h.Send(ctx, OpCompareWrite, 0, lba, uint32(n), p, nil); !errors.Is(err, ErrMiscompare) {
			if err == nil {
				err = fmt.Errorf("COMPARE AND WRITE of %d blocks at %d is GOOD though a byte differs", n, lba)
			}
			return err
		}
		return c.read(ctx, h, lba, n)
	}
	lost := h.Resets()
	err := c.change(lba, cells, v, false, func() error { return h.Send(ctx, OpCompareWrite, 0, lba, uint32(n), p, nil) })
	if !errors.Is(err, ErrMiscompare) {
		return err
	}
	if h.Resets() == lost && !errors.Is(err, errRepeated) && c.lossesNow() == c.losses {
		return fmt.Errorf("COMPARE AND WRITE of %d blocks at %d: miscompare, though nobody else writes there", n, lba)
	}
	// The connection was lost, or the write had failed, and the command sent again met
	// its own outcome.
	return c.read(ctx, h, lba, n)
}

func (c *Client) lossesNow() uint64 {
	if c.Losses == nil {
		return 0
	}
	return c.Losses()
}

func (c *Client) next() Value {
	c.sequence++
	return MakeValue(c.ID, c.sequence)
}

func (c *Client) each(p []byte, lba uint64, do func([]byte, uint64)) {
	for bs := c.Oracle.BlockSize; len(p) > 0; p, lba = p[bs:], lba+1 {
		do(p[:bs], lba)
	}
}

// ReadBack reads every block and holds it to the oracle; power as in Check.
func (o *Oracle) ReadBack(ctx context.Context, h Host, power bool) (blocks int64, wrong []string, err error) {
	per := uint64(verificationRead / o.BlockSize)
	p := make([]byte, verificationRead)
	for lba := uint64(0); lba < uint64(len(o.Cells)); lba += per {
		n := min(per, uint64(len(o.Cells))-lba)
		part := p[:n*uint64(o.BlockSize)]
		if err := h.Send(ctx, OpRead16, 0, lba, uint32(n), nil, part); err != nil {
			return blocks, wrong, err
		}
		wrong = append(wrong, o.Check(part, lba, power, 8)...)
		blocks += int64(n)
	}
	return blocks, wrong[:min(len(wrong), 16)], nil
}
