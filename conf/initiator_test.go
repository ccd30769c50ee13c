package conf

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestWhoMayComeInIsTaken(t *testing.T) {
	dir := t.TempDir()
	secretIn(t, dir, "app", "secret of app1")
	secretIn(t, dir, "gw", "secret of gateway")
	secretIn(t, dir, "disc", "secret of discovery")
	cfg := load(t, strings.ReplaceAll(`
[service]
portals = ["10.0.0.20:3260", "[2001:db8::20]:3260,2", "127.0.0.1:0,65535"]
[service.discovery]
chap_user = "disc"
chap_secret_file = "DIR/disc"
`+minimal+`
portal_groups = [2, 1]
reservation_by = "initiator-name"

[[volume.initiator]]
name = "iqn.1993-08.org.debian:01:abc"
networks = ["10.0.0.0/24", "2001:db8::/64", "192.0.2.7", "::1"]
chap_user = "app1"
chap_secret_file = "DIR/app"
target_user = "gw"
target_secret_file = "DIR/gw"

[[volume.initiator]]
name = "iqn.1993-08.org.debian:*"
networks = ["10.0.0.0/8"]

[[volume.initiator]]
name = "*"
networks = ["127.0.0.0/8"]
`, "DIR", dir))
	if want := []Portal{{"10.0.0.20:3260", 1}, {"[2001:db8::20]:3260", 2}, {"127.0.0.1:0", 65535}}; !reflect.DeepEqual(cfg.Service.Portals, want) {
		t.Errorf("portals: %v, want %v", cfg.Service.Portals, want)
	}
	if want := (CHAP{User: "disc", Secret: "secret of discovery"}); cfg.Service.Discovery != want {
		t.Errorf("discovery: %+v", cfg.Service.Discovery)
	}
	network := func(texts ...string) (all []netip.Prefix) {
		for _, s := range texts {
			all = append(all, netip.MustParsePrefix(s))
		}
		return all
	}
	v := cfg.Volumes[0]
	want := []Initiator{
		{"iqn.1993-08.org.debian:01:abc", network("10.0.0.0/24", "2001:db8::/64", "192.0.2.7/32", "::1/128"),
			CHAP{"app1", "secret of app1", "gw", "secret of gateway"}},
		{"iqn.1993-08.org.debian:*", network("10.0.0.0/8"), CHAP{}},
		{"*", network("127.0.0.0/8"), CHAP{}},
	}
	if !reflect.DeepEqual(v.Initiators, want) {
		t.Errorf("initiators: %+v, want %+v", v.Initiators, want)
	}
	if !reflect.DeepEqual(v.PortalGroups, []uint16{2, 1}) || v.ReservationBy != ByName {
		t.Errorf("groups %v, reservations by %s", v.PortalGroups, v.ReservationBy)
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if text := fmt.Sprintf(format, cfg); strings.Contains(text, "secret of") {
			t.Errorf("%s prints a secret: %s", format, text)
		}
	}
}

func TestEveryLimitIsTaken(t *testing.T) {
	got := load(t, `
[service.limits]
connections = 11
connections_per_address = 12
connections_logging_in = 10
sessions_per_volume = 13
commands_per_session = 14
bytes_in_flight = "65MiB"
initiator_login_timeout = "16s"
login_failures = 17
data_timeout = "18s"
nop_interval = "19s"
max_recv_data_segment_length = "20KiB"
max_burst_length = "16MiB"
first_burst_length = 512
max_outstanding_r2t = 23
text_length = "24KiB"
flag_memory = "5MiB"
`+minimal).Service.Limits
	want := Limits{
		Connections: 11, ConnectionsPerAddress: 12, ConnectionsLoggingIn: 10, SessionsPerVolume: 13, CommandsPerSession: 14, BytesInFlight: 65 << 20,
		InitiatorLoginTimeout: 16 * time.Second, LoginFailures: 17, DataTimeout: 18 * time.Second, NopInterval: 19 * time.Second,
		MaxRecvDataSegmentLength: 20 << 10, MaxBurstLength: 1<<24 - 1, FirstBurstLength: 512, MaxOutstandingR2T: 23, TextLength: 24 << 10, FlagMemory: 5 << 20,
	}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if l := load(t, "[service.limits]\nnop_interval = '0s'\nmax_burst_length = '64KiB'\n"+minimal).Service.Limits; l.NopInterval != 0 || l.FirstBurstLength != 64<<10 {
		t.Errorf("no pings and a short burst: %+v", l)
	}
}

