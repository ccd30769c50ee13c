package state

import (
	"context"
	"crypto/rand"
	"fmt"
)

// identityKey holds a byte for the schema, then the identity.
const (
	identityKey    = "i/identity"
	identitySchema = 1
)

// Identity tells one state from another: a random value that is made at its first use and
// stays as long as the directory. A directory that was copied has the identity of the
// original.
type Identity [16]byte

// Identity gives the state's identity once it is on stable storage.
func (s *Store) Identity(ctx context.Context) (Identity, error) {
	s.loading.Lock() // two callers must not make two
	defer s.loading.Unlock()
	var id Identity
	value, err := s.get([]byte(identityKey))
	switch {
	case err != nil:
		return id, err
	case value == nil:
	case len(value) == 0 || value[0] == 0, value[0] == identitySchema && len(value) != 1+len(id):
		return id, damaged(s.dir, fmt.Errorf("the identity of the state is not readable"))
	case value[0] > identitySchema:
		return id, fmt.Errorf("state directory %s: its identity has schema %d, this lunshift knows up to %d: %w: run the newer one", s.dir, value[0], identitySchema, ErrVersion)
	default:
		return Identity(value[1:]), nil
	}
	if _, err := rand.Read(id[:]); err != nil {
		return id, fmt.Errorf("state directory %s: make an identity: %w", s.dir, err)
	}
	made := &op{key: []byte(identityKey), value: append([]byte{identitySchema}, id[:]...)}
	if err := s.submit(ctx, &request{alone: made}); err != nil {
		return id, fmt.Errorf("state directory %s: keep its identity: %w", s.dir, err)
	}
	return id, nil
}
