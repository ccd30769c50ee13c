package target

import (
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"lunshift/iscsi"
)

// FuzzSession: whatever PDUs come in full feature phase, the target does not panic and
// does not hang, and serves the next session. The input is headers, each followed by
// what it says of data up to 1 KiB; where the first byte is odd the CmdSN of each is the
// one that is due, so that more of them are taken.
func FuzzSession(f *testing.F) {
	log, hook := test.NewNullLogger()
	log.SetLevel(logrus.ErrorLevel)
	m := newMemory(512, 64)
	s, addr := begin(f, Config{Log: log, NopInterval: -1}, Unit{IQN: iqn, Device: quick{m}})
	pdu := func(op iscsi.Opcode, flags byte, set func(*iscsi.BHS), data int) []byte {
		var h iscsi.BHS
		h.SetOpcode(op)
		h.SetFlags(iscsi.FlagFinal | flags)
		h.SetITT(7)
		h.SetDataLength(data)
		if set != nil {
			set(&h)
		}
		return append(h[:], make([]byte, (data+3)&^3)...)
	}
	write := pdu(iscsi.OpSCSICommand, iscsi.FlagWrite, func(h *iscsi.BHS) {
		copy(h.CDB(), rw16(0x8a, 0, 2))
		h.SetExpectedLength(1024)
	}, 512)
	read := pdu(iscsi.OpSCSICommand, iscsi.FlagRead, func(h *iscsi.BHS) {
		copy(h.CDB(), rw16(0x88, 0, 2))
		h.SetExpectedLength(1024)
		h.SetITT(8)
	}, 0)
	rest := pdu(iscsi.OpDataOut, 0, func(h *iscsi.BHS) {
		h.SetTTT(1)
		h.SetBufferOffset(512)
	}, 512)
	groups := func(format byte) []byte {
		return pdu(iscsi.OpSCSICommand, iscsi.FlagRead, func(h *iscsi.BHS) {
			copy(h.CDB(), []byte{0xa3, 0x0a | format<<5, 0, 0, 0, 0, 0, 0, 2})
			h.SetExpectedLength(512)
			h.SetITT(11)
		}, 0)
	}
	for _, pdus := range [][][]byte{
		{groups(0), groups(1), groups(7)}, // REPORT TARGET PORT GROUPS
		{write, rest, read},
		{write, pdu(iscsi.OpTaskMgmt, iscsi.TMFAbortTask, func(h *iscsi.BHS) { h.SetITT(9); h.SetTTT(7) }, 0), rest},
		{write, pdu(iscsi.OpTaskMgmt, iscsi.TMFTargetWarmReset, func(h *iscsi.BHS) { h.SetImmediate() }, 0), read},
		{write, pdu(iscsi.OpLogout, 0, nil, 0), read},
		{pdu(iscsi.OpNopOut, 0, func(h *iscsi.BHS) { h.SetTTT(iscsi.NoTag) }, 5), pdu(iscsi.OpTextRequest, 0, nil, 20), read},
		{pdu(iscsi.OpSNACK, 0, nil, 0)},
		{pdu(iscsi.OpLoginRequest, 0, nil, 0)},
	} {
		for odd := range byte(2) {
			in := []byte{odd}
			for _, p := range pdus {
				in = append(in, p...)
			}
			f.Add(in)
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) < 1 || len(in) > 1<<16 {
			return
		}
		i := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
		i.nc.SetDeadline(time.Now().Add(10 * time.Second))
		repair, in := in[0]&1 != 0, in[1:]
		var out []byte
		for len(in) >= iscsi.BHSLength {
			h := (*iscsi.BHS)(append([]byte{}, in[:iscsi.BHSLength]...))
			in = in[iscsi.BHSLength:]
			n := 0
			if repair {
				n = min(h.DataLength()&1023, len(in))
				h.SetDataLength(n)
				h[4] = 0 // no additional header
				h.SetCmdSN(i.cmdSN)
				if op := h.Opcode(); !h.Immediate() && op != iscsi.OpDataOut && op != iscsi.OpSNACK {
					i.cmdSN++
				}
			}
			out = append(out, h[:]...)
			out = append(append(out, in[:n]...), make([]byte, -n&3)...)
			in = in[min((n+3)&^3, len(in)):]
		}
		out = append(out, in...)
		// It may close before it took all of it.
		go func() {
			i.nc.Write(out)
			i.nc.(*net.TCPConn).CloseWrite()
		}()
		for {
			if _, err := i.r.Next(); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("the session hangs")
			} else if err != nil {
				break
			}
		}
		waitFor(t, "the end of the session", func() bool { return len(s.Sessions(iqn)) == 0 })
		for _, e := range hook.AllEntries() {
			if strings.Contains(e.Message, "internal fault") {
				t.Errorf("%s\n%v", e.Message, e.Data["stack"])
			}
		}
		hook.Reset()
		allBack(t, s)
	})
}
