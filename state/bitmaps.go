package state

import (
	"fmt"
	"sync"
	"sync/atomic"
)

const (
	// defaultBitmapMemory is Options.BitmapMemory where that is 0, in bytes: the
	// bitmaps of about 150,000 regions of 2048 blocks.
	defaultBitmapMemory = 64 << 20
	// heldOverhead is about what a held region takes besides its words, in bytes.
	heldOverhead = 192

	shardCount = 64
)

// bitmaps holds bitmaps of partial regions, of all volumes, up to a bound. The
// database has each of them as well, so any may be dropped at any time and is read
// again when it is asked for. Which regions are partial is in memory always (levels).
//
// A reader must not find in the database what is not yet on stable storage. So the
// committer pins the bitmaps of the regions it is about to change, as they are and where
// there is none as well, from before it writes to the database until readers find
// everywhere what it wrote.
type bitmaps struct {
	shards [shardCount]shard
	reads  atomic.Uint64 // of the database
}

// shard holds the bitmaps of a part of the regions.
type shard struct {
	mu    sync.RWMutex // guards all below
	held  map[regionID]*held
	ring  []*held // the same, in the order in which room is looked for
	hand  int     // in ring
	bytes int
	limit int // of bytes; what is pinned may exceed it
	// changes counts publications: one that came while a reader was at the
	// database tells it to look again.
	changes uint64
}

// regionID names a region of a volume by the generation of the volume's flags.
type regionID struct{ gen, region uint64 }

// regionBitmaps are a region's bitmaps, nil for a kind of which the region is none
// or all. Two equal ones may be one slice. They are not changed once they are held.
type regionBitmaps [kindCount][]uint64

func (m regionBitmaps) empty() bool { return m[0] == nil && m[1] == nil }

func (m regionBitmaps) bytes() int {
	n := 8 * len(m[0])
	if len(m[1]) > 0 && (len(m[0]) == 0 || &m[0][0] != &m[1][0]) {
		n += 8 * len(m[1])
	}
	return n
}

type held struct {
	id     regionID
	maps   regionBitmaps
	at     int         // in ring
	used   atomic.Bool // since the hand passed
	pinned bool
}

func newBitmaps(limit uint64) *bitmaps {
	if limit == 0 {
		limit = defaultBitmapMemory
	}
	b := new(bitmaps)
	for i := range b.shards {
		b.shards[i].held = map[regionID]*held{}
		b.shards[i].limit = int(limit / shardCount)
	}
	return b
}

func (b *bitmaps) shard(id regionID) *shard {
	return &b.shards[(id.gen^id.region)%shardCount]
}

// memory is about how many bytes they take.
func (b *bitmaps) memory() (n uint64) {
	for i := range b.shards {
		s := &b.shards[i]
		s.mu.RLock()
		n += uint64(s.bytes)
		s.mu.RUnlock()
	}
	return n
}

// find gives the bitmaps of region g of f as they are on stable storage, nil for a
// kind of which the region is none or all by now. With pin they are held until unpin;
// that is for the committer. What is held is found without allocation.
func (b *bitmaps) find(f *Flags, g uint64, pin bool) (regionBitmaps, error) {
	id := regionID{f.gen, g}
	s := b.shard(id)
	for {
		s.mu.RLock()
		h, changes := s.held[id], s.changes
		if h != nil && !pin {
			m := h.maps
			s.mu.RUnlock()
			if !h.used.Load() {
				h.used.Store(true)
			}
			return m, nil
		}
		s.mu.RUnlock()
		var m regionBitmaps
		var err error
		// The committer alone knows by its levels that there is nothing to read.
		if h == nil && (!pin || f.isPartial(g)) {
			b.reads.Add(1)
			m, err = f.readRegion(g)
		}
		m, again, err := s.hold(id, m, err, changes, pin)
		if !again {
			return m, err
		}
	}
}

// hold takes up what was read of a region, unless somebody else did by now. again
// tells that something was published since changes, so that it may be too old.
func (s *shard) hold(id regionID, m regionBitmaps, err error, changes uint64, pin bool) (_ regionBitmaps, again bool, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.held[id]; h != nil {
		h.pinned = h.pinned || pin
		return h.maps, false, nil
	}
	if s.changes != changes {
		return m, true, nil
	}
	if err != nil || m.empty() && !pin {
		return m, false, err
	}
	s.add(&held{id: id, maps: m, pinned: pin})
	return m, false, nil
}

// publish makes m the bitmaps of region g of f, which is pinned and stays so; the
// database has them on stable storage.
func (b *bitmaps) publish(f *Flags, g uint64, m regionBitmaps) {
	id := regionID{f.gen, g}
	s := b.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes++
	if h := s.held[id]; h != nil {
		s.remove(h)
	}
	s.add(&held{id: id, maps: m, pinned: true})
}

// unpin lets go of what find pinned.
func (b *bitmaps) unpin(f *Flags, g uint64) {
	id := regionID{f.gen, g}
	s := b.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[id]
	if h == nil {
		return
	}
	if h.pinned = false; h.maps.empty() {
		s.remove(h)
	}
	s.makeRoom(0)
}

// add makes room for h first.
func (s *shard) add(h *held) {
	need := h.maps.bytes() + heldOverhead
	s.makeRoom(need)
	h.at = len(s.ring)
	s.held[h.id] = h
	s.ring = append(s.ring, h)
	s.bytes += need
}

// makeRoom drops what was not used lately until need more bytes fit. Where all that is left is
// pinned, the limit is exceeded.
func (s *shard) makeRoom(need int) {
	// In two rounds the hand meets everything once after it cleared its mark.
	for n := 2 * len(s.ring); n > 0 && len(s.ring) > 0 && s.bytes+need > s.limit; n-- {
		s.hand %= len(s.ring)
		switch old := s.ring[s.hand]; {
		case old.pinned || old.used.Swap(false):
			s.hand++
		default:
			s.remove(old)
		}
	}
}

func (s *shard) remove(h *held) {
	last := s.ring[len(s.ring)-1]
	s.ring[h.at], last.at = last, h.at
	s.ring[len(s.ring)-1] = nil
	s.ring = s.ring[:len(s.ring)-1]
	delete(s.held, h.id)
	s.bytes -= h.maps.bytes() + heldOverhead
}

// readRegion reads region g's bitmaps from the database. That they are missing is
// damage, unless the region has become none or all meanwhile.
func (f *Flags) readRegion(g uint64) (regionBitmaps, error) {
	value, err := f.store.get(regionKey(f.gen, g))
	if err != nil {
		return regionBitmaps{}, err
	}
	var m regionBitmaps
	if value != nil {
		if m, err = f.decodeRegion(g, value, nil); err != nil {
			return regionBitmaps{}, damaged(f.store.dir, fmt.Errorf("flags of volume %s: %w", f.volume, err))
		}
	}
	for i := range m {
		if m[i] != nil || f.isAll(i, g) || !f.isPartialOf(i, g) {
			continue
		}
		if f.gone.Load() {
			return regionBitmaps{}, fmt.Errorf("volume %s: %w", f.volume, ErrForgotten)
		}
		return regionBitmaps{}, damaged(f.store.dir, fmt.Errorf("flags of volume %s: the bitmap of region %d is missing", f.volume, g))
	}
	return m, nil
}
