package fsmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

const (
	lvmSector   = 512
	lvmCRCStart = 0xf597a6cf
	lvmMagic    = " LVM2 x[5A%r0N*>"
	// lvmTextMost bounds the metadata that is read, in bytes, lvmVolumesMost the logical volumes.
	lvmTextMost    = 4 << 20
	lvmVolumesMost = 1024
	lvmSegments    = 1 << 16
)

// lvmCRC is LVM's checksum: CRC-32 of Ethernet, with a start of its own and not inverted.
func lvmCRC(p []byte) uint32 { return ^crc32.Update(^uint32(lvmCRCStart), crc32.IEEETable, p) }

// volumeGroup reads a physical volume and what lies in each of its linear logical volumes.
// Extents of no logical volume count as allocated, as those do that are striped, mirrored, thin,
// cached, or the origin of a snapshot, and those of a group with several physical volumes.
func (m *mapper) volumeGroup(ctx context.Context, s *space) error {
	volumes, others, err := readLVM(ctx, s)
	if err != nil {
		return m.unread("LVM2", s, err)
	}
	for _, name := range others {
		m.find(Finding{Kind: "LVM2", Where: "logical volume " + name, Text: "not a linear one that stands alone"})
	}
	if len(volumes)+len(others) == 0 {
		m.find(Finding{Kind: "LVM2", Where: s.where, Text: "no logical volumes"})
	}
	for _, v := range volumes {
		if err := m.contents(ctx, v, false); err != nil {
			return err
		}
	}
	return nil
}

