package control

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"lunshift/proxy"
	"lunshift/state"
)

// metricsHandler serves /metrics from a registry of its own.
func (s *Service) metricsHandler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		newCollector(s.version, s.Statuses, s.store.Stats),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}

// collector turns status into metrics at each scrape.
type collector struct {
	version  string
	statuses func() []proxy.Status
	stats    func() state.Stats

	build, phase, mirror                                        *prometheus.Desc
	volume                                                      []volumeMetric
	unitUp, unitErrors                                          *prometheus.Desc
	commits, requests, failures, journaled, frames, flags, sync *prometheus.Desc
}

// volumeMetric is one number of a volume's status.
type volumeMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(proxy.Status) float64
}

func newCollector(version string, statuses func() []proxy.Status, stats func() state.Stats) *collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("lunshift_"+name, help, labels, nil)
	}
	volume := func(name, help string, kind prometheus.ValueType, value func(proxy.Status) float64) volumeMetric {
		return volumeMetric{desc("volume_"+name, help, "volume"), kind, value}
	}
	const gauge, counter = prometheus.GaugeValue, prometheus.CounterValue
	return &collector{
		version: version, statuses: statuses, stats: stats,
		build:  desc("build_info", "1, with the version of the service.", "version"),
		phase:  desc("volume_phase", "1 for the phase that the volume is in, 0 for the others.", "volume", "phase"),
		mirror: desc("volume_mirror", "1 for the state that the mirror is in, 0 for the others.", "volume", "state"),
		volume: []volumeMetric{
			volume("size_bytes", "Capacity.", gauge, func(s proxy.Status) float64 { return float64(s.Size) }),
			volume("allocated_bytes", "What the source has storage for, as far as it is known.", gauge, func(s proxy.Status) float64 { return float64(s.Allocated) }),
			volume("copied_bytes_total", "What the background copy put on the destination.", counter, func(s proxy.Status) float64 { return float64(s.Copied) }),
			volume("skipped_bytes_total", "What did not have to be copied: unallocated or zero.", counter, func(s proxy.Status) float64 { return float64(s.Skipped) }),
			volume("compared_bytes_total", "What was read from both sides and compared.", counter, func(s proxy.Status) float64 { return float64(s.Compared) }),
			volume("equal_bytes_total", "What of it was on the destination already.", counter, func(s proxy.Status) float64 { return float64(s.Equal) }),
			volume("initiator_written_bytes", "Size of the blocks that initiators wrote since the start.", gauge, func(s proxy.Status) float64 { return float64(s.InitiatorWritten) }),
			volume("copied_back_bytes_total", "What was copied from the destination back to the source.", counter, func(s proxy.Status) float64 { return float64(s.CopiedBack) }),
			volume("mirror_behind_bytes", "What the source is still to get so that both sides are the same; 0 without a mirror.", gauge, func(s proxy.Status) float64 {
				if s.Mirror == nil {
					return 0
				}
				return float64(s.Mirror.Behind)
			}),
			volume("remaining_bytes", "What is not yet valid on the destination; after a rollback, on the source.", gauge, func(s proxy.Status) float64 { return float64(s.Remaining) }),
			volume("copy_rate_bytes_per_second", "Speed of the background copy.", gauge, func(s proxy.Status) float64 { return float64(s.Rate) }),
			volume("copy_rate_limit_bytes_per_second", "Limit of the background copy; 0 is none.", gauge, func(s proxy.Status) float64 { return float64(s.RateLimit) }),
			volume("checksum_errors_total", "Blocks that changed in memory between source and destination; they were copied again.", counter, func(s proxy.Status) float64 { return float64(s.ChecksumErrors) }),
			volume("readback_errors_total", "Blocks that the destination gave back otherwise than they were written; they were copied again.", counter, func(s proxy.Status) float64 { return float64(s.ReadbackErrors) }),
			volume("paused", "1 while the background copy is paused.", gauge, func(s proxy.Status) float64 { return truth(s.Paused) }),
			volume("queue_position", "Which of the volumes that wait for others to be copied this one is; 0 where it does not wait.", gauge, func(s proxy.Status) float64 { return float64(s.Queued) }),
			volume("degraded", "1 while something is wrong; status tells what.", gauge, func(s proxy.Status) float64 { return truth(s.Degraded) }),
			volume("sessions", "Sessions of initiators.", gauge, func(s proxy.Status) float64 { return float64(len(s.Sessions)) }),
			volume("hold_seconds", "How long commands of initiators were held at the cutover or the rollback; 0 before.", gauge, func(s proxy.Status) float64 {
				if s.Hold == nil {
					return 0
				}
				return *s.Hold / 1000
			}),
		},
		unitUp:     desc("unit_up", "1 while the logical unit can be reached.", "volume", "side"),
		unitErrors: desc("unit_errors_total", "Commands to the logical unit that failed.", "volume", "side"),
		commits:    desc("state_commits_total", "Synced transactions of the state."),
		requests:   desc("state_requests_total", "Requests that these transactions served."),
		failures:   desc("state_failures_total", "Transactions of the state that failed."),
		journaled:  desc("state_journal_entries_total", "First writes whose flags the journal took."),
		frames:     desc("state_journal_syncs_total", "Syncs of the journal that they took."),
		flags:      desc("state_flags_set_total", "Flags of logical blocks that were set."),
		sync:       desc("state_commit_seconds", "Time of a transaction of the state, its sync included."),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.build, c.phase, c.mirror, c.unitUp, c.unitErrors, c.commits, c.requests, c.failures, c.journaled, c.frames, c.flags, c.sync} {
		ch <- d
	}
	for _, m := range c.volume {
		ch <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, kind, value, labels...)
	}
	send(c.build, prometheus.GaugeValue, 1, c.version)
	for _, s := range c.statuses() {
		for _, p := range proxy.Phases {
			send(c.phase, prometheus.GaugeValue, truth(s.Phase == p), s.Name, string(p))
		}
		is := "off"
		if s.Mirror != nil {
			is = s.Mirror.State
		}
		for _, state := range []string{"off", "whole", "behind", "broken"} {
			send(c.mirror, prometheus.GaugeValue, truth(is == state), s.Name, state)
		}
		for _, m := range c.volume {
			send(m.desc, m.kind, m.value(s), s.Name)
		}
		for side, u := range map[string]proxy.UnitStatus{"source": s.Source, "destination": s.Destination} {
			send(c.unitUp, prometheus.GaugeValue, truth(u.State == "online"), s.Name, side)
			send(c.unitErrors, prometheus.CounterValue, float64(u.Errors), s.Name, side)
		}
	}
	stats := c.stats()
	send(c.commits, prometheus.CounterValue, float64(stats.Commits))
	send(c.requests, prometheus.CounterValue, float64(stats.Requests))
	send(c.failures, prometheus.CounterValue, float64(stats.Failures))
	send(c.journaled, prometheus.CounterValue, float64(stats.Journaled))
	send(c.frames, prometheus.CounterValue, float64(stats.Frames))
	send(c.flags, prometheus.CounterValue, float64(stats.FlagsSet))
	buckets, count := make(map[float64]uint64, len(stats.Latency.Bounds)), uint64(0)
	for i, n := range stats.Latency.Counts {
		count += n
		if i < len(stats.Latency.Bounds) {
			buckets[stats.Latency.Bounds[i].Seconds()] = count
		}
	}
	ch <- prometheus.MustNewConstHistogram(c.sync, count, stats.Latency.Sum.Seconds(), buckets)
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
