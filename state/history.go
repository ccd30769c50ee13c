package state

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/dgraph-io/badger/v4"
)

// The audit trail is an Event for each key, apart from the records: it stays when a volume is
// forgotten or begins anew. Of each volume there are two lists, what was asked for and what
// happened by itself, so that a fault which comes and goes never pushes a step out. The numbers
// of a volume's events are those of both together, in the order in which they were appended.
const (
	eventPrefix = "a/"
	eventSchema = 1
	// MostEvents bounds the events of one volume that are kept, of each of the two lists; the
	// oldest give way.
	MostEvents = 10000
	// mostEvent bounds one event as it is stored, in bytes.
	mostEvent = 64 << 10
)

// Event is something that was done with a volume, or that happened to it.
type Event struct {
	// Sequence is the event's number within its volume, from 1 on.
	Sequence uint64 `json:"sequence"`
	// Volume is empty where the event is the service's.
	Volume string `json:"volume,omitempty"`
	// Group is the group that was stepped as a whole; empty for the volume alone.
	Group string    `json:"group,omitempty"`
	At    time.Time `json:"at"`
	Who   Who       `json:"who"`
	// What is the step that was asked for, or a word for what happened.
	What string `json:"what"`
	// Options are those of the step, without secrets.
	Options json.RawMessage `json:"options,omitempty"`
	// Result is the caller's word for how it ended, Text says more.
	Result string `json:"result"`
	Text   string `json:"text,omitempty"`
	// Took is how long it took, in milliseconds; nil while that is not known.
	Took *float64 `json:"took_ms,omitempty"`
}

// Who asked for something.
type Who struct {
	// Service is true for what lunshift does by itself; the rest is empty then.
	Service bool `json:"service,omitempty"`
	// UID and PID are of the process that asked, User the name of the UID where there is one.
	UID  *uint32 `json:"uid,omitempty"`
	User string  `json:"user,omitempty"`
	PID  int32   `json:"pid,omitempty"`
	// LoginUID and Login are who logged in to the session of that process, where the kernel
	// knows: they stay through su and sudo.
	LoginUID *uint32 `json:"login_uid,omitempty"`
	Login    string  `json:"login,omitempty"`
}

// storedEvent is an Event on disk.
type storedEvent struct {
	Schema int `json:"schema"`
	Event
}

// The lists, as the keys have them.
const (
	askedList   = 'a'
	serviceList = 's'
)

func listOf(e Event) byte {
	if e.Who.Service {
		return serviceList
	}
	return askedList
}

// eventsKey is how the keys of a volume's events begin.
func eventsKey(volume string) []byte { return append([]byte(eventPrefix+volume), 0) }

func eventKey(volume string, list byte, sequence uint64) []byte {
	return binary.BigEndian.AppendUint64(append(eventsKey(volume), list), sequence)
}

// history is what the store knows of its trails; the events are in the database alone.
type history struct {
	mu      sync.Mutex // held while events are appended, so that their order is that of the keys
	volumes map[string]*trail
}

// trail is where the events of one volume stand.
type trail struct {
	last  uint64 // sequence
	lists map[byte]eventList
}

// eventList is one of a volume's lists.
type eventList struct {
	count int
	// from is not after the oldest event: the keys before it were deleted.
	from uint64
}

// Append adds events to the trails of their volumes, all of them or none, and gives them with
// their numbers. It returns once they are on stable storage; ctx is as in PutRecords.
func (s *Store) Append(ctx context.Context, events ...Event) ([]Event, error) {
	return s.append(ctx, nil, events)
}

// AppendFollowed is Append, and keeps data as what Followed is of the volume in the same
// transaction.
func (s *Store) AppendFollowed(ctx context.Context, volume string, data []byte, events ...Event) error {
	o, err := attachment(volume, Followed, data)
	if err != nil {
		return err
	}
	_, err = s.append(ctx, []op{o}, events)
	return err
}

func (s *Store) append(ctx context.Context, ops []op, events []Event) ([]Event, error) {
	h := &s.history
	h.mu.Lock()
	defer h.mu.Unlock()
	events = slices.Clone(events)
	changed := map[string]*trail{}
	for i := range events {
		e := &events[i]
		t := changed[e.Volume]
		if t == nil {
			known, err := s.trail(e.Volume)
			if err != nil {
				return nil, err
			}
			t = &trail{known.last, map[byte]eventList{askedList: known.lists[askedList], serviceList: known.lists[serviceList]}}
			changed[e.Volume] = t
		}
		t.last++
		e.Sequence = t.last
		put, err := encodeEvent(*e)
		if err != nil {
			return nil, err
		}
		ops = append(ops, put)
		list := t.lists[listOf(*e)]
		if list.count++; list.count > MostEvents {
			oldest, found, err := s.oldest(e.Volume, listOf(*e), list.from)
			if err != nil {
				return nil, err
			}
			if found {
				ops = append(ops, op{key: eventKey(e.Volume, listOf(*e), oldest)})
				list.from = oldest + 1
			}
			list.count--
		}
		t.lists[listOf(*e)] = list
	}
	if len(ops) == 0 {
		return nil, nil
	}
	if err := s.submit(ctx, &request{records: ops}); err != nil {
		return nil, fmt.Errorf("audit trail: %w", err)
	}
	for volume, t := range changed {
		h.volumes[volume] = t
	}
	return events, nil
}

