package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"

	"lunshift/iscsi"
	"lunshift/lun"
)

// eachBlockLength runs a test over units of 512-byte and of 4096-byte blocks.
func eachBlockLength(t *testing.T, test func(t *testing.T, bs int)) {
	for _, bs := range []int{512, 4096} {
		t.Run(fmt.Sprint(bs), func(t *testing.T) { test(t, bs) })
	}
}

func TestORWriteOrs(t *testing.T) {
	eachBlockLength(t, func(t *testing.T, bs int) {
		n := 3<<20/bs + 1 // beyond one run of blocks
		m := newMemory(uint32(bs), uint64(n+10))
		_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
		i := login(t, addr, loginOptions{})
		before := pattern(len(m.data), 1)
		copy(m.data, before)
		out := pattern(n*bs, 99)
		i.good(rw16(0x8b, 5, uint32(n)), out, 0)
		want := bytes.Clone(before)
		for k, b := range out {
			want[5*bs+k] |= b
		}
		if !bytes.Equal(m.bytes(), want) {
			t.Error("the blocks are not what they were or what was sent")
		}
		flushes := m.flushed()
		cdb := rw16(0x8b, 5, 1)
		cdb[1] = fua
		if i.good(cdb, out[:bs], 0); m.flushed() == flushes {
			t.Error("FUA flushed nothing")
		}
		i.good(rw16(0x8b, 5, 0), nil, 0)
		if r := i.do(rw16(0x8b, uint64(n+10), 1), out[:bs], 0); !r.is(senseLBARange) {
			t.Errorf("beyond the capacity: %v", r)
		}
		cdb[1] = 0x20 // ORPROTECT
		if r := i.do(cdb, out[:bs], 0); !r.is(senseInvalidField) {
			t.Errorf("ORPROTECT: %v", r)
		}
	})
}

func TestORWriteOfManySessionsLosesNoBit(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	const sessions = 8
	var all sync.WaitGroup
	for k := range sessions {
		i := login(t, addr, loginOptions{isid: iscsi.ISID{byte(k + 1)}})
		all.Go(func() {
			for at := range 512 {
				out := make([]byte, 512)
				out[at] = 1 << k
				if r := i.do(rw16(0x8b, 7, 1), out, 0); r.status != 0 {
					t.Errorf("%v", r)
				}
			}
		})
	}
	all.Wait()
	if !bytes.Equal(m.bytes()[7*512:8*512], bytes.Repeat([]byte{0xff}, 512)) {
		t.Error("a bit is missing")
	}
}

func TestCompareAndWriteOfManySessionsIsAtomic(t *testing.T) {
	eachBlockLength(t, func(t *testing.T, bs int) {
		m := newMemory(uint32(bs), 64)
		_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
		const sessions, each = 6, 25
		var all sync.WaitGroup
		for k := range sessions {
			i := login(t, addr, loginOptions{isid: iscsi.ISID{byte(k + 1)}})
			all.Go(func() {
				cdb := make([]byte, 16)
				cdb[0], cdb[9], cdb[13] = 0x89, 9, 2
				for done := 0; done < each; {
					old := i.do(rw16(0x88, 9, 2), nil, 2*bs).data
					next := bytes.Clone(old)
					for _, at := range []int{0, bs} { // one count in each of the two blocks
						binary.BigEndian.PutUint32(next[at:], binary.BigEndian.Uint32(next[at:])+1)
					}
					switch r := i.do(cdb, append(old, next...), 0); {
					case r.status == iscsi.StatusGood:
						done++
					case r.key != keyMiscompare:
						t.Errorf("%v", r)
						return
					}
				}
			})
		}
		all.Wait()
		for _, at := range []int{9 * bs, 10 * bs} {
			if n := binary.BigEndian.Uint32(m.bytes()[at:]); n != sessions*each {
				t.Errorf("counted %d of %d", n, sessions*each)
			}
		}
	})
}

// reads counts the bytes that are read of a device.
type reads struct {
	*memory
	mu sync.Mutex // protects n
	n  int
}

func (r *reads) ReadAt(ctx context.Context, p []byte, start lun.LBA) error {
	r.mu.Lock()
	r.n += len(p)
	r.mu.Unlock()
	return r.memory.ReadAt(ctx, p, start)
}

// take gives the count and begins again.
func (r *reads) take() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.n
	r.n = 0
	return n
}

