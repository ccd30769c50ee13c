package conf

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Fault is one thing that is wrong in a configuration file.
type Fault struct {
	File string
	// Line counts from 1.
	Line int
	// Key is the setting, such as "service.portals" or "volume[db01].copy.depth";
	// empty where the text is not TOML.
	Key string
	// Text says what is wrong and what to do.
	Text string
}

func (f Fault) Error() string {
	if f.Key == "" {
		return fmt.Sprintf("%s:%d: %s", f.File, f.Line, f.Text)
	}
	return fmt.Sprintf("%s:%d: %s: %s", f.File, f.Line, f.Key, f.Text)
}

// Faults is everything that is wrong in a configuration file, by line.
type Faults []Fault

// Error has one line for each fault.
func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i := range f {
		lines[i] = f[i].Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives the single faults.
func (f Faults) Unwrap() []error {
	errs := make([]error, len(f))
	for i := range f {
		errs[i] = f[i]
	}
	return errs
}

func (f Faults) sorted() Faults {
	slices.SortStableFunc(f, func(a, b Fault) int { return cmp.Compare(a.Line, b.Line) })
	return f
}

func syntaxFault(path string, text []byte, err error) Fault {
	fault := Fault{File: path, Line: 1, Text: strings.TrimPrefix(err.Error(), "toml: ")}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		fault.Line, _ = decode.Position()
		fault.Key = strings.Join(decode.Key(), ".")
		// The error names a key within its table alone.
		if table := tableAt(text, fault.Line); table != "" && fault.Key != "" && fault.Key != table {
			fault.Key = table + "." + fault.Key
		}
	}
	fault.Text, _, _ = strings.Cut(fault.Text, "\n")
	return fault
}
