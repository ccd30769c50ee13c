package state

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
	"github.com/dgraph-io/badger/v4"
)

// Keys. A volume's flags lie under a generation, a random number that its header
// names: forgetting the header forgets all of them at once, and what is left of
// them can never be taken for those of a new volume of the same name.
//
//	"s"                                          number of the last commit
//	"r/" volume                                  record
//	"h/" volume                                  header: generation, geometry, turn (turn.go)
//	"p/" volume                                  persistent reservations (reservation.go)
//	"u/" volume                                  what its migration leaves out (unused.go)
//	"f/" generation 'c' kind chunk               all bits of 8192 regions
//	"f/" generation 'j' hash                     entry of a journal (entry.go) that is to be dealt with
//	"f/" generation 'p' region                   bitmaps of a partial region
const (
	seqKey       = "s"
	recordPrefix = "r/"
	headerPrefix = "h/"
	flagsPrefix  = "f/"

	chunkMark  = 'c'
	entryMark  = 'j'
	regionMark = 'p'
	genSize    = len(flagsPrefix) + 8
)

func recordKey(volume string) []byte { return []byte(recordPrefix + volume) }
func headerKey(volume string) []byte { return []byte(headerPrefix + volume) }

func genKey(gen uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte(flagsPrefix), gen)
}

func chunkKey(gen uint64, kind int, chunk uint64) []byte {
	return binary.BigEndian.AppendUint64(append(genKey(gen), chunkMark, byte(kind)), chunk)
}

func regionKey(gen, region uint64) []byte {
	return binary.BigEndian.AppendUint64(append(genKey(gen), regionMark), region)
}

func entryKey(gen uint64, entry []byte) []byte {
	return binary.BigEndian.AppendUint64(append(genKey(gen), entryMark), xxhash.Sum64(entry))
}

