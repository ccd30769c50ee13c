// Package conf is the configuration of lunshift: the TOML schema, its defaults
// and its validation. Load reports every fault of a file at once, each with file,
// line and key.
//
// The package knows no device and no network: whether a logical unit can be
// reached, and whether two of them fit together, is found out by the service.
package conf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
)

// DefaultPath is where commands look for the configuration when none is named.
const DefaultPath = "/etc/lunshift/lunshift.toml"

// DefaultControl is the control socket of a configuration that names none.
const DefaultControl = "/run/lunshift/control.sock"

// maxFile bounds a configuration file in bytes; a volume takes about 500.
const maxFile = 4 << 20

// byteOrderMark is what some editors put before a text in UTF-8.
const byteOrderMark = "\xef\xbb\xbf"

// Config is a whole configuration file, validated, defaults filled in.
type Config struct {
	// Path is the file it was read from.
	Path    string
	Service Service
	// Volumes holds at least one volume, in the order of the file.
	Volumes []Volume
	// Groups are in the order of the file.
	Groups []Group
}

// Service is the [service] table: what all volumes share.
type Service struct {
	// Portals are the addresses initiators connect to, at least one.
	Portals []Portal
	// Control is the absolute path of the control socket.
	Control string
	// HTTP is the "host:port" of the metrics; empty for none.
	HTTP string
	// State is the absolute path of the directory with flags and lifecycle records.
	State string
	// LogLevel is debug, info, warn or error; LogFormat is text or json.
	LogLevel, LogFormat string
	// InitiatorName is what lunshift calls itself towards the arrays.
	InitiatorName string
	// LoginTimeout bounds one login to an array, 1 s to 10 min.
	LoginTimeout time.Duration
	// IOTimeout is how long a command waits for an array that went away, 1 s to 1 h.
	IOTimeout time.Duration
	// ShutdownTimeout is how long a stop may take in all, 1 s to 10 min.
	ShutdownTimeout time.Duration
	Limits          Limits
	Copy            Copies
	// Discovery is what an initiator proves before it sees any target name; its zero
	// value asks for nothing.
	Discovery CHAP
}

// Volume is one [[volume]] table: one migration.
type Volume struct {
	// Name is unique: a letter or digit, then up to 63 of A-Z a-z 0-9 . _ -
	Name string
	// IQN and LUN are where initiators find the volume; the pair is unique.
	IQN string
	// LUN is 0 to 16383 (flat space addressing, SAM-5 4.7.7.3).
	LUN         uint64
	Source      Unit
	Destination Unit
	// Sessions is how many sessions lunshift opens to each array, 1 to 16.
	Sessions int
	// Digests guards what goes to and from the arrays with CRC32C (RFC 7143 13.1).
	Digests bool
	// Autostart starts the migration with the service.
	Autostart bool
	// VerifySample is how much of source and destination is compared before a cutover;
	// 0 is nothing.
	VerifySample Size
	// Verify is VerifyOff or VerifyReadback.
	Verify string
	// Allocation is AllocationAuto, AllocationDevice, AllocationFileSystem or AllocationAll.
	Allocation string
	// DestinationCache is CacheAuto, CacheVolatile or CacheNonvolatile.
	DestinationCache string
	// Overwrite allows a destination that is not blank.
	Overwrite bool
	// Seeded allows it too: the destination has most of the data already. Both sides are
	// compared, and only what differs is written.
	Seeded bool
	// Mirror has writes go to both sides from the start on.
	Mirror bool
	// RegionSize is the unit of copying, a power of two from 64 KiB to 64 MiB.
	RegionSize Size
	// FileBlockSize is the logical block length of plain files, 512 or 4096 bytes.
	FileBlockSize uint32
	Copy          Copy
	// Initiators may come in, the first that matches counts (see Initiator); without any, those on this
	// host's loopback.
	Initiators []Initiator
	// PortalGroups are the groups whose portals lead to the volume; empty is all.
	PortalGroups []uint16
	// ReservationBy is ByPort or ByName.
	ReservationBy string
	// Identity is IdentityOwn, IdentitySource or IdentityDestination.
	Identity string
	// Redirect is where logins to IQN are sent after the cutover, its host an IP address
	// or a name; without an Address they are refused. The destination has IQN and LUN too,
	// where it tells.
	Redirect Portal
	// RedirectFor is how long after the cutover that goes on, up to 366 days; 0 is without end.
	RedirectFor time.Duration
	// LogoutTimeout is how long initiators may take to log out at the cutover, 1 s to 10 min.
	LogoutTimeout time.Duration
	// Hooks are those of all volumes, and the volume's own in their place.
	Hooks Hooks
}

// What a persistent reservation's registration belongs to.
const (
	// ByPort: the initiator port, which has the ISID in its name (RFC 7143 4.4.1).
	ByPort = "initiator-port"
	// ByName: the initiator name, so that it outlives a change of the ISID.
	ByName = "initiator-name"
)

// Whose identity initiators find.
const (
	// IdentityOwn: one that lunshift makes from IQN and LUN.
	IdentityOwn = "own"
	// IdentitySource: the source's, so that the volume is one more path to it.
	IdentitySource = "source"
	// IdentityDestination: the destination's.
	IdentityDestination = "destination"
)

// What is done to tell that the destination took what was copied.
const (
	// VerifyOff: nothing beyond the checksums in memory.
	VerifyOff = "off"
	// VerifyReadback: what was written is read back and compared before it is flagged.
	VerifyReadback = "readback"
)

