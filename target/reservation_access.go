package target

// access says how a command fares under a reservation of another I_T nexus (SPC-4 table
// 65, SBC-3 table 13, SPC-2 table 10).
type access byte

const (
	// accessWrite conflicts with every reservation. It is the zero value: a command of
	// which nothing is declared is kept out.
	accessWrite access = iota
	// accessRead passes the Write Exclusive types. MODE SENSE and REPORT SUPPORTED
	// OPERATION CODES are among them: ALLOW COMMANDS 011b.
	accessRead
	// accessAllowed passes every persistent reservation, and no RESERVE.
	accessAllowed
	// accessReservation are PERSISTENT RESERVE IN and OUT, which look at the registrations
	// themselves and conflict with every RESERVE, their own session's too (SPC-2 5.5.1).
	accessReservation
	// accessAlways passes every reservation.
	accessAlways
)

// accessOf is the access of an operation: the one place that says so for each.
func accessOf(o *operation) access {
	switch o.opcode {
	case 0x03, 0x12, 0xa0, // REQUEST SENSE, INQUIRY, REPORT LUNS
		0x4d,       // LOG SENSE
		0x17, 0x57, // RELEASE
		0x25: // READ CAPACITY (10)
		return accessAlways
	case 0x5e, 0x5f: // PERSISTENT RESERVE
		return accessReservation
	case 0x00, // TEST UNIT READY
		0x16, 0x56: // RESERVE, which looks at the registrations itself
		return accessAllowed
	case 0x08, 0x28, 0xa8, 0x88, // READ
		0x2f, 0xaf, 0x8f, // VERIFY
		0x34, 0x90, // PRE-FETCH
		0x37, 0xb7, // READ DEFECT DATA
		0x1a, 0x5a, // MODE SENSE
		0x3c, // READ BUFFER
		0x8c, // READ ATTRIBUTE
		0x1c: // RECEIVE DIAGNOSTIC RESULTS
		return accessRead
	}
	switch int(o.opcode)<<8 | o.service {
	case 0x9e10: // READ CAPACITY (16)
		return accessAlways
	case 0xa305, 0xa30a, 0xa30f, // REPORT IDENTIFYING INFORMATION, TARGET PORT GROUPS, TIMESTAMP
		0xab01, // READ MEDIA SERIAL NUMBER
		0x9e13: // REPORT REFERRALS
		return accessAllowed
	case 0x9e12, // GET LBA STATUS
		0xa30c, 0xa30d, // REPORT SUPPORTED OPERATION CODES, TASK MANAGEMENT FUNCTIONS
		0x8400, 0x8401, 0x8403, 0x8404, 0x8405, 0x8407: // RECEIVE COPY RESULTS
		return accessRead
	}
	return accessWrite
}

// access of the task's command: some go by a bit of their CDB (SBC-3 table 13).
func (t *task) access() access {
	switch t.op.opcode {
	case 0x1b: // START STOP UNIT: only a plain start is for everybody
		if t.cdb[4]&0xf1 == 0x01 {
			return accessAllowed
		}
	case 0x1e: // PREVENT ALLOW MEDIUM REMOVAL
		if t.cdb[4]&3 == 0 {
			return accessAlways
		}
	}
	return t.op.access
}

// reservationCommands are the commands that are about reservations.
func reservationCommands() []operation {
	all := []operation{
		{opcode: 0x16, service: -1, name: "RESERVE (6)", usage: []byte{0x16, 0, 0, 0, 0, 0}, handle: reserve},                           // SPC-2 7.21
		{opcode: 0x56, service: -1, name: "RESERVE (10)", usage: []byte{0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0}, handle: reserve},              // SPC-2 7.22
		{opcode: 0x17, service: -1, name: "RELEASE (6)", usage: []byte{0x17, 0, 0, 0, 0, 0}, handle: release, quick: true},              // SPC-2 7.18
		{opcode: 0x57, service: -1, name: "RELEASE (10)", usage: []byte{0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0}, handle: release, quick: true}, // SPC-2 7.19
	}
	for action, name := range [...]string{"READ KEYS", "READ RESERVATION", "REPORT CAPABILITIES", "READ FULL STATUS"} {
		all = append(all, operation{opcode: 0x5e, service: action, name: "PERSISTENT RESERVE IN, " + name, // SPC-4 6.15
			usage: []byte{0x5e, byte(action), 0, 0, 0, 0, 0, 0xff, 0xff, 0}, handle: persistentReserveIn, quick: true})
	}
	for action, name := range [...]string{"REGISTER", "RESERVE", "RELEASE", "CLEAR", "PREEMPT", "PREEMPT AND ABORT",
		"REGISTER AND IGNORE EXISTING KEY", "REGISTER AND MOVE"} {
		all = append(all, operation{opcode: 0x5f, service: action, name: "PERSISTENT RESERVE OUT, " + name, // SPC-4 6.16
			usage: []byte{0x5f, byte(action), 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0}, decode: decodePersistentOut, handle: persistentReserveOut})
	}
	return all
}
