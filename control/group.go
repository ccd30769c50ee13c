package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"lunshift/conf"
	"lunshift/proxy"
)

// GroupStatus is a group of volumes at one instant.
type GroupStatus struct {
	Name string `json:"name"`
	// HoldLimit is how long a step may hold commands of initiators, in milliseconds.
	HoldLimit float64 `json:"hold_limit_ms"`
	// Hold is how long the last cutover or rollback held them, in milliseconds; null before.
	Hold *float64 `json:"hold_ms"`
	// Volumes are in the order of the group. One that the service could not take up is missing.
	Volumes []proxy.Status `json:"volumes"`
}

// group is the group of that name, and its volumes. A volume of that name wins.
func (s *Service) group(name string) (conf.Group, []*entry, error) {
	cfg, entries := s.config(), s.list()
	g := cfg.Group(name)
	if g == nil || slices.ContainsFunc(entries, func(e *entry) bool { return e.name == name }) {
		return conf.Group{}, nil, &Error{Unknown, fmt.Sprintf("there is no group %q", name)}
	}
	var members []*entry
	for _, volume := range g.Volumes {
		if i := slices.IndexFunc(entries, func(e *entry) bool { return e.name == volume }); i >= 0 {
			members = append(members, entries[i])
		}
	}
	return *g, members, nil
}

func groupStatus(g conf.Group, members []*entry) GroupStatus {
	status := GroupStatus{Name: g.Name, HoldLimit: float64(g.HoldLimit.Milliseconds()), Volumes: []proxy.Status{}}
	for _, e := range members {
		v := e.status()
		status.Volumes = append(status.Volumes, v)
		if v.Hold != nil && (status.Hold == nil || *v.Hold > *status.Hold) {
			status.Hold = v.Hold
		}
	}
	return status
}

// missing are the volumes of a group that are not among its members.
func missing(g conf.Group, members []*entry) []string {
	return slices.DeleteFunc(slices.Clone(g.Volumes), func(name string) bool {
		return slices.ContainsFunc(members, func(e *entry) bool { return e.name == name })
	})
}

// notRemoved are those of a group that are not cut over and removed: a cutover of the others ends
// that of the group.
func notRemoved(members []*entry) []*entry {
	return slices.DeleteFunc(slices.Clone(members), (*entry).isGone)
}

// openAll gives the volumes of some entries, or says of each that is not served why.
func openAll(members []*entry) ([]Volume, error) {
	var volumes []Volume
	var errs []error
	for _, e := range members {
		v, err := e.open()
		if e.isRemoved() {
			err = errors.New("the service does not have it")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %s: %w", e.name, err))
			continue
		}
		volumes = append(volumes, v)
	}
	return volumes, errors.Join(errs...)
}

// openGroup is openAll of a group that has all of its volumes.
func openGroup(g conf.Group, members []*entry) ([]Volume, error) {
	volumes, err := openAll(members)
	for _, name := range missing(g, members) {
		err = errors.Join(err, fmt.Errorf("volume %s: the service does not have it", name))
	}
	return volumes, err
}

// answerGroup does a step with a group and answers with its status.
func (s *Service) answerGroup(do func(*http.Request, conf.Group, []*entry) error) http.HandlerFunc {
	return s.answer(func(r *http.Request) (any, error) {
		g, members, err := s.group(r.PathValue("name"))
		if err != nil {
			return nil, err
		}
		if err := do(r, g, members); err != nil {
			return nil, err
		}
		if r.Method != http.MethodGet {
			s.logStep(r)
		}
		return groupStatus(g, members), nil
	})
}

// groupError is what went wrong with some volumes of a group, on one line.
func groupError(group, step, outcome string, err error) error {
	return &groupFailure{Error{KindOf(err), fmt.Sprintf("group %s: %s %s: %s", group, step, outcome, oneLine(err))}, err}
}

type groupFailure struct {
	told  Error
	cause error
}

func (f *groupFailure) Error() string   { return f.told.Message }
func (f *groupFailure) Unwrap() []error { return []error{&f.told, f.cause} }

// oneByOne takes a step with one volume of a group after another. Where one is not served no
// other is touched.
func (s *Service) oneByOne(r *http.Request, g conf.Group, members []*entry, name string, do func(context.Context, Volume) error) error {
	if _, err := openGroup(g, members); err != nil {
		err = groupError(g.Name, name, "not begun", err)
		return s.ask(r, step{name: name, group: g.Name, do: func(context.Context) (string, error) { return "", refusal{err} }}, members...)
	}
	return eachOf(g, members, name, func(e *entry) error {
		return s.ask(r, step{name: name, group: g.Name, do: onVolume(e, do)}, e)
	})
}

