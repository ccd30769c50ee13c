package state

import (
	"bytes"
	"context"
	"fmt"
)

// What a migration left out because the source's file systems had it free is one value: a
// byte for its schema, then what the volume made of it. It belongs to one migration: Renew
// and Forget drop it.
const (
	unusedPrefix = "u/"
	unusedSchema = 1
	// MostUnused bounds the value, in bytes: it must fit into a transaction beside a batch
	// of flags.
	MostUnused = 512 << 10
)

func unusedKey(volume string) []byte { return []byte(unusedPrefix + volume) }

// PutUnused keeps data as what a migration of the volume leaves out, in place of what was
// kept. It returns once that is on stable storage. data has 1 byte to MostUnused. If ctx
// ends before the committer took it up nothing is written; if later, it waits for the
// outcome.
func (s *Store) PutUnused(ctx context.Context, volume string, data []byte) error {
	if err := checkVolume(volume); err != nil {
		return err
	}
	if len(data) == 0 || len(data) > MostUnused {
		return fmt.Errorf("volume %s: %d bytes of what is left out, 1 to %d are kept", volume, len(data), MostUnused)
	}
	o := &op{key: unusedKey(volume), value: append([]byte{unusedSchema}, data...)}
	return wrap(volume, "keep what is left out", s.submit(ctx, &request{alone: o}))
}

// Unused gives what PutUnused kept last; nil where there is nothing. ErrVersion where a
// newer lunshift wrote it.
func (s *Store) Unused(volume string) ([]byte, error) {
	if err := checkVolume(volume); err != nil {
		return nil, err
	}
	value, err := s.get(unusedKey(volume))
	if err != nil || value == nil {
		return nil, err
	}
	switch {
	case len(value) < 2 || value[0] == 0:
		return nil, damaged(s.dir, fmt.Errorf("what volume %s leaves out is not readable", volume))
	case value[0] > unusedSchema:
		return nil, fmt.Errorf("state directory %s: what volume %s leaves out has schema %d, this lunshift knows up to %d: %w: run the newer one",
			s.dir, volume, value[0], unusedSchema, ErrVersion)
	}
	return bytes.Clone(value[1:]), nil
}
