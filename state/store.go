// Package state keeps what must outlive the process: the lifecycle record of
// each volume, the persistent reservations of its initiators, and for each logical
// block whether the destination holds its current content (valid) and whether the
// initiators wrote it since the start (dirty).
//
// Its guarantee: what PutRecords, PutReservation, Turn, Flags.Set, Clear, Note and Intend have
// acknowledged is on stable storage and comes back at the next Open, after a kill or a power loss as well;
// if it does not, Open or Store.Flags fails and says so. A store never begins
// again from nothing by itself.
//
// A Store is one directory. A Record is one volume's place in its life. Flags
// is the two-level image of one volume's blocks: the upper level is in memory, the lower
// as far as a bound allows, and it is written in transactions that gather what became
// due, of all volumes, while the last one was being synced.
//
// What it cannot tell is a directory that was put back as a whole from an older
// copy: flags set since then are lost with it.
//
// The package does not know what a phase means, reads and writes no logical
// unit, and imports none of lunshift's other packages.
package state

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	badgeroptions "github.com/dgraph-io/badger/v4/options"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Errors of this package, wrapped with the directory and what was being done.
var (
	// ErrLocked: another process (or another Store) has the directory open.
	ErrLocked = errors.New("in use by another process")
	// ErrForeign: the directory holds something that is not a lunshift state.
	ErrForeign = errors.New("not a lunshift state directory")
	// ErrVersion: the state was written by a newer lunshift.
	ErrVersion = errors.New("written by a newer lunshift")
	// ErrCorrupt: the state is damaged or incomplete.
	ErrCorrupt = errors.New("damaged")
	// ErrGeometry: the volume's flags were kept for another size or region size.
	ErrGeometry = errors.New("geometry differs")
	// ErrClosed: the Store was closed.
	ErrClosed = errors.New("state closed")
	// ErrForgotten: the volume's state was forgotten while its Flags were in use.
	ErrForgotten = errors.New("state of the volume was forgotten")
	// ErrNoSpace: too little space is free to commit safely; nothing was written,
	// and the Store goes on as soon as there is space again.
	ErrNoSpace = errors.New("too little free space")
	// ErrFailed: an earlier commit failed with an unknown outcome; nothing more is
	// written until the Store is opened again.
	ErrFailed = errors.New("an earlier commit failed")
	// ErrRange: a run reaches beyond the volume.
	ErrRange = errors.New("beyond the end of the volume")
)

const (
	// memTableSize is Badger's in-memory table and write-ahead log, in bytes. A
	// transaction holds at most 15 % of it.
	memTableSize = 16 << 20
	// minFree is the free space in bytes, besides as much as Badger's tables take
	// now, below which nothing is committed. Badger writes through memory maps: on
	// a full file system a store into one kills the process, so the room is made
	// sure of before. It covers the logs of the memory tables and their first
	// tables; a compaction may write all tables anew before it deletes the old.
	minFree = 4 * memTableSize
	// badgerDir holds Badger's files within the state directory.
	badgerDir = "badger"
)

// Options are what a Store needs from outside.
type Options struct {
	// Log takes what Badger and the committer have to tell. Nil discards it.
	Log logrus.FieldLogger
	// BitmapMemory bounds the bitmaps of partial regions that are held in memory, of
	// all volumes together, in bytes; 0 is 64 MiB. The rest is read from the
	// directory when it is asked for.
	BitmapMemory uint64
	// SettleDelay is how long what is journaled gathers before it goes into the database
	// together; 0 is 100 ms.
	SettleDelay time.Duration
}

// Store is an open state directory. All methods may be called concurrently.
type Store struct {
	dir  string
	log  logrus.FieldLogger
	lock *dirLock
	head *head
	db   *badger.DB

	queue   chan *request
	closing chan struct{} // closed by Close: no new requests
	stopped chan struct{} // closed by the committer: no more outcomes
	close   sync.Once
	closed  error // Close's outcome

	journal *journal
	settler *settler
	syncer  *syncer // of the committer alone
	bitmaps *bitmaps
	history history
	stats   statsKeeper
	freeMin atomic.Uint64 // minFree, another in tests of a full disk
	tables  atomic.Uint64 // bytes of Badger's tables

	// Lock order: loading, then reading or mu; the settler's, then early's and the journal's.
	loading sync.Mutex        // held while a volume's flags are loaded or forgotten
	reading sync.RWMutex      // keeps Close from the database while it is read
	mu      sync.Mutex        // guards flags
	flags   map[string]*Flags // by volume name
}