func TestPreFetchReadsTheBlocks(t *testing.T) {
	const blocks = prefetchMost/512 + 100
	d := &reads{memory: newMemory(512, blocks)}
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: d})
	i := login(t, addr, loginOptions{})
	for _, c := range []struct {
		cdb    []byte
		status byte
		read   int
	}{
		{rw10(0x34, 10, 7), iscsi.StatusConditionMet, 7 * 512},
		{rw16(0x90, 10, 7), iscsi.StatusConditionMet, 7 * 512},
		{rw10(0x34, blocks-50, 0), iscsi.StatusConditionMet, 50 * 512}, // to the end of the medium
		{rw16(0x90, 0, 0), iscsi.StatusGood, prefetchMost},             // more than is read ahead
		{[]byte{0x34, 0x02, 0, 0, 0, 1, 3, 0, 1, 0}, iscsi.StatusConditionMet, 512},
	} {
		r := i.do(c.cdb, nil, 0)
		if n := d.take(); r.status != c.status || n != c.read {
			t.Errorf("CDB %x: %v, read %d bytes, want status %02Xh and %d", c.cdb, r, n, c.status, c.read)
		}
	}
	if r := i.do(rw16(0x90, blocks, 1), nil, 0); !r.is(senseLBARange) {
		t.Errorf("beyond the capacity: %v", r)
	}
	d.set(nil, &lun.SenseError{Key: 3, ASC: 0x11})
	if r := i.do(rw10(0x34, 0, 1), nil, 0); r.key != 3 {
		t.Errorf("blocks that cannot be read: %v", r)
	}
}

func TestDefectListsAreEmpty(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	if r := i.good([]byte{0x37, 0, 0x1d, 0, 0, 0, 0, 0, 64, 0}, nil, 64); !bytes.Equal(r.data, []byte{0, 0x1d, 0, 0}) || r.residual != 60 {
		t.Errorf("READ DEFECT DATA (10): %x, residual %d", r.data, r.residual)
	}
	if r := i.good([]byte{0xb7, 0x0d, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0}, nil, 64); !bytes.Equal(r.data, []byte{0, 0x0d, 0, 0, 0, 0, 0, 0}) || r.residual != 56 {
		t.Errorf("READ DEFECT DATA (12): %x, residual %d", r.data, r.residual)
	}
}

func TestUnitIsNotStoppedForOneInitiator(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	i.good([]byte{0x1b, 0x01, 0, 0, 0x01, 0}, nil, 0)
	for _, b := range []byte{0x00, 0x02, 0x03, 0x10, 0x31} { // STOP, eject, load, power conditions
		if r := i.do([]byte{0x1b, 0, 0, 0, b, 0}, nil, 0); !r.is(senseInvalidField) {
			t.Errorf("byte 4 %02X: %v", b, r)
		}
	}
	i.good(rw10(0x28, 0, 1), nil, 512)
}

