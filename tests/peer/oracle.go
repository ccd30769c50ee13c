package peer

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
)

// Value names what a block may hold. Everything that is ever written has a value of its
// own, made of the kind, the writer and a number that counts up.
type Value uint64

const (
	Zeroes   Value = 0
	Original Value = 1 // what the source held before
	// sameBit marks WRITE SAME, whose blocks do not tell their address.
	sameBit Value = 1 << 63
)

// MakeValue is what a writer writes with its command of that number.
func MakeValue(writer int, sequence uint64) Value {
	return Value(uint64(writer+1)<<40 | sequence)
}

func (v Value) String() string {
	switch v {
	case Zeroes:
		return "zeroes"
	case Original:
		return "the original"
	}
	kind := "write"
	if v&sameBit != 0 {
		kind = "write-same"
	}
	return fmt.Sprintf("%s %d of writer %d", kind, uint64(v)&(1<<40-1), uint64(v&^sameBit)>>40-1)
}

// Cell is what the oracle knows of one block. Its owner has one command at a time.
type Cell struct {
	acked   Value   // last acknowledged
	pending []Value // issued after it and not answered, or answered with an error: perhaps
	// stable was last acknowledged as durable whatever happens to the power; loose are
	// values acknowledged or issued since, each of which may be there after a power loss.
	stable Value
	loose  []Value
}

// Oracle is what each block of the volume may hold.
type Oracle struct {
	BlockSize int
	Cells     []Cell
	before    []byte // the content before
}

// NewOracle begins with the content before, in blocks of blockSize bytes.
func NewOracle(before []byte, blockSize int) *Oracle {
	o := &Oracle{BlockSize: blockSize, before: before, Cells: make([]Cell, len(before)/blockSize)}
	for i := range o.Cells {
		o.Cells[i] = Cell{acked: Original, stable: Original}
	}
	return o
}

// Fill makes p, the block at lba, hold v.
func (o *Oracle) Fill(p []byte, lba uint64, v Value) {
	switch {
	case v == Zeroes:
		clear(p)
	case v == Original:
		copy(p, o.before[lba*uint64(o.BlockSize):])
	case v&sameBit != 0:
		Stamp(p, o.BlockSize, 1<<62, uint64(v), 1)
	default:
		Stamp(p, o.BlockSize, lba, uint64(v), 1)
	}
}

// Holds tells whether p, read from lba, is v.
func (o *Oracle) Holds(p []byte, lba uint64, v Value) bool {
	if v > Original {
		// A cheap look first: the value is in the second word.
		if len(p) < 16 || binary.BigEndian.Uint64(p[8:]) != uint64(v) {
			return false
		}
	}
	want := make([]byte, o.BlockSize)
	o.Fill(want, lba, v)
	return bytes.Equal(p, want)
}

// Describe names the content of a block for people.
func (o *Oracle) Describe(p []byte, lba uint64) string {
	if Zero(p) {
		return Zeroes.String()
	}
	v := Value(binary.BigEndian.Uint64(p[8:]))
	if v > Original && o.Holds(p, lba, v) {
		return v.String()
	}
	if o.Holds(p, lba, Original) {
		return Original.String()
	}
	at := binary.BigEndian.Uint64(p)
	if at < uint64(len(o.Cells)) && o.Holds(p, at, v) {
		return fmt.Sprintf("%v of block %d", v, at)
	}
	return fmt.Sprintf("torn or foreign content %x…", p[:24])
}

// Which tells the value of a block that holds one as a whole.
func (o *Oracle) Which(p []byte, lba uint64) (Value, bool) {
	// The original may be stamped as well, so it comes first.
	if o.Holds(p, lba, Original) {
		return Original, true
	}
	v := Value(binary.BigEndian.Uint64(p[8:]))
	return v, v > Original && o.Holds(p, lba, v)
}

// issue notes that v is about to be written.
func (c *Cell) issue(v Value) { c.pending = append(c.pending, v) }

// ack notes that v, the last issued, was acknowledged; stable says that a power loss
// must not take it either.
func (c *Cell) ack(v Value, stable bool) {
	if stable {
		c.stable, c.loose = v, nil
	} else {
		c.loose = append(c.loose, v)
	}
	c.acked, c.pending = v, nil
}

// Flushed notes that what was acknowledged is durable.
func (c *Cell) Flushed() { c.stable, c.loose = c.acked, nil }

// allowed are the values after a crash, of the power too where power.
func (c *Cell) allowed(power bool) []Value {
	list := append([]Value{c.acked}, c.pending...)
	if power {
		list = append(list, c.stable)
		list = append(list, c.loose...)
	}
	return list
}

// Check holds p, read from lba on, to what is allowed there, after a crash, of the power
// too where power; then what was read is what must stay. It tells what is wrong, at most
// most of it.
func (o *Oracle) Check(p []byte, lba uint64, power bool, most int) (wrong []string) {
	var seen Value
	for ; len(p) > 0; p, lba = p[o.BlockSize:], lba+1 {
		c, b := &o.Cells[lba], p[:o.BlockSize]
		list := c.allowed(power)
		at := slices.IndexFunc(list, func(v Value) bool { return o.Holds(b, lba, v) })
		if at < 0 {
			if len(wrong) < most {
				wrong = append(wrong, fmt.Sprintf("block %d holds %s, allowed %v", lba, o.Describe(b, lba), list))
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

// Findings gathers what clients found wrong.
type Findings struct {
	mu   sync.Mutex // guards list
	list []string
}

// Add notes one; it takes what fmt.Sprintf takes.
func (f *Findings) Add(format string, a ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = append(f.list, fmt.Sprintf(format, a...))
}

// List gives all of them.
func (f *Findings) List() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list)
}
