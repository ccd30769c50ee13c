package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// istgt serves a file as LUN 0 with istgt.
func (b *bench) istgt(path string) (server, error) {
	port, err := freePort()
	if err != nil {
		return server{}, err
	}
	dir, err := b.subdir()
	if err != nil {
		return server{}, err
	}
	const base, name = "iqn.2026-11.net.example.bench", "istgt"
	portal := fmt.Sprintf("127.0.0.1:%d", port)
	text := fmt.Sprintf(`[Global]
  NodeBase %q
  PidFile %s/istgt.pid
  AuthFile %s/auth.conf
  LogFacility "local7"
  Timeout 30
  NopInInterval 20
  DiscoveryAuthMethod None
  MaxSessions 32
  MaxConnections 4
  MaxR2T 32
  MaxOutstandingR2T 16
  FirstBurstLength 262144
  MaxBurstLength 1048576
  MaxRecvDataSegmentLength 262144
  InitialR2T Yes
  ImmediateData Yes
[UnitControl]
  AuthMethod None
  AuthGroup None
[PortalGroup1]
  Portal DA1 %s
[InitiatorGroup1]
  InitiatorName "ALL"
  Netmask 127.0.0.1
[LogicalUnit1]
  TargetName %s
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod None
  AuthGroup None
  UnitType Disk
  QueueDepth 128
  LUN0 Storage %s Auto
`, base, dir, dir, portal, name, path)
	config := filepath.Join(dir, "istgt.conf")
	err = errors.Join(os.WriteFile(config, []byte(text), 0o600), os.WriteFile(filepath.Join(dir, "auth.conf"), nil, 0o600))
	if err != nil {
		return server{}, err
	}
	cmd := exec.Command("istgt", "-D", "-q", "-c", config)
	if err := b.spawn(cmd); err != nil {
		return server{}, err
	}
	s := server{name, peer.LUN{Portal: portal, IQN: base + ":" + name, Number: 0}, cmd.Process.Pid}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", portal); err == nil {
			return s, c.Close()
		}
		if time.Now().After(deadline) {
			return server{}, errors.New("istgt does not listen")
		}
	}
}

// targetWorkloads are those that the target is measured by.
var targetWorkloads = []work{
	{Bytes: 4096, Depth: 1},
	{Bytes: 4096, Depth: 1, Write: true},
	{Bytes: 4096, Depth: 32},
	{Bytes: 4096, Depth: 32, Write: true},
	{Bytes: 4096, Depth: 32, Sessions: 4},
	{Bytes: 4096, Depth: 32, Sessions: 4, Write: true},
	{Bytes: 256 << 10, Depth: 8, Sequential: true},
	{Bytes: 256 << 10, Depth: 8, Sequential: true, Write: true},
	{Bytes: 1 << 20, Depth: 8, Sequential: true},
	{Bytes: 1 << 20, Depth: 8, Sequential: true, Write: true},
}

// target is lunshift, tgtd and istgt on one file: rates, latency, processor time and
// system calls.
func (b *bench) target() error {
	path, err := b.file("unit.img", unitSize, 1)
	if err != nil {
		return err
	}
	blank, err := b.file("blank.img", unitSize, 0)
	if err != nil {
		return err
	}
	b.atEnd(func() error { return errors.Join(os.Remove(path), os.Remove(blank)) })
	ours, err := b.serve(path, blank)
	if err != nil {
		return err
	}
	const iqn = "iqn.2026-11.net.example.bench:tgtd"
	d, err := b.tgtd(iqn, false, path)
	if err != nil {
		return err
	}
	servers := []server{ours.server, {"tgtd", d.LUN(iqn, 1), d.PID()}}
	if other, err := b.istgt(path); err == nil {
		servers = append(servers, other)
	} else {
		fmt.Println("istgt is left out:", err)
	}
	if err := b.targetRates(servers[:2]); err != nil {
		return err
	}
	if err := b.targetStreams(servers); err != nil {
		return err
	}
	if err := b.targetPerf(servers[:2]); err != nil {
		return err
	}
	if err := b.targetDigests(servers[0]); err != nil {
		return err
	}
	if err := b.targetCalls(servers[:2]); err != nil {
		return err
	}
	return b.targetIdle(servers[0])
}

