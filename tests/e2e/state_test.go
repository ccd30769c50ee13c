package e2e

import (
	"context"
	le "encoding/binary"
	"encoding/json"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// notServed wants the volume not to be found by initiators, with the words in its status.
func (s *service) notServed(name string, words ...string) {
	s.t.Helper()
	st := s.status(name)
	for _, w := range append(words, "not served") {
		if !strings.Contains(st.DegradedReason, w) {
			s.t.Errorf("the status of %s lacks %q: %q", name, w, st.DegradedReason)
		}
	}
	if dev, err := lun.Open(s.t.Context(), s.front(name).URL(), lun.Options{LoginTimeout: time.Second}); err == nil {
		dev.Close()
		s.t.Errorf("initiators find volume %s", name)
	}
}

// A migration whose state is lost is refused until it is rebuilt, whatever the
// configuration says, and ends with every acknowledged block on the destination.
//
// Caught: a volume that the state does not know opened all the same (here the fences of the
// lost state keep it from being served; of files, TestFirstUseOfADestinationThatIsNotBlank sees it).
func TestLostStateIsRefusedAndRebuilt(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	ctx := t.Context()
	p := sides{block: 512, sourceFile: true, sourceThin: true, destinationThin: true, size: 32 * mib}.make(t)
	before := p.sourcePath + ".before"
	clone(t, p.sourcePath, before)
	v := p.volume("db01")
	v.more = "overwrite = true\nautostart = true\nregion_size = \"64KiB\"\ncopy = { rate = \"2MiB\" }\n"
	s := newService(t, v)
	s.start()

	const clients = 4
	dev, err := lun.Open(ctx, s.front("db01").URL(), lun.Options{})
	must(t, err)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var acks atomic.Int64
	load, stop := context.WithCancel(ctx)
	defer stop()
	var running sync.WaitGroup
	var oracles []*oracle
	for i := range clients {
		blocks := p.size / clients / 512
		o := newOracle(uint64(i)*blocks, blocks, 512)
		oracles = append(oracles, o)
		// It ends when the service is killed: what it had not answered counts as perhaps.
		running.Go(func() {
			_ = o.client(load, load, deviceHost{dev}, rand.New(rand.NewPCG(seed, uint64(i))), &acks)
		})
	}
	s.until("db01", "some way", func(st status) bool { return acks.Load() > 200 && st.Copied > 2*mib })
	s.kill()
	stop()
	running.Wait()
	dev.Close()
	must(t, os.RemoveAll(s.state))

	s.start()
	s.untilLog("--rebuild", 1)
	refused := func() {
		t.Helper()
		s.notServed("db01", s.state, "not blank", "state is lost", "lunshift adopt db01 --rebuild")
		s.fails(failed, []string{"not served", "adopt db01 --rebuild"}, "start", "db01")
	}
	refused()
	// The fences of the lost state are still on the destination.
	s.fails(failed, []string{"another lunshift", "break-fence"}, "adopt", "db01", "--rebuild")
	s.run("break-fence", "db01", "--yes")
	refused()
	s.fails(usage, []string{"--new", "--rebuild"}, "adopt", "db01")
	s.fails(failed, []string{"not served", "--zeroes=source", "--different=source"}, "adopt", "db01", "--rebuild")
	refused()

	// A kill in the midst leaves nothing that is believed.
	ended := make(chan result, 1)
	go func() {
		ended <- s.try("adopt", "db01", "--rebuild", "--zeroes=source", "--different=destination", "--rate", "1MiB")
	}()
	s.untilLog("made anew", 3)
	s.kill()
	if r := <-ended; r.code != failed {
		t.Errorf("adopt, the service killed: exit code %d: %s", r.code, r.stderr)
	}
	s.start()
	refused()

	var report struct {
		Served  bool
		Rebuild struct {
			Blocks     uint64 `json:"blocks"`
			Equal      uint64 `json:"equal_blocks"`
			Different  uint64 `json:"different_blocks"`
			Zeroes     uint64 `json:"zeroes_blocks"`
			ZeroesFrom string `json:"zeroes_from"`
		}
	}
	text := s.run("adopt", "db01", "--rebuild", "--zeroes=source", "--different=destination", "--json")
	must(t, json.Unmarshal([]byte(text), &report))
	if r := report.Rebuild; !report.Served || r.Blocks != p.size/512 || r.Equal+r.Different+r.Zeroes != r.Blocks || r.Different == 0 || r.Zeroes == 0 || r.ZeroesFrom != "source" {
		t.Errorf("report: %s", text)
	}
	s.fails(wrongPhase, []string{"knows the volume"}, "adopt", "db01", "--rebuild")
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	s.run("cutover", "db01")
	s.stop()
	image, err := os.Open(p.destinationPath)
	must(t, err)
	defer image.Close()
	old, err := os.Open(before)
	must(t, err)
	defer old.Close()
	for _, o := range oracles {
		o.check(t, image, old)
	}
}

// The first use of a destination with old content needs one word, and only once.
//
// Caught: a check that takes overwrite for an answer; a volume that waits to be adopted in
// phase ready, for which a wait --for ready ended well.
func TestFirstUseOfADestinationThatIsNotBlank(t *testing.T) {
	dir := t.TempDir()
	v := volume{name: "db01", source: sparseFile(t, dir, "old.img", 8*mib, 0.4, 1), destination: sparseFile(t, dir, "new.img", 8*mib, 0.4, 2), more: "overwrite = true\n"}
	s := newService(t, v)
	check := func(when string) {
		t.Helper()
		if r := s.try("check"); r.code != failed || !strings.Contains(r.stdout+r.stderr, "lunshift adopt db01 --new") {
			t.Errorf("check %s: exit code %d: %s%s", when, r.code, r.stdout, r.stderr)
		}
	}
	check("before serve")
	s.start()
	check("beside serve")
	s.notServed("db01", "not blank", "lunshift adopt db01 --new")
	if st := s.status("db01"); st.Phase != "unknown" || st.Size != 8*mib || st.Destination.State != "online" {
		t.Errorf("waits to be adopted: %+v", st)
	}
	s.fails(failed, []string{"db01"}, "wait", "db01", "--for", "ready", "--timeout", "100ms")
	s.fails(wrongPhase, []string{"db01", "unknown", "adopt"}, "cutover", "db01", "--wait")
	if out := s.run("status", "db01"); !strings.Contains(out, "unknown") || strings.Contains(out, "progress") {
		t.Errorf("status: %s", out)
	}
	s.run("adopt", "db01", "--new")
	s.kill()
	s.start()
	s.run("start", "db01")
	s.run("cutover", "db01", "--wait")
	s.stop()
	if at, same := sameImages(t, v.source, v.destination, 8*mib); !same {
		t.Errorf("wrong content at byte %d", at)
	}
}

// begun is a service in mid-migration that was killed.
func begun(t *testing.T, state string) *service {
	t.Helper()
	v := files(t)
	v.more = "region_size = \"64KiB\"\n"
	s := newService(t, v)
	if state != "" {
		s.state = state
		s.configure()
	}
	s.start()
	s.run("throttle", "db01", "--rate", "64KiB")
	s.run("start", "db01")
	s.until("db01", "under way", func(st status) bool { return st.Copied > 0 })
	s.kill()
	return s
}

// Damage is refused with the directory's name and what to do, or does no harm: the
// migration is never begun anew.
func TestDamagedStateIsRefused(t *testing.T) {
	s := begun(t, "")
	good := filepath.Join(s.dir, "good")
	must(t, os.CopyFS(good, os.DirFS(s.state)))
	restore := func(t *testing.T) {
		t.Helper()
		must(t, os.RemoveAll(s.state))
		must(t, os.CopyFS(s.state, os.DirFS(good)))
	}
	var names []string
	must(t, filepath.WalkDir(good, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && d.Name() != "LOCK" && d.Name() != "KEYREGISTRY" {
			name, _ := filepath.Rel(good, path)
			names = append(names, name)
		}
		return err
	}))
	refused := 0
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			s.t = t
			restore(t)
			path := filepath.Join(s.state, name)
			b, err := os.ReadFile(path)
			must(t, err)
			used := len(b)
			for used > 0 && b[used-1] == 0 {
				used--
			}
			if used == 0 {
				t.Skip("it is empty")
			}
			b[used/2] ^= 0x10
			must(t, os.WriteFile(path, b, 0o600))
			s.launch()
			var code error
			select {
			case code = <-s.exited:
				s.cmd = nil
			case <-time.After(300 * time.Millisecond):
				for s.try("status").code != done {
					select {
					case code = <-s.exited:
						s.cmd = nil
					case <-time.After(50 * time.Millisecond):
						continue
					}
					break
				}
			}
			if s.cmd != nil {
				if st := s.status("db01"); st.Phase != "migrating" {
					t.Errorf("served in phase %s with %s damaged", st.Phase, name)
				}
				s.kill()
				t.Log("served: no harm done")
				return
			}
			if refused++; code == nil || s.cmd != nil {
				t.Error("serve ended as if all was well")
			}
			log, err := os.ReadFile(s.log.Name())
			must(t, err)
			lines := strings.Split(strings.TrimSpace(string(log)), "\n")
			if last := lines[len(lines)-1]; !strings.HasPrefix(last, "lunshift: ") || !strings.Contains(last, s.state) || !strings.Contains(last, "damaged") {
				t.Errorf("the line does not say what is wrong: %s", last)
			}
		})
	}
	s.t = t
	if refused == 0 {
		t.Errorf("no damage was refused, of %q", names)
	}
	restore(t)
	s.start()
	if st := s.status("db01"); st.Phase != "migrating" {
		t.Errorf("put back: %+v", st)
	}
	s.stop()
}