func encodeWords(words []uint64) []byte {
	b := make([]byte, 0, 8*len(words))
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

func decodeWords(b []byte) []uint64 {
	words := make([]uint64, len(b)/8)
	for i := range words {
		words[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	return words
}

// A region's value begins with a byte that says whose bitmaps follow: bit i that
// of kind i, sameBitmap that all of them are equal and stored once, asRuns that each is
// the count of its runs of set bits and then, for each run, the clear bits before it and
// its length, all uvarints.
const (
	sameBitmap = 0x80
	asRuns     = 0x40
)

// encodeRegion stores m as runs where it may and that is shorter.
func encodeRegion(m regionBitmaps, compact bool) []byte {
	var tag byte
	dense := make([]byte, 1, 1+8*(len(m[0])+len(m[1])))
	runs := make([]byte, 1, 64)
	for i, words := range m {
		switch {
		case words == nil:
			continue
		case tag != 0 && equalWords(words, m[0]):
			tag |= sameBitmap
		default:
			for _, w := range words {
				dense = binary.LittleEndian.AppendUint64(dense, w)
			}
			runs = appendRuns(runs, words)
		}
		tag |= 1 << i
	}
	if compact && len(runs) < len(dense) {
		runs[0] = tag | asRuns
		return runs
	}
	dense[0] = tag
	return dense
}

func appendRuns(b []byte, words []uint64) []byte {
	var n, gap uint64
	var runs []byte
	size := 64 * uint64(len(words))
	for at := uint64(0); at < size; {
		same := runLength(words, at, size-at)
		if words[at/64]>>(at%64)&1 == 0 {
			gap = same
		} else {
			runs = binary.AppendUvarint(binary.AppendUvarint(runs, gap), same)
			n, gap = n+1, 0
		}
		at += same
	}
	return append(binary.AppendUvarint(b, n), runs...)
}

// decodeRegion gives the bitmaps, in scratch where that has room.
func decodeRegion(b []byte, words int, scratch []uint64) (m regionBitmaps, err error) {
	if len(b) == 0 {
		return m, fmt.Errorf("empty value")
	}
	tag := b[0]
	kinds := tag &^ (sameBitmap | asRuns)
	if kinds == 0 || kinds >= 1<<kindCount || tag&sameBitmap != 0 && bits.OnesCount8(kinds) < 2 {
		return m, fmt.Errorf("unknown tag %#x", tag)
	}
	if len(scratch) < kindCount*words {
		scratch = make([]uint64, bits.OnesCount8(kinds)*words)
	}
	b = b[1:]
	for i := range m {
		switch {
		case kinds&(1<<i) == 0:
			continue
		case i > 0 && tag&sameBitmap != 0:
			m[i] = m[0]
			continue
		}
		m[i], scratch = scratch[:words:words], scratch[words:]
		if b, err = decodeBitmap(b, m[i], tag&asRuns != 0); err != nil {
			return regionBitmaps{}, err
		}
	}
	if len(b) > 0 {
		return regionBitmaps{}, fmt.Errorf("%d bytes too many", len(b))
	}
	return m, nil
}

// decodeBitmap fills words from the beginning of b and gives the rest of b.
func decodeBitmap(b []byte, words []uint64, runs bool) (rest []byte, err error) {
	if !runs {
		if len(b) < 8*len(words) {
			return nil, errCutOff
		}
		for i := range words {
			words[i] = binary.LittleEndian.Uint64(b[8*i:])
		}
		return b[8*len(words):], nil
	}
	clear(words)
	next := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			err = errCutOff
			return 0
		}
		b = b[n:]
		return v
	}
	size, at := 64*uint64(len(words)), uint64(0)
	for n := next(); n > 0 && err == nil; n-- {
		gap, length := next(), next()
		if gap > size-at || length > size-at-gap || length == 0 {
			return nil, cmp.Or(err, fmt.Errorf("a run reaches beyond the region"))
		}
		setBits(words, at+gap, length)
		at += gap + length
	}
	return b, err
}

// Flags gives the flags of a volume, and begins them, none set, for a volume that
// has none. Every call for one volume gives the same Flags.
//
// ErrGeometry where they were kept for another geometry; ErrCorrupt where they are
// damaged, or missing although the volume's record is in a phase past "ready".
func (s *Store) Flags(volume string, g Geometry) (*Flags, error) {
	if err := checkVolume(volume); err != nil {
		return nil, err
	}
	if err := g.check(); err != nil {
		return nil, fmt.Errorf("volume %s: flags: %w", volume, err)
	}
	s.loading.Lock()
	defer s.loading.Unlock()
	s.mu.Lock()
	f := s.flags[volume]
	s.mu.Unlock()
	if f != nil {
		return f, s.checkGeometry(volume, f.geo, g)
	}
	header, err := s.get(headerKey(volume))
	if err != nil {
		return nil, err
	}
	if header == nil {
		return s.begin(volume, g)
	}
	h, err := decodeHeader(header)
	if err != nil {
		return nil, damaged(s.dir, fmt.Errorf("flags of volume %s: %w", volume, err))
	}
	if err := s.checkGeometry(volume, h.geometry(), g); err != nil {
		return nil, err
	}
	f = newFlags(s, volume, h.Generation, g)
	f.compact = h.Schema >= compactSchema
	f.turn.Store(h.Turn)
	f.backward.Store(h.Backward)
	if err := s.view(f.load); err != nil {
		return nil, err
	}
	if err := s.submitEntries(f.leftover); err != nil {
		return nil, wrap(volume, "load flags", err)
	}
	f.leftover = nil
	if err := f.setNoted(); err != nil {
		return nil, err
	}
	s.keep(f)
	return f, nil
}

// begin starts the flags of a volume that has none.
func (s *Store) begin(volume string, g Geometry) (*Flags, error) {
	rec, ok, err := s.Record(volume)
	if err != nil {
		return nil, err
	}
	if ok && rec.Phase != "" && rec.Phase != phaseUntouched {
		return nil, damaged(s.dir, fmt.Errorf("volume %s is in phase %s, but its flags are missing", volume, rec.Phase))
	}
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, fmt.Errorf("volume %s: flags: %w", volume, err)
	}
	f := newFlags(s, volume, binary.BigEndian.Uint64(b[:]), g)
	f.compact = true
	header, err := f.header(0, false)
	if err != nil {
		return nil, err
	}
	r := &request{records: []op{header}}
	if err := s.submit(context.Background(), r); err != nil {
		return nil, wrap(volume, "begin flags", err)
	}
	s.keep(f)
	return f, nil
}

