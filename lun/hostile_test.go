package lun

import (
	"bytes"
	"context"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lunshift/iscsi"
)

// answer begins a PDU to the initiator, for the task of req.
func (c *fakeConn) answer(op iscsi.Opcode, req *iscsi.BHS, set func(h *iscsi.BHS)) *iscsi.BHS {
	h := &iscsi.BHS{}
	h.SetOpcode(op)
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(req.ITT())
	h.SetTTT(iscsi.NoTag)
	c.numbers(h, false)
	if set != nil {
		set(h)
	}
	return h
}

// raw sends a header as it is, with its own data length.
func (c *fakeConn) raw(h *iscsi.BHS, data []byte) {
	c.nc.Write(append(append([]byte{}, h[:]...), data...))
}

// misconduct is one thing a hostile target does once, in the middle of a command.
type misconduct struct {
	name string
	do   func(c *fakeConn, req *iscsi.BHS)
	// after: the command is answered as it should be in the end.
	after bool
}

// TestMisconductInACommandCostsTheConnectionAndNothingElse: the command is done again on the
// next connection, or was done on this one, and its data is right.
func TestMisconductInACommandCostsTheConnectionAndNothingElse(t *testing.T) {
	unknown := func(h *iscsi.BHS) { h.SetITT(0x7fff0003) }
	reads := []misconduct{
		{name: "data beyond MaxRecvDataSegmentLength", do: func(c *fakeConn, req *iscsi.BHS) {
			c.raw(c.answer(iscsi.OpDataIn, req, func(h *iscsi.BHS) { h.SetDataLength(1<<24 - 1) }), make([]byte, 8192))
		}},
		{name: "data behind the buffer", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpDataIn, req, func(h *iscsi.BHS) { h.SetBufferOffset(req.ExpectedLength()) }), make([]byte, 512))
		}},
		{name: "data across the buffer's end", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpDataIn, req, nil), make([]byte, req.ExpectedLength()+512))
		}},
		{name: "data with a gap before it", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpDataIn, req, func(h *iscsi.BHS) { h.SetBufferOffset(512) }), make([]byte, 512))
		}},
		{name: "data with the number of another", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpDataIn, req, func(h *iscsi.BHS) {
				h.SetFlags(iscsi.FlagFinal | iscsi.FlagStatus)
				h.SetDataSN(1)
			}), make([]byte, req.ExpectedLength()))
		}},
		{name: "data twice", do: func(c *fakeConn, req *iscsi.BHS) {
			for range 2 {
				c.send(c.answer(iscsi.OpDataIn, req, nil), make([]byte, 512))
			}
		}},
		{name: "an offset that overflows", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpDataIn, req, func(h *iscsi.BHS) { h.SetBufferOffset(0xfffffe00) }), make([]byte, 1024))
		}},
		{name: "data of another task", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpDataIn, req, unknown), make([]byte, 512))
		}},
		{name: "an answer to another task", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpSCSIResponse, req, unknown), nil)
		}},
		{name: "an answer to the slot's task before", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpSCSIResponse, req, func(h *iscsi.BHS) { h.SetITT(req.ITT() - 1<<16) }), nil)
		}},
		{name: "an R2T for a read", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpR2T, req, func(h *iscsi.BHS) { h.SetTTT(1); h.SetDesiredLength(512) }), nil)
		}},
		{name: "a task management answer to nothing", do: func(c *fakeConn, req *iscsi.BHS) { c.send(c.answer(iscsi.OpTaskMgmtResp, req, nil), nil) }},
		{name: "a logout answer to nothing", do: func(c *fakeConn, req *iscsi.BHS) { c.send(c.answer(iscsi.OpLogoutResp, req, nil), nil) }},
		{name: "a text answer to nothing", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpTextResponse, req, nil), []byte("SendTargets=All\x00"))
		}},
		{name: "a login answer", do: func(c *fakeConn, req *iscsi.BHS) { c.send(c.answer(iscsi.OpLoginResponse, req, nil), nil) }},
		{name: "a request instead of an answer", do: func(c *fakeConn, req *iscsi.BHS) { c.send(c.answer(iscsi.OpSCSICommand, req, nil), nil) }},
		{name: "an answer to no ping", do: func(c *fakeConn, req *iscsi.BHS) { c.send(c.answer(iscsi.OpNopIn, req, nil), nil) }},
		{name: "a reject", do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpReject, req, func(h *iscsi.BHS) { h.SetResponse(4); h.SetITT(iscsi.NoTag) }), make([]byte, 48))
		}},
		{name: "half a header", do: func(c *fakeConn, req *iscsi.BHS) { c.nc.Write(make([]byte, 17)); c.nc.Close() }},
		{name: "the drop of the connection", do: func(c *fakeConn, req *iscsi.BHS) { c.async(iscsi.AsyncConnectionDrop) }},
		{name: "the drop of the session", do: func(c *fakeConn, req *iscsi.BHS) { c.async(iscsi.AsyncSessionDrop) }},
		{name: "a wish to negotiate", do: func(c *fakeConn, req *iscsi.BHS) { c.async(iscsi.AsyncNegotiate) }},
		{name: "an asynchronous event of a vendor", after: true, do: func(c *fakeConn, req *iscsi.BHS) { c.async(255) }},
		{name: "an asynchronous event that nobody knows", after: true, do: func(c *fakeConn, req *iscsi.BHS) { c.async(77) }},
		{name: "a SCSI event without sense", after: true, do: func(c *fakeConn, req *iscsi.BHS) { c.async(0) }},
		{name: "a jump of StatSN", after: true, do: func(c *fakeConn, req *iscsi.BHS) { c.statSN += 1 << 30 }},
		{name: "a step back of StatSN", after: true, do: func(c *fakeConn, req *iscsi.BHS) { c.statSN -= 1000 }},
		{name: "a window of half the numbers", after: true, do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpNopIn, req, func(h *iscsi.BHS) { h.SetITT(iscsi.NoTag); h.SetMaxCmdSN(h.ExpCmdSN() + 1<<31 - 1) }), nil)
		}},
		{name: "a window that moves back", after: true, do: func(c *fakeConn, req *iscsi.BHS) {
			c.send(c.answer(iscsi.OpNopIn, req, func(h *iscsi.BHS) { h.SetITT(iscsi.NoTag); h.SetMaxCmdSN(h.ExpCmdSN() - 1<<20) }), nil)
		}},
		{name: "ten thousand pings", do: func(c *fakeConn, req *iscsi.BHS) {
			h := c.answer(iscsi.OpNopIn, req, func(h *iscsi.BHS) { h.SetITT(iscsi.NoTag); h.SetTTT(5) })
			c.nc.Write(bytes.Repeat(h[:], 10000))
			c.nc.Close()
		}},
	}
	writes := []misconduct{
		{name: "an R2T behind the data", do: func(c *fakeConn, req *iscsi.BHS) { c.r2tFor(req, req.ExpectedLength(), 512) }},
		{name: "an R2T across the end", do: func(c *fakeConn, req *iscsi.BHS) { c.r2tFor(req, 512, req.ExpectedLength()) }},
		{name: "an R2T that overflows", do: func(c *fakeConn, req *iscsi.BHS) { c.r2tFor(req, 0xfffffe00, 1024) }},
		{name: "an R2T for nothing", do: func(c *fakeConn, req *iscsi.BHS) { c.r2tFor(req, 0, 0) }},
		{name: "an R2T beyond MaxBurstLength", do: func(c *fakeConn, req *iscsi.BHS) { c.r2tFor(req, 0, req.ExpectedLength()) }},
		{name: "an R2T with a gap before it", do: func(c *fakeConn, req *iscsi.BHS) { c.r2tFor(req, 512, 512) }},
		{name: "the same R2T for ever", do: func(c *fakeConn, req *iscsi.BHS) {
			for range 3 {
				c.r2tFor(req, 0, 1024)
			}
		}},
		{name: "an R2T for each byte", do: func(c *fakeConn, req *iscsi.BHS) {
			var all []byte
			for off := range uint32(10000) {
				h := c.answer(iscsi.OpR2T, req, func(h *iscsi.BHS) { h.SetTTT(1); h.SetBufferOffset(off); h.SetDesiredLength(1) })
				all = append(all, h[:]...)
			}
			go io.Copy(io.Discard, c.nc)
			c.nc.Write(all)
			c.nc.Close()
		}},
	}
	for _, kind := range []struct {
		name  string
		op    byte
		cases []misconduct
	}{{"read", opRead16, reads}, {"write", opWrite16, writes}} {
		for _, m := range kind.cases {
			t.Run(kind.name+" with "+m.name, func(t *testing.T) {
				t.Parallel()
				f := newFakeTarget(t)
				f.want.InitialR2T, f.want.ImmediateData, f.want.MaxBurstLength = true, false, 16<<10
				f.r2t = 8192
				var done atomic.Bool
				f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
					if h.Opcode() != iscsi.OpSCSICommand || h.CDB()[0] != kind.op || done.Swap(true) {
						return false
					}
					m.do(c, h)
					return !m.after
				})
				dev := f.open(Options{})
				roundTrip(t, dev, 64<<10)
				roundTrip(t, dev, 512)
				if !done.Load() {
					t.Fatal("the target behaved")
				}
				if n := f.loginCount(); m.after && n != 1 || !m.after && n < 2 {
					t.Fatalf("%d logins", n)
				}
			})
		}
	}
}

