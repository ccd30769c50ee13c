package demo

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// folderPattern is how the demonstration's temporary folders are called.
const folderPattern = "lunshift-demo-*"

// memory is a folder in memory with room for twice as many bytes, or, where there is
// none, the folder of temporary files.
func memory(bytes uint64) string {
	const folder = "/dev/shm"
	var st unix.Statfs_t
	if err := unix.Statfs(folder, &st); err != nil || st.Type != unix.TMPFS_MAGIC || st.Bavail*uint64(st.Bsize) < 2*bytes {
		return os.TempDir()
	}
	return folder
}

// folder is a temporary folder with a lock that tells whether its demonstration
// lives.
type folder struct {
	path string
	lock *os.File
}

// newFolder makes a folder inside parent, and removes what demonstrations that were
// killed left there.
func newFolder(parent string) (*folder, error) {
	old, err := filepath.Glob(filepath.Join(parent, folderPattern))
	if err != nil {
		return nil, err
	}
	for _, path := range old {
		f := &folder{path: path}
		if f.acquire() == nil { // else it lives, or is somebody else's
			f.remove()
		}
	}
	path, err := os.MkdirTemp(parent, folderPattern)
	if err != nil {
		return nil, err
	}
	f := &folder{path: path}
	if err := errors.Join(f.acquire(), os.Mkdir(f.content(), 0o700)); err != nil {
		f.remove()
		return nil, err
	}
	return f, nil
}

// content is where the demonstration's own files go, beside the lock.
func (f *folder) content() string { return filepath.Join(f.path, "content") }

func (f *folder) acquire() error {
	lock, err := os.OpenFile(filepath.Join(f.path, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return err
	}
	f.lock = lock
	return nil
}

// remove gives the folder up. What cannot be removed now is removed by a later
// demonstration.
func (f *folder) remove() {
	os.RemoveAll(f.path)
	if f.lock != nil {
		f.lock.Close()
	}
}
