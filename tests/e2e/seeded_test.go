package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// A destination that has all but 1 % of the data, and data where the source has none, is
// written where it differs and nowhere else, while initiators write; every block is right in
// the end, by what each was acknowledged.
//
// Caught: the setting not handed to the copier (all is written); holes of the source taken for
// zero on a destination that does not tell; the comparison forgotten by the restart.
func TestASeededDestinationIsWrittenWhereItDiffers(t *testing.T) {
	needTools(t)
	for _, p := range []struct {
		sides
		kill bool
	}{
		{sides: sides{name: "thin arrays", block: 512, sourceThin: true, destinationThin: true, size: 48 * mib}},
		{sides: sides{name: "thick destination with 4096-byte blocks and a kill", block: 4096, sourceThin: true, size: 48 * mib}, kill: true},
	} {
		t.Run(p.name, func(t *testing.T) { seed(t, p.make(t), p.kill) })
	}
}

func seed(t *testing.T, p *pair, kill bool) {
	const clients, extent = 4, 4 * kib
	rng := rand.New(rand.NewPCG(uint64(p.block), 7))
	before, err := os.ReadFile(p.sourcePath)
	must(t, err)
	f, err := os.OpenFile(p.destinationPath, os.O_RDWR, 0) // tgtd has it open
	must(t, err)
	defer f.Close()
	for at := uint64(0); at < p.size; at += 64 * kib {
		if chunk := before[at : at+64*kib]; !peer.Zero(chunk) {
			_, err := f.WriteAt(chunk, int64(at))
			must(t, err)
		}
	}
	// Initiators write to the first quarter only, so that it is known what the copy must write.
	quarter := p.size / 4
	var least, most uint64 // of data
	for _, i := range rng.Perm(int(p.size / extent))[:p.size/extent/100] {
		at := uint64(i) * extent
		old := make([]byte, extent)
		peer.Stamp(old, 512, at/512, 99, 1)
		_, err := f.WriteAt(old, int64(at))
		must(t, err)
		if peer.Zero(before[at : at+extent]) {
			continue
		}
		if most += extent; at >= quarter {
			least += extent
		}
	}

	v := p.volume("db01")
	v.more = "seeded = true\nregion_size = \"256KiB\"\n"
	s := newService(t, v)
	s.http = peer.FreePort(t)
	s.configure()
	s.start()
	s.run("adopt", "db01", "--new")
	s.run("throttle", "db01", "--rate", "8MiB")
	s.run("start", "db01")

	o := peer.NewOracle(before, int(p.block))
	var findings peer.Findings
	var acks, reads atomic.Int64
	work := func(until func()) {
		ctx, leave := context.WithCancel(t.Context()) // gives up what is under way
		defer leave()
		load, stop := context.WithCancel(ctx)
		defer stop()
		var running sync.WaitGroup
		share := quarter / uint64(p.block) / clients
		for i := range clients {
			c := &peer.Client{ID: i, Oracle: o, From: uint64(i) * share, Blocks: share, Region: 64 * kib,
				Rand: rand.New(rand.NewPCG(rng.Uint64(), uint64(i))), Findings: &findings, Acks: &acks, Reads: &reads, Pace: time.Millisecond}
			h := seedHost(t, s, i)
			running.Go(func() {
				defer h.Close()
				c.Run(ctx, load, h)
			})
		}
		until()
		stop()
		if s.cmd == nil {
			leave()
		}
		running.Wait()
	}
	work(func() {
		s.until("db01", "comparing", func(st status) bool { return st.Equal > p.size/10 && acks.Load() > 50 })
		if kill {
			s.kill()
		}
	})
	if kill {
		s.start()
	}
	work(func() {
		s.run("throttle", "db01", "--rate", "0")
		s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
	})
	st := s.status("db01")
	t.Logf("%d bytes of %d differ: compared %d, equal %d, written %d, skipped %d; %d writes acknowledged",
		most, p.size, st.Compared, st.Equal, st.Copied, st.Skipped, acks.Load())
	if !st.Compare || st.Copied > most || !kill && st.Copied < least || st.Equal > st.Compared || st.Compared < st.Copied {
		t.Errorf("want from %d to %d bytes written: %+v", least, most, st)
	}
	if !p.destinationThin && st.Equal < (p.size-quarter)/100*95 {
		t.Errorf("%d bytes are equal", st.Equal)
	}
	if text := s.run("status", "db01"); !strings.Contains(text, "compared") || !strings.Contains(text, "equal") {
		t.Errorf("status does not show the comparison:\n%s", text)
	}
	scraped, err := http.Get("http://" + s.http + "/metrics")
	must(t, err)
	text, err := io.ReadAll(scraped.Body)
	scraped.Body.Close()
	must(t, err)
	for _, name := range []string{"compared", "equal"} {
		if !strings.Contains(string(text), fmt.Sprintf("\nlunshift_volume_%s_bytes_total{volume=\"db01\"} ", name)) {
			t.Errorf("the metrics lack %s", name)
		}
	}

	h := seedHost(t, s, 0)
	_, wrong, err := o.ReadBack(t.Context(), h, false)
	must(t, err)
	h.Close()
	s.run("cutover", "db01")
	after, err := os.ReadFile(p.destinationPath)
	must(t, err)
	wrong = append(wrong, o.Check(after, 0, false, 16)...)
	if list := append(findings.List(), wrong...); len(list) > 0 {
		t.Errorf("%d faults:\n%s", len(list), strings.Join(list, "\n"))
	}
	if at, same := sameBytes(before, p.sourcePath); !same {
		t.Errorf("the source was written, at byte %d", at)
	}
	s.stop()
}

