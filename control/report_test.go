package control

import (
	"context"
	"encoding/json"
	"os/user"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

// reportOn gives a report as JSON has it and as Markdown.
func reportOn(t *testing.T, c *Client, volume string) (Report, string) {
	t.Helper()
	r, err := c.Report(t.Context(), volume)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := WriteReport(&b, r); err != nil {
		t.Fatal(err)
	}
	return r, b.String()
}

func says(t *testing.T, when, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%s: the report does not say %q:\n%s", when, w, text)
		}
	}
}

// cells splits the rows of tables, and fails where one has not as many as its head.
func cells(t *testing.T, text string) (rows [][]string) {
	t.Helper()
	head := 0
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			head = 0
			continue
		}
		row := regexp.MustCompile(`(?:[^|\\]|\\.)+`).FindAllString(strings.Trim(line, "|"), -1)
		if head == 0 {
			head = len(row)
		}
		if len(row) != head {
			t.Errorf("a row of %d cells in a table of %d: %s", len(row), head, line)
		}
		rows = append(rows, row)
	}
	return rows
}

const (
	reportBlocks = 2 << 20 // of the fake
	gib          = 1 << 30
)

// migrated is a fake with a record as a migration leaves it, and what its status says then.
func migrated(t *testing.T, s *Service, v *fakeVolume, at time.Time) state.Record {
	t.Helper()
	ctx := context.Background()
	if _, err := s.store.Flags("db01", state.Geometry{Blocks: reportBlocks, RegionBlocks: 2048}); err != nil {
		t.Fatal(err)
	}
	record := state.Record{
		Volume: "db01", BlockSize: 512, Blocks: reportBlocks, RegionBlocks: 2048, Phase: "synced", CreatedAt: at.Add(-time.Hour), StartedAt: &at,
		Accepted:       []state.Run{{Start: 777, Blocks: 3}},
		VerifiedAll:    &state.Verified{At: at.Add(90 * time.Second), ComparedBytes: 300 << 20, UnallocatedBytes: 200 << 20, WrittenBytes: 12 << 20},
		VerifiedSample: &state.Verified{At: at.Add(95 * time.Second), Sample: true, ComparedBytes: 1 << 20, DifferentBytes: 4096},
	}
	if err := s.store.PutRecords(ctx, record); err != nil {
		t.Fatal(err)
	}
	sums := proxy.Checksums{At: at.Add(90 * time.Second), ExtentBytes: 512 << 20, Extents: []proxy.Checksum{
		{LBA: 0, Blocks: reportBlocks / 2, SHA256: strings.Repeat("5a", 32)}, {LBA: reportBlocks / 2, Blocks: reportBlocks / 2, Uncovered: proxy.UncoveredFree},
	}}
	data, err := json.Marshal(sums)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.store.Attach(ctx, "db01", state.Checksums, data); err != nil {
		t.Fatal(err)
	}
	synced := at.Add(80 * time.Second)
	v.set(func(s *proxy.Status) {
		s.Phase, s.StartedAt, s.SyncedAt = proxy.Synced, &at, &synced
		s.LUN, s.Copied, s.Skipped, s.Unused, s.InitiatorWritten = 3, 400<<20, 100<<20, 50<<20, 12<<20
		s.AcceptedUnreadable, s.UnreadableRuns, s.Unreadable = 3*512, []proxy.BlockRun{{LBA: 901, Blocks: 7}}, 7*512
		s.Source = proxy.UnitStatus{Address: "iscsi://10.0.0.5/iqn.old/1", State: "online", ID: "naa.6001405aaa", Vendor: "OLDCO", Product: "V|1\n", Serial: "SN-old", Size: gib}
		s.Destination = proxy.UnitStatus{Address: "iscsi://10.0.0.6/iqn.new/1", State: "online", ID: "eui.0011", Vendor: "NEWCO", Product: "V2", Serial: "SN-new", Size: 2 * gib, Thin: true}
		s.Degraded, s.DegradedReason = true, "hook: no ticket | <b>ask\nJoe</b>"
		s.Sessions = []target.SessionInfo{{Initiator: "iqn.host", Address: "10.0.0.9"}}
	})
	return record
}

