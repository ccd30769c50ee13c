package target

import (
	"testing"

	"lunshift/iscsi"
)

// inUse is what commands have of BytesInFlight.
func (s *Server) inUse() (n int64) {
	a := s.bytes
	a.mu.Lock()
	defer a.mu.Unlock()
	for of := range a.shares {
		n += of.held - of.spare.Load()
	}
	return n
}

func TestMemoryThatACommandNeedsBesidesItsDataIsOfBytesInFlight(t *testing.T) {
	l := &copyList{usage: usageNoID}
	l.unit(naaA, 512)
	l.unit(naaB, 512)
	l.segment(0, 1, 2048, 0, 0)
	for _, c := range []struct{ cdb, out []byte }{
		{rw10(0x34, 0, 2048), nil},                                        // PRE-FETCH (10)
		{rw16(0x90, 0, 2048), nil},                                        // PRE-FETCH (16)
		{rw16(0x8f, 0, 2048), nil},                                        // VERIFY
		{rw16(0x8b, 0, 2048), pattern(1<<20, 1)},                          // ORWRITE
		{rw16(0x93, 0, 2048), pattern(512, 1)},                            // WRITE SAME
		{append(rw16(0x89, 0, 0)[:13], 255, 0, 0), make([]byte, 255<<10)}, // COMPARE AND WRITE
		{copyCDB(len(l.bytes())), l.bytes()},                              // EXTENDED COPY
	} {
		t.Run(lookup(c.cdb).name, func(t *testing.T) {
			m := newMemory(512, 4096)
			s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m, NAA: naaA}, Unit{IQN: iqn, LUN: 1, Device: newMemory(512, 4096), NAA: naaB})
			i := login(t, addr, loginOptions{})
			hold := make(chan struct{})
			m.set(hold, nil)
			ended := make(chan result)
			go func() { ended <- i.do(c.cdb, c.out, 0) }()
			begins(t, m)
			if n, need := s.inUse(), int64(chunk+len(c.out)); n < need {
				t.Errorf("%d bytes are counted of %d", n, need)
			}
			m.set(nil, nil)
			close(hold)
			if r := <-ended; r.status != good && r.status != 0x04 { // CONDITION MET
				t.Error(r)
			}
			allBack(t, s)
		})
	}
}

func TestFloodOfPrefetchesKeepsToBytesInFlight(t *testing.T) {
	m := newMemory(512, 4096)
	s, addr := begin(t, Config{BytesInFlight: 64 << 20, NopInterval: -1}, Unit{IQN: iqn, Device: m})
	hold := make(chan struct{})
	m.set(hold, nil)
	for k := range byte(2) {
		i := login(t, addr, loginOptions{isid: iscsi.ISID{k}})
		for range 60 {
			i.send(i.command(rw16(0x90, 0, 2048), iscsi.FlagFinal, 0), nil)
		}
	}
	waitFor(t, "commands that wait for memory", s.bytes.some.Load)
	if n := s.inUse(); n > 48<<20 {
		t.Errorf("%d bytes in use", n)
	}
	m.set(nil, nil)
	close(hold)
}
