package target

import (
	"context"
	"encoding/binary"
	"errors"

	"lunshift/iscsi"
	"lunshift/lun"
)

// Sense keys (SPC-4 4.5.6).
const (
	keyNoSense        = 0x0
	keyNotReady       = 0x2
	keyHardwareError  = 0x4
	keyIllegalRequest = 0x5
	keyUnitAttention  = 0x6
	keyCopyAborted    = 0xa
	keyAbortedCommand = 0xb
	keyMiscompare     = 0xe
)

// errTaskSetFull: there is no memory for a command's data, which comes unasked.
var errTaskSetFull = errors.New("task set full")

// sense is a sense key with its additional sense code (SPC-4 4.5), as an error.
type sense struct{ Key, ASC, ASCQ byte }

func (s sense) Error() string {
	return (&lun.SenseError{Key: s.Key, ASC: s.ASC, ASCQ: s.ASCQ}).Error()
}

var (
	senseInvalidOpcode = sense{keyIllegalRequest, 0x20, 0x00}
	senseLBARange      = sense{keyIllegalRequest, 0x21, 0x00}
	senseInvalidField  = sense{keyIllegalRequest, 0x24, 0x00}
	senseNoUnit        = sense{keyIllegalRequest, 0x25, 0x00}
	senseParamField    = sense{keyIllegalRequest, 0x26, 0x00}
	senseParamLength   = sense{keyIllegalRequest, 0x1a, 0x00}
	senseSavingParams  = sense{keyIllegalRequest, 0x39, 0x00}
	senseInvalidIU     = sense{keyIllegalRequest, 0x0e, 0x03} // INVALID FIELD IN COMMAND INFORMATION UNIT
	senseBecomingReady = sense{keyNotReady, 0x04, 0x01}
	senseUnavailable   = sense{keyNotReady, 0x04, 0x0c} // TARGET PORT IN UNAVAILABLE STATE
	senseInternal      = sense{keyHardwareError, 0x44, 0x00}
	senseDataLost      = sense{keyAbortedCommand, 0x47, 0x05} // PROTOCOL SERVICE CRC ERROR

	attnPowerOn     = sense{keyUnitAttention, 0x29, 0x00}
	attnTargetReset = sense{keyUnitAttention, 0x29, 0x02}
	attnLUNReset    = sense{keyUnitAttention, 0x29, 0x03}
	attnCleared     = sense{keyUnitAttention, 0x2f, 0x00}
	attnLUNsChanged = sense{keyUnitAttention, 0x3f, 0x0e}
)

// statusOf turns the outcome of a task into its SCSI status and sense data. It is
// the one place that does:
//
//	nil                     GOOD
//	status                  that status, without sense data
//	detailed                CHECK CONDITION with its own sense data
//	sense, *lun.SenseError  CHECK CONDITION with that sense
//	lun.ErrOutOfRange       ILLEGAL REQUEST, LBA OUT OF RANGE
//	lun.ErrUnavailable      NOT READY, BECOMING READY: initiators try again
//	lun.ErrUnsupported      ILLEGAL REQUEST, INVALID FIELD IN CDB
//	lun.ErrConflict         RESERVATION CONFLICT
//	errTaskSetFull          TASK SET FULL
//	context.Canceled        TASK ABORTED (only where the task itself was not aborted)
//	anything else           HARDWARE ERROR, INTERNAL TARGET FAILURE
func statusOf(t *task, err error) (code byte, data []byte) {
	if err == nil {
		return iscsi.StatusGood, nil
	}
	var s sense
	var device *lun.SenseError
	var more detailed
	var bare status
	switch {
	case errors.As(err, &bare):
		return byte(bare), nil
	case errors.As(err, &more):
		s, data = more.detail()
	case errors.As(err, &s):
	case errors.As(err, &device):
		s = sense{device.Key, device.ASC, device.ASCQ}
		if device.Key == keyNoSense {
			s = senseInternal // an error must not read as success
		}
	case errors.Is(err, lun.ErrOutOfRange):
		s = senseLBARange
	case errors.Is(err, lun.ErrUnavailable):
		s = senseBecomingReady
	case errors.Is(err, lun.ErrUnsupported):
		s = senseInvalidField
	case err == errTaskSetFull:
		return iscsi.StatusTaskSetFull, nil
	case errors.Is(err, lun.ErrConflict):
		return iscsi.StatusReservationConflict, nil
	case errors.Is(err, context.Canceled):
		return iscsi.StatusTaskAborted, nil
	default:
		s = senseInternal
	}
	if s.Key != keyIllegalRequest && s.Key != keyUnitAttention && s.Key != keyMiscompare && s.Key != keyCopyAborted && s != senseBecomingReady && s != senseUnavailable {
		log := t.c.log.WithError(err).WithField("lun", t.lunField>>48&0x3fff)
		if s == senseDataLost {
			log.Warnf("%s failed", t.op.name) // the initiator's fault, or the network's
		} else {
			log.Errorf("%s failed", t.op.name)
		}
	}
	if data == nil {
		data = s.fixed()
	}
	if device != nil && device.Valid && uint64(device.LBA) <= 1<<32-1 {
		data[0] |= 0x80
		binary.BigEndian.PutUint32(data[3:], uint32(device.LBA))
	}
	return iscsi.StatusCheckCondition, data
}

// fixed is the sense in fixed format (SPC-4 4.5.3).
func (s sense) fixed() []byte {
	return []byte{0x70, 0, s.Key, 0, 0, 0, 0, 10, 0, 0, 0, 0, s.ASC, s.ASCQ, 0, 0, 0, 0}
}