// What is no state of this lunshift is refused with the file or the directory and what to do.
func TestStateThatIsNotForThisServiceIsRefused(t *testing.T) {
	s := begun(t, "")
	head := filepath.Join(s.state, "HEAD")
	good, err := os.ReadFile(head)
	must(t, err)
	newer := append([]byte(nil), good...)
	le.LittleEndian.PutUint32(newer[8:], 99)
	table := crc32.MakeTable(crc32.Castagnoli)
	le.LittleEndian.PutUint32(newer[12:], crc32.Update(crc32.Checksum(newer[:12], table), table, newer[16:]))
	must(t, os.WriteFile(head, newer, 0o600))
	s.serveFails(s.state, "version 99", "newer")
	must(t, os.WriteFile(head, []byte("somebody else's file, and long enough"), 0o600))
	s.serveFails(s.state, "HEAD", "damaged") // for a state lies beside it
	must(t, os.Remove(head))
	s.serveFails(s.state, "HEAD", "missing")
	must(t, os.WriteFile(head, good, 0o600))
	// The state of other LUNs.
	v := s.volumes[0]
	s.volumes[0].source = sparseFile(t, t.TempDir(), "other.img", 8*mib, 0.4, 9)
	s.configure()
	s.serveFails("db01", "belongs to", "correct the configuration")
	s.volumes[0] = v
	s.configure()
	s.start()
	if st := s.status("db01"); st.Phase != "migrating" {
		t.Errorf("put back: %+v", st)
	}
	s.stop()
}

