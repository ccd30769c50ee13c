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
	// Volume is the one to show in detail; empty shows a table of all.
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
	_, err := v.show(ctx, c, w, single)
	return err
}

// Watch writes the status every second until ctx ends or all that is watched is
// cut over.
func Watch(ctx context.Context, c *Client, w io.Writer, v View) error {
	how := appended
	if v.Redraw && !v.JSON {
		how = redrawn
		defer fmt.Fprintln(w)
	}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		over, err := v.show(ctx, c, w, how)
		if err != nil || over {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (v View) show(ctx context.Context, c *Client, w io.Writer, how looks) (over bool, err error) {
	var shown []proxy.Status
	if v.Volume == "" {
		shown, err = c.Statuses(ctx)
	} else {
		shown = make([]proxy.Status, 1)
		shown[0], err = c.Status(ctx, v.Volume)
	}
	if err != nil {
		return false, err
	}
	over = true
	for _, s := range shown {
		over = over && s.Phase == proxy.Cutover
	}
	// One write for one look, so that a terminal never shows half of it.
	var text bytes.Buffer
	switch {
	case v.JSON && v.Volume != "":
		err = json.NewEncoder(&text).Encode(shown[0])
	case v.JSON:
		err = json.NewEncoder(&text).Encode(shown)
	case how == appended:
		for _, s := range shown {
			err = errors.Join(err, WriteLine(&text, s))
		}
	case v.Volume != "":
		err = WriteDetail(&text, shown[0])
	default:
		err = WriteTable(&text, shown)
	}
	if err != nil {
		return over, err
	}
	if how == redrawn {
		const home, clearLine, clearBelow = "\x1b[H", "\x1b[K", "\x1b[J"
		drawn := bytes.ReplaceAll(text.Bytes(), []byte("\n"), []byte(clearLine+"\n"))
		_, err = fmt.Fprintf(w, "%s%s%s%s", home, drawn, time.Now().Format(time.TimeOnly)+clearLine, clearBelow)
		return over, err
	}
	_, err = w.Write(text.Bytes())
	return over, err
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
