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
	identity   string // VPD 83h, as of the first session
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

// Resets implements Resetter: it counts lost connections, behind each of which may
// be a device that lost power, and resets that the device reports itself.
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
	c := Command{In: make([]byte, 1024), urgent: true}
	inquiryCDB(&c.CDB, true, 0x83, len(c.In))
	for {
		if err := s.do(ctx, &c); err != nil {
			return err
		}
		if c.Status == statusGood {
			break
		}
		if c.Status == statusCheckCondition && c.CheckSense().Key == senseIllegalRequest {
			c.Received = 0 // a unit without the page has no identity to compare
			break
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("%w: INQUIRY gets status %02Xh", ErrUnavailable, c.Status)
		}
	}
	id := parseDesignator(c.In[:c.Received])
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.identified {
		i.identified, i.identity = true, id
	}
	if id != i.identity {
		return fmt.Errorf("%w: another logical unit answers at %s: %q instead of %q", ErrUnavailable, i.addr, id, i.identity)
	}
	return nil
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
