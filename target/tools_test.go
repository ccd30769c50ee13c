package target

import (
	"fmt"
	"strings"
	"testing"
)

func TestToolsOfLibiscsiSeeTheUnit(t *testing.T) {
	_, addr := begin(t, Config{}, Unit{IQN: iqn, LUN: 0, Device: newMemory(512, 1<<15), Vendor: "ACME", Product: "Array 9", Serial: "S1"},
		Unit{IQN: iqn, LUN: 300, Device: newMemory(4096, 1<<12)})
	if out := mustTool(t, "iscsi-ls", "-s", "iscsi://"+addr); !strings.Contains(out, iqn) || !strings.Contains(out, addr) || !strings.Contains(out, "300") && !strings.Contains(out, "16684") {
		t.Errorf("iscsi-ls: %s", out)
	}
	if out := mustTool(t, "iscsi-inq", url(addr, 0)); !strings.Contains(out, "ACME") || !strings.Contains(out, "Array 9") {
		t.Errorf("iscsi-inq: %s", out)
	}
	for page, want := range map[string]string{"0": "0xb2", "128": "S1", "131": "Designator", "176": "maximum", "178": "lbprz"} {
		if out := mustTool(t, "iscsi-inq", "-e", "1", "-c", page, url(addr, 0)); !strings.Contains(strings.ToLower(out), strings.ToLower(want)) {
			t.Errorf("iscsi-inq -c %s lacks %q: %s", page, want, out)
		}
	}
	if out := mustTool(t, "iscsi-readcapacity16", url(addr, 0)); !strings.Contains(out, "32767") || !strings.Contains(out, "512") {
		t.Errorf("iscsi-readcapacity16: %s", out)
	}
}

func TestQEMUReadsWhatItWrote(t *testing.T) {
	for _, bs := range []uint32{512, 4096} {
		for _, prober := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/prober=%v", bs, prober), func(t *testing.T) {
				m := newMemory(bs, 64<<20/uint64(bs))
				u := Unit{IQN: iqn, LUN: 1, Device: m}
				if prober {
					u.Device = quick{m}
				}
				_, addr := begin(t, Config{}, u)
				out := mustTool(t, "qemu-io", "-f", "raw",
					"-c", "write -P 0x11 0 64k", "-c", "write -P 0x22 64k 1M", "-c", "write -P 0x33 4M 16M",
					"-c", "write -P 0x44 20M 4k", "-c", "write -z -u 24M 2M", "-c", "discard 64k 64k",
					"-c", "aio_write -P 0x55 30M 1M", "-c", "aio_write -P 0x66 31M 8k", "-c", "aio_flush", "-c", "flush",
					"-c", "read -P 0x11 0 64k", "-c", "read -P 0 64k 64k", "-c", "read -P 0x22 128k 960k", "-c", "read -P 0x33 4M 16M",
					"-c", "read -P 0x44 20M 4k", "-c", "read -P 0 24M 2M", "-c", "read -P 0x55 30M 1M", "-c", "read -P 0x66 31M 8k",
					"-c", "read -P 0 63M 1M", url(addr, 1))
				if strings.Contains(out, "failed") || strings.Contains(strings.ToLower(out), "error") {
					t.Error(out)
				}
				if m.bytes()[5<<20] != 0x33 || m.flushed() == 0 {
					t.Errorf("the device holds %#x, %d flushes", m.bytes()[5<<20], m.flushed())
				}
			})
		}
	}
}
