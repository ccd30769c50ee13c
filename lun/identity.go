package lun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// Identity is what a SCSI logical unit says of itself in INQUIRY, byte for byte, so that
// another unit can say the same and be taken for it: for one more path to it.
type Identity struct {
	// Standard is vendor, product and revision: bytes 8 to 35 of the standard INQUIRY data
	// (SPC-4 6.6.2).
	Standard []byte
	// Serial is what follows the header of VPD page 80h (SPC-4 7.8.14), nil where the unit
	// has no such page.
	Serial []byte
	// Designators are the designation descriptors of VPD page 83h (SPC-4 7.8.6) that are
	// associated with the logical unit, in their order. Those of the target device and of
	// its ports are not among them.
	Designators []byte
}

const (
	standardIdentity = 28 // bytes of Identity.Standard
	// longestPage bounds what is taken of a VPD page, in bytes; what is longer counts as none.
	longestPage = 4096
)

// Check holds the identity against its form. What a device or a file gave is not to be
// trusted before.
func (i *Identity) Check() error {
	switch {
	case len(i.Standard) != standardIdentity:
		return fmt.Errorf("vendor, product and revision have %d bytes, not %d", len(i.Standard), standardIdentity)
	case len(i.Serial) > longestPage || len(i.Designators) > longestPage:
		return fmt.Errorf("serial number or designators have more than %d bytes", longestPage)
	}
	whole := binary.BigEndian.AppendUint16([]byte{0, 0x83}, uint16(len(i.Designators)))
	list, ok := unitDesignators(append(whole, i.Designators...))
	if !ok || len(list) != len(i.Designators) || len(list) == 0 {
		return errors.New("the designators are not those of a logical unit")
	}
	return nil
}

// newIdentity makes an identity of the standard INQUIRY data and the pages 80h and 83h as
// they came; nil where they do not name the unit.
func newIdentity(standard, serial, designation []byte) *Identity {
	if len(standard) < 36 || len(designation) > longestPage || parseDesignator(designation) == "" {
		return nil
	}
	list, ok := unitDesignators(designation)
	if !ok {
		return nil
	}
	i := &Identity{Standard: slices.Clone(standard[8:36]), Designators: list}
	if body := vpdBody(serial, 0x80); len(body) > 0 && len(serial) <= longestPage {
		i.Serial = slices.Clone(body)
	}
	if i.Check() != nil {
		return nil
	}
	return i
}

// unitDesignators gives the descriptors of VPD page 83h that are associated with the
// logical unit. It is false where the page is cut off or a descriptor reaches beyond it.
func unitDesignators(page []byte) ([]byte, bool) {
	if len(page) < 4 || page[1] != 0x83 {
		return nil, false
	}
	rest := page[4:]
	if n := int(binary.BigEndian.Uint16(page[2:])); n <= len(rest) {
		rest = rest[:n]
	} else {
		return nil, false
	}
	var list []byte
	for len(rest) > 0 {
		if len(rest) < 4 || 4+int(rest[3]) > len(rest) {
			return nil, false
		}
		n := 4 + int(rest[3])
		if rest[1]>>4&3 == 0 && n > 4 {
			list = append(list, rest[:n]...)
		}
		rest = rest[n:]
	}
	return list, true
}

// deviceIdentity takes the identity from what the kernel has read of the SCSI device with
// the directory dev in sysfs; nil where there is none.
func deviceIdentity(dev string) *Identity {
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dev, name))
		if err != nil {
			return nil // not there: not SCSI, or the device has no such page
		}
		return b
	}
	return newIdentity(read("inquiry"), read("vpd_pg80"), read("vpd_pg83"))
}

// mapIdentity is the identity that every path of the multipath map with the directory sys
// in sysfs has; nil where they differ.
func mapIdentity(sys string) *Identity {
	paths, err := filepath.Glob(filepath.Join(sys, "slaves", "*", "device"))
	if err != nil || len(paths) == 0 {
		return nil
	}
	var one *Identity
	for _, dev := range paths {
		i := deviceIdentity(dev)
		if i == nil || one != nil && !one.Equal(i) {
			return nil
		}
		one = i
	}
	return one
}

// Equal tells whether both are one identity; nil is only equal to nil.
func (i *Identity) Equal(o *Identity) bool {
	if i == nil || o == nil {
		return i == o
	}
	return bytes.Equal(i.Standard, o.Standard) && bytes.Equal(i.Serial, o.Serial) && bytes.Equal(i.Designators, o.Designators)
}
