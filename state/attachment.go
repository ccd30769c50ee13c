package state

import (
	"bytes"
	"context"
	"fmt"
)

// Attachment is something else that is kept of a volume beside its record, as one value: a byte
// for its schema, then what the caller made of it.
type Attachment byte

const (
	// Followed is what was done already about phases that the volume came to by itself.
	// Forget drops it.
	Followed Attachment = 'f'
	// Checksums are those of the last comparison of everything. Renew and Forget drop them.
	Checksums Attachment = 'c'
	// Report is what a report needs once the volume is not there to ask. It stays.
	Report Attachment = 'r'
)

const (
	attachmentPrefix = "x/"
	attachmentSchema = 1
	// MostAttached bounds one attachment, in bytes: it must fit into a transaction beside a
	// batch of flags.
	MostAttached = 512 << 10
)

func attachmentKey(volume string, a Attachment) []byte {
	return append([]byte(attachmentPrefix), append([]byte{byte(a), '/'}, volume...)...)
}

// Attach keeps data with the volume, in place of what was kept. It returns once that is on
// stable storage. data has 1 byte to MostAttached; ctx is as in PutRecords.
func (s *Store) Attach(ctx context.Context, volume string, a Attachment, data []byte) error {
	o, err := attachment(volume, a, data)
	if err != nil {
		return err
	}
	return wrap(volume, fmt.Sprintf("keep what belongs to it (%c)", a), s.submit(ctx, &request{alone: &o}))
}

func attachment(volume string, a Attachment, data []byte) (op, error) {
	if err := checkVolume(volume); err != nil {
		return op{}, err
	}
	if len(data) == 0 || len(data) > MostAttached {
		return op{}, fmt.Errorf("volume %s: %d bytes to be kept with it (%c), 1 to %d are", volume, len(data), a, MostAttached)
	}
	return op{key: attachmentKey(volume, a), value: append([]byte{attachmentSchema}, data...)}, nil
}

// Attached gives what Attach kept last; nil where there is nothing. ErrVersion where a newer
// lunshift wrote it.
func (s *Store) Attached(volume string, a Attachment) ([]byte, error) {
	if err := checkVolume(volume); err != nil {
		return nil, err
	}
	value, err := s.get(attachmentKey(volume, a))
	if err != nil || value == nil {
		return nil, err
	}
	switch {
	case len(value) < 2 || value[0] == 0:
		return nil, damaged(s.dir, fmt.Errorf("what is kept with volume %s (%c) is not readable", volume, a))
	case value[0] > attachmentSchema:
		return nil, fmt.Errorf("state directory %s: what is kept with volume %s (%c) has schema %d, this lunshift knows up to %d: %w: run the newer one",
			s.dir, volume, a, value[0], attachmentSchema, ErrVersion)
	}
	return bytes.Clone(value[1:]), nil
}
