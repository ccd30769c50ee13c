package proxy

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"lunshift/target"
)

// Phase is where a volume stands in its life; lifecycle.go holds what each means.
type Phase string

// The phases, in the order of a migration, and of one that is undone.
const (
	Ready       Phase = "ready"
	Migrating   Phase = "migrating"
	Synced      Phase = "synced"
	Cutover     Phase = "cutover"
	RollingBack Phase = "rolling-back"
	RolledBack  Phase = "rolled-back"
)

// Phases lists every phase in that order.
var Phases = []Phase{Ready, Migrating, Synced, Cutover, RollingBack, RolledBack}

// Moving tells whether blocks are on both sides: the flags count, and both units are
// needed and fenced.
func (p Phase) Moving() bool { return p == Migrating || p == Synced || p == RollingBack }

// Reached tells whether a volume in phase at has been in phase p since it was started;
// possible is false where it cannot come there any more by itself.
func Reached(at, p Phase) (reached, possible bool) {
	a, b := slices.Index(Phases, at), slices.Index(Phases, p)
	undone := at == RollingBack || at == RolledBack
	switch {
	case undone && (p == Synced || p == Cutover):
		return false, false
	case at == Cutover && b > a:
		return false, false
	}
	return a >= b, true
}

// ErrPhase marks a step that is not allowed in the volume's phase.
var ErrPhase = errors.New("not allowed in this phase")

// PhaseError says which step was refused in which phase, and what to do.
type PhaseError struct {
	Volume string
	Step   string
	Phase  Phase
	Hint   string
}

func (e *PhaseError) Error() string {
	s := fmt.Sprintf("volume %s: %s is not allowed in phase %s", e.Volume, e.Step, e.Phase)
	if e.Hint != "" {
		s += ": " + e.Hint
	}
	return s
}

// Is makes errors.Is(err, ErrPhase) hold.
func (e *PhaseError) Is(target error) bool { return target == ErrPhase }

// Refusal is a condition of the two logical units that forbids a migration:
// destination smaller, same device, not blank and the like. Its text is one line
// that says what is wrong and what to do.
type Refusal struct{ Reason string }

func (r *Refusal) Error() string { return r.Reason }

// UnitStatus is one side of a volume.
type UnitStatus struct {
	// Address is the URL or path without secrets.
	Address string `json:"address"`
	// State is "online", or "unavailable" with Reason.
	State   string `json:"state"`
	Reason  string `json:"reason,omitempty"`
	ID      string `json:"id"`
	Vendor  string `json:"vendor,omitempty"`
	Product string `json:"product,omitempty"`
	Serial  string `json:"serial,omitempty"`
	Size    uint64 `json:"size_bytes"`
	Thin    bool   `json:"thin"`
	// Errors counts commands that failed since the service started.
	Errors uint64 `json:"errors"`
	// Fence is what keeps others from writing to the unit: "reserved" (a persistent
	// reservation), "locked" (on this host), "none", or "lost" where somebody else holds
	// what was held.
	Fence string `json:"fence,omitempty"`
}

// Happening is a phase that a volume came to, or a fault that began or is over.
type Happening struct {
	Volume string
	At     time.Time
	// Phase is empty where it is a fault.
	Phase Phase
	// Fault is the kind of a fault. Text is empty where it is over.
	Fault, Text string
}

// BlockRun is a run of logical blocks as it is shown to people and scripts.
type BlockRun struct {
	LBA    uint64 `json:"lba"`
	Blocks uint64 `json:"blocks"`
}

