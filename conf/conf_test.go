package conf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

const minimal = `
[[volume]]
name        = "db01"
iqn         = "iqn.2026-11.net.example:db01"
source      = "iscsi://10.0.0.5/iqn.2001-04.com.example:old/1"
destination = "/dev/sdx"
`

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lunshift.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, text string) *Config {
	t.Helper()
	cfg, err := Load(write(t, text))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// faultsOf loads text, which must be refused, and gives "line: key: text" of each fault.
func faultsOf(t *testing.T, text string) []string {
	t.Helper()
	path := write(t, text)
	_, err := Load(path)
	var faults Faults
	if !errors.As(err, &faults) {
		t.Fatalf("got %v, want faults", err)
	}
	var lines []string
	for _, f := range faults {
		if f.File != path {
			t.Errorf("fault names file %q, want %q", f.File, path)
		}
		lines = append(lines, fmt.Sprintf("%d: %s: %s", f.Line, f.Key, f.Text))
	}
	return lines
}

// secretIn makes a secret file and gives its path.
func secretIn(t *testing.T, dir, name, secret string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFourSettingsAreEnough(t *testing.T) {
	cfg := load(t, minimal)
	want := Volume{
		Name: "db01", IQN: "iqn.2026-11.net.example:db01",
		Source:      Unit{Address: "iscsi://10.0.0.5/iqn.2001-04.com.example:old/1"},
		Destination: Unit{Address: "/dev/sdx"},
		RegionSize:  1 << 20, FileBlockSize: 512, VerifySample: 64 << 20, Sessions: 1, Copy: Copy{Depth: 8}, ReservationBy: ByPort,
		Verify: VerifyOff, Allocation: AllocationAuto, DestinationCache: CacheAuto, Identity: IdentityOwn,
		RedirectFor: 24 * time.Hour, LogoutTimeout: 10 * time.Second, Hooks: Hooks{Timeout: time.Minute},
	}
	if len(cfg.Volumes) != 1 || !reflect.DeepEqual(cfg.Volumes[0], want) {
		t.Errorf("got %+v, want %+v", cfg.Volumes, want)
	}
	s := cfg.Service
	if len(s.Portals) != 1 || s.Portals[0] != (Portal{"0.0.0.0:3260", 1}) || s.Control != DefaultControl ||
		s.HTTP != "127.0.0.1:9260" || s.State != "/var/lib/lunshift" || s.LogLevel != "info" {
		t.Errorf("defaults of the service: %+v", s)
	}
	if err := checkISCSIName(s.InitiatorName); err != nil {
		t.Errorf("default initiator name: %v", err)
	}
}

func TestEverySettingIsTaken(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s3cret of 14 b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := load(t, `
[service]
portals = ["127.0.0.1:0", "[::1]:3260"]
control = "/tmp/c.sock"
http    = ""
state   = "/tmp/state"
log_level = "debug"
log_format = "json"
initiator_name = "iqn.2026-11.net.example:gw"
login_timeout = "3s"
io_timeout = "1m30s"
shutdown_timeout = "5s"
copy = { parallel = 4, rate = "1GiB" }

[[volume]]
name = "db01"
iqn = "iqn.2026-11.net.example:db01"
lun = 7
source = "iscsi://me@10.0.0.5:3261/iqn.2001-04.com.example:old/1"
source_secret_file = "`+secret+`"
destination = "/srv/new.img"
autostart = true
overwrite = true
sessions = 4
digests = true
region_size = "4MiB"
file_block_size = 4096
copy = { depth = 256, rate = "200MiB", priority = -3 }

[[volume]]
name = "db02"
iqn = "iqn.2026-11.net.example:db01"
source = "/srv/a"
destination = "/srv/b"
[volume.copy]
rate = 1048576
`)
	s := cfg.Service
	if s.Control != "/tmp/c.sock" || s.HTTP != "" || s.State != "/tmp/state" || s.LogLevel != "debug" ||
		s.LogFormat != "json" || s.InitiatorName != "iqn.2026-11.net.example:gw" || s.LoginTimeout != 3*time.Second ||
		s.IOTimeout != 90*time.Second || s.ShutdownTimeout != 5*time.Second || s.Copy != (Copies{4, 1 << 30}) || len(s.Portals) != 2 {
		t.Errorf("service: %+v", s)
	}
	v := cfg.Volumes[0]
	if v.LUN != 7 || v.Source.Secret.Reveal() != "s3cret of 14 b" || !v.Autostart || !v.Overwrite ||
		v.RegionSize != 4<<20 || v.FileBlockSize != 4096 || v.Sessions != 4 || !v.Digests || v.Copy != (Copy{256, 200 << 20, -3}) {
		t.Errorf("volume: %+v", v)
	}
	if got := cfg.Volumes[1].Copy; got != (Copy{8, 1 << 20, 0}) {
		t.Errorf("copy of the second volume: %+v", got)
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if text := fmt.Sprintf(format, v); strings.Contains(text, "s3cret") {
			t.Errorf("%s prints the secret: %s", format, text)
		}
	}
}

func TestAllFaultsAreReportedTogetherWithLineAndKey(t *testing.T) {
	got := faultsOf(t, `[service]
portals = ["storage.example:3260"]
htp = "127.0.0.1:9260"
state = "state"
io_timeout = "1 minute"

[[volume]]
name = "db 01"
iqn = "IQN.2026-11.net.example:db01"
source = "nfs://10.0.0.5/x"
destination = "/dev/sdx"
lun = 70000
copy = { depth = 0, rate = "fast", depht = 2 }

[[volume]]
name = "db02"
iqn = "iqn.2026-11.net.example:db02"
source = "/srv/a"
region_size = "3MiB"
autostart = "yes"

[log]
level = "info"
`)
	want := []string{
		`2: service.portals: "storage.example" is no IP address`,
		`3: service.htp: there is no such setting; is http meant?`,
		`4: service.state: "state" is not an absolute path`,
		`5: service.io_timeout: "1 minute" is no time`,
		`8: volume[0].name: "db 01" is no name`,
		`9: volume[0].iqn: "IQN.2026-11.net.example:db01" has capitals`,
		`10: volume[0].source: has the unknown scheme "nfs"`,
		`12: volume[0].lun: is 70000; it is from 0 to 16383`,
		`13: volume[0].copy.depth: is 0; it is from 1 to 256`,
		`13: volume[0].copy.depht: there is no such setting; is depth meant?`,
		`13: volume[0].copy.rate: "fast" is no size`,
		`15: volume[db02].destination: is missing`,
		`19: volume[db02].region_size: is 3MiB; it is a power of two`,
		`20: volume[db02].autostart: is a text; it is true or false`,
		`22: log: there is no such setting; there are service, hooks, volume`,
	}
	for _, w := range want {
		found := false
		for _, g := range got {
			found = found || strings.HasPrefix(g, w)
		}
		if !found {
			t.Errorf("missing fault %q", w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d faults, want %d:\n%s", len(got), len(want), strings.Join(got, "\n"))
	}
}

func TestFaultsHideNoOtherFaults(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       []string
	}{
		{"duplicates of a volume with other faults", minimal + `[[volume]]
name = "db01"
iqn = "iqn.2026-11.net.example:db01"
source = "iscsi://10.0.0.5/iqn.2001-04.com.example:old/1"
destination = "/dev/../dev/sdx"
sessions = 0
`, []string{
			`7: volume[db01].lun: volume db01 has LUN 0`,
			`8: volume[db01].name: another volume is called "db01"`,
			`10: volume[db01].source: is the source of volume db01 already`,
			`11: volume[db01].destination: is the destination of volume db01 already`,
			`12: volume[db01].sessions: is 0`,
		}},
		{"duplicates of what has faults by itself", strings.Replace(minimal, `"db01"`, `"db 01"`, 1) + `[[volume]]
name = "db02"
iqn = "iqn.2026-11.net.example:db01"
lun = -1
source = "/srv/a"
destination = "/dev/sdx"
`, []string{
			`3: volume[0].name: "db 01" is no name`,
			`10: volume[db02].lun: is -1`,
			`12: volume[db02].destination: is the destination of volume[0] already`,
		}},
		{"elements of a list", "[service]\nportals = [\n  '1.2.3.4',\n  '1.2.3.4:1',\n  7,\n  '1.2.3.4:1',\n]\n" + minimal, []string{
			`3: service.portals: "1.2.3.4" is no portal`,
			`5: service.portals: holds the number 7`,
			`6: service.portals: has 1.2.3.4:1 twice`,
		}},
		{"no volume", "[service]\nlog_level = 'loud'\n", []string{`1: volume: there is none`, `2: service.log_level: is loud`}},
		{"empty list of volumes", "volume = []\n[service]\nodd = 1\n", []string{`1: volume: there is none`, `3: service.odd: there is no such setting`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := faultsOf(t, tc.text)
			if len(got) != len(tc.want) {
				t.Fatalf("%d faults, want %d:\n%s", len(got), len(tc.want), strings.Join(got, "\n"))
			}
			for i, want := range tc.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("got %q, want %q", got[i], want)
				}
			}
		})
	}
}

func TestByteOrderMarkIsSkipped(t *testing.T) {
	if cfg := load(t, "\ufeff"+minimal); cfg.Volumes[0].Name != "db01" {
		t.Errorf("%+v", cfg)
	}
	if _, err := Control(write(t, "\ufeff"+minimal)); err != nil {
		t.Error(err)
	}
}

// within fails the test when do does not end; a pipe that is opened or read waits
// for a writer without end.
func within(t *testing.T, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("it hangs")
	}
}

