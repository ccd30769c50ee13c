package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// QEMU reaches logical units through libiscsi, in its block driver "iscsi". A
// write that it reports done has been answered GOOD by the target.

// image gives the arguments by which qemu's tools open the unit.
func (l LUN) image() []string {
	opts := fmt.Sprintf("driver=raw,file.driver=iscsi,file.transport=tcp,file.portal=%s,file.target=%s,file.lun=%d",
		l.Portal, l.IQN, l.Number)
	if l.Initiator != "" {
		opts += ",file.initiator-name=" + l.Initiator
	}
	var args []string
	if l.User != "" {
		args = append(args, "--object", "secret,id=chap,data="+l.Secret)
		opts += ",file.user=" + l.User + ",file.password-secret=chap"
	}
	return append(args, "--image-opts", opts)
}

// QemuIO runs commands of qemu-io one after the other on one session. Any that
// fails, a pattern that does not match included, is an error.
func (l LUN) QemuIO(ctx context.Context, commands ...string) (string, error) {
	args := l.image()
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := Run(ctx, "qemu-io", args...)
	return out, qemuFault(out, err)
}

// qemuFault finds the failure that qemu-io reports in its output, which its exit
// status does not always tell.
func qemuFault(out string, err error) error {
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "failed") || strings.Contains(line, "rror") {
			return errors.New("qemu-io: " + strings.TrimSpace(line))
		}
	}
	return nil
}

// Write is a qemu-io command that fills length bytes at offset with pattern.
func Write(pattern byte, offset, length uint64) string {
	return fmt.Sprintf("write -P %#02x %d %d", pattern, offset, length)
}

// Read is a qemu-io command that fails unless length bytes at offset are pattern.
func Read(pattern byte, offset, length uint64) string {
	return fmt.Sprintf("read -P %#02x %d %d", pattern, offset, length)
}

// QemuShell is a qemu-io that stays logged in and takes one command at a time.
// libiscsi logs in again by itself when the target goes away, and repeats what
// was not answered; a command then takes as long as the target is away.
type QemuShell struct {
	mu    sync.Mutex // one command at a time
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   chan []byte
	ended chan struct{} // closed when it has ended
}

// Shell starts a QemuShell and waits until it has logged in.
func (l LUN) Shell(ctx context.Context) (*QemuShell, error) {
	path, err := lookPath("qemu-io")
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, l.image()...)
	cmd.SysProcAttr = dieWithTest()
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	// One pipe for both, so that an error line comes before the prompt.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, r.Close(), w.Close())
	}
	w.Close()
	s := &QemuShell{cmd: cmd, in: in, out: make(chan []byte, 64), ended: make(chan struct{})}
	go func() {
		defer close(s.out)
		defer r.Close()
		for {
			p := make([]byte, 4096)
			n, err := r.Read(p)
			if n > 0 {
				s.out <- p[:n]
			}
			if err != nil {
				return
			}
		}
	}()
	go func() {
		defer close(s.ended)
		cmd.Wait() // how it ended shows in its output
	}()
	if _, err := s.answer(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// ErrShellEnded is what Do returns once qemu-io ended.
var ErrShellEnded = errors.New("qemu-io has ended")

// Do runs one command, which is one line. When ctx ends first the command's outcome is unknown and
// the shell is ended.
func (s *QemuShell) Do(ctx context.Context, command string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := fmt.Fprintln(s.in, command); err != nil {
		return "", fmt.Errorf("%w: %w", ErrShellEnded, err)
	}
	out, err := s.answer(ctx)
	return out, qemuFault(out, err)
}

// answer is what comes up to the next prompt.
func (s *QemuShell) answer(ctx context.Context) (string, error) {
	prompt := []byte("qemu-io> ")
	var out []byte
	for {
		select {
		case p, ok := <-s.out:
			if !ok {
				return string(out), fmt.Errorf("%w: %s", ErrShellEnded, bytes.TrimSpace(out))
			}
			out = append(out, p...)
			if before, ok := bytes.CutSuffix(out, prompt); ok {
				return string(before), nil
			}
		case <-ctx.Done():
			s.cmd.Process.Kill()
			return string(out), ctx.Err()
		}
	}
}

// PID is qemu-io's process id.
func (s *QemuShell) PID() int { return s.cmd.Process.Pid }

// Close lets qemu-io flush and log out and waits for it, at most 10 s.
func (s *QemuShell) Close() error {
	s.in.Close()
	if s.wait(10 * time.Second) {
		return nil
	}
	s.Kill()
	return errors.New("qemu-io did not end when asked and was killed")
}

// Kill ends qemu-io at once; it does not log out.
func (s *QemuShell) Kill() {
	s.cmd.Process.Kill()
	s.wait(time.Minute)
}

// wait tells whether qemu-io ended within limit.
func (s *QemuShell) wait(limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		select {
		case <-s.ended:
			return true
		case <-s.out: // what it still says must not block it
		case <-timer.C:
			return false
		}
	}
}

// Compare runs qemu-img compare of the unit with a raw image file. A difference is an error
// that names its offset. The longer one's excess must read as zeroes.
func (l LUN) Compare(ctx context.Context, path string) error {
	args := append([]string{"compare"}, l.image()...)
	_, err := Run(ctx, "qemu-img", append(args, "driver=raw,file.driver=file,file.filename="+path)...)
	return err
}

// CopyTo runs qemu-img convert from the unit onto another one, which stays as it
// is where the unit is unallocated or zero only if it was zero before. parallel
// requests (1 to 16) are in flight, in any order. It tells the processor time that
// qemu-img took.
func (l LUN) CopyTo(ctx context.Context, to LUN, parallel int) (cpu time.Duration, err error) {
	if l.User != "" || to.User != "" {
		return 0, errors.New("qemu-img convert: CHAP is not provided for here")
	}
	from, target := l.image(), to.image()
	args := []string{"convert", "-n", "-W", "-m", fmt.Sprint(parallel), "--image-opts", "--target-image-opts",
		from[len(from)-1], target[len(target)-1]}
	path, err := lookPath("qemu-img")
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.SysProcAttr = dieWithTest()
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("qemu-img convert: %w: %s", err, bytes.TrimSpace(out))
	}
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// SaveTo runs qemu-img convert from the unit into a raw image file.
func (l LUN) SaveTo(ctx context.Context, path string) error {
	args := append([]string{"convert", "-O", "raw"}, l.image()...)
	_, err := Run(ctx, "qemu-img", append(args, path)...)
	return err
}
