package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/state"
	"lunshift/target"
)

// labelled is a device with an identity.
type labelled struct {
	*luntest.Memory
	id *lun.Identity
}

func (d labelled) Info() lun.Info {
	i := d.Memory.Info()
	i.Identity = d.id
	return i
}

// swapping is a device that compares and writes in one step.
type swapping struct {
	labelled
	one sync.Mutex
}

// Swap implements lun.Swapper.
func (d *swapping) Swap(ctx context.Context, start lun.LBA, is, becomes []byte) (bool, error) {
	d.one.Lock()
	defer d.one.Unlock()
	has := make([]byte, len(is))
	if err := d.ReadAt(ctx, has, start); err != nil || !bytes.Equal(has, is) {
		return false, err
	}
	return true, d.WriteAt(ctx, becomes, start)
}

// identityOf is an identity by a number.
func identityOf(n byte, revision string) *lun.Identity {
	naa := []byte{1, 3, 0, 8, 0x51, 2, 3, 4, 5, 6, 7, n}
	return &lun.Identity{Standard: fmt.Appendf(nil, "ACME    ARRAY           %-4s", revision), Serial: []byte{'S', n}, Designators: naa}
}

// served is a volume on a portal, and an initiator of it.
type served struct {
	t         *testing.T
	r         *rig
	cfg       Config
	v         *Volume
	hook      *logtest.Hook
	initiator *lun.Initiator
	addr      string
	stop      func()
}

// serve opens the volume as the rig's state has it.
func (s *served) serve() error {
	s.t.Helper()
	store, err := state.Open(s.r.dir, state.Options{Log: quiet()})
	must(s.t, err)
	tgt, err := target.New(target.Config{Log: quiet(), Portals: []target.Portal{{Address: "127.0.0.1:0"}}})
	must(s.t, err)
	must(s.t, tgt.Listen())
	ended := make(chan error, 1)
	go func() { ended <- tgt.Serve(context.Background()) }()
	s.cfg.Name, s.cfg.IQN, s.cfg.RegionSize, s.cfg.CopyDepth = "vol", "iqn.2026-11.net.example:vol", testRegion, copyDepth
	s.cfg.Store, s.cfg.Target = store, tgt
	var log *logrus.Logger
	log, s.hook = logtest.NewNullLogger()
	s.cfg.Log = log
	s.v, err = Open(context.Background(), s.cfg)
	s.addr = fmt.Sprintf("iscsi://%s/%s/0", tgt.Addrs()[0], s.cfg.IQN)
	stopped := false
	s.stop = func() {
		if stopped {
			return
		}
		stopped = true
		if s.v != nil {
			must(s.t, s.v.Shutdown(context.Background()))
		}
		tgt.Close()
		<-ended
		must(s.t, store.Close())
	}
	s.t.Cleanup(s.stop)
	return err
}

// finds is the identity that an initiator finds now.
func (s *served) finds() *lun.Identity {
	s.t.Helper()
	dev, err := lun.Open(s.t.Context(), s.addr, lun.Options{InitiatorName: "iqn.2026-11.net.example:host", IOTimeout: 30 * time.Second})
	must(s.t, err)
	defer dev.Close()
	return dev.Info().Identity
}

// access is the state of REPORT TARGET PORT GROUPS.
func (s *served) access() target.AccessState {
	s.t.Helper()
	a, err := lun.ParseAddress(s.addr)
	must(s.t, err)
	i, err := lun.DialInitiator(s.t.Context(), a, lun.Options{InitiatorName: "iqn.2026-11.net.example:host", IOTimeout: 30 * time.Second})
	must(s.t, err)
	defer i.Close()
	for {
		c := lun.Command{CDB: [16]byte{0: 0xa3, 1: 0x0a, 8: 1}, In: make([]byte, 256)}
		must(s.t, i.Do(s.t.Context(), &c))
		if c.Status == 2 && c.CheckSense().Key == 6 {
			continue
		}
		if c.Status != 0 || c.Received < 16 || binary.BigEndian.Uint32(c.In) != 12 {
			s.t.Fatalf("REPORT TARGET PORT GROUPS: status %02Xh, % x", c.Status, c.In[:c.Received])
		}
		return target.AccessState(c.In[4] & 0xf)
	}
}

