package iscsi

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"pgregory.net/rapid"
)

func TestPDUsArriveAsTheyWereSent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		hd, dd := rapid.Bool().Draw(t, "header digest"), rapid.Bool().Draw(t, "data digest")
		var mu sync.Mutex
		var wire bytes.Buffer
		w := NewWriter(&wire, &mu)
		w.HeaderDigest, w.DataDigest = hd, dd
		type sent struct {
			h    BHS
			data []byte
		}
		var all []sent
		mu.Lock()
		for range rapid.IntRange(1, 12).Draw(t, "PDUs") {
			n := rapid.SampledFrom([]int{0, 1, 2, 3, 4, 48, 511, 513, 4096, 5000, MaxFrame, 300000}).Draw(t, "length")
			data := make([]byte, n)
			for i := range data {
				data[i] = byte(i*13 + n)
			}
			itt := rapid.Uint32().Draw(t, "ITT")
			switch how := rapid.IntRange(0, 2).Draw(t, "how"); {
			case how < 2 && n <= MaxFrame:
				h, d := w.Frame(n)
				if how == 1 && rapid.Bool().Draw(t, "cancel") {
					w.Cancel(d)
					continue
				}
				copy(d, data)
				h.SetITT(itt)
				w.Commit(h, d)
				all = append(all, sent{*h, data})
			default:
				var h BHS
				h.SetITT(itt)
				w.Append(&h, nil, data, nil)
				all = append(all, sent{h, data})
			}
			if rapid.Bool().Draw(t, "flush") {
				w.Flush()
			}
		}
		if err := w.Drain(); err != nil {
			t.Fatal(err)
		}
		mu.Unlock()
		var src io.Reader = &wire
		switch rapid.IntRange(0, 2).Draw(t, "reads") {
		case 1:
			src = iotest.HalfReader(src)
		case 2:
			src = iotest.DataErrReader(src)
		}
		r := NewReader(src, rapid.SampledFrom([]int{4096, 8000, 256 << 10}).Draw(t, "buffer"))
		r.HeaderDigest, r.DataDigest, r.MaxData = hd, dd, 1<<20
		for i, s := range all {
			h, err := r.Next()
			if err != nil {
				t.Fatalf("PDU %d: %v", i, err)
			}
			if *h != s.h {
				t.Fatalf("PDU %d: header %x, want %x", i, *h, s.h)
			}
			var got []byte
			switch rapid.IntRange(0, 3).Draw(t, "take") {
			case 0:
				got, err = r.Data()
			case 1:
				got = make([]byte, r.Left())
				err = r.ReadData(got)
			case 2:
				got = make([]byte, r.Left())
				half := len(got) / 2
				if err = r.ReadData(got[:half]); err == nil {
					err = r.ReadData(got[half:])
				}
			case 3: // skipped
				continue
			}
			if err != nil || !bytes.Equal(got, s.data) {
				t.Fatalf("PDU %d: data of %d bytes, want %d: %v", i, len(got), len(s.data), err)
			}
		}
		if _, err := r.Next(); err != io.EOF {
			t.Fatalf("at the end: %v", err)
		}
	})
}

func TestDigestFindsEveryFlippedBit(t *testing.T) {
	var mu sync.Mutex
	var wire bytes.Buffer
	w := NewWriter(&wire, &mu)
	w.HeaderDigest, w.DataDigest = true, true
	mu.Lock()
	var h BHS
	w.Append(&h, nil, []byte("seven b"), nil)
	w.Flush()
	good := bytes.Clone(wire.Bytes())
	for bit := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		r := NewReader(bytes.NewReader(bad), 0)
		r.HeaderDigest, r.DataDigest = true, true
		_, err := r.Next()
		if err == nil {
			_, err = r.Data()
		}
		if err == nil {
			t.Fatalf("bit %d: nothing was noticed", bit)
		}
	}
}

