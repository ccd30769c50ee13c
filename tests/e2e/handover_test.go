package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/tests/peer"
)

// alike is a pair whose volume has the iqn and lun of the destination, so that initiators can be
// sent there.
func alike(t *testing.T, more string) (*pair, volume, peer.LUN) {
	t.Helper()
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 32 * mib}.make(t)
	v := p.volume("db01")
	v.iqn, v.lun, v.more = p.new.iqn, 1, more
	return p, v, peer.LUN{IQN: v.iqn, Number: v.lun, Initiator: "iqn.2026-11.net.example:host"}
}

const slotSize = 64 * kib

// writer writes slot after slot and knows what was acknowledged.
type writer struct {
	name  string
	first uint64 // slot
	write func(ctx context.Context, pattern byte, offset, length uint64) error
	last  [8]byte // acknowledged, by slot
	count atomic.Int64
}

func (w *writer) run(ctx context.Context, stop <-chan struct{}) error {
	for n := 0; ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		slot := n % len(w.last)
		pattern := byte(n%251 + 1)
		if err := w.write(ctx, pattern, (w.first+uint64(slot))*slotSize, slotSize); err != nil {
			return fmt.Errorf("%s: write %d: %w", w.name, n, err)
		}
		w.last[slot] = pattern
		w.count.Add(1)
	}
}

// on wants what was acknowledged in the file.
func (w *writer) on(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	for slot, pattern := range w.last {
		b := make([]byte, slotSize)
		_, err := f.ReadAt(b, int64((w.first+uint64(slot))*slotSize))
		must(t, err)
		if pattern != 0 && !bytes.Equal(b, bytes.Repeat([]byte{pattern}, slotSize)) {
			t.Errorf("%s: slot %d has %#02x…, not the acknowledged %#02x", w.name, slot, b[0], pattern)
		}
	}
}

// writers are two hosts with qemu-io; they write until stop is called.
func writers(t *testing.T, at peer.LUN) (all []*writer, stop func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTime)
	for i, name := range writerNames {
		at.Initiator = name
		all = append(all, &writer{name: name, first: uint64(i) * 16, write: qemuHost{shell(t, at)}.write})
	}
	end := make(chan struct{})
	var running sync.WaitGroup
	for _, w := range all {
		running.Go(func() {
			if err := w.run(ctx, end); err != nil {
				t.Error(err)
			}
		})
	}
	stop = sync.OnceFunc(func() {
		close(end)
		running.Wait()
		cancel()
	})
	t.Cleanup(stop)
	return all, stop
}

var writerNames = []string{"iqn.2026-11.net.example:one", "iqn.2026-11.net.example:two"}

// goOn waits until each has written some more.
func goOn(t *testing.T, all []*writer) {
	t.Helper()
	for _, w := range all {
		from := w.count.Load()
		for deadline := time.Now().Add(time.Minute); w.count.Load() < from+3; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s does not go on writing", w.name)
			}
		}
	}
}

