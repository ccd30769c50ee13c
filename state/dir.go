package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockName = "LOCK"

	// Extensions of Badger's files.
	logExt   = ".mem"
	tableExt = ".sst"
	valueExt = ".vlog" // of logs of long values, of which there are none
)

// damaged marks err as ErrCorrupt and tells what to do about it.
func damaged(dir string, err error) error {
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrVersion) || errors.Is(err, ErrLocked) {
		return err
	}
	text := strings.Join(strings.Fields(err.Error()), " ")
	return fmt.Errorf("state directory %s is %w: %s: serve no volume from it, for it alone knows what initiators wrote since start; keep it and both logical units unchanged and repair the file system it is on",
		dir, ErrCorrupt, text)
}

// dirLock is the flock that keeps a second Store out.
type dirLock struct{ file *os.File }

// openDir makes dir and locks it.
func openDir(dir string) (*dirLock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory %s: %w: name a directory that can be created", dir, reason(err))
	}
	if err := checkForeign(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, lockName)
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory %s: cannot write %s: %w: give this user the directory", dir, lockName, reason(err))
	}
	if err := flock(file); err != nil {
		defer file.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			pid, _ := io.ReadAll(io.LimitReader(file, 20))
			if p := strings.TrimSpace(string(pid)); p != "" {
				return nil, fmt.Errorf("state directory %s: %w (pid %s): stop that one first", dir, ErrLocked, p)
			}
			return nil, fmt.Errorf("state directory %s: %w: stop that one first", dir, ErrLocked)
		}
		return nil, fmt.Errorf("state directory %s: lock: %w", dir, err)
	}
	pid := fmt.Sprintf("%d\n", os.Getpid())
	if err := file.Truncate(0); err == nil {
		_, err = file.WriteAt([]byte(pid), 0)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("state directory %s: write %s: %w", dir, lockName, reason(err))
	}
	return &dirLock{file}, nil
}

// flock locks file. A process that is just ending, or the instant between a fork and an
// exec, may hold the lock for a moment longer, so it is tried for a while.
func flock(file *os.File) error {
	const tries, pause = 10, 25 * time.Millisecond
	for i := 1; ; i++ {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || i == tries {
			return err
		}
		time.Sleep(pause)
	}
}

// release gives the lock up. The file stays: removing it would let two processes
// lock two files of one name.
func (l *dirLock) release() error {
	l.file.Truncate(0) // the pid is for people only
	return l.file.Close()
}

// checkForeign refuses a directory that holds other people's files and no state.
func checkForeign(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("state directory %s: %w", dir, reason(err))
	}
	var foreign string
	var own bool
	for _, e := range entries {
		switch name := e.Name(); {
		case name == headName:
			return nil
		case name == badgerDir:
			own = true
		case name == lockName, name == "lost+found", strings.HasPrefix(name, "."), e.Type()&fs.ModeSocket != 0:
		default:
			foreign = name
		}
	}
	if own {
		return damaged(dir, fmt.Errorf("%s is missing", headName))
	}
	if foreign != "" {
		return fmt.Errorf("state directory %s: %w: it holds %s and no state: name an empty directory", dir, ErrForeign, foreign)
	}
	return nil
}

// syncer puts a commit on stable storage: the log that it was written to, and the
// names of the files in Badger's directory.
//
// Badger's own SyncWrites would sync the value log besides, which stays empty but costs
// a cache flush of the disk, and leaves new names to a goroutine of its own. A
// transaction lies in one log, the newest, which Badger begins in the middle of a commit
// when the one before it is full; that one's transactions were synced one by one.
// Tables and the manifest Badger syncs itself before it deletes a log.
type syncer struct {
	dir    *os.File
	log    *os.File       // the newest
	clean  int64          // the mtime, in ns, that is known to be synced; 0 unknown
	tables *atomic.Uint64 // bytes of Badger's tables
	// synced, of tests, is called with the name of a log that was synced.
	synced func(name string)
}

