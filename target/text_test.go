package target

import (
	"fmt"
	"strings"
	"testing"

	"lunshift/iscsi"
)

// textPDU sends one text request.
func (i *initiator) textPDU(flags byte, itt, ttt uint32, data string) pduIn {
	i.t.Helper()
	var h iscsi.BHS
	h.SetOpcode(iscsi.OpTextRequest)
	h.SetFlags(flags)
	h.SetITT(itt)
	h.SetTTT(ttt)
	h.SetCmdSN(i.cmdSN)
	i.cmdSN++
	h.SetExpStatSN(i.expSN)
	i.send(&h, []byte(data))
	return i.recv()
}

func TestTextRequestMayComeInParts(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	for name, d := range map[string]bool{"discovery session": true, "normal session": false} {
		t.Run(name, func(t *testing.T) {
			i := login(t, addr, loginOptions{discovery: d, isid: iscsi.ISID{1}})
			ttt := iscsi.NoTag
			request := "X-com.example=1\x00SendTargets=\x00"
			if d {
				request = "X-com.example=1\x00SendTargets=All\x00"
			}
			for k := range len(request) - 1 { // a byte at a time
				p := i.textPDU(iscsi.FlagContinue, 9, ttt, request[k:k+1])
				if p.Opcode() != iscsi.OpTextResponse || p.Final() || p.Flags() != 0 || p.TTT() == iscsi.NoTag || len(p.data) > 0 || p.ITT() != 9 {
					t.Fatalf("part %d: %v flags %02X TTT %X %q", k, p.Opcode(), p.Flags(), p.TTT(), p.data)
				}
				ttt = p.TTT()
			}
			p := i.textPDU(iscsi.FlagFinal, 9, ttt, request[len(request)-1:])
			want := "X-com.example=NotUnderstood\x00TargetName=" + iqn + "\x00TargetAddress=" + addr + ",1\x00"
			if !p.Final() || p.TTT() != iscsi.NoTag || string(p.data) != want {
				t.Errorf("flags %02X, TTT %X: %q", p.Flags(), p.TTT(), p.data)
			}
			// An answer to a request that is not final is not final (RFC 7143 11.11.1).
			p = i.textPDU(0, 10, iscsi.NoTag, "X-a=1\x00")
			if p.Final() || p.TTT() == iscsi.NoTag || string(p.data) != "X-a=NotUnderstood\x00" {
				t.Errorf("flags %02X, TTT %X: %q", p.Flags(), p.TTT(), p.data)
			}
			p = i.textPDU(iscsi.FlagFinal, 10, p.TTT(), "X-b=1\x00")
			if !p.Final() || string(p.data) != "X-b=NotUnderstood\x00" {
				t.Errorf("flags %02X: %q", p.Flags(), p.data)
			}
		})
	}
}

func TestTextThatCannotBeTakenIsRejectedAndTheSessionGoesOn(t *testing.T) {
	_, addr := begin(t, Config{MaxText: 8 << 10}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	expect := func(what string, p pduIn, reason byte) {
		t.Helper()
		if p.Opcode() != iscsi.OpReject || p.Response() != reason {
			t.Errorf("%s: %v, reason %d", what, p.Opcode(), p.Response())
		}
	}
	expect("C with F", i.textPDU(iscsi.FlagFinal|iscsi.FlagContinue, 1, iscsi.NoTag, "a=b\x00"), iscsi.RejectProtocol)
	expect("a tag that nobody gave", i.textPDU(iscsi.FlagFinal, 1, 77, "a=b\x00"), iscsi.RejectInvalidPDUField)
	expect("more than MaxText at once", i.textPDU(iscsi.FlagFinal, 1, iscsi.NoTag, strings.Repeat("a=b\x00", 2049)), iscsi.RejectOutOfResources)
	p := i.textPDU(iscsi.FlagContinue, 2, iscsi.NoTag, strings.Repeat("a=b\x00", 2048))
	expect("more than MaxText in parts", i.textPDU(iscsi.FlagFinal, 2, p.TTT(), "a=b\x00"), iscsi.RejectOutOfResources)
	expect("the exchange is over", i.textPDU(iscsi.FlagFinal, 2, p.TTT(), "a=b\x00"), iscsi.RejectInvalidPDUField)
	p = i.textPDU(iscsi.FlagContinue, 3, iscsi.NoTag, "a=")
	expect("another task tag", i.textPDU(iscsi.FlagFinal, 4, p.TTT(), "b\x00"), iscsi.RejectInvalidPDUField)
	if p := i.textPDU(iscsi.FlagFinal, 5, iscsi.NoTag, "TargetAlias=x\x00MaxBurstLength=512\x00IFMarker=Yes\x00X-y=1\x00"); string(p.data) != "TargetAlias=Reject\x00MaxBurstLength=Reject\x00IFMarker=Reject\x00X-y=NotUnderstood\x00" {
		t.Errorf("keys that have no place here: %q", p.data)
	}
	i.good(rw16(0x88, 0, 1), nil, 512)
}

func TestLoginTextMayComeInPartsAndSoMayTheAnswer(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64), Alias: "the alias"})
	i := dial(t, addr)
	send := func(flags byte, data []byte) pduIn {
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpLoginRequest)
		h.SetImmediate()
		h.SetFlags(flags | iscsi.StageOperational<<2)
		h.SetCmdSN(i.cmdSN)
		h.SetExpStatSN(i.expSN)
		i.send(&h, data)
		return i.recv()
	}
	pairs := names(false)
	for k := range 120 {
		pairs = append(pairs, iscsi.Pair{Key: fmt.Sprintf("X-%060d", k), Value: "1"})
	}
	text := iscsi.AppendText(nil, pairs...)
	for len(text) > 1000 {
		p := send(iscsi.FlagContinue, text[:1000])
		if p.LoginStatus() != 0 || p.Flags()&(iscsi.FlagTransit|iscsi.FlagContinue) != 0 || len(p.data) > 0 {
			t.Fatalf("status %04Xh, flags %02X, %d bytes", p.LoginStatus(), p.Flags(), len(p.data))
		}
		text = text[1000:]
	}
	p := send(iscsi.FlagTransit|3, text)
	got := p.data
	parts := 1
	for ; p.Flags()&iscsi.FlagContinue != 0; parts++ {
		if p.Flags()&iscsi.FlagTransit != 0 || len(p.data) > loginSegment {
			t.Fatalf("flags %02X, %d bytes", p.Flags(), len(p.data))
		}
		p = send(iscsi.FlagTransit|3, nil)
		got = append(got, p.data...)
	}
	if p.LoginStatus() != 0 || p.Flags()&iscsi.FlagTransit == 0 || parts < 2 {
		t.Fatalf("status %04Xh, flags %02X after %d parts", p.LoginStatus(), p.Flags(), parts)
	}
	if s := string(got); !strings.HasPrefix(s, "TargetPortalGroupTag=1\x00") || strings.Count(s, "TargetAlias=the alias\x00") != 1 {
		t.Errorf("the answer begins with %q and ends with %q", s[:60], s[len(s)-60:])
	}
	if n := strings.Count(string(got), "=NotUnderstood\x00"); n != 120 {
		t.Errorf("%d keys are answered", n)
	}
	i.params = iscsi.DefaultParams()
	i.do(tur, nil, 0)
	i.good(rw16(0x88, 0, 1), nil, 512)
}