// Caught: a unit's identity that is lost once it is released; no report after the removal; the
// sample in the place of the full comparison; texts that end a row or a cell; a report that is
// kept without its checksums; the version of a service that came when all was over.
func TestReportHasAllOfAMigrationAndStays(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	c, s := serveFakes(t, v)
	s.version = "1.2.3"
	if _, err := c.Report(ctx, "nobody"); KindOf(err) != Unknown {
		t.Fatalf("of no volume: %v", err)
	}
	r, text := reportOn(t, c, "db01")
	says(t, "ready", text, "Not started.", "It was not started.", "None: everything was never compared", "1.0 GiB (1073741824 bytes)")
	if r.Phase != proxy.Ready || len(r.Phases) != 0 || r.Removed {
		t.Errorf("ready: %+v", r)
	}

	if _, err := c.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	at := time.Now().Add(-2 * time.Minute).Truncate(time.Millisecond)
	record := migrated(t, s, v, at)
	if _, err := c.Verify(ctx, "db01", proxy.VerifyOptions{}); err != nil {
		t.Fatal(err)
	}
	_, text = reportOn(t, c, "db01")
	facts := []string{
		"iqn.2026-11.net.example:db01 LUN 3", "logical blocks of 512 bytes", "naa.6001405aaa", "eui.0011", "SN-old", "SN-new", "OLDCO", "NEWCO", `V\|1`,
		"2.0 GiB (2147483648 bytes)", "iscsi://10.0.0.5/iqn.old/1", "1m 20s", "| copied | 400 MiB (419430400 bytes) |", "| left out as free in a file system | 50 MiB",
		"| skipped as unallocated or zero | 100 MiB", "| blocks that initiators wrote | 12 MiB", "5.0 MiB/s", "- LBA 901, 7 blocks", "- LBA 777, 3 blocks",
		"no difference | 300 MiB (314572800 bytes) | 200 MiB", "**4.0 KiB (4096 bytes) differ** | 1.0 MiB", strings.Repeat("5a", 32), "not covered: left out as free",
		"zeroes, as they are read", "the start asked for by", "the last comparison asked for by", "| lunshift | 1.2.3 |",
	}
	says(t, "synced", text, facts...)
	says(t, "synced", text, `no ticket \| &lt;b&gt;ask Joe&lt;/b&gt;`, "iqn.host from 10.0.0.9", "so far", "Everything is on the destination")
	cells(t, text)

	if _, err := c.Cutover(ctx, "db01", proxy.CutoverOptions{}); err != nil {
		t.Fatal(err)
	}
	// As after a restart: the units are not open any more.
	cut, hold := at.Add(100*time.Second), 12.5
	record.Phase, record.CutoverAt = "cutover", &cut
	if err := s.store.PutRecords(ctx, record); err != nil {
		t.Fatal(err)
	}
	s.version = "9.9.9"
	v.set(func(s *proxy.Status) {
		s.CutoverAt, s.Hold, s.Unused, s.Degraded = &cut, &hold, 0, false
		s.Sessions = nil
		s.Source = proxy.UnitStatus{Address: s.Source.Address, State: "released", ID: s.Source.ID}
		s.Destination = proxy.UnitStatus{Address: s.Destination.Address, State: "released", ID: s.Destination.ID}
	})
	r, text = reportOn(t, c, "db01")
	says(t, "cutover", text, facts...)
	says(t, "cutover", text, "held for 12.5 ms at the cutover", "Done: the destination stands alone", "the cutover asked for by")
	if !slices.Equal(r.Versions, []string{"1.2.3"}) || len(r.Phases) != 3 || r.Phases[1].Seconds != 20 || r.Phases[2].Until != nil || len(r.Faults) != 0 {
		t.Errorf("cutover: versions %v, phases %+v, faults %q", r.Versions, r.Phases, r.Faults)
	}

	if removed, err := c.Remove(ctx, "db01"); err != nil || !removed.Removed {
		t.Fatalf("%+v, %v", removed, err)
	}
	if err := s.store.Forget("db01"); err != nil { // as the volume itself does
		t.Fatal(err)
	}
	r, text = reportOn(t, c, "db01")
	says(t, "removed", text, facts...)
	says(t, "removed", text, "held for 12.5 ms", "The volume is removed", "the removal asked for by")
	if !r.Removed || r.Checksums == nil || len(r.Checksums.Extents) != 2 {
		t.Errorf("removed: %+v", r)
	}
	who := "uid 0"
	if me, err := user.Current(); err == nil {
		who = me.Username
	}
	for _, row := range cells(t, text) {
		if strings.Contains(row[0], "asked for by") && !strings.Contains(row[1], who) {
			t.Errorf("%q", row)
		}
	}
	if got := whats(r.History); !slices.Equal(got, []string{"start", "verify", "cutover", "remove"}) {
		t.Errorf("history %q", got)
	}
}

