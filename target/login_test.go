package target

import (
	"bytes"
	"strings"
	"testing"

	"lunshift/iscsi"
)

// FuzzLogin: no sequence of login requests panics, or reaches the full feature
// phase without an initiator name and a target that was found.
func FuzzLogin(f *testing.F) {
	add := func(flags1, flags2 byte, text string) {
		f.Add(flags1, flags2, byte(0), []byte(text), []byte("HeaderDigest=CRC32C,None\x00MaxBurstLength=0x400\x00"))
	}
	add(0x81, 0x87, "InitiatorName=iqn.a:b\x00TargetName=iqn.x:y\x00AuthMethod=None\x00")
	add(0x83, 0x87, "InitiatorName=iqn.a:b\x00SessionType=Discovery\x00")
	add(0x40, 0x81, "InitiatorName=iqn.a:b\x00SessionType=Discovery\x00")
	f.Fuzz(func(t *testing.T, flags1, flags2, version byte, text1, text2 []byte) {
		n := &negotiation{neg: iscsi.NewNegotiation(iscsi.DefaultParams()), maxText: 64 << 10, challenges: newChallenges(),
			attempt: func() bool { return true }, succeeded: func() {},
			ask: func(_ *peer, discovery bool, target string) (terms, bool) {
				return terms{open: true}, discovery || target == "iqn.x:y"
			}}
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpLoginRequest)
		h[3] = version
		for k, text := range [][]byte{text1, text2, text1} {
			h.SetFlags([]byte{flags1, flags2, flags1}[k])
			r, _, done, err := n.step(&h, text)
			if err != nil {
				if r.LoginStatus() == iscsi.LoginSuccess {
					t.Fatalf("%v with a status of success", err)
				}
				return
			}
			if r.LoginStatus() != iscsi.LoginSuccess {
				t.Fatal("refused without an error")
			}
			if done {
				if n.initiator == "" || !n.discovery && n.target != "iqn.x:y" {
					t.Fatalf("in full feature phase as %q at %q", n.initiator, n.target)
				}
				return
			}
		}
	})
}

// FuzzLoginProof: where a proof is asked for, no sequence of login requests ends in full
// feature phase without it, or hears where the target went. The input is requests, each a
// byte of flags and text up to the byte FFh.
func FuzzLoginProof(f *testing.F) {
	name := "InitiatorName=iqn.a:b\x00TargetName=iqn.x:y\x00"
	for _, s := range []string{
		"\x00" + name + "AuthMethod=CHAP,None\x00\xff\x00CHAP_A=8,7,6,5\x00\xff\x81CHAP_N=alice\x00CHAP_R=0x00\x00",
		"\x00" + name + "AuthMethod=CHAP\x00\xff\x00CHAP_A=5\x00\xff\x81CHAP_N=alice\x00CHAP_R=0b\x00CHAP_I=1\x00CHAP_C=0x01\x00\xff\x87",
		"\x83" + name + "\xff\x83", "\x87" + name, "\x81" + name + "AuthMethod=None,CHAP\x00\xff\x81\xff\x87",
		"\x40" + name + "\xff\x81AuthMethod=None\x00", "\x03InitiatorName=iqn.a:b\x00SessionType=Discovery\x00\xff\x83AuthMethod=None\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		left := 3
		n := &negotiation{neg: iscsi.NewNegotiation(iscsi.DefaultParams()), maxText: 8 << 10, challenges: newChallenges(),
			attempt: func() bool { left--; return left >= 0 }, succeeded: func() {},
			ask: func(p *peer, _ bool, _ string) (terms, bool) {
				return terms{asks: []Authentication{{Initiator: hostCredentials, Target: arrayCredentials}}, moved: &Redirection{Address: "192.0.2.1:3260"}}, true
			}}
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpLoginRequest)
		for request := range bytes.SplitSeq(in, []byte{0xff}) {
			if len(request) == 0 {
				continue
			}
			h.SetFlags(request[0])
			r, text, done, err := n.step(&h, request[1:])
			if done || r.Flags()&iscsi.FlagTransit != 0 || n.settled || n.proved.Secret != "" {
				t.Fatal("let in without a proof")
			}
			if bytes.Contains(text, []byte("192.0.2.1")) || bytes.Contains(text, []byte(hostSecret)) || bytes.Contains(text, []byte(arraySecret)) {
				t.Fatalf("told %q without a proof", text)
			}
			if (err == nil) != (r.LoginStatus() == iscsi.LoginSuccess) {
				t.Fatalf("status %04Xh with %v", r.LoginStatus(), err)
			}
			if err != nil {
				if strings.Contains(err.Error(), hostSecret) {
					t.Fatal(err)
				}
				return
			}
		}
	})
}
