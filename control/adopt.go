package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/sirupsen/logrus"

	"lunshift/lun"
	"lunshift/proxy"
)

// AdoptReport is the outcome of an adoption.
type AdoptReport struct {
	Name string `json:"name"`
	// Phase is that of the volume now.
	Phase proxy.Phase `json:"phase"`
	// Served tells whether initiators find it.
	Served bool `json:"served"`
	// Rebuild is null where there was nothing to rebuild.
	Rebuild *proxy.RebuildReport `json:"rebuild"`
	// Withdrawn are the writes that the destination cannot read and that were let go; null
	// where that was not asked for.
	Withdrawn []proxy.BlockRun `json:"withdrawn"`
}

// adoption is what an attempt to open a volume does about a state that does not know it.
type adoption struct {
	options proxy.AdoptOptions
	done    bool // the volume was unknown or could not be taken up, and is so no more
	report  *proxy.RebuildReport
	failure error // of the rebuild
	// withdrawn are the writes that were let go.
	withdrawn []proxy.BlockRun
}

func isUnknown(err error) bool {
	var unknown *proxy.UnknownError
	return errors.As(err, &unknown)
}

// phaseUnknown is shown of a volume that waits to be adopted: nobody can tell which side
// counts.
const phaseUnknown proxy.Phase = "unknown"

// waiting is a proxy.UnknownError with what the two units said of themselves.
type waiting struct {
	error
	source, destination lun.Info
}

func (w *waiting) Unwrap() error { return w.error }

// errUndecided is why a volume is not served after a rebuild that left something open.
var errUndecided = errors.New("the rebuild left something to be decided")

// isUnknown tells whether the volume waits to be adopted.
func (e *entry) isUnknown() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return isUnknown(e.failure)
}

// adopt refuses a volume that the state does not know though its destination holds data,
// unless it is told what it is.
func (s *Service) adopt(ctx context.Context, cfg proxy.Config, e *entry, a ...*adoption) error {
	unknown := proxy.Unknown(ctx, s.store, s.config().Service.State, cfg.Name, cfg.DestinationAddress, cfg.Destination)
	if isUnknown(unknown) {
		unknown = &waiting{unknown, cfg.Source.Info(), cfg.Destination.Info()}
	}
	if len(a) == 0 || unknown != nil && !isUnknown(unknown) {
		return unknown
	}
	if _, found, err := s.store.Record(cfg.Name); err != nil || found {
		return err
	}
	if o := a[0].options; o.Rebuild {
		s.log.Infof("volume %s: its flags are made anew; it is not served until then", cfg.Name)
		report, err := proxy.Rebuild(ctx, cfg, o, func(done, all uint64) {
			text := fmt.Sprintf("not served: its flags are made anew: %.1f%% compared", 100*float64(done)/float64(max(all, 1)))
			s.log.Infof("volume %s: %s", cfg.Name, text)
			e.mu.Lock()
			e.known.DegradedReason = text
			e.mu.Unlock()
		})
		if err != nil {
			// It stays as unknown as it was.
			a[0].failure = err
			return errors.Join(err, unknown)
		}
		a[0].report = &report
		s.log.WithFields(logrus.Fields{
			"blocks": report.Blocks, "equal": report.Equal, "unreadable": report.Unreadable,
			"different": report.Different, "different_from": report.DifferentFrom, "zeroes": report.Zeroes, "zeroes_from": report.ZeroesFrom,
		}).Infof("volume %s: rebuild ended after %s", cfg.Name, report.EndedAt.Sub(report.StartedAt).Round(time.Millisecond))
		if report.Undecided != "" {
			return errors.Join(errUndecided, unknown)
		}
	} else {
		s.log.Warnf("volume %s: taken for new, as told: the source is served", cfg.Name)
	}
	a[0].done = true
	return nil
}

