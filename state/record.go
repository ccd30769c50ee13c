package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dgraph-io/badger/v4"
)

// recordSchema is the newest form of a Record that this code writes and reads.
const recordSchema = 1

// phaseUntouched is the phase in which no flag of a volume can have been set. An
// empty phase means the same.
const phaseUntouched = "ready"

// Record is the durable lifecycle record of one volume.
type Record struct {
	// Volume is the volume's name, 1 to 255 bytes without NUL.
	Volume string `json:"volume"`
	// SourceID and DestinationID name the two devices, so that the flags are never
	// used for another pair.
	SourceID      string `json:"source_id"`
	DestinationID string `json:"destination_id"`
	// BlockSize is in bytes, Blocks and RegionBlocks in logical blocks.
	BlockSize    uint32 `json:"block_size"`
	Blocks       uint64 `json:"blocks"`
	RegionBlocks uint64 `json:"region_blocks"`
	// Phase is the proxy's word for where the volume stands. In any phase but
	// "ready" (or "") the volume must have flags.
	Phase  string `json:"phase"`
	Paused bool   `json:"paused"`
	// Fenced is true while the volume may hold reservations on its devices.
	Fenced bool `json:"fenced,omitempty"`
	// AcceptedKeys are the registrations of others that the start put up with, by side.
	AcceptedKeys map[string][]uint64 `json:"accepted_keys,omitempty"`
	// Presented is the identity that initiators find, where it is that of a device.
	Presented *Presented `json:"presented,omitempty"`
	// RateLimit is the copy's throttle in bytes per second, 0 for none; nil where
	// none was ever set.
	RateLimit *uint64 `json:"rate_limit,omitempty"`
	// CopiedBytes and SkippedBytes are the copier's tally at the last record.
	CopiedBytes  uint64 `json:"copied_bytes"`
	SkippedBytes uint64 `json:"skipped_bytes"`
	// Compare is true where the copy compares both devices and writes only what differs;
	// ComparedBytes and EqualBytes are its tally then, like the two above.
	Compare       bool   `json:"compare,omitempty"`
	ComparedBytes uint64 `json:"compared_bytes,omitempty"`
	EqualBytes    uint64 `json:"equal_bytes,omitempty"`
	// AllocatedBytes is the storage of the source; nil until it is known.
	AllocatedBytes *uint64 `json:"allocated_bytes,omitempty"`
	// CopiedBackBytes is what was copied to the source.
	CopiedBackBytes uint64 `json:"copied_back_bytes,omitempty"`
	// Mirror is whether writes go to both sides; nil where that was never switched.
	Mirror *bool `json:"mirror,omitempty"`
	// Mirrored is true once writes went to both sides since the start.
	Mirrored bool `json:"mirrored,omitempty"`
	// ClearedBytes is the size of the blocks that were dirty until both sides of a mirror had
	// them, each as often as that was so.
	ClearedBytes uint64 `json:"cleared_bytes,omitempty"`
	// InitiatorWrittenBytes is the size of the dirty blocks at the last record.
	InitiatorWrittenBytes uint64 `json:"initiator_written_bytes"`

	CreatedAt time.Time  `json:"created_at"`
	StartedAt *time.Time `json:"started_at,omitempty"`
	SyncedAt  *time.Time `json:"synced_at,omitempty"`
	CutoverAt *time.Time `json:"cutover_at,omitempty"`
	// RollbackAt is when the source took the writes again, RolledBackAt when it had
	// everything.
	RollbackAt   *time.Time `json:"rollback_at,omitempty"`
	RolledBackAt *time.Time `json:"rolled_back_at,omitempty"`
	// Hold is how long initiator I/O was held at cutover, or else at the rollback.
	Hold *time.Duration `json:"hold_ns,omitempty"`
	// Unreadable is what the source could not read when it was last tried, Accepted
	// what of it was given up and zeroed on the destination; both in rising order.
	Unreadable []Run `json:"unreadable,omitempty"`
	Accepted   []Run `json:"accepted_unreadable,omitempty"`
	// Verified is the last comparison of source and destination; nil without.
	Verified *Verified `json:"verified,omitempty"`
	// VerifiedAll is the last comparison of everything, VerifiedSample that of a part.
	VerifiedAll    *Verified `json:"verified_all,omitempty"`
	VerifiedSample *Verified `json:"verified_sample,omitempty"`
	// Different is the last one that found a difference, unless one of everything that found
	// none came after it.
	Different *Verified `json:"different,omitempty"`
}

// Presented is the identity of a device as initiators find it on the volume: it stays from the
// start of a migration to its end, whatever becomes of the device.
type Presented struct {
	// From is the proxy's word for the device.
	From string `json:"from"`
	// Standard, Serial and Designators are as INQUIRY gives them.
	Standard    []byte `json:"standard"`
	Serial      []byte `json:"serial,omitempty"`
	Designators []byte `json:"designators"`
}

