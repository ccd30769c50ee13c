package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"lunshift/conf"
	"lunshift/lun"
	"lunshift/proxy"
	"lunshift/state"
)

// ReloadReport is what reading the configuration again changed. Settings are named as in
// the faults of the file, service.log_level or volume[db01].copy.rate.
type ReloadReport struct {
	Config string `json:"config"`
	// Added volumes are served now, or tried until their arrays are back. Dropped ones are not
	// served any more.
	Added   []string `json:"added"`
	Dropped []string `json:"dropped"`
	// Changed settings count from now on; those in Restart when the service starts again.
	Changed []string `json:"changed"`
	Restart []string `json:"restart_needed"`
	// Kept volumes are served on though the file has them no more.
	Kept []KeptVolume `json:"kept"`
	// Failed says, a line each, what could not be taken up.
	Failed []string `json:"failed"`
	// Notes say, a line each, what may not be expected.
	Notes []string `json:"notes"`
}

// KeptVolume is a volume that must not be dropped.
type KeptVolume struct {
	Name  string      `json:"name"`
	Phase proxy.Phase `json:"phase"`
}

func (k KeptVolume) String() string {
	return fmt.Sprintf("volume %s is %s and stays served, though the file has it no more: put its [[volume]] back, or a restart does not serve it; it can go once it is cut over or rolled back", k.Name, k.Phase)
}

// Err is nil where everything in the file counts now. The gravest reason comes first.
func (r ReloadReport) Err() error {
	switch {
	case len(r.Failed) > 0:
		return &Error{Failed, fmt.Sprintf("reload: %d of the changes could not be taken up", len(r.Failed))}
	case len(r.Kept) > 0:
		return &Error{WrongPhase, fmt.Sprintf("reload: %d volume(s) that the file has no more are being moved", len(r.Kept))}
	case len(r.Restart) > 0:
		return &Error{RestartNeeded, fmt.Sprintf("reload: %d setting(s) count when the service starts again", len(r.Restart))}
	}
	return nil
}

// reloadLine is a line of the report; grave ones are warnings.
type reloadLine struct {
	text  string
	grave bool
}

func (r ReloadReport) lines() []reloadLine {
	var all []reloadLine
	add := func(grave bool, what string, names []string) {
		for _, n := range names {
			all = append(all, reloadLine{fmt.Sprintf(what, n), grave})
		}
	}
	add(false, "volume %s: added", r.Added)
	add(false, "volume %s: dropped", r.Dropped)
	add(false, "%s: changed", r.Changed)
	add(false, "%s", r.Notes)
	add(true, "%s: not changed, this needs a restart of the service", r.Restart)
	for _, k := range r.Kept {
		all = append(all, reloadLine{k.String(), true})
	}
	add(true, "failed: %s", r.Failed)
	if len(all) == 0 {
		all = append(all, reloadLine{"nothing changed", false})
	}
	return all
}

// WriteReload writes the report for people.
func WriteReload(w io.Writer, r ReloadReport) error {
	for _, l := range r.lines() {
		if _, err := fmt.Fprintln(w, l.text); err != nil {
			return err
		}
	}
	return nil
}

// atOnce are the settings of the service that count at once; all of a volume's that do are in
// entry.change.
var atOnce = []string{"log_level", "log_format", "shutdown_timeout", "copy.parallel", "copy.rate"}

// Reload reads the configuration again and takes up what differs, one call at a time. With any
// fault in the file nothing changes, and the error has all of them. Sessions and commands of
// volumes that do not differ go on and notice nothing. What is in the report happened even
// where it has failures as well.
func (s *Service) Reload(ctx context.Context, who state.Who) (ReloadReport, error) {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	if s.running.Err() != nil {
		return ReloadReport{}, &Error{Failed, "the service stops; the configuration is not read again"}
	}
	s.tell("RELOADING=1\nMONOTONIC_USEC=" + monotonic())
	defer s.tell("READY=1")
	a, err := s.asks(ctx, who, "", "reload", nil, "")
	if err != nil {
		return ReloadReport{}, err
	}
	report, err := s.reload(ctx)
	a.ends(report.text(), err)
	if err != nil {
		return report, err
	}
	s.noteReload(who, report)
	for _, l := range report.lines() {
		if l.grave {
			s.log.Warnf("reload: %s", l.text)
		} else {
			s.log.Infof("reload: %s", l.text)
		}
	}
	return report, nil
}

// text is the report for the audit trail.
func (r ReloadReport) text() string {
	var all []string
	for _, l := range r.lines() {
		all = append(all, l.text)
	}
	return strings.Join(all, "; ")
}