// A state on a file system that is full or read-only is refused at the start and fails
// writes while it is served; nothing is acknowledged that is not durable.
func TestStateOnAFullOrReadOnlyFileSystem(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=160m"); err != nil {
		t.Skipf("cannot mount a file system: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := begun(t, filepath.Join(dir, "state"))
	ballast := filepath.Join(dir, "ballast")
	fill := func() {
		f, err := os.Create(ballast)
		must(t, err)
		for err == nil {
			_, err = f.Write(make([]byte, mib))
		}
		must(t, f.Close())
	}
	fill()
	s.serveFails(s.state, "free some")
	must(t, os.Remove(ballast))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	s.serveFails(s.state, "read-only")
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, ""))

	s.start()
	dev, err := lun.Open(t.Context(), s.front("db01").URL(), lun.Options{})
	must(t, err)
	defer dev.Close()
	last := lun.LBA(8*mib/512 - 8) // not copied yet
	fill()
	if err := dev.WriteAt(t.Context(), make([]byte, 4096), last); err == nil {
		t.Error("a write was acknowledged though its flags could not be written")
	}
	if st := s.status("db01"); !st.Degraded || !strings.Contains(st.DegradedReason, s.state) || !strings.Contains(st.DegradedReason, "free some") {
		t.Errorf("status while it is full: %+v", st)
	}
	must(t, os.Remove(ballast))
	if err := dev.WriteAt(t.Context(), make([]byte, 4096), last); err != nil {
		t.Errorf("with space again: %v", err)
	}
	s.kill()
}

// A state that is removed under a running service is noticed at the next write, which
// fails, and the next start refuses the volume.
func TestStateRemovedUnderARunningService(t *testing.T) {
	v := files(t)
	v.more = "region_size = \"64KiB\"\n"
	s := newService(t, v)
	s.start()
	s.run("throttle", "db01", "--rate", "64KiB")
	s.run("start", "db01")
	s.until("db01", "under way", func(st status) bool { return st.Copied > 0 })
	dev, err := lun.Open(t.Context(), s.front("db01").URL(), lun.Options{})
	must(t, err)
	defer dev.Close()
	must(t, os.RemoveAll(s.state))
	if err := dev.WriteAt(t.Context(), make([]byte, 4096), 8*mib/512-8); err == nil {
		t.Error("a write was acknowledged though the state is gone")
	}
	s.until("db01", "degraded", func(st status) bool {
		return st.Degraded && strings.Contains(st.DegradedReason, s.state) && strings.Contains(st.DegradedReason, "removed")
	})
	s.kill()
	s.start()
	s.notServed("db01", s.state, "state is lost")
	s.kill()
}