func TestFaultsOfLimits(t *testing.T) {
	for line, want := range map[string]string{
		"connections = 0":                       "is 0; it is from 1 to 65535",
		"connections_per_address = -1":          "is -1; it is from 1 to 1048576",
		"connections_logging_in = 0":            "is 0; it is from 1 to 1048576",
		"sessions_per_volume = '5'":             "is a text; it is a number",
		"commands_per_session = 4097":           "is 4097; it is from 1 to 4096",
		"bytes_in_flight = '1MiB'":              "is 1MiB; it is from 64MiB to 1PiB",
		"initiator_login_timeout = '1ms'":       "is 1ms; it is from 1s to 1h0m0s",
		"login_failures = 1.5":                  "is the number 1.5; it is a number",
		"data_timeout = 5":                      "is the number 5; it is a time",
		"nop_interval = '-1s'":                  "is -1s; it is from 1s to 1h0m0s, or \"0s\" for no pings",
		"max_recv_data_segment_length = 511":    "is 511B; it is from 512B to 16MiB",
		"max_burst_length = '17MiB'":            "is 17MiB; it is from 512B to 16MiB",
		"first_burst_length = '2MiB'":           "is more than max_burst_length (1MiB)",
		"max_outstanding_r2t = 65":              "is 65; it is from 1 to 64",
		"flag_memory = '2KiB'":                  "is 2KiB; it is from 1MiB to 1TiB",
		"text_length = '2MiB'":                  "is 2MiB; it is from 8KiB to 1MiB",
		"login_timeout = '15s'":                 "there is no such setting",
		"max_burst_length = 99999999999999999":  "it is from 512B to 16MiB",
		"connections = 99999999999999999999999": "",
	} {
		key, _, _ := strings.Cut(line, " ")
		got := faultsOf(t, "[service.limits]\n"+line+"\n"+minimal)
		if len(got) != 1 || !strings.HasPrefix(got[0], "2: ") || want != "" && !strings.HasPrefix(got[0], "2: service.limits."+key+": ") || !strings.Contains(got[0], want) {
			t.Errorf("%s: got %q, want one fault %q", line, got, want)
		}
	}
}

