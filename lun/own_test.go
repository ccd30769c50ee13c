package lun_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/sirupsen/logrus"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/target"
)

// TestISCSIKeepsTheContractOnOurOwnTarget holds both ends of the protocol to it at once.
func TestISCSIKeepsTheContractOnOurOwnTarget(t *testing.T) {
	for _, tc := range []struct {
		bs   uint32
		opts lun.Options
	}{
		{512, lun.Options{}},
		{4096, lun.Options{Sessions: 2, HeaderDigest: true, DataDigest: true}},
	} {
		t.Run(fmt.Sprint(tc.bs), func(t *testing.T) {
			log := logrus.New()
			log.SetOutput(io.Discard)
			s, err := target.New(target.Config{Portals: []target.Portal{{Address: "127.0.0.1:0"}}, Log: log})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Listen(); err != nil {
				t.Fatal(err)
			}
			backing := lun.Serialize(openPath(t, sparseFile(t, 12<<20), lun.Options{BlockSize: tc.bs}))
			if err := s.AddUnit(target.Unit{IQN: testIQN, Device: backing}); err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- s.Serve(t.Context()) }()
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				if err := <-served; !errors.Is(err, target.ErrClosed) && err != nil && t.Context().Err() == nil {
					t.Error(err)
				}
			})
			url := fmt.Sprintf("iscsi://%s/%s/0", s.Addrs()[0], testIQN)
			luntest.Run(t, func(t *testing.T) lun.Device { return openPath(t, url, tc.opts) }, luntest.MustCancel)
		})
	}
}