func (b *bench) targetRates(servers []server) error {
	t := b.newTable("One file, lunshift's initiator as the client, which costs less than the targets.\n"+
		"Aims: 4 KiB at depth 32: IOPS at least 1.30 × tgtd's at 0.60 × its CPU; depth 1: p50 at most tgtd's;\n"+
		"in sequence: MB/s at least 1.20 × tgtd's, at no more CPU.",
		"", "per second lunshift", "tgtd", "×tgtd", "", "µs CPU/IO lunshift", "tgtd", "×tgtd", "", "p50 µs lunshift", "tgtd", "")
	defer t.end()
	for _, w := range targetWorkloads {
		rounds := make([][]outcome, 2)
		for range b.rounds {
			for i, s := range servers {
				o, err := b.load(s.unit, w, s.pid)
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				rounds[i] = append(rounds[i], o)
			}
		}
		m := [2]outcome{medians(rounds[0]), medians(rounds[1])}
		better, lesser, cpu := m[1].IOPS, float64(m[1].CPU[0]), float64(m[0].CPU[0])
		rate, cost, quick := "", "", ""
		switch {
		case w.Sequential:
			rate, cost = atLeast(m[0].IOPS, better, 1.2), atMost(cpu, lesser, 1)
		case w.Depth == 1:
			quick = atMost(float64(m[0].P50), float64(m[1].P50), 1)
		default:
			rate, cost = atLeast(m[0].IOPS, better, 1.3), atMost(cpu, lesser, 0.6)
		}
		per := func(o outcome) string {
			if w.Sequential {
				return fmt.Sprintf("%.0f MB", o.IOPS*float64(w.Bytes)/1e6)
			}
			return iops(o.IOPS)
		}
		t.row(w.String(), per(m[0]), per(m[1]), ratio(m[0].IOPS, better), rate,
			micros(m[0].CPU[0]), micros(m[1].CPU[0]), ratio(cpu, lesser), cost,
			micros(m[0].P50), micros(m[1].P50), quick)
	}
	return nil
}

// targetPerf has libiscsi's iscsi-perf as the client, on one session and on four.
// ranIn is what qemu-img bench says at its end.
var ranIn = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

// targetStreams has QEMU's block layer over libiscsi as the client, which all three
// targets bear.
func (b *bench) targetStreams(servers []server) error {
	t := b.newTable("The same file in sequence at depth 8, qemu-img bench over libiscsi as the client.\n"+
		"Aims: MB/s at least 1.20 × the better of tgtd and istgt, at no more CPU than the lesser.",
		"", "MB/s lunshift", "tgtd", "istgt", "× the better", "", "µs CPU/IO lunshift", "tgtd", "istgt", "× the lesser", "")
	defer t.end()
	for _, size := range []int{256 << 10, mib} {
		for _, write := range []bool{false, true} {
			count := 768 * mib / size
			args := []string{"bench", "-f", "raw", "-c", strconv.Itoa(count), "-d", "8", "-s", strconv.Itoa(size)}
			what := fmt.Sprintf("%d KiB read", size>>10)
			if write {
				args, what = append(args, "-w"), fmt.Sprintf("%d KiB write", size>>10)
			}
			rates, cpus := make([][]float64, 3), make([][]float64, 3)
			for range b.rounds {
				for i, s := range servers {
					before, err := peer.CPUTime(s.pid)
					if err != nil {
						return err
					}
					out, err := peer.Run(b.ctx, "qemu-img", append(args, s.unit.URL())...)
					if err != nil {
						return fmt.Errorf("%s: %w", s.name, err)
					}
					after, err := peer.CPUTime(s.pid)
					if err != nil {
						return err
					}
					m := ranIn.FindStringSubmatch(out)
					if m == nil {
						return fmt.Errorf("qemu-img bench tells no time: %s", out)
					}
					seconds, err := strconv.ParseFloat(m[1], 64)
					if err != nil {
						return err
					}
					rates[i] = append(rates[i], float64(count*size)/1e6/seconds)
					cpus[i] = append(cpus[i], float64(after-before)/float64(count))
				}
			}
			var rate, cpu [3]float64
			for i := range rate {
				rate[i], cpu[i] = median(rates[i]), median(cpus[i])
			}
			better, lesser := max(rate[1], rate[2]), cpu[1]
			if cpu[2] > 0 {
				lesser = min(lesser, cpu[2])
			}
			micro := func(v float64) string { return micros(time.Duration(v)) }
			t.row(what, iops(rate[0]), iops(rate[1]), iops(rate[2]), ratio(rate[0], better), atLeast(rate[0], better, 1.2),
				micro(cpu[0]), micro(cpu[1]), micro(cpu[2]), ratio(cpu[0], lesser), atMost(cpu[0], lesser, 1))
		}
	}
	return nil
}

