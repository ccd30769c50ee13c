package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lunshift/control"
	"lunshift/proxy"
	"lunshift/tests/peer"
)

// A block that the source cannot read fails as it would have on the old array, is shown with
// its address, and stops the cutover, through a crash as well, until somebody says that it
// may be lost; then it reads as zeroes and all others are there.
//
// Caught: a copier that takes a block with MEDIUM ERROR for one that was read; a cutover that
// gives it up without being told; a list of bad blocks that is not kept over a restart.
func TestUnreadableSourceBlockStopsTheCutoverUntilItIsAccepted(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	ctx := t.Context()
	dir := t.TempDir()
	source, destination := filepath.Join(dir, "old.img"), filepath.Join(dir, "new.img")
	before := faultyImage(7)
	must(t, os.WriteFile(source, before, 0o600))
	must(t, peer.EmptyFile(destination, faultySize))
	array := newArray(t, "old", peer.Unit{Path: source, Thin: true})
	v := &faultyVolume{t: t, name: "db01", o: peer.NewOracle(before, 512), portal: peer.NewFaultyPortal(t, array.Portal())}
	unit := array.unit(1)
	unit.Portal = v.portal.Portal()
	s := newService(t, volume{name: v.name, source: unit.URL(), destination: destination, more: "region_size = \"64KiB\"\n"})
	s.start()
	v.s, v.client = s, control.NewClient(filepath.Join(s.dir, "control.sock"))
	v.portal.Begin(peer.BadBlock, badLBA)
	s.run("start", v.name)

	known := func(when string) {
		t.Helper()
		s.until(v.name, "all else copied "+when, func(st status) bool { return st.Phase == "migrating" && st.Remaining == 512 })
		var st struct {
			Bytes    uint64           `json:"unreadable_bytes"`
			Runs     []proxy.BlockRun `json:"unreadable"`
			Accepted uint64           `json:"accepted_unreadable_bytes"`
		}
		must(t, json.Unmarshal([]byte(s.run("status", v.name, "--json")), &st))
		if st.Bytes != 512 || len(st.Runs) != 1 || st.Runs[0] != (proxy.BlockRun{LBA: badLBA, Blocks: 1}) || st.Accepted != 0 {
			t.Errorf("%s: %+v", when, st)
		}
		if text := s.run("status", v.name); !strings.Contains(text, "8000") {
			t.Errorf("%s: status does not tell the block:\n%s", when, text)
		}
		s.fails(wrongPhase, []string{"512 bytes", "--accept-unreadable"}, "cutover", v.name)
		h := v.dial("host")
		defer h.Close()
		p := make([]byte, 512)
		if err := h.Send(ctx, peer.OpRead16, 0, badLBA, 1, nil, p); !badBlock(err) {
			t.Errorf("%s: a read of the block: %v", when, err)
		}
		p = make([]byte, badLBA*512/64)
		for at := uint64(0); at < badLBA; at += badLBA / 64 {
			must(t, h.Send(ctx, peer.OpRead16, 0, at, badLBA/64, nil, p))
			if wrong := v.o.Check(p, at, false, 8); len(wrong) > 0 {
				t.Errorf("%s: %v", when, wrong)
			}
		}
	}
	known("at first")
	s.run("pause", v.name) // so that it is the record that is shown
	s.kill()
	s.start()
	known("after a crash")
	s.run("resume", v.name)

	// What initiators write meanwhile stays.
	h := v.dial("writer")
	c := v.newClient(0, 0, beyond)
	load, stop := context.WithCancel(ctx)
	time.AfterFunc(300*time.Millisecond, stop)
	c.Pace, c.Rand = 0, rand.New(rand.NewPCG(1, 1))
	c.Run(ctx, load, h)
	h.Close()
	if list := v.findings.List(); len(list) > 0 || v.acks.Load() == 0 {
		t.Errorf("%d changes acknowledged, wrong: %v", v.acks.Load(), list)
	}

	s.run("cutover", v.name, "--accept-unreadable")
	if st, err := v.client.Status(ctx, v.name); err != nil || st.Phase != proxy.Cutover || st.AcceptedUnreadable != 512 {
		t.Errorf("after the cutover: %v, %+v", err, st)
	}
	after, err := os.ReadFile(destination)
	must(t, err)
	bad := after[badLBA*512 : (badLBA+1)*512]
	if !peer.Zero(bad) {
		t.Errorf("the block that was given up holds %s", v.o.Describe(bad, badLBA))
	}
	copy(bad, before[badLBA*512:]) // for the comparison of all others
	if wrong := v.o.Check(after, 0, false, 16); len(wrong) > 0 {
		t.Errorf("the destination is wrong:\n%s", strings.Join(wrong, "\n"))
	}
	if have, err := os.ReadFile(source); err != nil || !bytes.Equal(have, before) {
		t.Errorf("the source was written: %v", err)
	}
}
