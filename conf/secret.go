package conf

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
)

// maxSecret is in bytes; CHAP secrets are 12 to 16 bytes at many arrays, and
// 255 at most anywhere.
const maxSecret = 255

// maxSecretFile is in bytes, with the ends of lines around the secret.
const maxSecretFile = 1024

// notInSecret are bytes that no secret has and that show a file of another kind.
const notInSecret = "\r\n\x00"

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
// "source" or "destination" for the secret of the user there, "source_target" or
// "destination_target" for that of the array. Letters of the volume's name become capitals, and
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

// secrets finds the secrets of one side and holds them against its address. path
// and label are the volume's.
func (d *decoder) secrets(unit *Unit, volume, side, path, label string, files sideFiles) {
	if holdsSecret(unit.Address) {
		return // a fault already, and nothing more to say of it
	}
	before := len(d.faults)
	unit.Secret = d.secret(volume, side, side+"_secret_file", path, label, files.secret)
	unit.TargetSecret = d.secret(volume, side+"_target", side+"_target_secret_file", path, label, files.target)
	if len(d.faults) > before {
		return
	}
	user, _ := userinfo(unit.Address)
	fault := func(format string, args ...any) {
		d.fault(path+"."+side, label+"."+side, fmt.Sprintf(format, args...))
	}
	switch {
	case unit.Secret != "" && user == "" && unit.Address != "":
		fault("there is a secret but no user; write iscsi://user@host/iqn/lun")
	case unit.Secret == "" && user != "":
		fault("user %s needs a secret; put it into %s_secret_file, or into %s of the environment", user, side, SecretVariable(volume, side))
	case unit.Secret == "" && unit.TargetSecret != "":
		fault("an array proves itself only to a user that does; write iscsi://user@host/iqn/lun and give the user's secret too")
	case unit.Secret != "" && unit.Secret == unit.TargetSecret:
		fault("the user's secret and the array's are the same; give the array another one (RFC 7143 9.2.1)")
	}
}

// secret is the secret that SecretVariable holds, or else the file; empty without
// both.
func (d *decoder) secret(volume, side, fileKey, path, label, file string) Secret {
	variable := SecretVariable(volume, side)
	if value, ok := os.LookupEnv(variable); ok && volume != "" {
		if value == "" || len(value) > maxSecret {
			d.fault(path, label, fmt.Sprintf("the secret in %s has %d bytes; it is 1 to %d", variable, len(value), maxSecret))
		} else if strings.ContainsAny(value, notInSecret) {
			d.fault(path, label, fmt.Sprintf("the secret in %s has more than one line; a secret is one line of text", variable))
		}
		return Secret(value)
	}
	if file == "" {
		return ""
	}
	secret, err := readSecret(file)
	if err != nil {
		d.fault(path+"."+fileKey, label+"."+fileKey, err.Error())
	}
	return secret
}

func readSecret(file string) (Secret, error) {
	f, err := openFile(file)
	if err != nil {
		return "", fmt.Errorf("cannot read %s: %w", file, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("cannot read %s: %w", file, pathless(err))
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return "", fmt.Errorf("others can read %s (mode %04o); chmod 600 it", file, mode)
	}
	content, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return "", fmt.Errorf("cannot read %s: %w", file, pathless(err))
	}
	secret := bytes.TrimRight(content, "\r\n")
	if len(secret) == 0 || len(secret) > maxSecret || len(content) > maxSecretFile {
		return "", fmt.Errorf("%s holds no secret; it is one line of 1 to %d bytes", file, maxSecret)
	}
	if bytes.ContainsAny(secret, notInSecret) {
		return "", fmt.Errorf("%s holds more than one line, or a NUL; a secret is one line of text", file)
	}
	return Secret(secret), nil
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
		if other != v.Name && anySecret(v.Name) {
			d.fault(fmt.Sprintf("volume[%d].name", i), "volume["+v.Name+"].name",
				fmt.Sprintf("has the secret's variable of volume %s; rename one, or use secret files", other))
		}
	}
}

func anySecret(volume string) bool {
	for _, side := range []string{"source", "source_target", "destination", "destination_target"} {
		if _, ok := os.LookupEnv(SecretVariable(volume, side)); ok {
			return true
		}
	}
	return false
}
