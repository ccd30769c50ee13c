package conf

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// decoder turns a TOML tree into a Config. It goes on after a fault, so that all
// are found in one run.
type decoder struct {
	file   string
	lines  map[string]int
	checks []AddressCheck
	faults Faults
	// portals are those of the service; nil where they have faults.
	portals []Portal
	// variables are the environment's that were read, and whose secret each is.
	variables map[string]string
	// hooks are those of all volumes.
	hooks Hooks
	// proofs are the CHAP secrets of initiators and of the target towards them.
	proofs []proof
}

// setting is one key of a table. take is called with the key's value and gives
// the reason why it cannot be.
type setting struct {
	key  string
	take func(value any) error
}

func (d *decoder) config(tree map[string]any) *Config {
	cfg := &Config{Service: defaultService()}
	d.portals, d.hooks = cfg.Service.Portals, defaultHooks()
	var volumes, groups []any
	d.table(tree, "", "", []setting{
		{"service", d.subtable("service", "service", func() []setting { return d.service(&cfg.Service) })},
		{"hooks", d.subtable("hooks", "hooks", func() []setting { return d.hooks.settings() })},
		{"volume", func(v any) error {
			list, ok := v.([]any)
			if !ok {
				return fmt.Errorf("is %s; each volume opens with a line [[volume]]", kindOf(v))
			}
			volumes = list
			return nil
		}},
		{"group", func(v any) error {
			list, ok := v.([]any)
			if !ok {
				return fmt.Errorf("is %s; each group opens with a line [[group]]", kindOf(v))
			}
			groups = list
			return nil
		}},
	})
	if _, given := tree["volume"]; !given || volumes != nil && len(volumes) == 0 {
		d.fault("", "volume", "there is none: add a [[volume]] with name, iqn, source and destination")
	}
	uses := newUses()
	for i, v := range volumes {
		path := fmt.Sprintf("volume[%d]", i)
		m, ok := v.(map[string]any)
		if !ok {
			d.fault(path, path, fmt.Sprintf("is %s; each volume opens with a line [[volume]]", kindOf(v)))
			continue
		}
		cfg.Volumes = append(cfg.Volumes, d.volume(path, m, uses))
	}
	// Where a volume's name is faulty, it is not known which one a group means.
	cfg.Groups = d.groups(groups, cfg.Volumes, len(uses.names) == len(volumes))
	d.oneLogin(cfg.Volumes)
	d.oneRedirect(cfg.Volumes)
	d.reflections()
	return cfg
}

func (d *decoder) service(s *Service) []setting {
	return []setting{
		{"portals", func(v any) error {
			err := portals(&s.Portals)(v)
			if d.portals = s.Portals; err != nil {
				d.portals = nil
			}
			return err
		}},
		{"control", all(text(&s.Control), func() error { return checkSocket(s.Control) })},
		{"http", all(text(&s.HTTP), func() error { return checkHTTP(s.HTTP) })},
		{"state", all(text(&s.State), func() error { return checkAbsolute(s.State) })},
		{"log_level", oneOf(&s.LogLevel, "debug", "info", "warn", "error")},
		{"log_format", oneOf(&s.LogFormat, "text", "json")},
		{"initiator_name", all(text(&s.InitiatorName), func() error { return checkISCSIName(s.InitiatorName) })},
		{"login_timeout", duration(&s.LoginTimeout, time.Second, 10*time.Minute)},
		{"io_timeout", duration(&s.IOTimeout, time.Second, time.Hour)},
		{"shutdown_timeout", duration(&s.ShutdownTimeout, time.Second, 10*time.Minute)},
		{"limits", tableOf(func(m map[string]any) { d.limits(&s.Limits, m) })},
		{"copy", d.subtable("service.copy", "service.copy", func() []setting {
			return []setting{
				{"parallel", integer(&s.Copy.Parallel, 0, 4096)},
				{"rate", size(&s.Copy.Rate)},
			}
		})},
		{"discovery", tableOf(func(m map[string]any) {
			const path = "service.discovery"
			var keys chapKeys
			faulty := d.table(m, path, path, keys.settings())
			s.Discovery = d.chap(keys, faulty, path, path, "discovery", DiscoverySecretVariable, true)
			if len(m) == 0 {
				d.fault(path, path, "is empty; it has chap_user and chap_secret_file, or leave it out for no proof")
			}
		})},
	}
}