func TestFaultsOfWhoMayComeIn(t *testing.T) {
	secret := secretIn(t, t.TempDir(), "secret", "secret of app1")
	initiator := func(lines string) string { return minimal + "[[volume.initiator]]\n" + lines }
	chap := "chap_user='a'\nchap_secret_file='" + secret + "'\n"
	for _, tc := range []struct{ name, text, want string }{
		{"group 0", "[service]\nportals=['1.2.3.4:1,0']\n" + minimal, `2: service.portals: "1.2.3.4:1,0" has no portal group from 1 to 65535`},
		{"group 65536", "[service]\nportals=['1.2.3.4:1,65536']\n" + minimal, `2: service.portals: "1.2.3.4:1,65536" has no portal group`},
		{"group of letters", "[service]\nportals=['1.2.3.4:1,x']\n" + minimal, `2: service.portals: "1.2.3.4:1,x" has no portal group`},
		{"portal in two groups", "[service]\nportals=['1.2.3.4:1,1','1.2.3.4:1,2']\n" + minimal, `2: service.portals: has 1.2.3.4:1 twice`},
		{"mapped portal", "[service]\nportals=['[::ffff:1.2.3.4]:1']\n" + minimal, `2: service.portals: "[::ffff:1.2.3.4]:1" is an IPv4 address in IPv6 form; write 1.2.3.4:1`},
		{"groups are a number", minimal + "portal_groups = 1\n", "7: volume[db01].portal_groups: is the number 1; it is a list"},
		{"no groups", minimal + "portal_groups = []\n", "7: volume[db01].portal_groups: is empty"},
		{"group without portal", minimal + "portal_groups = [\n1,\n3]\n", "9: volume[db01].portal_groups: no portal is in group 3"},
		{"group of a volume twice", minimal + "portal_groups = [1, 1]\n", "7: volume[db01].portal_groups: has 1 twice"},
		{"group of a volume too large", minimal + "portal_groups = [70000]\n", "7: volume[db01].portal_groups: holds the number 70000"},
		{"reservation by", minimal + "reservation_by = 'host'\n", "7: volume[db01].reservation_by: is host; it is one of initiator-port, initiator-name"},

		{"discovery is a text", "[service]\ndiscovery='x'\n" + minimal, "2: service.discovery: is a text; it is a table"},
		{"discovery is empty", "[service.discovery]\n" + minimal, "1: service.discovery: is empty"},
		{"discovery without secret", "[service.discovery]\nchap_user='a'\n" + minimal, "2: service.discovery.chap_user: a needs a secret; put it into chap_secret_file, or into LUNSHIFT_SECRET_DISCOVERY of"},
		{"discovery with unknown key", "[service.discovery]\nname='a'\n" + chap + minimal, "2: service.discovery.name: there is no such setting"},

		{"initiator is a text", minimal + "initiator = 'x'\n", "7: volume[db01].initiator: is a text; each initiator opens with a line [[volume.initiator]]"},
		{"initiator is a table", minimal + "[volume.initiator]\nname='*'\n", "7: volume[db01].initiator: is a table; each initiator opens with"},
		{"initiators are texts", minimal + "initiator = ['iqn.2026-11.net.example:x']\n", "7: volume[db01].initiator[0]: is a text; each initiator opens with"},
		{"no initiators", minimal + "initiator = []\n", "7: volume[db01].initiator: is empty"},
		{"no name", initiator("networks=['::/0']\n"), "7: volume[db01].initiator[0].name: is missing"},
		{"empty name", initiator("name=''\n"), "8: volume[db01].initiator[0].name: is empty"},
		{"name is a list", initiator("name=['*']\n"), "8: volume[db01].initiator[0].name: is a list; it is a text"},
		{"star in the middle", initiator("name='iqn.*:x'\n"), `8: volume[db01].initiator[0].name: "iqn.*:x" has a "*" that is not at its end`},
		{"two stars", initiator("name='**'\n"), `8: volume[db01].initiator[0].name: "**" has a "*" that is not at its end`},
		{"beginning of no name", initiator("name='app*'\n"), `8: volume[db01].initiator[0].name: "app*" begins no iSCSI name`},
		{"long beginning", initiator("name='iqn." + strings.Repeat("a", 220) + "*'\n"), `8: volume[db01].initiator[0].name: has 224 bytes before`},
		{"unknown key", initiator("name='*'\nnetwork=['::/0']\n"), "9: volume[db01].initiator[0].network: there is no such setting; is networks meant?"},
		{"networks are a text", initiator("name='*'\nnetworks='::/0'\n"), "9: volume[db01].initiator[0].networks: is a text; it is a list"},
		{"no networks", initiator("name='*'\nnetworks=[]\n"), "9: volume[db01].initiator[0].networks: is empty; nobody matches then"},
		{"network of letters", initiator("name='*'\nnetworks=[\n'10.0.0.0/24',\n'lan']\n"), `11: volume[db01].initiator[0].networks: "lan" is no network`},
		{"network with host bits", initiator("name='*'\nnetworks=['10.0.0.5/24']\n"), `9: volume[db01].initiator[0].networks: "10.0.0.5/24" has address bits behind its length; write 10.0.0.0/24 for the network, or 10.0.0.5`},
		{"mapped network", initiator("name='*'\nnetworks=['::ffff:10.0.0.0/120']\n"), `9: volume[db01].initiator[0].networks: "::ffff:10.0.0.0/120" is an IPv4 address in IPv6 form`},
		{"network with zone", initiator("name='*'\nnetworks=['fe80::1%eth0']\n"), `9: volume[db01].initiator[0].networks: "fe80::1%eth0" is no network`},
		{"network twice", initiator("name='*'\nnetworks=['10.0.0.1', '10.0.0.1/32']\n"), `9: volume[db01].initiator[0].networks: has 10.0.0.1/32 twice`},

		{"same entry twice", initiator("name='*'\n[[volume.initiator]]\nname='*'\n"), "9: volume[db01].initiator[1]: never counts, because * before it"},
		{"narrow behind broad", initiator("name='iqn.2026-11.*'\nnetworks=['10.0.0.0/8']\n[[volume.initiator]]\nname='iqn.2026-11.net.*'\nnetworks=['10.1.0.0/16']\n" + chap),
			"10: volume[db01].initiator[1]: never counts, because iqn.2026-11.* from 10.0.0.0/8 before it"},

		{"user without secret", initiator("name='*'\nchap_user='app-1'\n"), "9: volume[db01].initiator[0].chap_user: app-1 needs a secret; put it into chap_secret_file, or into LUNSHIFT_SECRET_DB01_INITIATOR_APP_1 of the environment"},
		{"secret without user", initiator("name='*'\nchap_secret_file='" + secret + "'\n"), "9: volume[db01].initiator[0].chap_secret_file: there is a secret but no chap_user"},
		{"empty user", initiator("name='*'\nchap_user=''\nchap_secret_file='" + secret + "'\n"), "9: volume[db01].initiator[0].chap_user: is empty"},
		{"long user", initiator("name='*'\nchap_user='" + strings.Repeat("u", 256) + "'\nchap_secret_file='" + secret + "'\n"), "9: volume[db01].initiator[0].chap_user: has 256 bytes"},
		{"user of two lines", initiator("name='*'\nchap_user=\"a\\nb\"\nchap_secret_file='" + secret + "'\n"), `9: volume[db01].initiator[0].chap_user: "a\nb" has control characters`},
		{"target's secret without user", initiator("name='*'\n" + chap + "target_secret_file='/x'\n"), "11: volume[db01].initiator[0].target_secret_file: there is a secret but no target_user"},
		{"target's user without secret", initiator("name='*'\n" + chap + "target_user='gw'\n"), "11: volume[db01].initiator[0].target_user: gw needs a secret; put it into target_secret_file, or into LUNSHIFT_SECRET_DB01_INITIATOR_A_TARGET of"},
		{"target alone", initiator("name='*'\ntarget_user='gw'\ntarget_secret_file='" + secret + "'\n"), "9: volume[db01].initiator[0].target_user: the target proves itself only to an initiator that does"},
		{"same secret for both", initiator("name='*'\n" + chap + "target_user='gw'\ntarget_secret_file='" + secret + "'\n"), "11: volume[db01].initiator[0].target_user: the target's secret is that of the initiator in volume[db01].initiator[0]"},
		{"relative file", initiator("name='*'\nchap_user='a'\nchap_secret_file='secret'\n"), `10: volume[db01].initiator[0].chap_secret_file: is not an absolute path`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := faultsOf(t, tc.text)
			if len(got) != 1 || !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("got %q, want one fault %q", got, tc.want)
			}
			if strings.Contains(strings.Join(got, ""), "secret of app1") {
				t.Errorf("the fault shows the secret: %q", got)
			}
		})
	}
}