// Open opens the state in dir and creates both where there is none. One Store
// at a time has a directory. The errors name dir: ErrLocked, ErrForeign,
// ErrVersion, ErrCorrupt, ErrNoSpace or the file system's own.
func Open(dir string, opts Options) (_ *Store, err error) {
	log := opts.Log
	if log == nil {
		quiet := logrus.New()
		quiet.SetLevel(logrus.PanicLevel)
		log = quiet
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w", dir, err)
	}
	lock, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.release()
		}
	}()
	if err := checkFree(dir, minFree); err != nil {
		return nil, fmt.Errorf("state directory %s: %w", dir, err)
	}
	head, err := openHead(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			head.file.Close()
		}
	}()
	bdir := filepath.Join(dir, badgerDir)
	_, missing := os.Lstat(bdir)
	if errors.Is(missing, fs.ErrNotExist) || head.version == 1 {
		if err := createJournal(dir); err != nil {
			return nil, fmt.Errorf("state directory %s: %w", dir, err)
		}
	}
	journal, entries, err := openJournal(dir, head)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			journal.closeFiles()
		}
	}()
	if err := removeEmptyLogs(bdir); err != nil {
		return nil, fmt.Errorf("state directory %s: %w", dir, err)
	}
	if err := verifyFiles(bdir); err != nil {
		return nil, damaged(dir, err)
	}
	db, err := openBadger(bdir, log)
	if err != nil {
		return nil, damaged(dir, err)
	}
	// Badger makes its directory, but leaves the directory's own name to chance.
	if err := syncPath(dir); err != nil {
		db.Close()
		return nil, fmt.Errorf("state directory %s: %w", dir, reason(err))
	}
	if head.version == 1 {
		if err := head.create(); err != nil {
			db.Close()
			return nil, err
		}
	}
	s := &Store{
		dir:     dir,
		log:     log,
		lock:    lock,
		head:    head,
		db:      db,
		queue:   make(chan *request, maxBatch),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
		bitmaps: newBitmaps(opts.BitmapMemory),
		flags:   map[string]*Flags{},
		journal: journal,
	}
	s.freeMin.Store(minFree)
	s.settler = newSettler(s, opts.SettleDelay)
	journal.stuck, journal.kick = s.settler.stuck, s.settler.now
	c, err := newCommitter(s)
	if err != nil {
		db.Close()
		return nil, err
	}
	go c.run()
	go s.settler.run()
	if err := s.takeOver(entries); err != nil {
		// The journal stays as it is, and with it what is not in the database yet.
		return nil, errors.Join(err, s.shut(false))
	}
	return s, nil
}

// takeOver brings what the journal held at the last end into the database, and removes
// flags of forgotten volumes.
func (s *Store) takeOver(entries [][]byte) error {
	named, err := s.named()
	if err != nil {
		return err
	}
	if err := s.keepEntries(entries, named); err != nil {
		return err
	}
	if err := s.journal.begin(); err != nil {
		return fmt.Errorf("state directory %s: %w", s.dir, err)
	}
	return s.sweep(named)
}

// checkFree fails with ErrNoSpace where too little is left to commit safely.
func (s *Store) checkFree() error {
	if err := checkFree(s.dir, s.freeMin.Load()+s.tables.Load()); err != nil {
		return fmt.Errorf("state directory %s: %w", s.dir, err)
	}
	return nil
}

func openBadger(dir string, log logrus.FieldLogger) (db *badger.DB, err error) {
	defer func() {
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("opening the database: %v", r)
		}
	}()
	o := badger.DefaultOptions(dir).
		WithLogger(badgerLog{log}).
		WithSyncWrites(false).      // syncer syncs each commit
		WithDetectConflicts(false). // one committer, no concurrent transactions
		WithMemTableSize(memTableSize).
		WithNumMemtables(2).
		WithNumLevelZeroTables(4).
		WithNumLevelZeroTablesStall(8).
		WithNumCompactors(2).
		WithBaseTableSize(2 << 20).
		WithBaseLevelSize(32 << 20).
		WithValueLogFileSize(1 << 20). // stays empty.
		WithValueThreshold(1 << 20).   // every value stays in the tables
		WithCompression(badgeroptions.None).
		WithBlockCacheSize(0). // uncompressed blocks are read in place
		WithIndexCacheSize(0).
		WithChecksumVerificationMode(badgeroptions.OnBlockRead).
		WithMetricsEnabled(false)
	db, err = badger.Open(o)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("the database in %s: %w: stop that one first", dir, ErrLocked)
	}
	return db, err
}

// Close lets the commits under way finish, refuses the rest with ErrClosed and
// gives the directory up. What Flags have in memory stays readable.
func (s *Store) Close() error {
	s.close.Do(func() { s.closed = s.shut(true) })
	return s.closed
}

// shut is Close; without settled the journal is left as it is.
func (s *Store) shut(settled bool) error {
	s.journal.shut()
	close(s.settler.closing)
	<-s.settler.stopped
	problem := s.settler.stuck()
	close(s.closing)
	<-s.stopped
	s.reading.Lock()
	defer s.reading.Unlock()
	err := s.closeDatabase()
	// What is stuck in the journal is taken over at the next Open.
	clean := settled && err == nil && problem == nil
	return errors.Join(err, s.journal.close(clean), s.head.close(), s.lock.release())
}