func TestOnlyRegularFilesAreRead(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, "/dev/zero", t.TempDir()} {
		within(t, func() {
			_, err := Load(path)
			if want := "cannot read the configuration " + path + ": it is not a regular file"; err == nil || err.Error() != want {
				t.Errorf("got %v, want %s", err, want)
			}
			if _, err := Control(path); err == nil {
				t.Errorf("%s gives a control socket", path)
			}
			text := strings.Replace(minimal, "10.0.0.5", "me@10.0.0.5", 1) + "source_secret_file = '" + path + "'\n"
			got := faultsOf(t, text)
			if len(got) != 1 || !strings.Contains(got[0], "cannot read "+path+": it is not a regular file") {
				t.Errorf("secret: %q", got)
			}
		})
	}
}

func TestFaultsOfOneSetting(t *testing.T) {
	with := func(old, new string) string { return strings.Replace(minimal, old, new, 1) }
	second := func(lines string) string { return minimal + "[[volume]]\n" + lines }
	for _, tc := range []struct{ name, text, want string }{
		{"no volume", "", "1: volume: there is none"},
		{"empty name", with(`"db01"`, `""`), `3: volume[0].name: "" is no name`},
		{"password with colon", with("10.0.0.5", "me:hunter2hunter2@10.0.0.5"), "5: volume[db01].source: has a secret in the URL"},
		{"password with percent", with("10.0.0.5", "me%hunter2hunter2@10.0.0.5"), "5: volume[db01].source: has a secret in the URL"},
		{"user without secret", with("10.0.0.5", "me@10.0.0.5"), "5: volume[db01].source: user me needs a secret; put it into source_secret_file, or into LUNSHIFT_SECRET_DB01_SOURCE"},
		{"relative path", with("/dev/sdx", "sdx"), `6: volume[db01].destination: is no logical unit`},
		{"no iqn date", with("iqn.2026-11.", "iqn.2026-13."), "4: volume[db01].iqn:"},
		{"long iqn", with("example:db01", "example:"+strings.Repeat("a", 250)), "4: volume[db01].iqn: has "},
		{"same name", second("name='db01'\niqn='iqn.2026-11.net.example:x'\nsource='/a'\ndestination='/b'"), `8: volume[db01].name: another volume is called "db01"`},
		{"same address", second("name='db02'\niqn='iqn.2026-11.net.example:db01'\nlun=0\nsource='/a'\ndestination='/b'"), "10: volume[db02].lun: volume db01 has LUN 0"},
		{"same unit twice", second("name='db02'\niqn='iqn.2026-11.net.example:x'\nsource='/a'\ndestination='/dev/../dev/sdx'"), "11: volume[db02].destination: is the destination of volume db01 already"},
		{"one's source is another's destination", second("name='db02'\niqn='iqn.2026-11.net.example:x'\nsource='iscsi://10.0.0.5:3260/iqn.2001-04.com.example:old/1'\ndestination='/b'"), "10: volume[db02].source: is the source of volume db01 already"},
		{"source is destination", with("/dev/sdx", "iscsi://10.0.0.5:3260/iqn.2001-04.com.example:old/1"), "6: volume[db01].destination: is the source"},
		{"portals empty", "[service]\nportals=[]\n" + minimal, "2: service.portals: is empty"},
		{"portals twice", "[service]\nportals=['1.2.3.4:1','1.2.3.4:1']\n" + minimal, "2: service.portals: has 1.2.3.4:1 twice"},
		{"portal without port", "[service]\nportals=['1.2.3.4']\n" + minimal, `2: service.portals: "1.2.3.4" is no portal`},
		{"portal port", "[service]\nportals=['1.2.3.4:99999']\n" + minimal, `2: service.portals: "1.2.3.4:99999" has no port number`},
		{"long socket", "[service]\ncontrol='/" + strings.Repeat("s", 120) + "'\n" + minimal, "2: service.control: has 121 bytes"},
		{"wrong http", "[service]\nhttp='9260'\n" + minimal, `2: service.http: "9260" is no address`},
		{"service is text", "service = 'x'\n" + minimal, "1: service: is a text; it is a table"},
		{"volume is a table", "[volume]\nname='x'\n", "1: volume: is a table; each volume opens with"},
		{"volumes are texts", "volume = ['x']\n", "1: volume[0]: is a text; each volume opens with"},
		{"negative size", minimal + "region_size = -1\n", "7: volume[db01].region_size: is -1"},
		{"float lun", minimal + "lun = 1.5\n", "7: volume[db01].lun: is the number 1.5"},
		{"file block size", minimal + "file_block_size = 1024\n", "7: volume[db01].file_block_size: is 1024; it is 512 or 4096"},
		{"no TOML", "[service\n", "1: : "},
		{"key twice", minimal + "name = 'x'\n", "7: volume.name: key name is already defined"},
		{"key of a table twice", "[service]\nstate = '/a'\ncontrol = '/a'\n\ncontrol = '/b'\n" + minimal, "5: service.control: key control is already defined"},
		{"key of a nested table twice", minimal + "[volume.copy]\ndepth = 1\ndepth = 2\n[service]\n", "9: volume.copy.depth: key depth is already defined"},
		{"table twice", "[service]\n[service]\n" + minimal, "2: service: table service already exists"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := faultsOf(t, tc.text)
			if len(got) != 1 || !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("got %q, want one fault %q", got, tc.want)
			}
			if strings.Contains(strings.Join(got, ""), "hunter2") {
				t.Errorf("the fault shows the secret: %q", got)
			}
		})
	}
}

