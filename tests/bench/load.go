package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	hdr "github.com/HdrHistogram/hdrhistogram-go"

	"lunshift/lun"
	"lunshift/tests/peer"
)

// work is one workload.
type work struct {
	Write      bool
	Sequential bool
	Bytes      int // of one I/O
	Depth      int // I/Os in flight on each session
	Sessions   int // 0 is 1
	Digests    bool
	Within     uint64 // the bytes from the beginning of the unit that it keeps to; 0 is all
}

func (w work) String() string {
	kind, size := "random", fmt.Sprintf("%d KiB", w.Bytes>>10)
	if w.Sequential {
		kind = "sequential"
	}
	op := "read"
	if w.Write {
		op = "write"
	}
	s := fmt.Sprintf("%s %s %s, depth %d", kind, size, op, w.Depth)
	if w.Sessions > 1 {
		s += fmt.Sprintf(", %d sessions", w.Sessions)
	}
	return s
}

// outcome is what a run of a workload gave.
type outcome struct {
	IOPS     float64
	P50, P99 time.Duration
	// Total is the I/Os, those before the clock ran as well.
	Total int64
	// CPU is the processor time of each watched process per I/O.
	CPU []time.Duration
}

// runLoad is the process that makes the load: lunshift's initiator on one session.
func runLoad(args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	address := flags.String("address", "", "logical unit")
	text := flags.String("work", "", "the workload, as JSON")
	span := flags.Duration("for", time.Second, "how long")
	pids := flags.String("pids", "[]", "processes to watch, as JSON")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var w work
	var watched []int
	if err := errors.Join(json.Unmarshal([]byte(*text), &w), json.Unmarshal([]byte(*pids), &watched)); err != nil {
		return err
	}
	ctx := context.Background()
	devs, err := w.opened(ctx, *address)
	defer func() {
		for _, d := range devs {
			d.Close()
		}
	}()
	if err != nil {
		return err
	}
	o, err := drive(ctx, devs, w, *span, watched)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(o)
}

// drive keeps w.Depth I/Os in flight on each device for about span.
func drive(ctx context.Context, devs []lun.Device, w work, span time.Duration, watched []int) (outcome, error) {
	info := devs[0].Info()
	if w.Bytes%int(info.BlockSize) != 0 || uint64(w.Bytes) > info.Size() {
		return outcome{}, fmt.Errorf("the unit does not fit I/Os of %d bytes", w.Bytes)
	}
	// Everyone is warm before the clock runs.
	warm := hdr.New(1, int64(time.Minute), 3)
	if err := burst(ctx, devs, w, span/10, warm); err != nil {
		return outcome{}, err
	}
	before, err := cpuTimes(watched)
	if err != nil {
		return outcome{}, err
	}
	began := time.Now()
	all := hdr.New(1, int64(time.Minute), 3)
	if err := burst(ctx, devs, w, span, all); err != nil {
		return outcome{}, err
	}
	elapsed := time.Since(began)
	after, err := cpuTimes(watched)
	if err != nil {
		return outcome{}, err
	}
	o := outcome{
		IOPS: float64(all.TotalCount()) / elapsed.Seconds(),
		P50:  time.Duration(all.ValueAtQuantile(50)),
		P99:  time.Duration(all.ValueAtQuantile(99)),

		Total: all.TotalCount() + warm.TotalCount(),
	}
	for i := range after {
		o.CPU = append(o.CPU, (after[i]-before[i])/time.Duration(max(all.TotalCount(), 1)))
	}
	return o, nil
}

// burst records the latency of each I/O in all, in nanoseconds.
func burst(ctx context.Context, devs []lun.Device, w work, span time.Duration, all *hdr.Histogram) error {
	info := devs[0].Info()
	perIO := uint64(w.Bytes) / uint64(info.BlockSize)
	slots := info.Blocks / perIO
	if w.Within > 0 {
		slots = min(slots, w.Within/uint64(w.Bytes))
	}
	deadline := time.Now().Add(span)
	var mu sync.Mutex // protects all, next and fault
	var fault error
	var next uint64
	var running sync.WaitGroup
	for n := range w.Depth * len(devs) {
		dev := devs[n%len(devs)]
		running.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(n), uint64(time.Now().UnixNano())))
			p := make([]byte, w.Bytes)
			peer.Stamp(p, 512, 0, uint64(n), 1)
			mine := hdr.New(1, int64(time.Minute), 3)
			err := func() error {
				for now := time.Now(); now.Before(deadline); {
					slot := rng.Uint64N(slots)
					if w.Sequential {
						mu.Lock()
						slot = next % slots
						next++
						mu.Unlock()
					}
					var err error
					if at := lun.LBA(slot * perIO); w.Write {
						err = dev.WriteAt(ctx, p, at)
					} else {
						err = dev.ReadAt(ctx, p, at)
					}
					if err != nil {
						return err
					}
					then := now
					now = time.Now()
					if err := mine.RecordValue(int64(max(now.Sub(then), 1))); err != nil {
						return err
					}
				}
				return nil
			}()
			mu.Lock()
			defer mu.Unlock()
			fault = errors.Join(fault, err)
			all.Merge(mine)
		})
	}
	running.Wait()
	return fault
}

func cpuTimes(pids []int) ([]time.Duration, error) {
	var list []time.Duration
	for _, pid := range pids {
		d, err := peer.CPUTime(pid)
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, nil
}
