package target

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/lun"
)

// copyList is the parameter list of an EXTENDED COPY among units by their NAA.
type copyList struct {
	id, usage byte
	cscds     [][]byte
	segments  [][]byte
}

func (l *copyList) unit(naa uint64, bs int) {
	d := make([]byte, 32)
	d[0], d[4], d[5], d[7] = 0xe4, 0x01, 0x03, 8
	binary.BigEndian.PutUint64(d[8:], naa)
	binary.BigEndian.PutUint32(d[28:], uint32(bs))
	l.cscds = append(l.cscds, d)
}

func (l *copyList) segment(from, to int, blocks uint16, source, target uint64) {
	d := make([]byte, 28)
	d[0], d[3] = 0x02, 24
	binary.BigEndian.PutUint16(d[4:], uint16(from))
	binary.BigEndian.PutUint16(d[6:], uint16(to))
	binary.BigEndian.PutUint16(d[10:], blocks)
	binary.BigEndian.PutUint64(d[12:], source)
	binary.BigEndian.PutUint64(d[20:], target)
	l.segments = append(l.segments, d)
}

func (l *copyList) bytes() []byte {
	b := make([]byte, 16)
	b[0], b[1] = l.id, l.usage<<3
	binary.BigEndian.PutUint16(b[2:], uint16(32*len(l.cscds)))
	binary.BigEndian.PutUint32(b[8:], uint32(28*len(l.segments)))
	for _, d := range append(append([][]byte{}, l.cscds...), l.segments...) {
		b = append(b, d...)
	}
	return b
}

func copyCDB(n int) []byte { return append(rw16(0x83, 0, uint32(n))[:14], 0, 0) }

func (i *initiator) xcopy(l *copyList) result {
	i.t.Helper()
	b := l.bytes()
	return i.do(copyCDB(len(b)), b, 0)
}

// copyResults is RECEIVE COPY RESULTS.
func (i *initiator) copyResults(service, id byte) result {
	i.t.Helper()
	cdb := rw16(0x84, 0, 512)
	cdb[1], cdb[2] = service, id
	return i.do(cdb, nil, 512)
}

const naaA, naaB, naaC = 0x3000000000000001, 0x3000000000000002, 0x3000000000000003

func TestExtendedCopyCopies(t *testing.T) {
	eachBlockLength(t, func(t *testing.T, bs int) {
		blocks := 6 << 20 / bs
		a, b := newMemory(uint32(bs), uint64(blocks)), newMemory(uint32(bs), uint64(blocks))
		rng := rand.NewChaCha8([32]byte{byte(bs)})
		rng.Read(a.data)
		rng.Read(b.data)
		copy(a.alloc, a.ones)
		copy(b.alloc, b.ones)
		_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: a, NAA: naaA}, Unit{IQN: iqn, LUN: 1, Device: b, NAA: naaB})
		i := login(t, addr, loginOptions{})
		want := [][]byte{a.bytes(), b.bytes()}
		move := func(from, to, n, source, target int) {
			copy(want[to][target*bs:(target+n)*bs], bytes.Clone(want[from][source*bs:(source+n)*bs]))
		}
		long := uint16(5 << 20 / bs)
		l := &copyList{id: 7}
		l.unit(naaA, bs)
		l.unit(naaB, bs)
		for _, s := range []struct {
			from, to       int
			blocks         uint16
			source, target int
		}{
			{0, 1, 100, 3, 50},
			{1, 0, long, 11, 5},
			{0, 0, long, 0, 90},  // overlaps, towards the end
			{1, 1, long, 100, 1}, // overlaps, towards the beginning
			{1, 0, 0, 0, 0},
			{0, 1, 1, blocks - 1, blocks - 1},
		} {
			l.segment(s.from, s.to, s.blocks, uint64(s.source), uint64(s.target))
			move(s.from, s.to, int(s.blocks), s.source, s.target)
		}
		if r := i.xcopy(l); r.status != 0 || r.residual != 0 {
			t.Fatalf("%v, residual %d", r, r.residual)
		}
		for k, m := range []*memory{a, b} {
			if !bytes.Equal(m.bytes(), want[k]) {
				t.Errorf("unit %d does not hold what was copied", k)
			}
		}
		st := i.copyResults(0, 7).data
		if len(st) != 12 || st[4] != 1 || binary.BigEndian.Uint16(st[5:]) != 6 || binary.BigEndian.Uint32(st[8:]) != uint32((3*int(long)+101)*bs) {
			t.Errorf("COPY STATUS %x", st)
		}
		if r := i.copyResults(4, 7); r.status != 0 || !bytes.Equal(r.data, make([]byte, 4)) {
			t.Errorf("FAILED SEGMENT DETAILS of a copy that did not fail: %v %x", r, r.data)
		}
		if r := i.copyResults(0, 8); !r.is(senseInvalidField) {
			t.Errorf("COPY STATUS of an unknown list: %v", r)
		}
	})
}