func TestCommandsThatAreNotOfferedAreIllegal(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	for _, cdb := range [][]byte{
		{0x48, 0x02, 0, 0, 0, 0, 0, 0, 0, 0}, // SANITIZE
		rw16(0x9c, 0, 1),                     // WRITE ATOMIC (16)
		{0x1e, 0, 0, 0, 1, 0},                // PREVENT ALLOW MEDIUM REMOVAL
		{0x04, 0, 0, 0, 0, 0},                // FORMAT UNIT
		{0x4d, 0, 0x40, 0, 0, 0, 0, 0, 4, 0}, // LOG SENSE
	} {
		if r := i.do(cdb, nil, 0); !r.is(senseInvalidOpcode) {
			t.Errorf("CDB %x: %v", cdb, r)
		}
		if r := i.good([]byte{0xa3, 0x0c, 1, cdb[0], 0, 0, 0, 0, 0, 64, 0, 0}, nil, 64); r.data[1]&7 != 1 {
			t.Errorf("opcode %02X is reported as SUPPORT %d", cdb[0], r.data[1]&7)
		}
	}
	if r := i.do([]byte{0x83, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, nil, 0); !r.is(senseInvalidField) { // POPULATE TOKEN
		t.Errorf("another service action of THIRD-PARTY COPY OUT: %v", r)
	}
}

func TestRefusalNamesTheField(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	for _, c := range []struct {
		cdb  []byte
		want []byte // SKSV, C/D, BPV and bit pointer; field pointer
	}{
		{[]byte{0xa3, 0x0c, 0x01, 0xa3, 0, 0x0c, 0, 0, 0, 64, 0, 0}, []byte{0xca, 0, 2}}, // REPORTING OPTIONS
		{[]byte{0xa3, 0x0c, 0x02, 0x28, 0, 0, 0, 0, 0, 64, 0, 0}, []byte{0xca, 0, 2}},
		{[]byte{0xa3, 0x1e, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0}, []byte{0xcc, 0, 1}}, // SERVICE ACTION
		{[]byte{0x28, 0xe0, 0, 0, 0, 0, 0, 0, 1, 0}, []byte{0xcf, 0, 1}},        // RDPROTECT
		{[]byte{0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0x04}, []byte{0xca, 0, 9}},        // NACA
		{[]byte{0x12, 0x01, 0x99, 0, 64, 0}, []byte{0xc0, 0, 2}},                // PAGE CODE
	} {
		r := i.do(c.cdb, nil, 64)
		if !r.is(senseInvalidField) || !bytes.Equal(r.sense[15:18], c.want) {
			t.Errorf("CDB %x: %v, sense-key specific %x, want %x", c.cdb, r, r.sense[15:18], c.want)
		}
	}
}

func TestUnmapIgnoresADescriptorThatIsCutOff(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	copy(m.data, bytes.Repeat([]byte{1}, len(m.data)))
	cdb, list := unmapCDB(lun.Extent{Start: 3, Blocks: 2}, lun.Extent{Start: 10, Blocks: 2})
	list = list[:8+16+12]
	cdb[7], cdb[8] = 0, byte(len(list))
	binary.BigEndian.PutUint16(list, uint16(len(list)-2))
	binary.BigEndian.PutUint16(list[2:], uint16(len(list)-8))
	i.good(cdb, list, 0)
	want := bytes.Repeat([]byte{1}, len(m.data))
	clear(want[3*512 : 5*512])
	if !bytes.Equal(m.bytes(), want) {
		t.Error("not exactly the whole descriptors were done")
	}
}

// TestResidualOfEveryAnswerIsWhatWasNotMoved asks each command that answers with data of
// its own for less and for more than it has (RFC 7143 11.4.5).
func TestResidualOfEveryAnswerIsWhatWasNotMoved(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	asked := 0
	for _, o := range operations {
		cdb := make([]byte, 16)
		cdb[0] = o.opcode
		if o.service >= 0 {
			cdb[1] = byte(o.service)
		}
		const most = 255
		switch o.opcode { // ALLOCATION LENGTH
		case 0x03, 0x1a:
			cdb[4] = most
		case 0x12:
			cdb[4] = most
		case 0x5a, 0x37, 0x5e:
			cdb[8] = most
		case 0xa0, 0xb7, 0xa3:
			cdb[9] = most
		case 0x84, 0x9e:
			cdb[13] = most
		case 0x25:
		default:
			continue
		}
		if o.opcode == 0x1a || o.opcode == 0x5a {
			cdb[2] = 0x3f
		}
		if o.opcode == 0x84 && o.service != 0x03 {
			continue // there was no copy
		}
		asked++
		all := i.good(cdb, nil, 4096)
		n := len(all.data)
		if n == 0 || n > most || all.residual != 4096-n || all.flags != iscsi.FlagUnderflow {
			t.Errorf("%s: %d bytes, residual %d, flags %02X", o.name, n, all.residual, all.flags)
		}
		short := i.good(cdb, nil, 3)
		if !bytes.Equal(short.data, all.data[:3]) || short.residual != n-3 || short.flags != iscsi.FlagOverflow {
			t.Errorf("%s: %d bytes of %d, residual %d, flags %02X", o.name, len(short.data), n, short.residual, short.flags)
		}
		if exact := i.good(cdb, nil, n); len(exact.data) != n || exact.residual != 0 || exact.flags != 0 {
			t.Errorf("%s: residual %d, flags %02X of all that there is", o.name, exact.residual, exact.flags)
		}
	}
	if asked < 15 {
		t.Errorf("only %d commands were asked", asked)
	}
}

func TestPortOfTheIdentificationIsThatOfTheSession(t *testing.T) {
	s, err := New(Config{Log: logTo(t), Portals: []Portal{{Address: "127.0.0.1:0", Group: 1}, {Address: "127.0.0.1:0", Group: 258}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AddUnit(Unit{IQN: iqn, Device: newMemory(512, 64)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background()) }()
	t.Cleanup(func() { s.Close(); <-served })
	var units [][]byte
	for k, group := range []uint16{1, 258} {
		i := login(t, s.Addrs()[k].(*net.TCPAddr).String(), loginOptions{})
		var port, name []byte
		var unit []byte
		for d := i.good([]byte{0x12, 1, 0x83, 0, 255, 0}, nil, 255).data[4:]; len(d) > 0; d = d[4+int(d[3]):] {
			v := d[4 : 4+int(d[3])]
			switch {
			case d[1]&0x30 == 0:
				unit = append(unit, v...)
			case d[1]&0x0f == 4:
				port = v
			case d[1]&0x0f == 8:
				name = bytes.TrimRight(v, "\x00")
			}
		}
		if want := []byte{0, 0, byte(group >> 8), byte(group)}; !bytes.Equal(port, want) {
			t.Errorf("relative target port %x, want %x", port, want)
		}
		if want := fmt.Sprintf("%s,t,0x%04x", iqn, group); string(name) != want {
			t.Errorf("target port %q, want %q", name, want)
		}
		units = append(units, unit)
	}
	if !slices.Equal(units[0], units[1]) {
		t.Error("the unit has different names in two portal groups")
	}
}
