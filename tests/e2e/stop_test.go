package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/lun"
	"lunshift/tests/peer"
)

// burden is a load of writes on a volume from sessions of its own, and what its blocks may hold
// then.
type burden struct {
	t       *testing.T
	oracle  *peer.Oracle
	wrong   peer.Findings
	acks    atomic.Int64
	clients []*peer.Client
	stop    context.CancelFunc
	cancel  context.CancelFunc
	all     sync.WaitGroup
}

// begin has clients write to all of the volume, which held before.
func newBurden(t *testing.T, before []byte) *burden {
	b := &burden{t: t, oracle: peer.NewOracle(before, 512)}
	const clients = 6
	share := uint64(len(b.oracle.Cells)) / clients
	for i := range clients {
		b.clients = append(b.clients, &peer.Client{ID: i, Oracle: b.oracle, From: uint64(i) * share, Blocks: share, Region: mib,
			Rand: rand.New(rand.NewPCG(uint64(i), 4)), Findings: &b.wrong, Acks: &b.acks, Reads: new(atomic.Int64)})
	}
	return b
}

func (b *burden) begin(s *service) {
	ctx, cancel := context.WithCancel(b.t.Context())
	load, stop := context.WithCancel(ctx)
	b.stop, b.cancel = stop, cancel
	for _, c := range b.clients {
		dev := b.host(s, fmt.Sprintf("iqn.2026-11.net.example:host%d", c.ID%2))
		b.all.Go(func() {
			defer dev.Close()
			c.Run(ctx, load, peer.Host{Initiator: dev})
		})
	}
}

func (b *burden) host(s *service, name string) *lun.Initiator {
	b.t.Helper()
	address, err := lun.ParseAddress("iscsi://" + s.portal + "/" + frontIQN("vol") + "/0")
	must(b.t, err)
	dev, err := lun.DialInitiator(b.t.Context(), address, lun.Options{InitiatorName: name, IOTimeout: time.Minute})
	must(b.t, err)
	return dev
}

// end gives up what is not answered.
func (b *burden) end() {
	b.stop()
	b.cancel()
	b.all.Wait()
}

// rightIn reads every block back through the service.
func (b *burden) rightIn(s *service) {
	b.t.Helper()
	dev := b.host(s, "iqn.2026-11.net.example:reader")
	defer dev.Close()
	blocks, wrong, err := b.oracle.ReadBack(b.t.Context(), peer.Host{Initiator: dev}, false)
	must(b.t, err)
	for _, w := range append(wrong, b.wrong.List()...) {
		b.t.Error(w)
	}
	b.t.Logf("%d acknowledged changes, %d blocks read back", b.acks.Load(), blocks)
}

// stopping is a volume that migrates from one tgtd to another under load.
func stopping(t *testing.T, timeout, copyRate string, env ...string) (s *service, b *burden, source, destination *array) {
	needTools(t)
	dir := t.TempDir()
	const size = 24 * mib
	old := sparseFile(t, dir, "old", size, 0.5, 3)
	before, err := os.ReadFile(old)
	must(t, err)
	source = newArray(t, "old", peer.Unit{Path: old, Thin: true})
	destination = newArray(t, "new", peer.Unit{Path: emptyFile(t, dir, "new", size), Thin: true})
	s = newService(t, volume{name: "vol", source: source.unit(1).URL(), destination: destination.unit(1).URL(), more: "copy = { rate = \"" + copyRate + "\" }\n"})
	s.env = env
	s.more = "shutdown_timeout = \"" + timeout + "\"\n"
	s.configure()
	s.start()
	s.run("start", "vol")
	b = newBurden(t, before)
	b.begin(s)
	for deadline := time.Now().Add(30 * time.Second); b.acks.Load() < 200; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the load does not begin")
		}
	}
	return s, b, source, destination
}

// ends waits for the process and gives its exit code and how long that took.
func (s *service) ends(limit time.Duration) (code int, took time.Duration) {
	s.t.Helper()
	began := time.Now()
	select {
	case <-s.exited:
		code = s.cmd.ProcessState.ExitCode()
		s.cmd = nil
	case <-time.After(limit):
		s.t.Errorf("lunshift serve does not end within %v", limit)
		s.kill()
	}
	return code, time.Since(began)
}

