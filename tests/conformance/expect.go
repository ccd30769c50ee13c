package main

import (
	"fmt"
	"slices"
	"strings"
)

// exception is a case, or with "*" at the end several, that need not pass plainly.
type exception struct {
	id      string // Suite.Case
	outcome outcome
	says    string // what the suite's words must hold
	reason  string
	section string
}

const (
	notRemovable = "the medium is not removable"
	noSanitize   = "SANITIZE is not offered: it would destroy the data of a volume that is being moved"
	noZeroBlocks = "a number of 0 blocks is refused, and the case sees that it is: it would mean all blocks up to the end"
	oneBlock     = "a physical block is a logical block of 4096 bytes"
	noAtomic     = "WRITE ATOMIC is not offered: no source or destination promises more than single blocks"
)

// exceptions are all the cases that need not pass. A case that passes needs none, and is
// not held to one.
var exceptions = []exception{
	{"NoMedia.NoMediaSBC", skipped, "not removable", notRemovable, "SPC-4 6.6.2 RMB"},
	{"PreventAllow.*", skipped, "not removable", notRemovable, "SBC-3 5.10"},
	{"StartStopUnit.*", skipped, "not removable", notRemovable, "SBC-3 5.23"},
	{"ReadOnly.ReadOnlySBC", skipped, "not write-protected", "the medium is not write-protected", "SBC-3 4.14"},
	{"Sanitize.*", skipped, "--allow-sanitize", noSanitize, "SBC-3 5.22"},
	{"WriteSame10.ZeroBlocks", skipped, "does not support 0-blocks", noZeroBlocks, "SBC-3 6.6.3 WSNZ"},
	{"WriteSame16.ZeroBlocks", skipped, "does not support 0-blocks", noZeroBlocks, "SBC-3 6.6.3 WSNZ"},
	{"WriteAtomic16.*", skipped, "not implemented", noAtomic, "SBC-4 5.48"},
}

// physical are exceptions of units with more than one logical block per physical block:
// the case asks for the status from LBA i+1 on and wants i+8 in the first descriptor.
var physical = []exception{{"GetLBAStatus.UnmapSingle", failed, "lba offset in first descriptor",
	"the first descriptor begins with the LBA that was asked for", "SBC-3 5.6.2"}}

// logical are exceptions of units without: the cases need a physical block that is not a
// logical one.
var logical = []exception{
	{"CompareAndWrite.InvalidDataOutSize", skipped, "LBPPB < 2", oneBlock, "SBC-3 5.16.2"},
	{"WriteSame10.InvalidDataOutSize", skipped, "LBPPB < 2", oneBlock, "SBC-3 5.16.2"},
	{"WriteSame16.InvalidDataOutSize", skipped, "LBPPB < 2", oneBlock, "SBC-3 5.16.2"},
	{"WriteSame10.UnmapUnaligned", skipped, "LBPPB < 2", oneBlock, "SBC-3 5.16.2"},
	{"WriteSame16.UnmapUnaligned", skipped, "LBPPB < 2", oneBlock, "SBC-3 5.16.2"},
}

// exceptionsOf are the exceptions of a unit with that block length, over files whose
// physical blocks are of 4096 bytes.
func exceptionsOf(block int) []exception {
	if block < 4096 {
		return append(slices.Clone(exceptions), physical...)
	}
	return append(slices.Clone(exceptions), logical...)
}

// complaint is what passed cases print of commands that are refused on purpose.
type complaint struct {
	id, says string
	reason   string
}

var complaints = []complaint{
	{"iSCSIdatasn.iSCSIDataSnInvalid", "WRITE10 command failed with status 2 / sense key COMMAND ABORTED(0x0b) / ASCQ (null)(0x4705)",
		"the case sends wrong DataSNs and wants the WRITE refused (RFC 7143 7.8: sequence errors)"},
	{"Reserve6.TargetWarmReset", resetTold, afterReset},
	{"Reserve6.TargetColdReset", resetTold, afterReset},
	{"Reserve6.LUNReset", resetTold, afterReset},
	{"Reserve6.LUNReset", "RESERVE6 command: failed with sense. SENSE KEY:UNIT_ATTENTION(6) ASCQ:BUS_DEVICE_RESET_FUNCTION_OCCURED(0x2903)", afterReset},
}

const (
	resetTold  = "RESERVE6 command: failed with sense. SENSE KEY:UNIT_ATTENTION(6) ASCQ:SCSI_BUS_RESET_OCCURED(0x2902)"
	afterReset = "the other session is told of the reset by its next command (SAM-5 5.14), which the case repeats"
)

// matches tells whether the exception is of that case.
func (e exception) matches(c testCase) bool {
	if prefix, many := strings.CutSuffix(e.id, "*"); many {
		return strings.HasPrefix(c.ID(), prefix)
	}
	return e.id == c.ID()
}

// fault says what is wrong with a case; empty where it is as it should be.
func fault(c testCase, list []exception) string {
	name := c.Family + "." + c.ID()
	if c.Outcome != passed && !slices.ContainsFunc(list, func(e exception) bool {
		return e.matches(c) && e.outcome == c.Outcome && strings.Contains(c.Why, e.says)
	}) {
		return fmt.Sprintf("%s: %s: %s", name, c.Outcome, c.Why)
	}
	for _, says := range c.Complaints {
		if !slices.ContainsFunc(complaints, func(k complaint) bool { return k.id == c.ID() && k.says == says }) {
			return fmt.Sprintf("%s passed, but printed %q", name, says)
		}
	}
	return ""
}
