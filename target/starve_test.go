package target

import (
	"testing"
	"time"

	"lunshift/iscsi"
)

func TestWritesWhoseDataNeverComesStarveNoOtherSession(t *testing.T) {
	s, addr := begin(t, Config{DataTimeout: time.Second, NopInterval: -1}, Unit{IQN: iqn, Device: newMemory(512, 1<<17)})
	i := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
	for range 8 { // 256 MiB: all that there is
		i.send(i.command(rw16(0x8a, 0, 65536), iscsi.FlagWrite|iscsi.FlagFinal, 32<<20), nil)
	}
	i.send(i.command(rw16(0x8a, 0, 256), iscsi.FlagWrite|iscsi.FlagFinal, 256*512), nil)
	waitFor(t, "the session's share to be taken", func() bool {
		s.bytes.mu.Lock()
		defer s.bytes.mu.Unlock()
		return s.bytes.free == s.cfg.BytesInFlight-s.bytes.each && len(s.bytes.waiting) == 7
	})
	j := login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	j.good(rw16(0x88, 0, 256), nil, 256*512)
	j.good(rw16(0x8a, 0, 65536), make([]byte, 32<<20), 0)
	// And it does not keep its share for ever.
	waitFor(t, "the end of the session that owes data", func() bool { return len(s.Sessions(iqn)) == 1 })
	j.good(rw16(0x88, 0, 1), nil, 512)
	waitFor(t, "all bytes to come back", func() bool {
		s.bytes.mu.Lock()
		defer s.bytes.mu.Unlock()
		return s.bytes.free == s.cfg.BytesInFlight
	})
}
