package lun_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/target"
	"lunshift/tests/peer"
)

// shareTarget serves a device as an array does that has COMPARE AND WRITE, which tgtd 1.0.85
// announces and refuses.
func shareTarget(t *testing.T, dev lun.Device) (address string) {
	t.Helper()
	s, err := target.New(target.Config{Portals: []target.Portal{{Address: "127.0.0.1:0"}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AddUnit(target.Unit{IQN: testIQN, Device: lun.Serialize(dev)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.Background()) }()
	t.Cleanup(func() {
		s.Close()
		<-ended
	})
	return fmt.Sprintf("iscsi://%s/%s/0", s.Addrs()[0], testIQN)
}

// Two initiators, each on a path of its own, count up in the same blocks.
// Caught: a READ and a WRITE for the COMPARE AND WRITE (counts are lost); a miscompare taken for
// a write.
func TestSharedUpdatesOfTwoInitiatorsAreNotLost(t *testing.T) {
	at := shareTarget(t, luntest.NewThinMemory(512, 4096))
	const each = 150
	var both sync.WaitGroup
	for range 2 {
		dev, err := lun.Open(t.Context(), at, lun.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		both.Go(func() {
			for range each {
				err := lun.UpdateShared(t.Context(), dev.(lun.Swapper), lun.Extent{Start: 5, Blocks: 2}, func(b []byte) error {
					for _, half := range [][]byte{b[:512], b[512:]} {
						binary.BigEndian.PutUint64(half, binary.BigEndian.Uint64(half)+1)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	both.Wait()
	dev, err := lun.Open(t.Context(), at, lun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	s := dev.(lun.Swapper)
	b := make([]byte, 2048)
	if err := dev.ReadAt(t.Context(), b, 4); err != nil {
		t.Fatal(err)
	}
	if n, m := binary.BigEndian.Uint64(b[512:]), binary.BigEndian.Uint64(b[1024:]); n != 2*each || m != n {
		t.Errorf("counted to %d and %d, not %d", n, m, 2*each)
	}
	if !bytes.Equal(b[:512], make([]byte, 512)) || !bytes.Equal(b[1536:], make([]byte, 512)) {
		t.Error("blocks beside were written")
	}

	other := bytes.Repeat([]byte{7}, 512)
	if done, err := s.Swap(t.Context(), 4, other, other); done || err != nil {
		t.Errorf("blocks that hold something else: %v %v", done, err)
	}
	why := errors.New("no")
	if err := lun.UpdateShared(t.Context(), s, lun.Extent{Start: 4, Blocks: 1}, func([]byte) error { return why }); err != why {
		t.Errorf("refused by the caller: %v", err)
	}
	d := peer.StartTgtd(t)
	tgt, err := lun.Open(t.Context(), serve(t, d, 2<<20, peer.Unit{}).URL(), lun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	if _, err := tgt.(lun.Swapper).Swap(t.Context(), 4, other, other); !errors.Is(err, lun.ErrUnsupported) {
		t.Errorf("a target that refuses the command: %v", err)
	}
	if _, err := s.Swap(t.Context(), 0, make([]byte, 256<<9), make([]byte, 256<<9)); !errors.Is(err, lun.ErrUnsupported) {
		t.Errorf("more than the command takes: %v", err)
	}
	if _, err := s.Swap(t.Context(), 1<<40, other, other); !errors.Is(err, lun.ErrOutOfRange) {
		t.Errorf("beyond the capacity: %v", err)
	}
}
