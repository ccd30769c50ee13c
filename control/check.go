package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

const (
	// allocationLimit is how long check asks a source for its allocation.
	allocationLimit = 20 * time.Second
	// The source is read for sampleTime or sampleBytes, sampleDepth reads of
	// sampleRead bytes at a time, to tell how fast it is.
	sampleTime  = time.Second
	sampleBytes = 256 << 20
	sampleRead  = 1 << 20
	sampleDepth = 4
	// sampleRuns is how many allocated runs are kept to choose from; even.
	sampleRuns = 4096
)

// CheckReport is what check found. It changes nothing on either side.
type CheckReport struct {
	Config string `json:"config"`
	// Running tells whether a service answers on the control socket.
	Running bool `json:"service_running"`
	// Refusals are what would keep the service as a whole from starting.
	Refusals []string `json:"refusals"`
	// Discovery is what an initiator proves before it sees a target name.
	Discovery Proof          `json:"discovery_authentication"`
	Volumes   []VolumeReport `json:"volumes"`
}

// VolumeReport is what check found about one volume.
type VolumeReport struct {
	Name string `json:"name"`
	IQN  string `json:"iqn"`
	LUN  uint64 `json:"lun"`
	// Phase is what the state says; ready where it says nothing.
	Phase proxy.Phase `json:"phase"`
	// Served tells whether the running service has the volume.
	Served      bool       `json:"served"`
	Source      UnitReport `json:"source"`
	Destination UnitReport `json:"destination"`
	// Allocated is what the source has storage for, in bytes; where AllocatedKnown
	// is false, what was seen of it within the time given to check.
	Allocated      uint64 `json:"allocated_bytes"`
	AllocatedKnown bool   `json:"allocated_known"`
	// Allocation says what tells which blocks of the source are copied, AllocationFound what
	// was found on it where its file systems tell. Without the source's own word, what they have
	// free is not in Allocated.
	Allocation      string   `json:"allocation,omitempty"`
	AllocationFound []string `json:"allocation_found"`
	// Estimate is the time of the background copy; null where nothing is to be copied
	// or it cannot be told. It assumes Rate.
	Estimate *int64 `json:"estimate_seconds"`
	// Rate is the speed the source was just read with, or the configured limit where
	// that is lower (RateLimited), in bytes per second.
	Rate        uint64 `json:"estimate_rate_bytes_per_second"`
	RateLimited bool   `json:"estimate_rate_limited"`
	// Refusals say, a line each, why the volume would be refused; none is good.
	Refusals []string `json:"refusals"`
	// Initiators may come in, the first that matches counts; where LoopbackOnly is true
	// there is no list, and those on this host alone may.
	Initiators   []InitiatorReport `json:"initiators"`
	LoopbackOnly bool              `json:"loopback_only"`
	// PortalGroups are those whose portals lead to the volume; null is all.
	PortalGroups []uint16 `json:"portal_groups"`
	// ReservationBy is what a persistent reservation's registration belongs to.
	ReservationBy string `json:"reservation_by"`
	// Identity is whose identity initiators find.
	Identity string `json:"identity"`
	// Redirect is where logins are sent after the cutover; empty where they are refused.
	Redirect string `json:"redirect,omitempty"`
	// Warnings say, a line each, what may not be meant so; nothing is refused for them.
	Warnings []string `json:"warnings"`
}

// UnitReport is one side of a volume.
type UnitReport struct {
	Address string `json:"address"`
	// Open tells whether the rest is known.
	Open              bool   `json:"open"`
	Size              uint64 `json:"size_bytes"`
	BlockSize         uint32 `json:"block_size"`
	ID                string `json:"id"`
	Vendor            string `json:"vendor,omitempty"`
	Product           string `json:"product,omitempty"`
	Serial            string `json:"serial,omitempty"`
	Thin              bool   `json:"thin"`
	ReportsAllocation bool   `json:"reports_allocation"`
	VolatileCache     bool   `json:"volatile_cache"`
	// Presentable tells whether the volume could have its identity.
	Presentable bool `json:"identity_presentable"`
	// Fence is who may write to it.
	Fence FenceReport `json:"fence"`
}

// Refused has one line for everything that would be refused; nil when all is well.
func (r CheckReport) Refused() error {
	var errs []error
	for _, line := range r.Refusals {
		errs = append(errs, errors.New(line))
	}
	for _, v := range r.Volumes {
		for _, line := range v.Refusals {
			errs = append(errs, errors.New(line))
		}
	}
	return errors.Join(errs...)
}