func TestTooLongDataIsRefusedBeforeItIsRead(t *testing.T) {
	var h BHS
	h.SetDataLength(1<<24 - 1)
	r := NewReader(io.MultiReader(bytes.NewReader(h[:]), iotest.ErrReader(errors.New("read on"))), 0)
	if _, err := r.Next(); !errors.Is(err, ErrTooLong) {
		t.Error(err)
	}
}

func TestReadyMeansThatNothingIsWaitedFor(t *testing.T) {
	var a, b BHS
	b.SetDataLength(5)
	wire := append(append(a[:], b[:]...), "hello\x00\x00\x00"...)
	for cut := range len(wire) + 1 {
		r := NewReader(io.MultiReader(bytes.NewReader(wire[:cut]), iotest.ErrReader(errors.New("waited"))), 0)
		r.fill(1)
		for n := 0; r.Ready(); n++ {
			if _, err := r.Next(); err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
			if _, err := r.Data(); err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
		}
	}
}

type owner struct{ n *int }

func (o owner) Release() { *o.n++ }

func TestOwnersGetTheirDataBack(t *testing.T) {
	for _, dst := range []io.Writer{io.Discard, failing{}} {
		var mu sync.Mutex
		n := 0
		w := NewWriter(dst, &mu)
		mu.Lock()
		var h BHS
		for _, size := range []int{10, 600, 100000} {
			w.Append(&h, nil, make([]byte, size), owner{&n})
		}
		w.Flush()
		w.Append(&h, nil, make([]byte, 1000), owner{&n})
		w.Close(io.ErrClosedPipe)
		if n != 4 {
			t.Errorf("%T: %d of 4 were told", dst, n)
		}
		mu.Unlock()
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestSerialNumbersWrap(t *testing.T) {
	for _, c := range []struct {
		a, b uint32
		less bool
	}{{1, 2, true}, {2, 1, false}, {0xffffffff, 0, true}, {0, 0xffffffff, false}, {5, 5, false}} {
		if SNLess(c.a, c.b) != c.less {
			t.Errorf("SNLess(%d, %d)", c.a, c.b)
		}
	}
	if !SNLessEq(7, 7) || SNLessEq(8, 7) {
		t.Error("SNLessEq")
	}
}

func TestLUNsSurviveTheirEncoding(t *testing.T) {
	for n := range uint64(16384) {
		f, ok := EncodeLUN(n)
		if got, ok2 := DecodeLUN(f); !ok || !ok2 || got != n {
			t.Fatalf("LUN %d became %d", n, got)
		}
	}
	if _, ok := EncodeLUN(16384); ok {
		t.Error("LUN 16384 was encoded")
	}
	for _, f := range []uint64{1, 0x8000 << 48, 0xc101 << 48, 0x0100 << 48} {
		if _, ok := DecodeLUN(f); ok {
			t.Errorf("field %x was decoded", f)
		}
	}
}

func drawParams(t *rapid.T, who string) Params {
	p := DefaultParams()
	b := func(n string) bool { return rapid.Bool().Draw(t, who+n) }
	u := func(n string, lo, hi uint32) uint32 { return rapid.Uint32Range(lo, hi).Draw(t, who+n) }
	p.HeaderDigest, p.DataDigest = b("hd"), b("dd")
	p.InitialR2T, p.ImmediateData = b("r2t"), b("imm")
	p.DataPDUInOrder, p.DataSequenceInOrder = b("pdu"), b("seq")
	p.MaxBurstLength, p.FirstBurstLength = u("burst", 512, 1<<24-1), u("first", 512, 1<<24-1)
	p.MaxConnections, p.MaxOutstandingR2T = u("conns", 1, 65535), u("r2ts", 1, 65535)
	p.DefaultTime2Wait, p.DefaultTime2Retain = u("wait", 0, 3600), u("retain", 0, 3600)
	p.ErrorRecoveryLevel = u("erl", 0, 2)
	p.MaxRecv = u("recv", 512, 1<<24-1)
	return p
}

func TestBothSidesAgreeOnWhatWasNegotiated(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		i, r := NewNegotiation(drawParams(t, "initiator ")), NewNegotiation(drawParams(t, "target "))
		i.Discovery = rapid.Bool().Draw(t, "discovery")
		r.Discovery = i.Discovery
		var back []Pair
		for _, p := range i.Offer() {
			answer, known, err := r.Respond(p)
			if err != nil || !known {
				t.Fatalf("%v: %v", p, err)
			}
			if answer != "" {
				back = append(back, Pair{p.Key, answer})
			}
		}
		back = append(back, Pair{"MaxRecvDataSegmentLength", strconv.Itoa(int(r.Want.MaxRecv))})
		for _, p := range back {
			known, err := i.Apply(p)
			if p.Key == "HeaderDigest" && i.Want.HeaderDigest && !r.Want.HeaderDigest ||
				p.Key == "DataDigest" && i.Want.DataDigest && !r.Want.DataDigest {
				if err == nil {
					t.Fatalf("%v: a digest that was asked for is silently not on", p)
				}
				return
			}
			if err != nil || !known {
				t.Fatalf("%v: %v", p, err)
			}
		}
		i.Finish()
		r.Finish()
		a, b := i.Params, r.Params
		if a.MaxRecv != b.PeerMaxRecv || a.PeerMaxRecv != b.MaxRecv {
			t.Fatalf("MaxRecvDataSegmentLength: %+v %+v", a, b)
		}
		a.MaxRecv, a.PeerMaxRecv, b.MaxRecv, b.PeerMaxRecv = 0, 0, 0, 0
		if a != b {
			t.Fatalf("initiator %+v, target %+v", a, b)
		}
		if a.FirstBurstLength > a.MaxBurstLength {
			t.Fatal("FirstBurstLength above MaxBurstLength")
		}
	})
}

