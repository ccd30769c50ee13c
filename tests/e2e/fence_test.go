package e2e

import (
	"bytes"
	bigendian "encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/tests/peer"
)

// direct is a session with an array's unit past its unit attentions, of a host that goes
// round lunshift.
func direct(t *testing.T, a *array, n byte) *peer.Session {
	t.Helper()
	i, err := a.unit(1).Login(t.Context(), iscsi.ISID{0x80, 0, 0, 0, 1, n})
	must(t, err)
	t.Cleanup(func() { i.Close() })
	for range 8 {
		r, err := i.Do(make([]byte, 6), nil, 0)
		must(t, err)
		if r.Status == iscsi.StatusGood {
			return i
		}
	}
	t.Fatal("the unit is not ready")
	return nil
}

// lastBlock is the address of a block that the tests' initiators leave alone, in 512 bytes.
const lastBlock = 8*mib/512 - 1

// goesRound is the status of a write to the unit's last block by a host that goes round
// lunshift.
func goesRound(t *testing.T, i *peer.Session) byte {
	t.Helper()
	for range 8 {
		r, err := i.Do([]byte{0x2a, 0, 0, 0, lastBlock >> 8, lastBlock & 0xff, 0, 0, 1, 0}, make([]byte, 512), 0)
		must(t, err)
		if r.Status != iscsi.StatusCheckCondition || r.Key != 6 {
			return r.Status
		}
	}
	t.Fatal("unit attentions without end")
	return 0
}

const (
	written  = byte(iscsi.StatusGood)
	conflict = byte(iscsi.StatusReservationConflict)
)

// fencedPair are two arrays and their volume.
func fencedPair(t *testing.T) *pair {
	t.Helper()
	needTools(t)
	return sides{block: 512, sourceThin: true, destinationThin: true, size: 8 * mib}.make(t)
}

func (s *service) logLacks(words string) {
	s.t.Helper()
	b, err := os.ReadFile(s.log.Name())
	must(s.t, err)
	if bytes.Contains(b, []byte(words)) {
		s.t.Errorf("the log says %q", words)
	}
}

// TestForgottenHostGetsAConflict: who still has the old LUN, or has the new one already,
// writes to neither from the start to the cutover, also while lunshift is down or its
// array restarts; it may read. Caught: no fence; a fence that is not taken when the
// service comes back; one that stays after the cutover.
func TestForgottenHostGetsAConflict(t *testing.T) {
	p := fencedPair(t)
	m := newModel(t, p.sourcePath, 512)
	s := newService(t, p.volume("db01"))
	s.start()
	rng := rand.New(rand.NewPCG(1, 2))
	wants := func(when string, want byte) {
		t.Helper()
		for n, a := range []*array{p.old, p.new} {
			host := direct(t, a, byte(n))
			if got := goesRound(t, host); got != want {
				t.Errorf("%s: a write to %s: status %02Xh, want %02Xh", when, a.iqn, got, want)
			}
			if r, err := host.Do([]byte{0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0}, nil, 512); err != nil || r.Status != iscsi.StatusGood {
				t.Errorf("%s: a read of %s: %+v, %v", when, a.iqn, r, err)
			}
		}
	}
	r := direct(t, p.old, 9)
	if got := goesRound(t, r); got != written {
		t.Errorf("ready: status %02Xh", got)
	}
	m.write(0, lastBlock*512, 512)
	s.run("throttle", "db01", "--rate", "1MiB")
	s.run("start", "db01")
	wants("migrating", conflict)
	// A tool of somebody else means the same.
	if out, err := p.old.unit(1).QemuIO(t.Context(), peer.Write(0x77, 0, 4096)); err == nil {
		t.Errorf("qemu-io wrote to the old LUN: %s", out)
	}
	m.churn(t.Context(), shell(t, s.front("db01")), rng, 0, 7*mib, 20)
	s.kill()
	wants("killed", conflict)
	s.start()
	wants("back again", conflict)
	must(t, p.new.Kill())
	must(t, p.new.Start(t.Context()))
	sh := shell(t, s.front("db01"))
	m.churn(t.Context(), sh, rng, 0, 7*mib, 20) // waits for the array
	wants("after the array's restart", conflict)
	s.run("throttle", "db01", "--rate", "0")
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	wants("synced", conflict)
	s.stop()
	wants("stopped", conflict)
	s.start()
	s.run("cutover", "db01")
	wants("cut over", written)
	s.stop()
	m.sameAs(p.destinationPath)
}

