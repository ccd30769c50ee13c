package conf

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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
	return "LUNSHIFT_SECRET_" + variableName(volume) + "_" + strings.ToUpper(side)
}

// InitiatorSecretVariable is the environment variable with the secret of a CHAP user of
// a volume's initiators; with "_TARGET" behind it, with that of the target towards that
// user.
func InitiatorSecretVariable(volume, user string) string {
	return "LUNSHIFT_SECRET_" + variableName(volume) + "_INITIATOR_" + variableName(user)
}

// DiscoverySecretVariable is the environment variable with the secret of the CHAP user
// of discovery; with "_TARGET" behind it, with that of the target.
const DiscoverySecretVariable = "LUNSHIFT_SECRET_DISCOVERY"

func variableName(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(text))
}

// secrets finds the secrets of one side and holds them against its address. path
// and label are the volume's.
func (d *decoder) secrets(unit *Unit, volume, side, path, label string, files sideFiles) {
	for _, file := range []string{files.secret, files.target} {
		if holdsSecret(unit.Address) || file != "" && !filepath.IsAbs(file) {
			return // a fault already, and nothing more to say of it
		}
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
	if volume != "" {
		secret, err := d.fromEnvironment(SecretVariable(volume, side), "volume "+volume, 1)
		if err != nil {
			d.fault(path, label, err.Error())
		}
		if secret != "" || err != nil {
			return secret
		}
	}
	if file == "" {
		return ""
	}
	secret, err := readSecret(file, 1)
	if err != nil {
		d.fault(path+"."+fileKey, label+"."+fileKey, err.Error())
	}
	return secret
}

// fromEnvironment is the secret in a variable, with at least so many bytes; empty where
// the variable is not set. who tells people whose it is: a variable has one owner.
func (d *decoder) fromEnvironment(variable, who string, least int) (Secret, error) {
	value, ok := os.LookupEnv(variable)
	if !ok {
		return "", nil
	}
	if d.variables == nil {
		d.variables = make(map[string]string)
	}
	owner, taken := d.variables[variable]
	d.variables[variable] = who
	switch {
	case taken && owner != who:
		return "", fmt.Errorf("%s of the environment is the secret of %s too; rename one of them, or use secret files", variable, owner)
	case len(value) < least || len(value) > maxSecret:
		return "", fmt.Errorf("the secret in %s has %d bytes; it is %d to %d", variable, len(value), least, maxSecret)
	case strings.ContainsAny(value, notInSecret):
		return "", fmt.Errorf("the secret in %s has more than one line; a secret is one line of text", variable)
	}
	return Secret(value), nil
}

// readSecret is the only line of a file that none but its owner may read, with at least
// so many bytes.
func readSecret(file string, least int) (Secret, error) {
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
	// Its owner may write it at any time.
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 && int(owner.Uid) != os.Geteuid() {
		return "", fmt.Errorf("%s belongs to user %d; let it belong to root or to the user that lunshift runs as", file, owner.Uid)
	}
	content, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return "", fmt.Errorf("cannot read %s: %w", file, pathless(err))
	}
	secret := bytes.TrimRight(content, "\r\n")
	if len(secret) == 0 || len(secret) > maxSecret || len(content) > maxSecretFile {
		return "", fmt.Errorf("%s holds no secret; it is one line of %d to %d bytes", file, least, maxSecret)
	}
	if bytes.ContainsAny(secret, notInSecret) {
		return "", fmt.Errorf("%s holds more than one line, or a NUL; a secret is one line of text", file)
	}
	if len(secret) < least {
		return "", fmt.Errorf("the secret in %s has %d bytes; it is %d to %d", file, len(secret), least, maxSecret)
	}
	return Secret(secret), nil
}
