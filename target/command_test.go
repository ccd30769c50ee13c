package target

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"lunshift/iscsi"
	"lunshift/lun"
)

func TestErrorsOfTheDeviceBecomeTheRightSense(t *testing.T) {
	m := newMemory(512, 1024)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	for _, c := range []struct {
		err    error
		sense  sense
		status byte
	}{
		{&lun.SenseError{Key: 3, ASC: 0x11, LBA: 7, Valid: true}, sense{3, 0x11, 0}, 2},
		{&lun.SenseError{}, senseInternal, 2},
		{lun.ErrOutOfRange, senseLBARange, 2},
		{lun.ErrUnavailable, senseBecomingReady, 2},
		{lun.ErrUnsupported, senseInvalidField, 2},
		{lun.ErrClosed, senseInternal, 2},
		{errors.New("disk on fire"), senseInternal, 2},
		{lun.ErrConflict, sense{}, iscsi.StatusReservationConflict},
	} {
		m.set(nil, fmt.Errorf("write LBA 0: %w", c.err))
		for _, r := range []result{
			i.do(rw16(0x88, 0, 1), nil, 512),
			i.do(rw16(0x8a, 0, 1), make([]byte, 512), 0),
			i.do(rw16(0x91, 0, 0), nil, 0),
		} {
			if r.status != c.status || (sense{r.key, r.asc, r.ascq}) != c.sense {
				t.Errorf("%v: %v", c.err, r)
			}
			if _, ok := c.err.(*lun.SenseError); ok && c.sense.Key == 3 && r.info != 7 {
				t.Errorf("INFORMATION %d", r.info)
			}
		}
	}
}

func TestCompareAndWrite(t *testing.T) {
	m := newMemory(512, 1024)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	cdb := make([]byte, 16)
	cdb[0], cdb[9], cdb[13] = 0x89, 5, 2
	old, now := make([]byte, 1024), pattern(1024, 3)
	i.good(cdb, append(bytes.Clone(old), now...), 0)
	if !bytes.Equal(m.bytes()[5*512:7*512], now) {
		t.Fatal("equal blocks were not replaced")
	}
	wrong := bytes.Clone(now)
	wrong[700]++
	r := i.do(cdb, append(wrong, old...), 0)
	if r.key != keyMiscompare || r.asc != 0x1d || r.info != 700 {
		t.Errorf("%v, INFORMATION %d", r, r.info)
	}
	if !bytes.Equal(m.bytes()[5*512:7*512], now) {
		t.Error("blocks were replaced though they differ")
	}
}

func TestVerifyComparesWithTheMedium(t *testing.T) {
	m := newMemory(512, 8192)
	copy(m.data, pattern(len(m.bytes()), 1))
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	cdb := rw16(0x8f, 8, 5000) // beyond one chunk
	i.good(cdb, nil, 0)
	cdb[1] = 0x02
	data := bytes.Clone(m.bytes()[8*512:][:5000*512])
	i.good(cdb, data, 0)
	data[4999*512]++
	if r := i.do(cdb, data, 0); r.key != keyMiscompare || r.info != 4999*512 {
		t.Errorf("%v at %d", r, r.info)
	}
	cdb[1] = 0x06
	if r := i.do(cdb, m.bytes()[8*512:][:512], 0); r.key != keyMiscompare {
		t.Error(r)
	}
	cdb[1] = 0x04
	if r := i.do(cdb, nil, 0); !r.is(senseInvalidField) {
		t.Error(r)
	}
}

func TestFUAReachesStableStorage(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: quick{m}})
	i := login(t, addr, loginOptions{})
	for _, op := range []byte{0x8a, 0x88} {
		before := m.flushed()
		cdb := rw16(op, 0, 1)
		cdb[1] = fua
		if op == 0x8a {
			i.good(cdb, make([]byte, 512), 0)
		} else {
			i.good(cdb, nil, 512)
		}
		if m.flushed() != before+1 {
			t.Errorf("opcode %02X with FUA: %d flushes", op, m.flushed()-before)
		}
	}
}

