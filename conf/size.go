package conf

import (
	"encoding"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
)

// Size is a number of bytes. As text it is a number with an optional unit: B,
// KiB, MiB, GiB, TiB (powers of 1024) or kB, MB, GB, TB (powers of 1000).
type Size uint64

var _ encoding.TextUnmarshaler = (*Size)(nil)

// UnmarshalText reads a size such as "64MiB", "1.5GiB", "4096" or "0".
func (s *Size) UnmarshalText(text []byte) error {
	n, err := ParseSize(string(text))
	if err != nil {
		return err
	}
	*s = n
	return nil
}

// ParseSize reads a size such as "64MiB", "1.5GiB", "4096" or "0".
func ParseSize(text string) (Size, error) {
	bad := fmt.Errorf("%q is no size; it is a number with B, KiB, MiB, GiB or TiB, such as \"64MiB\"", text)
	if strings.HasPrefix(text, "-") {
		return 0, fmt.Errorf("%q is below 0; name a size such as \"64MiB\", or 0", text)
	}
	if text == "" || strings.ContainsAny(text, "eE,+-") || strings.TrimLeft(text[:1], "0123456789") != "" {
		return 0, bad
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n > math.MaxInt64 {
		return 0, bad
	}
	return Size(n), nil
}

// MarshalText is String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String is the size in the largest power of 1024 that divides it.
func (s Size) String() string {
	units := [...]string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	n, unit := uint64(s), 0
	for n != 0 && n%1024 == 0 && unit < len(units)-1 {
		n, unit = n/1024, unit+1
	}
	if n == 0 {
		return "0"
	}
	return strconv.FormatUint(n, 10) + units[unit]
}