// Caught at the first run each: with commands dropped at once rather than drained the write is
// not acknowledged; with units not closed no Logout is seen.
func TestStopEndsCommandsInFlightAndLogsOutOfTheArrays(t *testing.T) {
	needTools(t)
	dir := t.TempDir()
	const size = 4 * mib
	arrays := [2]*array{
		newArray(t, "old", peer.Unit{Path: sparseFile(t, dir, "old", size, 0.5, 3)}),
		newArray(t, "new", peer.Unit{Path: emptyFile(t, dir, "new", size)}),
	}
	var recorders [2]*peer.Recorder
	var urls [2]string
	slow := peer.NewFaultyPortal(t, arrays[1].Portal())
	for i, behind := range []string{arrays[0].Portal(), slow.Portal()} {
		var err error
		recorders[i], err = peer.NewRecorder("127.0.0.1:0", behind, 64*mib)
		must(t, err)
		l := arrays[i].unit(1)
		l.Portal = recorders[i].Portal()
		urls[i] = l.URL()
	}
	s := newService(t, volume{name: "vol", source: urls[0], destination: urls[1]})
	s.start()
	s.run("start", "vol")
	s.run("wait", "vol", "--for", "synced", "--timeout", "1m")
	dev, err := lun.Open(t.Context(), "iscsi://"+s.portal+"/"+frontIQN("vol")+"/0", lun.Options{IOTimeout: 30 * time.Second})
	must(t, err)
	defer dev.Close()
	slow.Begin(peer.Slow, 0)
	written := make(chan error, 1)
	go func() { written <- dev.WriteAt(t.Context(), make([]byte, 4096), 64) }()
	for deadline := time.Now().Add(30 * time.Second); slow.Hits() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the write does not come to the destination")
		}
	}
	must(t, s.cmd.Process.Signal(syscall.SIGTERM))
	if err := <-written; err != nil {
		t.Errorf("the write in flight: %v", err)
	}
	if code, took := s.ends(30 * time.Second); code != done {
		t.Errorf("exit code %d after %v", code, took)
	}
	for i, r := range recorders {
		conns := r.Finish()
		logouts := 0
		for _, c := range conns {
			if lastRequest(c.Sent) == iscsi.OpLogout {
				logouts++
			}
		}
		if logouts == 0 || logouts != len(conns) {
			t.Errorf("%s: %d of %d connections ended with a Logout", []string{"source", "destination"}[i], logouts, len(conns))
		}
	}
}

// lastRequest is the opcode of the last PDU that an initiator sent, without digests.
func lastRequest(sent []byte) iscsi.Opcode {
	op := iscsi.Opcode(0xff)
	for len(sent) >= 48 {
		op = iscsi.Opcode(sent[0] & 0x3f)
		n := (int(sent[5])<<16 + int(sent[6])<<8 + int(sent[7]) + 3) &^ 3
		sent = sent[min(len(sent), 48+int(sent[4])*4+n):]
	}
	return op
}

func TestStopUnderLoadLosesNothing(t *testing.T) {
	s, b, _, _ := stopping(t, "20s", "4MiB")
	must(t, s.cmd.Process.Signal(syscall.SIGTERM))
	if code, took := s.ends(30 * time.Second); code != done {
		t.Errorf("exit code %d after %v", code, took)
	}
	s.start() // the clients send again what was not answered
	acks := b.acks.Load()
	for deadline := time.Now().Add(30 * time.Second); b.acks.Load() < acks+50; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the load does not go on")
		}
	}
	b.end()
	b.rightIn(s)
	s.run("wait", "vol", "--for", "synced", "--timeout", "1m")
	b.rightIn(s)
	s.stop()
}

// Caught: with all of shutdown_timeout given to the commands in flight and no end set to the rest, the
// stop took 18 s rather than 8, at the first run.
func TestStopWithAnArrayThatHangsEndsInTime(t *testing.T) {
	s, b, _, destination := stopping(t, "8s", "4MiB")
	must(t, destination.Stop())
	time.Sleep(200 * time.Millisecond) // commands are on their way to it by then
	must(t, s.cmd.Process.Signal(syscall.SIGTERM))
	code, took := s.ends(25 * time.Second)
	if code != failed || took > 12*time.Second {
		t.Errorf("exit code %d after %v", code, took)
	}
	t.Logf("ended after %v", took)
	must(t, destination.Continue())
	s.start()
	b.end()
	b.rightIn(s)
	s.stop()
}

// Caught: with the second signal not looked at it ended when the array came back, at the first
// run.
func TestSecondSIGTERMEndsAtOnceAndLosesNothing(t *testing.T) {
	s, b, _, destination := stopping(t, "1m", "4MiB")
	must(t, destination.Stop())
	must(t, s.cmd.Process.Signal(syscall.SIGTERM))
	s.untilLog("stopping: commands in flight end first", 1)
	must(t, s.cmd.Process.Signal(syscall.SIGTERM))
	if code, took := s.ends(30 * time.Second); code != 130 || took > 10*time.Second {
		t.Errorf("exit code %d after %v", code, took)
	}
	must(t, destination.Continue())
	s.start()
	b.end()
	b.rightIn(s)
	s.run("wait", "vol", "--for", "synced", "--timeout", "1m")
	b.rightIn(s)
	s.stop()
}
