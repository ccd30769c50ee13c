package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/iscsi"
	"lunshift/lun"
	"lunshift/state"
	"lunshift/target"
	"lunshift/tests/peer"
)

func (a *fenceArray) register(key uint64, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if name == "" {
		delete(a.registered, key)
	} else {
		a.registered[key] = name
	}
}

// TestLateRegistrationIsAFault until it is gone: who registers on a Registrants Only
// reservation writes there and gets no conflict. Who was there at the start and was accepted
// is no fault, after a restart neither, until the reservations are broken.
//
// Caught: no look at the registrations; keys that were accepted and not kept in the record.
func TestLateRegistrationIsAFault(t *testing.T) {
	r := newFencedRig(t)
	v := r.open(t)
	r.from.register(0xacc, "an accepted host")
	must(t, v.Throttle(t.Context(), 1))
	must(t, v.Start(t.Context(), StartOptions{IgnoreRegistrations: true}))
	reason := func() string { return v.Status().DegradedReason }
	calm := func(when string) {
		t.Helper()
		for range 3 {
			v.lookForOthers(t.Context())
		}
		if why := reason(); why != "" {
			t.Errorf("%s: %s", when, why)
		}
	}
	calm("accepted at the start")
	r.from.register(0xbad, "a late host")
	soon(t, "the late host is told", func() bool { return strings.Contains(reason(), "0x0000000000000bad of a late host") })
	if why := reason(); strings.Contains(why, "accepted") || !strings.Contains(why, "source") || !strings.Contains(why, "break-fence vol") {
		t.Errorf("the reason: %s", why)
	}
	r.from.register(0xbad, "")
	soon(t, "the late host is gone", func() bool { return reason() == "" })
	// Accepted on one side is not on the other.
	r.to.register(0xacc, "an accepted host")
	soon(t, "the other side", func() bool { return strings.Contains(reason(), "destination") })
	r.to.register(0xacc, "")
	soon(t, "gone there", func() bool { return reason() == "" })

	r.close(t)
	v = r.open(t)
	calm("accepted before the restart")
	broken, err := v.BreakFence(t.Context(), nil, nil)
	must(t, errors.Join(err, broken.Err()))
	r.from.register(0xacc, "an accepted host")
	soon(t, "what was broken is accepted no more", func() bool { return strings.Contains(reason(), "an accepted host") })
	r.close(t)
}

// TestHostThatRegistersLateIsNamed is the same on a tgtd, by a second initiator.
func TestHostThatRegistersLateIsNamed(t *testing.T) {
	peer.Need(t, "tgtd", "tgtadm")
	dir := t.TempDir()
	d := peer.StartTgtd(t)
	units := map[string]peer.LUN{}
	for _, side := range []string{"old", "new"} {
		path := filepath.Join(dir, side+".img")
		must(t, os.WriteFile(path, nil, 0o600))
		must(t, os.Truncate(path, 8<<20))
		iqn := "iqn.2001-04.com.example:" + side
		must(t, d.AddTarget(t.Context(), iqn, []peer.Unit{{Path: path, BlockSize: 512, Thin: true}}))
		units[side] = d.LUN(iqn, 1)
	}
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	store, err := state.Open(filepath.Join(dir, "state"), state.Options{Log: quiet()})
	must(t, err)
	cfg := Config{Name: "vol", IQN: "iqn.2026-11.net.example:vol", RegionSize: 64 << 10, CopyDepth: 1, CopyRate: 1, fenceEvery: 20 * time.Millisecond, Store: store, Log: log}
	options := lun.Options{InitiatorName: "iqn.2026-11.net.example:gw", SessionKey: "vol", Log: quiet()}
	cfg.Source, err = lun.Open(t.Context(), units["old"].URL(), options)
	must(t, err)
	cfg.Destination, err = lun.Open(t.Context(), units["new"].URL(), options)
	must(t, err)
	cfg.Target, err = target.New(target.Config{Log: quiet()})
	must(t, err)
	v, err := Open(t.Context(), cfg)
	must(t, err)
	must(t, v.Start(t.Context()))

	l := units["old"]
	l.Initiator = "iqn.2026-11.net.example:forgotten"
	host, err := l.Login(t.Context(), iscsi.ISID{0x80, 0, 0, 0, 1, 1})
	must(t, err)
	defer host.Close()
	register := func(old, key uint64) {
		t.Helper()
		list := make([]byte, 24)
		binary.BigEndian.PutUint64(list, old)
		binary.BigEndian.PutUint64(list[8:], key)
		for range 8 {
			a, err := host.Do([]byte{0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0}, list, 0)
			must(t, err)
			if a.Status == iscsi.StatusGood {
				return
			}
			if a.Key != 6 { // a unit attention
				t.Fatalf("register: %+v", a)
			}
		}
	}
	register(0, 0xcafe)
	if a, err := host.Do([]byte{0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0}, make([]byte, 512), 0); err != nil || a.Status != iscsi.StatusGood {
		t.Fatalf("a registered host could not write: %+v, %v", a, err)
	}
	reason := func() string { return v.Status().DegradedReason }
	soon(t, "the host is named", func() bool { return strings.Contains(reason(), "0x000000000000cafe") })
	if why := reason(); !strings.Contains(why, l.Initiator) && !namesNoPorts(t, cfg.Source) {
		t.Errorf("its initiator name is missing: %s", why)
	}
	rounds := v.Status().Source.Errors
	time.Sleep(5 * cfg.fenceEvery) // further rounds, which say nothing new
	if v.Status().Source.Errors != rounds {
		t.Error("the rounds fail")
	}
	register(0xcafe, 0)
	soon(t, "the host is gone", func() bool { return reason() == "" })
	must(t, v.Shutdown(t.Context()))
	must(t, errors.Join(cfg.Source.Close(), cfg.Destination.Close(), store.Close()))
	if n := strings.Count(out.String(), "0x000000000000cafe"); n != 1 {
		t.Errorf("logged %d times: %s", n, out.String())
	}
}

// namesNoPorts tells whether the device keeps to itself whose the registrations are.
func namesNoPorts(t *testing.T, dev lun.Device) bool {
	held, err := dev.(lun.Fencer).Fenced(t.Context())
	must(t, err)
	for _, r := range held.Registrants {
		if r.Port != "" {
			return false
		}
	}
	return true
}
