package target

import (
	"bytes"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"lunshift/iscsi"
)

// flood is what a hostile session sends without end: PDU n of it, whose CmdSN is the one due
// where due is set.
type flood struct {
	name string
	due  bool
	pdu  func(h *iscsi.BHS, n uint32) (data []byte)
}

var floods = []flood{
	{"commands beyond the window", false, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpSCSICommand)
		h.SetFlags(iscsi.FlagFinal | iscsi.FlagRead | iscsi.AttrSimple)
		h.SetCmdSN(h.CmdSN() + 1000 + n)
		h.SetExpectedLength(512)
		copy(h.CDB(), rw16(0x88, 0, 1))
		return nil
	}},
	{"immediate commands", false, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpSCSICommand)
		h.SetImmediate()
		h.SetFlags(iscsi.FlagFinal | iscsi.FlagRead | iscsi.AttrSimple)
		h.SetExpectedLength(32 << 10)
		copy(h.CDB(), rw16(0x88, 0, 64))
		return nil
	}},
	{"reads within the window", true, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpSCSICommand)
		h.SetFlags(iscsi.FlagFinal | iscsi.FlagRead | iscsi.AttrSimple)
		h.SetExpectedLength(32 << 10)
		copy(h.CDB(), rw16(0x88, 0, 64))
		return nil
	}},
	{"writes whose data never comes", true, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpSCSICommand)
		h.SetFlags(iscsi.FlagFinal | iscsi.FlagWrite | iscsi.AttrSimple)
		h.SetExpectedLength(32 << 10)
		copy(h.CDB(), rw16(0x8a, 0, 64))
		return nil
	}},
	{"commands that declare 4 GiB", true, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpSCSICommand)
		h.SetFlags(iscsi.FlagFinal | iscsi.FlagWrite | iscsi.AttrSimple)
		h.SetExpectedLength(1<<32 - 1)
		copy(h.CDB(), rw16(0x8a, 0, 64))
		return nil
	}},
	{"task management of nothing", false, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpTaskMgmt)
		h.SetImmediate()
		h.SetFlags(iscsi.FlagFinal | iscsi.TMFAbortTask)
		h.SetTTT(n ^ 0x5555)
		return nil
	}},
	{"pings with data", false, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpNopOut)
		h.SetImmediate()
		h.SetFlags(iscsi.FlagFinal)
		h.SetTTT(iscsi.NoTag)
		return make([]byte, 4096)
	}},
	{"text requests that go on", true, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpTextRequest)
		h.SetFlags(iscsi.FlagContinue)
		h.SetTTT(iscsi.NoTag)
		return bytes.Repeat([]byte("X-a=b\x00"), 300)
	}},
	{"data for nothing", false, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpDataOut)
		h.SetFlags(iscsi.FlagFinal)
		h.SetTTT(n)
		return make([]byte, 8192)
	}},
	{"SNACKs", false, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(iscsi.OpSNACK)
		h.SetFlags(iscsi.FlagFinal)
		h.SetTTT(iscsi.NoTag)
		return nil
	}},
	{"opcodes that nobody knows", false, func(h *iscsi.BHS, n uint32) []byte {
		h.SetOpcode(0x1c)
		h.SetFlags(iscsi.FlagFinal)
		return nil
	}},
}

// TestFloodOfOneSessionDisturbsNoOther: two sessions send as much of one thing as the target
// takes, one that reads the answers and one that does not; a third one's commands all
// succeed meanwhile, with few goroutines and little memory. When it is over nothing is left.
func TestFloodOfOneSessionDisturbsNoOther(t *testing.T) {
	for _, fl := range floods {
		t.Run(fl.name, func(t *testing.T) {
			const inFlight = 64 << 20
			s, addr := begin(t, Config{NopInterval: -1, BytesInFlight: inFlight}, Unit{IQN: iqn, Device: quick{newMemory(512, 64)}})
			victim := login(t, addr, loginOptions{isid: iscsi.ISID{1}})
			var before runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			goroutines := runtime.NumGoroutine()

			var hostile sync.WaitGroup
			var ends []net.Conn
			defer func() {
				for _, nc := range ends {
					nc.Close()
				}
				hostile.Wait()
				waitFor(t, "the end of the flood", func() bool { return len(s.Sessions(iqn)) <= 1 })
				allBack(t, s)
			}()
			started := make(chan struct{}, 2)
			for k := range 2 {
				i := login(t, addr, loginOptions{isid: iscsi.ISID{byte(2 + k)}})
				ends = append(ends, i.nc)
				if k == 0 {
					hostile.Go(func() { io.Copy(io.Discard, i.nc) })
				}
				hostile.Go(func() {
					sn := i.cmdSN
					for n := uint32(0); ; {
						var batch []byte
						for range 32 {
							var h iscsi.BHS
							h.SetITT(n)
							h.SetCmdSN(sn)
							data := fl.pdu(&h, n)
							h.SetDataLength(len(data))
							batch = append(append(batch, h[:]...), data...)
							batch = append(batch, make([]byte, -len(data)&3)...)
							if n++; fl.due {
								sn++
							}
						}
						_, err := i.nc.Write(batch)
						if n == 32 {
							started <- struct{}{}
						}
						if err != nil {
							return // the target has had enough, or the test is over
						}
					}
				})
			}
			<-started
			<-started
			victim.nc.SetDeadline(time.Now().Add(2 * time.Minute))
			for n := range 30 {
				out := bytes.Repeat([]byte{byte(n + 1)}, 512)
				lba := uint64(n % 64)
				if r := victim.do(rw16(0x8a, lba, 1), out, 0); r.status != iscsi.StatusGood {
					t.Fatalf("write %d: %v", n, r)
				}
				if r := victim.do(rw16(0x88, lba, 1), nil, 512); r.status != iscsi.StatusGood || !bytes.Equal(r.data, out) {
					t.Fatalf("read %d: %v", n, r)
				}
				if g := runtime.NumGoroutine(); g > goroutines+400 {
					t.Fatalf("%d goroutines, %d before", g, goroutines)
				}
			}
			var during runtime.MemStats
			runtime.ReadMemStats(&during)
			if during.HeapInuse > before.HeapInuse+2*inFlight {
				t.Errorf("%d bytes of heap, %d before", during.HeapInuse, before.HeapInuse)
			}
		})
	}
}