// Status is a volume at one instant. Sizes and counts are bytes.
type Status struct {
	Name   string `json:"name"`
	IQN    string `json:"iqn"`
	LUN    uint64 `json:"lun"`
	Phase  Phase  `json:"phase"`
	Paused bool   `json:"paused"`
	// Queued is which of the volumes that wait for others to be copied this one is, from 1 on;
	// 0 where it does not wait. It is served all the same.
	Queued   int  `json:"queue_position"`
	Degraded bool `json:"degraded"`
	// DegradedReason is set where Degraded is.
	DegradedReason string `json:"degraded_reason,omitempty"`

	// Identity is whose identity initiators find, Access how well they are told to do to
	// come this way (asymmetric access state, SPC-4 5.15.2).
	Identity Identity `json:"identity,omitempty"`
	Access   string   `json:"access_state,omitempty"`

	Size      uint64 `json:"size_bytes"`
	BlockSize uint32 `json:"block_size"`
	// Allocated is what the source has storage for; while AllocatedKnown is false
	// the allocation map is still being read and Allocated is what was seen so far.
	Allocated      uint64 `json:"allocated_bytes"`
	AllocatedKnown bool   `json:"allocated_known"`
	// Allocation says what tells which blocks of the source are copied, AllocationFound what
	// was found on the source, where its file systems tell. Unused is what they had free.
	Allocation      string   `json:"allocation,omitempty"`
	AllocationFound []string `json:"allocation_found"`
	Unused          uint64   `json:"unused_bytes"`
	// Copied is what the copier put on the destination as data.
	Copied uint64 `json:"copied_bytes"`
	// Skipped is what the copier did not have to copy: unallocated or zero.
	Skipped uint64 `json:"skipped_bytes"`
	// Compare tells whether both sides are compared and only what differs is written.
	// Compared is what was read from both, or from the destination where the source has no
	// storage; Equal is what of it was there already.
	Compare  bool   `json:"compare"`
	Compared uint64 `json:"compared_bytes"`
	Equal    uint64 `json:"equal_bytes"`
	// InitiatorWritten is the size of the blocks initiators wrote since start. With a mirror a
	// block counts once more when it is written after both sides had it, up to Size.
	InitiatorWritten uint64 `json:"initiator_written_bytes"`
	// CopiedBack is what was copied from the destination back to the source: after a
	// rollback, or for a mirror that was behind.
	CopiedBack uint64 `json:"copied_back_bytes"`
	// Mirrored tells whether each write goes to the source too, or will from the start on.
	Mirrored bool `json:"mirrored"`
	// MirrorUsed tells whether writes went to both sides at any time since the start.
	MirrorUsed bool `json:"mirror_used"`
	// Mirror is how far the source follows; null where writes go to the destination alone.
	Mirror *MirrorStatus `json:"mirror"`
	// Remaining is what is not yet valid on the destination; in phase rolling-back on the
	// source.
	Remaining uint64 `json:"remaining_bytes"`
	// Unreadable is the size of the blocks that the side which is copied from cannot read and no initiator
	// wrote since, UnreadableRuns where they are. They are part of Remaining.
	Unreadable     uint64     `json:"unreadable_bytes"`
	UnreadableRuns []BlockRun `json:"unreadable"`
	// AcceptedUnreadable is the size of such blocks that were accepted as lost; they
	// read as zeroes on the destination.
	AcceptedUnreadable uint64 `json:"accepted_unreadable_bytes"`
	// Readback tells whether copied blocks are read back from the destination.
	Readback bool `json:"readback"`
	// ChecksumErrors counts blocks that changed in memory between the source and the
	// destination, ReadbackErrors those that the destination gave back otherwise than they
	// were written, since the service started. They were copied again.
	ChecksumErrors uint64 `json:"checksum_errors"`
	ReadbackErrors uint64 `json:"readback_errors"`
	// Rate is the copy's current speed, RateLimit its throttle (0 none).
	Rate      uint64 `json:"copy_rate_bytes_per_second"`
	RateLimit uint64 `json:"copy_rate_limit_bytes_per_second"`
	// ETA is null when it cannot be told: not migrating, paused, or no rate yet.
	ETA *int64 `json:"eta_seconds"`

	StartedAt *time.Time `json:"started_at,omitempty"`
	SyncedAt  *time.Time `json:"synced_at,omitempty"`
	CutoverAt *time.Time `json:"cutover_at,omitempty"`
	// RollbackAt is when the source took the writes again, RolledBackAt when it had everything.
	RollbackAt   *time.Time `json:"rollback_at,omitempty"`
	RolledBackAt *time.Time `json:"rolled_back_at,omitempty"`
	// Hold is how long commands of initiators were held at the cutover or the rollback, in milliseconds.
	Hold *float64 `json:"hold_ms,omitempty"`

	// Verify is null where source and destination were never compared.
	Verify *VerifyStatus `json:"verify"`

	Sessions []target.SessionInfo `json:"sessions"`
	// Reservation is what initiators have reserved on the volume.
	Reservation target.ReservationInfo `json:"reservation"`
	// Dropped are the sessions that a forced cutover ended because they did not log out;
	// nobody after a restart of the service.
	Dropped     []target.SessionInfo `json:"dropped_sessions,omitempty"`
	Source      UnitStatus           `json:"source"`
	Destination UnitStatus           `json:"destination"`
}
