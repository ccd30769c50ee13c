package proxy

import (
	"context"
)

// reservations keeps the persistent reservations of a volume's initiators in the state,
// under the volume's name: they are the same in every phase.
type reservations struct {
	store  store
	volume string
}

// Load implements target.ReservationStore.
func (r reservations) Load() ([]byte, error) { return r.store.Reservation(r.volume) }

// Save implements target.ReservationStore.
func (r reservations) Save(ctx context.Context, data []byte) error {
	return r.store.PutReservation(ctx, r.volume, data)
}