// Check opens both units of every volume of cfg, asks them what they are, and
// says what would be refused. Where a service runs, its volumes are inspected by
// the service, which holds their units.
func Check(ctx context.Context, cfg *conf.Config, log logrus.FieldLogger) (CheckReport, error) {
	report := CheckReport{Config: cfg.Path, Refusals: []string{}, Discovery: proof(cfg.Service.Discovery), Volumes: []VolumeReport{}}
	client := NewClient(cfg.Service.Control)
	served, err := client.Statuses(ctx)
	if ctx.Err() != nil {
		return report, ctx.Err()
	}
	report.Running = err == nil
	refuse := func(err error) {
		if err != nil {
			report.Refusals = append(report.Refusals, lines(err)...)
		}
	}
	var records map[string]state.Record
	var id state.Identity // that of a running service is its own affair
	if report.Running {
		records, err = client.records(ctx)
		refuse(err)
	} else {
		refuse(checkListeners(cfg.Service, log))
		refuse(checkSocket(cfg.Service.Control))
		records, id, err = readRecords(ctx, cfg.Service.State, log)
		refuse(err)
	}
	reports := make([]VolumeReport, len(cfg.Volumes))
	var group sync.WaitGroup
	slots := make(chan struct{}, openLimit)
	for i, v := range cfg.Volumes {
		group.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if all := cfg.Service.Copy.Rate; all > 0 && (v.Copy.Rate == 0 || all < v.Copy.Rate) {
				v.Copy.Rate = all
			}
			reports[i] = checkVolume(ctx, cfg.Service, client, served, records, id, v, log)
			running := reports[i]
			reports[i].admit(cfg.Service, v)
			reports[i].compareAccess(running)
			reports[i].compareCache(v)
			reports[i].compareIdentity(v)
			reports[i].warnFences()
			reports[i].checkHooks(v.Hooks)
		})
	}
	group.Wait()
	var claims claims
	for i, r := range reports {
		if !r.Source.Open || !r.Destination.Open {
			continue
		}
		if err := claims.take(r.Name, r.Source.ID, r.Destination.ID); err != nil {
			reports[i] = r.refuse("%v", err)
		}
	}
	report.Volumes = reports
	return report, ctx.Err()
}

func checkVolume(ctx context.Context, service conf.Service, client *Client, served []proxy.Status, records map[string]state.Record, id state.Identity, v conf.Volume, log logrus.FieldLogger) VolumeReport {
	report := newReport(v)
	for _, status := range served {
		if status.Name != v.Name {
			continue
		}
		if status.Source.Address != v.Source.Address || status.Destination.Address != v.Destination.Address {
			return report.refuse("volume %s: the running service moves %s to %s, not what the file says: restart the service, or correct the file",
				v.Name, status.Source.Address, status.Destination.Address)
		}
		answer, err := client.Check(ctx, v.Name)
		if err != nil {
			return report.refuse("volume %s: the running service could not check it: %v", v.Name, err)
		}
		answer.Served = true
		return answer
	}
	record, known := records[v.Name]
	wasRemoved := known && record.Phase == removed
	if known && !wasRemoved {
		report.Phase = proxy.Phase(record.Phase)
		if report.Phase == proxy.Cutover {
			return report
		}
	}
	source, destination, err := openUnits(ctx, service, v, log, "")
	if wasRemoved {
		if same := sameUnits(record, source, destination, err); same != nil {
			return report.refuse("volume %s: %v", v.Name, same).close(v, source, destination)
		}
	}
	if err != nil {
		for _, e := range lines(err) {
			report = report.refuse("%s", e)
		}
		if source != nil {
			report.Source = unitReport(v.Source.Address, source.Info())
		}
		if destination != nil {
			report.Destination = unitReport(v.Destination.Address, destination.Info())
		}
		return report.close(v, source, destination)
	}
	inspected := v
	elsewhere := foreign(slices.Collect(maps.Values(records)), v.Name, source.Info().ID, destination.Info().ID)
	if elsewhere != nil {
		report = report.refuse("%v", elsewhere)
	} else if !known {
		// As serve does: this is asked first, and overwrite is no answer to it.
		if err := proxy.UnknownWithoutRecord(ctx, service.State, v.Name, v.Destination.Address, destination); err != nil {
			report = report.refuse("%s", oneLine(err))
			inspected.Overwrite = true
		}
	}
	report.inspect(ctx, inspected, source, destination, proxy.FenceKeyOf(id, v.Name))
	if s, d := report.Source.ID, report.Destination.ID; known && report.Phase.Moving() && (s != record.SourceID || d != record.DestinationID) {
		report = report.refuse("volume %s: its state belongs to source %s and destination %s, but the configuration names source %s and destination %s: correct the configuration, or give the new pair another name",
			v.Name, record.SourceID, record.DestinationID, s, d)
	}
	return report.close(v, source, destination)
}

