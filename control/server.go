package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"lunshift/proxy"
)

// maxBody bounds what a request may carry, in bytes.
const maxBody = 64 << 10

// handler is the interface on the control socket. A step of the lifecycle, once
// asked for, is done even when the one who asked is gone: it runs under the service's
// context, waits alone run under the request's.
func (s *Service) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/service", s.answer(func(r *http.Request) (any, error) {
		return s.Info(), nil
	}))
	mux.HandleFunc("POST /v1/reload", s.answer(func(r *http.Request) (any, error) {
		return s.Reload(s.running, asker(r))
	}))
	mux.HandleFunc("GET /v1/volumes", s.answer(func(r *http.Request) (any, error) {
		return s.Statuses(), nil
	}))
	mux.HandleFunc("GET /v1/records", s.answer(func(r *http.Request) (any, error) {
		return s.store.Records()
	}))
	mux.HandleFunc("GET /v1/volumes/{name}", s.answerVolume(func(r *http.Request, e *entry) error { return nil }))
	mux.HandleFunc("POST /v1/volumes/{name}/pause", s.answerVolume(s.pause))
	mux.HandleFunc("POST /v1/volumes/{name}/resume", s.answerVolume(s.resume))
	mux.HandleFunc("POST /v1/volumes/{name}/start", s.answerVolume(s.start))
	mux.HandleFunc("POST /v1/volumes/{name}/break-fence", s.answer(s.answerBreakFence))
	mux.HandleFunc("POST /v1/volumes/{name}/adopt", s.answer(s.answerAdopt))
	mux.HandleFunc("POST /v1/volumes/{name}/cutover", s.unlessGone(s.answerVolume(s.cutover)))
	mux.HandleFunc("POST /v1/volumes/{name}/rollback", s.answerVolume(s.rollback))
	mux.HandleFunc("POST /v1/volumes/{name}/mirror", s.answerVolume(s.mirror))
	mux.HandleFunc("POST /v1/volumes/{name}/verify", s.answer(s.verify))
	mux.HandleFunc("POST /v1/volumes/{name}/throttle", s.answerVolume(s.throttle))
	mux.HandleFunc("GET /v1/volumes/{name}/wait", s.unlessGone(s.answerVolume(s.wait)))
	mux.HandleFunc("GET /v1/volumes/{name}/check", s.answer(s.check))
	mux.HandleFunc("DELETE /v1/volumes/{name}", s.answer(s.answerRemove))
	mux.HandleFunc("POST /v1/volumes/{name}/cutover/dry-run", s.answer(s.answerDryRun))
	mux.HandleFunc("GET /v1/volumes/{name}/history", s.answer(s.answerHistory))
	mux.HandleFunc("GET /v1/volumes/{name}/report", s.answer(s.answerReport))
	mux.HandleFunc("GET /v1/history", s.answer(s.answerHistories))
	s.groupRoutes(mux)
	return mux
}

// onVolume is what a step does with a volume that is served.
func onVolume(e *entry, do func(context.Context, Volume) error) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		v, err := e.open()
		if err != nil {
			return "", err
		}
		return "", do(ctx, v)
	}
}

func (s *Service) start(r *http.Request, e *entry) error {
	var o proxy.StartOptions
	if err := decode(r, "start", &o); err != nil {
		return err
	}
	return s.ask(r, startStep(e, o), e)
}

func startStep(e *entry, o proxy.StartOptions) step {
	return step{name: "start", options: o, question: proxy.StartStep(o), do: onVolume(e, func(ctx context.Context, v Volume) error { return v.Start(ctx, o) })}
}

func (s *Service) pause(r *http.Request, e *entry) error {
	return s.ask(r, step{name: "pause", do: onVolume(e, func(ctx context.Context, v Volume) error { return v.Pause(ctx) })}, e)
}

func (s *Service) resume(r *http.Request, e *entry) error {
	return s.ask(r, step{name: "resume", do: onVolume(e, func(ctx context.Context, v Volume) error { return v.Resume(ctx) })}, e)
}

func (s *Service) throttle(r *http.Request, e *entry) error {
	var body throttleRequest
	if err := decode(r, "throttle", &body); err != nil {
		return err
	}
	return s.ask(r, step{name: "throttle", options: body, do: onVolume(e, func(ctx context.Context, v Volume) error { return v.Throttle(ctx, body.Rate) })}, e)
}

func (s *Service) cutover(r *http.Request, e *entry) error {
	var o proxy.CutoverOptions
	if err := decode(r, "cutover", &o); err != nil {
		return err
	}
	return s.ask(r, step{name: "cutover", options: o, question: proxy.CutoverStep(o),
		refuse: func() error { return s.alone(r, e, "cutover", proxy.Cutover) },
		do:     onVolume(e, func(ctx context.Context, v Volume) error { return v.Cutover(ctx, o) }),
	}, e)
}