// Initiators that write move to the new array by themselves, also those that were away, and
// after a restart of lunshift; nothing that was acknowledged is lost.
//
// Caught: redirect_for that counts from the reload or the restart.
func TestInitiatorsFollowACutoverToTheNewArray(t *testing.T) {
	needTools(t)
	p, v, at := alike(t, "redirect = true\n")
	s := newService(t, v)
	s.start()
	at.Portal = s.portal
	all, stop := writers(t, at)
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	goOn(t, all)
	t.Log(s.run("cutover", "db01"))
	goOn(t, all)
	names, err := p.new.Initiators(t.Context(), p.new.iqn)
	must(t, err)
	for _, name := range writerNames {
		if !slices.Contains(names, name) {
			t.Errorf("%s is not at the new array, which has %v", name, names)
		}
	}
	if st := s.status("db01"); len(st.Sessions) > 0 || st.Phase != "cutover" {
		t.Errorf("after the cutover: %+v", st)
	}
	follows := func() {
		t.Helper()
		if out, err := at.Inquiry(t.Context(), -1); err != nil || !strings.Contains(out, "IET") {
			t.Errorf("iscsi-inq: %v: %s", err, out)
		}
		if out, err := at.ReadCapacity(t.Context()); err != nil || !strings.Contains(out, fmt.Sprint(p.size)) {
			t.Errorf("iscsi-readcapacity16: %v: %s", err, out)
		}
		if out, err := peer.Run(t.Context(), "qemu-img", "info", "-f", "raw", at.URL()); err != nil || !strings.Contains(out, "32 MiB") {
			t.Errorf("qemu-img: %v: %s", err, out)
		}
		if _, err := at.QemuIO(t.Context(), peer.Write(0x77, 8*mib, slotSize), peer.Read(0x77, 8*mib, slotSize)); err != nil {
			t.Errorf("qemu-io: %v", err)
		}
	}
	follows()
	s.kill()
	s.start()
	follows()
	goOn(t, all)
	stop()
	for _, w := range all {
		w.on(t, p.destinationPath)
		t.Logf("%s: %d writes", w.name, w.count.Load())
	}

	// The time counts from the cutover, not from the start.
	var at0 struct {
		CutoverAt time.Time `json:"cutover_at"`
	}
	must(t, json.Unmarshal([]byte(s.run("status", "db01", "--json")), &at0))
	time.Sleep(time.Until(at0.CutoverAt.Add(3 * time.Second)))
	s.volumes[0].more = "redirect = true\nredirect_for = \"3s\"\n"
	s.configure()
	for _, take := range []func(){func() { s.run("reload") }, func() { s.kill(); s.start() }} {
		take()
		if _, err := at.Login(t.Context(), iscsi.ISID{9}); err == nil || !strings.Contains(err.Error(), "status 0204h") {
			t.Errorf("past redirect_for: %v", err)
		}
	}
	s.untilLog("(redirect_for)", 2)
	// It goes on past the removal of the volume, and a longer time counts again.
	s.volumes[0].more = "redirect = true\nredirect_for = \"1h\"\n"
	s.configure()
	s.run("reload")
	to := p.new.Portal()
	if text := s.run("remove", "db01"); !strings.Contains(text, "db01: removed; logins are sent to "+to) || !strings.Contains(text, " until ") {
		t.Errorf("remove says %q", text)
	}
	s.run("reload")
	if out, err := at.Inquiry(t.Context(), -1); err != nil || !strings.Contains(out, "IET") {
		t.Errorf("iscsi-inq after the removal: %v: %s", err, out)
	}
	s.volumes = []volume{files(t)} // of another name
	s.volumes[0].name = "other"
	s.configure()
	if text := s.run("reload"); !strings.Contains(text, "logins to "+at.IQN+" are not sent to "+to) {
		t.Errorf("reload without the volume says %q", text)
	}
	if _, err := at.Login(t.Context(), iscsi.ISID{9}); err == nil {
		t.Error("logins are sent on though the configuration has no volume of it")
	}
	s.stop()
}

// A session that does not log out undoes the cutover, and nothing is lost: not of its own
// writes, nor of those who left and came back. With --force it is dropped.
//
// Caught: a cutover that goes on without it.
func TestAStubbornSessionUndoesTheCutoverUnlessForced(t *testing.T) {
	needTools(t)
	p, v, at := alike(t, "redirect = true\nlogout_timeout = \"4s\"\n")
	s := newService(t, v)
	s.start()
	at.Portal = s.portal
	stubborn := at
	stubborn.Initiator = "iqn.2026-11.net.example:stubborn"
	login := func() *peer.Session {
		i, err := stubborn.Login(t.Context(), iscsi.ISID{0x80, 7})
		must(t, err)
		t.Cleanup(func() { i.Close() })
		for a := (peer.Answer{Status: 2}); a.Status != 0; {
			a, err = i.Do(make([]byte, 6), nil, 0)
			must(t, err)
		}
		return i
	}
	i := login()
	all, stop := writers(t, at)
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	// It writes all the time, and no write takes as long as the departure.
	end, ended := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		defer func() { ended <- n }()
		for {
			select {
			case <-end:
				return
			default:
			}
			began := time.Now()
			a, err := i.Do([]byte{0x2a, 0, 0, 0, 0xf0, 0, 0, 0, 1, 0}, bytes.Repeat([]byte{byte(n)}, 512), 0)
			if err != nil || a.Status != iscsi.StatusGood {
				t.Errorf("the stubborn one's write %d: %+v %v", n, a, err)
				return
			}
			if d := time.Since(began); d > 3*time.Second {
				t.Errorf("a write of the stubborn one took %v", d)
			}
			n++
		}
	}()
	for range 2 {
		s.fails(failed, []string{"still synced", "1 session did not log out within 4s", "iqn.2026-11.net.example:stubborn at 127.0.0.1:", "--force"}, "cutover", "db01")
		if st := s.status("db01"); st.Phase != "synced" {
			t.Fatalf("undone: %+v", st)
		}
		goOn(t, all)
	}
	names, err := p.new.Initiators(t.Context(), p.new.iqn)
	must(t, err)
	if slices.ContainsFunc(names, func(n string) bool { return n != "iqn.2026-11.net.example:gateway" }) {
		t.Errorf("at the new array before the cutover: %v", names)
	}

	// The service ends while initiators are asked to leave: it is synced afterwards.
	s.volumes[0].more = "redirect = true\nlogout_timeout = \"1m\"\n"
	s.configure()
	s.run("reload")
	asked := make(chan result)
	go func() { asked <- s.try("cutover", "db01") }()
	s.until("db01", "left alone with the stubborn one", func(st status) bool { return len(st.Sessions) == 1 })
	close(end)
	writes := <-ended
	s.kill()
	if r := <-asked; r.code != failed {
		t.Errorf("cutover of a service that ends: %+v", r)
	}
	s.volumes[0].more = "redirect = true\nlogout_timeout = \"1s\"\n"
	s.configure()
	s.start()
	if st := s.status("db01"); st.Phase != "synced" {
		t.Fatalf("after a kill: %+v", st)
	}
	goOn(t, all)
	i = login()
	a, err := i.Do([]byte{0x28, 0, 0, 0, 0xf0, 0, 0, 0, 1, 0}, nil, 512)
	if err != nil || !bytes.Equal(a.Data, bytes.Repeat([]byte{byte(writes - 1)}, 512)) {
		t.Errorf("the last of %d writes of the stubborn one: %v %x…", writes, err, a.Data[:min(4, len(a.Data))])
	}

	var report struct {
		Phase   string
		Dropped []struct{ Initiator, Address string } `json:"dropped_sessions"`
	}
	must(t, json.Unmarshal([]byte(s.run("cutover", "db01", "--force", "--json")), &report))
	if report.Phase != "cutover" || len(report.Dropped) != 1 || report.Dropped[0].Initiator != stubborn.Initiator || !strings.HasPrefix(report.Dropped[0].Address, "127.0.0.1:") {
		t.Errorf("forced: %+v", report)
	}
	if _, err := i.Do(make([]byte, 6), nil, 0); err == nil {
		t.Error("the stubborn session is still there")
	}
	if text := s.run("status", "db01"); !strings.Contains(text, "did not log out") {
		t.Errorf("status: %s", text)
	}
	goOn(t, all)
	stop()
	for _, w := range all {
		w.on(t, p.destinationPath)
	}
	s.stop()
}

