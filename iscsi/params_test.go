package iscsi

import (
	"fmt"
	"strings"
	"testing"
)

// TestEveryKeyIsAnsweredAsTheStandardSays goes through the operational keys of RFC 7143
// 13 as a target that wants what want says, for good offers and bad.
func TestEveryKeyIsAnsweredAsTheStandardSays(t *testing.T) {
	want := DefaultParams()
	want.HeaderDigest, want.DataDigest, want.InitialR2T = true, true, false
	want.MaxRecv, want.MaxBurstLength, want.FirstBurstLength = 1<<18, 1<<20, 1<<18
	want.MaxOutstandingR2T, want.DefaultTime2Wait, want.DefaultTime2Retain = 8, 2, 0
	const fails = "!" // the login
	long := strings.Repeat("9", 300)
	for _, tc := range []struct {
		offer     string
		answer    string // "" for a declaration, "?" for a key that is no operational key
		discovery string // where it differs
	}{
		{"HeaderDigest=CRC32C", "CRC32C", ""}, {"HeaderDigest=None", "None", ""}, {"HeaderDigest=CRC32C,None", "CRC32C", ""},
		{"HeaderDigest=None,CRC32C", "None", ""}, {"HeaderDigest=X-SHA9,CRC32C", "CRC32C", ""}, {"HeaderDigest=X-SHA9", "Reject", ""},
		{"HeaderDigest=", "Reject", ""}, {"HeaderDigest=,", "Reject", ""}, {"HeaderDigest=crc32c", "Reject", ""},
		{"DataDigest=CRC32C,None", "CRC32C", ""}, {"DataDigest=None", "None", ""}, {"DataDigest=" + strings.Repeat("a,", 99) + "None", "None", ""},
		{"MaxConnections=1", "1", "Irrelevant"}, {"MaxConnections=8", "1", "Irrelevant"}, {"MaxConnections=65535", "1", "Irrelevant"},
		{"MaxConnections=0", fails, "Irrelevant"}, {"MaxConnections=65536", fails, "Irrelevant"}, {"MaxConnections=x", fails, "Irrelevant"},
		{"InitialR2T=Yes", "Yes", "Irrelevant"}, {"InitialR2T=No", "No", "Irrelevant"}, {"InitialR2T=yes", fails, "Irrelevant"}, {"InitialR2T=", fails, "Irrelevant"},
		{"ImmediateData=Yes", "Yes", "Irrelevant"}, {"ImmediateData=No", "No", "Irrelevant"}, {"ImmediateData=1", fails, "Irrelevant"},
		{"MaxRecvDataSegmentLength=512", "", ""}, {"MaxRecvDataSegmentLength=16777215", "", ""}, {"MaxRecvDataSegmentLength=0x2000", "", ""},
		{"MaxRecvDataSegmentLength=511", fails, fails}, {"MaxRecvDataSegmentLength=16777216", fails, fails}, {"MaxRecvDataSegmentLength=-1", fails, fails},
		{"MaxRecvDataSegmentLength=0x", fails, fails}, {"MaxRecvDataSegmentLength=+512", fails, fails}, {"MaxRecvDataSegmentLength= 512", fails, fails},
		{"MaxRecvDataSegmentLength=4294967808", fails, fails}, {"MaxRecvDataSegmentLength=" + long, fails, fails}, {"MaxRecvDataSegmentLength=1_000", fails, fails},
		{"MaxBurstLength=512", "512", "Irrelevant"}, {"MaxBurstLength=16777215", "1048576", "Irrelevant"}, {"MaxBurstLength=0", fails, "Irrelevant"}, {"MaxBurstLength=16777216", fails, "Irrelevant"},
		{"FirstBurstLength=512", "512", "Irrelevant"}, {"FirstBurstLength=16777215", "262144", "Irrelevant"}, {"FirstBurstLength=511", fails, "Irrelevant"},
		{"DefaultTime2Wait=0", "2", ""}, {"DefaultTime2Wait=5", "5", ""}, {"DefaultTime2Wait=3600", "3600", ""}, {"DefaultTime2Wait=3601", fails, fails},
		{"DefaultTime2Retain=0", "0", ""}, {"DefaultTime2Retain=20", "0", ""}, {"DefaultTime2Retain=3601", fails, fails},
		{"MaxOutstandingR2T=1", "1", "Irrelevant"}, {"MaxOutstandingR2T=65535", "8", "Irrelevant"}, {"MaxOutstandingR2T=0", fails, "Irrelevant"}, {"MaxOutstandingR2T=65536", fails, "Irrelevant"},
		{"DataPDUInOrder=No", "Yes", "Irrelevant"}, {"DataPDUInOrder=Yes", "Yes", "Irrelevant"}, {"DataPDUInOrder=Maybe", fails, "Irrelevant"},
		{"DataSequenceInOrder=No", "Yes", "Irrelevant"}, {"DataSequenceInOrder=Yes", "Yes", "Irrelevant"},
		{"ErrorRecoveryLevel=0", "0", ""}, {"ErrorRecoveryLevel=2", "0", ""}, {"ErrorRecoveryLevel=3", fails, fails},
		{"TaskReporting=RFC3720", "RFC3720", "Irrelevant"}, {"TaskReporting=FastAbort,ResponseFence,RFC3720", "RFC3720", "Irrelevant"},
		{"TaskReporting=FastAbort", "Reject", "Irrelevant"}, {"TaskReporting=", "Reject", "Irrelevant"},
		{"iSCSIProtocolLevel=0", "0", "Irrelevant"}, {"iSCSIProtocolLevel=1", "1", "Irrelevant"}, {"iSCSIProtocolLevel=31", "1", "Irrelevant"}, {"iSCSIProtocolLevel=32", fails, "Irrelevant"},
		{"IFMarker=No", "No", ""}, {"OFMarker=No", "No", ""}, {"IFMarker=Yes", "Reject", ""}, {"OFMarker=Yes", "Reject", ""}, {"OFMarker=" + long, "Reject", ""},
		{"IFMarkInt=1~65535", "Reject", ""}, {"OFMarkInt=2048", "Reject", ""}, {"OFMarkInt=", "Reject", ""},
		{"SendTargets=All", "Reject", ""}, {"TargetAlias=x", "Reject", ""}, {"TargetAddress=10.0.0.1", "Reject", ""}, {"TargetPortalGroupTag=1", "Reject", ""},
		{"X-com.example.key=1", "?", ""}, {"X#NodeArchitecture=2", "?", ""}, {"RDMAExtensions=Yes", "?", ""}, {"headerdigest=None", "?", ""}, {"MaxBurstLengths=1", "?", ""},
	} {
		for _, discovery := range []bool{false, true} {
			expect := tc.answer
			if discovery && tc.discovery != "" {
				expect = tc.discovery
			}
			key, value, _ := strings.Cut(tc.offer, "=")
			name := fmt.Sprintf("%s of %.40s, discovery=%v", key, value, discovery)
			n := NewNegotiation(want)
			n.Discovery = discovery
			before := n.Params
			answer, known, err := n.Respond(Pair{key, value})
			switch {
			case expect == fails:
				if err == nil {
					t.Errorf("%s: answered %q, want a failure", name, answer)
				} else if strings.ContainsAny(err.Error(), "\n\x00") || len(err.Error()) > 200 {
					t.Errorf("%s: error %q", name, err)
				}
			case err != nil:
				t.Errorf("%s: %v", name, err)
			case expect == "?" && known, expect != "?" && (!known || answer != expect):
				t.Errorf("%s: answered %q (known %v), want %q", name, answer, known, expect)
			}
			if (expect == fails || expect == RejectValue || expect == Irrelevant) && n.Params != before {
				t.Errorf("%s: changed the parameters to %+v", name, n.Params)
			}
			if known && err == nil {
				if _, _, err := n.Respond(Pair{key, value}); err == nil {
					t.Errorf("%s: negotiated twice", name)
				}
			}
		}
	}
}

