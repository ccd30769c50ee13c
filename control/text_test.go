package control

import (
	"bytes"
	"context"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

func migrating() proxy.Status {
	eta := int64(192)
	at := time.Date(2026, 11, 22, 12, 0, 0, 0, time.Local)
	return proxy.Status{
		Name: "db01", IQN: "iqn.2026-11.net.example:db01", LUN: 3, Phase: proxy.Migrating,
		Size: 1 << 30, BlockSize: 512, Allocated: 400 << 20, AllocatedKnown: true,
		Copied: 100 << 20, Skipped: 300 << 20, Compare: true, Compared: 90 << 20, Equal: 50 << 20, InitiatorWritten: 7 << 20, Remaining: 1 << 28,
		Rate: 212 << 20, RateLimit: 220 << 20, ETA: &eta, StartedAt: &at,
		Sessions:    []target.SessionInfo{{Initiator: "iqn.2026-11.net.example:host", Address: "10.0.0.7:50000", Since: at}},
		Source:      proxy.UnitStatus{Address: "iscsi://10.0.0.5/iqn.x:old/1", State: "online", Vendor: "IET", Product: "VIRTUAL-DISK", ID: "naa.60", Size: 1 << 30, Thin: true},
		Destination: proxy.UnitStatus{Address: "/dev/sdx", State: "unavailable", Reason: "no route", Errors: 2},
	}
}

func TestTableIsAligned(t *testing.T) {
	ready := proxy.Status{Name: "a-longer-name", Phase: proxy.Ready, Size: 5 << 40, Degraded: true, DegradedReason: "not served: no route" + strings.Repeat("é", 100)}
	var out bytes.Buffer
	if err := WriteTable(&out, []proxy.Status{migrating(), ready}); err != nil {
		t.Fatal(err)
	}
	want := `VOLUME         PHASE      DONE   REMAINING  RATE       TIME LEFT  SESSIONS  SIZE     NOTE
db01           migrating  75.0%  256 MiB    212 MiB/s  3m 12s     1         1.0 GiB  
a-longer-name  ready      -      -          -          -          0         5.0 TiB  not served: no route` + strings.Repeat("é", 39) + `…
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestDetailShowsEverything(t *testing.T) {
	v := migrating()
	v.Paused, v.Degraded, v.DegradedReason = true, true, "destination unavailable"
	var out bytes.Buffer
	if err := WriteDetail(&out, v); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"migrating, paused since 2026-11-22 12:00:00", "[##############################..........] 75.0%",
		"iqn.2026-11.net.example:db01 LUN 3", "destination unavailable", "100 MiB, skipped 300 MiB", "90 MiB, equal 50 MiB", "7.0 MiB by initiators",
		"rate limit   220 MiB/s", "time left 3m 12s", "iscsi://10.0.0.5/iqn.x:old/1, online, IET VIRTUAL-DISK, naa.60, 1.0 GiB, thin",
		"/dev/sdx, unavailable (no route), 2 errors", "iqn.2026-11.net.example:host from 10.0.0.7:50000 since 2026-11-22 12:00:00",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("missing %q in\n%s", want, out.String())
		}
	}
}

func TestRateLimitIsShownInEveryPhaseButCutover(t *testing.T) {
	for _, phase := range proxy.Phases {
		for rate, want := range map[uint64]string{0: "none", 5 << 20: "5.0 MiB/s"} {
			var out bytes.Buffer
			if err := WriteDetail(&out, proxy.Status{Phase: phase, RateLimit: rate}); err != nil {
				t.Fatal(err)
			}
			if shown := regexp.MustCompile(`(?m)^rate limit +` + want + `$`).Match(out.Bytes()); shown != (phase != proxy.Cutover) {
				t.Errorf("%s, %s:\n%s", phase, want, out.String())
			}
		}
	}
}

func TestStatusOfAnythingCanBeShown(t *testing.T) {
	for _, v := range []proxy.Status{{}, {Phase: proxy.Migrating, Remaining: 5}, {Phase: proxy.Synced, Size: 1, Remaining: 9}, {Phase: proxy.Cutover}} {
		var out bytes.Buffer
		if err := WriteDetail(&out, v); err != nil {
			t.Error(err)
		}
		if err := WriteLine(&out, v); err != nil {
			t.Error(err)
		}
		if err := WriteTable(&out, []proxy.Status{v}); err != nil {
			t.Error(err)
		}
	}
}

func TestDurations(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "under 1s", 59 * time.Second: "59s", 61 * time.Second: "1m 01s", 3*time.Hour + 5*time.Minute: "3h 05m", 49 * time.Hour: "2d 01h",
	} {
		if got := duration(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

func TestWatchEndsAtCutover(t *testing.T) {
	v := newFake("db01")
	client, _ := serveFakes(t, v)
	v.set(func(s *proxy.Status) { s.Phase = proxy.Cutover })
	for _, view := range []View{{}, {Volume: "db01"}, {JSON: true}, {JSON: true, Volume: "db01"}, {Redraw: true, Volume: "db01"}} {
		var out bytes.Buffer
		if err := Watch(t.Context(), client, &out, view); err != nil {
			t.Error(err)
		}
		if !strings.Contains(out.String(), "cutover") {
			t.Errorf("%+v: %q", view, out.String())
		}
		if plain := !strings.Contains(out.String(), "\x1b"); plain == view.Redraw {
			t.Errorf("%+v: terminal codes %q", view, out.String())
		}
	}
	// A terminal gets its screen back, with the last look on it.
	var drawn bytes.Buffer
	if err := Watch(t.Context(), client, &drawn, View{Redraw: true}); err != nil {
		t.Error(err)
	}
	screen, left, ok := strings.Cut(drawn.String(), "\x1b[?1049l")
	if !ok || !strings.HasPrefix(screen, "\x1b[?1049h\x1b[2J\x1b[H") || !strings.HasPrefix(left, "VOLUME ") || strings.Contains(left, "\x1b") || !strings.HasSuffix(left, "\n") {
		t.Errorf("drawn: %q", drawn.String())
	}
	drawn.Reset()
	if err := Watch(t.Context(), client, &drawn, View{Redraw: true, Volume: "db09"}); KindOf(err) != Unknown || drawn.Len() > 0 {
		t.Errorf("unknown volume: %v, drawn %q", err, drawn.String())
	}
	v.set(func(s *proxy.Status) { s.Phase = proxy.Synced })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Watch(ctx, client, &bytes.Buffer{}, View{}); ExitCode(err) != ExitInterrupted {
		t.Errorf("interrupted watch: %v", err)
	}
}

func TestMetricsFollowStatus(t *testing.T) {
	hold := 12.5
	v := migrating()
	v.Hold = &hold
	stats := state.Stats{Commits: 5, Requests: 50, Failures: 1, FlagsSet: 4096, Latency: state.Histogram{
		Bounds: []time.Duration{time.Millisecond, 10 * time.Millisecond}, Counts: []uint64{3, 1, 1}, Sum: time.Second}}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(newCollector("v1", func() []proxy.Status { return []proxy.Status{v} }, func() state.Stats { return stats }))
	w := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	text := w.Body.String()
	for _, want := range []string{
		`lunshift_build_info{version="v1"} 1`,
		`lunshift_volume_phase{phase="migrating",volume="db01"} 1`,
		`lunshift_volume_phase{phase="ready",volume="db01"} 0`,
		`lunshift_volume_size_bytes{volume="db01"} 1.073741824e+09`,
		`lunshift_volume_remaining_bytes{volume="db01"} 2.68435456e+08`,
		`lunshift_volume_copied_bytes_total{volume="db01"} 1.048576e+08`,
		`lunshift_volume_compared_bytes_total{volume="db01"} 9.437184e+07`,
		`lunshift_volume_equal_bytes_total{volume="db01"} 5.24288e+07`,
		`lunshift_volume_sessions{volume="db01"} 1`,
		`lunshift_volume_hold_seconds{volume="db01"} 0.0125`,
		`lunshift_unit_up{side="source",volume="db01"} 1`,
		`lunshift_unit_up{side="destination",volume="db01"} 0`,
		`lunshift_unit_errors_total{side="destination",volume="db01"} 2`,
		`lunshift_state_commits_total 5`,
		`lunshift_state_commit_seconds_bucket{le="0.01"} 4`,
		`lunshift_state_commit_seconds_bucket{le="+Inf"} 5`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("missing %s in\n%s", want, text)
		}
	}
}

func TestRollbackAndMirrorAreShown(t *testing.T) {
	hold, at := 7.25, time.Date(2026, 11, 23, 12, 0, 0, 0, time.Local)
	back := migrating()
	back.Phase, back.Paused, back.CopiedBack, back.RollbackAt, back.Hold, back.Unreadable = proxy.RollingBack, true, 3<<20, &at, &hold, 512
	back.UnreadableRuns = []proxy.BlockRun{{LBA: 7, Blocks: 1}}
	done := back
	done.Phase, done.Remaining, done.RolledBackAt, done.UnreadableRuns = proxy.RolledBack, 0, &at, nil
	broken := migrating()
	broken.Mirrored, broken.Mirror = true, &proxy.MirrorStatus{State: "broken", Reason: "source: no route", Behind: 5 << 20}
	whole := migrating()
	whole.Mirrored, whole.Mirror = true, &proxy.MirrorStatus{State: "whole"}
	ready := proxy.Status{Name: "db01", Phase: proxy.Ready, Mirrored: true}
	for _, tc := range []struct {
		v            proxy.Status
		line, detail string
	}{
		{back, "db01: rolling-back, paused, 75.0% done, 256 MiB left at 212 MiB/s, time left 3m 12s, initiators were held for 7.2 ms", "rolling-back, paused since 2026-11-23 12:00:00"},
		{back, "", "\nremaining 256 MiB at 212 MiB/s"}, {back, "", "\ncopied back 3.0 MiB\n"}, {back, "", "\nrollback initiators were held for 7.2 ms\n"},
		{back, "", "\nunreadable 512 B on the destination\n"},
		{done, "db01: rolled-back, initiators were held for 7.2 ms", "] 100.0%\n"},
		{broken, ", mirror broken", "\nmirror broken, the source is 5.0 MiB behind: source: no route\n"},
		{whole, ", mirror whole", "\nmirror whole\n"}, {ready, "db01: ready, mirror on from the start on", "\nmirror on from the start on\n"},
	} {
		var line, detail bytes.Buffer
		if err := WriteLine(&line, tc.v); err != nil || !strings.Contains(line.String(), tc.line) {
			t.Errorf("%v, line %q lacks %q", err, &line, tc.line)
		}
		if err := WriteDetail(&detail, tc.v); err != nil || !strings.Contains(regexp.MustCompile(` +`).ReplaceAllString(detail.String(), " "), tc.detail) {
			t.Errorf("%v, detail lacks %q:\n%s", err, tc.detail, &detail)
		}
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(newCollector("v1", func() []proxy.Status { broken.CopiedBack = 9; return []proxy.Status{broken} }, func() state.Stats { return state.Stats{} }))
	w := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`lunshift_volume_mirror{state="broken",volume="db01"} 1`, `lunshift_volume_mirror{state="whole",volume="db01"} 0`, `lunshift_volume_mirror{state="off",volume="db01"} 0`,
		`lunshift_volume_mirror_behind_bytes{volume="db01"} 5.24288e+06`, `lunshift_volume_copied_back_bytes_total{volume="db01"} 9`,
		`lunshift_volume_phase{phase="rolled-back",volume="db01"} 0`,
	} {
		if !strings.Contains(w.Body.String(), want+"\n") {
			t.Errorf("missing %s in\n%s", want, w.Body.String())
		}
	}
}
