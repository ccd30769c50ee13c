package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"lunshift/conf"
	copier "lunshift/copy"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
	"lunshift/target"
)

const (
	// openLimit is how many volumes are opened at a time.
	openLimit = 8
	// reopenInterval is the time between attempts at a volume whose array cannot
	// be reached.
	reopenInterval = 5 * time.Second
	// closeLimit is how long a volume may take to come to rest where the service does not
	// start.
	closeLimit = 10 * time.Second
	// Of shutdown_timeout restTime, but not more than half, is kept for what follows on the
	// commands in flight: their aborts, the flags and the progress, and of it the last
	// logoutTime, but not more than a quarter, for the logouts.
	restTime   = 8 * time.Second
	logoutTime = 2500 * time.Millisecond
)

// Options are what a Service needs beside its configuration.
type Options struct {
	// Version is shown by status and metrics.
	Version string
	Log     logrus.FieldLogger
	// Reload, where it is set, has the configuration read again at each signal.
	Reload <-chan os.Signal
}

// Service is a running lunshift: the target, the state and the volumes of one
// configuration.
type Service struct {
	version string
	log     logrus.FieldLogger
	since   time.Time
	hangUp  <-chan os.Signal

	socket  *socket
	store   *state.Store
	target  *target.Server
	metrics net.Listener
	// keeping is held while a report is taken and kept.
	keeping sync.Mutex
	// follower takes what volumes come to by themselves.
	follower *follower

	// reloading is held by one Reload at a time, and by release for good. Lock order: before
	// mu and the locks of an entry.
	reloading sync.Mutex
	mu        sync.RWMutex // protects what follows; replaced whole, never changed in place
	cfg       *conf.Config
	entries   []*entry

	redirecting sync.Mutex // one redirect at a time; before mu
	claims      claims

	queue    *queue           // of the copies
	copyRate *copier.Throttle // of all copies together

	// running ends when the service is asked to stop; steps of volumes run under it.
	running context.Context
	stop    context.CancelFunc
}

// LoadConfig reads the configuration of a service and holds the addresses in it
// against what lun can open.
func LoadConfig(path string) (*conf.Config, error) {
	return conf.Load(path, func(address string) error {
		_, err := lun.ParseAddress(address)
		return err
	})
}

// New puts the service of cfg together and opens every volume. Nothing is served
// before Run. Any fault makes it fail, with one line for each, except that the
// array of a volume which was served before cannot be reached now: the others do
// not wait for it, and Run tries it again and again.
func New(ctx context.Context, cfg *conf.Config, o Options) (_ *Service, err error) {
	s := &Service{cfg: cfg, version: o.Version, log: o.Log, since: time.Now(), hangUp: o.Reload,
		queue: newQueue(cfg), copyRate: copier.NewThrottle(uint64(cfg.Service.Copy.Rate))}
	s.running, s.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			s.stop()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
			defer cancel()
			err = errors.Join(err, s.release(ctx))
		}
	}()
	if s.socket, err = listenSocket(cfg.Service.Control); err != nil {
		return nil, err
	}
	if cfg.Service.HTTP != "" {
		if s.metrics, err = listenMetrics(cfg.Service.HTTP); err != nil {
			return nil, err
		}
	}
	if s.store, err = state.Open(cfg.Service.State, state.Options{
		Log:          o.Log,
		BitmapMemory: uint64(cfg.Service.Limits.FlagMemory),
	}); err != nil {
		return nil, err
	}
	s.follower = s.newFollower()
	if s.target, err = target.New(targetConfig(cfg.Service, o.Log)); err != nil {
		return nil, err
	}
	if err = s.target.Listen(); err != nil {
		return nil, err
	}
	for _, v := range cfg.Volumes {
		s.entries = append(s.entries, newEntry(v))
	}
	if err = s.openAll(ctx); err != nil {
		return nil, err
	}
	s.queue.begin()
	return s, nil
}

func listenMetrics(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics address %s: %w (service.http)", address, pathless(err))
	}
	return l, nil
}

