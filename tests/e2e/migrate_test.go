package e2e

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lunshift/tests/peer"
)

// sides says what a migration goes from and to.
type sides struct {
	name                string
	block               uint32
	sourceFile          bool // a file rather than a LUN of tgtd
	destinationFile     bool
	sourceThin          bool
	destinationThin     bool
	size, destinationBy uint64 // the destination is larger by this
}

// pair is a source and a destination with their backing files.
type pair struct {
	sides
	sourcePath, destinationPath string
	source, destination         string // addresses
	old, new                    *array
}

func (p sides) make(t *testing.T) *pair {
	t.Helper()
	dir := t.TempDir()
	r := &pair{sides: p}
	r.sourcePath = sparseFile(t, dir, "old.img", p.size, 0.4, uint64(p.block))
	r.destinationPath = emptyFile(t, dir, "new.img", p.size+p.destinationBy)
	r.source, r.destination = r.sourcePath, r.destinationPath
	if !p.sourceFile {
		r.old = newArray(t, "old", peer.Unit{Path: r.sourcePath, BlockSize: p.block, Thin: p.sourceThin})
		r.source = r.old.unit(1).URL()
	}
	if !p.destinationFile {
		r.new = newArray(t, "new", peer.Unit{Path: r.destinationPath, BlockSize: p.block, Thin: p.destinationThin})
		r.destination = r.new.unit(1).URL()
	}
	return r
}

func (p *pair) volume(name string) volume {
	return volume{name: name, source: p.source, destination: p.destination, block: p.block}
}

func TestMigrationKeepsWhatInitiatorsWrite(t *testing.T) {
	needTools(t)
	for _, p := range []sides{
		{name: "thin arrays with 512-byte blocks", block: 512, sourceThin: true, destinationThin: true, size: 96 * mib},
		{name: "thin arrays with 4096-byte blocks", block: 4096, sourceThin: true, destinationThin: true, size: 96 * mib},
		{name: "thick arrays and a larger destination", block: 512, size: 48 * mib, destinationBy: 16 * mib},
		{name: "file to thin array", block: 512, sourceFile: true, destinationThin: true, size: 48 * mib},
		{name: "thin array to file with 4096-byte blocks", block: 4096, destinationFile: true, sourceThin: true, size: 48 * mib},
		{name: "file to file", block: 512, sourceFile: true, destinationFile: true, size: 48 * mib},
	} {
		t.Run(p.name, func(t *testing.T) { migrate(t, p.make(t)) })
	}
}

// migrate takes one pair through a whole migration under load.
func migrate(t *testing.T, p *pair) {
	ctx := t.Context()
	m := newModel(t, p.sourcePath, p.block)
	s := newService(t, p.volume("db01"))
	s.start()
	front := s.front("db01")
	rng := rand.New(rand.NewPCG(uint64(p.block), p.size))

	// What initiators see of the unit.
	out, err := front.ReadCapacity(ctx)
	must(t, err)
	for _, want := range []string{fmt.Sprintf("LENGTH IN BYTES:%d", p.block), fmt.Sprintf("Total size:%d", p.size)} {
		if !strings.Contains(out, want) {
			t.Errorf("read capacity lacks %q:\n%s", want, out)
		}
	}
	for page, want := range map[int]string{-1: "LUNSHIFT", 0x00: "DEVICE_IDENTIFICATION", 0x80: "Unit Serial Number", 0x83: "NAA", 0xb0: "maximum unmap lba count", 0xb1: "rotation", 0xb2: "lbprz"} {
		out, err := front.Inquiry(ctx, page)
		must(t, err)
		if !strings.Contains(strings.ToLower(out), strings.ToLower(want)) {
			t.Errorf("INQUIRY page %#x lacks %q:\n%s", page, want, out)
		}
	}
	list, err := front.List(ctx)
	must(t, err)
	if !strings.Contains(list, front.IQN) || !strings.Contains(list, "Lun:0") {
		t.Errorf("list lacks the volume:\n%s", list)
	}

	// Before.
	host := shell(t, front)
	m.churn(ctx, host, rng, 0, p.size, 20)
	must(t, front.Compare(ctx, m.path))
	if st := s.status("db01"); st.Phase != "ready" || st.InitiatorWritten != 0 {
		t.Errorf("before start: %+v", st)
	}
	if n, err := peer.Allocated(p.destinationPath); err != nil || n != 0 {
		t.Errorf("the destination was touched before start: %d bytes allocated, %v", n, err)
	}
	m.sameAs(p.sourcePath)
	before := filepath.Join(t.TempDir(), "before.img")
	clone(t, p.sourcePath, before)

	// During.
	s.run("throttle", "db01", "--rate", "1MiB")
	s.run("start", "db01")
	second := shell(t, front)
	for range 8 {
		m.churn(ctx, host, rng, 0, p.size/2, 10)
		m.churn(ctx, second, rng, p.size/2, p.size, 10)
	}
	st := s.until("db01", "copying", func(st status) bool { return st.Copied > 0 })
	if st.Phase != "migrating" || st.Remaining == 0 || st.InitiatorWritten == 0 || len(st.Sessions) != 2 {
		t.Fatalf("during the copy: %+v", st)
	}
	must(t, front.Compare(ctx, m.path))
	s.run("throttle", "db01", "--rate", "0")
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")

	// After.
	m.churn(ctx, host, rng, 0, p.size, 20)
	must(t, front.Compare(ctx, m.path))
	st = s.status("db01")
	if st.Phase != "synced" || st.Remaining != 0 || st.Degraded {
		t.Errorf("after the copy: %+v", st)
	}
	if at, same := sameImages(t, before, p.sourcePath, p.size); !same {
		t.Errorf("the source was written after start, at byte %d", at)
	}
	s.run("cutover", "db01")

	// The destination alone.
	m.sameAs(p.destinationPath)
	if p.new != nil {
		must(t, p.new.unit(1).Compare(ctx, m.path))
	}
	if p.destinationThin || p.destinationFile {
		staysThin(t, p.destinationPath, m.path)
	}
	s.stop()
}

