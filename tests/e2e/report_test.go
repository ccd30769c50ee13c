package e2e

import (
	"encoding/json"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// reported is what this test reads of report --json.
type reported struct {
	Phase    string   `json:"phase"`
	Removed  bool     `json:"removed"`
	Versions []string `json:"versions"`
	Source   reportedUnit
	Dest     reportedUnit `json:"destination"`
	Asked    []struct {
		What string `json:"what"`
	} `json:"asked"`
	Phases []struct {
		Phase   string  `json:"phase"`
		Seconds float64 `json:"seconds"`
	} `json:"phases"`
	Hold  *float64 `json:"hold_ms"`
	Rate  uint64   `json:"average_bytes_per_second"`
	Bytes struct {
		Copied  uint64 `json:"copied"`
		Skipped uint64 `json:"skipped_unallocated"`
		Written uint64 `json:"initiator_written"`
	} `json:"bytes"`
	Verified struct {
		All *struct {
			Compared  uint64 `json:"compared_bytes"`
			Different uint64 `json:"different_bytes"`
		} `json:"all"`
	} `json:"verified"`
	Checksums *struct {
		Extents []struct {
			LBA    uint64 `json:"lba"`
			SHA256 string `json:"sha256"`
		} `json:"extents"`
	} `json:"checksums"`
	History []struct {
		What   string `json:"what"`
		Result string `json:"result"`
	} `json:"history"`
}

type reportedUnit struct {
	Address string `json:"address"`
	ID      string `json:"id"`
	Vendor  string `json:"vendor"`
	Serial  string `json:"serial"`
	Size    uint64 `json:"size_bytes"`
}

func (s *service) report(name string) (r reported, text string) {
	s.t.Helper()
	must(s.t, json.Unmarshal([]byte(s.run("report", name, "--json")), &r))
	return r, s.run("report", name)
}

// sumsHold makes each checksum of a report again with the command that the report gives, and
// tells how many there are.
func sumsHold(t *testing.T, text, disk string) (sums int) {
	t.Helper()
	_, command, found := strings.Cut(text, "```sh\n")
	command, _, _ = strings.Cut(command, "\n```")
	if !found {
		t.Fatalf("the report has no command for its checksums:\n%s", text)
	}
	for _, row := range regexp.MustCompile("(?m)^\\| \\d+ \\| \\d+ \\| (\\d+) \\| (\\d+) \\| `([0-9a-f]{64})` \\|$").FindAllStringSubmatch(text, -1) {
		run := strings.NewReplacer("DISK", disk, "FROM", row[1], "LENGTH", row[2]).Replace(command)
		out, err := exec.Command("sh", "-c", run).Output()
		must(t, err)
		if sum, _, _ := strings.Cut(string(out), " "); sum != row[3] {
			t.Errorf("%s gives %s, the report has %s", run, sum, row[3])
		}
		sums++
	}
	return sums
}

// A whole migration under load with a kill in it, and its report: at the end each checksum
// is that of the new array, whoever wrote what when, and all of it is there after the removal.
//
// Caught: a write after the comparison that leaves its sum as it is; units without a name after
// the restart; no report once the volume is removed.
func TestReportOfAWholeMigration(t *testing.T) {
	needTools(t)
	p := sides{block: 512, sourceThin: true, destinationThin: true, size: 48*mib + 64*kib}.make(t)
	s := newService(t, p.volume("db01"))
	s.configure()
	s.start()
	if r, text := s.report("db01"); r.Phase != "ready" || !strings.Contains(text, "Not started") {
		t.Errorf("before the start: %+v", r)
	}
	l := newLoad(s, p)
	l.within = 8 * mib / 512
	l.during(func() {
		s.run("start", "db01")
		l.more(50)
		s.run("wait", "db01", "--for", "synced", "--timeout", "60s")
		l.more(50)
		s.run("verify", "db01")
		l.more(50)
	})
	before, text := s.report("db01")
	first := sumsHold(t, text, p.destinationPath)
	if first < 41 || first == 49 {
		t.Errorf("%d checksums of 49 extents, and initiators wrote to 8 at most", first)
	}
	s.kill()
	s.start()
	l.within = 16 * mib / 512
	l.during(func() { l.more(400) })
	s.run("cutover", "db01")
	l.holds(p.destinationPath)
	s.stop()
	s.start()
	r, text := s.report("db01")
	if n := sumsHold(t, text, p.destinationPath); n >= first || n < 33 {
		t.Errorf("%d checksums after more was written, %d before", n, first)
	}
	image := uint64(48*mib + 64*kib)
	if r.Phase != "cutover" || r.Hold == nil || r.Rate == 0 || len(r.Phases) != 3 || r.Bytes.Copied == 0 || r.Bytes.Copied+r.Bytes.Skipped > image || r.Bytes.Written == 0 ||
		r.Verified.All == nil || r.Verified.All.Different != 0 || r.Verified.All.Compared == 0 || len(r.Versions) != 1 {
		t.Errorf("%+v", r)
	}
	if r.Source != before.Source || r.Dest != before.Dest || r.Source.ID == r.Dest.ID || r.Source.ID == "" || r.Source.Serial == "" || r.Dest.Vendor == "" || r.Dest.Size != image ||
		r.Source.Address != p.source {
		t.Errorf("source %+v, destination %+v", r.Source, r.Dest)
	}
	s.run("remove", "db01")
	s.stop()
	s.volumes = []volume{files(t)}
	s.volumes[0].name = "other"
	s.configure()
	s.start()
	end, after := s.report("db01")
	var done []string
	for _, e := range end.Asked {
		done = append(done, e.What)
	}
	if !end.Removed || end.Source != r.Source || end.Dest != r.Dest || end.Bytes != r.Bytes || *end.Hold != *r.Hold || !slices.Equal(done, []string{"start", "verify", "cutover", "remove"}) {
		t.Errorf("after the removal: %+v", end)
	}
	if end.Checksums == nil || sumsHold(t, after, p.destinationPath) != sumsHold(t, text, p.destinationPath) {
		t.Errorf("the checksums are not what they were before the removal:\n%s", after)
	}
	if last := end.History[len(end.History)-1]; last.What != "remove" || last.Result != "done" {
		t.Errorf("the history ends with %+v", last)
	}
	s.fails(1, []string{"nobody"}, "report", "nobody")
}