func whats(events []state.Event) (all []string) {
	for _, e := range events {
		all = append(all, e.What)
	}
	return all
}

// Caught: what an earlier migration of that name was, and who asked for it, taken for this one's; a start
// anew that nobody seems to have asked for.
func TestReportIsOfTheMigrationThatIs(t *testing.T) {
	ctx := t.Context()
	v := newFake("db01")
	c, s := serveFakes(t, v)
	s.version = "1"
	migrated(t, s, v, time.Now().Add(-time.Hour))
	if _, err := c.Rollback(ctx, "db01", proxy.RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	// A start that has the state begin anew while it is under way.
	s.version = "2"
	began := time.Now()
	v.during = func() {
		time.Sleep(5 * time.Millisecond)
		if err := s.store.Renew("db01", state.Record{Volume: "db01", BlockSize: 512, Blocks: 4096, RegionBlocks: 128, CreatedAt: time.Now(), StartedAt: &began}); err != nil {
			t.Error(err)
		}
	}
	v.set(func(s *proxy.Status) {
		*s = proxy.Status{Name: s.Name, Phase: proxy.RolledBack, StartedAt: &began, Size: gib, BlockSize: 512,
			Source: proxy.UnitStatus{ID: "other"}, Destination: proxy.UnitStatus{ID: "else"}}
	})
	if _, err := c.Start(ctx, "db01"); err != nil {
		t.Fatal(err)
	}
	r, _ := reportOn(t, c, "db01")
	if !slices.Equal(r.Versions, []string{"2"}) || r.Source.Serial != "" || r.Bytes.Unused != 0 || r.Checksums != nil || r.Verified.All != nil {
		t.Errorf("%+v", r)
	}
	if got := whats(r.Asked); !slices.Equal(got, []string{"start"}) {
		t.Errorf("asked: %q", got)
	}
}

// Caught: lists of any length in what is kept, which then does not fit.
func TestAReportIsKeptWhateverItsLists(t *testing.T) {
	v := newFake("db01")
	c, s := serveFakes(t, v)
	record := migrated(t, s, v, time.Now().Add(-time.Hour))
	runs := make([]proxy.BlockRun, 100000)
	for i := range runs {
		runs[i] = proxy.BlockRun{LBA: uint64(i) * 1e12, Blocks: 123456}
		record.Accepted = append(record.Accepted, state.Run{Start: uint64(i) * 1e12, Blocks: 1})
	}
	record.Accepted = record.Accepted[:5000]
	if err := s.store.PutRecords(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	v.set(func(s *proxy.Status) {
		s.UnreadableRuns, s.Sessions = runs, make([]target.SessionInfo, 5000)
		for i := range s.Sessions {
			s.Sessions[i].Initiator = strings.Repeat("x", 223)
		}
	})
	if err := s.keepReport(t.Context(), "db01"); err != nil {
		t.Fatal(err)
	}
	r, text := reportOn(t, c, "db01")
	if len(r.Unreadable) != mostRuns || len(r.AcceptedUnreadable) != mostRuns || r.UnreadableLeftOut != 103000 {
		t.Errorf("%d, %d, %d", len(r.Unreadable), len(r.AcceptedUnreadable), r.UnreadableLeftOut)
	}
	says(t, "long", text, "And 103000 other places.")
	// As long as a trail may be.
	for range 15 {
		events := make([]state.Event, 100)
		for i := range events {
			events[i] = state.Event{Volume: "db01", At: time.Now(), What: "pause", Result: resultDone}
		}
		if _, err := s.store.Append(t.Context(), events...); err != nil {
			t.Fatal(err)
		}
	}
	if r, text = reportOn(t, c, "db01"); len(r.History) != mostReported || r.HistoryLeftOut != 500 {
		t.Errorf("%d events, %d left out", len(r.History), r.HistoryLeftOut)
	}
	says(t, "long", text, "has 500 older ones")
}
