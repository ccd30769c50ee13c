package conf

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

const (
	// maxISCSIName is in bytes (RFC 7143 4.2.7.1).
	maxISCSIName = 223
	// maxLUN is the last of flat space addressing (SAM-5 4.7.7.3).
	maxLUN = 1<<14 - 1
	// maxSocket is what a Unix socket's address holds, in bytes.
	maxSocket = 107

	minRegion, maxRegion = 64 << 10, 64 << 20
)

var (
	namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	// RFC 7143 4.2.7.3: date and reversed domain of the naming authority, then
	// what it likes after a colon.
	iqnPattern = regexp.MustCompile(`^iqn\.[0-9]{4}-(0[1-9]|1[0-2])\.[a-z0-9-]+(\.[a-z0-9-]+)*(:[a-z0-9.:-]*)?$`)
	// What a name begins with, up to any length.
	beginsName = regexp.MustCompile(`^(iqn\.[a-z0-9.:-]*|(eui|naa)\.[0-9A-Fa-f]*)$`)
)

func checkName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("%q is no name; it is a letter or digit, then up to 63 of A-Z a-z 0-9 . _ -", name)
	}
	return nil
}

// checkISCSIName holds a name against RFC 7143 4.2.7.3 to 4.2.7.5.
func checkISCSIName(name string) error {
	switch {
	case name == "":
		return errors.New("is empty; it is a name such as \"iqn.2026-11.net.example:db01\"")
	case len(name) > maxISCSIName:
		return fmt.Errorf("has %d bytes; an iSCSI name has at most %d (RFC 7143 4.2.7.1)", len(name), maxISCSIName)
	case name != strings.ToLower(name) && !strings.HasPrefix(name, "eui.") && !strings.HasPrefix(name, "naa."):
		return fmt.Errorf("%s has capitals; write it in lower case (RFC 7143 4.2.7.2)", shown(name))
	case strings.HasPrefix(name, "iqn."):
		if iqnPattern.MatchString(name) {
			return nil
		}
	case strings.HasPrefix(name, "eui."):
		if digits, err := hex.DecodeString(name[4:]); err == nil && len(digits) == 8 {
			return nil
		}
		return fmt.Errorf("%q is no eui name; it is eui. and 16 hexadecimal digits", name)
	case strings.HasPrefix(name, "naa."):
		if digits, err := hex.DecodeString(name[4:]); err == nil && (len(digits) == 8 || len(digits) == 16) {
			return nil
		}
		return fmt.Errorf("%q is no naa name; it is naa. and 16 or 32 hexadecimal digits", name)
	}
	return fmt.Errorf("%s is no iSCSI name; it is iqn.YYYY-MM.reversed.domain:anything, such as \"iqn.2026-11.net.example:db01\"", shown(name))
}

func checkHTTP(address string) error {
	if address == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("%s is no address; it is host:port, such as \"127.0.0.1:9260\", or \"\" for no metrics", shown(address))
	}
	return nil
}

func checkAbsolute(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%s is not an absolute path; begin it with /", shown(path))
	}
	return nil
}

func checkSocket(path string) error {
	if err := checkAbsolute(path); err != nil {
		return err
	}
	if len(path) > maxSocket {
		return fmt.Errorf("has %d bytes; the path of a socket has at most %d", len(path), maxSocket)
	}
	return nil
}

func checkRegionSize(s Size) error {
	if s < minRegion || s > maxRegion || s&(s-1) != 0 {
		return fmt.Errorf("is %s; it is a power of two from 64KiB to 64MiB", s)
	}
	return nil
}

func (d *decoder) checkAddress(address string) error {
	hint := "it is iscsi://[user@]host[:port]/iqn/lun, or the absolute path of a file or block device"
	if address == "" {
		return errors.New("is empty; " + hint)
	}
	if holdsSecret(address) {
		return errors.New("has a secret in the URL; write only the user there, and put the secret into source_secret_file or destination_secret_file")
	}
	if scheme, _, ok := strings.Cut(address, "://"); ok && scheme != "iscsi" {
		return fmt.Errorf("has the unknown scheme %q; %s", scheme, hint)
	}
	if !strings.HasPrefix(address, "iscsi://") && !filepath.IsAbs(address) {
		return errors.New("is no logical unit; " + hint)
	}
	for _, check := range d.checks {
		if err := check(address); err != nil {
			return err
		}
	}
	return nil
}

// userinfo is what stands before the @ of an iscsi URL.
func userinfo(address string) (string, bool) {
	rest, ok := strings.CutPrefix(address, "iscsi://")
	if !ok {
		return "", false
	}
	authority, _, _ := strings.Cut(rest, "/")
	at := strings.LastIndexByte(authority, '@')
	if at < 0 {
		return "", false
	}
	return authority[:at], true
}

// holdsSecret tells whether a URL has user:secret@ or user%secret@.
func holdsSecret(address string) bool {
	user, _ := userinfo(address)
	return strings.ContainsAny(user, ":%")
}

// comparable makes two spellings of one address the same text.
func comparable(address string) string {
	rest, ok := strings.CutPrefix(address, "iscsi://")
	if !ok {
		return filepath.Clean(address)
	}
	authority, path, _ := strings.Cut(rest, "/")
	authority = strings.ToLower(authority[strings.LastIndexByte(authority, '@')+1:])
	if _, _, err := net.SplitHostPort(authority); err != nil {
		authority += ":3260"
	}
	return authority + "/" + strings.ToLower(path)
}

// shown is a text as an error may quote it: what stands before an @ can hold a secret.
func shown(text string) string {
	if at := strings.LastIndexByte(text, '@'); at >= 0 {
		text = "***" + text[at:]
	}
	return strconv.Quote(text)
}

// lowerName makes a text fit for the free part of an iqn.
func lowerName(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(text))
}

// uses finds what may be there only once in a configuration.
type uses struct {
	names, addresses, units map[string]string
}

func newUses() *uses {
	return &uses{names: map[string]string{}, addresses: map[string]string{}, units: map[string]string{}}
}

// add notes what a volume uses, with faults for what an earlier one has already.
// Keys that are faulty by themselves are left out.
func (u *uses) add(d *decoder, path, label string, v *Volume, faulty map[string]bool) {
	who := label
	if !faulty["name"] {
		who = "volume " + v.Name
		if _, taken := u.names[v.Name]; taken {
			d.fault(path+".name", label+".name", fmt.Sprintf("another volume is called %q; give each its own name", v.Name))
		}
		u.names[v.Name] = v.Name
	}
	if !faulty["iqn"] && !faulty["lun"] {
		at := fmt.Sprintf("%s LUN %d", v.IQN, v.LUN)
		if other, taken := u.addresses[at]; taken {
			d.fault(path+".lun", label+".lun", fmt.Sprintf("%s has LUN %d of %s already; choose another lun or iqn", other, v.LUN, v.IQN))
		} else {
			u.addresses[at] = who
		}
	}
	if !faulty["source"] && !faulty["destination"] && comparable(v.Source.Address) == comparable(v.Destination.Address) {
		d.fault(path+".destination", label+".destination", "is the source; a volume moves from one logical unit to another")
		faulty["destination"] = true
	}
	for _, side := range []struct{ key, address string }{{"source", v.Source.Address}, {"destination", v.Destination.Address}} {
		if faulty[side.key] {
			continue
		}
		unit := comparable(side.address)
		if other, taken := u.units[unit]; taken {
			d.fault(path+"."+side.key, label+"."+side.key, fmt.Sprintf("is the %s already; a logical unit belongs to one volume", other))
			continue
		}
		u.units[unit] = side.key + " of " + who
	}
}