func seedHost(t *testing.T, s *service, i int) peer.Host {
	t.Helper()
	front := s.front("db01")
	addr, err := lun.ParseAddress(front.URL())
	must(t, err)
	h, err := lun.DialInitiator(t.Context(), addr, lun.Options{InitiatorName: fmt.Sprintf("%s%d", front.Initiator, i), IOTimeout: time.Minute, LoginTimeout: time.Minute, PingInterval: time.Minute})
	must(t, err)
	return peer.Host{Initiator: h}
}

// After a cutover the old array is brought up to date by another migration, from the new array
// to the old one, which compares.
//
// Caught: --reuse without effect (start is refused); its comparison (all is written).
func TestTheWayBackAfterACutoverReusesTheOldArray(t *testing.T) {
	needTools(t)
	ctx := t.Context()
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 32 * mib}.make(t)
	m := newModel(t, p.sourcePath, p.block)
	rng := rand.New(rand.NewPCG(3, 3))
	s := newService(t, p.volume("db01"))
	s.start()
	s.run("start", "db01")
	s.run("wait", "db01", "--for", "synced")
	if st := s.status("db01"); st.Compare || st.Compared != 0 || st.Equal != 0 {
		t.Errorf("a plain copy: %+v", st)
	}
	m.churn(ctx, shell(t, s.front("db01")), rng, 0, 4*mib, 20)
	s.run("cutover", "db01")
	m.sameAs(p.destinationPath)
	s.run("remove", "db01")

	s.volumes = []volume{{name: "back", source: p.destination, destination: p.source}}
	s.configure()
	s.fails(failed, []string{"could not be taken up"}, "reload")
	s.fails(failed, []string{"not blank", "adopt back --new"}, "start", "back")
	s.run("adopt", "back", "--new")
	s.fails(failed, []string{"not blank", "--reuse"}, "start", "back")
	s.run("throttle", "back", "--rate", "4MiB")
	s.run("start", "back", "--reuse")
	m.churn(ctx, shell(t, s.front("back")), rng, 0, 4*mib, 20)
	s.run("throttle", "back", "--rate", "0")
	s.run("wait", "back", "--for", "synced", "--timeout", "60s")
	if st := s.status("back"); !st.Compare || st.Copied > 4*mib || st.Equal < 8*mib {
		t.Errorf("the way back: %+v", st)
	}
	s.run("cutover", "back")
	m.sameAs(p.sourcePath)
	s.stop()
}
