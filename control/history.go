package control

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"lunshift/state"
)

// mostShown bounds the events of all volumes together that are shown, the newest ones.
const mostShown = 20000

// events is the audit trail of a volume that is or was, or of those of a group.
func (s *Service) events(name string) ([]state.Event, error) {
	names := []string{name}
	known := slices.ContainsFunc(s.list(), func(e *entry) bool { return e.name == name })
	if g := s.config().Group(name); g != nil && !known {
		names, known = g.Volumes, true
	}
	events := []state.Event{}
	for _, name := range names {
		of, err := s.store.History(name)
		if err != nil {
			return nil, err
		}
		events = append(events, of...)
	}
	if len(events) == 0 && !known {
		return nil, s.unknown(name)
	}
	if len(names) > 1 {
		slices.SortStableFunc(events, func(a, b state.Event) int { return a.At.Compare(b.At) })
	}
	return s.shownEvents(events), nil
}

// shownEvents says of what was begun before this service that its end is not known.
func (s *Service) shownEvents(events []state.Event) []state.Event {
	for i := range events {
		if e := &events[i]; e.Result == resultBegun && e.At.Before(s.since) {
			e.Result, e.Text = resultUnknown, "the service ended before it was over, or could not write down how it ended"
		}
	}
	return events
}

func (s *Service) answerHistory(r *http.Request) (any, error) {
	return s.events(r.PathValue("name"))
}

func (s *Service) answerHistories(r *http.Request) (any, error) {
	events, err := s.store.Histories()
	return s.shownEvents(events[max(0, len(events)-mostShown):]), err
}

// History is the audit trail of a volume, also of one that was removed, or of the volumes of a
// group; with an empty name that of all, and of the service. The oldest event comes first.
func (c *Client) History(ctx context.Context, volume string) ([]state.Event, error) {
	var events []state.Event
	if volume == "" {
		return events, c.call(ctx, http.MethodGet, "/v1/history", nil, &events)
	}
	return events, c.onVolume(ctx, http.MethodGet, volume, "/history", nil, &events)
}

// WriteHistory writes events as a table.
func WriteHistory(w io.Writer, events []state.Event) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	several := slices.ContainsFunc(events, func(e state.Event) bool { return e.Volume != events[0].Volume })
	title := ""
	if several {
		title = "VOLUME\t"
	}
	fmt.Fprintf(t, "TIME\t%sWHO\tWHAT\tRESULT\n", title)
	for _, e := range events {
		volume := ""
		if several {
			volume = e.Volume + "\t"
			if e.Volume == "" {
				volume = "-\t"
			}
		}
		fmt.Fprintf(t, "%s\t%s%s\t%s\t%s\n", e.At.Local().Format(time.DateTime), volume, who(e.Who), what(e), result(e))
	}
	return t.Flush()
}

// who says who asked for something.
func who(w state.Who) string {
	name := func(user string, id uint32) string {
		if user == "" {
			return fmt.Sprintf("uid %d", id)
		}
		return user
	}
	switch {
	case w.Service:
		return "lunshift"
	case w.UID == nil:
		return "?"
	case w.LoginUID != nil && *w.LoginUID != *w.UID:
		return fmt.Sprintf("%s as %s", name(w.Login, *w.LoginUID), name(w.User, *w.UID))
	}
	return name(w.User, *w.UID)
}

// what is the step with the options that are not at rest.
func what(e state.Event) string {
	text := e.What
	var options map[string]any
	var hook hookOptions
	if e.What == "hook" && json.Unmarshal(e.Options, &hook) == nil {
		text += " " + hook.Hook
	} else if json.Unmarshal(e.Options, &options) == nil {
		for _, key := range slices.Sorted(maps.Keys(options)) {
			shown := strings.ReplaceAll(key, "_", "-")
			switch v := options[key].(type) {
			case bool:
				if v {
					text += " " + shown
				} else if e.What == "mirror" {
					text += " off"
				}
			case float64:
				if v != 0 || e.What == "throttle" {
					text += fmt.Sprintf(" %s=%.0f", shown, v)
				}
			case string:
				if v != "" {
					text += fmt.Sprintf(" %s=%s", shown, v)
				}
			}
		}
	}
	if e.Group != "" {
		text += " (group " + e.Group + ")"
	}
	return text
}

// result is how it ended, on one line.
func result(e state.Event) string {
	text := e.Result
	if text == resultNoted {
		text = ""
	}
	if e.Took != nil {
		took := time.Duration(*e.Took * float64(time.Millisecond))
		if took < time.Minute {
			text += " in " + took.Round(time.Millisecond).String()
		} else {
			text += " in " + duration(took)
		}
	}
	if e.Text != "" {
		if text != "" {
			text += ": "
		}
		text += strings.Join(strings.Fields(printable(e.Text)), " ")
	}
	return text
}