func TestLoginTextPastItsLimitIsRefused(t *testing.T) {
	_, addr := begin(t, Config{MaxText: 8 << 10}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := dial(t, addr)
	var p pduIn
	for k := 0; k < 3 && p.LoginStatus() == 0; k++ {
		p, _ = i.loginRequest(iscsi.FlagContinue, 1, 0, iscsi.Pair{Key: "X-a", Value: strings.Repeat("x", 4000)})
	}
	if p.LoginStatus() != iscsi.LoginOutOfResources {
		t.Errorf("login status %04Xh", p.LoginStatus())
	}
	i.expectClosed()
}

// The limits that a server is configured with are those that are agreed.
func TestNegotiationKeepsToTheConfiguration(t *testing.T) {
	_, addr := begin(t, Config{MaxRecvDataSegmentLength: 65536, MaxBurstLength: 131072, FirstBurstLength: 32768, MaxOutstandingR2T: 3}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := dial(t, addr)
	_, got := i.loginRequest(iscsi.FlagTransit, 1, 3, append(names(false),
		iscsi.Pair{Key: "FirstBurstLength", Value: "16777215"}, iscsi.Pair{Key: "MaxBurstLength", Value: "16384"},
		iscsi.Pair{Key: "MaxOutstandingR2T", Value: "65535"}, iscsi.Pair{Key: "ErrorRecoveryLevel", Value: "2"}, iscsi.Pair{Key: "MaxConnections", Value: "4"})...)
	for key, want := range map[string]string{
		"FirstBurstLength": "16384", "MaxBurstLength": "16384", "MaxOutstandingR2T": "3", "ErrorRecoveryLevel": "0", "MaxConnections": "1",
		"MaxRecvDataSegmentLength": "65536", "TargetPortalGroupTag": "1",
	} {
		if v, _ := iscsi.Lookup(got, key); v != want {
			t.Errorf("%s is %q, want %s", key, v, want)
		}
	}
}

func TestLogoutOfAConnectionThatIsNotThereIsAnsweredSo(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 64)})
	i := login(t, addr, loginOptions{})
	logout := func(reason byte, cid uint16) byte {
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpLogout)
		h.SetImmediate()
		h.SetFlags(iscsi.FlagFinal | reason)
		h.SetITT(77)
		h.SetCID(cid)
		h.SetCmdSN(i.cmdSN)
		h.SetExpStatSN(i.expSN)
		i.send(&h, nil)
		p := i.recv()
		if p.Opcode() != iscsi.OpLogoutResp {
			t.Fatal(p.Opcode())
		}
		return p.Response()
	}
	if r := logout(iscsi.LogoutCloseConnection, 9); r != iscsi.LogoutNoCID {
		t.Errorf("response %d", r)
	}
	i.good(rw16(0x88, 0, 1), nil, 512) // the session is untouched
	if r := logout(iscsi.LogoutForRecovery, 0); r != iscsi.LogoutNoRecovery {
		t.Errorf("response %d", r)
	}
	if r := logout(iscsi.LogoutCloseConnection, 0); r != iscsi.LogoutOK {
		t.Errorf("response %d", r)
	}
	i.expectClosed()
}