func (c *fakeConn) r2tFor(req *iscsi.BHS, off, n uint32) {
	c.send(c.answer(iscsi.OpR2T, req, func(h *iscsi.BHS) { h.SetTTT(1); h.SetBufferOffset(off); h.SetDesiredLength(n) }), nil)
}

func (c *fakeConn) async(event byte) {
	h := &iscsi.BHS{}
	h.SetOpcode(iscsi.OpAsync)
	h.SetFlags(iscsi.FlagFinal)
	h.SetITT(iscsi.NoTag)
	h.SetAsync(event, 0, 0, 0, 0)
	c.numbers(h, true)
	c.send(h, nil)
}

// TestGoodThatCannotBeTrueIsAFailure: a command is not done because the target says so.
func TestGoodThatCannotBeTrueIsAFailure(t *testing.T) {
	t.Run("read without its data", func(t *testing.T) {
		f := newFakeTarget(t)
		dev := f.open(Options{})
		f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
			if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opRead16 {
				c.good(h)
				return true
			}
			return false
		})
		if err := dev.ReadAt(t.Context(), make([]byte, 4096), 0); err == nil {
			t.Fatal("a read without data succeeds")
		}
	})
	t.Run("write that was not asked for", func(t *testing.T) {
		f := newFakeTarget(t)
		f.want.InitialR2T, f.want.ImmediateData = true, false
		dev := f.open(Options{})
		f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
			if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opWrite16 {
				c.good(h)
				return true
			}
			return false
		})
		if err := dev.WriteAt(t.Context(), make([]byte, 4096), 0); err == nil {
			t.Fatal("a write whose data stayed here succeeds")
		}
	})
	t.Run("sense that claims to be longer than it is", func(t *testing.T) {
		f := newFakeTarget(t)
		dev := f.open(Options{})
		f.bend(func(c *fakeConn, h *iscsi.BHS, _ []byte) bool {
			if h.Opcode() == iscsi.OpSCSICommand && h.CDB()[0] == opRead16 {
				c.reply(iscsi.OpSCSIResponse, h, iscsi.FlagFinal, 0, statusCheckCondition, []byte{0xff, 0xff, 0x72, 0x03, 0x11})
				return true
			}
			return false
		})
		if err := dev.ReadAt(t.Context(), make([]byte, 4096), 0); err == nil {
			t.Fatal("a read with CHECK CONDITION succeeds")
		}
	})
}