// Run serves until ctx ends or something fails that the service cannot do without,
// and then shuts down: no new commands, commands in flight end, copiers stop,
// state is closed. It is called once.
func (s *Service) Run(ctx context.Context) error {
	control := s.controlServer()
	servers := []*http.Server{control}
	failed := make(chan error, 1)
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.target.Serve(context.WithoutCancel(ctx)); err != nil && s.running.Err() == nil {
			failed <- fmt.Errorf("target: %w", err)
		}
	})
	// Initiators do not suffer from what fails here.
	serve := func(what string, server *http.Server, l net.Listener) {
		running.Go(func() {
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) && s.running.Err() == nil {
				s.log.WithError(err).Errorf("the %s failed; initiators are served on", what)
			}
		})
	}
	serve("control socket", control, s.socket)
	if s.metrics != nil {
		metrics := &http.Server{Handler: s.metricsHandler(), ReadHeaderTimeout: 10 * time.Second}
		servers = append(servers, metrics)
		serve("metrics", metrics, s.metrics)
	}
	running.Go(s.reopen)
	running.Go(func() {
		for {
			select {
			case <-s.running.Done():
				return
			case <-s.hangUp:
				// What became of it is logged there.
				if _, err := s.Reload(s.running, itself); err != nil {
					s.log.WithError(err).Error("reload refused, the service goes on as it was")
				}
			}
		}
	})
	s.announce()

	var err error
	select {
	case <-ctx.Done():
		s.log.Info("stopping: commands in flight end first")
	case err = <-failed: // logged by the caller, with what else goes wrong
		s.log.Error("stopping: a part of the service failed")
	}
	s.tell("STOPPING=1")
	s.logNote(state.Event{What: "stop", Text: "lunshift " + s.version})
	s.stop()
	all := s.config().Service.ShutdownTimeout
	over := time.NewTimer(all)
	defer over.Stop()
	ended := make(chan error, 1)
	go func() { ended <- s.shutDown(context.WithoutCancel(ctx), all, servers, &running) }()
	select {
	case e := <-ended:
		err = errors.Join(err, e)
	case <-over.C:
		// Whoever called ends the process, which is as safe as a kill.
		err = errors.Join(err, fmt.Errorf("the stop did not end within shutdown_timeout (%s): an array hangs; sessions are left as they are, and nothing that was acknowledged is lost", all))
	}
	if err == nil {
		s.log.Info("stopped")
	}
	return err
}

// controlServer answers on the control socket.
func (s *Service) controlServer() *http.Server {
	return &http.Server{Handler: s.handler(), BaseContext: func(net.Listener) context.Context { return s.running }, ConnContext: withPeer, ReadHeaderTimeout: 10 * time.Second}
}

// shutDown brings all to rest within so much time, as far as arrays let it.
func (s *Service) shutDown(ctx context.Context, all time.Duration, servers []*http.Server, running *sync.WaitGroup) error {
	rest := min(restTime, all/2)
	drain, cancel := context.WithTimeout(ctx, all-rest)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, all-min(logoutTime, all/4))
	defer cancel()
	var err error
	if e := s.target.Shutdown(drain); errors.Is(e, context.DeadlineExceeded) {
		err = fmt.Errorf("commands in flight did not end within %s and were cut off, not acknowledged (shutdown_timeout is %s)", all-rest, all)
	} else if e != nil {
		err = fmt.Errorf("stop the target: %w", e)
	}
	for _, server := range servers {
		if e := server.Shutdown(ctx); e != nil {
			err = errors.Join(err, e, server.Close())
		}
	}
	running.Wait()
	return errors.Join(err, s.release(ctx))
}

// Info is what the service says of itself.
func (s *Service) Info() ServiceInfo {
	info := ServiceInfo{Version: s.version, PID: os.Getpid(), Since: s.since, Config: s.config().Path}
	for _, a := range s.target.Addrs() {
		info.Portals = append(info.Portals, a.String())
	}
	if s.metrics != nil {
		info.HTTP = s.metrics.Addr().String()
	}
	return info
}

// Statuses are all volumes but removed ones, in the order of the configuration.
func (s *Service) Statuses() []proxy.Status {
	all := []proxy.Status{}
	for _, e := range s.list() {
		if !e.isRemoved() {
			all = append(all, e.status())
		}
	}
	return all
}

