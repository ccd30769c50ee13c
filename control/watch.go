package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"lunshift/proxy"
)

// watchInterval is the time between two looks of Watch.
const watchInterval = time.Second

// View says how status is shown.
type View struct {
	// JSON writes one JSON document per look instead of text.
	JSON bool
	// Volume is the one to show in detail, or a group; empty shows a table of all.
	Volume string
	// Redraw replaces what Watch showed before, for terminals; without it Watch
	// adds a line per volume.
	Redraw bool
}

// looks say how a look follows another.
type looks int

const (
	single looks = iota
	redrawn
	appended
)

// ShowStatus writes the status once.
func ShowStatus(ctx context.Context, c *Client, w io.Writer, v View) error {
	text, _, err := v.look(ctx, c, single)
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	return err
}

// Watch writes the status every second until ctx ends or all that is watched is
// cut over or rolled back. On a terminal it draws on the screen that full-screen programs use, and
// leaves the last look behind on the ordinary one.
func Watch(ctx context.Context, c *Client, w io.Writer, v View) (err error) {
	how := appended
	if v.Redraw && !v.JSON {
		how = redrawn
	}
	var last []byte
	defer func() {
		if how == redrawn && last != nil {
			_, failure := fmt.Fprintf(w, "%s%s", leaveScreen, last)
			err = errors.Join(err, failure)
		}
	}()
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		text, over, err := v.look(ctx, c, how)
		if err != nil {
			return err
		}
		shown := text
		if how == redrawn {
			shown = redraw(text, last == nil)
			last = text
		}
		// One write for one look, so that a terminal never shows half of it.
		if _, err := w.Write(shown); err != nil || over {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// What a terminal is told (ECMA-48; 1049 is xterm's).
const (
	enterScreen = "\x1b[?1049h\x1b[2J"
	leaveScreen = "\x1b[?1049l"
	home        = "\x1b[H"
	clearLine   = "\x1b[K"
	clearBelow  = "\x1b[J"
)

// redraw is a look in the place of the one before.
func redraw(text []byte, first bool) []byte {
	var b bytes.Buffer
	if first {
		b.WriteString(enterScreen)
	}
	b.WriteString(home)
	b.Write(bytes.ReplaceAll(text, []byte("\n"), []byte(clearLine+"\n")))
	b.WriteString(time.Now().Format(time.TimeOnly) + clearLine + clearBelow)
	return b.Bytes()
}

// look is the status as text, and whether all of it is cut over or rolled back.
func (v View) look(ctx context.Context, c *Client, how looks) (_ []byte, over bool, err error) {
	var shown []proxy.Status
	var group *GroupStatus
	if v.Volume == "" {
		shown, err = c.Statuses(ctx)
	} else {
		shown = make([]proxy.Status, 1)
		if shown[0], err = c.Status(ctx, v.Volume); KindOf(err) == Unknown {
			if g, e := c.Group(ctx, v.Volume); e == nil {
				group, shown, err = &g, g.Volumes, nil
			} else if KindOf(e) != Unknown {
				err = e
			}
		}
	}
	if err != nil {
		return nil, false, err
	}
	over = true
	for _, s := range shown {
		over = over && (s.Phase == proxy.Cutover || s.Phase == proxy.RolledBack)
	}
	var text bytes.Buffer
	switch {
	case v.JSON && group != nil:
		err = json.NewEncoder(&text).Encode(group)
	case v.JSON && v.Volume != "":
		err = json.NewEncoder(&text).Encode(shown[0])
	case v.JSON:
		err = json.NewEncoder(&text).Encode(shown)
	case how == appended:
		for _, s := range shown {
			err = errors.Join(err, WriteLine(&text, s))
		}
	case group != nil:
		err = WriteGroup(&text, *group)
	case v.Volume != "":
		err = WriteDetail(&text, shown[0])
	default:
		err = WriteTable(&text, shown)
	}
	return text.Bytes(), over, err
}

// IsTerminal tells whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