func TestSecretsOfInitiatorsMustBePrivateAndLong(t *testing.T) {
	for _, tc := range []struct {
		content string
		mode    os.FileMode
		want    string
	}{
		{"secret secret\n", 0o644, "others can read FILE (mode 0644); chmod 600 it"},
		{"secret secr\n", 0o600, "the secret in FILE has 11 bytes; it is 12 to 255"},
		{"", 0o600, "FILE holds no secret; it is one line of 12 to 255 bytes"},
		{"secret secret\nsecret secret\n", 0o600, "FILE holds more than one line"},
		{strings.Repeat("s", 256), 0o600, "FILE holds no secret"},
		{"none", 0, "cannot read FILE: no such file or directory"},
	} {
		for _, table := range []string{"[service.discovery]\nchap_user='a'\nchap_secret_file='FILE'\n" + minimal, minimal + "[[volume.initiator]]\nname='*'\nchap_user='a'\nchap_secret_file='FILE'\n"} {
			file := filepath.Join(t.TempDir(), "secret")
			if tc.content != "none" {
				if err := os.WriteFile(file, []byte(tc.content), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(file, tc.mode); err != nil {
					t.Fatal(err)
				}
			}
			got := faultsOf(t, strings.ReplaceAll(table, "FILE", file))
			if len(got) != 1 || !strings.Contains(got[0], "chap_secret_file: "+strings.ReplaceAll(tc.want, "FILE", file)) || strings.Contains(got[0], "secret secr") {
				t.Errorf("%q with mode %o: got %q, want %q", tc.content, tc.mode, got, tc.want)
			}
		}
	}
	if got := load(t, minimal+"[[volume.initiator]]\nname='*'\nchap_user='a'\nchap_secret_file='"+secretIn(t, t.TempDir(), "s", strings.Repeat("s", 255))+"'\n"); len(got.Volumes[0].Initiators[0].CHAP.Secret) != 255 {
		t.Error("a secret of 255 bytes is not taken")
	}
}

func TestSecretsOfInitiatorsComeFromTheEnvironment(t *testing.T) {
	file := secretIn(t, t.TempDir(), "secret", "from the file")
	text := "[service.discovery]\nchap_user='disc'\ntarget_user='gw'\n" + minimal + "[[volume.initiator]]\nname='*'\nchap_user='app.1'\nchap_secret_file='" + file + "'\ntarget_user='gw'\n"
	for variable, value := range map[string]string{
		"LUNSHIFT_SECRET_DB01_INITIATOR_APP_1": "from the environment", "LUNSHIFT_SECRET_DB01_INITIATOR_APP_1_TARGET": "of the target",
		"LUNSHIFT_SECRET_DISCOVERY": "of discovery", "LUNSHIFT_SECRET_DISCOVERY_TARGET": "of its target",
	} {
		t.Setenv(variable, value)
	}
	cfg := load(t, text)
	if got, want := cfg.Volumes[0].Initiators[0].CHAP, (CHAP{"app.1", "from the environment", "gw", "of the target"}); got != want {
		t.Errorf("initiator: %q and %q", got.Secret.Reveal(), got.TargetSecret.Reveal())
	}
	if got, want := cfg.Service.Discovery, (CHAP{"disc", "of discovery", "gw", "of its target"}); got != want {
		t.Errorf("discovery: %q and %q", got.Secret.Reveal(), got.TargetSecret.Reveal())
	}
	// One variable for two users would give one the secret of the other.
	if got := faultsOf(t, text+"[[volume.initiator]]\nname='iqn.2026-11.*'\nchap_user='app-1'\n"); len(got) != 2 || !strings.Contains(got[1], "LUNSHIFT_SECRET_DB01_INITIATOR_APP_1 of the environment is the secret of user app.1 of volume db01 too") {
		t.Errorf("two users: %q", got)
	}
	for value, want := range map[string]string{"too short": "has 9 bytes; it is 12 to 255", "": "has 0 bytes", "first line\nsecond line": "has more than one line"} {
		t.Setenv("LUNSHIFT_SECRET_DB01_INITIATOR_APP_1", value)
		got := faultsOf(t, text)
		if len(got) != 1 || !strings.Contains(got[0], "volume[db01].initiator[0].chap_user: the secret in LUNSHIFT_SECRET_DB01_INITIATOR_APP_1 "+want) || value != "" && strings.Contains(got[0], value) {
			t.Errorf("%q: %q", value, got)
		}
	}
}

func TestASecretProvesOneSideAlone(t *testing.T) {
	dir := t.TempDir()
	one, two := secretIn(t, dir, "one", "secret number 1"), secretIn(t, dir, "two", "secret number 2")
	got := faultsOf(t, minimal+`
[[volume.initiator]]
name = "iqn.2026-11.net.example:a"
chap_user = "a"
chap_secret_file = "`+one+`"
[[volume.initiator]]
name = "iqn.2026-11.net.example:b"
chap_user = "b"
chap_secret_file = "`+two+`"
target_user = "gw"
target_secret_file = "`+one+`"
`)
	if len(got) != 1 || !strings.HasPrefix(got[0], "16: volume[db01].initiator[1].target_user: the target's secret is that of the initiator in volume[db01].initiator[0]") {
		t.Errorf("%q", got)
	}
}

func TestVolumesOfOneTargetAskForOneProof(t *testing.T) {
	dir := t.TempDir()
	chap := func(user, secret string) string {
		return "chap_user='" + user + "'\nchap_secret_file='" + secretIn(t, dir, strings.ReplaceAll(user+secret, " ", "_"), "secret "+secret) + "'\n"
	}
	app := chap("app", "number one")
	entry := func(lines string) string { return "[[volume.initiator]]\n" + lines }
	for _, tc := range []struct {
		name, first, second string
		fault               bool
	}{
		{"the same", entry("name='iqn.2026-11.net.example:a'\n" + app), entry("name='iqn.2026-11.net.example:a'\n" + app), false},
		{"another secret", entry("name='iqn.2026-11.net.example:a'\n" + app), entry("name='iqn.2026-11.net.example:a'\n" + chap("app", "number two")), true},
		{"another user", entry("name='iqn.2026-11.net.example:a'\n" + app), entry("name='iqn.2026-11.net.example:a'\n" + chap("other", "number one")), true},
		{"none", entry("name='iqn.2026-11.net.example:a'\n" + app), entry("name='iqn.2026-11.net.example:a'\n"), true},
		{"other initiators", entry("name='iqn.2026-11.net.example:a'\n" + app), entry("name='iqn.2026-11.net.example:b'\n"), false},
		{"other networks", entry("name='*'\nnetworks=['10.0.0.0/9']\n" + app), entry("name='*'\nnetworks=['10.128.0.0/9']\n"), false},
		{"networks that overlap", entry("name='*'\nnetworks=['10.0.0.0/9']\n" + app), entry("name='iqn.*'\nnetworks=['10.0.0.0/8']\n"), true},
		{"names that overlap", entry("name='iqn.2026-11.net.example:*'\n" + app), entry("name='iqn.2026-11.*'\n"), true},
		{"an earlier entry makes them the same", entry("name='iqn.2026-11.net.example:a'\n" + app + "[[volume.initiator]]\nname='*'\n"),
			entry("name='iqn.2026-11.net.example:a'\n" + app + "[[volume.initiator]]\nname='*'\n"), false},
		{"no list, and no proof on this host", "", entry("name='*'\nnetworks=['127.0.0.1']\n"), false},
		{"no list, and a proof on this host", "", entry("name='*'\n" + app), true},
		{"no list, and a proof elsewhere", "", entry("name='*'\nnetworks=['10.0.0.0/8']\n" + app), false},
		{"other portal groups", "portal_groups=[1]\n" + entry("name='*'\n"+app), "portal_groups=[2]\n" + entry("name='*'\n"), false},
		{"portal groups that overlap", "portal_groups=[1]\n" + entry("name='*'\n"+app), "portal_groups=[2,1]\n" + entry("name='*'\n"), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := "[service]\nportals=['127.0.0.1:1,1','127.0.0.1:2,2']\n" + minimal + tc.first +
				"[[volume]]\nname='db02'\niqn='iqn.2026-11.net.example:db01'\nlun=1\nsource='/a'\ndestination='/b'\n" + tc.second
			if !tc.fault {
				load(t, text)
				return
			}
			got := faultsOf(t, text)
			if len(got) != 1 || !strings.Contains(got[0], ": volume[db02].initiator: asks initiator ") || !strings.Contains(got[0], "for another proof than volume db01") {
				t.Errorf("got %q", got)
			}
			// Volumes of different targets need not agree.
			load(t, strings.Replace(text, "example:db01'\nlun=1", "example:db02'\nlun=1", 1))
		})
	}
}

