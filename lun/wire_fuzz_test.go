package lun

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"
)

// FuzzTarget: whatever a target sends from its first byte on, opening a logical unit and
// using it ends with an error or with what the target said, in time; nothing is left of it
// after Close, and it takes no more memory than what was asked for and a login need.
func FuzzTarget(f *testing.F) {
	captures, err := filepath.Glob("testdata/captures/*")
	if err != nil || len(captures) == 0 {
		f.Fatalf("no captures: %v", err)
	}
	for _, path := range captures {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	f.Add([]byte{0x23, 0x81})
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 1<<16 {
			return
		}
		goroutines := runtime.NumGoroutine()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var target sync.WaitGroup
		target.Go(func() {
			// The first connection gets the input, later ones are closed at once.
			for first := true; ; first = false {
				nc, err := ln.Accept()
				if err != nil {
					return
				}
				if !first {
					nc.Close()
					continue
				}
				target.Go(func() {
					defer nc.Close()
					nc.SetDeadline(time.Now().Add(10 * time.Second))
					nc.Write(in)
					nc.(*net.TCPConn).CloseWrite()
					io.Copy(io.Discard, nc)
				})
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		opts := Options{InitiatorName: "iqn.2026-11.net.example:fuzz", LoginTimeout: 100 * time.Millisecond, IOTimeout: 100 * time.Millisecond}
		dev, err := Open(ctx, "iscsi://"+ln.Addr().String()+"/iqn.2026-11.net.example:db01/1", opts)
		if err == nil {
			bs := uint64(dev.Info().BlockSize)
			if bs == 0 || bs > 1<<20 || dev.Info().Blocks == 0 {
				t.Errorf("opened with %+v", dev.Info())
			} else {
				dev.ReadAt(ctx, make([]byte, bs), 0)
				dev.WriteAt(ctx, make([]byte, bs), 0)
				dev.Flush(ctx)
			}
			dev.Close()
		}
		if ctx.Err() != nil {
			t.Error("it hangs")
		}
		ln.Close()
		target.Wait()
		for end := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d goroutines are left of %d", runtime.NumGoroutine(), goroutines)
			}
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
			t.Errorf("%d bytes of input took %d bytes of memory", len(in), n)
		}
	})
}
