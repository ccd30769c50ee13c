package target

import (
	"encoding/binary"

	"lunshift/lun"
)

// prefetchMost is how much one PRE-FETCH reads ahead, in bytes.
const prefetchMost = 16 << 20

// prefetchUsage is the usage data of PRE-FETCH, which takes a GROUP NUMBER: it moves no
// data that could be counted for the group (SBC-3 4.22).
func prefetchUsage(usage []byte, group int) []byte {
	usage[group] = 0x1f
	return usage
}

func decodePrefetch(t *task) error {
	if err := t.place(); err != nil {
		return err
	}
	if t.blocks == 0 { // to the end of the medium (SBC-3 5.8)
		t.blocks = t.u.info.Blocks - t.lba
	}
	return nil
}

// preFetch is PRE-FETCH: the blocks are read, which brings them into the caches of the
// device behind. CONDITION MET says that all were; GOOD, that they are more than is read
// ahead at once. IMMED is taken and the answer still comes when the blocks are read.
func preFetch(t *task) error {
	all := t.blocks
	t.blocks = min(t.blocks, prefetchMost>>t.u.shift)
	if err := t.compare(nil); err != nil {
		return err
	}
	if t.blocks < all {
		return nil
	}
	return conditionMet
}

// readDefectData is READ DEFECT DATA (SBC-3 5.17, 5.18): neither list has an entry, in
// whatever format.
func readDefectData(t *task) error {
	if t.cdb[0] == 0x37 {
		return t.reply([]byte{0, t.cdb[2] & 0x1f, 0, 0}, int(binary.BigEndian.Uint16(t.cdb[7:])))
	}
	return t.reply([]byte{0, t.cdb[1] & 0x1f, 0, 0, 0, 0, 0, 0}, allocation32(t.cdb[6:]))
}

// decodeStartStop takes the START bit alone: a unit that other initiators use as well is
// not stopped for one of them, has no medium to eject, and no power conditions.
func decodeStartStop(t *task) error {
	if t.cdb[4]&0x01 == 0 {
		return badField{at: 4, bit: 0}
	}
	return nil
}

// startStop is START STOP UNIT with START: a unit that is served is started.
func startStop(*task) error { return nil }

// inUnit runs work on a unit other than the task's own, whose gate is held by perform.
func (t *task) inUnit(u *unit, work func() error) error {
	if u == t.u {
		return work()
	}
	if !u.gate.enter() {
		return lun.ErrUnavailable
	}
	defer u.gate.leave()
	return work()
}