// The initiators of a group leave together: one that stays on one volume keeps all of them,
// and once it has left all are handed over.
//
// Caught: a departure of the first volume's target alone.
func TestAGroupIsHandedOverOrNoneOfIt(t *testing.T) {
	needTools(t)
	s := newService(t)
	var pairs []*pair
	var fronts []peer.LUN
	for _, name := range []string{"a", "b"} {
		p := sides{block: 512, sourceFile: true, destinationFile: true, size: 32 * mib}.make(t)
		p.new = newArray(t, "new-"+name, peer.Unit{Path: p.destinationPath, BlockSize: 512, Thin: true})
		s.volumes = append(s.volumes, volume{name: name, iqn: p.new.iqn, lun: 1, source: p.source, destination: p.new.unit(1).URL(), more: "redirect = true\nlogout_timeout = \"1s\"\n"})
		fronts = append(fronts, peer.LUN{Portal: s.portal, IQN: p.new.iqn, Number: 1, Initiator: "iqn.2026-11.net.example:host"})
		pairs = append(pairs, p)
	}
	s.volumes[1].more += "[[group]]\nname = \"erp\"\nvolumes = [\"a\", \"b\"]\n"
	s.configure()
	s.start()
	stubborn := fronts[1]
	stubborn.Initiator = "iqn.2026-11.net.example:stubborn"
	i, err := stubborn.Login(t.Context(), iscsi.ISID{0x80, 7})
	must(t, err)
	defer i.Close()
	var all []*writer
	var stops []func()
	for _, at := range fronts {
		of, stop := writers(t, at)
		all, stops = append(all, of...), append(stops, stop)
	}
	s.run("start", "erp")
	s.run("wait", "erp", "--for", "synced", "--timeout", "60s")
	s.fails(failed, []string{"group erp", "did not log out within 1s", stubborn.Initiator}, "cutover", "erp")
	for _, v := range s.volumes {
		if phase := s.status(v.name).Phase; phase != "synced" {
			t.Fatalf("volume %s is %s after a session stayed", v.name, phase)
		}
	}
	goOn(t, all)
	must(t, i.Close())
	s.run("cutover", "erp")
	goOn(t, all)
	for _, p := range pairs {
		names, err := p.new.Initiators(t.Context(), p.new.iqn)
		must(t, err)
		for _, name := range writerNames {
			if !slices.Contains(names, name) {
				t.Errorf("%s is not at %s, which has %v", name, p.new.iqn, names)
			}
		}
	}
	for _, stop := range stops {
		stop()
	}
	for n, w := range all {
		w.on(t, pairs[n/len(writerNames)].destinationPath)
	}
	s.stop()
}
