package lun

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// retryMax is the longest pause before a command that was not taken is repeated.
	retryMax = 200 * time.Millisecond
	// attentionMax is how often in a row a unit attention is absorbed: a device has
	// a short queue of them for each session.
	attentionMax = 32
	// abortedMax is how often in a row ABORTED COMMAND is answered with a repetition.
	abortedMax = 8
	// conflictMax is how often a command is sent again after its session was registered.
	conflictMax = 3
)

// run does c and turns its status into an error. A busy device is asked again for as
// long as Options.IOTimeout; unit attentions, aborted commands and transfers that stayed
// short are repeated a few times. What is left after that is an error that makes
// initiators try again: the device's own sense or ErrUnavailable.
//
// A reservation conflict while the device is fenced for us is looked into: a device may
// have lost a registration of ours.
func (r *remote) run(ctx context.Context, c *Command) error {
	seen := r.fence.looked.Load()
	err := r.runOn(ctx, c, nil)
	for n := 0; err == ErrConflict && n < conflictMax && r.fence.key.Load() != 0; n++ {
		if err = r.regain(ctx, seen); err == nil {
			seen = r.fence.looked.Load()
			err = r.runOn(ctx, c, nil)
		}
	}
	return err
}

// runOn is run on one session, or where that is nil on one of all, whatever is reserved.
func (r *remote) runOn(ctx context.Context, c *Command, s *session) error {
	var began time.Time
	attentions, aborted := 0, 0
	pause := time.Millisecond
	for {
		var err error
		if s == nil {
			err = r.Do(ctx, c)
		} else {
			err = s.do(ctx, c)
		}
		if err != nil {
			return err
		}
		if err = r.judge(c); err == nil {
			return nil
		}
		var again *repeat
		if !errors.As(err, &again) {
			return err
		}
		switch again.kind {
		case repeatAttention:
			if attentions++; attentions <= attentionMax {
				r.opts.Log.WithField("device", r.addr.String()).WithError(again.err).Debug("unit attention")
				continue
			}
			return again.err
		case repeatAborted:
			if aborted++; aborted > abortedMax {
				return again.err
			}
		}
		if began.IsZero() {
			began = time.Now()
		}
		if time.Since(began) > r.opts.IOTimeout {
			return fmt.Errorf("%w: %w", ErrUnavailable, again.err)
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		pause = min(2*pause, retryMax)
	}
}

// repeat marks an outcome after which the command may be sent again.
type repeat struct {
	kind int
	err  error
}

const (
	repeatBusy = iota
	repeatAttention
	repeatAborted
)

func (e *repeat) Error() string { return e.err.Error() }

// judge turns the outcome of a command into an error.
func (r *remote) judge(c *Command) error {
	switch c.Status {
	case statusGood, statusConditionMet:
		return c.whole()
	case statusBusy, statusTaskSetFull, statusACAActive:
		return &repeat{repeatBusy, fmt.Errorf("the device is busy, status %02Xh", c.Status)}
	case statusTaskAborted:
		return &repeat{repeatAborted, fmt.Errorf("%w: the task was aborted by another initiator", ErrUnavailable)}
	case statusReservationConflict:
		return ErrConflict
	case statusCheckCondition:
		sense := c.CheckSense()
		switch {
		case sense.Deferred: // what was written and not flushed may be lost
			r.resets.Add(1)
			return &repeat{repeatAborted, fmt.Errorf("%w: an earlier write failed: %v", ErrUnavailable, sense)}
		case sense.Key == senseUnitAttention:
			if sense.ASC == 0x29 { // POWER ON, RESET, OR BUS DEVICE RESET OCCURRED
				r.resets.Add(1)
			}
			if sense.ASC == 0x2a && sense.ASCQ >= 0x03 && sense.ASCQ <= 0x05 {
				// RESERVATIONS PREEMPTED, RELEASED, REGISTRATIONS PREEMPTED
				r.fence.disturb()
			}
			return &repeat{repeatAttention, sense}
		case sense.Key == senseAborted:
			return &repeat{repeatAborted, sense}
		case sense.Key == senseNotReady && sense.ASC == 0x04 && sense.ASCQ != 0x02 && sense.ASCQ != 0x03:
			// All that comes by itself, a controller that takes over among it (SPC-4
			// 5.15); on some of these initiators give up at once, so they do not get it.
			return &repeat{repeatBusy, fmt.Errorf("the device is not ready: %v", sense)}
		case sense.Key == senseRecovered:
			return c.whole()
		case sense.Key == senseIllegalRequest && sense.ASC == 0x21:
			// Within what the device said it has, or the command had not been sent. The
			// caller asked for nothing wrong, so the sense is not for him.
			return fmt.Errorf("%w: the device has become smaller: %v", ErrUnavailable, sense)
		}
		return sense
	}
	return fmt.Errorf("unknown SCSI status %02Xh", c.Status)
}

// whole holds GOOD to what it means for a transfer of blocks: all of them, and no more.
func (c *Command) whole() error {
	switch c.CDB[0] {
	case opRead10, opRead16:
		if c.Received != len(c.In) || c.Residual > 0 || c.Overflow {
			return c.short("sent", c.Received, len(c.In))
		}
	case opWrite10, opWrite16, opWriteSame16, opUnmap:
		if c.offered != len(c.Out) || c.Residual > 0 || c.Overflow {
			return c.short("was offered", c.offered, len(c.Out))
		}
	}
	return nil
}

func (c *Command) short(did string, n, of int) error {
	kind := "residual"
	if c.Overflow {
		kind = "overflow"
	}
	return &repeat{repeatAborted, fmt.Errorf("%w: the device %s %d of %d bytes and answered GOOD with a %s of %d", ErrUnavailable, did, n, of, kind, c.Residual)}
}

// refused tells whether the device does not know the command or a field of it.
func refused(err error) bool {
	var s *SenseError
	return errors.As(err, &s) && s.Key == senseIllegalRequest && (s.ASC == 0x20 || s.ASC == 0x24 || s.ASC == 0x26)
}