func TestFirstBurstIsNoLongerThanTheAgreedBurst(t *testing.T) {
	want := DefaultParams()
	want.MaxBurstLength, want.FirstBurstLength = 1<<20, 1<<18
	n := NewNegotiation(want)
	n.Respond(Pair{"MaxBurstLength", "4096"})
	if a, _, err := n.Respond(Pair{"FirstBurstLength", "65536"}); a != "4096" || err != nil {
		t.Errorf("answered %q, %v", a, err)
	}
}

func TestChallengeIsGoodForOneAnswer(t *testing.T) {
	own := Credentials{"host", "a secret of the host"}
	r := CHAPTarget{Initiator: own}
	c, err := r.Challenge([]Pair{{"CHAP_A", "7"}})
	if err != nil {
		t.Fatal(err)
	}
	good, err := (&CHAPInitiator{Own: own}).Answer(c)
	if err != nil {
		t.Fatal(err)
	}
	bad, err := (&CHAPInitiator{Own: Credentials{"host", "a guess"}}).Answer(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Verify(bad); err == nil || r.Done() {
		t.Fatal("a wrong response is taken")
	}
	if _, err := r.Verify(good); err == nil || r.Done() {
		t.Error("a second response is looked at")
	}
	d, err := (&CHAPTarget{}).Challenge([]Pair{{"CHAP_A", "7"}})
	if err != nil {
		t.Fatal(err)
	}
	a, _ := Lookup(c, "CHAP_C")
	if b, _ := Lookup(d, "CHAP_C"); a == b {
		t.Error("a challenge came twice")
	}
}
