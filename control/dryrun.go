package control

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"lunshift/proxy"
	"lunshift/state"
)

// DryRun is what an administrator looks at before a cutover, which is the decision that there is no
// way back.
type DryRun struct {
	// Name is that of the volume or of the group.
	Name string `json:"name"`
	// Ready tells whether the cutover would begin now, Done whether it is done already.
	Ready bool `json:"ready"`
	Done  bool `json:"done"`
	// Reason says in one line why it would not.
	Reason  string         `json:"reason,omitempty"`
	Volumes []DryRunVolume `json:"volumes"`
	// Parties are all who were asked.
	Parties []proxy.Answer `json:"parties"`
}

// DryRunVolume is one of its volumes.
type DryRunVolume struct {
	proxy.Status
	// Hooks are those that would run, in their order. None of them has.
	Hooks []hookOptions `json:"hooks"`
	// LogoutTimeout is how long initiators may take to log out, in milliseconds.
	LogoutTimeout int64 `json:"logout_timeout_ms"`
	// RedirectTo is where logins are sent afterwards; empty where they are refused.
	RedirectTo string `json:"redirect_to,omitempty"`
	// Staying are volumes on the same target that would not be cut over with it. While there are
	// some, its sessions are not asked to log out, and logins are let in.
	Staying []string `json:"staying"`
}

// dryRun asks everybody about a cutover and does nothing. more are answers that there are already.
func (s *Service) dryRun(ctx context.Context, name string, o proxy.CutoverOptions, entries []*entry, missing []string, more ...proxy.Answer) DryRun {
	answers, moving := s.agreement(ctx, proxy.CutoverStep(o), entries, missing...)
	r := DryRun{Name: name, Volumes: []DryRunVolume{}, Parties: append(more, answers...)}
	err := proxy.Disagreement(r.Parties)
	r.Ready, r.Reason = err == nil, oneLine(err)
	r.Done = r.Ready && len(moving) == 0
	for _, e := range entries {
		v := DryRunVolume{Status: e.status(), Hooks: []hookOptions{}}
		settings := e.settings()
		if slices.Contains(moving, e) {
			c := changes["cutover"]
			for _, hook := range c.hooks() {
				if command := hookOf(settings.Hooks, hook); len(command) > 0 {
					v.Hooks = append(v.Hooks, hookOptions{hook, command})
				}
			}
		}
		v.LogoutTimeout = settings.LogoutTimeout.Milliseconds()
		v.RedirectTo, v.Staying = settings.Redirect.Address, s.staying(settings.IQN, entries)
		r.Volumes = append(r.Volumes, v)
	}
	return r
}

// staying are the volumes on a target that go on being served there once the entries are cut over.
func (s *Service) staying(iqn string, entries []*entry) []string {
	names := []string{}
	for _, e := range s.list() {
		if e.settings().IQN == iqn && !slices.Contains(entries, e) && !e.isGone() && e.status().Phase != proxy.Cutover {
			names = append(names, e.name)
		}
	}
	return names
}