// answerAdopt answers when the volume is served, or is not going to be; a rebuild ends
// with the one who asked.
func (s *Service) answerAdopt(r *http.Request) (any, error) {
	var o proxy.AdoptOptions
	if err := decode(r, "adopt", &o); err != nil {
		return nil, err
	}
	if err := o.Check(); err != nil {
		return nil, Usagef("adopt: %v", err)
	}
	e, err := s.entry(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	if record, found, err := s.store.Record(e.name); err != nil {
		return nil, err
	} else if found != o.AcceptUnreadableWrites {
		if !found {
			return nil, &Error{Failed, fmt.Sprintf("volume %s: the state does not know it: no write of it was under way", e.name)}
		}
		return nil, &proxy.PhaseError{Volume: e.name, Step: "adopt", Phase: proxy.Phase(record.Phase), Hint: "the state knows the volume: there is nothing to adopt"}
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.running, cancel)()
	a := &adoption{options: o}
	if o.AcceptUnreadableWrites {
		a.withdrawn = []proxy.BlockRun{}
	}
	s.logStep(r)
	var report AdoptReport
	err = s.step(s.running, asker(r), step{name: "adopt", options: o, do: func(context.Context) (string, error) {
		err := s.openEntry(ctx, e, a)
		_, closed := e.open()
		report = AdoptReport{Name: e.name, Phase: e.status().Phase, Served: closed == nil, Rebuild: a.report, Withdrawn: a.withdrawn}
		switch {
		case errors.Is(err, errUndecided):
			return oneLine(errUndecided), nil
		case a.failure != nil:
			return "", a.failure
		case err == nil && !a.done:
			return "", &Error{Failed, fmt.Sprintf("volume %s: it was opened meanwhile: see lunshift status %s", e.name, e.name)}
		}
		return "", err
	}}, e)
	return report, err
}

// Adopt says what a volume is that the state does not know; it goes on as long as ctx.
func (c *Client) Adopt(ctx context.Context, volume string, o proxy.AdoptOptions) (AdoptReport, error) {
	var report AdoptReport
	return report, c.onVolume(ctx, http.MethodPost, volume, "/adopt", o, &report)
}

// WriteAdopt shows the outcome of an adoption.
func WriteAdopt(w io.Writer, r AdoptReport) error {
	x := r.Rebuild
	if r.Withdrawn != nil {
		_, err := fmt.Fprintf(w, "%s: served again, phase %s; %d write(s) that the destination cannot read were let go, and may have been acknowledged\n", r.Name, r.Phase, len(r.Withdrawn))
		for _, e := range r.Withdrawn {
			fmt.Fprintf(w, "  LBA %d, %d blocks\n", e.LBA, e.Blocks)
		}
		return err
	}
	if x == nil {
		_, err := fmt.Fprintf(w, "%s: taken for new, phase %s\n", r.Name, r.Phase)
		return err
	}
	if x.WasSynced {
		_, err := fmt.Fprintf(w, "%s: everything is on the destination, as told; phase %s\n", r.Name, r.Phase)
		return err
	}
	size := func(blocks uint64) string { return humanize.IBytes(blocks * uint64(x.BlockSize)) }
	from := func(s proxy.Side) string {
		if s == "" {
			return "not decided"
		}
		return "the " + string(s) + " counts"
	}
	_, err := fmt.Fprintf(w, "%s: compared in %s: %s equal, %s different (%s), %s zero on the destination alone (%s), %s of these unreadable on the source\n",
		r.Name, x.EndedAt.Sub(x.StartedAt).Round(time.Millisecond), size(x.Equal), size(x.Different), from(x.DifferentFrom), size(x.Zeroes), from(x.ZeroesFrom), size(x.Unreadable))
	for _, list := range []struct {
		what string
		runs []proxy.BlockRun
	}{{"different", x.DifferentExtents}, {"zero on the destination", x.ZeroesExtents}} {
		for _, e := range list.runs {
			fmt.Fprintf(w, "  %s: LBA %d, %d blocks\n", list.what, e.LBA, e.Blocks)
		}
	}
	if x.More {
		fmt.Fprintln(w, "  and others")
	}
	return err
}
