package control

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/target"
)

const listed = `portal_groups = [1]
reservation_by = "initiator-name"
[[volume.initiator]]
name = "iqn.2026-11.net.example:app1"
networks = ["127.0.0.0/8", "10.0.0.0/24"]
chap_user = "app1"
[[volume.initiator]]
name = "*"
networks = ["127.0.0.1"]
`

func TestCheckTellsWhoMayComeIn(t *testing.T) {
	t.Setenv("LUNSHIFT_SECRET_DB01_INITIATOR_APP1", "the secret of app1")
	dir := t.TempDir()
	source, destination := unitFile(t, dir, "old", 1<<20, 4096), unitFile(t, dir, "new", 1<<20, 0)
	check := func(cfg *conf.Config) (CheckReport, string) {
		t.Helper()
		report, err := Check(t.Context(), cfg, quiet())
		if err != nil || report.Refused() != nil {
			t.Fatal(err, report.Refused())
		}
		var text, again bytes.Buffer
		if err := WriteCheck(&text, report); err != nil {
			t.Fatal(err)
		}
		if err := json.NewEncoder(&again).Encode(report); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(text.String()+again.String(), "the secret of app1") {
			t.Error("check shows a secret")
		}
		return report, text.String()
	}
	contains := func(text string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(text, w) {
				t.Errorf("check lacks %q:\n%s", w, text)
			}
		}
	}

	cfg := configFor(t, dir, source, destination, "")
	report, text := check(cfg)
	if v := report.Volumes[0]; !v.LoopbackOnly || len(v.Initiators) != 0 || len(v.Warnings) != 0 || v.ReservationBy != conf.ByPort || report.Discovery != NoProof {
		t.Errorf("without a list: %+v", v)
	}
	contains(text, "may come in  loopback only: initiators on this host; add a [[volume.initiator]]")

	cfg.Service.Portals = []conf.Portal{{Address: "127.0.0.1:0", Group: 1}}
	cfg.Volumes[0].PortalGroups = []uint16{2}
	if _, text := check(cfg); !strings.Contains(text, "nobody can come in") {
		t.Errorf("no portal on loopback:\n%s", text)
	}

	cfg = configFor(t, dir, source, destination, listed)
	cfg.Service.Discovery = conf.CHAP{User: "d", Secret: "discovery secret", TargetUser: "gw", TargetSecret: "gateway's secret"}
	report, text = check(cfg)
	v := report.Volumes[0]
	want := []InitiatorReport{
		{"iqn.2026-11.net.example:app1", []string{"127.0.0.0/8", "10.0.0.0/24"}, CHAP, "app1", ""},
		{"*", []string{"127.0.0.1/32"}, NoProof, "", ""},
	}
	if !reflect.DeepEqual(v.Initiators, want) || v.LoopbackOnly || len(v.Warnings) != 0 || !slices.Equal(v.PortalGroups, []uint16{1}) || v.ReservationBy != conf.ByName || report.Discovery != MutualCHAP {
		t.Errorf("with a list: %+v", v)
	}
	cfg.Volumes[0].Redirect = conf.Portal{Address: "10.0.0.9:3260", Group: 1}
	if report, text := check(cfg); report.Volumes[0].Redirect != "10.0.0.9:3260" {
		t.Errorf("redirect: %+v", report.Volumes[0])
	} else {
		contains(text, "after cutover  logins are sent to 10.0.0.9:3260\n")
	}
	contains(text, "may come in    iqn.2026-11.net.example:app1 from 127.0.0.0/8, 10.0.0.0/24, CHAP\n",
		"any initiator from 127.0.0.1/32, without authentication\n", "portal groups  1\n", "discovery needs mutual CHAP\n")

	for _, open := range [][]netip.Prefix{nil, {netip.MustParsePrefix("10.0.0.0/24")}, {netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::/0")}} {
		cfg.Volumes[0].Initiators[1].Networks = open
		if report, _ := check(cfg); len(report.Volumes[0].Warnings) != 1 || !strings.Contains(report.Volumes[0].Warnings[0], "volume db01: any initiator from ") ||
			!strings.Contains(report.Volumes[0].Warnings[0], "needs no authentication") {
			t.Errorf("%v without authentication: %q", open, report.Volumes[0].Warnings)
		}
	}

	// Beside a service that still has the list of before.
	cfg = configFor(t, dir, source, destination, listed)
	service := start(t, cfg)
	if report, _ := check(cfg); len(report.Volumes[0].Warnings) != 0 || !report.Volumes[0].Served {
		t.Errorf("beside the service: %+v", report.Volumes[0])
	}
	edited := configFor(t, dir, source, destination, "")
	if report, text := check(edited); len(report.Volumes[0].Warnings) != 1 || !report.Volumes[0].LoopbackOnly {
		t.Errorf("an edited file: %+v", report.Volumes[0])
	} else {
		contains(text, "the running service lets others in than the file says")
	}
	for what, edit := range map[string]func(v *conf.Volume){
		"CHAP user":     func(v *conf.Volume) { v.Initiators[0].CHAP.User = "another" },
		"target's user": func(v *conf.Volume) { v.Initiators[0].CHAP.TargetUser = "another" },
		"redirect":      func(v *conf.Volume) { v.Redirect = conf.Portal{Address: "10.0.0.9:3260", Group: 1} },
	} {
		edited := configFor(t, dir, source, destination, listed)
		edit(&edited.Volumes[0])
		if report, _ := check(edited); len(report.Volumes[0].Warnings) != 1 || !strings.Contains(report.Volumes[0].Warnings[0], "lets others in") {
			t.Errorf("another %s: %q", what, report.Volumes[0].Warnings)
		}
	}
	if err := service.stop(); err != nil {
		t.Error(err)
	}
}