func (s *Service) answerDryRun(r *http.Request) (any, error) {
	if status, gone := s.gone(r.PathValue("name")); gone {
		v := DryRunVolume{Status: status, Hooks: []hookOptions{}, Staying: []string{}}
		return DryRun{Name: status.Name, Ready: true, Done: true, Volumes: []DryRunVolume{v}, Parties: []proxy.Answer{}}, nil
	}
	e, err := s.entry(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	var o proxy.CutoverOptions
	if err := decode(r, "cutover", &o); err != nil {
		return nil, err
	}
	var more []proxy.Answer
	if err := s.alone(r, e, "cutover", proxy.Cutover); err != nil {
		a := proxy.NewAnswer("volume "+e.name, "cutover", err)
		a.Err = err // it names the volume
		more = append(more, a)
	}
	return s.dryRun(s.running, e.name, o, []*entry{e}, nil, more...), nil
}

func (s *Service) answerGroupDryRun(r *http.Request) (any, error) {
	g, members, err := s.group(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	var o proxy.CutoverOptions
	if err := decode(r, "cutover", &o); err != nil {
		return nil, err
	}
	return s.dryRun(s.running, g.Name, o, notRemoved(members), missing(g, members)), nil
}

// CutoverDryRun says whether a cutover of a volume would begin, and what to look at before it
// does. It changes nothing.
func (c *Client) CutoverDryRun(ctx context.Context, volume string, o proxy.CutoverOptions) (r DryRun, err error) {
	return r, c.onVolume(ctx, http.MethodPost, volume, "/cutover/dry-run"+c.alone(), o, &r)
}

// CutoverGroupDryRun is CutoverDryRun of a group.
func (c *Client) CutoverGroupDryRun(ctx context.Context, group string, o proxy.CutoverOptions) (r DryRun, err error) {
	return r, c.replyOfGroup(ctx, http.MethodPost, group, "/cutover/dry-run", o, &r)
}

// Err is nil where the cutover would begin.
func (r DryRun) Err() error {
	if r.Ready {
		return nil
	}
	return &Error{WrongPhase, fmt.Sprintf("%s: the cutover would not begin: %s", r.Name, r.Reason)}
}

// WriteDryRun writes what there is to look at, as of now.
func WriteDryRun(w io.Writer, r DryRun, now time.Time) error {
	for _, v := range r.Volumes {
		writeDryRunVolume(w, v, now)
	}
	outcome := "the cutover would begin"
	switch {
	case r.Done:
		outcome = "the cutover is done"
	case !r.Ready:
		outcome = "the cutover would not begin"
	}
	_, err := fmt.Fprintf(w, "%s: %s\n", r.Name, outcome)
	for _, a := range r.Parties {
		if !a.Ready {
			_, err = fmt.Fprintf(w, "  %s: %s\n", a.Party, strings.TrimPrefix(a.Reason, a.Party+": "))
		}
	}
	return err
}

func writeDryRunVolume(w io.Writer, v DryRunVolume, now time.Time) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, name+"\t"+format+"\n", args...) }
	row(v.Name, "")
	row("phase", "%s", phase(v.Status))
	row("remaining", "%s, %d blocks", humanize.IBytes(v.Remaining), v.Remaining/uint64(max(v.BlockSize, 1)))
	row("unreadable", "%s", unreadable(v.Status))
	for i, line := range verifiedAgo(v.Verify, now) {
		row([]string{"verify", ""}[min(i, 1)], "%s", line)
	}
	mirrored := "off"
	switch {
	case v.Mirror != nil:
		mirrored = mirror(v.Mirror)
	case v.Phase != proxy.Migrating && v.Phase != proxy.Synced:
	case v.MirrorUsed:
		mirrored = "off, and was on: the source has some of what was written since the start, and is of no one instant"
	default:
		mirrored = "off: the source is as it was at the start"
	}
	row("mirror", "%s", mirrored)
	if v.Degraded {
		row("degraded", "%s", v.DegradedReason)
	}
	after := "logins are refused afterwards"
	if v.RedirectTo != "" {
		after = "logins are sent to " + v.RedirectTo + " afterwards"
	}
	asked := fmt.Sprintf("asked to log out within %s; %s", time.Duration(v.LogoutTimeout)*time.Millisecond, after)
	if len(v.Staying) > 0 {
		asked = fmt.Sprintf("not asked to log out, nor sent elsewhere, while %s stays on this target", strings.Join(v.Staying, ", "))
	}
	row("sessions", "%d, %s", len(v.Sessions), asked)
	for _, s := range v.Sessions {
		row("", "%s from %s since %s%s", s.Initiator, s.Address, s.Since.Local().Format(time.DateTime), sessionNote(s))
	}
	reserved := v.Reservation.String()
	if reserved == "" {
		reserved = "none"
	} else {
		reserved += "; it is not taken along to the destination"
	}
	row("reservation", "%s", reserved)
	for i, hook := range v.Hooks {
		name := ""
		if i == 0 {
			name = "hooks"
		}
		row(name, "%s: %s", hook.Hook, printable(fmt.Sprint(hook.Command)))
	}
	if len(v.Hooks) == 0 {
		row("hooks", "none")
	}
	_ = t.Flush() // what w does not take is told by the next write
	fmt.Fprintln(w)
}

// unreadable says what would be lost.
func unreadable(v proxy.Status) string {
	text := "nothing"
	if v.Unreadable > 0 {
		text = fmt.Sprintf("%s in %d place(s) on the source (--accept-unreadable gives them up)", humanize.IBytes(v.Unreadable), len(v.UnreadableRuns))
	}
	if v.AcceptedUnreadable > 0 {
		text += fmt.Sprintf("; %s given up, reading as zeroes", humanize.IBytes(v.AcceptedUnreadable))
	}
	return text
}

// verifiedAgo are the comparisons with their age: the last of everything, and of a sample where
// that is later.
func verifiedAgo(v *proxy.VerifyStatus, now time.Time) (lines []string) {
	if v == nil || v.Last == nil && !v.Running {
		return []string{"never compared; a sample is just before the cutover, unless verify_sample is 0"}
	}
	if v.Running {
		lines = append(lines, verified(v))
	}
	if v.Last == nil {
		return lines
	}
	shown := []*state.Verified{v.Last}
	if v.Last.Sample && v.LastAll != nil {
		shown = []*state.Verified{v.LastAll, v.Last}
	} else if v.Last.Sample {
		lines = append(lines, "never everything")
	}
	for _, c := range shown {
		lines = append(lines, fmt.Sprintf("%s, %s ago", comparison(c), duration(now.Sub(c.At))))
	}
	return lines
}