func (s *Store) keep(f *Flags) {
	s.mu.Lock()
	s.flags[f.volume] = f
	s.mu.Unlock()
}

func (s *Store) checkGeometry(volume string, have, want Geometry) error {
	if have == want {
		return nil
	}
	return fmt.Errorf("volume %s: flags in %s are of %d blocks in regions of %d, the volume has %d in regions of %d: %w: set the former size and region size again, or forget the volume",
		volume, s.dir, have.Blocks, have.RegionBlocks, want.Blocks, want.RegionBlocks, ErrGeometry)
}

const (
	headerSchema = 3
	// compactSchema is from where on bitmaps may be stored as runs.
	compactSchema = 2
	// turnSchema is that of flags which had a Turn. An older lunshift, which would set what
	// a backward turn clears, refuses it.
	turnSchema = 3
)

// storedHeader says that a volume has flags, and where.
type storedHeader struct {
	Schema       int    `json:"schema"`
	Generation   uint64 `json:"generation"`
	Blocks       uint64 `json:"blocks"`
	RegionBlocks uint64 `json:"region_blocks"`
	ChunkRegions uint64 `json:"chunk_regions"`
	// Turn and Backward are of turnSchema, and left out before.
	Turn     uint64 `json:"turn,omitempty"`
	Backward bool   `json:"backward,omitempty"`
}

// header is the op that stores the header of f in that turn.
func (f *Flags) header(turn uint64, backward bool) (op, error) {
	schema := compactSchema
	if turn > 0 {
		schema = turnSchema
	}
	value, err := json.Marshal(storedHeader{schema, f.gen, f.geo.Blocks, f.geo.RegionBlocks, chunkRegions, turn, backward})
	if err != nil {
		return op{}, fmt.Errorf("volume %s: flags: %w", f.volume, err)
	}
	return op{headerKey(f.volume), value}, nil
}

func (h storedHeader) geometry() Geometry { return Geometry{h.Blocks, h.RegionBlocks} }

func decodeHeader(b []byte) (h storedHeader, err error) {
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("header: %w", err)
	}
	if h.Schema > headerSchema {
		return h, fmt.Errorf("header has schema %d, this lunshift knows up to %d: %w", h.Schema, headerSchema, ErrVersion)
	}
	if err := h.geometry().check(); err != nil {
		return h, fmt.Errorf("header: %w", err)
	}
	if h.Schema < 1 || h.ChunkRegions != chunkRegions {
		return h, fmt.Errorf("header: schema %d, chunks of %d regions", h.Schema, h.ChunkRegions)
	}
	if (h.Turn > 0) != (h.Schema >= turnSchema) || h.Backward && h.Turn == 0 {
		return h, fmt.Errorf("header: schema %d in turn %d", h.Schema, h.Turn)
	}
	return h, nil
}

func newFlags(s *Store, volume string, gen uint64, g Geometry) *Flags {
	f := &Flags{
		store:   s,
		volume:  volume,
		gen:     gen,
		geo:     g,
		shift:   uint(bits.TrailingZeros64(g.RegionBlocks)),
		regions: (g.Blocks-1)/g.RegionBlocks + 1,
		words:   int((g.RegionBlocks + 63) / 64),
	}
	f.early.near, f.early.shift = map[uint64][]*note{}, f.shift
	n := (f.regions + chunkRegions - 1) / chunkRegions * chunkWords
	for i := range f.kinds {
		f.kinds[i].all = make([]atomic.Uint64, n)
		f.kinds[i].partial = make([]atomic.Uint64, n)
	}
	return f
}

