package luntest_test

import (
	"testing"

	"lunshift/lun"
	"lunshift/lun/luntest"
)

func TestMemoryKeepsTheContract(t *testing.T) {
	for name, open := range map[string]func() lun.Device{
		"Thin512":  func() lun.Device { return luntest.NewThinMemory(512, 8<<11) },
		"Thin4096": func() lun.Device { return luntest.NewThinMemory(4096, 8<<8) },
		"Thick":    func() lun.Device { return luntest.NewMemory(lun.Info{BlockSize: 512, Blocks: 8 << 11}) },
	} {
		t.Run(name, func(t *testing.T) {
			luntest.Run(t, func(*testing.T) lun.Device { return open() })
		})
	}
}
