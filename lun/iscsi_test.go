package lun_test

import (
	"fmt"
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
	"lunshift/tests/peer"
)

const testIQN = "iqn.2026-11.net.example:disk"

func TestISCSIKeepsTheContract(t *testing.T) {
	d := peer.StartTgtd(t)
	for _, tc := range []struct {
		name string
		unit peer.Unit
		opts lun.Options
	}{
		{"Thin512", peer.Unit{Thin: true}, lun.Options{}},
		{"Thick512TwoSessions", peer.Unit{}, lun.Options{Sessions: 2}},
		{"Thin4096Digests", peer.Unit{BlockSize: 4096, Thin: true}, lun.Options{HeaderDigest: true, DataDigest: true}},
		{"Thick4096FewCommands", peer.Unit{BlockSize: 4096}, lun.Options{QueueDepth: 2}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			iqn := fmt.Sprintf("%s-%s", testIQN, tc.name)
			tc.unit.Path = sparseFile(t, 20<<20)
			if err := d.AddTarget(t.Context(), iqn, []peer.Unit{tc.unit}); err != nil {
				t.Fatal(err)
			}
			luntest.Run(t, func(t *testing.T) lun.Device { return openPath(t, d.LUN(iqn, 1).URL(), tc.opts) })
		})
	}
}