// readLVM gives the linear logical volumes of a physical volume, and the names of the others.
func readLVM(ctx context.Context, s *space) (volumes []*space, others []string, err error) {
	text, id, err := lvmText(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	config, err := parseLVM(text)
	if err != nil {
		return nil, nil, fmt.Errorf("its metadata is inconsistent: %w", err)
	}
	wrong := errors.New("its metadata is inconsistent")
	var name string
	var group *lvmNode
	for i := range config.entries {
		if e := &config.entries[i]; e.node != nil {
			if group != nil {
				return nil, nil, wrong
			}
			name, group = e.name, e.node
		}
	}
	if group == nil {
		return nil, nil, wrong
	}
	if !group.only("status", "RESIZEABLE", "READ", "WRITE") || !group.only("flags") || group.text("lock_type") != "" && group.text("lock_type") != "none" {
		return nil, nil, errors.New("its volume group is not in a usual state")
	}
	pvs := group.node("physical_volumes")
	if pvs == nil {
		return nil, nil, wrong
	}
	if len(pvs.entries) != 1 {
		return nil, nil, errors.New("its volume group has other physical volumes as well")
	}
	pv := pvs.entries[0].node
	if pv == nil || !pv.only("status", "ALLOCATABLE") || !pv.only("flags") {
		return nil, nil, errors.New("its volume group is not in a usual state")
	}
	if string(bytes.ReplaceAll([]byte(pv.text("id")), []byte("-"), nil)) != id {
		return nil, nil, wrong
	}
	size, okSize := group.number("extent_size")
	start, okStart := pv.number("pe_start")
	count, okCount := pv.number("pe_count")
	sectors := s.size / lvmSector
	if !okSize || !okStart || !okCount || size == 0 || size > 1<<32 || start > sectors || count > (sectors-start)/size {
		return nil, nil, wrong
	}
	all := group.node("logical_volumes")
	if all == nil {
		return nil, nil, nil
	}
	if len(all.entries) > lvmVolumesMost {
		return nil, nil, errors.New("more logical volumes than are read")
	}
	// What another volume is built on has more in it than the file system knows of.
	parts := map[string]bool{}
	var taken []byteRun
	type linear struct {
		name string
		runs []byteRun // in extents of the physical volume
	}
	var found []linear
	for _, e := range all.entries {
		if e.node == nil {
			return nil, nil, wrong
		}
		l := linear{name: e.name}
		n, ok := e.node.number("segment_count")
		if !ok || n == 0 || n > lvmSegments {
			return nil, nil, wrong
		}
		plain := e.node.only("status", "READ", "WRITE", "VISIBLE") && e.node.lists("status", "VISIBLE") && e.node.only("flags")
		next := uint64(0)
		for i := range n {
			g := e.node.node(fmt.Sprintf("segment%d", i+1))
			if g == nil {
				return nil, nil, wrong
			}
			first, ok1 := g.number("start_extent")
			extents, ok2 := g.number("extent_count")
			if !ok1 || !ok2 || first != next || extents == 0 || extents > 1<<40 {
				return nil, nil, wrong
			}
			next += extents
			stripes, _ := g.number("stripe_count")
			if g.text("type") != "striped" {
				plain = false
				g.strings(parts)
				continue
			}
			list := g.list("stripes")
			if stripes == 0 || uint64(len(list)) != 2*stripes || extents%stripes != 0 {
				return nil, nil, wrong
			}
			for k := uint64(0); k < stripes; k++ {
				at, on := list[2*k+1], list[2*k]
				if !on.isText || at.isText {
					return nil, nil, wrong
				}
				if on.text != pvs.entries[0].name {
					parts[on.text] = true // on another logical volume
					plain = false
					continue
				}
				if at.number >= count || extents/stripes > count-at.number {
					return nil, nil, wrong
				}
				taken = append(taken, byteRun{at.number, extents / stripes})
				l.runs = append(l.runs, byteRun{at.number, extents / stripes})
			}
			plain = plain && stripes == 1
		}
		if plain {
			found = append(found, l)
		} else {
			others = append(others, name+"/"+e.name)
		}
	}
	if !apart(taken) {
		return nil, nil, errors.New("its logical volumes overlap")
	}
	for _, l := range found {
		if parts[l.name] {
			others = append(others, name+"/"+l.name)
			continue
		}
		v := &space{m: s.m, where: "logical volume " + name + "/" + l.name}
		for _, r := range l.runs {
			v.add(s, (start+r.at*size)*lvmSector, r.length*size*lvmSector)
		}
		volumes = append(volumes, v)
	}
	return volumes, others, nil
}

// lvmText gives the current metadata of a physical volume's group, and its id. Several metadata
// areas must hold the same.
func lvmText(ctx context.Context, s *space) (text []byte, id string, err error) {
	head, err := s.get(ctx, 0, 4*lvmSector)
	if err != nil {
		return nil, "", err
	}
	var label []byte
	for i := uint64(0); i < 4; i++ {
		l := head[i*lvmSector:][:lvmSector]
		if string(l[:8]) != "LABELONE" {
			continue
		}
		if label != nil {
			return nil, "", errors.New("it has several labels")
		}
		if label = l; le.Uint64(l[8:]) != i || string(l[24:32]) != "LVM2 001" {
			return nil, "", errors.New("its label is of a kind that is not known")
		}
	}
	if label == nil || s.m.wrong(lvmCRC(label[20:]), le.Uint32(label[16:])) {
		return nil, "", errors.New("the checksum of its label is wrong")
	}
	at := le.Uint32(label[20:])
	if at < 32 || at > lvmSector-40 {
		return nil, "", errors.New("its label is inconsistent")
	}
	id = string(label[at : at+32])
	lists := label[at+40:]
	next := func() (offset, size uint64, ok bool) {
		if len(lists) < 16 {
			return 0, 0, false
		}
		offset, size = le.Uint64(lists), le.Uint64(lists[8:])
		lists = lists[16:]
		return offset, size, offset != 0
	}
	for _, _, ok := next(); ok; _, _, ok = next() { // data areas
	}
	areas := 0
	for offset, size, ok := next(); ok; offset, size, ok = next() {
		t, err := lvmArea(ctx, s, offset, size)
		if err != nil {
			return nil, "", err
		}
		if areas++; areas > 1 && !bytes.Equal(t, text) {
			return nil, "", errors.New("its metadata areas differ")
		}
		text = t
	}
	if areas == 0 {
		return nil, "", errors.New("it has no metadata of its own")
	}
	if text == nil {
		return nil, "", errors.New("it belongs to no volume group")
	}
	return text, id, nil
}

// lvmArea gives the current text of one metadata area; nil where there is none.
func lvmArea(ctx context.Context, s *space, offset, size uint64) ([]byte, error) {
	if size < 2*lvmSector || !s.holds(offset, size) {
		return nil, errors.New("its metadata lies out of range")
	}
	h, err := s.get(ctx, offset, lvmSector)
	if err != nil {
		return nil, err
	}
	if s.m.wrong(lvmCRC(h[4:]), le.Uint32(h)) || string(h[4:20]) != lvmMagic || le.Uint32(h[20:]) != 1 || le.Uint64(h[24:]) != offset || le.Uint64(h[32:]) != size {
		return nil, errors.New("the checksum of its metadata area is wrong")
	}
	// The second location is of a change that was begun and not committed.
	raw := h[40:]
	if le.Uint64(raw) == 0 {
		return nil, nil
	}
	if le.Uint64(raw[24:]) != 0 {
		return nil, errors.New("a change of its metadata is not finished")
	}
	at, length, sum, flags := le.Uint64(raw), le.Uint64(raw[8:]), le.Uint32(raw[16:]), le.Uint32(raw[20:])
	if flags != 0 || at < lvmSector || at >= size || length == 0 || length > size-lvmSector || length > lvmTextMost {
		return nil, errors.New("its metadata lies out of range")
	}
	// The area is written round and round, but for its header.
	n := min(length, size-at)
	text, err := s.get(ctx, offset+at, n)
	if err != nil {
		return nil, err
	}
	rest, err := s.get(ctx, offset+lvmSector, length-n)
	if err != nil {
		return nil, err
	}
	text = append(text, rest...)
	if s.m.wrong(lvmCRC(text), sum) {
		return nil, errors.New("the checksum of its metadata is wrong")
	}
	return bytes.TrimRight(text, "\x00"), nil
}

// only tells whether a list holds nothing but words; a list that is not there does.
func (n *lvmNode) only(name string, words ...string) bool {
	for _, v := range n.list(name) {
		if !v.isText || !slices.Contains(words, v.text) {
			return false
		}
	}
	return true
}

// lists tells whether a list holds the word.
func (n *lvmNode) lists(name, word string) bool {
	return slices.ContainsFunc(n.list(name), func(v lvmValue) bool { return v.isText && v.text == word })
}