func TestAnswersThatDoNotFollowAreRefused(t *testing.T) {
	for _, p := range []Pair{{"MaxBurstLength", "16777215"}, {"InitialR2T", "Maybe"}, {"MaxBurstLength", "12x"},
		{"HeaderDigest", "CRC32C"}, {"DefaultTime2Wait", "0"}, {"ErrorRecoveryLevel", "2"}, {"ImmediateData", ""}} {
		n := NewNegotiation(DefaultParams())
		n.Offer()
		if _, err := n.Apply(p); err == nil {
			t.Errorf("%s=%s was taken", p.Key, p.Value)
		}
	}
	for _, answer := range []string{None, RejectValue, NotUnderstood, Irrelevant, "CRC32C,None", ""} {
		want := DefaultParams()
		want.DataDigest = true
		n := NewNegotiation(want)
		n.Offer()
		if _, err := n.Apply(Pair{"DataDigest", answer}); err == nil {
			t.Errorf("DataDigest=%s was taken where CRC32C was asked for", answer)
		}
	}
	n := NewNegotiation(DefaultParams())
	if _, _, err := n.Respond(Pair{"MaxBurstLength", "1024"}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := n.Respond(Pair{"MaxBurstLength", "1024"}); err == nil {
		t.Error("a key was negotiated twice")
	}
}

func TestTextSurvivesItsWireForm(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var in []Pair
		for range rapid.IntRange(0, 10).Draw(t, "pairs") {
			in = append(in, Pair{rapid.StringMatching(`[A-Za-z]{1,63}`).Draw(t, "key"), rapid.StringMatching(`[ -~]{0,300}`).Draw(t, "value")})
		}
		out, err := ParseText(AppendText(nil, in...))
		if err != nil || len(out) != len(in) {
			t.Fatal(out, err)
		}
		for i := range in {
			if in[i] != out[i] {
				t.Fatalf("%v became %v", in[i], out[i])
			}
		}
	})
	for _, bad := range []string{"novalue\x00", "=x\x00", strings.Repeat("k", 64) + "=v\x00", "k=" + strings.Repeat("v", 9000) + "\x00",
		strings.Repeat("a=b\x00", 200)} {
		if _, err := ParseText([]byte(bad)); err == nil {
			t.Errorf("%.20q was taken", bad)
		}
	}
}