// closeDatabase leaves the database open where its directory was removed: it would try
// for ever to write its tables there.
func (s *Store) closeDatabase() error {
	if _, err := os.Stat(filepath.Join(s.dir, badgerDir)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory %s: %w", s.dir, errRemoved)
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("state directory %s: close: %w", s.dir, err)
	}
	return nil
}

// Forget removes the record, the flags and the reservations of a volume; Flags of it
// that are in use fail from then on with ErrForgotten. It does nothing for a volume
// that is not known. The records instead are written in the same transaction, in the
// place of the volume's.
func (s *Store) Forget(volume string, instead ...Record) error {
	return s.forget(volume, &request{forget: volume, reservation: true}, instead)
}

// Renew is Forget, but the reservations stay: the initiators still have the same
// logical unit.
func (s *Store) Renew(volume string, instead ...Record) error {
	return s.forget(volume, &request{forget: volume}, instead)
}

func (s *Store) forget(volume string, r *request, instead []Record) error {
	if err := checkVolume(volume); err != nil {
		return err
	}
	s.loading.Lock()
	defer s.loading.Unlock()
	header, err := s.get(headerKey(volume))
	if err != nil {
		return err
	}
	if r.records, err = encodeRecords(instead); err != nil {
		return err
	}
	if err := s.submit(context.Background(), r); err != nil {
		return err
	}
	if header == nil {
		return nil
	}
	h, err := decodeHeader(header)
	if err != nil {
		return nil // its flags are out of reach all the same
	}
	if err := s.drop(h.Generation); err != nil {
		return wrap(volume, "remove forgotten flags", err)
	}
	return nil
}

// Stats is what the Store did since it was opened.
type Stats struct {
	// Commits counts synced transactions, Requests the calls they served.
	Commits, Requests uint64
	// Failures counts transactions that failed.
	Failures uint64
	// Journaled counts what was put into the journal, Frames the syncs that took.
	Journaled, Frames uint64
	// FlagsSet counts the blocks of any kind whose flag was newly set, less those that lost
	// that kind in the same commit.
	FlagsSet uint64
	// BitmapBytes is about how many bytes the bitmaps in memory take now, BitmapReads how
	// often one had to be read from the database.
	BitmapBytes, BitmapReads uint64
	// Latency is the time from a transaction's begin to its sync.
	Latency Histogram
}

// Histogram counts durations. Counts[i] holds those up to Bounds[i] and above
// the bound before; the last count, beyond all bounds, has no bound.
type Histogram struct {
	Bounds []time.Duration
	Counts []uint64
	Sum    time.Duration
}

// Stats is a snapshot.
func (s *Store) Stats() Stats {
	st := s.stats.snapshot()
	st.BitmapBytes, st.BitmapReads = s.bitmaps.memory(), s.bitmaps.reads.Load()
	st.Journaled, st.Frames = s.journal.journaled.Load(), s.journal.frames.Load()
	return st
}

type statsKeeper struct {
	mu sync.Mutex // guards all below
	Stats
}

func (k *statsKeeper) committed(took time.Duration, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.Latency.Bounds == nil {
		k.Latency.Bounds = latencyBounds()
		k.Latency.Counts = make([]uint64, len(k.Latency.Bounds)+1)
	}
	if err != nil {
		k.Failures++
		return
	}
	k.Commits++
	k.Latency.Sum += took
	i := 0
	for i < len(k.Latency.Bounds) && took > k.Latency.Bounds[i] {
		i++
	}
	k.Latency.Counts[i]++
}

func (k *statsKeeper) served(requests int, flags uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.Requests += uint64(requests)
	k.FlagsSet += flags
}

func (k *statsKeeper) snapshot() Stats {
	k.mu.Lock()
	defer k.mu.Unlock()
	st := k.Stats
	if st.Latency.Bounds == nil {
		st.Latency.Bounds = latencyBounds()
		st.Latency.Counts = make([]uint64, len(st.Latency.Bounds)+1)
		return st
	}
	st.Latency.Counts = append([]uint64(nil), st.Latency.Counts...)
	return st
}

func latencyBounds() []time.Duration {
	var b []time.Duration
	for d := 50 * time.Microsecond; d < 2*time.Second; d *= 2 {
		b = append(b, d)
	}
	return b
}

// badgerLog hands Badger's lines on. None of them is for people who run lunshift
// but its warnings.
type badgerLog struct{ log logrus.FieldLogger }

func (l badgerLog) Errorf(f string, a ...any)   { l.log.Warnf("state: badger: "+trim(f), a...) }
func (l badgerLog) Warningf(f string, a ...any) { l.log.Warnf("state: badger: "+trim(f), a...) }
func (l badgerLog) Infof(f string, a ...any)    { l.log.Debugf("state: badger: "+trim(f), a...) }
func (l badgerLog) Debugf(string, ...any)       {}

func trim(f string) string {
	for len(f) > 0 && f[len(f)-1] == '\n' {
		f = f[:len(f)-1]
	}
	return f
}