// load fills f, which nobody else sees yet. It reads chunks before regions, as
// their keys are ordered.
func (f *Flags) load(txn *badger.Txn) error {
	o := badger.DefaultIteratorOptions
	o.Prefix = genKey(f.gen)
	o.PrefetchValues = false // they lie beside the keys
	it := txn.NewIterator(o)
	defer it.Close()
	scratch := make([]uint64, kindCount*f.words)
	for it.Rewind(); it.Valid(); it.Next() {
		item := it.Item()
		key := item.Key()[genSize:]
		err := item.Value(func(value []byte) error {
			switch {
			case len(key) == 10 && key[0] == chunkMark:
				return f.loadChunk(int(key[1]), binary.BigEndian.Uint64(key[2:]), value)
			case len(key) == 9 && key[0] == entryMark:
				e, err := decodeEntry(value)
				f.entries = append(f.entries, bytes.Clone(item.Key()))
				f.kept = append(f.kept, e)
				return err
			case len(key) == 9 && key[0] == regionMark:
				return f.loadRegion(binary.BigEndian.Uint64(key[1:]), value, scratch)
			}
			return fmt.Errorf("unknown key %x", key)
		})
		if err != nil {
			return damaged(f.store.dir, fmt.Errorf("flags of volume %s: %w", f.volume, err))
		}
	}
	for i := range f.kinds {
		k := &f.kinds[i]
		n := k.blocks.Load()
		for w := range k.all {
			n += uint64(bits.OnesCount64(k.all[w].Load())) * f.geo.RegionBlocks
		}
		if f.isAll(i, f.regions-1) {
			n -= f.geo.RegionBlocks - f.regionBlocks(f.regions-1)
		}
		k.blocks.Store(n)
	}
	return nil
}

func (f *Flags) loadChunk(kind int, chunk uint64, value []byte) error {
	if kind >= kindCount || chunk >= uint64(len(f.kinds[0].all)/chunkWords) || len(value) != chunkWords*8 {
		return fmt.Errorf("chunk %d of kind %d with %d bytes", chunk, kind, len(value))
	}
	for w, word := range decodeWords(value) {
		first := chunk*chunkRegions + uint64(w)*64
		if word != 0 && first+uint64(bits.Len64(word)) > f.regions {
			return fmt.Errorf("chunk %d of kind %d reaches beyond the last region", chunk, kind)
		}
		f.kinds[kind].all[first/64].Store(word)
	}
	return nil
}

// loadRegion notes that region g is partial and counts; its bitmaps are read again when
// they are asked for.
func (f *Flags) loadRegion(g uint64, value []byte, scratch []uint64) error {
	m, err := f.decodeRegion(g, value, scratch)
	if err != nil {
		return err
	}
	var had byte
	for i, b := range m {
		if b != nil {
			f.kinds[i].blocks.Add(countBits(b))
			had |= 1 << i
		}
	}
	f.markPartial(g, m)
	switch {
	case had == value[0]&(1<<kindCount-1):
	case had == 0:
		f.leftover = append(f.leftover, op{key: regionKey(f.gen, g)})
	default:
		f.leftover = append(f.leftover, op{regionKey(f.gen, g), encodeRegion(m, f.compact)})
	}
	return nil
}