func TestExtendedCopyOfZeroesStaysThin(t *testing.T) {
	a := newMemory(512, 8192)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: a, NAA: naaA})
	i := login(t, addr, loginOptions{})
	copy(a.data[5000*512:], pattern(100*512, 1))
	copy(a.alloc[5000:5100], a.ones)
	l := &copyList{usage: usageNoID}
	l.unit(naaA, 512)
	l.segment(0, 0, 2048, 0, 4096)
	if r := i.xcopy(l); r.status != 0 {
		t.Fatal(r)
	}
	if !bytes.Equal(a.bytes(), make([]byte, len(a.data))) || bytes.IndexByte(a.alloc, 1) >= 0 {
		t.Error("zeroes were allocated")
	}
}

// TestExtendedCopyBetweenBlockLengths: a segment is as long in bytes at both ends.
func TestExtendedCopyBetweenBlockLengths(t *testing.T) {
	a, b := newMemory(512, 8192), newMemory(4096, 1024)
	copy(a.data, pattern(len(a.data), 3))
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: a, NAA: naaA}, Unit{IQN: iqn, LUN: 1, Device: b, NAA: naaB})
	i := login(t, addr, loginOptions{})
	l := &copyList{}
	l.unit(naaA, 512)
	l.unit(naaB, 4096)
	l.segment(0, 1, 16, 8, 3)
	l.segment(0, 1, 2, 80, 9)
	l.segments[1][1] = 0x02 // DC: blocks of the destination
	if r := i.xcopy(l); r.status != 0 {
		t.Fatal(r)
	}
	data := b.bytes()
	if !bytes.Equal(data[3*4096:5*4096], a.data[8*512:24*512]) || !bytes.Equal(data[9*4096:11*4096], a.data[80*512:96*512]) {
		t.Error("the data are not those of the source")
	}
	l.segments = nil
	l.segment(0, 1, 15, 0, 0)
	if r := i.xcopy(l); !r.is(sense{keyCopyAborted, 0x26, 0x0a}) {
		t.Errorf("a part of a block: %v", r)
	}
	if !bytes.Equal(b.bytes(), data) {
		t.Error("a refused segment wrote")
	}
}

func TestExtendedCopyRefusesWhatItDoesNotMean(t *testing.T) {
	a := newMemory(512, 4096)
	before := pattern(len(a.data), 5)
	copy(a.data, before)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: a, NAA: naaA})
	i := login(t, addr, loginOptions{})
	valid := func() *copyList {
		l := &copyList{id: 1}
		l.unit(naaA, 512)
		l.segment(0, 0, 8, 0, 100)
		return l
	}
	for name, c := range map[string]struct {
		change func(*copyList)
		want   sense
	}{
		"another target descriptor":     {func(l *copyList) { l.cscds[0][0] = 0xe0 }, senseCSCDType},
		"another segment descriptor":    {func(l *copyList) { l.segments[0][0] = 0x03 }, senseSegmentType},
		"length of a segment":           {func(l *copyList) { l.segments[0][3] = 20 }, senseParamField},
		"a stream device":               {func(l *copyList) { l.cscds[0][1] = 0x01 }, senseParamField},
		"a port's designator":           {func(l *copyList) { l.cscds[0][5] |= 0x10 }, senseParamField},
		"another block length":          {func(l *copyList) { l.cscds[0][30] = 0x10 }, senseParamField},
		"a designator that is too long": {func(l *copyList) { l.cscds[0][7] = 21 }, senseParamField},
		"reserved list usage":           {func(l *copyList) { l.usage = 1 }, senseParamField},
		"list identifier without use":   {func(l *copyList) { l.usage = usageNoID }, senseParamField},
		"too many targets": {func(l *copyList) {
			for range maxCSCDs {
				l.unit(naaA, 512)
			}
		}, senseTooManyCSCDs},
		"too many segments": {func(l *copyList) {
			for range maxSegments {
				l.segment(0, 0, 1, 0, 1)
			}
		}, senseTooManySegments},
		"an unknown unit":          {func(l *copyList) { l.cscds = nil; l.unit(naaC, 512) }, sense{keyCopyAborted, 0x0d, 0x02}},
		"no such target":           {func(l *copyList) { l.segments[0][7] = 1 }, sense{keyCopyAborted, 0x08, 0x04}},
		"beyond the source":        {func(l *copyList) { binary.BigEndian.PutUint64(l.segments[0][12:], 4095) }, sense{keyCopyAborted, 0, 0}},
		"beyond the destination":   {func(l *copyList) { binary.BigEndian.PutUint64(l.segments[0][20:], 1<<63) }, sense{keyCopyAborted, 0, 0}},
		"wraps at the destination": {func(l *copyList) { binary.BigEndian.PutUint64(l.segments[0][20:], 1<<64-4) }, sense{keyCopyAborted, 0, 0}},
	} {
		l := valid()
		c.change(l)
		if r := i.xcopy(l); !r.is(c.want) {
			t.Errorf("%s: %v, want %v", name, r, c.want)
		}
	}
	b := valid().bytes()
	for n := 1; n < len(b); n++ {
		if r := i.do(copyCDB(n), b[:n], 0); !r.is(senseParamLength) {
			t.Errorf("the first %d of %d bytes: %v", n, len(b), r)
		}
	}
	inline := bytes.Clone(b)
	inline[15] = 4
	if r := i.do(copyCDB(len(b)), inline, 0); !r.is(senseParamField) {
		t.Errorf("inline data: %v", r)
	}
	i.good(copyCDB(0), nil, 0)
	if !bytes.Equal(a.bytes(), before) {
		t.Error("a refused copy wrote")
	}
}