// A contradiction is found wherever there is one: against every name and every address
// of a small world.
func TestContradictionsAreFoundWhereverTheyAre(t *testing.T) {
	names := []string{"iqn.a", "iqn.ab", "iqn.b", "iqn.*", "iqn.a*", "iqn.ab*", "*"}
	rapid.Check(t, func(t *rapid.T) {
		list := func(label string) (all []Initiator) {
			for range rapid.IntRange(1, 3).Draw(t, label) {
				i := Initiator{Name: rapid.SampledFrom(names).Draw(t, "name")}
				for range rapid.IntRange(0, 2).Draw(t, "networks") {
					bits := rapid.IntRange(29, 32).Draw(t, "bits")
					p, _ := netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(0, 7).Draw(t, "address"))}).Prefix(bits)
					i.Networks = append(i.Networks, p)
				}
				i.CHAP.User = rapid.SampledFrom([]string{"", "u"}).Draw(t, "user")
				all = append(all, i)
			}
			return all
		}
		a, b := list("a"), list("b")
		first := func(list []Initiator, name string, from netip.Addr) *Initiator {
			inFull := slices.ContainsFunc(list, func(i Initiator) bool { return i.Name == name })
			for n, i := range list {
				prefix, many := strings.CutSuffix(i.Name, "*")
				if inFull && i.Name != name || !inFull && !(many && strings.HasPrefix(name, prefix)) {
					continue
				}
				if len(i.Networks) == 0 || slices.ContainsFunc(i.Networks, func(p netip.Prefix) bool { return p.Contains(from) }) {
					return &list[n]
				}
			}
			return nil
		}
		want := false
		for _, name := range []string{"iqn.a", "iqn.ab", "iqn.abc", "iqn.ac", "iqn.b", "iqn.c", "eui.1"} {
			for last := range 9 {
				from := netip.AddrFrom4([4]byte{10, 0, 0, byte(last)})
				x, y := first(a, name, from), first(b, name, from)
				want = want || x != nil && y != nil && x.CHAP != y.CHAP
			}
		}
		if got := contradiction(a, b); (got != "") != want {
			t.Fatalf("got %q, want a contradiction: %v\n%v\n%v", got, want, a, b)
		}
	})
}

