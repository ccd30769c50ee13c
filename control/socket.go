package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// socket is the control socket of a running service. Its lock file tells a
// service that runs from a socket that one left behind when it was killed.
type socket struct {
	net.Listener
	lock *os.File
}

// listenSocket claims path. A socket nobody listens on is replaced; anything else
// that stands there is left alone.
func listenSocket(path string) (*socket, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, pathless(err))
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("control socket %s: lock file: %w", path, pathless(err))
	}
	s := &socket{lock: lock}
	if err := lockSocket(path, lock); err != nil {
		lock.Close()
		return nil, err
	}
	if err := removeStale(path); err != nil {
		lock.Close()
		return nil, err
	}
	s.Listener, err = listenPrivate(path)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("control socket %s: %w", path, pathless(err))
	}
	return s, nil
}

// Close stops listening and removes the socket. The lock file stays, because
// removing it would let two services lock two files of that name.
func (s *socket) Close() error {
	err := s.Listener.Close()
	return errors.Join(err, s.lock.Close())
}

// checkSocket says whether a service could claim path, and changes nothing.
func checkSocket(path string) error {
	if err := checkCreatable(filepath.Dir(path)); err != nil {
		return fmt.Errorf("control socket %s: %w", path, err)
	}
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("control socket %s: lock file: %w", path, pathless(err))
	default:
		defer lock.Close() // which gives the lock up
		if err := lockSocket(path, lock); err != nil {
			return err
		}
	}
	_, err = findStale(path)
	return err
}

func lockSocket(path string, lock *os.File) error {
	err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return fmt.Errorf("control socket %s: lunshift is already running there", path)
	case err != nil:
		return fmt.Errorf("control socket %s: lock it: %w", path, err)
	}
	return nil
}

// findStale tells whether a socket that nobody listens on stands at path; anything
// else there is an error.
func findStale(path string) (bool, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("control socket %s: %w", path, pathless(err))
	}
	if info.Mode().Type() != fs.ModeSocket {
		return false, fmt.Errorf("control socket %s: something that is not a socket is there; move it away or choose another path", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
		return false, fmt.Errorf("control socket %s: another process listens there; stop it or choose another path", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return false, fmt.Errorf("control socket %s: cannot tell whether somebody listens there: %w", path, err)
	}
	return true, nil
}

func removeStale(path string) error {
	stale, err := findStale(path)
	if err != nil || !stale {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("control socket %s: remove the one left behind: %w", path, pathless(err))
	}
	return nil
}

// listenPrivate makes the socket with mode 0600 from its first moment on. The
// umask is the process's, so it is called before anything else makes files.
func listenPrivate(path string) (net.Listener, error) {
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	return net.Listen("unix", path)
}

// pathless is the cause of a file error; the text around it names the path.
func pathless(err error) error {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
