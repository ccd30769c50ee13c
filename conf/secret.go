package conf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// maxSecret is in bytes; CHAP secrets are 12 to 16 bytes at many arrays, and
// 255 at most anywhere.
const maxSecret = 255

// Secret is a CHAP secret. It prints as stars wherever it is printed.
type Secret string

// Reveal is the secret itself.
func (s Secret) Reveal() string { return string(s) }

// String hides the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "***"
}

// GoString hides the secret.
func (s Secret) GoString() string { return s.String() }

// MarshalText hides the secret.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// SecretVariable is the environment variable that holds a secret; side is
// "source" or "destination". Letters of the volume's name become capitals, and
// what is neither letter nor digit becomes "_".
func SecretVariable(volume, side string) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(volume))
	return "LUNSHIFT_SECRET_" + name + "_" + strings.ToUpper(side)
}

// secret finds the secret of one side: from the environment, or else from file.
func (d *decoder) secret(unit *Unit, volume, side, path, label, file string) {
	fileKey := side + "_secret_file"
	user, hasUser := userinfo(unit.Address)
	hasUser = hasUser && user != ""
	if holdsSecret(unit.Address) {
		return
	}
	variable := SecretVariable(volume, side)
	value, fromEnvironment := os.LookupEnv(variable)
	fromEnvironment = fromEnvironment && volume != ""
	switch {
	case fromEnvironment:
		if value == "" || len(value) > maxSecret {
			d.fault(path+"."+side, label+"."+side, fmt.Sprintf("the secret in %s has %d bytes; it is 1 to %d", variable, len(value), maxSecret))
			return
		}
		unit.Secret = Secret(value)
	case file != "":
		secret, err := readSecret(file)
		if err != nil {
			d.fault(path+"."+fileKey, label+"."+fileKey, err.Error())
			return
		}
		unit.Secret = secret
	}
	switch {
	case unit.Secret != "" && !hasUser && unit.Address != "":
		d.fault(path+"."+side, label+"."+side, "there is a secret but no user; write iscsi://user@host/iqn/lun")
	case unit.Secret == "" && hasUser:
		d.fault(path+"."+side, label+"."+side, fmt.Sprintf("user %s needs a secret; put it into %s, or into %s of the environment", user, fileKey, variable))
	}
}

func readSecret(file string) (Secret, error) {
	f, err := os.Open(file)
	if err != nil {
		var pathErr *os.PathError
		if errors.As(err, &pathErr) {
			err = pathErr.Err
		}
		return "", fmt.Errorf("cannot read %s: %w", file, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a file", file)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return "", fmt.Errorf("others can read %s (mode %04o); chmod 600 it", file, mode)
	}
	content, err := io.ReadAll(io.LimitReader(f, maxSecret+3))
	if err != nil {
		return "", fmt.Errorf("cannot read %s: %w", file, err)
	}
	content = bytes.TrimRight(content, "\r\n")
	if len(content) == 0 || len(content) > maxSecret {
		return "", fmt.Errorf("%s holds no secret; it is one line of 1 to %d bytes", file, maxSecret)
	}
	return Secret(content), nil
}

// sharedEnvironment refuses one variable for two volumes, whose names differ only
// in case or punctuation.
func (d *decoder) sharedEnvironment(volumes []Volume) {
	owner := map[string]string{}
	for i, v := range volumes {
		if v.Name == "" {
			continue
		}
		variable := SecretVariable(v.Name, "source")
		other, taken := owner[variable]
		if !taken {
			owner[variable] = v.Name
			continue
		}
		_, source := os.LookupEnv(variable)
		_, destination := os.LookupEnv(SecretVariable(v.Name, "destination"))
		if other != v.Name && (source || destination) {
			d.fault(fmt.Sprintf("volume[%d].name", i), "volume["+v.Name+"].name",
				fmt.Sprintf("has the secret's variable of volume %s; rename one, or use secret files", other))
		}
	}
}
