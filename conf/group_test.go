package conf

import (
	"slices"
	"strings"
	"testing"
	"time"
)

const three = minimal + `
[[volume]]
name        = "db02"
iqn         = "iqn.2026-11.net.example:db02"
source      = "/dev/sda"
destination = "/dev/sdb"
[[volume]]
name        = "db03"
iqn         = "iqn.2026-11.net.example:db03"
source      = "/dev/sdc"
destination = "/dev/sdd"
`

func TestGroupsAreTaken(t *testing.T) {
	cfg := load(t, three+"[[group]]\nname = \"erp\"\nvolumes = [\"db03\", \"db01\"]\n[[group]]\nname = \"web\"\nvolumes = [\"db02\"]\nhold_limit = \"100ms\"\n")
	g := cfg.Group("erp")
	if g == nil || !slices.Equal(g.Volumes, []string{"db03", "db01"}) || g.HoldLimit != 5*time.Second || cfg.GroupOf("db01") != g || cfg.GroupOf("db09") != nil {
		t.Errorf("got %+v", cfg.Groups)
	}
	if cfg.Group("web").HoldLimit != 100*time.Millisecond || cfg.Group("db01") != nil {
		t.Errorf("got %+v", cfg.Groups)
	}
	to := load(t, three+"[[group]]\nname = \"erp\"\nvolumes = [\"db03\"]\n[[group]]\nname = \"new\"\nvolumes = [\"db02\"]\n")
	if got := strings.Join(cfg.GroupChanges(to), " "); got != "group[erp].volumes group[web] group[new]" {
		t.Errorf("changes: %s", got)
	}
	if got := cfg.GroupChanges(cfg); len(got) != 0 {
		t.Errorf("changes of nothing: %v", got)
	}
}

// A step of a group that means other volumes than its author thinks tears an image apart.
func TestFaultsOfGroupsAreFound(t *testing.T) {
	got := faultsOf(t, three+`[[group]]
name = "db02"
volumes = ["db01"]
[[group]]
name = "erp"
volumes = ["db01", "db02", "db09", "db02"]
hold_limit = "2m"
[[group]]
name = "erp"
volumes = []
[[group]]
volumes = "db03"
limit = 1
[[group]]
name = "a b"
volumes = [1]
`)
	for _, want := range []string{
		`19: group[db02].name: a volume is called "db02"; commands take both, so give the group another name`,
		`23: group[erp].volumes: volume db01 is in group[db02] already; a volume is in one group at most`,
		`23: group[erp].volumes: there is no volume "db09"`,
		`23: group[erp].volumes: names volume db02 twice`,
		`24: group[erp].hold_limit: is 2m; it is from 100ms to 1m0s`,
		`26: group[erp].name: another group is called "erp"; give each its own name`,
		`27: group[erp].volumes: is empty; name the volumes that are moved together`,
		`28: group[3].name: is missing; every group has name and volumes`,
		`29: group[3].volumes: is a text; it is a list of texts such as ["db01", "db02"]`,
		`30: group[3].limit: there is no such setting; there are name, volumes, hold_limit`,
		`32: group[4].name: "a b" is no name`,
		`33: group[4].volumes: holds the number 1; it is a list of texts`,
	} {
		if !slices.ContainsFunc(got, func(line string) bool { return strings.HasPrefix(line, want) }) {
			t.Errorf("missing %s", want)
		}
	}
	if len(got) != 12 || t.Failed() {
		t.Errorf("%d faults:\n%s", len(got), strings.Join(got, "\n"))
	}
	for _, text := range []string{three + "group = 1\n", "group = [1]\n" + three} {
		if got := faultsOf(t, text); len(got) == 0 || !strings.Contains(got[0], "group") {
			t.Errorf("got %v", got)
		}
	}
}