// Remove forgets the state of a volume that is cut over, be it in the configuration
// or only in the state. It tells whether there was anything to forget; a name that is
// in neither is as good as removed. While the configuration has the volume, a mark
// stays that keeps its stale source from being served.
func (s *Service) Remove(ctx context.Context, name string) (RemoveReport, error) {
	report := RemoveReport{Name: name}
	record, found, err := s.store.Record(name)
	if err == nil && proxy.Phase(record.Phase) == proxy.Cutover {
		err = s.keepReport(ctx, name) // nobody could tell it afterwards
	}
	if err != nil {
		return report, err
	}
	entries := s.list()
	if i := slices.IndexFunc(entries, func(e *entry) bool { return e.name == name }); i >= 0 {
		report.Known = true
		mark := state.Record{Volume: name, SourceID: record.SourceID, DestinationID: record.DestinationID, Phase: removed, CreatedAt: time.Now(), CutoverAt: record.CutoverAt}
		report.Removed, err = entries[i].remove(ctx, mark)
		if report.Removed {
			s.claims.release(name)
		}
		if address, until, is := s.sentTo(entries[i].settings().IQN); is {
			report.Redirect = address
			if !until.IsZero() {
				report.RedirectUntil = &until
			}
		}
		return report, err
	}
	if !found {
		return report, nil
	}
	report.Known = true
	if phase := proxy.Phase(record.Phase); phase != proxy.Cutover && phase != removed {
		return report, &proxy.PhaseError{Volume: name, Step: "remove", Phase: phase, Hint: "only a volume that is cut over can be forgotten"}
	}
	err = s.store.Forget(name)
	report.Removed = err == nil
	return report, err
}

// config is the configuration in effect.
func (s *Service) config() *conf.Config {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.cfg
}

// list is every volume, in the order of the configuration.
func (s *Service) list() []*entry {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.entries
}

// neverKnown fails for a name of which not even the audit trail has a volume.
func (s *Service) neverKnown(name string) error {
	events, err := s.store.History(name)
	if err == nil && len(events) == 0 {
		_, err = s.entry(name)
	}
	return err
}

func (s *Service) entry(name string) (*entry, error) {
	for _, e := range s.list() {
		if e.name == name && !e.isRemoved() {
			return e, nil
		}
	}
	return nil, s.unknown(name)
}

func (s *Service) unknown(name string) error {
	if g := s.config().Group(name); g != nil {
		return &Error{Unknown, fmt.Sprintf("%q is a group, and this is for one volume: %s", name, strings.Join(g.Volumes, ", "))}
	}
	names := []string{}
	for _, e := range s.list() {
		if !e.isRemoved() {
			names = append(names, e.name)
		}
	}
	if len(names) == 0 {
		return &Error{Unknown, fmt.Sprintf("there is no volume %q; all were removed", name)}
	}
	return &Error{Unknown, fmt.Sprintf("there is no volume %q; the service has %s", name, strings.Join(names, ", "))}
}

