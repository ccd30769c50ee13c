package conf

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

// Caught: a volume's table that begins from nothing.
func TestHooksOfAVolumeTakeThePlaceOfThoseOfAll(t *testing.T) {
	cfg := load(t, three+`
[volume.hooks]
before_cutover = ["/bin/own", "a b"]
after_cutover = []

[hooks]
before_cutover = ["/bin/all"]
after_cutover = ["/bin/all"]
after_synced = ["/bin/all", "x"]
timeout = "5s"
`)
	all := Hooks{BeforeCutover: []string{"/bin/all"}, AfterCutover: []string{"/bin/all"}, AfterSynced: []string{"/bin/all", "x"}, Timeout: 5 * time.Second}
	own := Hooks{BeforeCutover: []string{"/bin/own", "a b"}, AfterSynced: []string{"/bin/all", "x"}, Timeout: 5 * time.Second}
	last := len(cfg.Volumes) - 1
	for i, v := range cfg.Volumes {
		want := all
		if i == last {
			want = own
		}
		if !reflect.DeepEqual(v.Hooks, want) {
			t.Errorf("volume %s: %+v, want %+v", v.Name, v.Hooks, want)
		}
	}
}

func TestFaultyHooksAreNamed(t *testing.T) {
	got := strings.Join(faultsOf(t, minimal+`
[volume.hooks]
before_start = "/bin/true"
after_synced = ["true"]
before_cutover = ["/bin/true", 7]
before_cut = ["/bin/true"]
timeout = "0s"
`), "\n")
	for _, want := range []string{
		"volume[db01].hooks.before_start: is a text; it is a list of the path of a program",
		`volume[db01].hooks.after_synced: "true" is no absolute path`,
		"volume[db01].hooks.before_cutover: holds the number 7",
		"volume[db01].hooks.before_cut: there is no such setting; there are before_start",
		"volume[db01].hooks.timeout: is 0s; it is from 1s to 1h",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing: %s\n%s", want, got)
		}
	}
}
