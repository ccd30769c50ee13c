package target

import (
	"testing"
	"time"

	"lunshift/iscsi"
)

func TestWritesWhoseDataNeverComesStarveNoOtherSession(t *testing.T) {
	s, addr := begin(t, Config{DataTimeout: time.Second, NopInterval: -1}, Unit{IQN: iqn, Device: newMemory(512, 1<<17)})
	i := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
	for range 8 { // more than there is
		i.send(i.command(rw16(0x8a, 0, 65536), iscsi.FlagWrite|iscsi.FlagFinal, 32<<20), nil)
	}
	i.send(i.command(rw16(0x8a, 0, 256), iscsi.FlagWrite|iscsi.FlagFinal, 256*512), nil)
	waitFor(t, "the session's share to be taken", func() bool {
		s.bytes.mu.Lock()
		defer s.bytes.mu.Unlock()
		return len(s.bytes.waiting) == 8
	})
	j := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	j.good(rw16(0x88, 0, 256), nil, 256*512)
	j.good(rw16(0x8a, 0, 65536), make([]byte, 32<<20), 0)
	// And it does not keep its share for ever.
	waitFor(t, "the end of the session that owes data", func() bool { return len(s.Sessions(iqn)) == 1 })
	j.good(rw16(0x88, 0, 1), nil, 512)
	allBack(t, s)
}

// allBack waits until every byte in flight came back.
func allBack(t testing.TB, s *Server) {
	t.Helper()
	var now int64
	for end := deadline(); now != s.cfg.BytesInFlight; time.Sleep(time.Millisecond) {
		a := s.bytes
		a.mu.Lock()
		a.reclaim()
		now = a.free + a.early.Load()
		left := len(a.waiting)
		a.mu.Unlock()
		if left > 0 || time.Now().After(end) {
			t.Fatalf("%d of %d bytes in flight came back, %d commands wait", now, s.cfg.BytesInFlight, left)
		}
	}
}