func (d *decoder) volume(path string, m map[string]any, uses *uses) Volume {
	v := defaultVolume()
	v.Hooks = d.hooks
	label := path
	if name, ok := m["name"].(string); ok && checkName(name) == nil {
		label = "volume[" + name + "]"
	}
	var files secretFiles
	faulty := d.table(m, path, label, d.volumeSettings(&v, &files, path, label))
	for _, key := range []string{"name", "iqn", "source", "destination"} {
		if _, given := m[key]; !given {
			faulty[key] = true
			d.fault(path, label+"."+key, "is missing; every volume has name, iqn, source and destination")
		}
	}
	d.secrets(&v.Source, v.Name, "source", path, label, files.source)
	d.secrets(&v.Destination, v.Name, "destination", path, label, files.destination)
	d.groupsWithPortals(path, label, &v)
	d.redirection(path, label, &v, faulty)
	if list, given := m["initiator"]; given {
		volume := v.Name
		if faulty["name"] {
			volume = ""
		}
		v.Initiators = d.initiators(list, volume, path+".initiator", label+".initiator")
	}
	uses.add(d, path, label, &v, faulty)
	return v
}

// secretFiles are where a volume's secrets are kept.
type secretFiles struct{ source, destination sideFiles }

// sideFiles are the files with the secrets of one side; empty for none.
type sideFiles struct{ secret, target string }

func secretFile(to *string) func(any) error {
	return all(text(to), func() error {
		if !filepath.IsAbs(*to) { // it may be the secret itself, and is not shown
			return errors.New("is not an absolute path; begin it with /, and write the secret into that file")
		}
		return nil
	})
}

func (d *decoder) volumeSettings(v *Volume, files *secretFiles, path, label string) []setting {
	return []setting{
		{"name", all(text(&v.Name), func() error { return checkName(v.Name) })},
		{"iqn", all(text(&v.IQN), func() error {
			err := checkISCSIName(v.IQN)
			v.IQN = strings.ToLower(v.IQN) // digits of eui and naa names
			return err
		})},
		{"lun", integer(&v.LUN, 0, maxLUN)},
		{"source", all(text(&v.Source.Address), func() error { return d.checkAddress(v.Source.Address) })},
		{"destination", all(text(&v.Destination.Address), func() error { return d.checkAddress(v.Destination.Address) })},
		{"source_secret_file", secretFile(&files.source.secret)},
		{"source_target_secret_file", secretFile(&files.source.target)},
		{"destination_secret_file", secretFile(&files.destination.secret)},
		{"destination_target_secret_file", secretFile(&files.destination.target)},
		{"sessions", integer(&v.Sessions, 1, 16)},
		{"digests", boolean(&v.Digests)},
		{"autostart", boolean(&v.Autostart)},
		{"overwrite", boolean(&v.Overwrite)},
		{"seeded", boolean(&v.Seeded)},
		{"mirror", boolean(&v.Mirror)},
		{"verify", oneOf(&v.Verify, VerifyOff, VerifyReadback)},
		{"verify_sample", size(&v.VerifySample)},
		{"allocation", oneOf(&v.Allocation, AllocationAuto, AllocationDevice, AllocationFileSystem, AllocationAll)},
		{"destination_cache", oneOf(&v.DestinationCache, CacheAuto, CacheVolatile, CacheNonvolatile)},
		{"region_size", all(size(&v.RegionSize), func() error { return checkRegionSize(v.RegionSize) })},
		{"file_block_size", all(integer(&v.FileBlockSize, 512, 4096), func() error {
			if v.FileBlockSize != 512 && v.FileBlockSize != 4096 {
				return fmt.Errorf("is %d; it is 512 or 4096", v.FileBlockSize)
			}
			return nil
		})},
		{"copy", d.subtable(path+".copy", label+".copy", func() []setting {
			return []setting{
				{"depth", integer(&v.Copy.Depth, 1, 256)},
				{"rate", size(&v.Copy.Rate)},
				{"priority", integer(&v.Copy.Priority, -1000, 1000)},
			}
		})},
		{"initiator", func(any) error { return nil }}, // read once the name is known
		{"portal_groups", portalGroups(&v.PortalGroups)},
		{"reservation_by", oneOf(&v.ReservationBy, ByPort, ByName)},
		{"identity", oneOf(&v.Identity, IdentityOwn, IdentitySource, IdentityDestination)},
		{"redirect", redirect(&v.Redirect)},
		{"redirect_for", duration(&v.RedirectFor, 0, 366*24*time.Hour)},
		{"logout_timeout", duration(&v.LogoutTimeout, time.Second, 10*time.Minute)},
		{"hooks", d.subtable(path+".hooks", label+".hooks", func() []setting { return v.Hooks.settings() })},
	}
}

