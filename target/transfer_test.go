package target

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"lunshift/iscsi"
	"lunshift/lun"
)

const largest = 1<<24 - 1

func TestBurstsOfEveryLengthArriveWithDigestsAndWithout(t *testing.T) {
	m := newMemory(512, 1<<16)
	for _, burst := range []uint32{512, 4096, 65536, 1 << 20, largest} {
		for _, digests := range []bool{false, true} {
			for _, r2ts := range []uint32{1, 64} {
				t.Run(fmt.Sprintf("%d/digests=%v/%d", burst, digests, r2ts), func(t *testing.T) {
					_, addr := begin(t, Config{MaxRecvDataSegmentLength: burst, MaxBurstLength: burst, FirstBurstLength: burst, MaxOutstandingR2T: r2ts},
						Unit{IQN: iqn, Device: quick{m}})
					i := login(t, addr, loginOptions{want: func(p *iscsi.Params) {
						p.HeaderDigest, p.DataDigest = digests, digests
						p.MaxRecv, p.MaxBurstLength, p.FirstBurstLength, p.MaxOutstandingR2T = burst, burst, burst, 64
						p.ImmediateData, p.InitialR2T = burst%4096 == 0, burst == 65536
					}})
					if i.params.MaxBurstLength != burst || i.params.PeerMaxRecv != burst || i.params.MaxOutstandingR2T != r2ts {
						t.Fatalf("agreed on %+v", i.params)
					}
					sizes := []int{512, 4096, 65536 + 512}
					if burst > 1<<15 {
						sizes = append(sizes, 3<<20+512)
					}
					if burst == largest {
						sizes = append(sizes, 20<<20)
					}
					for k, n := range sizes {
						out := pattern(n, byte(k)+byte(burst))
						i.good(rw16(0x8a, uint64(k), uint32(n/512)), out, 0)
						if got := i.good(rw16(0x88, uint64(k), uint32(n/512)), nil, n); !bytes.Equal(got.data, out) {
							t.Fatalf("%d bytes came back otherwise", n)
						}
					}
				})
			}
		}
	}
}