// noteReload enters what a reload did with each volume in the volume's own trail.
func (s *Service) noteReload(who state.Who, report ReloadReport) {
	did := map[string][]string{}
	for _, name := range report.Added {
		did[name] = append(did[name], "added")
	}
	for _, name := range report.Dropped {
		did[name] = append(did[name], "dropped")
	}
	for what, keys := range map[string][]string{"changed": report.Changed, "needs a restart": report.Restart} {
		for _, key := range keys {
			if rest, ok := strings.CutPrefix(key, "volume["); ok {
				name, key, _ := strings.Cut(rest, "].")
				did[name] = append(did[name], key+" "+what)
			}
		}
	}
	var events []state.Event
	for _, name := range slices.Sorted(maps.Keys(did)) {
		slices.Sort(did[name])
		events = append(events, state.Event{Volume: name, At: time.Now(), Who: who, What: "reload", Result: resultDone, Text: clean(strings.Join(did[name], ", "), mostText)})
	}
	if _, err := s.store.Append(s.running, events...); err != nil {
		s.log.WithError(err).Error("what the reload changed of volumes is not in their audit trails")
	}
}

// reload does what Reload says; reloading is held.
func (s *Service) reload(ctx context.Context) (ReloadReport, error) {
	old := s.config()
	report := ReloadReport{Config: old.Path, Added: []string{}, Dropped: []string{}, Changed: []string{},
		Restart: []string{}, Kept: []KeptVolume{}, Failed: []string{}, Notes: []string{}}
	file, err := LoadConfig(old.Path)
	if err != nil {
		return report, &Error{Configuration, err.Error()}
	}
	service := s.reloadService(old.Service, file.Service, &report)

	// What goes makes room for what comes.
	var entries []*entry
	left := map[string]*entry{}
	iqns := map[string]bool{}
	type sent struct {
		address string
		until   time.Time
	}
	redirected := map[string]sent{} // targets of which volumes go
	for _, e := range s.list() {
		iqn := e.settings().IQN
		iqns[iqn] = true
		if slices.ContainsFunc(file.Volumes, func(v conf.Volume) bool { return v.Name == e.name }) {
			left[e.name] = e
			continue
		}
		if address, until, is := s.sentTo(iqn); is {
			redirected[iqn] = sent{address, until}
		}
		phase := e.status().Phase
		switch err := e.drop(ctx); {
		case errors.Is(err, proxy.ErrPhase):
			if phase = e.status().Phase; !phase.Moving() {
				phase = proxy.Migrating // between the two looks it was started
			}
			report.Kept = append(report.Kept, KeptVolume{e.name, phase})
			entries = append(entries, e)
			continue
		case err != nil:
			report.Failed = append(report.Failed, oneLine(fmt.Errorf("drop volume %s: %w", e.name, err)))
		}
		s.claims.release(e.name)
		report.Dropped = append(report.Dropped, e.name)
	}

	var opened []*entry
	inFile := make([]*entry, len(file.Volumes))
	for i, v := range file.Volumes {
		iqns[v.IQN] = true
		e := left[v.Name]
		if e == nil {
			inFile[i] = newEntry(v)
			opened = append(opened, inFile[i])
			continue
		}
		inFile[i] = e
		if s.reloadVolume(e, v, &report) {
			opened = append(opened, e)
		}
	}
	failures := s.openSome(ctx, opened)
	for i, e := range opened {
		fresh := left[e.name] == nil
		switch err := failures[i]; {
		case err == nil && fresh:
			report.Added = append(report.Added, e.name)
		case err == nil:
		case fresh && !s.waitsFor(e, err):
			// As a service does not start with it, it is not taken up: the next reload tries again.
			inFile[slices.Index(inFile, e)] = nil
			fallthrough
		default:
			report.Failed = append(report.Failed, oneLine(err))
		}
	}
	inFile = slices.DeleteFunc(inFile, func(e *entry) bool { return e == nil })
	entries = append(inFile, entries...)

	cfg := &conf.Config{Path: file.Path, Service: service, Groups: file.Groups}
	report.Changed = append(report.Changed, old.GroupChanges(file)...)
	for _, e := range entries {
		cfg.Volumes = append(cfg.Volumes, e.settings())
	}
	s.mu.Lock()
	s.cfg, s.entries = cfg, entries
	s.mu.Unlock()
	s.queue.arrange(cfg)
	s.copyRate.Set(uint64(service.Copy.Rate))
	for _, iqn := range slices.Sorted(maps.Keys(iqns)) {
		s.redirect(iqn)
		if was, is := redirected[iqn]; is {
			if _, _, still := s.sentTo(iqn); !still {
				report.Notes = append(report.Notes, fmt.Sprintf("logins to %s are not sent to %s any more, which was to go on %s: put the [[volume]] back where a host may still come here", iqn, was.address, untilText(was.until)))
			}
		}
	}
	return report, nil
}