func TestNameInFullCountsBehindABeginning(t *testing.T) {
	got := load(t, minimal+"[[volume.initiator]]\nname='*'\n[[volume.initiator]]\nname='iqn.2026-11.net.example:X'\n").Volumes[0].Initiators
	if len(got) != 2 || got[1].Name != "iqn.2026-11.net.example:x" {
		t.Errorf("%v", got)
	}
}

func TestLongListsAreComparedAtOnce(t *testing.T) {
	secret := secretIn(t, t.TempDir(), "secret", "secret of app1")
	chap := "chap_user='a'\nchap_secret_file='" + secret + "'\n"
	for what, entry := range map[string]func(volume, k int) string{
		"networks": func(_, k int) string {
			return fmt.Sprintf("name='iqn.1993-08.org.debian:*'\nnetworks=['10.%d.%d.0/28']\n", k/256, k%256)
		},
		"other order, two proofs": func(volume, k int) string {
			if k = (k + volume*7) % maxInitiators; k%2 == 0 {
				return fmt.Sprintf("name='*'\nnetworks=['10.%d.%d.0/24']\n", k/256, k%256)
			}
			return fmt.Sprintf("name='*'\nnetworks=['10.%d.%d.0/24']\n", k/256, k%256) + chap
		},
		"names, two proofs": func(volume, k int) string {
			if k = (k + volume*7) % maxInitiators; k%2 == 0 {
				return fmt.Sprintf("name='iqn.2026-11.net.example:%d'\n", k)
			}
			return fmt.Sprintf("name='iqn.2026-11.net.example:%d'\n", k) + chap
		},
	} {
		var b strings.Builder
		b.WriteString(minimal)
		for volume := range 2 {
			if volume == 1 {
				b.WriteString("[[volume]]\nname='db02'\niqn='iqn.2026-11.net.example:db01'\nlun=1\nsource='/a'\ndestination='/b'\n")
			}
			for k := range maxInitiators {
				b.WriteString("[[volume.initiator]]\n" + entry(volume, k))
			}
		}
		start := time.Now()
		load(t, b.String())
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s: %v", what, took)
		} else {
			t.Logf("%s: %v", what, took)
		}
	}
}