func TestCHAPProvesBothSides(t *testing.T) {
	for _, only := range []string{"5", "6", "7", "8", ""} {
		i := CHAPInitiator{Own: Credentials{"host", "host secret 1"}, Target: Credentials{"array", "array secret"}}
		r := CHAPTarget{Initiator: Credentials{"host", "host secret 1"}, Own: Credentials{"array", "array secret"}}
		offer := i.Algorithms()
		if only != "" {
			offer[0].Value = only
		}
		challenge, err := r.Challenge(offer)
		if err != nil {
			t.Fatal(err)
		}
		if only == "" && challenge[0].Value != "8" {
			t.Errorf("algorithm %s was chosen", challenge[0].Value)
		}
		answer, err := i.Answer(challenge)
		if err != nil {
			t.Fatal(err)
		}
		proof, err := r.Verify(answer)
		if err != nil || !r.Done() {
			t.Fatal(err)
		}
		if i.Done() {
			t.Error("done before the target proved itself")
		}
		if err := i.Check(proof); err != nil || !i.Done() {
			t.Fatal(err)
		}
	}
}

func TestCHAPRefusesWhoDoesNotKnowTheSecret(t *testing.T) {
	run := func(i CHAPInitiator, r CHAPTarget, change func(answer []Pair) []Pair) error {
		challenge, err := r.Challenge(i.Algorithms())
		if err != nil {
			return err
		}
		answer, err := i.Answer(challenge)
		if err != nil {
			return err
		}
		if change != nil {
			answer = change(answer)
		}
		_, err = r.Verify(answer)
		if r.Done() && err != nil && !errors.Is(err, ErrReflection) && !errors.Is(err, ErrCHAP) {
			t.Error("done with an error")
		}
		return err
	}
	good := CHAPTarget{Initiator: Credentials{"host", "secret"}}
	for name, err := range map[string]error{
		"wrong secret":      run(CHAPInitiator{Own: Credentials{"host", "other"}}, good, nil),
		"wrong name":        run(CHAPInitiator{Own: Credentials{"guest", "secret"}}, good, nil),
		"no secret is set":  run(CHAPInitiator{Own: Credentials{"host", ""}}, CHAPTarget{Initiator: Credentials{"host", ""}}, nil),
		"empty response":    run(CHAPInitiator{Own: Credentials{"host", "secret"}}, good, func(p []Pair) []Pair { p[1].Value = "0x"; return p }),
		"no response":       run(CHAPInitiator{Own: Credentials{"host", "secret"}}, good, func(p []Pair) []Pair { return p[:1] }),
		"target unprovable": run(CHAPInitiator{Own: Credentials{"host", "secret"}, Target: Credentials{"", "x"}}, good, nil),
	} {
		if !errors.Is(err, ErrCHAP) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The target's own challenge, sent back to it, is refused.
	i, r := CHAPInitiator{Own: Credentials{"host", "secret"}}, good
	r.Own = Credentials{"array", "secret"}
	challenge, _ := r.Challenge(i.Algorithms())
	answer, _ := i.Answer(challenge)
	c, _ := Lookup(challenge, "CHAP_C")
	if _, err := r.Verify(append(answer, Pair{"CHAP_I", "1"}, Pair{"CHAP_C", c})); !errors.Is(err, ErrReflection) {
		t.Errorf("reflection: %v", err)
	}
	if r.Done() {
		t.Error("done after a reflection")
	}
}

func FuzzReader(f *testing.F) {
	f.Add(make([]byte, 100), false)
	f.Add(append([]byte{1, 0x80, 0, 0, 2, 0, 0, 5}, make([]byte, 80)...), true)
	f.Fuzz(func(t *testing.T, wire []byte, digests bool) {
		r := NewReader(bytes.NewReader(wire), 0)
		r.HeaderDigest, r.DataDigest = digests, digests
		taken := 0
		for {
			h, err := r.Next()
			if err != nil {
				return
			}
			r.ExtendedCDB()
			d, err := r.Data()
			if err != nil {
				return
			}
			if len(d) != h.DataLength() {
				t.Fatalf("%d bytes of data, want %d", len(d), h.DataLength())
			}
			if taken += BHSLength + len(d); taken > len(wire) {
				t.Fatal("more came out than went in")
			}
		}
	})
}

func FuzzText(f *testing.F) {
	f.Add([]byte("InitiatorName=iqn.x\x00SessionType=Normal\x00"))
	f.Add([]byte("CHAP_A=5\x00CHAP_I=1\x00CHAP_C=0x00112233445566778899aabbccddeeff\x00CHAP_N=x\x00CHAP_R=0x00112233445566778899aabbccddeeff\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		pairs, err := ParseText(b)
		if err != nil {
			return
		}
		again, err := ParseText(AppendText(nil, pairs...))
		if err != nil || len(again) != len(pairs) {
			t.Fatalf("%v: %v", pairs, err)
		}
		n := NewNegotiation(DefaultParams())
		o := NewNegotiation(DefaultParams())
		o.Offer()
		for _, p := range pairs {
			n.Respond(p)
			o.Apply(p)
		}
		n.Finish()
		if p := n.Params; p.MaxBurstLength < 512 || p.PeerMaxRecv < 512 || p.FirstBurstLength > p.MaxBurstLength || p.MaxOutstandingR2T == 0 {
			t.Fatalf("%+v", p)
		}
		i := CHAPInitiator{Own: Credentials{"", "secret"}, Target: Credentials{"", "other"}}
		if _, err := i.Answer(pairs); err == nil && (i.Check(pairs) == nil || i.Done()) {
			t.Fatal("the target is proven without the secret")
		}
		r := CHAPTarget{Initiator: Credentials{"", "secret"}, Own: Credentials{"", "other"}}
		if _, err := r.Challenge(pairs); err == nil {
			if _, err := r.Verify(pairs); err == nil {
				t.Fatal("proven without the secret")
			}
		}
	})
}

// TestDirectSocketMovesEveryByteAndEndsLikeANetConn sends more segments than one call
// takes, and more bytes than the socket's buffers.
func TestDirectSocketMovesEveryByteAndEndsLikeANetConn(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	out, in := newDirect(a), newDirect(b)
	if out == nil || in == nil {
		t.Fatal("a TCP connection is taken for no socket")
	}
	var segs [][]byte
	var want []byte
	rnd := rand.New(rand.NewPCG(1, 2))
	for n := range 3000 {
		seg := make([]byte, rnd.IntN(20000))
		for i := range seg {
			seg[i] = byte(i*7 + n)
		}
		segs = append(segs, seg)
		want = append(want, seg...)
	}
	sent := make(chan error, 1)
	go func() { sent <- out.writeAll(vectors(segs...)) }()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(in, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("what arrived differs, or %v", err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	b.SetReadDeadline(time.Unix(1, 0))
	var ne net.Error
	if _, err := in.Read(got); !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("read after its deadline: %v", err)
	}
	b.SetReadDeadline(time.Time{})
	a.(*net.TCPConn).CloseWrite()
	if n, err := in.Read(got); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d, %v", n, err)
	}
	full := make(chan error, 1)
	go func() {
		for {
			if err := out.writeAll(vectors(got)); err != nil {
				full <- err
				return
			}
		}
	}()
	waiting := make(chan error, 1)
	go func() {
		_, err := newDirect(a).Read(make([]byte, 1))
		waiting <- err
	}()
	a.Close()
	for _, c := range []chan error{full, waiting} {
		if err := <-c; !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("after Close: %v", err)
		}
	}
	b.Close()
	if _, err := in.Read(got); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read of a closed connection: %v", err)
	}
}