// reloadService takes up what of [service] counts at once, and gives what is in effect then.
func (s *Service) reloadService(old, file conf.Service, report *ReloadReport) conf.Service {
	next := old
	next.LogLevel, next.LogFormat, next.ShutdownTimeout = file.LogLevel, file.LogFormat, file.ShutdownTimeout
	next.Copy = file.Copy
	for _, key := range old.Changes(file) {
		if slices.Contains(atOnce, key) {
			report.Changed = append(report.Changed, "service."+key)
		} else {
			report.Restart = append(report.Restart, "service."+key)
		}
	}
	if log, ok := s.log.(*logrus.Logger); ok {
		setLog(log, next)
	}
	return next
}

// reloadVolume takes up what of a volume changed, and tells whether it is to be opened anew:
// where it was not open, other settings may open it.
func (s *Service) reloadVolume(e *entry, to conf.Volume, report *ReloadReport) (open bool) {
	changed, restart, err := e.change(to)
	for _, key := range changed {
		report.Changed = append(report.Changed, fmt.Sprintf("volume[%s].%s", e.name, key))
	}
	for _, key := range restart {
		report.Restart = append(report.Restart, fmt.Sprintf("volume[%s].%s", e.name, key))
	}
	if err != nil {
		report.Failed = append(report.Failed, oneLine(err))
		return false
	}
	if slices.Contains(changed, "copy.rate") && e.status().RateLimit != uint64(to.Copy.Rate) {
		report.Notes = append(report.Notes, fmt.Sprintf("volume %s: the rate that lunshift throttle set stays, whatever copy.rate is", e.name))
	}
	if status := e.status(); slices.Contains(changed, "mirror") && status.Mirrored != to.Mirror {
		report.Notes = append(report.Notes, fmt.Sprintf("volume %s: what lunshift mirror set stays, whatever mirror is", e.name))
	}
	if slices.Contains(restart, "mirror") {
		report.Notes = append(report.Notes, fmt.Sprintf("volume %s: lunshift mirror %s switches the mirror without a restart", e.name, e.name))
	}
	_, closed := e.open()
	return len(changed) > 0 && (closed != nil || e.isRemoved())
}

// openSome opens volumes at the same time and gives what failed, in their order.
func (s *Service) openSome(ctx context.Context, entries []*entry) []error {
	failures := make([]error, len(entries))
	slots := make(chan struct{}, openLimit)
	var group sync.WaitGroup
	for i, e := range entries {
		group.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			failures[i] = s.openEntry(ctx, e)
		})
	}
	group.Wait()
	return failures
}

// waitsFor tells whether a volume that could not be opened is kept and tried again: its
// migration was begun, and its array is away; or it was removed.
func (s *Service) waitsFor(e *entry, err error) bool {
	// Who holds the logical units is sent away by break-fence, which needs this service.
	if errors.Is(err, errRemoved) || isUnknown(err) || errors.Is(err, lun.ErrConflict) {
		return true
	}
	_, known, failure := s.store.Record(e.name)
	return failure == nil && known && errors.Is(err, lun.ErrUnavailable)
}

// settingsOf are the settings of a volume that may change while it is served.
func settingsOf(v conf.Volume) proxy.Settings {
	return proxy.Settings{
		CopyDepth: v.Copy.Depth, CopyRate: uint64(v.Copy.Rate), Readback: v.Verify == conf.VerifyReadback,
		VerifySample: uint64(v.VerifySample), Overwrite: v.Overwrite, Seeded: v.Seeded, Mirror: v.Mirror,
		Initiators: initiators(v), PortalGroups: v.PortalGroups, Identity: proxy.Identity(v.Identity), LogoutTimeout: v.LogoutTimeout,
	}
}

// tell tells systemd how the service stands.
func (s *Service) tell(state string) {
	if err := notify(state); err != nil {
		s.log.WithError(err).Warn("systemd was not told")
	}
}

// monotonic is the time of CLOCK_MONOTONIC in microseconds, as sd_notify(3) wants it.
func monotonic() string {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return "0"
	}
	return fmt.Sprint(now.Nano() / 1000)
}