func (b *bench) targetPerf(servers []server) error {
	t := b.newTable("The same file, libiscsi's iscsi-perf as the client, 4 KiB random read at depth 32; it costs more than the targets and bounds the IOPS.\n"+
		"Aims: IOPS at least tgtd's, at 0.60 × its CPU.",
		"sessions", "IOPS lunshift", "tgtd", "×tgtd", "", "µs CPU/IO lunshift", "tgtd", "×tgtd", "")
	defer t.end()
	seconds := max(1, int(b.span.Seconds()))
	for _, sessions := range []int{1, 4} {
		var rates, cpus [2][]float64
		for range b.rounds {
			for i, s := range servers {
				before, err := peer.CPUTime(s.pid)
				if err != nil {
					return err
				}
				var all sync.WaitGroup
				rate, ios, errs := make([]float64, sessions), make([]float64, sessions), make([]error, sessions)
				for n := range sessions {
					all.Go(func() { rate[n], ios[n], errs[n] = b.iscsiPerf(s.unit, seconds) })
				}
				all.Wait()
				after, err := peer.CPUTime(s.pid)
				if err = errors.Join(append(errs, err)...); err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				rates[i] = append(rates[i], sum(rate))
				cpus[i] = append(cpus[i], float64(after-before)/sum(ios))
			}
		}
		l, g, lc, gc := median(rates[0]), median(rates[1]), median(cpus[0]), median(cpus[1])
		t.row(fmt.Sprint(sessions), iops(l), iops(g), ratio(l, g), atLeast(l, g, 1),
			micros(time.Duration(lc)), micros(time.Duration(gc)), ratio(lc, gc), atMost(lc, gc, 0.6))
	}
	return nil
}

func sum(values []float64) (s float64) {
	for _, v := range values {
		s += v
	}
	return s
}

func (b *bench) targetDigests(s server) error {
	t := b.newTable("Header and data digests, lunshift.\nAim: on, at least 0.85 × the rate of off.",
		"", "per second on", "off", "on/off", "", "µs CPU/IO on", "off")
	defer t.end()
	for _, w := range []work{targetWorkloads[2], targetWorkloads[3], targetWorkloads[6], targetWorkloads[7]} {
		var on, off []outcome
		for range b.rounds {
			for _, digests := range []bool{true, false} {
				w := w
				w.Digests = digests
				o, err := b.load(s.unit, w, s.pid)
				if err != nil {
					return err
				}
				if digests {
					on = append(on, o)
				} else {
					off = append(off, o)
				}
			}
		}
		x, y := medians(on), medians(off)
		t.row(w.String(), iops(x.IOPS), iops(y.IOPS), ratio(x.IOPS, y.IOPS), atLeast(x.IOPS, y.IOPS, 0.85), micros(x.CPU[0]), micros(y.CPU[0]))
	}
	return nil
}