func unmapCDB(extents ...lun.Extent) (cdb, list []byte) {
	list = make([]byte, 8)
	for _, e := range extents {
		list = binary.BigEndian.AppendUint64(list, uint64(e.Start))
		list = binary.BigEndian.AppendUint32(list, uint32(e.Blocks))
		list = append(list, 0, 0, 0, 0)
	}
	binary.BigEndian.PutUint16(list, uint16(len(list)-2))
	binary.BigEndian.PutUint16(list[2:], uint16(len(list)-8))
	cdb = []byte{0x42, 0, 0, 0, 0, 0, 0, byte(len(list) >> 8), byte(len(list)), 0}
	return cdb, list
}

func TestProvisioningIsToldAsItIs(t *testing.T) {
	m := newMemory(512, 4096)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	i.good(rw16(0x8a, 0, 100), pattern(100*512, 1), 0)
	cdb, list := unmapCDB(lun.Extent{Start: 10, Blocks: 5}, lun.Extent{Start: 50, Blocks: 1}, lun.Extent{Start: 20, Blocks: 0})
	i.good(cdb, list, 0)
	status := func(lba uint64, alloc uint32) string {
		t.Helper()
		c := rw16(0x9e, lba, alloc)
		c[1] = 0x12
		r := i.good(c, nil, int(alloc))
		if int(binary.BigEndian.Uint32(r.data)) != len(r.data)-4 {
			t.Errorf("PARAMETER DATA LENGTH %d of %d bytes", binary.BigEndian.Uint32(r.data), len(r.data))
		}
		s := ""
		for d := r.data[8:]; len(d) >= 16; d = d[16:] {
			s += fmt.Sprintf("%d+%d:%d ", binary.BigEndian.Uint64(d), binary.BigEndian.Uint32(d[8:]), d[12])
		}
		return s
	}
	if got := status(0, 512); got != "0+10:0 10+5:1 15+35:0 50+1:1 51+49:0 100+3996:1 " {
		t.Error(got)
	}
	if got := status(12, 24); got != "12+3:1 " {
		t.Error(got)
	}
	if got := status(99, 40); got != "99+1:0 100+3996:1 " {
		t.Error(got)
	}
	c := rw16(0x9e, 4096, 24)
	c[1] = 0x12
	if r := i.do(c, nil, 24); !r.is(senseLBARange) {
		t.Error(r)
	}
	// Nothing happens when one descriptor is out of range.
	cdb, list = unmapCDB(lun.Extent{Start: 0, Blocks: 1}, lun.Extent{Start: 4095, Blocks: 2})
	if r := i.do(cdb, list, 0); !r.is(senseLBARange) || m.alloc[0] == 0 {
		t.Error(r)
	}
	ws := rw16(0x93, 0, 3000)
	i.good(ws, pattern(512, 9), 0)
	if !bytes.Equal(m.bytes()[2999*512:3000*512], pattern(512, 9)) {
		t.Error("WRITE SAME did not reach the last block")
	}
	ws = rw16(0x93, 1, 10)
	ws[1] = wsNDOB | wsUnmap
	i.good(ws, nil, 0)
	if got := status(0, 24+16); got != "0+1:0 1+10:1 " {
		t.Error(got)
	}
}

func TestThickUnitRefusesToUnmap(t *testing.T) {
	m := newMemory(512, 64)
	m.info.Thin = false
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	cdb, list := unmapCDB(lun.Extent{Blocks: 1})
	if r := i.do(cdb, list, 0); !r.is(senseInvalidOpcode) {
		t.Error(r)
	}
	ws := rw16(0x93, 0, 1)
	ws[1] = wsUnmap
	if r := i.do(ws, make([]byte, 512), 0); !r.is(senseInvalidField) {
		t.Error(r)
	}
	if r := i.do([]byte{0xa3, 0x0c, 1, 0x42, 0, 0, 0, 0, 1, 0, 0, 0}, nil, 256); r.data[1]&7 != 1 {
		t.Errorf("UNMAP is reported as supported: %x", r.data)
	}
}