// openSyncer syncs every log and name there is, so that nothing is shown to
// readers that a power loss could still take back: after a kill, logs may hold
// transactions that were written and never synced.
func openSyncer(dir string, tables *atomic.Uint64) (_ *syncer, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	y := &syncer{dir: d, tables: tables}
	defer func() {
		if err != nil {
			y.close()
		}
	}()
	names, err := filepath.Glob(filepath.Join(dir, "*"+logExt))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := syncPath(name); err != nil && !errors.Is(err, fs.ErrNotExist) { // it may be a table by now
			return nil, fmt.Errorf("sync %s: %w", name, reason(err))
		}
	}
	if err := d.Sync(); err != nil {
		return nil, fmt.Errorf("sync %s: %w", dir, reason(err))
	}
	return y, y.look()
}

// sync returns once the commit just made is on stable storage, and every name in the
// directory. Where no file came or went it costs one fstat and one fdatasync.
func (y *syncer) sync() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(y.dir.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", y.dir.Name(), err)
	}
	mtime := st.Mtim.Nano()
	if mtime != y.clean {
		if err := y.look(); err != nil {
			return err
		}
	}
	if err := y.syncLog(); err != nil {
		return fmt.Errorf("sync %s: %w", y.log.Name(), reason(err))
	}
	if mtime == y.clean {
		return nil
	}
	if err := y.dir.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", y.dir.Name(), reason(err))
	}
	// A change within the same tick of the file system's clock would not show.
	if y.clean = 0; time.Since(time.Unix(0, mtime)) > 100*time.Millisecond {
		y.clean = mtime
	}
	return nil
}

// look finds the newest log and adds up the tables.
func (y *syncer) look() error {
	entries, err := os.ReadDir(y.dir.Name()) // in the order of the names, and so of the logs
	if err != nil {
		return err
	}
	var tables uint64
	newest := ""
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case tableExt:
			if info, err := e.Info(); err == nil { // it may be gone by now
				tables += uint64(info.Size())
			}
		case logExt:
			if len(e.Name()) >= len(newest) { // beyond 99999 names grow longer
				newest = e.Name()
			}
		}
	}
	y.tables.Store(tables)
	if newest == "" {
		return fmt.Errorf("%s holds no log", y.dir.Name())
	}
	newest = filepath.Join(y.dir.Name(), newest)
	if y.log != nil && y.log.Name() == newest {
		return nil
	}
	log, err := os.Open(newest)
	if err != nil {
		return err
	}
	if y.log != nil {
		y.log.Close() // read only: nothing is lost with it
	}
	y.log = log
	return nil
}

func (y *syncer) close() {
	y.dir.Close()
	if y.log != nil {
		y.log.Close()
	}
}

func (y *syncer) syncLog() error {
	err := fdatasync(y.log)
	if err == nil && y.synced != nil {
		y.synced(y.log.Name())
	}
	return err
}

func syncPath(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// errRemoved is of a directory that is gone while it is in use; the caller names it.
var errRemoved = errors.New("it was removed while it is in use: stop the service, and see in docs/reliability.md what to do when the state is lost")

// checkFree fails with ErrNoSpace where less than need bytes are free.
func checkFree(dir string, need uint64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); errors.Is(err, fs.ErrNotExist) {
		return errRemoved
	} else if err != nil {
		return fmt.Errorf("free space: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < need {
		return fmt.Errorf("%w: %d MiB free, %d MiB needed on the file system of %s: free some", ErrNoSpace, free>>20, need>>20, dir)
	}
	return nil
}

// reason takes the path out of a file system's error where the text names the
// directory already.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// removeEmptyLogs removes the logs of Badger that are empty. A power loss leaves them: a
// new log's name can reach the disk before anything in it does. Badger takes an
// empty log for one that it cannot open. What was acknowledged was synced, and so is in
// none of them; the head tells if it is missing all the same.
func removeEmptyLogs(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return reason(err)
	}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext != logExt && ext != valueExt {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return reason(err)
		}
		if info.Size() > 0 || !info.Mode().IsRegular() {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove the empty log %s: %w", e.Name(), reason(err))
		}
	}
	return nil
}