func (r VolumeReport) close(v conf.Volume, units ...lun.Device) VolumeReport {
	if err := closeUnits(units); err != nil {
		return r.refuse("volume %s: close the units: %s", v.Name, oneLine(err))
	}
	return r
}

// checkServed inspects a volume of the running service.
func (s *Service) checkServed(ctx context.Context, e *entry) VolumeReport {
	report := newReport(e.settings())
	report.admit(s.config().Service, e.settings())
	e.mu.Lock()
	units, failure := e.units, e.failure
	e.mu.Unlock()
	report.Phase = e.status().Phase
	if failure != nil {
		return report.refuse("%s", oneLine(failure))
	}
	if len(units) == 2 {
		key, err := proxy.FenceKey(ctx, s.store, e.name)
		if err != nil {
			return report.refuse("%s", oneLine(err))
		}
		report.inspect(ctx, e.settings(), units[0], units[1], key)
	}
	return report
}

func newReport(v conf.Volume) VolumeReport {
	return VolumeReport{
		Name: v.Name, IQN: v.IQN, LUN: v.LUN, Phase: proxy.Ready, Refusals: []string{}, AllocationFound: []string{},
		Source: UnitReport{Address: v.Source.Address}, Destination: UnitReport{Address: v.Destination.Address},
	}
}

func (r VolumeReport) refuse(format string, args ...any) VolumeReport {
	r.Refusals = append(r.Refusals, fmt.Sprintf(format, args...))
	return r
}

// inspect fills the report in from the two open units.
func (r *VolumeReport) inspect(ctx context.Context, v conf.Volume, source, destination lun.Device, key uint64) {
	r.Source, r.Destination = unitReport(v.Source.Address, source.Info()), unitReport(v.Destination.Address, destination.Info())
	// Once the migration has started, the destination holds what it put there.
	overwrite := v.Overwrite || v.Seeded || !idle(r.Phase)
	refused, err := proxy.Check(ctx, source, destination, overwrite)
	if err != nil {
		refused = append(refused, err)
	}
	for _, e := range refused {
		*r = r.refuse("volume %s: %s", v.Name, oneLine(e))
	}
	r.inspectFences(ctx, v, source, destination, key)
	free, err := r.inspectFileSystems(ctx, v, source)
	if err != nil {
		*r = r.refuse("volume %s: source: read its file systems: %s", v.Name, oneLine(err))
		return
	}
	var runs []lun.Extent
	r.Allocated, r.AllocatedKnown, runs, err = allocated(ctx, source, proxy.Allocation(v.Allocation), free)
	if err != nil {
		*r = r.refuse("volume %s: source: ask for its allocation: %s", v.Name, oneLine(err))
		return
	}
	if !idle(r.Phase) || r.Allocated == 0 {
		return
	}
	rate, err := readRate(ctx, source, runs)
	if err != nil {
		*r = r.refuse("volume %s: source: read a sample: %s", v.Name, oneLine(err))
		return
	}
	if limit := uint64(v.Copy.Rate); limit > 0 && limit < rate {
		rate, r.RateLimited = limit, true
	}
	if r.Rate = rate; rate > 0 {
		toCopy := r.Allocated
		if !r.AllocatedKnown {
			toCopy = r.Source.Size
		}
		seconds := int64(toCopy / rate)
		r.Estimate = &seconds
	}
}

// compareCache warns where the destination says of its cache what the configuration does not.
func (r *VolumeReport) compareCache(v conf.Volume) {
	said := map[bool]string{true: conf.CacheVolatile, false: conf.CacheNonvolatile}[r.Destination.VolatileCache]
	if !r.Destination.Open || v.DestinationCache == conf.CacheAuto || v.DestinationCache == said {
		return
	}
	cost := "each first write waits for a flush that it says it does not need"
	if v.DestinationCache == conf.CacheNonvolatile {
		cost = "if it is right, a power loss there loses acknowledged writes"
	}
	r.Warnings = append(r.Warnings, fmt.Sprintf("volume %s: destination_cache = %q, but the destination says that its cache is %s: %s", v.Name, v.DestinationCache, said, cost))
}

