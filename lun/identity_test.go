package lun

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

func designationPage(descriptors ...[]byte) []byte {
	list := bytes.Join(descriptors, nil)
	return append(binary.BigEndian.AppendUint16([]byte{0, 0x83}, uint16(len(list))), list...)
}

func descriptor(set, kind byte, value ...byte) []byte {
	return append([]byte{set, kind, 0, byte(len(value))}, value...)
}

var (
	naaDescriptor  = descriptor(0x01, 0x03, 0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
	t10Descriptor  = descriptor(0x02, 0x01, []byte("ACME    lun 0042")...)
	portDescriptor = descriptor(0x51, 0x94, 0, 0, 0, 1)
	nodeDescriptor = descriptor(0x53, 0xa8, []byte("iqn.2026-11.net.example:array\x00\x00\x00")...)
	standardData   = append([]byte{0, 0, 6, 0x12, 69, 0, 0, 2}, append([]byte("ACME    Array 9         1.2 "), make([]byte, 38)...)...)
)

// Caught: the designators of ports and target taken over too; the order of the others
// changed; the serial number trimmed.
func TestIdentityIsWhatTheUnitSaysOfItselfAndNotOfItsPorts(t *testing.T) {
	serial := append([]byte{0, 0x80, 0, 10}, "  S-0042  "...)
	i := newIdentity(standardData, serial, designationPage(portDescriptor, t10Descriptor, nodeDescriptor, naaDescriptor))
	if i == nil {
		t.Fatal("no identity")
	}
	if string(i.Standard) != "ACME    Array 9         1.2 " || string(i.Serial) != "  S-0042  " {
		t.Errorf("standard %q, serial %q", i.Standard, i.Serial)
	}
	if want := append(bytes.Clone(t10Descriptor), naaDescriptor...); !bytes.Equal(i.Designators, want) {
		t.Errorf("designators % x", i.Designators)
	}
	if err := i.Check(); err != nil {
		t.Error(err)
	}
	if i := newIdentity(standardData, nil, designationPage(naaDescriptor)); i == nil || i.Serial != nil {
		t.Errorf("without a serial number: %+v", i)
	}
}

func TestUnitWithoutADesignatorOfItsOwnHasNoIdentity(t *testing.T) {
	whole := designationPage(naaDescriptor)
	for name, page := range map[string][]byte{
		"no page":                nil,
		"another page":           append([]byte{0, 0x80}, whole[2:]...),
		"ports alone":            designationPage(portDescriptor, nodeDescriptor),
		"nothing but zeroes":     designationPage(descriptor(0x01, 0x03, 0, 0, 0, 0, 0, 0, 0, 0)),
		"cut off":                whole[:len(whole)-1],
		"cut off after a whole":  append(binary.BigEndian.AppendUint16([]byte{0, 0x83}, 200), naaDescriptor...),
		"a descriptor too long":  designationPage(naaDescriptor, []byte{1, 3, 0, 200, 1}),
		"half a descriptor head": designationPage(naaDescriptor, []byte{1, 3}),
		"too long":               designationPage(bytes.Repeat(naaDescriptor, 300)),
	} {
		if i := newIdentity(standardData, nil, page); i != nil {
			t.Errorf("%s: %+v", name, i)
		}
	}
	if i := newIdentity(standardData[:35], nil, whole); i != nil {
		t.Errorf("standard data cut off: %+v", i)
	}
}

// sysDevice makes a directory as sysfs has it for a SCSI device.
func sysDevice(t *testing.T, dir string, designation []byte) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"inquiry": standardData, "vpd_pg80": append([]byte{0, 0x80, 0, 2}, "42"...), "vpd_pg83": designation} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Caught: the identity of the first path where the paths differ.
func TestIdentityOfABlockDeviceIsThatOfAllItsPaths(t *testing.T) {
	dir := t.TempDir()
	if deviceIdentity(dir) != nil || mapIdentity(dir) != nil {
		t.Error("an identity without a device")
	}
	sysDevice(t, filepath.Join(dir, "device"), designationPage(portDescriptor, naaDescriptor))
	one := deviceIdentity(filepath.Join(dir, "device"))
	if one == nil || !bytes.Equal(one.Designators, naaDescriptor) || string(one.Serial) != "42" {
		t.Fatalf("device: %+v", one)
	}
	sysDevice(t, filepath.Join(dir, "slaves", "sda", "device"), designationPage(portDescriptor, naaDescriptor))
	sysDevice(t, filepath.Join(dir, "slaves", "sdb", "device"), designationPage(naaDescriptor, nodeDescriptor))
	if i := mapIdentity(dir); !i.Equal(one) {
		t.Errorf("multipath map: %+v", i)
	}
	sysDevice(t, filepath.Join(dir, "slaves", "sdc", "device"), designationPage(t10Descriptor))
	if i := mapIdentity(dir); i != nil {
		t.Errorf("paths of two units: %+v", i)
	}
}

// FuzzIdentity: whatever a unit says of itself, what is taken of it is whole and in bounds.
func FuzzIdentity(f *testing.F) {
	f.Add(standardData, append([]byte{0, 0x80, 0, 2}, "42"...), designationPage(portDescriptor, t10Descriptor, naaDescriptor))
	f.Add(standardData, []byte{}, designationPage(naaDescriptor, []byte{1, 3, 0, 200}))
	f.Fuzz(func(t *testing.T, standard, serial, designation []byte) {
		i := newIdentity(standard, serial, designation)
		if i == nil {
			return
		}
		if err := i.Check(); err != nil {
			t.Errorf("%+v: %v", i, err)
		}
		if !bytes.Contains(designation, i.Designators[:4]) || parseDesignator(designationPage(i.Designators)) != parseDesignator(designation) {
			t.Errorf("% x became % x", designation, i.Designators)
		}
	})
}
