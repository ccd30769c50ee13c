package target

import (
	"encoding/binary"
	"fmt"

	"lunshift/iscsi"
)

// detailed is an error whose sense data say more than key and additional code.
type detailed interface {
	error
	// detail is the sense and the whole of the sense data, in fixed format.
	detail() (sense, []byte)
}

// status is an outcome without sense data, as an error.
type status byte

// conditionMet is CONDITION MET of PRE-FETCH (SAM-5 5.3.1). It is no failure.
const conditionMet = status(iscsi.StatusConditionMet)

// busy is BUSY: the initiator tries again later.
const busy = status(iscsi.StatusBusy)

func (s status) Error() string { return fmt.Sprintf("status %02Xh", byte(s)) }

// badField is INVALID FIELD IN CDB, or IN PARAMETER LIST, with the place of the field
// (SPC-4 4.5.2.4.2). Without the place initiators may take the refusal of one field for
// that of the whole service action.
type badField struct {
	at   int // byte
	bit  int // its most significant bit, 7 to 0; -1 for the whole byte
	list bool
}

func (f badField) Error() string {
	where := "CDB"
	if f.list {
		where = "parameter list"
	}
	return fmt.Sprintf("%v: byte %d of the %s", f.sense(), f.at, where)
}

func (f badField) sense() sense {
	if f.list {
		return senseParamField
	}
	return senseInvalidField
}

func (f badField) detail() (sense, []byte) {
	data := f.sense().fixed()
	data[15] = 0x80 // SKSV
	if !f.list {
		data[15] |= 0x40 // C/D
	}
	if f.bit >= 0 {
		data[15] |= 0x08 | byte(f.bit)
	}
	binary.BigEndian.PutUint16(data[16:], uint16(f.at))
	return f.sense(), data
}