// TestHostileLoginEndsInAnError: whatever a target does in place of a login, opening ends
// with an error in time, and with no more memory than a login may take.
func TestHostileLoginEndsInAnError(t *testing.T) {
	respond := func(req *iscsi.BHS, flags byte, text string) []byte {
		var h iscsi.BHS
		h.SetOpcode(iscsi.OpLoginResponse)
		h.SetFlags(flags)
		h.SetISID(req.ISID())
		h.SetITT(req.ITT())
		h.SetMaxCmdSN(8)
		h.SetDataLength(len(text))
		return append(h[:], append([]byte(text), make([]byte, -len(text)&3)...)...)
	}
	stay := func(req *iscsi.BHS) byte { return byte(req.CSG()) << 2 }
	for name, answer := range map[string]func(req *iscsi.BHS) []byte{
		"text that does not end": func(req *iscsi.BHS) []byte {
			return respond(req, stay(req)|iscsi.FlagContinue, strings.Repeat("X", 8000))
		},
		"empty text that does not end": func(req *iscsi.BHS) []byte { return respond(req, stay(req)|iscsi.FlagContinue, "") },
		"no step forward":              func(req *iscsi.BHS) []byte { return respond(req, stay(req), "") },
		"keys for ever": func(req *iscsi.BHS) []byte {
			return respond(req, stay(req), "X-a=1\x00")
		},
		"the same key for ever": func(req *iscsi.BHS) []byte { return respond(req, stay(req), "MaxBurstLength=512\x00") },
		"another task tag":      func(req *iscsi.BHS) []byte { r := respond(req, req.Flags(), ""); r[19] ^= 1; return r },
		"another opcode":        func(req *iscsi.BHS) []byte { r := respond(req, req.Flags(), ""); r[0] = byte(iscsi.OpNopIn); return r },
		"another stage":         func(req *iscsi.BHS) []byte { return respond(req, iscsi.StageFullFeature<<2, "") },
		"a stage too far":       func(req *iscsi.BHS) []byte { return respond(req, stay(req)|iscsi.FlagTransit|3, "AuthMethod=None\x00") },
		"a segment of 16 MiB": func(req *iscsi.BHS) []byte {
			r := respond(req, req.Flags(), "")
			r[5], r[6], r[7] = 255, 255, 255
			return append(r, make([]byte, 1<<20)...)
		},
		"keys without a value": func(req *iscsi.BHS) []byte { return respond(req, req.Flags(), "MaxBurstLength\x00") },
		"a key of nonsense":    func(req *iscsi.BHS) []byte { return respond(req, req.Flags(), "=\x00=\x00\x00\x00\xff=\xff\x00") },
		"a number beyond numbers": func(req *iscsi.BHS) []byte {
			return respond(req, req.Flags(), "MaxRecvDataSegmentLength=99999999999999999999\x00")
		},
		"an unknown status": func(req *iscsi.BHS) []byte { r := respond(req, 0, ""); r[36], r[37] = 0x77, 0x77; return r },
		"a redirection to nowhere": func(req *iscsi.BHS) []byte {
			r := respond(req, 0, "TargetAddress=\x00")
			r[36], r[37] = 1, 1
			return r
		},
		"silence":        func(req *iscsi.BHS) []byte { return nil },
		"a closed door":  func(req *iscsi.BHS) []byte { return []byte{0} },
		"half an answer": func(req *iscsi.BHS) []byte { return respond(req, req.Flags(), "")[:20] },
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var serving sync.WaitGroup
			serving.Go(func() {
				for {
					nc, err := ln.Accept()
					if err != nil {
						return
					}
					serving.Go(func() {
						defer nc.Close()
						r := iscsi.NewReader(nc, 64<<10)
						for {
							h, err := r.Next()
							if err != nil {
								return
							}
							head := *h
							if _, err := r.Data(); err != nil {
								return
							}
							p := answer(&head)
							if len(p) == 1 {
								return
							}
							if _, err := nc.Write(p); err != nil {
								return
							}
						}
					})
				}
			})
			defer serving.Wait()
			defer ln.Close()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			dev, err := Open(ctx, "iscsi://"+ln.Addr().String()+"/iqn.2026-11.net.example:hostile/0", Options{LoginTimeout: time.Second})
			if err == nil {
				dev.Close()
				t.Fatal("it opens")
			}
			if ctx.Err() != nil {
				t.Fatal("it does not end by itself")
			}
			if strings.ContainsAny(err.Error(), "\x00\xff\n") {
				t.Errorf("the error has the target's bytes in it: %q", err)
			}
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
				t.Errorf("the login took %d bytes of memory", n)
			}
			t.Log(err)
		})
	}
}

// TestRedirectionsThatGoInACircleEnd: the target sends the initiator on, always to itself.
func TestRedirectionsThatGoInACircleEnd(t *testing.T) {
	f := newFakeTarget(t)
	var logins atomic.Int32
	go func() {
		for {
			nc, err := f.ln.Accept()
			if err != nil {
				return
			}
			logins.Add(1)
			r := iscsi.NewReader(nc, 64<<10)
			if h, err := r.Next(); err == nil {
				c := &fakeConn{fakeTarget: f, nc: nc}
				c.send(c.answer(iscsi.OpLoginResponse, h, func(a *iscsi.BHS) { a.SetFlags(0); a[36], a[37] = 1, 1 }),
					[]byte("TargetAddress="+f.ln.Addr().String()+",1\x00"))
				io.Copy(io.Discard, nc)
			}
			nc.Close()
		}
	}()
	if dev, err := Open(t.Context(), f.address(), Options{}); err == nil {
		dev.Close()
		t.Fatal("it opens")
	}
	if n := logins.Load(); n > 10 {
		t.Errorf("%d logins", n)
	}
}