// table hands each value of m to the setting of that key. A key without one is a
// fault. It tells which keys have faults.
func (d *decoder) table(m map[string]any, path, label string, settings []setting) map[string]bool {
	faulty := make(map[string]bool)
	for _, key := range slices.Sorted(maps.Keys(m)) {
		at := join(path, key)
		i := slices.IndexFunc(settings, func(s setting) bool { return s.key == key })
		if i < 0 {
			d.fault(at, join(label, key), "there is no such setting; "+nearest(key, settings))
			faulty[key] = true
			continue
		}
		err := settings[i].take(m[key])
		if err == nil {
			continue
		}
		faulty[key] = true
		elements, ok := err.(elementFaults)
		if !ok {
			d.fault(at, join(label, key), err.Error())
		}
		for _, e := range elements {
			d.fault(fmt.Sprintf("%s[%d]", at, e.index), join(label, key), e.text)
		}
	}
	return faulty
}

// elementFaults are what is wrong with the elements of a list.
type elementFaults []elementFault

type elementFault struct {
	index int
	text  string
}

func (e elementFaults) Error() string { return e[0].text }

func (d *decoder) subtable(path, label string, settings func() []setting) func(any) error {
	return tableOf(func(m map[string]any) { d.table(m, path, label, settings()) })
}

func tableOf(take func(map[string]any)) func(any) error {
	return func(v any) error {
		m, ok := v.(map[string]any)
		if !ok {
			return fmt.Errorf("is %s; it is a table of settings", kindOf(v))
		}
		take(m)
		return nil
	}
}

// fault notes a fault of the key at path, or of the nearest table around it.
func (d *decoder) fault(path, key, text string) {
	line := 1
	for p := path; p != ""; {
		if n, ok := d.lines[p]; ok {
			line = n
			break
		}
		p = p[:max(strings.LastIndexByte(p, '.'), 0)]
	}
	d.faults = append(d.faults, Fault{File: d.file, Line: line, Key: key, Text: text})
}

// all takes the value and then checks what was taken.
func all(take func(any) error, check func() error) func(any) error {
	return func(v any) error {
		if err := take(v); err != nil {
			return err
		}
		return check()
	}
}

func text(to *string) func(any) error {
	return func(v any) error {
		s, ok := v.(string)
		if !ok {
			return fmt.Errorf("is %s; it is a text in quotes", kindOf(v))
		}
		*to = s
		return nil
	}
}

func boolean(to *bool) func(any) error {
	return func(v any) error {
		b, ok := v.(bool)
		if !ok {
			return fmt.Errorf("is %s; it is true or false, without quotes", kindOf(v))
		}
		*to = b
		return nil
	}
}

func integer[T int | uint32 | uint64](to *T, low, high int64) func(any) error {
	return func(v any) error {
		n, ok := v.(int64)
		if !ok {
			return fmt.Errorf("is %s; it is a number from %d to %d, without quotes", kindOf(v), low, high)
		}
		if n < low || n > high {
			return fmt.Errorf("is %d; it is from %d to %d", n, low, high)
		}
		*to = T(n)
		return nil
	}
}

func size(to *Size) func(any) error {
	return func(v any) error {
		switch v := v.(type) {
		case string:
			return to.UnmarshalText([]byte(v))
		case int64:
			if v < 0 {
				return fmt.Errorf("is %d; a size is not negative", v)
			}
			*to = Size(v)
			return nil
		}
		return fmt.Errorf("is %s; it is a size such as \"64MiB\"", kindOf(v))
	}
}

func duration(to *time.Duration, low, high time.Duration) func(any) error {
	return func(v any) error {
		s, ok := v.(string)
		if !ok {
			return fmt.Errorf("is %s; it is a time such as \"30s\"", kindOf(v))
		}
		t, err := time.ParseDuration(s)
		if err != nil {
			return fmt.Errorf("%q is no time; it is a number with s, m or h, such as \"30s\"", s)
		}
		if t < low || t > high {
			return fmt.Errorf("is %s; it is from %s to %s", s, low, high)
		}
		*to = t
		return nil
	}
}

func oneOf(to *string, choices ...string) func(any) error {
	return func(v any) error {
		s, ok := v.(string)
		if !ok || !slices.Contains(choices, s) {
			return fmt.Errorf("is %v; it is one of %s", v, strings.Join(choices, ", "))
		}
		*to = s
		return nil
	}
}

func kindOf(v any) string {
	switch v := v.(type) {
	case string:
		return "a text"
	case bool:
		return fmt.Sprint(v)
	case int64:
		return fmt.Sprintf("the number %d", v)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return "no number"
		}
		return fmt.Sprintf("the number %g", v)
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}

// nearest says which setting was probably meant.
func nearest(key string, settings []setting) string {
	names := make([]string, len(settings))
	best, least := "", 3
	for i, s := range settings {
		names[i] = s.key
		if n := distance(key, s.key); n < least {
			best, least = s.key, n
		}
	}
	if best != "" {
		return fmt.Sprintf("is %s meant?", best)
	}
	return "there are " + strings.Join(names, ", ")
}

// distance is how many letters to insert, delete or change make one word the other.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