// A secret is easily written where a file or an address belongs.
func TestSecretsInTheWrongPlaceAreNotShown(t *testing.T) {
	const secret = "TopSecretPassword"
	initiator := minimal + "[[volume.initiator]]\nname='*'\n"
	for key, text := range map[string]string{
		"chap_secret_file":          initiator + "chap_user='u'\nchap_secret_file='" + secret + "'\n",
		"target_secret_file":        initiator + "target_user='u'\ntarget_secret_file='" + secret + "'\n",
		"source_secret_file":        minimal + "source_secret_file='" + secret + "'\n",
		"destination_target_secret": minimal + "destination_target_secret_file='" + secret + "'\n",
		"redirect":                  minimal + "redirect='iscsi://u%" + secret + "@10.0.0.9:3260'\n",
		"redirect without scheme":   minimal + "redirect='u%" + secret + "@10.0.0.9:3260'\n",
		"portals":                   "[service]\nportals=['u%" + secret + "@10.0.0.9:3260']\n" + minimal,
		"portal with a group":       "[service]\nportals=['u%" + secret + "@10.0.0.9:3260,x']\n" + minimal,
		"http":                      "[service]\nhttp='http://u:" + secret + "@10.0.0.9'\n" + minimal,
		"iqn":                       strings.Replace(minimal, "iqn.2026", "iscsi://u%"+secret+"@10.0.0.9/iqn.2026", 1),
		"source":                    strings.Replace(minimal, "10.0.0.5", "u%"+secret+"@10.0.0.5", 1),
	} {
		got := faultsOf(t, text)
		if len(got) == 0 || strings.Contains(strings.ToLower(strings.Join(got, "\n")), strings.ToLower(secret)) {
			t.Errorf("%s: got %q", key, got)
		}
	}
}