// eachOf tries a step with each volume of a group; the error says which failed.
func eachOf(g conf.Group, members []*entry, name string, do func(*entry) error) error {
	var errs []error
	var done []string
	for _, e := range members {
		if err := do(e); err != nil {
			errs = append(errs, err)
		} else {
			done = append(done, e.name)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	outcome := "was done of none"
	if len(done) > 0 {
		outcome = "was done of " + strings.Join(done, ", ") + " alone"
	}
	return groupError(g.Name, name, outcome, errors.Join(errs...))
}

// startGroup starts one volume after another: from when on which of them is copied is nobody's
// concern. That all of them can be started is asked before the first is.
func (s *Service) startGroup(r *http.Request, g conf.Group, members []*entry) error {
	var o proxy.StartOptions
	if err := decode(r, "start", &o); err != nil {
		return err
	}
	return s.ask(r, step{name: "start", options: o, group: g.Name, missing: missing(g, members), question: proxy.StartStep(o), do: func(ctx context.Context) (string, error) {
		return "", eachOf(g, members, "start", func(e *entry) error {
			_, err := onVolume(e, func(ctx context.Context, v Volume) error { return v.Start(ctx, o) })(ctx)
			return err
		})
	}}, members...)
}

func (s *Service) pauseGroup(r *http.Request, g conf.Group, members []*entry) error {
	return s.oneByOne(r, g, members, "pause", func(ctx context.Context, v Volume) error { return v.Pause(ctx) })
}

func (s *Service) resumeGroup(r *http.Request, g conf.Group, members []*entry) error {
	return s.oneByOne(r, g, members, "resume", func(ctx context.Context, v Volume) error { return v.Resume(ctx) })
}

func (s *Service) cutoverGroup(r *http.Request, g conf.Group, members []*entry) error {
	var o proxy.CutoverOptions
	if err := decode(r, "cutover", &o); err != nil {
		return err
	}
	lacks, left := missing(g, members), notRemoved(members)
	if len(lacks)+len(left) == 0 {
		return nil
	}
	return s.ask(r, step{name: "cutover", options: o, group: g.Name, missing: lacks, question: proxy.CutoverStep(o), do: func(ctx context.Context) (string, error) {
		return s.together(ctx, g, left, "cutover", proxy.CutoverStep(o), proxy.Cutover)
	}}, left...)
}

func (s *Service) rollbackGroup(r *http.Request, g conf.Group, members []*entry) error {
	var o proxy.RollbackOptions
	if err := decode(r, "rollback", &o); err != nil {
		return err
	}
	return s.ask(r, step{name: "rollback", options: o, group: g.Name, missing: missing(g, members), question: proxy.RollbackStep(o), do: func(ctx context.Context) (string, error) {
		return s.together(ctx, g, members, "rollback", proxy.RollbackStep(o), proxy.RollingBack)
	}}, members...)
}

// together takes a step with all volumes of a group at one instant, or with none.
func (s *Service) together(ctx context.Context, g conf.Group, members []*entry, name string, step proxy.Step, to proxy.Phase) (text string, err error) {
	opened, err := openAll(members)
	var volumes []*proxy.Volume
	for _, v := range opened {
		volume, ok := v.(*proxy.Volume)
		if !ok {
			err = errors.Join(err, fmt.Errorf("volume %s: it cannot be stepped with others", v.Name()))
		}
		volumes = append(volumes, volume)
	}
	if err != nil {
		return "", groupError(g.Name, name, "not begun", err)
	}
	there := func() (n int) {
		for _, v := range volumes {
			if over, _ := proxy.Reached(v.Phase(), to); over {
				n++
			}
		}
		return n
	}
	before := there()
	if err := proxy.Do(ctx, step, proxy.Together{HoldLimit: g.HoldLimit}, volumes...); err != nil {
		outcome := "not done"
		if there() > before {
			outcome = "done, but not what follows on it"
		}
		return "", groupError(g.Name, name, outcome, err)
	}
	return "", nil
}

// alone refuses a step that takes one volume of a group apart from the others, unless it is
// told to, or done already.
func (s *Service) alone(r *http.Request, e *entry, step string, to proxy.Phase) error {
	g := s.config().GroupOf(e.name)
	if g == nil || len(g.Volumes) == 1 || r.URL.Query().Get("alone") == "true" {
		return nil
	}
	if done, _ := proxy.Reached(e.status().Phase, to); done {
		return nil
	}
	return Usagef("volume %s: it is in group %s, whose volumes are taken at one instant: lunshift %s %s, or --alone for this one without the others (%s)",
		e.name, g.Name, step, g.Name, strings.Join(g.Volumes, ", "))
}

// groupRoutes adds what groups answer to.
func (s *Service) groupRoutes(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/groups/{name}", s.answerGroup(func(*http.Request, conf.Group, []*entry) error { return nil }))
	for name, step := range map[string]func(*http.Request, conf.Group, []*entry) error{
		"start": s.startGroup, "pause": s.pauseGroup, "resume": s.resumeGroup, "cutover": s.cutoverGroup, "rollback": s.rollbackGroup,
	} {
		mux.HandleFunc("POST /v1/groups/{name}/"+name, s.answerGroup(step))
	}
	mux.HandleFunc("POST /v1/groups/{name}/cutover/dry-run", s.answer(s.answerGroupDryRun))
}

// Group is a group of volumes; an *Error of kind Unknown says that there is none of that name.
func (c *Client) Group(ctx context.Context, name string) (GroupStatus, error) {
	return c.onGroup(ctx, http.MethodGet, name, "", nil)
}

// StartGroup begins the migrations of a group's volumes, one after another.
func (c *Client) StartGroup(ctx context.Context, group string, o proxy.StartOptions) (GroupStatus, error) {
	return c.onGroup(ctx, http.MethodPost, group, "/start", o)
}

// PauseGroup stops the background copies of a group.
func (c *Client) PauseGroup(ctx context.Context, group string) (GroupStatus, error) {
	return c.onGroup(ctx, http.MethodPost, group, "/pause", nil)
}

// ResumeGroup undoes PauseGroup.
func (c *Client) ResumeGroup(ctx context.Context, group string) (GroupStatus, error) {
	return c.onGroup(ctx, http.MethodPost, group, "/resume", nil)
}

// CutoverGroup ends the migrations of a group at one instant, or none.
func (c *Client) CutoverGroup(ctx context.Context, group string, o proxy.CutoverOptions) (GroupStatus, error) {
	return c.onGroup(ctx, http.MethodPost, group, "/cutover", o)
}

// RollbackGroup has the sources of a group take the writes again at one instant, or none.
func (c *Client) RollbackGroup(ctx context.Context, group string, o proxy.RollbackOptions) (GroupStatus, error) {
	return c.onGroup(ctx, http.MethodPost, group, "/rollback", o)
}

// WaitGroup returns when each volume of a group is in phase p or past it. A timeout of 0 waits
// without end.
func (c *Client) WaitGroup(ctx context.Context, group string, p proxy.Phase, timeout time.Duration, served bool) (GroupStatus, error) {
	status, err := c.Group(ctx, group)
	if err != nil {
		return status, err
	}
	began := time.Now()
	for _, v := range status.Volumes {
		left := timeout
		if timeout > 0 {
			left = max((timeout - time.Since(began)).Round(time.Millisecond), time.Millisecond)
		}
		if _, err := c.wait(ctx, v.Name, p, left, served); err != nil {
			return status, err
		}
	}
	return c.Group(ctx, group)
}

func (c *Client) onGroup(ctx context.Context, method, group, step string, body any) (status GroupStatus, err error) {
	return status, c.replyOfGroup(ctx, method, group, step, body, &status)
}

func (c *Client) replyOfGroup(ctx context.Context, method, group, step string, body, reply any) error {
	if group == "" || group == "." || group == ".." {
		return &Error{Unknown, fmt.Sprintf("there is no group %q", group)}
	}
	return c.call(ctx, method, "/v1/groups/"+url.PathEscape(group)+step, body, reply)
}

// WriteGroup writes a group as a table, with a line on the group itself.
func WriteGroup(w io.Writer, g GroupStatus) error {
	if err := WriteTable(w, g.Volumes); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, groupLine(g))
	return err
}

// WriteGroupLines writes a group as a short line for each volume and one on the group.
func WriteGroupLines(w io.Writer, g GroupStatus) error {
	var errs []error
	for _, v := range g.Volumes {
		errs = append(errs, WriteLine(w, v))
	}
	_, err := fmt.Fprintln(w, groupLine(g))
	return errors.Join(append(errs, err)...)
}

func groupLine(g GroupStatus) string {
	text := fmt.Sprintf("group %s: %d volume(s), initiators are held for %s at most", g.Name, len(g.Volumes), time.Duration(g.HoldLimit)*time.Millisecond)
	if g.Hold != nil {
		text += fmt.Sprintf(", and were for %.1f ms at the last step", *g.Hold)
	}
	return text
}