// Verified is the outcome of a comparison of source and destination.
type Verified struct {
	At time.Time `json:"at"`
	// Sample is true where a part was compared. The sizes are bytes.
	Sample         bool   `json:"sample"`
	ComparedBytes  uint64 `json:"compared_bytes"`
	DifferentBytes uint64 `json:"different_bytes"`
	// UnallocatedBytes had storage on neither side, UnusedBytes were left out by the copy as
	// free, WrittenBytes were written by initiators or given up.
	UnallocatedBytes uint64 `json:"unallocated_bytes,omitempty"`
	UnusedBytes      uint64 `json:"unused_bytes,omitempty"`
	WrittenBytes     uint64 `json:"initiator_written_bytes,omitempty"`
}

// storedRecord is a Record on disk.
type storedRecord struct {
	Schema int `json:"schema"`
	Record
}

// PutRecords writes the records in one transaction: after a crash all of them
// are there or none. It returns once they are on stable storage. If ctx ends
// before the committer took them up nothing is written; if later, it waits for the
// outcome.
func (s *Store) PutRecords(ctx context.Context, recs ...Record) error {
	if len(recs) == 0 {
		return nil
	}
	ops, err := encodeRecords(recs)
	if err != nil {
		return err
	}
	return s.submit(ctx, &request{records: ops})
}

func encodeRecords(recs []Record) ([]op, error) {
	var ops []op
	for _, rec := range recs {
		if err := checkVolume(rec.Volume); err != nil {
			return nil, err
		}
		value, err := json.Marshal(storedRecord{recordSchema, rec})
		if err != nil {
			return nil, fmt.Errorf("volume %s: encode record: %w", rec.Volume, err)
		}
		ops = append(ops, op{key: recordKey(rec.Volume), value: value})
	}
	return ops, nil
}

// Record gives a volume's record, and false where there is none.
func (s *Store) Record(volume string) (Record, bool, error) {
	if err := checkVolume(volume); err != nil {
		return Record{}, false, err
	}
	value, err := s.get(recordKey(volume))
	if err != nil || value == nil {
		return Record{}, false, err
	}
	rec, err := s.decodeRecord(volume, value)
	return rec, err == nil, err
}

// Records gives every record in the order of the volumes' names.
func (s *Store) Records() ([]Record, error) {
	var recs []Record
	err := s.view(func(txn *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		o.Prefix = []byte(recordPrefix)
		it := txn.NewIterator(o)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			value, err := it.Item().ValueCopy(nil)
			if err != nil {
				return err
			}
			rec, err := s.decodeRecord(string(it.Item().Key()[len(recordPrefix):]), value)
			if err != nil {
				return err
			}
			recs = append(recs, rec)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return recs, nil
}

func (s *Store) decodeRecord(volume string, value []byte) (Record, error) {
	var schema struct{ Schema int }
	if err := json.Unmarshal(value, &schema); err != nil || schema.Schema < 1 {
		return Record{}, damaged(s.dir, fmt.Errorf("record of volume %s is not readable", volume))
	}
	if schema.Schema > recordSchema {
		return Record{}, fmt.Errorf("state directory %s: record of volume %s has schema %d, this lunshift knows up to %d: %w: run the newer one",
			s.dir, volume, schema.Schema, recordSchema, ErrVersion)
	}
	var stored storedRecord
	if err := json.Unmarshal(value, &stored); err != nil {
		return Record{}, damaged(s.dir, fmt.Errorf("record of volume %s: %w", volume, err))
	}
	if stored.Volume != volume {
		return Record{}, damaged(s.dir, fmt.Errorf("record of volume %s names volume %s", volume, stored.Volume))
	}
	return stored.Record, nil
}

// get reads one key; nil where there is none.
func (s *Store) get(key []byte) (value []byte, err error) {
	err = s.view(func(txn *badger.Txn) error {
		item, err := txn.Get(key)
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		value, err = item.ValueCopy([]byte{})
		return err
	})
	return value, err
}

// view runs fn on a snapshot. It holds Close back while fn runs. What fn or the
// database cannot read is damage.
func (s *Store) view(fn func(*badger.Txn) error) (err error) {
	s.reading.RLock()
	defer s.reading.RUnlock()
	defer func() {
		if r := recover(); r != nil {
			err = damaged(s.dir, fmt.Errorf("reading the database: %v", r))
		}
	}()
	if s.db.IsClosed() {
		return ErrClosed
	}
	if err = s.db.View(fn); err != nil {
		err = damaged(s.dir, err)
	}
	return err
}

func checkVolume(name string) error {
	if name == "" || len(name) > 255 || strings.ContainsRune(name, 0) {
		return fmt.Errorf("volume name %q: want 1 to 255 bytes without NUL", name)
	}
	return nil
}
