package state

import (
	"bytes"
	"context"
	"fmt"
)

// A volume's reservations are one value: a byte for its schema, then what the target
// made of them. Their key is apart from the record, so that a volume that begins anew
// keeps them (Renew).
const (
	reservationPrefix = "p/"
	reservationSchema = 1
	// mostReservation bounds the value, in bytes: it must fit into a transaction beside
	// a batch of flags.
	mostReservation = 512 << 10
)

func reservationKey(volume string) []byte { return []byte(reservationPrefix + volume) }

// PutReservation keeps data as the persistent reservations of a volume, in place of
// what was kept; empty data removes it. It returns once that is on stable storage,
// committed together with the flags that are due. data is at most 512 KiB. If ctx ends
// before the committer took it up nothing is written; if later, it waits for the
// outcome.
func (s *Store) PutReservation(ctx context.Context, volume string, data []byte) error {
	if err := checkVolume(volume); err != nil {
		return err
	}
	if len(data) > mostReservation {
		return fmt.Errorf("volume %s: reservations of %d bytes, at most %d are kept", volume, len(data), mostReservation)
	}
	o := &op{key: reservationKey(volume)}
	if len(data) > 0 {
		o.value = append([]byte{reservationSchema}, data...)
	}
	return wrap(volume, "keep its reservations", s.submit(ctx, &request{alone: o}))
}

// Reservation gives what PutReservation kept last; nil where there is nothing.
// ErrVersion where a newer lunshift wrote it.
func (s *Store) Reservation(volume string) ([]byte, error) {
	if err := checkVolume(volume); err != nil {
		return nil, err
	}
	value, err := s.get(reservationKey(volume))
	if err != nil || value == nil {
		return nil, err
	}
	switch {
	case len(value) < 2 || value[0] == 0:
		return nil, damaged(s.dir, fmt.Errorf("reservations of volume %s are not readable", volume))
	case value[0] > reservationSchema:
		return nil, fmt.Errorf("state directory %s: reservations of volume %s have schema %d, this lunshift knows up to %d: %w: run the newer one",
			s.dir, volume, value[0], reservationSchema, ErrVersion)
	}
	return bytes.Clone(value[1:]), nil
}