func TestLongestBurstsServeLunshiftsInitiatorAndQEMU(t *testing.T) {
	m := newMemory(512, 1<<17)
	_, addr := begin(t, Config{MaxRecvDataSegmentLength: largest, MaxBurstLength: largest, FirstBurstLength: largest}, Unit{IQN: iqn, Device: m})
	for _, digests := range []bool{false, true} {
		dev, err := lun.Open(t.Context(), url(addr, 0), lun.Options{HeaderDigest: digests, DataDigest: digests})
		if err != nil {
			t.Fatal(err)
		}
		out := pattern(32<<20, byte(len(addr)))
		got := make([]byte, len(out))
		if err := dev.WriteAt(t.Context(), out, 8); err != nil {
			t.Error(err)
		}
		if err := dev.ReadAt(t.Context(), got, 8); err != nil || !bytes.Equal(got, out) {
			t.Errorf("32 MiB came back otherwise, or %v", err)
		}
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, digest := range []string{"none", "crc32c"} { // of headers; libiscsi has no other
		out := mustTool(t, "qemu-io", "--image-opts", "-c", "write -P 0x77 1M 24M", "-c", "read -P 0x77 1M 24M",
			fmt.Sprintf("driver=iscsi,transport=tcp,portal=%s,target=%s,lun=0,header-digest=%s", addr, iqn, digest))
		if strings.Contains(out, "failed") || strings.Contains(strings.ToLower(out), "error") {
			t.Error(out)
		}
	}
}

// announce sends a WRITE of blocks of which no data comes by itself.
func announce(i *initiator, blocks uint32, expected uint32) *iscsi.BHS {
	h := i.command(rw16(0x8a, 0, blocks), iscsi.FlagWrite|iscsi.FlagFinal, 0)
	h.SetExpectedLength(expected)
	i.send(h, nil)
	return h
}

func TestSeveralR2TsAreOpenAndAnsweredInOrder(t *testing.T) {
	m := newMemory(512, 4096)
	_, addr := begin(t, Config{MaxBurstLength: 64 << 10, MaxOutstandingR2T: 4}, Unit{IQN: iqn, Device: m})
	want := func(p *iscsi.Params) { p.MaxOutstandingR2T, p.MaxRecv = 16, 8192 }
	i := login(t, addr, loginOptions{want: want})
	i.params.PeerMaxRecv = 8192 // of our own Data-Outs: eight to a burst
	const n = 1 << 20
	out := pattern(n, 7)
	h := announce(i, n/512, n)
	var open []pduIn
	next := uint32(0)
	r2t := func() {
		p := i.recv()
		if p.Opcode() != iscsi.OpR2T || p.ITT() != h.ITT() || p.DataSN() != next || p.BufferOffset() != next<<16 || p.DesiredLength() != 64<<10 {
			t.Fatalf("%v number %d of %d bytes at %d, want R2T %d", p.Opcode(), p.DataSN(), p.DesiredLength(), p.BufferOffset(), next)
		}
		next++
		open = append(open, p)
	}
	for range 4 {
		r2t()
	}
	for len(open) > 0 {
		p := open[0]
		open = open[1:]
		i.dataOut(&p.BHS, p.TTT(), out, int(p.BufferOffset()), int(p.BufferOffset()+p.DesiredLength()))
		if next < n>>16 {
			r2t()
		}
	}
	if p := i.recv(); p.Opcode() != iscsi.OpSCSIResponse || p.Status() != 0 || p.DataSN() != n>>16 {
		t.Fatalf("%v, status %02Xh, ExpDataSN %d", p.Opcode(), p.Status(), p.DataSN())
	}
	if !bytes.Equal(m.bytes()[:n], out) {
		t.Error("the device holds something else")
	}

	// A part that is lost fails the command, a sequence out of turn the connection.
	h = announce(i, n/512, n)
	next = 0
	for range 4 {
		r2t()
	}
	p := open[0]
	var d iscsi.BHS
	d.SetOpcode(iscsi.OpDataOut)
	d.SetITT(h.ITT())
	d.SetTTT(p.TTT())
	d.SetDataSN(1)
	i.send(&d, out[:8192])
	// The answer waits for the end of all that was asked for (RFC 7143 7.8, 7.9).
	for k, p := range open {
		if r := i.do(tur, nil, 0); r.status != 0 {
			t.Fatalf("with %d R2Ts open: %v", len(open)-k, r)
		}
		i.dataOut(&p.BHS, p.TTT(), out, int(p.BufferOffset()), int(p.BufferOffset()+p.DesiredLength()))
	}
	if r := i.finish(h.ITT(), out); !r.is(senseDataLost) {
		t.Errorf("after a gap in DataSN: %v", r)
	}
	for _, wrong := range []string{"the second first", "beyond the first", "ends too early", "a tag nobody gave"} {
		i := login(t, addr, loginOptions{want: want})
		h := announce(i, n/512, n)
		a, b := i.recv(), i.recv()
		i.recv()
		i.recv()
		var d iscsi.BHS
		d.SetOpcode(iscsi.OpDataOut)
		d.SetITT(h.ITT())
		d.SetTTT(a.TTT())
		length := 8192
		switch wrong {
		case "the second first":
			d.SetTTT(b.TTT())
			d.SetBufferOffset(b.BufferOffset())
		case "beyond the first":
			length = 66 << 10
		case "ends too early":
			d.SetFlags(iscsi.FlagFinal)
		case "a tag nobody gave":
			d.SetTTT(0x7777)
		}
		i.send(&d, make([]byte, length))
		i.expectClosed()
	}
	if !bytes.Equal(m.bytes()[:n], out) {
		t.Error("a write that failed was done")
	}
}

func TestAnnouncedDataTakesNoMemory(t *testing.T) {
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: newMemory(512, 1<<17)})
	i := login(t, addr, loginOptions{want: func(p *iscsi.Params) { p.MaxOutstandingR2T = 8 }})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 64 {
		announce(i, maxTransfer/512, math.MaxUint32) // 4 GiB less one
	}
	for range 8 { // one command is admitted
		if p := i.recv(); p.Opcode() != iscsi.OpR2T {
			t.Fatalf("got %v", p.Opcode())
		}
	}
	waitFor(t, "commands that wait", func() bool {
		s.bytes.mu.Lock()
		defer s.bytes.mu.Unlock()
		return len(s.bytes.waiting) == 63
	})
	runtime.ReadMemStats(&after)
	// The admitted one's would be 32 MiB.
	if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
		t.Errorf("%d bytes were allocated for 64 commands without data", n)
	}
	i.nc.Close()
	waitFor(t, "the end of the session", func() bool { return len(s.Sessions(iqn)) == 0 })
	allBack(t, s)
}

