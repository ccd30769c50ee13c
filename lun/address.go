package lun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
)

// DefaultPort is the TCP port of iSCSI (RFC 7143 section 15).
const DefaultPort = 3260

// Address says where a Device is: a logical unit of an iSCSI target, or the
// path of a regular file or block device.
type Address struct {
	// Path is set for a file or block device, and then nothing else is.
	Path string

	// User is the CHAP name (RFC 7143 12.1.3), empty for none.
	User string
	// Host is a name or an IP address without brackets, Port its TCP port.
	Host string
	Port uint16
	// Target is the iSCSI name of the target (RFC 7143 4.2.7), LUN the logical
	// unit's number there, 0 to 16383.
	Target string
	LUN    uint16
}

// ISCSI tells whether the address is that of an iSCSI target.
func (a Address) ISCSI() bool { return a.Path == "" }

// Portal is host:port for net.Dial.
func (a Address) Portal() string {
	return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
}

// String is the address in the form ParseAddress takes. It never holds a secret.
func (a Address) String() string {
	if !a.ISCSI() {
		return a.Path
	}
	user := ""
	if a.User != "" {
		user = a.User + "@"
	}
	return fmt.Sprintf("iscsi://%s%s/%s/%d", user, a.Portal(), a.Target, a.LUN)
}

// ParseAddress reads iscsi://[user@]host[:port]/target-name/lun, or the path of
// a file or block device. Its errors are one line and never hold a secret.
func ParseAddress(s string) (Address, error) {
	if s == "" {
		return Address{}, errors.New("address is empty: want iscsi://host[:port]/target-name/lun or a path")
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return Address{}, errors.New("address holds a control character")
	}
	scheme, rest, found := strings.Cut(s, "://")
	if strings.HasPrefix(strings.ToLower(s), "iscsi:") && !strings.HasPrefix(s[len("iscsi:"):], "//") {
		return Address{}, errors.New("address begins with iscsi: but not with iscsi://")
	}
	if !found {
		return Address{Path: filepath.Clean(s)}, nil
	}
	if !strings.EqualFold(scheme, "iscsi") {
		if strings.Contains(scheme, "/") {
			return Address{Path: filepath.Clean(s)}, nil
		}
		return Address{}, errors.New("address has an unknown scheme: want iscsi://host[:port]/target-name/lun or a path")
	}
	return parseISCSI(rest)
}

// parseISCSI reads what follows iscsi://.
func parseISCSI(rest string) (Address, error) {
	// The secret of a mistaken user:secret@host may itself hold a slash, so the
	// check comes before anything that could echo a part of the address.
	if at := strings.LastIndexByte(rest, '@'); at >= 0 && strings.ContainsAny(rest[:at], ":%") {
		if slash := strings.IndexByte(rest, '/'); slash < 0 || at < slash || !strings.HasPrefix(rest[slash+1:], "iqn.") {
			return Address{}, errors.New("address holds a secret: leave only user@ in it, and give the secret in a secret file or the environment")
		}
	}
	authority, path, _ := strings.Cut(rest, "/")
	a := Address{Port: DefaultPort}
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		a.User, authority = authority[:at], authority[at+1:]
		if a.User == "" {
			return Address{}, errors.New("address has an empty user before @")
		}
		if strings.ContainsAny(a.User, ":%") {
			return Address{}, errors.New("address holds a secret: leave only user@ in it, and give the secret in a secret file or the environment")
		}
	}
	if err := a.parsePortal(authority); err != nil {
		return Address{}, err
	}
	name, number, found := strings.Cut(strings.TrimSuffix(path, "/"), "/")
	if name == "" || !found || number == "" {
		return Address{}, fmt.Errorf("address of %s lacks the target name or the LUN: want iscsi://%s/target-name/lun", authority, authority)
	}
	if err := checkISCSIName(name); err != nil {
		return Address{}, err
	}
	a.Target = name
	lun, err := strconv.ParseUint(number, 10, 16)
	if err != nil || lun > 16383 {
		return Address{}, fmt.Errorf("LUN %q is not a number from 0 to 16383", number)
	}
	a.LUN = uint16(lun)
	return a, nil
}

func (a *Address) parsePortal(s string) error {
	host, port := s, ""
	switch {
	case strings.HasPrefix(s, "["):
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return fmt.Errorf("host %q lacks the closing bracket", s)
		}
		host = s[1:end]
		if ip, err := netip.ParseAddr(host); err != nil || !ip.Is6() {
			return fmt.Errorf("host %q is not an IPv6 address", s)
		}
		if after := s[end+1:]; after != "" {
			if after[0] != ':' {
				return fmt.Errorf("host %q has %q after the bracket", s, after)
			}
			port = after[1:]
			if port == "" {
				return fmt.Errorf("host %q has an empty port", s)
			}
		}
	case strings.Count(s, ":") > 1:
		return fmt.Errorf("host %q: put an IPv6 address in brackets, [%s]", s, s)
	default:
		var colon bool
		if host, port, colon = strings.Cut(s, ":"); colon && port == "" {
			return fmt.Errorf("host %q has an empty port", s)
		}
	}
	if host == "" {
		return errors.New("address lacks the host: want iscsi://host[:port]/target-name/lun")
	}
	if strings.ContainsAny(host, " \\?#<>\"") {
		return fmt.Errorf("host %q is not a host name or IP address", host)
	}
	a.Host = host
	if port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("port %q is not a number from 1 to 65535", port)
		}
		a.Port = uint16(n)
	}
	return nil
}

// checkISCSIName holds a name to RFC 7143 4.2.7.2: at most 223 bytes, one of
// the three types, no white space or punctuation but dash, dot and colon.
func checkISCSIName(s string) error {
	if len(s) > 223 {
		return fmt.Errorf("iSCSI name is %d bytes long, more than 223", len(s))
	}
	if !strings.HasPrefix(s, "iqn.") && !strings.HasPrefix(s, "eui.") && !strings.HasPrefix(s, "naa.") {
		return fmt.Errorf("%q is not an iSCSI name: it begins with none of iqn., eui., naa.", s)
	}
	for _, r := range s {
		// Initiators and targets in the field also use the underscore.
		if r <= ' ' || r < 0x80 && !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' ||
			strings.ContainsRune("-.:_", r)) {
			return fmt.Errorf("%q is not an iSCSI name: it holds %q", s, r)
		}
	}
	return nil
}
