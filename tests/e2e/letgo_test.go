package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// TestUnreadableWritesCanBeLetGo: the destination cannot read, for good, a block that was
// being written when the service was killed. The volume is not served until it is told that
// this write may be lost; then the source's block is in its place, and it is said and logged.
func TestUnreadableWritesCanBeLetGo(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	const lba, size = 3000, 4 * mib
	a := newArray(t, "worn")
	for i := range 5 {
		dir := t.TempDir()
		path := emptyFile(t, dir, "new.img", size)
		portal := peer.NewFaultyPortal(t, a.Portal())
		unit := peer.LUN{Portal: portal.Portal(), IQN: fmt.Sprintf("%s.%d", a.iqn, i), Number: 1}
		must(t, a.AddTarget(t.Context(), unit.IQN, []peer.Unit{{Path: path, Thin: true}}))
		s := newService(t, volume{name: "db01", source: filepath.Join(dir, "old.img"), destination: unit.URL()})
		sparseFile(t, dir, "old.img", size, 1, 7)
		s.start()
		s.run("throttle", "db01", "--rate", "1")
		s.run("start", "db01")
		s.run("pause", "db01")
		dev, err := lun.Open(t.Context(), s.front("db01").URL(), lun.Options{})
		must(t, err)
		before, got := make([]byte, 512), make([]byte, 512)
		must(t, dev.ReadAt(t.Context(), before, lba))
		must(t, dev.WriteAt(t.Context(), bytes.Repeat([]byte{0x5a}, 512), lba))
		s.kill()
		dev.Close()
		portal.Begin(peer.BadBlock, lba)
		s.start()
		if !s.status("db01").Degraded {
			s.stop() // what was written had been settled before the kill: once more
			continue
		}
		s.notServed("db01", "unreadable", "--accept-unreadable-writes")
		s.fails(usage, []string{"--accept-unreadable-writes"}, "adopt", "db01", "--accept-unreadable-writes", "--new")
		r := s.try("adopt", "db01", "--accept-unreadable-writes", "--json")
		var report struct {
			Served    bool
			Withdrawn []struct{ LBA, Blocks uint64 }
		}
		must(t, json.Unmarshal([]byte(r.stdout), &report))
		if r.code != done || !report.Served || len(report.Withdrawn) != 1 || report.Withdrawn[0].LBA != lba || report.Withdrawn[0].Blocks != 1 {
			t.Errorf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
		}
		s.untilLog("is withdrawn as told", 1)
		dev, err = lun.Open(t.Context(), s.front("db01").URL(), lun.Options{})
		must(t, err)
		must(t, dev.ReadAt(t.Context(), got, lba))
		must(t, dev.Close())
		if !bytes.Equal(got, before) {
			t.Error("the block is not the source's")
		}
		s.fails(failed, []string{"db01", "opened meanwhile"}, "adopt", "db01", "--accept-unreadable-writes")
		portal.End()
		s.run("throttle", "db01", "--rate", "0")
		s.run("resume", "db01")
		s.run("cutover", "db01", "--wait", "--timeout", "60s")
		s.stop()
		if strings.Contains(r.stdout, "rebuild\":{") {
			t.Errorf("something was rebuilt: %s", r.stdout)
		}
		if at, same := sameImages(t, filepath.Join(dir, "old.img"), path, size); !same {
			t.Errorf("wrong content at byte %d", at)
		}
		return
	}
	t.Fatal("each write was settled before the kill")
}