// All the commands of 256 sessions are there at once, at a device that does not answer.
func TestDeepQueuesOfManySessionsKeepToBytesInFlight(t *testing.T) {
	const depth, size, limit = 32, 64 << 10, 64 << 20
	sessions := 256
	if raceEnabled { // which makes each byte dear
		sessions = 48
	}
	m := newMemory(512, uint64(sessions*size/512))
	m.entered = make(chan struct{}, sessions*depth)
	s, addr := begin(t, Config{BytesInFlight: limit, NopInterval: -1}, Unit{IQN: iqn, Device: m})
	all := make([]*initiator, sessions)
	for k := range all {
		all[k] = login(t, addr, loginOptions{isid: iscsi.ISID{1, byte(k), byte(k >> 8)}})
		all[k].nc.SetDeadline(time.Now().Add(120 * time.Second))
	}
	live := func() uint64 {
		var now runtime.MemStats
		runtime.GC()
		runtime.GC() // what the pools keep
		runtime.ReadMemStats(&now)
		return now.HeapAlloc
	}
	hold := make(chan struct{})
	m.set(hold, nil)
	data := make([][]byte, sessions)
	for k := range data {
		data[k] = pattern(size, byte(k)+1)
	}
	before := live()
	var sent, over sync.WaitGroup
	var refused, good int
	var mu sync.Mutex
	for k, i := range all {
		sent.Add(1)
		over.Go(func() {
			tag, sn := i.itt, i.cmdSN
			send := func() bool {
				var h iscsi.BHS
				h.SetOpcode(iscsi.OpSCSICommand)
				h.SetFlags(iscsi.FlagWrite | iscsi.FlagFinal | iscsi.AttrSimple)
				tag++
				h.SetITT(tag)
				h.SetExpectedLength(size)
				h.SetCmdSN(sn)
				sn++
				copy(h.CDB(), rw16(0x8a, uint64(k*size/512), size/512))
				h.SetDataLength(size)
				_, err := (&net.Buffers{h[:], data[k]}).WriteTo(i.nc)
				return err == nil
			}
			for range depth {
				if !send() {
					t.Error("cannot send")
				}
			}
			sent.Done()
			for left := depth; left > 0; {
				p, err := i.next()
				if err != nil || p.Opcode() != iscsi.OpSCSIResponse {
					t.Errorf("session %d: %v, %v", k, p.Opcode(), err)
					return
				}
				mu.Lock()
				switch p.Status() {
				case iscsi.StatusGood:
					good++
					left--
				case iscsi.StatusTaskSetFull:
					if refused++; !send() {
						t.Error("cannot send again")
					}
				default:
					t.Errorf("session %d: status %02Xh", k, p.Status())
					left--
				}
				mu.Unlock()
				if p.Status() == iscsi.StatusTaskSetFull {
					time.Sleep(50 * time.Millisecond) // as an initiator with any sense
				}
			}
		})
	}
	sent.Wait()
	waitFor(t, "memory that is all in use", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return refused > sessions
	})
	// Buffers of what is on its way in besides, and a little for the tasks themselves.
	if n := int64(live()) - int64(before); n > limit+int64(sessions)*(256<<10)+16<<20 {
		t.Errorf("%d MiB are in use, of %d in flight", n>>20, limit>>20)
	}
	close(hold)
	over.Wait()
	if good != sessions*depth {
		t.Errorf("%d of %d writes were done", good, sessions*depth)
	}
	for k, p := range data {
		if !bytes.Equal(m.bytes()[k*size:(k+1)*size], p) {
			t.Fatalf("the data of session %d is not there", k)
		}
	}
	allBack(t, s)
}

func TestBidirectionalCommandsAreRefused(t *testing.T) {
	m := newMemory(512, 64)
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{})
	h := i.command(rw16(0x8a, 0, 1), iscsi.FlagRead|iscsi.FlagWrite|iscsi.FlagFinal, 512)
	i.send(h, pattern(512, 1))
	if r := i.finish(h.ITT(), nil); !r.is(senseInvalidIU) {
		t.Errorf("with both flags: %v", r)
	}
	h = i.command(rw16(0x8a, 0, 1), iscsi.FlagWrite|iscsi.FlagFinal, 512)
	w := iscsi.NewWriter(i.nc, writeLocker{})
	w.Append(h, []byte{0, 5, 2, 0, 0, 0, 2, 0}, pattern(512, 1), nil)
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if r := i.finish(h.ITT(), nil); !r.is(senseInvalidIU) {
		t.Errorf("with a bidirectional length: %v", r)
	}
	if got := i.good(rw16(0x88, 0, 1), nil, 512); !bytes.Equal(got.data, make([]byte, 512)) {
		t.Error("it was written")
	}
}