// staysThin wants about as much storage behind the unit as its content needs.
func staysThin(t *testing.T, path, content string) {
	t.Helper()
	have, err := peer.Allocated(path)
	must(t, err)
	want, err := peer.Allocated(content)
	must(t, err)
	if slack := want/20 + 2*mib; have > want+slack {
		t.Errorf("%s takes %d bytes, its content %d: it is not thin any more", filepath.Base(path), have, want)
	}
}

func TestTwoVolumesMigrateAtOnce(t *testing.T) {
	needTools(t)
	ctx := t.Context()
	dir := t.TempDir()
	var olds, news []peer.Unit
	for i := range 2 {
		olds = append(olds, peer.Unit{Path: sparseFile(t, dir, fmt.Sprintf("old%d.img", i), 32*mib, 0.4, uint64(i)), Thin: true})
		news = append(news, peer.Unit{Path: emptyFile(t, dir, fmt.Sprintf("new%d.img", i), 32*mib), Thin: true})
	}
	from, to := newArray(t, "old", olds...), newArray(t, "new", news...)
	s := newService(t,
		volume{name: "a", source: from.unit(1).URL(), destination: to.unit(1).URL(), more: "autostart = true\n"},
		volume{name: "b", source: from.unit(2).URL(), destination: to.unit(2).URL()})
	s.start()
	s.run("start", "b")
	for i, name := range []string{"a", "b"} {
		m := newModel(t, olds[i].Path, 512)
		m.churn(ctx, shell(t, s.front(name)), rand.New(rand.NewPCG(1, uint64(i))), 0, m.size, 30)
		s.run("cutover", name, "--wait")
		m.sameAs(news[i].Path)
	}
	s.stop()
}

func TestArrayThatGoesAwayInMidCopyIsWaitedFor(t *testing.T) {
	needTools(t)
	ctx := t.Context()
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 64 * mib}.make(t)
	m := newModel(t, p.sourcePath, p.block)
	s := newService(t, p.volume("db01"))
	s.start()
	s.run("throttle", "db01", "--rate", "4MiB")
	s.run("start", "db01")
	host := shell(t, s.front("db01"))
	rng := rand.New(rand.NewPCG(5, 5))
	for i, a := range []*array{p.new, p.old} {
		copied := s.status("db01").Copied
		s.until("db01", "copying", func(st status) bool { return st.Copied > copied })
		must(t, a.Kill())
		gone := make(chan error, 1)
		go func() {
			// The write waits for the array, then is done.
			_, err := host.Do(ctx, peer.Write(0x77, 16*mib, 64*kib))
			gone <- err
		}()
		s.untilLog("session lost", i+1)
		if a == p.new {
			select {
			case err := <-gone:
				t.Fatalf("a write ended without the destination: %v", err)
			default:
			}
		}
		must(t, a.Start(ctx))
		must(t, <-gone)
		m.write(0x77, 16*mib, 64*kib)
		m.churn(ctx, host, rng, 0, p.size, 5)
	}
	// An array that hangs, then answers: nobody notices but by the time it takes.
	must(t, p.new.Stop())
	hung := make(chan error, 1)
	go func() {
		_, err := host.Do(ctx, peer.Write(0x99, 24*mib, 64*kib))
		hung <- err
	}()
	select {
	case err := <-hung:
		t.Errorf("a write ended while the destination hung: %v", err)
		hung <- err
	case <-time.After(300 * time.Millisecond):
	}
	must(t, p.new.Continue())
	must(t, <-hung)
	m.write(0x99, 24*mib, 64*kib)
	s.until("db01", "migrating with both arrays", func(st status) bool {
		return st.Phase == "migrating" && st.Source.State == "online" && st.Destination.State == "online"
	})
	s.run("throttle", "db01", "--rate", "0")
	s.run("cutover", "db01", "--wait")
	m.sameAs(p.destinationPath)
	s.stop()
}
