package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"lunshift/proxy"
	"lunshift/state"
)

// maxReply bounds an answer of the service, in bytes.
const maxReply = 64 << 20

// Client speaks with a running service. Its methods may be called concurrently;
// their errors are *Error, or ctx's.
type Client struct {
	// Alone has Cutover and Rollback take a volume of a group without the others.
	Alone bool

	socket string
	http   *http.Client
}

func (c *Client) alone() string {
	if c.Alone {
		return "?alone=true"
	}
	return ""
}

// NewClient is a client of the service on a control socket. It does not connect yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Info is what the service says of itself.
func (c *Client) Info(ctx context.Context) (ServiceInfo, error) {
	var info ServiceInfo
	return info, c.call(ctx, http.MethodGet, "/v1/service", nil, &info)
}

// Reload has the service read its configuration again.
func (c *Client) Reload(ctx context.Context) (ReloadReport, error) {
	var report ReloadReport
	return report, c.call(ctx, http.MethodPost, "/v1/reload", nil, &report)
}

// Statuses are all volumes in the order of the configuration.
func (c *Client) Statuses(ctx context.Context) ([]proxy.Status, error) {
	var all []proxy.Status
	return all, c.call(ctx, http.MethodGet, "/v1/volumes", nil, &all)
}

// Status is one volume.
func (c *Client) Status(ctx context.Context, volume string) (proxy.Status, error) {
	return c.volume(ctx, http.MethodGet, volume, "", nil)
}

// Start begins a migration.
func (c *Client) Start(ctx context.Context, volume string, o ...proxy.StartOptions) (proxy.Status, error) {
	return c.volume(ctx, http.MethodPost, volume, "/start", append(o, proxy.StartOptions{})[0])
}

// Pause stops the background copy of a volume.
func (c *Client) Pause(ctx context.Context, volume string) (proxy.Status, error) {
	return c.volume(ctx, http.MethodPost, volume, "/pause", nil)
}

// Resume undoes Pause.
func (c *Client) Resume(ctx context.Context, volume string) (proxy.Status, error) {
	return c.volume(ctx, http.MethodPost, volume, "/resume", nil)
}

// Throttle limits the background copy to rate bytes per second; 0 is no limit.
func (c *Client) Throttle(ctx context.Context, volume string, rate uint64) (proxy.Status, error) {
	return c.volume(ctx, http.MethodPost, volume, "/throttle", throttleRequest{rate})
}

// Cutover ends a migration.
func (c *Client) Cutover(ctx context.Context, volume string, o proxy.CutoverOptions) (proxy.Status, error) {
	return c.volume(ctx, http.MethodPost, volume, "/cutover"+c.alone(), o)
}

// Verify compares source and destination of a volume in phase synced; it goes on as
// long as ctx.
func (c *Client) Verify(ctx context.Context, volume string, o proxy.VerifyOptions) (proxy.VerifyReport, error) {
	var report proxy.VerifyReport
	return report, c.onVolume(ctx, http.MethodPost, volume, "/verify", o, &report)
}

// CutoverWhenSynced waits for phase synced, not longer than timeout where that is
// not 0, and then ends the migration. A volume that was not started is refused at once.
func (c *Client) CutoverWhenSynced(ctx context.Context, volume string, timeout time.Duration, o proxy.CutoverOptions) (proxy.Status, error) {
	status, err := c.Status(ctx, volume)
	if KindOf(err) == Unknown {
		return c.Cutover(ctx, volume, o) // it may be done and removed
	}
	if err != nil {
		return status, err
	}
	if status.Phase == phaseUnknown {
		return status, &proxy.PhaseError{Volume: volume, Step: "cutover", Phase: status.Phase, Hint: "adopt it first: " + status.DegradedReason}
	}
	if idle(status.Phase) {
		return status, &proxy.PhaseError{Volume: volume, Step: "cutover", Phase: status.Phase, Hint: fmt.Sprintf("start it first (lunshift start %s)", volume)}
	}
	if status, err = c.wait(ctx, volume, proxy.Synced, timeout, true); err != nil {
		return status, err
	}
	return c.Cutover(ctx, volume, o)
}

