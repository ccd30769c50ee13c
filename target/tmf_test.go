package target

import (
	"context"
	"fmt"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/lun"
)

func TestAbortsMeetTheUnitInEitherAddressFormat(t *testing.T) {
	for _, f := range []byte{iscsi.TMFAbortTask, iscsi.TMFAbortTaskSet, iscsi.TMFLUNReset} {
		for _, field := range []uint64{0x0001 << 48, 0x4001 << 48} {
			t.Run(fmt.Sprintf("%s %04X", tmfName(f), field>>48), func(t *testing.T) {
				m := newMemory(512, 64)
				_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 1, Device: m})
				i := login(t, addr, loginOptions{})
				i.lun = 1
				i.do(tur, nil, 0)
				hold := make(chan struct{})
				m.set(hold, nil)
				w := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
				i.start(w, pattern(512, 1))
				<-m.entered
				var h iscsi.BHS
				h.SetOpcode(iscsi.OpTaskMgmt)
				h.SetImmediate()
				h.SetFlags(iscsi.FlagFinal | f)
				h.SetLUN(field)
				h.SetITT(4242)
				h.SetTTT(w.ITT())
				h.SetCmdSN(i.cmdSN)
				i.send(&h, nil)
				if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.Response() != iscsi.TMFComplete {
					t.Fatalf("%v, response %d", p.Opcode(), p.Response())
				}
				m.set(nil, nil)
				close(hold)
				i.do(tur, nil, 0) // may be a unit attention
				i.good(tur, nil, 0)
				if got := i.good(rw16(0x88, 0, 1), nil, 512); got.data[0] != 0 {
					t.Error("the write outlived its abort")
				}
			})
		}
	}
}

// deaf is a device whose writes go on for a while after they were cancelled.
type deaf struct {
	*memory
	began, release chan struct{}
	ended          <-chan struct{} // the test
}

func newDeaf(t *testing.T) deaf {
	return deaf{newMemory(512, 64), make(chan struct{}, 1), make(chan struct{}), t.Context().Done()}
}

func (d deaf) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	d.began <- struct{}{}
	<-ctx.Done()
	select {
	case <-d.release:
	case <-d.ended: // badly: its clean-up waits for the device
	}
	return ctx.Err()
}

func TestAbortIsAnsweredOnlyWhenTheDeviceIsDone(t *testing.T) {
	for _, f := range []byte{iscsi.TMFAbortTask, iscsi.TMFAbortTaskSet, iscsi.TMFClearTaskSet, iscsi.TMFLUNReset, iscsi.TMFTargetWarmReset} {
		t.Run(tmfName(f), func(t *testing.T) {
			d := newDeaf(t)
			_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: d})
			i := login(t, addr, loginOptions{})
			w := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
			i.start(w, pattern(512, 1))
			<-d.began
			ref := i.tmf(f, w.ITT())
			// A ping that comes later is answered first.
			i.ping()
			time.Sleep(20 * time.Millisecond)
			i.ping()
			close(d.release)
			if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.ITT() != ref || p.Response() != iscsi.TMFComplete {
				t.Fatalf("%v, response %d", p.Opcode(), p.Response())
			}
		})
	}
}

func TestAbortOfACommandThatNeverCameTakesItsPlace(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	first := i.cmdSN
	abort := func(ref, cmdSN uint32, want byte) {
		t.Helper()
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpTaskMgmt)
		h.SetImmediate()
		h.SetFlags(iscsi.FlagFinal | iscsi.TMFAbortTask)
		h.SetITT(9000 + ref)
		h.SetTTT(123456)
		h.SetRefCmdSN(ref)
		h.SetCmdSN(cmdSN)
		h.SetExpStatSN(i.expSN)
		i.send(&h, nil)
		if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.Response() != want {
			t.Fatalf("abort of CmdSN %d before %d: %v, response %d, want %d", ref, cmdSN, p.Opcode(), p.Response(), want)
		}
	}
	abort(first-1, first, iscsi.TMFNoTask)         // ended
	abort(first, first, iscsi.TMFNoTask)           // not before the request
	abort(first+5000, first+9000, iscsi.TMFNoTask) // beyond the window
	// first and first+2 count as received; first+1 is still to come.
	abort(first+2, first+3, iscsi.TMFComplete)
	abort(first, first+3, iscsi.TMFComplete)
	i.cmdSN = first
	w := i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512) // comes late after all: not done
	i.start(w, pattern(512, 7))
	i.good(tur, nil, 0) // first+1
	if i.cmdSN != first+2 {
		t.Fatal("the test lost count")
	}
	i.start(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512), pattern(512, 7)) // first+2
	if r := i.good(rw16(0x88, 0, 1), nil, 512); r.data[0] != 0 || r.data[1] != 0 {
		t.Error("a command that was aborted before it came was done")
	}
}

func TestTaskManagementInFlightIsBounded(t *testing.T) {
	d := newDeaf(t)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: d})
	i, other := login(t, addr, loginOptions{}), login(t, addr, loginOptions{name: nameB})
	w := other.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512)
	other.start(w, pattern(512, 1))
	<-d.began
	for range mostImmediate {
		i.tmf(iscsi.TMFLUNReset, 0)
	}
	i.tmf(iscsi.TMFLUNReset, 0)
	if p := i.recv(); p.Opcode() != iscsi.OpReject || p.Response() != iscsi.RejectTooManyImmed {
		t.Fatalf("one too many: %v, reason %d", p.Opcode(), p.Response())
	}
	i.ping()
	close(d.release)
	for range mostImmediate {
		if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.Response() != iscsi.TMFComplete {
			t.Fatalf("%v, response %d", p.Opcode(), p.Response())
		}
	}
	i.tmf(iscsi.TMFLUNReset, 0)
	if p := i.recv(); p.Opcode() != iscsi.OpTaskMgmtResp || p.Response() != iscsi.TMFComplete {
		t.Fatalf("afterwards: %v, response %d", p.Opcode(), p.Response())
	}
}

// Each I_T nexus has a task set of its own.
func TestClearTaskSetLeavesCommandsOfOthersAlone(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	a, b := host(t, addr, nameA), host(t, addr, nameB)
	hold := make(chan struct{})
	m.set(hold, nil)
	for _, i := range []*initiator{a, b} {
		i.start(i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite, 512), pattern(512, 1))
		begins(t, m)
	}
	ref := a.tmf(iscsi.TMFClearTaskSet, 0)
	if p := a.recv(); p.ITT() != ref || p.Response() != iscsi.TMFComplete {
		t.Fatalf("%v, response %d", p.Opcode(), p.Response())
	}
	m.set(nil, nil)
	close(hold)
	if p := b.recv(); p.Opcode() != iscsi.OpSCSIResponse || p.Status() != good {
		t.Fatalf("the write of another: %v, status %02Xh", p.Opcode(), p.Status())
	}
	if got := append(a.attentions(), b.attentions()...); len(got) != 0 {
		t.Errorf("they find %v", got)
	}
}