func (s *served) expect(id *lun.Identity, access target.AccessState) {
	s.t.Helper()
	if got := s.finds(); !got.Equal(id) {
		s.t.Errorf("%s: initiators find %+v", s.v.Phase(), got)
	}
	if got := s.access(); got != access {
		s.t.Errorf("%s: initiators find %v, not %v", s.v.Phase(), got, access)
	}
	if st := s.v.Status(); st.Access != access.String() {
		s.t.Errorf("%s: status says %s", s.v.Phase(), st.Access)
	}
}

func newServed(t *testing.T, identity Identity) *served {
	r := newRig(t, 256)
	fill(t, r.source, lun.Extent{Blocks: 256}, 1)
	return &served{t: t, r: r, cfg: Config{Identity: identity, Source: labelled{r.source, identityOf(1, "1.0")}, Destination: labelled{r.destination, identityOf(2, "7")}}}
}

// Caught: the destination's identity for the source's; the source's paths no longer preferred
// after a restart in phase ready; non-optimized while migrating.
func TestVolumeIsOnePathOfTheUnitWhoseIdentityItHas(t *testing.T) {
	for identity, want := range map[Identity]struct {
		id           *lun.Identity
		ready, later target.AccessState
	}{
		IdentitySource:      {identityOf(1, "1.0"), target.ActiveNonOptimized, target.ActiveOptimized},
		IdentityDestination: {identityOf(2, "7"), target.ActiveOptimized, target.ActiveOptimized},
	} {
		t.Run(string(identity), func(t *testing.T) {
			s := newServed(t, identity)
			for range 2 { // the second time from the state
				must(t, s.serve())
				s.expect(want.id, want.ready)
				s.stop()
			}
			must(t, s.serve())
			must(t, s.v.Start(t.Context()))
			waitFor(t, s.v, Synced)
			s.expect(want.id, want.later)
			must(t, s.v.Rollback(t.Context(), RollbackOptions{}))
			waitFor(t, s.v, RolledBack)
			s.expect(want.id, access(&s.v.record))
			must(t, s.v.Start(t.Context(), StartOptions{Reuse: true}))
			s.expect(want.id, want.later)
			waitFor(t, s.v, Synced)
			s.stop()
			must(t, s.serve())
			s.expect(want.id, want.later)
			must(t, s.v.Cutover(t.Context(), CutoverOptions{}))
			after := target.ActiveOptimized
			if identity == IdentityDestination {
				after = target.Unavailable
			}
			if got := access(&s.v.record); got != after {
				t.Errorf("after the cutover: %v", got)
			}
		})
	}
}