func TestAddressChecksAreAsked(t *testing.T) {
	path := write(t, minimal)
	_, err := Load(path, func(address string) error {
		if strings.HasPrefix(address, "/dev") {
			return errors.New("is odd")
		}
		return nil
	})
	if want := path + ":6: volume[db01].destination: is odd"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestEnvironmentSecretWinsOverFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("from the file\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(minimal, "10.0.0.5", "me@10.0.0.5", 1) + "source_secret_file = '" + file + "'\n"
	if got := load(t, text).Volumes[0].Source.Secret.Reveal(); got != "from the file" {
		t.Errorf("secret %q, want the file's", got)
	}
	t.Setenv("LUNSHIFT_SECRET_DB01_SOURCE", "from the environment")
	if got := load(t, text).Volumes[0].Source.Secret.Reveal(); got != "from the environment" {
		t.Errorf("secret %q, want the environment's", got)
	}
	t.Setenv("LUNSHIFT_SECRET_DB01_SOURCE", "first line\nsecond line")
	if got := faultsOf(t, text); len(got) != 1 || !strings.Contains(got[0], "more than one line") || strings.Contains(got[0], "first") {
		t.Errorf("two lines: %q", got)
	}
	t.Setenv("LUNSHIFT_SECRET_DB01_SOURCE", "")
	if got := faultsOf(t, text); len(got) != 1 || !strings.Contains(got[0], "has 0 bytes") {
		t.Errorf("empty variable: %q", got)
	}
}

func TestSecretFilesMustBePrivate(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		content string
		mode    os.FileMode
		want    string
	}{
		{"secret secret\n", 0o640, "chmod 600"},
		{"secret secret\n", 0o604, "chmod 600"},
		{"secret secret\nsecond line\n", 0o600, "more than one line"},
		{"secret secret\rsecond line", 0o600, "more than one line"},
		{"secret secret\x00", 0o600, "a NUL"},
		{"x" + strings.Repeat("\n", 2000) + "secret secret", 0o600, "holds no secret"},
		{"\n", 0o600, "holds no secret"},
		{strings.Repeat("x", 300), 0o600, "holds no secret"},
	} {
		file := filepath.Join(dir, "secret")
		if err := os.WriteFile(file, []byte(tc.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, tc.mode); err != nil {
			t.Fatal(err)
		}
		text := strings.Replace(minimal, "10.0.0.5", "me@10.0.0.5", 1) + "source_secret_file = '" + file + "'\n"
		got := strings.Join(faultsOf(t, text), "\n")
		if !strings.Contains(got, tc.want) || strings.Contains(got, "secret secret") {
			t.Errorf("mode %o: got %q, want %q", tc.mode, got, tc.want)
		}
	}
}

func TestMutualCHAPHasTwoSecrets(t *testing.T) {
	with := strings.Replace(minimal, "10.0.0.5", "me@10.0.0.5", 1)
	t.Setenv("LUNSHIFT_SECRET_DB01_SOURCE_TARGET", "the array's secret")
	if got := faultsOf(t, minimal); len(got) != 1 || !strings.Contains(got[0], "an array proves itself only to a user that does") {
		t.Errorf("without the user's: %q", got)
	}
	t.Setenv("LUNSHIFT_SECRET_DB01_SOURCE", "the user's secret")
	if s := load(t, with).Volumes[0].Source; s.Secret.Reveal() != "the user's secret" || s.TargetSecret.Reveal() != "the array's secret" {
		t.Errorf("both: %q and %q", s.Secret.Reveal(), s.TargetSecret.Reveal())
	}
	t.Setenv("LUNSHIFT_SECRET_DB01_SOURCE", "the array's secret")
	if got := faultsOf(t, with); len(got) != 1 || !strings.Contains(got[0], "are the same") {
		t.Errorf("the same twice: %q", got)
	}
}

func TestVolumesThatShareASecretVariableAreRefused(t *testing.T) {
	t.Setenv("LUNSHIFT_SECRET_DB_1_SOURCE", "some secret here")
	text := ""
	for i, name := range []string{"db-1", "db.1"} {
		text += fmt.Sprintf("[[volume]]\nname=%q\niqn='iqn.2026-11.net.example:%d'\nsource='iscsi://me@h/iqn.2001-04.com.example:s%d/1'\ndestination='/d%d'\n", name, i, i, i)
	}
	got := faultsOf(t, text)
	if len(got) != 1 || !strings.Contains(got[0], "LUNSHIFT_SECRET_DB_1_SOURCE of the environment is the secret of volume db-1 too") {
		t.Errorf("got %q", got)
	}
}

func TestUnreadableFileIsOneClearError(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{filepath.Join(dir, "none.toml"), dir} {
		_, err := Load(path)
		if err == nil || !strings.HasPrefix(err.Error(), "cannot read the configuration "+path+": ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v", err)
		}
	}
	huge := write(t, strings.Repeat("#", maxFile+1))
	if _, err := Load(huge); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("got %v", err)
	}
}