func TestResidualsSayWhatWasNotMoved(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	for _, c := range []struct {
		in       int
		flags    byte
		residual int
	}{{1024, 0, 0}, {600, iscsi.FlagOverflow, 424}, {5000, iscsi.FlagUnderflow, 3976}, {0, iscsi.FlagOverflow, 1024}} {
		r := i.good(rw16(0x88, 0, 2), nil, c.in)
		if r.flags != c.flags || r.residual != c.residual || len(r.data) != min(c.in, 1024) {
			t.Errorf("read into %d bytes: flags %02X residual %d, %d bytes", c.in, r.flags, r.residual, len(r.data))
		}
	}
	for _, c := range []struct {
		out      int
		flags    byte
		residual int
		written  int
	}{{1024, 0, 0, 1024}, {600, iscsi.FlagOverflow, 424, 512}, {5000, iscsi.FlagUnderflow, 3976, 1024}, {100, iscsi.FlagOverflow, 924, 0}} {
		m.mu.Lock()
		clear(m.data)
		m.mu.Unlock()
		r := i.good(rw16(0x8a, 0, 2), bytes.Repeat([]byte{7}, c.out), 0)
		if n := bytes.Count(m.bytes(), []byte{7}); r.flags != c.flags || r.residual != c.residual || n != c.written {
			t.Errorf("write of %d bytes: flags %02X residual %d, %d written", c.out, r.flags, r.residual, n)
		}
	}
	if r := i.good([]byte{0x12, 0, 0, 0, 36, 0}, nil, 255); r.flags != iscsi.FlagUnderflow || r.residual != 255-36 || len(r.data) != 36 {
		t.Errorf("INQUIRY: flags %02X residual %d", r.flags, r.residual)
	}
}

func TestLargeReadsComeWhole(t *testing.T) {
	m := newMemory(512, 1<<16)
	copy(m.data, pattern(len(m.bytes()), 5))
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{want: func(p *iscsi.Params) { p.MaxRecv = 70000; p.MaxBurstLength = 300000 }})
	if r := i.good(rw16(0x88, 0, 1<<15), nil, 16<<20); !bytes.Equal(r.data, m.bytes()[:16<<20]) {
		t.Error("16 MiB differ")
	}
	if r := i.do(rw16(0x88, 0, maxTransfer/512+1), nil, 512); !r.is(senseLBARange) && !r.is(senseInvalidField) {
		t.Error(r)
	}
}

func TestSupportedOpcodesAreThoseServed(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	r := i.good([]byte{0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0}, nil, 0x4000)
	if n := (len(r.data) - 4) / 8; n != len(operations) {
		t.Errorf("%d of %d operations are reported", n, len(operations))
	}
	for d := r.data[4:]; len(d) > 0; d = d[8:] {
		cdb := make([]byte, 16)
		cdb[0] = d[0]
		if d[5]&1 != 0 {
			cdb[1] = d[3]
		}
		if r := i.do(cdb, nil, 0); r.is(senseInvalidOpcode) {
			t.Errorf("opcode %02X is reported and refused", d[0])
		}
	}
	for op := range 256 {
		if len(index[op]) > 0 {
			continue
		}
		if r := i.do([]byte{byte(op), 15: 0}, nil, 0); !r.is(senseInvalidOpcode) {
			t.Errorf("opcode %02X: %v", op, r)
		}
	}
}

// TestReadsSeeTheLastWrite holds a unit against a plain model under random
// commands.
func TestReadsSeeTheLastWrite(t *testing.T) {
	m := newMemory(512, 256)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: quick{m}})
	i := login(t, addr, loginOptions{})
	rapid.Check(t, func(rt *rapid.T) {
		model := m.bytes()
		for range rapid.IntRange(1, 8).Draw(rt, "commands") {
			lba := rapid.IntRange(0, 250).Draw(rt, "lba")
			n := rapid.IntRange(1, 256-lba).Draw(rt, "blocks")
			seed := byte(rapid.IntRange(0, 255).Draw(rt, "seed"))
			here := model[lba*512 : (lba+n)*512]
			switch rapid.SampledFrom([]string{"write", "read", "same", "unmap", "caw"}).Draw(rt, "op") {
			case "write":
				copy(here, pattern(n*512, seed))
				i.good(rw16(0x8a, uint64(lba), uint32(n)), pattern(n*512, seed), 0)
			case "read":
				if r := i.good(rw16(0x88, uint64(lba), uint32(n)), nil, n*512); !bytes.Equal(r.data, here) {
					rt.Fatalf("blocks %d+%d differ", lba, n)
				}
			case "same":
				for b := range n {
					copy(here[b*512:], pattern(512, seed))
				}
				i.good(rw16(0x93, uint64(lba), uint32(n)), pattern(512, seed), 0)
			case "unmap":
				clear(here)
				cdb, list := unmapCDB(lun.Extent{Start: lun.LBA(lba), Blocks: uint64(n)})
				i.good(cdb, list, 0)
			case "caw":
				n = min(n, 20)
				here = here[:n*512]
				cdb := rw16(0x89, uint64(lba), 0)
				cdb[13] = byte(n)
				out := append(bytes.Clone(here), pattern(n*512, seed)...)
				copy(here, pattern(n*512, seed))
				i.good(cdb, out, 0)
			}
		}
		if !bytes.Equal(model, m.bytes()) {
			rt.Fatal("the device differs from the model")
		}
	})
}