func TestDamagedDataOutFailsItsCommandAndNoMore(t *testing.T) {
	m := newMemory(512, 4096)
	s, addr := begin(t, Config{}, Unit{IQN: iqn, Device: m})
	i := login(t, addr, loginOptions{want: func(p *iscsi.Params) { p.HeaderDigest, p.DataDigest = true, true }})
	h := announce(i, 128, 64<<10)
	p := i.recv()
	var d iscsi.BHS
	d.SetOpcode(iscsi.OpDataOut)
	d.SetFlags(iscsi.FlagFinal)
	d.SetITT(h.ITT())
	d.SetTTT(p.TTT())
	d.SetDataLength(64 << 10)
	data := pattern(64<<10, 9)
	table := crc32.MakeTable(crc32.Castagnoli)
	b := binary.LittleEndian.AppendUint32(d[:], crc32.Checksum(d[:], table))
	b = append(b, data...)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(data, table)^1)
	if _, err := i.nc.Write(b); err != nil {
		t.Fatal(err)
	}
	if p := i.recv(); p.Opcode() != iscsi.OpReject || p.Response() != iscsi.RejectDataDigest {
		t.Fatalf("%v, reason %02Xh", p.Opcode(), p.Response())
	}
	if r := i.finish(h.ITT(), nil); !r.is(senseDataLost) {
		t.Errorf("the command: %v", r)
	}
	if got := i.good(rw16(0x88, 0, 128), nil, 64<<10); !bytes.Equal(got.data, make([]byte, 64<<10)) {
		t.Error("damaged data was written")
	}
	i.good(rw16(0x8a, 0, 128), data, 0)
	allBack(t, s)

	// A header that is damaged cannot be told from another: the connection ends.
	h = i.command(tur, 0, 0)
	b = binary.LittleEndian.AppendUint32(h[:], crc32.Checksum(h[:], table)^1)
	if _, err := i.nc.Write(b); err != nil {
		t.Fatal(err)
	}
	i.expectClosed()
}

// opened is a file as a unit's device.
func opened(t testing.TB) lun.Device {
	t.Helper()
	path := t.TempDir() + "/unit"
	if err := os.WriteFile(path, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := lun.Open(context.Background(), path, lun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

// burstOf makes a function that has depth 4 KiB commands in flight at once.
func burstOf(t testing.TB, i *initiator, cdb []byte, flags byte, out []byte, in, depth int) func() {
	h := i.command(cdb, flags|iscsi.FlagFinal, max(len(out), in))
	i.cmdSN--
	h.SetDataLength(len(out))
	pdu := append(append([]byte{}, h[:]...), out...)
	all := bytes.Repeat(pdu, depth)
	answer := make([]byte, depth*(iscsi.BHSLength+in))
	return func() {
		for k := range depth {
			head := (*iscsi.BHS)(all[k*len(pdu):])
			head.SetCmdSN(i.cmdSN)
			head.SetITT(uint32(k))
			binary.BigEndian.PutUint64(head.CDB()[2:], uint64(k*8)) // blocks of its own
			i.cmdSN++
		}
		if _, err := i.nc.Write(all); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(i.nc, answer); err != nil {
			t.Fatal(err)
		}
		for k := range depth {
			if (*iscsi.BHS)(answer[k*len(answer)/depth:]).Status() != 0 {
				t.Fatal("not GOOD")
			}
		}
	}
}

// portPaths are 4 KiB commands through the port onto a file and back.
func portPaths(t testing.TB, depth int) map[string]func() {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, Device: lun.Serialize(opened(t))})
	paths := map[string]func(){}
	i := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
	i.nc.SetDeadline(time.Time{})
	paths["write"] = burstOf(t, i, rw16(0x8a, 0, 8), iscsi.FlagWrite, make([]byte, 4096), 0, depth)
	i = login(t, addr, loginOptions{isid: iscsi.ISID{2}})
	i.nc.SetDeadline(time.Time{})
	paths["read"] = burstOf(t, i, rw16(0x88, 0, 8), iscsi.FlagRead, nil, 4096, depth)
	for range 200 {
		for _, f := range paths {
			f()
		}
	}
	return paths
}

func TestCommandsInFlightOnAFileDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, depth := range []int{1, 32} {
		for what, f := range portPaths(t, depth) {
			if n := testing.AllocsPerRun(500, f); n > 0 {
				t.Errorf("%d %ss of 4 KiB at once allocate %.2f times", depth, what, n)
			}
		}
	}
}

// BenchmarkPort is a 4 KiB command from socket to file and back; b.N counts bursts of
// depth commands.
func BenchmarkPort(b *testing.B) {
	for _, depth := range []int{1, 32} {
		for what, f := range portPaths(b, depth) {
			b.Run(fmt.Sprintf("%s/depth=%d", what, depth), func(b *testing.B) {
				b.SetBytes(int64(depth) * 4096)
				b.ReportAllocs()
				for b.Loop() {
					f()
				}
			})
		}
	}
}