// A setting that conf takes must not keep the service from starting.
func TestLimitsThatTheFileTakesAreTakenByTheTarget(t *testing.T) {
	dir := t.TempDir()
	for name, lines := range map[string]string{
		"defaults": "",
		"least": `connections = 1
connections_per_address = 1
connections_logging_in = 1
sessions_per_volume = 1
commands_per_session = 1
bytes_in_flight = "64MiB"
initiator_login_timeout = "1s"
login_failures = 1
data_timeout = "1s"
nop_interval = "0s"
max_recv_data_segment_length = 512
max_burst_length = 512
first_burst_length = 512
max_outstanding_r2t = 1
text_length = "8KiB"
`,
		"most": `connections = 65535
connections_per_address = 1048576
connections_logging_in = 1048576
sessions_per_volume = 1048576
commands_per_session = 4096
bytes_in_flight = "1PiB"
initiator_login_timeout = "1h"
login_failures = 1048576
data_timeout = "24h"
nop_interval = "1h"
max_recv_data_segment_length = "16MiB"
max_burst_length = "16MiB"
first_burst_length = "16MiB"
max_outstanding_r2t = 64
text_length = "1MiB"
`,
	} {
		cfg := configFor(t, dir, "/old", "/new", "[service.limits]\n"+lines)
		made := targetConfig(cfg.Service, quiet())
		s, err := target.New(made)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		// Every limit of the target follows a setting: none is left to its own default.
		v := reflect.ValueOf(made)
		for i := range v.NumField() {
			if field := v.Type().Field(i); v.Field(i).IsZero() && field.Name != "Discovery" {
				t.Errorf("%s: no setting for %s of the target", name, field.Name)
			}
		}
		if l := cfg.Service.Limits; name == "least" && (made.NopInterval >= 0 || made.LoginTimeout != time.Second || made.FirstBurstLength != 512) ||
			name == "most" && (made.MaxBurstLength != 1<<24-1 || made.BytesInFlight != 1<<50 || made.MaxText != 1<<20) {
			t.Errorf("%s: %+v became %+v", name, l, made)
		}
	}
}

func TestServiceServesWhomItsFileAdmits(t *testing.T) {
	t.Setenv("LUNSHIFT_SECRET_DB01_INITIATOR_APP1", "the secret of app1")
	dir := t.TempDir()
	cfg := configFor(t, dir, unitFile(t, dir, "old", 1<<20, 4096), unitFile(t, dir, "new", 1<<20, 0),
		strings.Replace(listed, `name = "*"`, `name = "iqn.2026-11.net.example:free"`, 1))
	r := start(t, cfg)
	login := func(user, name, secret string) error {
		address := "iscsi://" + user + r.info.Portals[0] + "/iqn.2026-11.net.example:db01/0"
		dev, err := lun.Open(t.Context(), address, lun.Options{InitiatorName: name, Secret: secret, LoginTimeout: 5 * time.Second, Log: quiet()})
		if err != nil {
			return err
		}
		status, err := r.client.Status(t.Context(), "db01")
		if err != nil || len(status.Sessions) != 1 || status.Sessions[0].Initiator != name || status.Sessions[0].PortalGroup != 1 || (status.Sessions[0].CHAPUser == "app1") != (user != "") {
			t.Errorf("status beside the session of %s: %+v, %v", name, status.Sessions, err)
		}
		return dev.Close()
	}
	for _, tc := range []struct {
		user, name, secret string
		in                 bool
	}{
		{"app1@", "iqn.2026-11.net.example:app1", "the secret of app1", true},
		{"", "iqn.2026-11.net.example:free", "", true},
		{"app1@", "iqn.2026-11.net.example:app1", "another secret", false},
		{"", "iqn.2026-11.net.example:app1", "", false},
		{"", "iqn.2026-11.net.example:other", "", false},
	} {
		if err := login(tc.user, tc.name, tc.secret); (err == nil) != tc.in {
			t.Errorf("%s with %q: %v", tc.name, tc.user, err)
		}
	}
}