// FuzzCDB: no CDB and no data makes the target panic, close the session or answer
// GOOD to an opcode it does not know.
func FuzzCDB(f *testing.F) {
	m := newMemory(512, 64)
	_, addr := begin(f, Config{}, Unit{IQN: iqn, Device: m})
	i := login(f, addr, loginOptions{want: func(p *iscsi.Params) { p.InitialR2T = false }})
	for k := range operations {
		o := &operations[k]
		cdb := make([]byte, 16)
		cdb[0] = o.opcode
		if o.service >= 0 {
			cdb[1] = byte(o.service)
		}
		cdb[4], cdb[8], cdb[13] = 8, 1, 24
		f.Add(cdb, make([]byte, 512), uint16(512))
	}
	f.Fuzz(func(t *testing.T, cdb, out []byte, in uint16) {
		if len(cdb) == 0 {
			return
		}
		cdb = append(cdb, make([]byte, 16)...)[:16]
		i.t = t
		i.nc.SetDeadline(deadline())
		var r result
		if len(out) > 0 {
			r = i.do(cdb, out[:min(len(out), 1<<16)], 0)
		} else {
			r = i.do(cdb, nil, int(in))
		}
		if r.status == iscsi.StatusGood && lookup(cdb) == nil {
			t.Errorf("CDB %x is answered GOOD", cdb)
		}
		if r.is(senseInternal) {
			t.Errorf("CDB %x: %v", cdb, r)
		}
	})
}

// TestConformanceSuiteOfLibiscsi runs what libiscsi's test suite has for a disk.
func TestConformanceSuiteOfLibiscsi(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, bs uint32, family string) {
		_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: quick{newMemory(bs, 64<<20/uint64(bs))}})
		out, err := tool(t, "iscsi-test-cu", "-d", "-n", "-t", family, url(addr, 0))
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		failed := regexp.MustCompile(`(?m)^Suite .* had failures:\n(?:.*\n)?`).FindAllString(out, -1)
		if len(failed) > 0 || !regexp.MustCompile(`tests +\d+ +\d+ +\d+ +0 `).MatchString(out) {
			t.Errorf("%s\n%s", strings.Join(failed, ""), out[max(0, len(out)-400):])
		}
	}
	t.Run("512", func(t *testing.T) {
		t.Parallel()
		run(t, 512, "ALL")
	})
	t.Run("4096", func(t *testing.T) {
		t.Parallel()
		for _, family := range []string{"GetLBAStatus", "Inquiry", "Read10", "ReadCapacity16", "Unmap", "Write16", "iSCSIResiduals"} {
			run(t, 4096, "ALL."+family)
		}
	})
}

// TestGranularityOfOneBlockIsNotReported: initiators that take a granularity for
// several blocks misbehave on 1.
func TestGranularityOfOneBlockIsNotReported(t *testing.T) {
	for _, n := range []uint32{0, 1, 2, 64} {
		m := newMemory(4096, 64)
		m.info.UnmapGranularity = n
		_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
		want := n
		if n == 1 {
			want = 0
		}
		page := login(t, addr, loginOptions{}).good([]byte{0x12, 1, 0xb0, 0, 64, 0}, nil, 64).data
		if got := binary.BigEndian.Uint32(page[28:]); got != want {
			t.Errorf("OPTIMAL UNMAP GRANULARITY is %d where the device's is %d, want %d", got, n, want)
		}
	}
}