func TestSecretFileOfAnotherUserIsRefused(t *testing.T) {
	file := secretIn(t, t.TempDir(), "secret", "secret of app1")
	if err := os.Chown(file, 12345, -1); err != nil {
		t.Skipf("only root gives files away: %v", err)
	}
	got := faultsOf(t, minimal+"[[volume.initiator]]\nname='*'\nchap_user='a'\nchap_secret_file='"+file+"'\n")
	if len(got) != 1 || !strings.Contains(got[0], file+" belongs to user 12345") {
		t.Errorf("got %q", got)
	}
}

func TestHostileListsAreRefusedAtOnce(t *testing.T) {
	within(t, func() {
		many := minimal + strings.Repeat("[[volume.initiator]]\nname='*'\n", maxInitiators+1)
		if got := faultsOf(t, many); len(got) != 1 || !strings.Contains(got[0], "has 1025 entries") {
			t.Errorf("many initiators: %d faults, %.200q", len(got), got)
		}
		var networks []string
		for i := range maxNetworks + 1 {
			networks = append(networks, fmt.Sprintf("'10.0.%d.%d'", i/256, i%256))
		}
		if got := faultsOf(t, minimal+"[[volume.initiator]]\nname='*'\nnetworks=["+strings.Join(networks, ",")+"]\n"); len(got) != 1 || !strings.Contains(got[0], "has 257 networks") {
			t.Errorf("many networks: %.200q", got)
		}
	})
}