func TestControlIsFoundInAFileWithOtherFaults(t *testing.T) {
	path := write(t, "[service]\ncontrol = '/x.sock'\nodd = 1\n[[volume]]\nname = 3\n")
	if got, err := Control(path); got != "/x.sock" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := Control(write(t, minimal)); got != DefaultControl || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := Control(write(t, "[")); err == nil {
		t.Error("no error for a file that is not TOML")
	}
}

var commented = regexp.MustCompile(`(?m)^# ([a-z0-9_]+ += |\[)`)

func TestSampleFileLoadsAndShowsEverySetting(t *testing.T) {
	if _, err := Load("lunshift.toml"); err != nil {
		t.Fatalf("as it is: %v", err)
	}
	raw, err := os.ReadFile("lunshift.toml")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	all := commented.ReplaceAllString(text, "$1")
	d := &decoder{}
	settings := slices.Concat(d.service(&Service{}), d.volumeSettings(&Volume{}, &secretFiles{}, "", ""),
		limitSettings(&Limits{}), initiatorSettings(&Initiator{}, &chapKeys{}), groupSettings(&Group{}), new(Hooks).settings())
	for _, s := range settings {
		if !regexp.MustCompile(`(?m)^(` + s.key + ` += |\[+[a-z]+\.` + s.key + `\]+$)`).MatchString(all) {
			t.Errorf("the sample does not show %s", s.key)
		}
		if !regexp.MustCompile("(?m)^\\|.*`" + s.key + "\\b.*\\|$").Match(readme) {
			t.Errorf("the tables of the README do not show %s", s.key)
		}
	}
	dir := t.TempDir()
	all = regexp.MustCompile(`/etc/lunshift/[\w-]+\.secret`).ReplaceAllStringFunc(all, func(file string) string {
		return secretIn(t, dir, filepath.Base(file), "secret of "+filepath.Base(file))
	})
	all = strings.ReplaceAll(all, "iscsi://", "iscsi://me@")
	withAll := load(t, all)
	asIs := load(t, text)
	withAll.Service.InitiatorName = asIs.Service.InitiatorName
	if d := withAll.Service.Discovery; d.User == "" || d.Secret == "" || d.TargetUser == "" || d.TargetSecret == "" {
		t.Errorf("discovery of the sample: %+v", d)
	}
	withAll.Service.Discovery = CHAP{}
	if fmt.Sprint(withAll.Service) != fmt.Sprint(asIs.Service) {
		t.Errorf("the sample shows other defaults of the service than there are:\n%v\n%v", withAll.Service, asIs.Service)
	}
	if g := withAll.Groups; len(asIs.Groups) != 0 || len(g) != 1 || g[0].HoldLimit != 5*time.Second {
		t.Errorf("groups of the sample: %+v", g)
	}
	v, w := withAll.Volumes[0], asIs.Volumes[0]
	v.Source, v.Destination = w.Source, w.Destination
	if i := v.Initiators; len(i) != 1 || len(i[0].Networks) != 2 || i[0].CHAP.TargetSecret == "" || len(v.PortalGroups) != 1 {
		t.Errorf("who may come in by the sample: %+v", v)
	}
	v.Initiators, v.PortalGroups = nil, nil
	if h := v.Hooks; len(h.BeforeStart) != 0 || len(h.AfterSynced) != 1 || len(h.BeforeCutover) != 2 || len(h.AfterRollback) != 1 {
		t.Errorf("hooks of the sample: %+v", h)
	}
	v.Hooks = Hooks{Timeout: v.Hooks.Timeout}
	if !reflect.DeepEqual(v, w) {
		t.Errorf("the sample shows other defaults of a volume than there are:\n%v\n%v", v, w)
	}
}

