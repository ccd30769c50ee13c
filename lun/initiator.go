package lun

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"lunshift/iscsi"
)

// Initiator is the application client's end of one or several sessions with one
// logical unit. Commands of concurrent callers share the sessions in turn.
type Initiator struct {
	addr     Address
	opts     Options
	sessions []*session
	turn     atomic.Uint32
	closed   atomic.Bool
	resets   atomic.Uint64 // see Resets

	mu         sync.Mutex // protects what follows
	identified bool
	identity   identity // as of the first session
	// onReturn, unless nil, runs on each new connection once it is known where it leads.
	onReturn func(context.Context, *session) error
}

// identity is what tells one logical unit from another. Where the unit has no
// designator the rest has to do.
type identity struct {
	designator              string // VPD page 83h
	serial, vendor, product string // only without a designator
	blocks                  uint64 // 0 while the unit does not say
	blockSize               uint32
}

// is tells whether now may be the unit that was was. A unit that proves itself may have
// grown; its firmware may have changed in any case.
func (was identity) is(now identity) bool {
	grown := was.designator != "" && now.blockSize == was.blockSize && now.blocks > was.blocks
	if was.blocks == 0 || grown {
		now.blocks, now.blockSize = was.blocks, was.blockSize
	}
	return now == was
}

func (u identity) String() string {
	name := u.designator
	if name == "" {
		name = u.vendor + " " + u.product + " " + u.serial
	}
	return fmt.Sprintf("%q of %d blocks of %d bytes", name, u.blocks, u.blockSize)
}

// DialInitiator logs in to the target of an iSCSI address.
func DialInitiator(ctx context.Context, addr Address, opts Options) (*Initiator, error) {
	opts = opts.withDefaults()
	if !addr.ISCSI() {
		return nil, fmt.Errorf("%s is not an iSCSI address", addr)
	}
	if opts.Secret == "" && addr.User != "" {
		return nil, fmt.Errorf("%s: the address has a user and no secret is set: %w", addr, ErrAuth)
	}
	if err := checkISCSIName(opts.InitiatorName); err != nil {
		return nil, fmt.Errorf("initiator name: %w", err)
	}
	field, ok := iscsi.EncodeLUN(uint64(addr.LUN))
	if !ok {
		return nil, fmt.Errorf("%s: LUN is out of range", addr)
	}
	i := &Initiator{addr: addr, opts: opts}
	for n := range opts.Sessions {
		isid, err := makeISID(addr, opts, n)
		if err != nil {
			return nil, err
		}
		s, err := startSession(ctx, endpoint{addr: addr, opts: opts, isid: isid}, field, i.verify, func() { i.resets.Add(1) })
		if err != nil {
			i.Close()
			return nil, err
		}
		i.sessions = append(i.sessions, s)
	}
	return i, nil
}

// makeISID gives session n its ISID of type "random" (RFC 7143 11.12.5): from
// Options.SessionKey where that is set, so that a later process with the same key
// takes the session's place at the target.
func makeISID(addr Address, opts Options, n int) (iscsi.ISID, error) {
	var b [5]byte
	if opts.SessionKey == "" {
		if _, err := rand.Read(b[:]); err != nil {
			return iscsi.ISID{}, fmt.Errorf("make an ISID: %w", err)
		}
	} else {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%d\x00%d", opts.SessionKey, addr.Target, addr.LUN, n))
		copy(b[:], sum[:])
	}
	return iscsi.ISID{0x80, b[0], b[1], b[2], b[3], b[4]}, nil
}

// Do runs c to its end on one of the sessions. The error is one of the
// transport: ErrUnavailable when the target neither answered nor came back within
// Options.IOTimeout, ErrClosed, or ctx's. Without an error c.Status is the SCSI
// status; no status is retried.
//
// When ctx ends, Do aborts the task and returns as soon as it is known to be gone;
// that takes a round trip, or 2 s when the target does not answer.
func (i *Initiator) Do(ctx context.Context, c *Command) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if i.closed.Load() {
		return ErrClosed
	}
	if len(c.Out) > 0 && len(c.In) > 0 || uint64(len(c.Out)) >= 1<<32 || uint64(len(c.In)) >= 1<<32 {
		return errors.New("a command has data in one direction and less than 4 GiB of it")
	}
	if len(i.sessions) == 1 {
		return i.sessions[0].do(ctx, c)
	}
	// A write that was given up on a session without connection must not come
	// after one that another session carries.
	for _, s := range i.sessions {
		if err := s.settle(ctx, i.opts.IOTimeout); err != nil {
			return err
		}
	}
	return i.sessions[int(i.turn.Add(1))%len(i.sessions)].do(ctx, c)
}

