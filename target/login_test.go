package target

import (
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