func TestSizesReadBackAsTheyPrint(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := Size(rapid.Uint64Range(0, 1<<63-1).Draw(t, "size"))
		got, err := ParseSize(s.String())
		if err != nil || got != s {
			t.Fatalf("%d prints as %s and reads as %d (%v)", uint64(s), s, uint64(got), err)
		}
	})
}

func TestSizesInTheirUnits(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "512": 512, "1KiB": 1024, "1 MiB": 1 << 20, "1.5GiB": 3 << 29, "2kB": 2000, "3TiB": 3 << 40} {
		if got, err := ParseSize(text); got != want || err != nil {
			t.Errorf("%q: got %d, %v, want %d", text, uint64(got), err, uint64(want))
		}
	}
	for _, text := range []string{"", "-1", "MiB", "1XiB", "1e3", "99999999999999999999", "16EiB", "1MiB/s", " 1", "1,000"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q: got %d, want an error", text, uint64(got))
		}
	}
}

func FuzzConfigurationNeverPanics(f *testing.F) {
	sample, err := os.ReadFile("lunshift.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sample)
	f.Add([]byte(minimal))
	f.Add([]byte(three + "[[group]]\nname='erp'\nvolumes=['db01',2]\nhold_limit='1s'\n[[group.x]]\n"))
	f.Add([]byte("hooks.timeout='2s'\n" + three + "[volume.hooks]\nbefore_start=['/a','b']\nafter_synced=[1]\nafter_cutover='x'\n"))
	f.Add([]byte("volume = [{name = 'x', copy = {depth = 1}}]\n[service]\nportals = [1, 'x']"))
	f.Add([]byte("[[volume]]\n[volume.copy]\ndepth=1\n[[volume.copy.x]]\n[[volume]]\ncopy.rate='1'"))
	f.Add([]byte(minimal + "portal_groups=[1,65536]\nreservation_by=1\n[[volume.initiator]]\nname='*'\nnetworks=['::/0','10.0.0.0/8']\nchap_user='u'\n[[volume.initiator]]\nname='iqn.*'\n"))
	f.Add([]byte("[service.limits]\nnop_interval='0'\nfirst_burst_length='16MiB'\n[service.discovery]\ntarget_user='x'\n[[volume.initiator.x]]\nvolume.y=1\n" + minimal + minimal + "[[volume.initiator]]\nname='*'\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := parse("f", text, nil)
		if err == nil && len(cfg.Volumes) == 0 {
			t.Fatal("accepted without a volume")
		}
		var faults Faults
		if err != nil && (!errors.As(err, &faults) || len(faults) == 0) {
			t.Fatalf("error without faults: %v", err)
		}
		for _, fault := range faults {
			if fault.Line < 1 {
				t.Fatalf("fault without a line: %v", fault)
			}
		}
	})
}
