package state

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// disk is what stable storage holds of Badger's logs and of the journal: of each as much
// as was there when it was last synced.
type disk struct {
	mu     sync.Mutex // guards logs
	logs   map[string][]byte
	failed error
}

// synced reads on from where the log ended at its last sync; it is only appended to.
func (d *disk) synced(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	had := d.logs[filepath.Base(name)]
	had = had[:max(len(had)-64, 0)] // zeroes at the end may have been part of an entry
	file, err := os.Open(name)
	if err != nil {
		d.failed = err
		return
	}
	defer file.Close()
	part := make([]byte, 1<<20)
	for {
		n, _ := file.ReadAt(part, int64(len(had)))
		text := bytes.TrimRight(part[:n], "\x00")
		had = append(had, text...)
		if len(text) < n || n == 0 {
			break
		}
	}
	d.logs[filepath.Base(name)] = had
}

// journaled keeps a segment as it is.
func (d *disk) journaled(name string) {
	b, err := os.ReadFile(name)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.logs[filepath.Base(name)], d.failed = b, errors.Join(d.failed, err)
}

// cutPower copies the state in from as a power loss would leave it: of the logs there is
// what was synced. Tables and the manifest are synced by Badger before they count.
func (d *disk) cutPower(t *testing.T, from string) (to string) {
	t.Helper()
	to = filepath.Join(t.TempDir(), "after")
	if err := os.MkdirAll(filepath.Join(to, badgerDir), 0o700); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(from, badgerDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	segments, err := filepath.Glob(filepath.Join(from, "journal.*"))
	if err != nil || len(segments) != segmentCount {
		t.Fatal(segments, err)
	}
	names = append(append(names, segments...), filepath.Join(from, headName))
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failed != nil {
		t.Fatal(d.failed)
	}
	for _, name := range names {
		rel, _ := filepath.Rel(from, name)
		if rel == filepath.Join(badgerDir, lockName) {
			continue
		}
		var b []byte
		st, err := os.Stat(name)
		if err == nil {
			if filepath.Ext(name) == logExt || filepath.Dir(name) == from && filepath.Base(name) != headName {
				b = d.logs[filepath.Base(name)]
			} else {
				b, err = os.ReadFile(name)
			}
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, rel), b, 0o600)
		}
		if err == nil {
			err = os.Truncate(filepath.Join(to, rel), st.Size())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// A commit that is not synced, or synced in another log than the one it lies in, makes
// this fail, as leaving out syncLog or the look for the newest log in syncer.sync
// shows; for what was noted, so does leaving out the sync of the journal.
func TestAcknowledgedFlagsSurviveAPowerLoss(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	d := &disk{logs: map[string][]byte{}}
	s.syncer.synced, s.journal.synced = d.synced, d.journaled
	f, err := s.Flags("v", crashGeometry)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.PutRecords(t.Context(), Record{Volume: "v", Phase: "migrating"}); err != nil {
		t.Fatal(err)
	}
	filler := make([]byte, mostReservation)
	fill := rand.NewChaCha8([32]byte{})
	fill.Read(filler)
	var acked []Run
	for round := range 2 {
		var mu sync.Mutex
		var wg sync.WaitGroup
		for w := range uint64(4) {
			wg.Go(func() {
				for i := range uint64(25) {
					r := Run{Start: (uint64(round)*200+i*4+w)*2048 + i, Blocks: 8 + i}
					set := f.Set
					if i%2 == 0 {
						set = f.Note
					}
					if err := set(context.Background(), Valid|Dirty, r); err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					acked = append(acked, r)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		after := d.cutPower(t, dir)
		re := open(t, after)
		g, err := re.Flags("v", crashGeometry)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		for _, r := range acked {
			if !g.All(Valid|Dirty, r) {
				t.Fatalf("round %d: %v was acknowledged and is gone", round, r)
			}
		}
		if err := re.Close(); err != nil {
			t.Fatal(err)
		}
		if round > 0 {
			break
		}
		// On to the next log.
		count := func() int {
			d.mu.Lock()
			defer d.mu.Unlock()
			return len(d.logs)
		}
		logs := count()
		for n := 0; count() == logs; n++ {
			if n > 100 {
				t.Fatal("the log never filled up")
			}
			if err := s.PutReservation(t.Context(), "other", filler); err != nil {
				t.Fatal(err)
			}
		}
		settle(t, dir)
	}
}

// settle waits until Badger has made tables of all logs but the newest.
func settle(t *testing.T, dir string) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		logs, err := filepath.Glob(filepath.Join(dir, badgerDir, "*"+logExt))
		if err != nil {
			t.Fatal(err)
		}
		if len(logs) == 1 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("logs are left: %v", logs)
		}
	}
}