// openAll opens every volume.
func (s *Service) openAll(ctx context.Context) error {
	records, err := s.store.Records()
	if err != nil {
		return err
	}
	for _, r := range records {
		configured := slices.ContainsFunc(s.config().Volumes, func(v conf.Volume) bool { return v.Name == r.Volume })
		if !configured && r.Phase != removed && !idle(proxy.Phase(r.Phase)) {
			s.log.Warnf("the state has volume %s in phase %s, which is not in %s: it is not served", r.Volume, r.Phase, s.config().Path)
		}
	}
	entries := s.list()
	failures := make([]error, len(entries))
	var group errgroup.Group
	group.SetLimit(openLimit)
	for i, e := range entries {
		group.Go(func() error {
			err := s.openEntry(ctx, e)
			if errors.Is(err, errRemoved) {
				s.log.Warnf("not served: %v", err)
				return nil
			}
			if isUnknown(err) {
				s.log.WithError(err).Error("not served")
				return nil
			}
			known := slices.ContainsFunc(records, func(r state.Record) bool { return r.Volume == e.name })
			if errors.Is(err, lun.ErrConflict) || known && errors.Is(err, lun.ErrUnavailable) {
				s.log.WithError(err).Warnf("not served yet, tried again every %s", reopenInterval)
				return nil
			}
			failures[i] = err
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, v := range s.config().Volumes {
		s.redirect(v.IQN)
	}
	return errors.Join(failures...)
}

// openEntry opens both units of a volume and takes it up from the state. Where that is so
// configured, it starts the migration.
func (s *Service) openEntry(ctx context.Context, e *entry, a ...*adoption) error {
	opened, err := s.openOnce(ctx, e, a...)
	if err != nil || !opened {
		return err
	}
	s.recall(e)
	v, status := e.settings(), e.status()
	s.follower.happened(proxy.Happening{Volume: e.name, Phase: status.Phase})
	if status.Phase.Moving() || status.Phase == proxy.Cutover {
		s.logReport(e.name) // with this version, and what a kill kept from it
	}
	if !v.Autostart || status.Phase != proxy.Ready {
		return nil
	}
	start := func(ctx context.Context) {
		if err := s.step(ctx, itself, startStep(e, proxy.StartOptions{}), e); err != nil {
			s.log.WithError(err).Warnf("volume %s: not started by itself (autostart)", e.name)
			e.fail("start", fmt.Errorf("start: %w", err))
		}
	}
	if len(hookOf(v.Hooks, beforeStart)) == 0 {
		start(ctx) // before an initiator can come in, which may have file systems count
	} else {
		s.follower.work.Go(func() { start(s.running) }) // other volumes do not wait for a hook
	}
	return nil
}

// openOnce tells whether it opened the volume.
func (s *Service) openOnce(ctx context.Context, e *entry, a ...*adoption) (opened bool, err error) {
	e.opening.Lock()
	defer e.opening.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	e.mu.Lock()
	v, dropped, open := e.conf, e.dropped, e.volume != nil && !e.removed
	e.giveUp = cancel
	e.mu.Unlock()
	if dropped || open {
		return false, nil
	}
	volume, units, err := s.openVolume(ctx, v, e, a...)
	var known proxy.Status
	if err != nil {
		known = s.knownOf(v, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.giveUp = nil
	e.failure, e.removed, e.unsure = err, errors.Is(err, errRemoved), errors.Is(err, errUnsure)
	if err != nil {
		e.known, e.volume, e.units = known, nil, nil
	} else {
		e.volume, e.units = volume, units
	}
	if e.opened != nil && (err == nil || e.removed && !e.unsure) {
		close(e.opened)
		e.opened = nil
	}
	return err == nil, err
}

func (s *Service) openVolume(ctx context.Context, v conf.Volume, e *entry, a ...*adoption) (_ Volume, units []lun.Device, err error) {
	needed, err := proxy.NeedsUnits(s.store, v.Name)
	if err != nil {
		return nil, nil, fmt.Errorf("volume %s: %w", v.Name, err)
	}
	record, _, err := s.store.Record(v.Name)
	if err != nil {
		return nil, nil, err
	}
	var source, destination lun.Device
	if needed {
		source, destination, err = s.openUnits(ctx, v, "")
		units = []lun.Device{source, destination}
		if record.Phase == removed {
			err = s.takeAnew(record, source, destination, err)
		}
		if err == nil {
			err = s.foreign(v.Name, source.Info().ID, destination.Info().ID)
		}
		if err == nil {
			err = s.claims.take(v.Name, source.Info().ID, destination.Info().ID)
		}
		if err != nil {
			return nil, nil, errors.Join(err, closeUnits(units))
		}
	}
	if fenced, e := proxy.HasFences(s.store, v.Name); e != nil {
		return nil, nil, e
	} else if fenced {
		// For as long as it takes to give the fences up, and as far as they can be opened.
		if source, destination, err = s.openUnits(ctx, v, ""); err != nil {
			s.log.WithError(err).Warnf("volume %s is cut over, and its fences could not be given up", v.Name)
		}
		defer func() { err = errors.Join(err, closeUnits([]lun.Device{source, destination})) }()
	}
	cfg := proxy.Config{
		Name: v.Name, IQN: v.IQN, LUN: v.LUN,
		Source: source, Destination: destination,
		SourceAddress: v.Source.Address, DestinationAddress: v.Destination.Address,
		RegionSize: uint64(v.RegionSize), CopyDepth: v.Copy.Depth, CopyRate: uint64(v.Copy.Rate),
		CopyRateOfAll: s.copyRate, Seat: s.queue.seat(v.Name),
		Overwrite: v.Overwrite, Seeded: v.Seeded, Mirror: v.Mirror, VerifySample: uint64(v.VerifySample),
		Allocation: proxy.Allocation(v.Allocation),
		Readback:   v.Verify == conf.VerifyReadback, DestinationCache: proxy.Cache(v.DestinationCache),
		Initiators: initiators(v), PortalGroups: v.PortalGroups, ReservationsByName: v.ReservationBy == conf.ByName, Identity: proxy.Identity(v.Identity),
		Store: s.store, Target: s.target, Log: s.log, CutOver: func() { s.redirect(v.IQN) }, LogoutTimeout: v.LogoutTimeout,
		Happened: s.follower.happened,
	}
	var volume *proxy.Volume
	letGo := len(a) > 0 && a[0].options.AcceptUnreadableWrites
	if letGo {
		cfg.Withdraw = func(r proxy.BlockRun) { a[0].withdrawn = append(a[0].withdrawn, r) }
	}
	if needed {
		err = s.adopt(ctx, cfg, e, a...)
	}
	if err == nil {
		volume, err = proxy.Open(ctx, cfg)
	}
	if letGo {
		a[0].done = err == nil
	}
	if err != nil {
		s.claims.release(v.Name)
		return nil, nil, errors.Join(err, closeUnits(units))
	}
	return volume, units, nil
}

// reopen tries the volumes that are not open until the service stops.
func (s *Service) reopen() {
	timer := time.NewTicker(reopenInterval)
	defer timer.Stop()
	for {
		select {
		case <-s.running.Done():
			return
		case <-timer.C:
		}
		for _, e := range s.list() {
			if _, err := e.open(); err == nil || e.isGone() || e.isUnknown() {
				continue
			}
			if err := s.openEntry(s.running, e); err != nil {
				s.log.WithError(err).Debug("not served yet")
				continue
			}
			if _, err := e.open(); err != nil {
				continue // it was dropped meanwhile
			}
			s.log.Infof("volume %s: its logical units are back, it is served", e.name)
		}
	}
}

// announce tells log and systemd that the service serves.
func (s *Service) announce() {
	info := s.Info()
	fields := logrus.Fields{"portals": strings.Join(info.Portals, ","), "control": s.config().Service.Control}
	if info.HTTP != "" {
		fields["metrics"] = "http://" + info.HTTP + "/metrics"
	}
	s.logNote(state.Event{What: "serve", Text: "lunshift " + s.version})
	s.log.WithFields(fields).Infof("lunshift %s serves %d of %d volume(s)", s.version, s.served(), len(s.list()))
	s.tell("READY=1")
}

// served is how many volumes initiators find.
func (s *Service) served() int {
	n := 0
	for _, e := range s.list() {
		if v, err := e.open(); err == nil && !e.isRemoved() && v.Status().Phase != proxy.Cutover {
			n++
		}
	}
	return n
}

// release gives everything up that New took, in the reverse order. Volumes come to rest
// until ctx ends, whatever the others do: one whose array hangs keeps no other from
// writing its progress down. Then the arrays are logged out of, and the state is closed.
func (s *Service) release(ctx context.Context) error {
	// A reload that is under way ends soon, as running has ended; none begins any more.
	s.reloading.Lock()
	defer s.reloading.Unlock()
	entries := s.list()
	errs := make([]error, len(entries))
	var group sync.WaitGroup
	for i, e := range entries {
		group.Go(func() { errs[i] = e.close(ctx) })
	}
	group.Wait()
	if s.target != nil {
		errs = append(errs, ignoreClosed(s.target.Close()))
	}
	if s.follower != nil {
		errs = append(errs, s.follower.close(ctx))
	}
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	if s.metrics != nil {
		errs = append(errs, ignoreClosed(s.metrics.Close()))
	}
	if s.socket != nil {
		errs = append(errs, ignoreClosed(s.socket.Close()))
	}
	return errors.Join(errs...)
}

// ignoreClosed makes closing a second time no failure.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, fs.ErrClosed) {
		return nil
	}
	return err
}