// decodeRegion is the stored value of region g. A bitmap beside an all bit is left of a
// commit that an older lunshift split and that was cut off. It counts for nothing, and
// goes when the flags are loaded, or else it would count once the region stops being all.
func (f *Flags) decodeRegion(g uint64, value []byte, scratch []uint64) (regionBitmaps, error) {
	if g >= f.regions {
		return regionBitmaps{}, fmt.Errorf("region %d of %d", g, f.regions)
	}
	m, err := decodeRegion(value, f.words, scratch)
	if err != nil {
		return regionBitmaps{}, fmt.Errorf("region %d: %w", g, err)
	}
	size := f.regionBlocks(g)
	for i, b := range m {
		if rest := uint64(f.words)*64 - size; b != nil && rest > 0 && anyBit(b, size, rest) {
			return regionBitmaps{}, fmt.Errorf("region %d has a bit beyond its last block", g)
		}
		if f.isAll(i, g) {
			m[i] = nil
		}
	}
	return m, nil
}

// forgetVolume removes the record and the header, from where on the flags are out
// of reach; Store.forget then removes them. The records instead come after.
func (c *committer) forgetVolume(r *request) error {
	volume := r.forget
	ops := []op{{key: recordKey(volume)}, {key: headerKey(volume)}, {key: unusedKey(volume)}, {key: attachmentKey(volume, Checksums)}}
	if r.reservation {
		ops = append(ops, op{key: reservationKey(volume)}, op{key: attachmentKey(volume, Followed)})
	}
	ops = append(ops, r.records...)
	if err := c.commit(ops); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flags[volume]; f != nil {
		f.gone.Store(true)
		delete(c.flags, volume)
	}
	return nil
}

// named gives the generations that headers name, by the present turn of each, which is
// what entries of the journal name.
func (s *Store) named() (map[uint64]uint64, error) {
	named := map[uint64]uint64{}
	err := s.view(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.DefaultIteratorOptions)
		defer it.Close()
		for it.Seek([]byte(headerPrefix)); it.ValidForPrefix([]byte(headerPrefix)); it.Next() {
			value, err := it.Item().ValueCopy(nil)
			if err != nil {
				return err
			}
			h, err := decodeHeader(value)
			if err != nil {
				return damaged(s.dir, fmt.Errorf("flags of volume %s: %w", it.Item().Key()[len(headerPrefix):], err))
			}
			named[turnID(h.Generation, h.Turn)] = h.Generation
		}
		return nil
	})
	return named, err
}

// sweep removes flags that no header names: those of forgotten volumes.
func (s *Store) sweep(named map[uint64]uint64) error {
	alive := map[uint64]bool{}
	for _, gen := range named {
		alive[gen] = true
	}
	var orphans []uint64
	err := s.view(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.DefaultIteratorOptions)
		defer it.Close()
		for it.Seek([]byte(flagsPrefix)); it.ValidForPrefix([]byte(flagsPrefix)); {
			key := it.Item().Key()
			if len(key) < genSize {
				return damaged(s.dir, fmt.Errorf("unknown key %x", key))
			}
			gen := binary.BigEndian.Uint64(key[len(flagsPrefix):])
			if !alive[gen] {
				orphans = append(orphans, gen)
			}
			if gen++; gen == 0 {
				break
			}
			it.Seek(genKey(gen))
		}
		return nil
	})
	for _, gen := range orphans {
		if err == nil {
			err = s.drop(gen)
		}
	}
	return err
}

// drop deletes the keys of a generation that no header names, in transactions
// small enough not to hold others up.
func (s *Store) drop(gen uint64) error {
	const perCommit = 4096
	for {
		r := &request{}
		err := s.view(func(txn *badger.Txn) error {
			o := badger.DefaultIteratorOptions
			o.PrefetchValues = false
			o.Prefix = genKey(gen)
			it := txn.NewIterator(o)
			defer it.Close()
			for it.Rewind(); it.Valid() && len(r.records) < perCommit; it.Next() {
				r.records = append(r.records, op{key: bytes.Clone(it.Item().Key())})
			}
			return nil
		})
		if err != nil || len(r.records) == 0 {
			return err
		}
		if err := s.submit(context.Background(), r); err != nil {
			return err
		}
	}
}