// TestSecondServiceOnOnePairIsRefused: two services with the same initiator name on one
// pair of LUNs. The one that starts first goes on as if the other were not there. Caught:
// sessions that are named by the volume alone; a start without a fence.
func TestSecondServiceOnOnePairIsRefused(t *testing.T) {
	p := fencedPair(t)
	m := newModel(t, p.sourcePath, 512)
	first, second := newService(t, p.volume("db01")), newService(t, p.volume("db01"))
	first.start()
	second.start()
	rng := rand.New(rand.NewPCG(3, 4))
	sh := shell(t, first.front("db01"))
	churn := func(n int) { t.Helper(); m.churn(t.Context(), sh, rng, 0, 8*mib, n) }
	churn(10)
	first.run("throttle", "db01", "--rate", "1MiB")
	first.run("start", "db01")
	churn(10)

	second.fails(failed, []string{"db01", "source", p.source, "Registrants Only", "another lunshift", "lunshift break-fence db01"}, "start", "db01")
	if st := second.status("db01"); st.Phase != "ready" {
		t.Errorf("refused, and yet in phase %s", st.Phase)
	}
	// Nothing that its initiators write reaches the old LUN any more.
	if out, err := second.front("db01").QemuIO(t.Context(), peer.Write(0x66, 0, 4096)); err == nil {
		t.Errorf("an initiator wrote through the second service: %s", out)
	}
	if r := second.try("check"); r.code != failed || !strings.Contains(r.stdout+r.stderr, "another lunshift") {
		t.Errorf("check of the second: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	churn(10)
	second.stop()

	// Opened on LUNs that are fenced already.
	second.start()
	if st := second.status("db01"); !st.Degraded || !strings.Contains(st.DegradedReason, "another lunshift") {
		t.Errorf("the second, begun again: %+v", st)
	}
	second.fails(failed, []string{"db01", "not served"}, "start", "db01")
	second.stop()
	// One that never saw the pair: what lies on the destination is reason enough.
	third := newService(t, p.volume("db01"))
	third.start()
	third.fails(failed, []string{"db01", "not served"}, "start", "db01")
	third.stop()
	if r := third.try("check"); r.code != failed || !strings.Contains(r.stdout+r.stderr, "another lunshift") {
		t.Errorf("check of the third: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	churn(10)

	first.run("throttle", "db01", "--rate", "0")
	first.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	churn(10)
	if st := first.status("db01"); st.Degraded {
		t.Errorf("the first suffered: %+v", st)
	}
	first.run("cutover", "db01")
	first.logLacks("iSCSI session lost")
	first.stop()
	m.sameAs(p.destinationPath)
}

// The reservations of a state that is lost are there while the destination still looks blank.
// Caught: the service did not start, and break-fence needs it; a reload that drops what cannot
// be opened for a reservation.
func TestFencesOfALostStateCanBeBroken(t *testing.T) {
	t.Run("at the start of the service", func(t *testing.T) { breakLost(t, false) })
	t.Run("at a reload", func(t *testing.T) { breakLost(t, true) })
}

func breakLost(t *testing.T, reloaded bool) {
	p := fencedPair(t)
	s := newService(t, p.volume("db01"))
	const registrantsOnly, key = 5, 0x6c756e0000000001 // Write Exclusive; the key of a lunshift
	for n, a := range []*array{p.old, p.new} {
		i := direct(t, a, byte(n+20))
		reserveOut(t, i, register, 0, 0, key, 0)
		reserveOut(t, i, reserve, registrantsOnly, key, 0, 0)
	}
	if reloaded {
		// A reload takes the volume up as a start of the service does: without it in the
		// service there is no break-fence.
		all := s.volumes
		s.volumes = []volume{files(t)}
		s.volumes[0].name = "other"
		s.configure()
		s.start()
		s.volumes = append(s.volumes, all...)
		s.configure()
		s.fails(failed, []string{"could not be taken up"}, "reload")
	} else {
		s.start()
	}
	s.fails(failed, []string{"db01", "not served"}, "start", "db01")
	s.run("break-fence", "db01", "--yes")
	for deadline := time.Now().Add(time.Minute); s.try("start", "db01").code != 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the volume is not served though nobody holds its units any more")
		}
	}
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	s.stop()
}

// TestBreakFenceTakesOverFromAServiceThatIsGone, and the service that comes back after all
// is kept out.
func TestBreakFenceTakesOverFromAServiceThatIsGone(t *testing.T) {
	p := fencedPair(t)
	v := p.volume("db01")
	v.more = "overwrite = true\n"
	first, second := newService(t, v), newService(t, v)
	first.start()
	second.start()
	first.run("throttle", "db01", "--rate", "1MiB")
	first.run("start", "db01")
	first.kill()
	second.fails(failed, []string{"another lunshift", "break-fence"}, "start", "db01")
	second.fails(usage, []string{"db01", "--yes"}, "break-fence", "db01")
	second.fails(failed, []string{"another lunshift", "break-fence"}, "start", "db01")
	if out := second.run("break-fence", "db01", "--yes"); !strings.Contains(out, "db01: source free") || !strings.Contains(out, "db01: destination free") {
		t.Errorf("break-fence: %s", out)
	}
	second.run("throttle", "db01", "--rate", "1MiB")
	second.run("start", "db01")
	if out := second.run("break-fence", "db01", "--yes"); !strings.Contains(out, "source reserved by this volume") {
		t.Errorf("break-fence while it is held: %s", out)
	}

	first.start()
	if st := first.status("db01"); st.Phase != "migrating" || !strings.Contains(st.DegradedReason, "another lunshift") {
		t.Errorf("the first, back again: %+v", st)
	}
	// A volume that is not served can be taken back as well, and is served with the answer;
	// then the other loses it.
	if out := first.run("break-fence", "db01", "--yes"); !strings.Contains(out, "source reserved by this volume") || !strings.Contains(out, "destination reserved by this volume") {
		t.Errorf("break-fence of a migrating volume that is not served: %s", out)
	}
	if st := first.status("db01"); st.Degraded {
		t.Errorf("broken, and not served with the answer: %+v", st)
	}
	first.stop()
	second.run("throttle", "db01", "--rate", "0")
	second.until("db01", "kept out", func(st status) bool { return strings.Contains(st.DegradedReason, "another lunshift") })
	if out := second.run("break-fence", "db01", "--yes"); !strings.Contains(out, "destination reserved by this volume") {
		t.Errorf("break-fence of what was lost: %s", out)
	}
	second.until("db01", "fenced again", func(st status) bool { return !st.Degraded })
	second.run("cutover", "db01", "--wait", "--timeout", "60s")
	second.stop()
	if at, same := sameImages(t, p.sourcePath, p.destinationPath, p.size); !same {
		t.Errorf("wrong content at byte %d", at)
	}
}

// TestBreakFenceReportsBothSides where one array is gone: what can be broken is broken, held
// at once where the volume is migrating though it cannot be served, and both are told.
//
// Caught: a failure on one side as the whole answer; the source left free for whoever comes.
func TestBreakFenceReportsBothSides(t *testing.T) {
	p := fencedPair(t)
	s := newService(t, p.volume("db01"))
	s.start()
	s.run("throttle", "db01", "--rate", "1MiB")
	s.run("start", "db01")
	s.kill()
	const key, registrantsOnly, preempt, readReservation = 0xcafe, 5, 4, 1
	host := direct(t, p.old, 1)
	held, err := host.Do([]byte{0x5e, readReservation, 0, 0, 0, 0, 0, 0, 24, 0}, nil, 24)
	must(t, err)
	reserveOut(t, host, register, 0, 0, key, 0)
	reserveOut(t, host, preempt, registrantsOnly, key, bigendian.BigEndian.Uint64(held.Data[8:]), 0)
	if got := goesRound(t, host); got != written {
		t.Fatalf("who took the source: status %02Xh", got)
	}
	must(t, p.new.Kill())
	s.start()
	s.notServed("db01")
	r := s.try("break-fence", "db01", "--yes")
	if r.code != failed || !strings.Contains(r.stdout, "db01: source reserved by this volume") || !strings.Contains(r.stdout, "db01: destination could not be reached") {
		t.Errorf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	s.oneLine(r.stderr, []string{"db01", "destination", "again"}, "break-fence")
	if got := goesRound(t, host); got != conflict {
		t.Errorf("broken, and he writes to the source: status %02Xh", got)
	}
	s.untilLog("takes the reservations and registrations of others away", 1)
	s.untilLog("source reserved by this volume", 1)
	s.logLacks("was refused")
	var report struct {
		Source, Destination struct {
			Broken bool
			Error  string
		}
	}
	r = s.try("break-fence", "db01", "--yes", "--json")
	must(t, json.Unmarshal([]byte(r.stdout), &report))
	if r.code != failed || !report.Source.Broken || report.Destination.Broken || report.Destination.Error == "" {
		t.Errorf("exit code %d: %s", r.code, r.stdout)
	}
	must(t, p.new.Start(t.Context()))
	if out := s.run("break-fence", "db01", "--yes"); !strings.Contains(out, "destination reserved by this volume") {
		t.Errorf("the array is back: %s", out)
	}
	s.run("throttle", "db01", "--rate", "0")
	s.run("cutover", "db01", "--wait", "--timeout", "60s")
	s.stop()
}

// TestRegisteredHostsKeepAStartBack until it is told to ignore them.
func TestRegisteredHostsKeepAStartBack(t *testing.T) {
	p := fencedPair(t)
	s := newService(t, p.volume("db01"))
	host := direct(t, p.old, 1)
	reserveOut(t, host, register, 0, 0, 0xcafe, 0)
	r := s.try("check", "--json")
	if r.code != failed || !strings.Contains(r.stderr, "0x000000000000cafe") && !strings.Contains(r.stdout, "0x000000000000cafe") {
		t.Errorf("check: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
	var report struct {
		Volumes []struct {
			Source, Destination struct {
				Fence struct {
					Means  string
					Others []struct{ Key string }
				}
			}
		}
	}
	must(t, json.Unmarshal([]byte(r.stdout), &report))
	if f := report.Volumes[0].Source.Fence; f.Means != "reservations" || len(f.Others) != 1 || f.Others[0].Key != "0x000000000000cafe" {
		t.Errorf("check --json: %+v", report)
	}
	s.start()
	s.fails(failed, []string{"db01", "source", "0x000000000000cafe", "--ignore-registrations"}, "start", "db01")
	reserveOut(t, host, reserve, exclusiveAccess, 0xcafe, 0, 0)
	s.fails(failed, []string{"db01", "source", "0x000000000000cafe", "break-fence"}, "start", "db01", "--ignore-registrations")
	const release = 2
	reserveOut(t, host, release, exclusiveAccess, 0xcafe, 0, 0)
	if got := goesRound(t, direct(t, p.new, 2)); got != written {
		t.Errorf("a start that was refused holds the destination: status %02Xh", got)
	}
	s.run("start", "db01", "--ignore-registrations")
	if got := goesRound(t, host); got != written {
		t.Errorf("who is registered: status %02Xh", got)
	}
	s.stop()
}

// TestFencesOfACutoverThatWasCutShortAreGivenUp: the service is killed when the cutover is
// recorded and the old array, which does not answer, still fenced. Caught: an Open that
// gives up nothing after the cutover.
func TestFencesOfACutoverThatWasCutShortAreGivenUp(t *testing.T) {
	p := fencedPair(t)
	s := newService(t, p.volume("db01"))
	s.start()
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	must(t, p.old.Stop())
	ended := make(chan result, 1)
	go func() { ended <- s.try("cutover", "db01", "--no-verify") }()
	s.untilLog("phase cutover", 1)
	s.kill()
	<-ended
	must(t, p.old.Continue())
	if got := goesRound(t, direct(t, p.old, 1)); got != conflict {
		t.Errorf("killed: a write to the old LUN: status %02Xh", got)
	}
	s.start()
	for n, a := range []*array{p.old, p.new} {
		if got := goesRound(t, direct(t, a, byte(2+n))); got != written {
			t.Errorf("back again: a write to %s: status %02Xh", a.iqn, got)
		}
	}
	if st := s.status("db01"); st.Phase != "cutover" || st.Degraded {
		t.Errorf("back again: %+v", st)
	}
	s.stop()
}

func TestCheckDoesNotWarnOfFilesWhichAreLocked(t *testing.T) {
	s := newService(t, files(t))
	if r := s.try("check"); r.code != done || strings.Contains(r.stdout+r.stderr, "no persistent reservations") {
		t.Errorf("files are locked: exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
}
