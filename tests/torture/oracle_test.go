package torture

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"

	"lunshift/tests/peer"
)

// value names what a block may hold. Everything that is ever written has a value of its
// own, made of the kind, the writer and a number that counts up.
type value uint64

const (
	zeroes   value = 0
	original value = 1 // what the source held before
	// sameBit marks WRITE SAME, whose blocks do not tell their address.
	sameBit value = 1 << 63
)

func made(writer int, sequence uint64) value {
	return value(uint64(writer+1)<<40 | sequence)
}

func (v value) String() string {
	switch v {
	case zeroes:
		return "zeroes"
	case original:
		return "the original"
	}
	kind := "write"
	if v&sameBit != 0 {
		kind = "write-same"
	}
	return fmt.Sprintf("%s %d of writer %d", kind, uint64(v)&(1<<40-1), uint64(v&^sameBit)>>40-1)
}

// cell is what the oracle knows of one block. Its owner has one command at a time.
type cell struct {
	acked   value   // last acknowledged
	pending []value // issued after it and not answered: perhaps
	// stable was last acknowledged as durable whatever happens to the power; loose are
	// values acknowledged or issued since, each of which may be there after a power loss.
	stable value
	loose  []value
}

// oracle is what each block of the volume may hold.
type oracle struct {
	bs     int
	before []byte // the content before
	cells  []cell
}

func newOracle(before []byte, bs int) *oracle {
	o := &oracle{bs: bs, before: before, cells: make([]cell, len(before)/bs)}
	for i := range o.cells {
		o.cells[i] = cell{acked: original, stable: original}
	}
	return o
}

// fill makes p, the block at lba, hold v.
func (o *oracle) fill(p []byte, lba uint64, v value) {
	switch {
	case v == zeroes:
		clear(p)
	case v == original:
		copy(p, o.before[lba*uint64(o.bs):])
	case v&sameBit != 0:
		peer.Stamp(p, o.bs, 1<<62, uint64(v), 1)
	default:
		peer.Stamp(p, o.bs, lba, uint64(v), 1)
	}
}

// holds tells whether p, read from lba, is v.
func (o *oracle) holds(p []byte, lba uint64, v value) bool {
	if v > original {
		// A cheap look first: the value is in the second word.
		if len(p) < 16 || binary.BigEndian.Uint64(p[8:]) != uint64(v) {
			return false
		}
	}
	want := make([]byte, o.bs)
	o.fill(want, lba, v)
	return bytes.Equal(p, want)
}

// describe names the content of a block for people.
func (o *oracle) describe(p []byte, lba uint64) string {
	if peer.Zero(p) {
		return zeroes.String()
	}
	v := value(binary.BigEndian.Uint64(p[8:]))
	if v > original && o.holds(p, lba, v) {
		return v.String()
	}
	if o.holds(p, lba, original) {
		return original.String()
	}
	at := binary.BigEndian.Uint64(p)
	if at < uint64(len(o.cells)) && o.holds(p, at, v) {
		return fmt.Sprintf("%v of block %d", v, at)
	}
	return fmt.Sprintf("torn or foreign content %x…", p[:24])
}

// issue notes that v is about to be written.
func (c *cell) issue(v value) { c.pending = append(c.pending, v) }

// ack notes that v, the last issued, was acknowledged; stable says that a power loss
// must not take it either.
func (c *cell) ack(v value, stable bool) {
	if stable {
		c.stable, c.loose = v, nil
	} else {
		c.loose = append(c.loose, v)
	}
	c.acked, c.pending = v, nil
}

// undo notes that v, the last issued, was refused before anything was written.
func (c *cell) undo() { c.pending = c.pending[:len(c.pending)-1] }

// flushed notes that what was acknowledged is durable.
func (c *cell) flushed() { c.stable, c.loose = c.acked, nil }

// allowed are the values after a crash, of the power too where power.
func (c *cell) allowed(power bool) []value {
	list := append([]value{c.acked}, c.pending...)
	if power {
		list = append(list, c.stable)
		list = append(list, c.loose...)
	}
	return list
}

// check holds p, read from lba on after a crash, to what is allowed there; then what was
// read is what must stay. It tells what is wrong, at most most of it.
func (o *oracle) check(p []byte, lba uint64, power bool, most int) (wrong []string) {
	var seen value
	for ; len(p) > 0; p, lba = p[o.bs:], lba+1 {
		c, b := &o.cells[lba], p[:o.bs]
		list := c.allowed(power)
		at := slices.IndexFunc(list, func(v value) bool { return o.holds(b, lba, v) })
		if at < 0 {
			if len(wrong) < most {
				wrong = append(wrong, fmt.Sprintf("block %d holds %s, allowed %v", lba, o.describe(b, lba), list))
			}
			continue
		}
		seen = list[at]
		was := c.stable
		c.acked, c.pending = seen, nil
		if power {
			c.stable, c.loose = seen, nil // it was on the disk after the power loss
		} else if seen != was && !slices.Contains(c.loose, seen) {
			c.loose = append(c.loose, seen)
		}
	}
	return wrong
}

// faults gathers what clients found wrong.
type faults struct {
	mu   sync.Mutex // guards list
	list []string
}

func (f *faults) add(format string, a ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = append(f.list, fmt.Sprintf(format, a...))
}

func (f *faults) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list)
}
