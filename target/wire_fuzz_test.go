package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"lunshift/iscsi"
)

// What the captures in testdata/captures log in to, and with which proof.
const wireIQN = "iqn.2026-11.net.example:db01"

var (
	wireHost   = iscsi.Credentials{Name: "app1", Secret: "app1-opens-this-door"}
	wireTarget = iscsi.Credentials{Name: "gw", Secret: "gw-proves-who-it-is"}
)

// How FuzzConnection plays its input, by the first byte.
const (
	wireProof   = 1 << iota // the unit is for initiators that prove themselves
	wireAnswers             // a CHAP_R of the input is replaced by the right one
)

// FuzzConnection: whatever an initiator sends from its first byte on, the target neither
// panics nor hangs; nothing of the connection is left when it is over, neither goroutines
// nor bytes in flight; the unit's data changes only by commands that write, and neither
// data nor reservations by somebody who did not prove himself; and what was saved of
// reservations can be loaded.
func FuzzConnection(f *testing.F) {
	captures, err := filepath.Glob("testdata/captures/*")
	if err != nil || len(captures) == 0 {
		f.Fatalf("no captures: %v", err)
	}
	for _, path := range captures {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		if bytes.Contains(b, []byte("CHAP_R=")) {
			f.Add(append([]byte{wireProof | wireAnswers}, b...))
		}
		for _, mode := range []byte{0, wireProof} {
			f.Add(append([]byte{mode}, b...))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 || len(in) > 1<<16 {
			return
		}
		mode, in := in[0], in[1:]
		goroutines := runtime.NumGoroutine()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)

		log, hook := test.NewNullLogger()
		log.SetLevel(logrus.ErrorLevel)
		m, kept := newMemory(512, 64), &keeper{}
		unit := Unit{IQN: wireIQN, Device: quick{m}, Reservations: kept}
		if mode&wireProof != 0 {
			unit.Initiators = []Initiator{{Name: "*", Authentication: &Authentication{Initiator: wireHost, Target: wireTarget}}}
		}
		s, err := New(Config{Log: log, NopInterval: -1, Portals: []Portal{{Address: "127.0.0.1:0"}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.AddUnit(unit); err != nil {
			t.Fatal(err)
		}
		if err := s.Listen(); err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve(context.Background()) }()
		nc, err := net.Dial("tcp", s.Addrs()[0].String())
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(deadline())
		rest := wireLogin(nc, in, mode&wireAnswers != 0)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			// It may close before it took all of it.
			nc.Write(rest)
			nc.(*net.TCPConn).CloseWrite()
		}()
		if _, err := io.Copy(io.Discard, nc); os.IsTimeout(err) {
			t.Error("the connection hangs")
		}
		nc.Close()
		<-sent

		waitFor(t, "the end of the session", func() bool { return len(s.Sessions(wireIQN)) == 0 })
		allBack(t, s)
		s.Close()
		<-served
		waitFor(t, "the end of its goroutines", func() bool { return runtime.NumGoroutine() <= goroutines })
		for _, e := range hook.AllEntries() {
			if strings.Contains(e.Message, "internal fault") {
				t.Errorf("%s\n%v", e.Message, e.Data["stack"])
			}
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 256<<20 {
			t.Errorf("%d bytes of input took %d bytes of memory", len(in), n)
		}
		changed := len(bytes.Trim(m.data, "\x00")) > 0
		if changed && !mayWrite(in) {
			t.Error("the data changed without a command that writes")
		}
		if mode&wireProof != 0 && mode&wireAnswers == 0 && (changed || kept.saves > 0) {
			t.Error("somebody who proved nothing changed the unit")
		}
		if kept.saves > 0 {
			again, err := New(Config{Log: log})
			if err != nil {
				t.Fatal(err)
			}
			if err := again.AddUnit(Unit{IQN: wireIQN, Device: quick{m}, Reservations: kept}); err != nil {
				t.Errorf("what was saved of reservations cannot be loaded: %v\n%s", err, kept.data)
			}
			again.Close()
		}
	})
}

// wireLogin sends the login requests that in begins with, each after the answer to the one
// before, and gives what follows them.
func wireLogin(nc net.Conn, in []byte, prove bool) (rest []byte) {
	r := iscsi.NewReader(nc, 4096)
	var challenge []iscsi.Pair
	for len(in) >= iscsi.BHSLength {
		h := iscsi.BHS(in[:iscsi.BHSLength])
		n := iscsi.BHSLength + int(h[4])*4 + (h.DataLength()+3)&^3
		if h.Opcode() != iscsi.OpLoginRequest || n > len(in) {
			return in
		}
		pdu := in[:n]
		in = in[n:]
		text, err := iscsi.ParseText(pdu[iscsi.BHSLength+int(h[4])*4:][:h.DataLength()])
		if _, proof := iscsi.Lookup(text, "CHAP_R"); prove && err == nil && proof && challenge != nil {
			chap := iscsi.CHAPInitiator{Own: wireHost}
			if answer, err := chap.Answer(challenge); err == nil {
				for i, p := range text {
					if v, ok := iscsi.Lookup(answer, p.Key); ok && (p.Key == "CHAP_R" || p.Key == "CHAP_N") {
						text[i].Value = v
					}
				}
				data := iscsi.AppendText(nil, text...)
				h[4] = 0
				h.SetDataLength(len(data))
				pdu = append(append(h[:], data...), make([]byte, -len(data)&3)...)
			}
		}
		if _, err := nc.Write(pdu); err != nil {
			return nil
		}
		if h.Flags()&iscsi.FlagContinue != 0 && h.Flags()&iscsi.FlagTransit != 0 {
			continue // no answer is certain to come
		}
		// A request that is not answered ends the lock-step rather than the test.
		nc.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		a, err := r.Next()
		nc.SetReadDeadline(deadline())
		if err != nil {
			return in
		}
		status, opcode, done := a.LoginStatus(), a.Opcode(), a.Flags()&iscsi.FlagTransit != 0 && a.NSG() == iscsi.StageFullFeature
		data, err := r.Data()
		if err != nil || opcode != iscsi.OpLoginResponse || status != 0 || done {
			return in
		}
		if got, err := iscsi.ParseText(data); err == nil {
			if _, ok := iscsi.Lookup(got, "CHAP_C"); ok {
				challenge = got
			}
		}
	}
	return in
}

// mayWrite tells whether some header in the bytes could be of a command that writes.
func mayWrite(in []byte) bool {
	for ; len(in) >= iscsi.BHSLength; in = in[4:] {
		if in[0]&0x3f != byte(iscsi.OpSCSICommand) {
			continue
		}
		switch in[32] {
		case 0x04, 0x0a, 0x2a, 0x2e, 0x3b, 0x3f, 0x41, 0x42, 0x53, 0x83, 0x89, 0x8a, 0x8b, 0x8e, 0x93, 0x9c, 0xaa, 0xae:
			return true
		case 0x7f:
			if binary.BigEndian.Uint16(in[40:]) != 9 { // READ(32)
				return true
			}
		}
	}
	return false
}

// TestCapturesReachTheFullFeaturePhase: the seeds still are sessions that the target takes,
// with CHAP where they have it.
func TestCapturesReachTheFullFeaturePhase(t *testing.T) {
	captures, err := filepath.Glob("testdata/captures/*")
	if err != nil || len(captures) == 0 {
		t.Fatalf("no captures: %v", err)
	}
	for _, path := range captures {
		in, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		unit := Unit{IQN: wireIQN, Device: quick{newMemory(512, 64)}, Reservations: &keeper{}}
		if bytes.Contains(in, []byte("CHAP_R=")) {
			unit.Initiators = []Initiator{{Name: "*", Authentication: &Authentication{Initiator: wireHost, Target: wireTarget}}}
		}
		_, addr := begin(t, Config{NopInterval: -1}, unit)
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(deadline())
		rest := wireLogin(nc, in, true)
		if len(rest) == 0 || rest[0]&0x3f == byte(iscsi.OpLoginRequest) {
			t.Errorf("%s: the login does not come to its end", path)
			continue
		}
		go func() {
			nc.Write(rest)
			nc.(*net.TCPConn).CloseWrite()
		}()
		got, err := io.ReadAll(nc)
		if len(got) < iscsi.BHSLength && err != nil {
			t.Errorf("%s: %d bytes of answers: %v", path, len(got), err)
		}
		if len(got) < iscsi.BHSLength {
			t.Errorf("%s: %d bytes of answers in full feature phase", path, len(got))
		}
	}
}