// Amend writes events in the place of those with their numbers, as Append does. One that gave
// way to newer ones stays away.
func (s *Store) Amend(ctx context.Context, events ...Event) error {
	h := &s.history
	h.mu.Lock()
	defer h.mu.Unlock()
	var ops []op
	for _, e := range events {
		t, err := s.trail(e.Volume)
		if err != nil {
			return err
		}
		if e.Sequence == 0 || e.Sequence > t.last {
			return fmt.Errorf("audit trail: volume %q has no event %d", e.Volume, e.Sequence)
		}
		if e.Sequence < t.lists[listOf(e)].from {
			continue
		}
		put, err := encodeEvent(e)
		if err != nil {
			return err
		}
		ops = append(ops, put)
	}
	if len(ops) == 0 {
		return nil
	}
	if err := s.submit(ctx, &request{records: ops}); err != nil {
		return fmt.Errorf("audit trail: %w", err)
	}
	return nil
}

// History gives the events of a volume in their order, of the service where volume is empty.
func (s *Store) History(volume string) ([]Event, error) {
	if err := checkTrail(volume); err != nil {
		return nil, err
	}
	return s.events(eventsKey(volume))
}

// Histories gives the events of all volumes and of the service in the order of time.
func (s *Store) Histories() ([]Event, error) {
	events, err := s.events([]byte(eventPrefix))
	slices.SortStableFunc(events, func(a, b Event) int { return a.At.Compare(b.At) })
	return events, err
}

// events gives those whose keys begin so, in the order of volumes and numbers.
func (s *Store) events(prefix []byte) ([]Event, error) {
	events := []Event{}
	err := s.view(func(txn *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		o.Prefix = prefix
		it := txn.NewIterator(o)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			volume, _, sequence, err := s.eventAt(it.Item().Key())
			if err != nil {
				return err
			}
			value, err := it.Item().ValueCopy(nil)
			if err != nil {
				return err
			}
			e, err := s.decodeEvent(value)
			if err != nil {
				return err
			}
			if e.Volume != volume || e.Sequence != sequence {
				return damaged(s.dir, fmt.Errorf("event %d of volume %q names %d of %q", sequence, volume, e.Sequence, e.Volume))
			}
			events = append(events, e)
		}
		return nil
	})
	slices.SortStableFunc(events, func(a, b Event) int {
		return cmp.Or(cmp.Compare(a.Volume, b.Volume), cmp.Compare(a.Sequence, b.Sequence))
	})
	return events, err
}

// trail gives where a volume's events stand; history.mu is held.
func (s *Store) trail(volume string) (*trail, error) {
	if err := checkTrail(volume); err != nil {
		return nil, err
	}
	h := &s.history
	if t := h.volumes[volume]; t != nil {
		return t, nil
	}
	t := &trail{lists: map[byte]eventList{}}
	err := s.view(func(txn *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		o.Prefix, o.PrefetchValues = eventsKey(volume), false
		it := txn.NewIterator(o)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			_, name, sequence, err := s.eventAt(it.Item().Key())
			if err != nil {
				return err
			}
			list := t.lists[name]
			if list.count++; list.count == 1 {
				list.from = sequence
			}
			t.lists[name], t.last = list, max(t.last, sequence)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if h.volumes == nil {
		h.volumes = map[string]*trail{}
	}
	h.volumes[volume] = t
	return t, nil
}

// oldest gives the number of the oldest event of a list, which is not before from.
func (s *Store) oldest(volume string, list byte, from uint64) (sequence uint64, found bool, err error) {
	err = s.view(func(txn *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		o.Prefix, o.PrefetchValues = append(eventsKey(volume), list), false
		it := txn.NewIterator(o)
		defer it.Close()
		if it.Seek(eventKey(volume, list, from)); it.Valid() {
			found = true
			_, _, sequence, err = s.eventAt(it.Item().Key())
		}
		return err
	})
	return sequence, found, err
}

// eventAt reads the key of an event.
func (s *Store) eventAt(key []byte) (volume string, list byte, sequence uint64, err error) {
	rest := key[len(eventPrefix):]
	at := bytes.IndexByte(rest, 0)
	if at < 0 || len(rest) != at+10 {
		return "", 0, 0, damaged(s.dir, fmt.Errorf("the audit trail has a key that is not readable: %q", key))
	}
	return string(rest[:at]), rest[at+1], binary.BigEndian.Uint64(rest[at+2:]), nil
}

func encodeEvent(e Event) (op, error) {
	value, err := json.Marshal(storedEvent{eventSchema, e})
	if err == nil && len(value) > mostEvent {
		err = fmt.Errorf("%d bytes, at most %d are kept", len(value), mostEvent)
	}
	if err != nil {
		return op{}, fmt.Errorf("audit trail: encode an event of volume %q: %w", e.Volume, err)
	}
	return op{key: eventKey(e.Volume, listOf(e), e.Sequence), value: value}, nil
}

func (s *Store) decodeEvent(value []byte) (Event, error) {
	var stored storedEvent
	if err := json.Unmarshal(value, &stored); err != nil || stored.Schema < 1 {
		return Event{}, damaged(s.dir, fmt.Errorf("an event of the audit trail is not readable"))
	}
	if stored.Schema > eventSchema {
		return Event{}, fmt.Errorf("state directory %s: an event of the audit trail has schema %d, this lunshift knows up to %d: %w: run the newer one",
			s.dir, stored.Schema, eventSchema, ErrVersion)
	}
	return stored.Event, nil
}

// checkTrail is checkVolume, but for the service, which has no name.
func checkTrail(volume string) error {
	if volume == "" {
		return nil
	}
	return checkVolume(volume)
}