func unitReport(address string, i lun.Info) UnitReport {
	return UnitReport{
		Address: address, Open: true, Size: i.Size(), BlockSize: i.BlockSize, ID: i.ID,
		Vendor: i.Vendor, Product: i.Product, Serial: i.Serial,
		Thin: i.Thin, ReportsAllocation: i.ReportsAllocation, VolatileCache: i.VolatileCache,
		Presentable: i.Identity != nil,
	}
}

// readRate reads parts of the runs for a moment and gives the speed in bytes per
// second; 0 where there is nothing to read.
func readRate(ctx context.Context, dev lun.Device, runs []lun.Extent) (uint64, error) {
	blockSize := uint64(dev.Info().BlockSize)
	var total uint64
	for _, run := range runs {
		total += run.Blocks
	}
	blocks := sampleRead / blockSize
	reads := min(sampleBytes/sampleRead, (total+blocks-1)/blocks)
	if reads == 0 {
		return 0, nil
	}
	begin := time.Now()
	var next, done atomic.Uint64
	errs := make([]error, sampleDepth)
	var group sync.WaitGroup
	for worker := range errs {
		group.Go(func() {
			buffer := make([]byte, sampleRead)
			for time.Since(begin) < sampleTime {
				i := next.Add(1) - 1
				if i >= reads {
					return
				}
				e := at(runs, total/reads*i, blocks)
				length := e.Blocks * blockSize
				if errs[worker] = dev.ReadAt(ctx, buffer[:length], e.Start); errs[worker] != nil {
					return
				}
				done.Add(length)
			}
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	return uint64(float64(done.Load()) / time.Since(begin).Seconds()), nil
}

// at is up to so many blocks from the n-th block of the runs on.
func at(runs []lun.Extent, n, blocks uint64) lun.Extent {
	for _, run := range runs {
		if n < run.Blocks {
			return lun.Extent{Start: run.Start + lun.LBA(n), Blocks: min(blocks, run.Blocks-n)}
		}
		n -= run.Blocks
	}
	return lun.Extent{}
}

// checkListeners says whether the service could listen on its portals and on the
// address of the metrics, all at once.
func checkListeners(service conf.Service, log logrus.FieldLogger) error {
	server, err := target.New(targetConfig(service, log))
	if err != nil {
		return err
	}
	err = server.Listen()
	if service.HTTP != "" {
		l, failure := listenMetrics(service.HTTP)
		err = errors.Join(err, failure)
		if failure == nil {
			defer l.Close()
		}
	}
	return errors.Join(err, server.Close())
}

// checkCreatable says whether dir is there and can be written to, or could be made.
func checkCreatable(dir string) error {
	for path := dir; ; path = filepath.Dir(path) {
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) && path != filepath.Dir(path) {
			if _, err := os.Lstat(path); err == nil {
				return fmt.Errorf("%s is a symbolic link to nowhere", path)
			}
			continue
		}
		if err != nil {
			return pathless(err)
		}
		if !info.IsDir() {
			return fmt.Errorf("%s is not a directory", path)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if st.Type == unix.PROC_SUPER_MAGIC || st.Type == unix.SYSFS_MAGIC {
			return fmt.Errorf("%s is on a file system that keeps no files", path)
		}
		if err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
			return fmt.Errorf("cannot write to %s: %w", path, err)
		}
		return nil
	}
}

// readRecords gives what the state knows, and its identity; nothing where there is no
// state yet.
func readRecords(ctx context.Context, dir string, log logrus.FieldLogger) (_ map[string]state.Record, id state.Identity, _ error) {
	content, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(content) == 0 {
		if err := checkCreatable(dir); err != nil {
			return nil, id, fmt.Errorf("state directory %s: %w (service.state)", dir, err)
		}
		return nil, id, nil
	}
	if err != nil {
		return nil, id, fmt.Errorf("state directory %s: %w (service.state)", dir, pathless(err))
	}
	store, err := state.Open(dir, state.Options{Log: log})
	if err != nil {
		return nil, id, err
	}
	list, err := store.Records()
	if err == nil {
		id, err = store.Identity(ctx)
	}
	if err := errors.Join(err, store.Close()); err != nil {
		return nil, id, err
	}
	return byName(list), id, nil
}

func byName(list []state.Record) map[string]state.Record {
	records := make(map[string]state.Record, len(list))
	for _, r := range list {
		records[r.Volume] = r
	}
	return records
}

// lines are the single errors that errors.Join put together.
func lines(err error) []string {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var all []string
		for _, e := range joined.Unwrap() {
			all = append(all, lines(e)...)
		}
		return all
	}
	return []string{oneLine(err)}
}