// While hosts have the source's own paths as well, a command that compares and writes is one
// step on the array, or refused; from the start on it is the volume's, and on the destination.
// Caught: the volume's own lock for it; a source that cannot do it and is written to; the array
// asked after the start.
func TestCompareAndWriteOfASharedSourceIsTheArrays(t *testing.T) {
	ctx := t.Context()
	s := newServed(t, IdentitySource)
	source := &swapping{labelled: labelled{s.r.source, identityOf(1, "1.0")}}
	s.cfg.Source = source
	must(t, s.serve())
	one := lun.Extent{Start: 3, Blocks: 1}
	count := func(p []byte) error {
		binary.BigEndian.PutUint32(p, binary.BigEndian.Uint32(p)+1)
		return nil
	}
	must(t, s.v.WriteAt(ctx, make([]byte, testBlock), 3))
	const each = 50
	var hosts sync.WaitGroup
	for host := range 4 {
		hosts.Go(func() {
			for range each {
				var err error
				if host%2 == 0 {
					err = s.v.Update(ctx, one, count)
				} else {
					err = lun.UpdateShared(ctx, source, one, count) // by a path of the array
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	hosts.Wait()
	counted := func(d lun.Device) uint32 {
		p := make([]byte, testBlock)
		must(t, d.ReadAt(ctx, p, 3))
		return binary.BigEndian.Uint32(p)
	}
	if n := counted(s.r.source); n != 4*each {
		t.Errorf("%d of %d updates are there", n, 4*each)
	}
	no := errors.New("compared, and not equal")
	if err := s.v.Update(ctx, one, func([]byte) error { return no }); !errors.Is(err, no) {
		t.Errorf("an update that is not made: %v", err)
	}
	must(t, s.v.Start(ctx))
	waitFor(t, s.v, Synced)
	must(t, s.v.Update(ctx, one, count))
	if was, is := counted(s.r.source), counted(s.r.destination); was != 4*each || is != 4*each+1 {
		t.Errorf("after the start the source has %d and the destination %d", was, is)
	}

	s = newServed(t, IdentitySource)
	must(t, s.serve())
	writes := s.r.source.Count(luntest.Write)
	if err := s.v.Update(ctx, one, count); !errors.Is(err, lun.ErrUnsupported) || s.r.source.Count(luntest.Write) != writes {
		t.Errorf("a source that cannot compare and write: %v, %d writes", err, s.r.source.Count(luntest.Write)-writes)
	}
}

// Caught: the identity taken from the device again at the restart; from the configuration.
func TestIdentityStaysFromTheStartOfAMigrationToItsEnd(t *testing.T) {
	s := newServed(t, IdentitySource)
	must(t, s.serve())
	must(t, s.v.Start(t.Context()))
	waitFor(t, s.v, Synced)
	s.stop()

	s.cfg.Source = labelled{s.r.source, nil} // its firmware was replaced by one that says nothing
	s.cfg.Identity = IdentityDestination
	must(t, s.serve())
	s.expect(identityOf(1, "1.0"), target.ActiveOptimized)
	if st := s.v.Status(); st.Identity != IdentitySource {
		t.Errorf("status says %q", st.Identity)
	}
	found := false
	for _, e := range s.hook.AllEntries() {
		found = found || strings.Contains(e.Message, `identity = "destination" in the configuration, but the migration was started with "source"`)
	}
	if !found {
		t.Error("nobody is told that the configuration does not count")
	}
	set := s.v.set()
	set.Identity = IdentityOwn
	if err := s.v.Set(set); err == nil || !strings.Contains(err.Error(), "roll back first") {
		t.Errorf("the identity was changed in mid-migration: %v", err)
	}
	set.Identity = IdentitySource
	must(t, s.v.Set(set))
	s.expect(identityOf(1, "1.0"), target.ActiveOptimized)
}

// Caught: the identity changed at the target alone, so that a restart undoes it.
func TestIdentityCanBeChangedWhileNothingIsMoved(t *testing.T) {
	s := newServed(t, "")
	must(t, s.serve())
	own := s.finds()
	if own == nil || own.Equal(identityOf(1, "1.0")) || string(own.Standard) != "LUNSHIFTVOLUME          1   " {
		t.Fatalf("its own: %+v", own)
	}
	s.expect(own, target.ActiveOptimized)
	set := s.v.set()
	set.Identity = IdentitySource
	must(t, s.v.Set(set))
	s.expect(identityOf(1, "1.0"), target.ActiveNonOptimized)
	if st := s.v.Status(); st.Identity != IdentitySource {
		t.Errorf("status says %q", st.Identity)
	}
	record, _, err := s.cfg.Store.Record("vol")
	must(t, err)
	if record.Presented == nil || record.Presented.From != "source" {
		t.Errorf("the state has %+v", record.Presented)
	}
	set.Identity = IdentityOwn
	must(t, s.v.Set(set))
	s.expect(own, target.ActiveOptimized)
}

func TestIdentityThatADeviceDoesNotHaveIsRefused(t *testing.T) {
	s := newServed(t, IdentityDestination)
	s.cfg.Destination = s.r.destination // as a file is
	var refused *Refusal
	if err := s.serve(); !errors.As(err, &refused) || !strings.Contains(err.Error(), `volume vol: identity = "destination", but the destination has none`) {
		t.Fatalf("opened: %v", err)
	}
	s.stop()
	s.cfg.Identity = IdentitySource
	must(t, s.serve())
	set := s.v.set()
	set.Identity = IdentityDestination
	if err := s.v.Set(set); !errors.As(err, &refused) {
		t.Fatalf("set: %v", err)
	}
	s.expect(identityOf(1, "1.0"), target.ActiveNonOptimized)
}

// Caught: the record of a rebuild without the identity, so that hosts find another after it.
func TestRebuiltVolumeHasTheIdentityOfTheConfiguration(t *testing.T) {
	r := lostMigration(t)
	cfg := r.config(t)
	cfg.Identity, cfg.Source = IdentitySource, labelled{r.source, identityOf(1, "1.0")}
	_, err := Rebuild(t.Context(), cfg, AdoptOptions{Rebuild: true, Different: SideDestination, Zeroes: SideDestination}, nil)
	must(t, err)
	record, _, err := cfg.Store.Record("vol")
	must(t, err)
	if !inquired(record.Presented).Equal(identityOf(1, "1.0")) {
		t.Errorf("the state has %+v", record.Presented)
	}
}
