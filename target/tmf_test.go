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
}

func (d deaf) WriteAt(ctx context.Context, p []byte, start lun.LBA) error {
	d.began <- struct{}{}
	<-ctx.Done()
	<-d.release
	return ctx.Err()
}

func TestAbortIsAnsweredOnlyWhenTheDeviceIsDone(t *testing.T) {
	for _, f := range []byte{iscsi.TMFAbortTask, iscsi.TMFAbortTaskSet, iscsi.TMFClearTaskSet, iscsi.TMFLUNReset, iscsi.TMFTargetWarmReset} {
		t.Run(tmfName(f), func(t *testing.T) {
			d := deaf{newMemory(512, 64), make(chan struct{}, 1), make(chan struct{})}
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