// targetCalls counts system calls with strace, which slows a server down: that tells
// calls per I/O, not time.
func (b *bench) targetCalls(servers []server) error {
	if _, err := exec.LookPath("strace"); err != nil {
		fmt.Println("System calls are not counted: strace is not installed.")
		return nil
	}
	head := []string{""}
	for _, s := range servers {
		head = append(head, s.name)
	}
	t := b.newTable("System calls per I/O.", head...)
	defer t.end()
	for _, w := range []work{targetWorkloads[0], targetWorkloads[2], targetWorkloads[3], targetWorkloads[6], targetWorkloads[7]} {
		row := []string{w.String()}
		for _, s := range servers {
			per, err := b.calls(s, w)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			row = append(row, fmt.Sprintf("%.2f", per))
		}
		t.row(row...)
	}
	return nil
}

// calls is how many system calls a server makes for each I/O of a workload.
func (b *bench) calls(s server, w work) (float64, error) {
	dir, err := b.subdir()
	if err != nil {
		return 0, err
	}
	path := filepath.Join(dir, "calls")
	trace := exec.CommandContext(b.ctx, "strace", "-f", "-c", "-U", "calls,name", "-o", path, "-p", strconv.Itoa(s.pid))
	var stderr bytes.Buffer
	trace.Stderr = &stderr
	if err := trace.Start(); err != nil {
		return 0, err
	}
	o, err := b.load(s.unit, w, s.pid)
	trace.Process.Signal(syscall.SIGINT)
	trace.Wait() // its exit status tells of the signal
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("strace: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) >= 2 && f[len(f)-1] == "total" {
			total, err := strconv.ParseFloat(f[0], 64)
			if err != nil || o.Total == 0 {
				return 0, fmt.Errorf("strace: %q of %d I/Os", line, o.Total)
			}
			return total / float64(o.Total), nil
		}
	}
	return 0, fmt.Errorf("strace tells no total: %s", text)
}

// idleSessions is how many sessions do nothing while the service's memory is read.
const idleSessions = 1000

func (b *bench) targetIdle(s server) error {
	before, err := resident(s.pid)
	if err != nil {
		return err
	}
	var all sync.WaitGroup
	devs, errs := make([]lun.Device, idleSessions), make([]error, idleSessions)
	for worker := range 8 {
		all.Go(func() {
			for n := worker; n < idleSessions && errs[worker] == nil; n += 8 {
				devs[n], errs[n] = lun.Open(b.ctx, s.unit.URL(), lun.Options{InitiatorName: fmt.Sprintf("iqn.2026-11.net.example:idle%d", n)})
			}
		})
	}
	all.Wait()
	after, err := resident(s.pid)
	for _, d := range devs {
		if d != nil {
			all.Go(func() { d.Close() }) // the sessions did nothing that could be lost
		}
	}
	all.Wait()
	if err = errors.Join(append(errs, err)...); err != nil {
		return err
	}
	t := b.newTable(fmt.Sprintf("Memory of %d idle sessions.\nAim: less than 100 MiB resident in all.", idleSessions), "", "MiB", "")
	t.row("the service before, after the load", fmt.Sprintf("%.1f", float64(before)/mib), "")
	t.row("with the sessions", fmt.Sprintf("%.1f", float64(after)/mib), atMost(float64(after), 100*mib, 1))
	t.end()
	return nil
}

// resident is VmRSS of a process, in bytes.
func resident(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("no VmRSS of process %d", pid)
}

// opened opens a unit once for each of a workload's sessions.
func (w work) opened(ctx context.Context, address string) (devs []lun.Device, err error) {
	for n := range max(w.Sessions, 1) {
		d, err := lun.Open(ctx, address, lun.Options{InitiatorName: fmt.Sprintf("iqn.2026-11.net.example:bench%d", n), HeaderDigest: w.Digests, DataDigest: w.Digests})
		if err != nil {
			return devs, err
		}
		devs = append(devs, d)
	}
	return devs, nil
}