// Wait returns when the volume is in phase p or past it. A timeout of 0 waits
// without end.
func (c *Client) Wait(ctx context.Context, volume string, p proxy.Phase, timeout time.Duration) (proxy.Status, error) {
	return c.wait(ctx, volume, p, timeout, false)
}

// wait waits also for the volume to be served, where that is asked for.
func (c *Client) wait(ctx context.Context, volume string, p proxy.Phase, timeout time.Duration, served bool) (proxy.Status, error) {
	query := url.Values{"phase": {string(p)}, "served": {strconv.FormatBool(served)}}
	if timeout > 0 {
		query.Set("timeout", timeout.String())
	}
	return c.volume(ctx, http.MethodGet, volume, "/wait?"+query.Encode(), nil)
}

// Stuck says why a wait for phase p does not end by itself; empty where it may.
func Stuck(status proxy.Status, p proxy.Phase) string {
	if over, possible := proxy.Reached(status.Phase, p); !status.Paused || !copies(status.Phase) || over || !possible {
		return ""
	}
	if status.Phase == proxy.Migrating && (p == proxy.RollingBack || p == proxy.RolledBack) {
		return "" // a rollback takes the pause back
	}
	return fmt.Sprintf("volume %s is paused; resume it with: lunshift resume %s", status.Name, status.Name)
}

// Remove forgets the state of a volume that is cut over.
func (c *Client) Remove(ctx context.Context, volume string) (RemoveReport, error) {
	var report RemoveReport
	return report, c.onVolume(ctx, http.MethodDelete, volume, "", nil, &report)
}

// Check inspects a volume with the devices that the service has open.
func (c *Client) Check(ctx context.Context, volume string) (VolumeReport, error) {
	var report VolumeReport
	return report, c.onVolume(ctx, http.MethodGet, volume, "/check", nil, &report)
}

// records is what the state of the service knows, by volume.
func (c *Client) records(ctx context.Context) (map[string]state.Record, error) {
	var list []state.Record
	err := c.call(ctx, http.MethodGet, "/v1/records", nil, &list)
	return byName(list), err
}

func (c *Client) volume(ctx context.Context, method, volume, step string, body any) (proxy.Status, error) {
	var status proxy.Status
	return status, c.onVolume(ctx, method, volume, step, body, &status)
}

func (c *Client) onVolume(ctx context.Context, method, volume, step string, body, reply any) error {
	if volume == "" || volume == "." || volume == ".." {
		return Usagef("%q is no volume name", volume)
	}
	return c.call(ctx, method, "/v1/volumes/"+url.PathEscape(volume)+step, body, reply)
}

func (c *Client) call(ctx context.Context, method, path string, body, reply any) error {
	var sent io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		sent = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://lunshift"+path, sent)
	if err != nil {
		return Usagef("%v", err)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxReply))
	if err != nil {
		return c.unreachable(ctx, err)
	}
	if response.StatusCode != http.StatusOK {
		var failed errorReply
		if json.Unmarshal(text, &failed) != nil || failed.Error.Message == "" {
			return &Error{Failed, fmt.Sprintf("the service on %s does not know this request (HTTP %d): is it another version of lunshift?", c.socket, response.StatusCode)}
		}
		return &failed.Error
	}
	if err := json.Unmarshal(text, reply); err != nil {
		return &Error{Failed, fmt.Sprintf("the answer of the service on %s is not understood: is it another version of lunshift? (%v)", c.socket, err)}
	}
	return nil
}

func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var cause error = err
	var op *net.OpError
	if errors.As(err, &op) {
		cause = op.Err
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return &Error{Failed, fmt.Sprintf("no permission for the control socket %s: run the command as root or as the user of the service", c.socket)}
	case errors.Is(err, fs.ErrNotExist):
		return &Error{Failed, fmt.Sprintf("is lunshift serve running? There is no socket %s (name another with --config or --control)", c.socket)}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &Error{Failed, fmt.Sprintf("is lunshift serve running? Nobody listens on the socket %s", c.socket)}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return &Error{Failed, fmt.Sprintf("the service on %s ended before it answered; its log says why", c.socket)}
	}
	return &Error{Failed, fmt.Sprintf("cannot reach the service on socket %s: %v", c.socket, cause)}
}