// Resets implements Resetter: it counts lost connections and their return, behind each of
// which may be a device that lost power, and the resets and failures of earlier writes that
// the device reports itself.
func (i *Initiator) Resets() uint64 { return i.resets.Load() }

// Unreachable implements Reachable.
func (i *Initiator) Unreachable() error {
	if i.closed.Load() {
		return ErrClosed
	}
	var why error
	for _, s := range i.sessions {
		err := s.reachable()
		if err == nil {
			return nil
		}
		why = err
	}
	return fmt.Errorf("%s: %w", i.addr, why)
}

// Close logs out. Commands in flight get up to a second to finish.
func (i *Initiator) Close() error {
	if i.closed.Swap(true) {
		return nil
	}
	var wg sync.WaitGroup
	for _, s := range i.sessions {
		wg.Go(s.close)
	}
	wg.Wait()
	return nil
}

// verify makes sure that the logical unit behind a new connection is the one
// that was there before.
func (i *Initiator) verify(ctx context.Context, s *session) error {
	c := Command{urgent: true}
	buf := make([]byte, 1024)
	i.mu.Lock()
	known := i.identified
	i.mu.Unlock()
	inquire := func(vpd bool, page byte, n int) ([]byte, error) {
		c.In = buf[:n]
		inquiryCDB(&c.CDB, vpd, page, n)
		return ask(ctx, s, &c, known)
	}
	var now identity
	page, err := inquire(true, 0x83, len(buf))
	if err != nil {
		return err
	}
	now.designator = parseDesignator(page)
	if now.designator == "" {
		if page, err = inquire(true, 0x80, 255); err != nil {
			return err
		}
		now.serial = parseSerial(page)
		if page, err = inquire(false, 0, 255); err != nil {
			return err
		}
		inq, _ := parseInquiry(page)
		now.vendor, now.product = inq.vendor, inq.product
	}
	// An answer that makes no sense counts as none: opening the unit tells what is wrong.
	c.In = buf[:32]
	readCapacity16CDB(&c.CDB, len(c.In))
	if page, err = ask(ctx, s, &c, known); err != nil {
		return err
	}
	capa, err := parseCapacity16(page)
	if len(page) == 0 {
		c.CDB, c.In = [16]byte{0: opReadCapacity10}, buf[:8]
		if page, err = ask(ctx, s, &c, known); err != nil {
			return err
		}
		capa, err = parseCapacity10(page)
	}
	if err == nil {
		now.blocks, now.blockSize = capa.blocks, capa.blockSize
	}
	i.mu.Lock()
	if !i.identified {
		i.identified, i.identity = true, now
	}
	was, onReturn := i.identity, i.onReturn
	i.mu.Unlock()
	if !was.is(now) {
		return fmt.Errorf("%w: another logical unit answers at %s: %v instead of %v", ErrUnavailable, i.addr, now, was)
	}
	if onReturn != nil {
		return onReturn(ctx, s)
	}
	return nil
}

// ask runs c on a session that is not open yet and gives what it brought: nothing
// where the unit does not know the command. A unit that is not ready, or reserved, is
// waited for when wait, otherwise it gives nothing either.
func ask(ctx context.Context, s *session, c *Command, wait bool) ([]byte, error) {
	for {
		if err := s.do(ctx, c); err != nil {
			return nil, err
		}
		if c.Status == statusGood {
			return c.In[:c.Received], nil
		}
		if c.Status == statusReservationConflict && !wait {
			return nil, nil
		}
		if c.Status == statusCheckCondition {
			key := c.CheckSense().Key
			if key == senseIllegalRequest || key == senseNotReady && !wait {
				return nil, nil
			}
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return nil, fmt.Errorf("%w: command %02Xh gets status %02Xh", ErrUnavailable, c.CDB[0], c.Status)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