func TestExtendedCopySeesOnlyTheUnitsOfTheSession(t *testing.T) {
	a, b := newMemory(512, 64), newMemory(512, 64)
	copy(b.data, pattern(len(b.data), 1))
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: a, NAA: naaA},
		Unit{IQN: iqn, LUN: 1, Device: b, NAA: naaB, Initiators: []Initiator{{Name: "iqn.2026-11.net.example:other"}}})
	i := login(t, addr, loginOptions{})
	l := &copyList{}
	l.unit(naaB, 512)
	l.unit(naaA, 512)
	l.segment(0, 1, 64, 0, 0)
	if r := i.xcopy(l); !r.is(sense{keyCopyAborted, 0x0d, 0x02}) {
		t.Errorf("a unit of another initiator: %v", r)
	}
	if !bytes.Equal(a.bytes(), make([]byte, len(a.data))) {
		t.Error("its data were copied")
	}
}

func TestFailedSegmentIsTold(t *testing.T) {
	a, b := newMemory(512, 4096), newMemory(512, 4096)
	copy(a.data, pattern(len(a.data), 1))
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: a, NAA: naaA}, Unit{IQN: iqn, LUN: 1, Device: b, NAA: naaB})
	i := login(t, addr, loginOptions{})
	b.set(nil, &lun.SenseError{Key: 3, ASC: 0x0c, ASCQ: 2, LBA: 77, Valid: true})
	l := &copyList{id: 9}
	l.unit(naaA, 512)
	l.unit(naaB, 512)
	l.segment(0, 0, 10, 0, 1000)
	l.segment(0, 1, 10, 0, 1000)
	r := i.xcopy(l)
	if !r.is(sense{keyCopyAborted, 0x0d, 0x01}) {
		t.Fatalf("%v", r)
	}
	// COMMAND-SPECIFIC INFORMATION: no source, where the destination's status and sense are,
	// the segment.
	if s := r.sense; s[8] != 0 || int(s[9]) != 18 || binary.BigEndian.Uint16(s[10:]) != 1 ||
		s[18] != iscsi.StatusCheckCondition || s[19]&0x7f != 0x70 || s[21] != 3 || s[19+12] != 0x0c || int(s[7]) != len(s)-8 {
		t.Errorf("sense data %x", s)
	}
	if !bytes.Equal(a.bytes()[1000*512:1010*512], a.data[:10*512]) {
		t.Error("the segment before was not copied")
	}
	if st := i.copyResults(0, 9).data; st[4] != 2 || binary.BigEndian.Uint16(st[5:]) != 1 {
		t.Errorf("COPY STATUS %x", st)
	}
	d := i.copyResults(4, 9).data
	if len(d) < 60 || d[56] != iscsi.StatusCheckCondition || !bytes.Equal(d[60:], r.sense) || int(binary.BigEndian.Uint16(d[58:])) != len(r.sense) {
		t.Errorf("FAILED SEGMENT DETAILS %x", d)
	}
	// A field that is at fault is named, in its segment descriptor.
	l.segments = l.segments[:1]
	binary.BigEndian.PutUint64(l.segments[0][20:], 4090)
	if r := i.xcopy(l); r.sense[15] != 0xa0 || binary.BigEndian.Uint16(r.sense[16:]) != 20 {
		t.Errorf("sense data %x", r.sense)
	}
}