// What tells which blocks of the source are copied.
const (
	// AllocationAuto: the source where it can tell, else the file systems on it.
	AllocationAuto = "auto"
	// AllocationDevice: the source where it can tell, else everything is.
	AllocationDevice = "device"
	// AllocationFileSystem: what the source, where it can tell, and the file systems on it call
	// allocated.
	AllocationFileSystem = "filesystem"
	// AllocationAll: everything is.
	AllocationAll = "all"
)

// What the destination's cache is.
const (
	// CacheAuto: what the device says.
	CacheAuto = "auto"
	// CacheVolatile: it loses at a power loss what was not flushed.
	CacheVolatile = "volatile"
	// CacheNonvolatile: it does not, and is not flushed before flags are set.
	CacheNonvolatile = "nonvolatile"
)

// Unit is one side of a volume.
type Unit struct {
	// Address is "iscsi://[user@]host[:port]/iqn/lun" or the absolute path of a
	// file or a block device. It holds no secret.
	Address string
	// Secret is the CHAP secret of the user in Address; empty where there is none.
	Secret Secret
	// TargetSecret is what the array must prove to know in turn (mutual CHAP); empty
	// asks for no proof.
	TargetSecret Secret
}

// Copy is how fast the background copy goes, and when.
type Copy struct {
	// Depth is how many regions are copied at once, 1 to 256.
	Depth int
	// Rate is in bytes per second; 0 is no limit.
	Rate Size
	// Priority is which volumes come first where not all are copied at a time, -1000 to
	// 1000; the higher first.
	Priority int
}

// Copies is the [service.copy] table: the background copies of all volumes together.
type Copies struct {
	// Parallel is how many volumes are copied at a time, up to 4096; 0 is all.
	Parallel int
	// Rate is in bytes per second; 0 is no limit.
	Rate Size
}

func defaultService() Service {
	return Service{
		Portals:         []Portal{{"0.0.0.0:3260", 1}},
		Control:         DefaultControl,
		HTTP:            "127.0.0.1:9260",
		State:           "/var/lib/lunshift",
		LogLevel:        "info",
		LogFormat:       "text",
		InitiatorName:   defaultInitiatorName(),
		LoginTimeout:    15 * time.Second,
		IOTimeout:       time.Minute,
		ShutdownTimeout: 30 * time.Second,
		Limits:          defaultLimits(),
	}
}

func defaultVolume() Volume {
	return Volume{
		RegionSize:    1 << 20,
		FileBlockSize: 512,
		VerifySample:  64 << 20,
		Sessions:      1,
		Copy:          Copy{Depth: 8},
		ReservationBy: ByPort, Identity: IdentityOwn,
		RedirectFor:   24 * time.Hour,
		LogoutTimeout: 10 * time.Second,
		Hooks:         defaultHooks(),

		Verify: VerifyOff, Allocation: AllocationAuto, DestinationCache: CacheAuto,
	}
}

// AddressCheck says what is wrong with the address of a logical unit, in one
// line without secrets; nil when it is well formed.
type AddressCheck func(address string) error

// Load reads and validates a configuration file. Addresses of logical units are
// also held against the checks. A file with faults gives Faults, which has all of
// them; a file that cannot be read gives one plain error.
//
// Secrets come from the variables of the environment that SecretVariable,
// InitiatorSecretVariable and DiscoverySecretVariable name, which win, or from the
// files that the configuration names.
func Load(path string, checks ...AddressCheck) (*Config, error) {
	text, err := read(path)
	if err != nil {
		return nil, err
	}
	return parse(path, text, checks)
}

// Control is the control socket that the file names, or the default one. Nothing
// else in the file needs to be right, so that commands reach a running service
// whose file is being edited.
func Control(path string) (string, error) {
	text, err := read(path)
	if err != nil {
		return "", err
	}
	var file struct {
		Service struct {
			Control string `toml:"control"`
		} `toml:"service"`
	}
	if err := toml.Unmarshal(text, &file); err != nil {
		return "", Faults{syntaxFault(path, text, err)}
	}
	if file.Service.Control == "" {
		return DefaultControl, nil
	}
	return file.Service.Control, nil
}

func read(path string) ([]byte, error) {
	f, err := openFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration %s: %w", path, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration %s: %w", path, pathless(err))
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("the configuration %s is larger than %d MiB: is it the right file?", path, maxFile>>20)
	}
	return bytes.TrimPrefix(text, []byte(byteOrderMark)), nil
}

// openFile opens a regular file. Anything else is refused without waiting for it, as
// a pipe that nobody writes would make it.
func openFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, pathless(err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, pathless(err)
	}
	return f, nil
}

// pathless is the cause of a file error; the text around it names the path.
func pathless(err error) error {
	var pathErr *os.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

func parse(path string, text []byte, checks []AddressCheck) (*Config, error) {
	var tree map[string]any
	if err := toml.Unmarshal(text, &tree); err != nil {
		return nil, Faults{syntaxFault(path, text, err)}
	}
	d := &decoder{file: path, lines: keyLines(bytes.Clone(text)), checks: checks}
	cfg := d.config(tree)
	if len(d.faults) > 0 {
		return nil, d.faults.sorted()
	}
	cfg.Path = path
	return cfg, nil
}

// defaultInitiatorName is the same at every start of a host and differs between
// hosts, because arrays grant access and keep reservations by it.
func defaultInitiatorName() string {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "localhost"
	}
	name := "iqn.2026-11.lunshift:" + lowerName(host)
	if len(name) > maxISCSIName {
		name = name[:maxISCSIName]
	}
	return name
}
