package proxy

import (
	"context"
	"slices"
	"time"

	"lunshift/failpoint"
	"lunshift/lun"
	"lunshift/state"
)

const (
	// mostEqual bounds the extents that are known to be equal and not noted yet; of what is
	// beyond it the source gets a copy once more.
	mostEqual = 1 << 16
	// equalBatch is how many are noted at a time.
	equalBatch = 1024
)

// equal is an extent, within a region, that both sides hold alike although it is dirty.
type equal struct {
	lun.Extent
	// What Resets told before it was written, and when that was done.
	source, destination uint64
	at                  time.Time
}

// regions calls do for the parts of e that lie in one region each.
func (m *mirror) regions(e lun.Extent, do func(region uint64, part lun.Extent)) {
	size := m.back.copier.RegionBlocks
	for !e.Empty() {
		g := uint64(e.Start) / size
		part := e.Intersect(m.v.region(g))
		do(g, part)
		e = lun.Extent{Start: part.End(), Blocks: e.Blocks - part.Blocks}
	}
}

// note enters e as equal. The caller holds the range.
func (m *mirror) note(e lun.Extent, as equal) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.regions(e, func(g uint64, part lun.Extent) {
		if m.count >= m.most {
			m.back.suspect(part) // a copy under way may be older
			return
		}
		one := as
		one.Extent = part
		m.equal[g] = append(m.equal[g], &one)
		m.count++
	})
	if m.count >= m.most/2 {
		m.poke()
	}
}

// forget takes out what e touches: it is not equal while it changes.
func (m *mirror) forget(e lun.Extent) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.regions(e, func(g uint64, part lun.Extent) {
		list := m.equal[g]
		if !slices.ContainsFunc(list, func(x *equal) bool { return x.Overlaps(part) }) {
			return
		}
		left := make([]*equal, 0, len(list)+1)
		for _, x := range list {
			if !x.Overlaps(part) {
				left = append(left, x)
				continue
			}
			for _, rest := range lun.Subtract([]lun.Extent{x.Extent}, part) {
				kept := *x
				kept.Extent = rest
				left = append(left, &kept)
			}
		}
		m.replace(g, left)
	})
}

// replace makes left what is equal of a region; mu is held.
func (m *mirror) replace(g uint64, left []*equal) {
	m.count += len(left) - len(m.equal[g])
	if len(left) == 0 {
		delete(m.equal, g)
	} else {
		m.equal[g] = left
	}
}

// alike gives what of e both sides hold alike, in rising order, unless one lost its cache meanwhile (settle). A
// copy of it that was begun before must not be written: what leaves this is a suspect.
func (m *mirror) alike(e lun.Extent) (list []lun.Extent) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.regions(e, func(g uint64, part lun.Extent) {
		for _, x := range m.equal[g] {
			if o := x.Intersect(part); !o.Empty() {
				list = append(list, o)
			}
		}
	})
	slices.SortFunc(list, byStart)
	return list
}

// older gives what was equal by then.
func (m *mirror) older(then time.Time) (list []*equal) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, of := range m.equal {
		for _, x := range of {
			if !x.at.After(then) {
				list = append(list, x)
			}
		}
	}
	return list
}

// drop takes one out, if it is there still.
func (m *mirror) drop(x *equal) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	g := uint64(x.Start) / m.back.copier.RegionBlocks
	i := slices.Index(m.equal[g], x)
	if i < 0 {
		return false
	}
	m.replace(g, slices.Delete(slices.Clone(m.equal[g]), i, i+1))
	return true
}

// settle clears the dirty flags of what was equal by then, once both sides have it on stable
// storage; where the source serves from now on, once that does. What a side lost
// with its cache stays dirty.
func (m *mirror) settle(ctx context.Context, then time.Time, sourceServes bool) error {
	list := m.older(then)
	if len(list) == 0 {
		return nil
	}
	v := m.v
	if err := v.sourceFlush.Flush(ctx); err != nil {
		if ctx.Err() == nil {
			m.fail(err)
		}
		return err
	}
	if !sourceServes {
		if err := v.destinationFlush.Flush(ctx); err != nil {
			return err
		}
	}
	lost := m.losses()
	slices.SortFunc(list, func(a, b *equal) int { return byStart(a.Extent, b.Extent) })
	for len(list) > 0 {
		n := min(equalBatch, len(list))
		batch := list[:n]
		list = list[n:]
		kinds := state.Dirty
		if sourceServes {
			kinds |= state.Valid // the destination may lose it
		}
		if err := m.clearBatch(ctx, batch, kinds, lost); err != nil {
			return err
		}
	}
	return nil
}

func (m *mirror) clearBatch(ctx context.Context, batch []*equal, kinds state.Kinds, lost func(*equal) bool) error {
	var clean []state.Run
	var same []*equal
	v := m.v
	for _, x := range batch {
		held, ok := v.writes.TryLock(x.Extent)
		if !ok {
			continue // it is being written; in a later round
		}
		defer v.writes.Unlock(held)
		switch {
		case !m.has(x):
		case lost(x):
			// The destination counts, and the source gets a copy.
			m.back.suspect(x.Extent)
			m.drop(x)
		default:
			if err := v.raw().Await(ctx, run(x.Extent)); err != nil {
				return v.stateError(ctx, err)
			}
			clean, same = append(clean, run(x.Extent)), append(same, x)
		}
	}
	if len(clean) == 0 {
		return nil
	}
	failpoint.Here("mirror.settled")
	if err := v.raw().Clear(ctx, kinds, clean...); err != nil {
		return v.stateError(ctx, err)
	}
	for _, x := range same {
		if kinds == state.Dirty {
			v.cleared.Add(v.info.Bytes(x.Extent))
		}
		m.drop(x)
	}
	return nil
}

// losses gives a test for what a side may have lost with its cache since it was alike. What the
// destination lost counts before the source serves too: initiators may have read there what it fell back to.
func (m *mirror) losses() (lost func(*equal) bool) {
	source, destination := m.v.source.Resets(), m.v.destination.Resets()
	return func(x *equal) bool { return x.source != source || x.destination != destination }
}

// lost tells whether there is any such.
func (m *mirror) lost() bool {
	lost := m.losses()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, list := range m.equal {
		if slices.ContainsFunc(list, lost) {
			return true
		}
	}
	return false
}

func (m *mirror) has(x *equal) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Contains(m.equal[uint64(x.Start)/m.back.copier.RegionBlocks], x)
}