func TestRunningCopyIsToldOfAndEndsWithItsTask(t *testing.T) {
	a := newMemory(512, 4096)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: a, NAA: naaA})
	i := login(t, addr, loginOptions{})
	hold := make(chan struct{})
	a.set(hold, nil)
	l := &copyList{id: 3}
	l.unit(naaA, 512)
	l.segment(0, 0, 10, 0, 1000)
	var running []*iscsi.BHS
	for k := range maxCopies {
		l.id = byte(k + 3)
		b := l.bytes()
		h := i.command(copyCDB(len(b)), iscsi.FlagWrite, len(b))
		i.start(h, b)
		running = append(running, h)
		select {
		case <-a.entered:
		case <-time.After(30 * time.Second):
			t.Fatal("the copy does not begin")
		}
	}
	if st := i.copyResults(0, 3); st.status != 0 || st.data[4] != 0 {
		t.Errorf("COPY STATUS of a running copy: %v %x", st, st.data)
	}
	for _, service := range []byte{1, 4} {
		if r := i.copyResults(service, 3); !r.is(senseInvalidField) {
			t.Errorf("service action %d of a running copy: %v", service, r)
		}
	}
	l.id = 3
	if r := i.xcopy(l); !r.is(senseCopyInProgress) {
		t.Errorf("a list identifier in use: %v", r)
	}
	l.id = 99
	if r := i.xcopy(l); r.status != iscsi.StatusBusy {
		t.Errorf("more copies than run at a time: %v", r)
	}
	tag := i.tmf(iscsi.TMFAbortTask, running[0].ITT())
	for p := i.recv(); ; p = i.recv() {
		if p.Opcode() == iscsi.OpTaskMgmtResp && p.ITT() == tag {
			break
		}
		if p.ITT() == running[0].ITT() {
			t.Fatalf("an aborted copy is answered: %v", p.Opcode())
		}
	}
	a.set(nil, nil)
	close(hold)
	for range running[1:] { // in any order
		if p := i.recv(); p.Opcode() != iscsi.OpSCSIResponse || p.Status() != 0 || p.ITT() == running[0].ITT() {
			t.Errorf("%v with status %02Xh for task %d", p.Opcode(), p.Status(), p.ITT())
		}
	}
	if r := i.xcopy(l); r.status != 0 {
		t.Errorf("after the others: %v", r)
	}
}

func TestCopyLimitsAreReportedAlike(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), NAA: naaA})
	i := login(t, addr, loginOptions{})
	p := i.copyResults(3, 0).data
	if int(binary.BigEndian.Uint32(p)) != len(p)-4 || binary.BigEndian.Uint16(p[8:]) != maxCSCDs || binary.BigEndian.Uint16(p[10:]) != maxSegments ||
		binary.BigEndian.Uint32(p[12:]) != maxCopyList || int(p[43]) != len(p)-44 || !bytes.Equal(p[44:], []byte{0x02, 0xe4}) {
		t.Errorf("OPERATING PARAMETERS %x", p)
	}
	if std := i.good([]byte{0x12, 0, 0, 0, 96, 0}, nil, 96).data; std[5]&0x08 == 0 {
		t.Error("3PC is not set")
	}
	v := i.good([]byte{0x12, 1, 0x8f, 0, 255, 0}, nil, 255).data
	if int(binary.BigEndian.Uint16(v[2:])) != len(v)-4 {
		t.Fatalf("page 8Fh %x", v)
	}
	kinds := 0
	for d := v[4:]; len(d) > 0; d = d[4+binary.BigEndian.Uint16(d[2:]):] {
		kinds++
		if binary.BigEndian.Uint16(d[2:])%4 != 0 {
			t.Errorf("descriptor %x", d)
		}
		if binary.BigEndian.Uint16(d) == 4 && (binary.BigEndian.Uint16(d[8:]) != maxCSCDs || binary.BigEndian.Uint16(d[10:]) != maxSegments) {
			t.Errorf("Parameter Data %x", d)
		}
	}
	if kinds != 5 {
		t.Errorf("%d descriptors", kinds)
	}
}