// answerRemove removes a volume. One that is known to nobody leaves nothing in the audit trail.
func (s *Service) answerRemove(r *http.Request) (report any, err error) {
	name := r.PathValue("name")
	_, known, err := s.store.Record(name)
	for _, e := range s.list() {
		known = known || e.name == name
	}
	if err != nil {
		return nil, err
	}
	if !known {
		return RemoveReport{Name: name}, s.neverKnown(name)
	}
	a, err := s.asks(s.running, asker(r), "", "remove", nil, name)
	if err != nil {
		return nil, err
	}
	removed, err := s.Remove(s.running, name)
	text := "there was nothing left to forget"
	if removed.Removed {
		text = "its state is forgotten"
		s.logStep(r)
	}
	a.ends(text, err)
	return removed, err
}

// verify answers when the comparison has ended; it ends with the one who asked.
func (s *Service) verify(r *http.Request) (any, error) {
	var o proxy.VerifyOptions
	if err := decode(r, "verify", &o); err != nil {
		return nil, err
	}
	e, err := s.entry(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.running, cancel)()
	var report proxy.VerifyReport
	err = s.step(s.running, asker(r), step{name: "verify", options: o, do: func(context.Context) (string, error) {
		v, err := e.open()
		if err != nil {
			return "", err
		}
		if report, err = v.Verify(ctx, o); err != nil {
			return "", err
		}
		return verifyText(report), nil
	}}, e)
	return report, err
}

// decode reads the body of a request; none at all leaves the defaults.
func decode(r *http.Request, step string, to any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil && err != io.EOF {
		return Usagef("%s: the request is not understood: %v", step, err)
	}
	return nil
}

// wait answers once the volume is in a phase or past it, or the time is over.
func (s *Service) wait(r *http.Request, e *entry) error {
	phase, err := ParsePhase(r.URL.Query().Get("phase"))
	if err != nil {
		return err
	}
	ctx := r.Context()
	if text := r.URL.Query().Get("timeout"); text != "" {
		timeout, err := time.ParseDuration(text)
		if err != nil || timeout < 0 {
			return Usagef("%q is no time to wait", text)
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	err = e.wait(ctx, phase, r.URL.Query().Get("served") == "true")
	switch {
	case err == nil:
		return nil
	case s.running.Err() != nil:
		return &Error{Failed, fmt.Sprintf("volume %s: the service stops; the wait for phase %s is over", e.name, phase)}
	case errors.Is(err, context.DeadlineExceeded):
		text := fmt.Sprintf("volume %s: still %s after %s, not %s", e.name, e.status().Phase, r.URL.Query().Get("timeout"), phase)
		if _, closed := e.open(); closed != nil {
			text += ": " + oneLine(closed)
		}
		return &Error{Timeout, text}
	}
	return err
}

func (s *Service) check(r *http.Request) (any, error) {
	e, err := s.entry(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	return s.checkServed(r.Context(), e), nil
}

// answerVolume does a step with a volume and answers with its status.
func (s *Service) answerVolume(do func(*http.Request, *entry) error) http.HandlerFunc {
	return s.answer(func(r *http.Request) (any, error) {
		e, err := s.entry(r.PathValue("name"))
		if err != nil {
			return nil, err
		}
		before := e.status()
		if err := do(r, e); err != nil {
			return nil, err
		}
		after := e.status()
		if r.Method != http.MethodGet && (before.Phase != after.Phase || before.Paused != after.Paused || before.RateLimit != after.RateLimit || before.Mirrored != after.Mirrored) {
			s.logStep(r)
		}
		return after, nil
	})
}

// unlessGone answers for a volume that is cut over and removed, so that a script
// which repeats its last steps finds them done; do answers for the others.
func (s *Service) unlessGone(do http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		status, gone := s.gone(r.PathValue("name"))
		if !gone {
			do(w, r)
			return
		}
		s.answer(func(r *http.Request) (any, error) {
			if text := r.URL.Query().Get("phase"); text != "" {
				phase, err := ParsePhase(text)
				if err == nil {
					_, err = reached(status.Name, status.Phase, phase)
				}
				if err != nil {
					return nil, err
				}
			}
			return status, nil
		})(w, r)
	}
}

func (s *Service) logStep(r *http.Request) { s.log.Infof("control: %s %s", r.Method, r.URL.Path) }

// answer writes what do gives as JSON, or its error.
func (s *Service) answer(do func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		reply, err := do(r)
		code := http.StatusOK
		if err != nil {
			kind := KindOf(err)
			if kind == Interrupted { // the service was, not the caller
				kind = Failed
			}
			code = statusOf(kind)
			reply = errorReply{Error{kind, err.Error()}}
			if r.Method != http.MethodGet {
				s.log.WithError(err).Warnf("control: %s %s was refused", r.Method, r.URL.Path)
			}
		}
		body, err := json.Marshal(reply)
		if err != nil {
			s.log.WithError(err).Error("control: encode an answer")
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		// A client that is gone needs no answer.
		_, _ = w.Write(append(body, '\n'))
	}
}

func statusOf(kind Kind) int {
	switch kind {
	case Usage, Configuration:
		return http.StatusBadRequest
	case Unknown:
		return http.StatusNotFound
	case WrongPhase:
		return http.StatusConflict
	case Timeout:
		return http.StatusRequestTimeout
	}
	return http.StatusInternalServerError
}

var _ Volume = (*proxy.Volume)(nil)
