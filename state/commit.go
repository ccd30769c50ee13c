package state

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"

	"lunshift/failpoint"
)

// maxBatch bounds the requests in the queue and those of one batch.
const maxBatch = 1024

// request is one call that waits for the committer. Exactly one of its five
// parts is used.
type request struct {
	flags *Flags // Set and Clear
	kinds Kinds
	runs  []Run
	clear bool

	turns   []Turning // Turn, with records
	records []op      // PutRecords, and the header of new flags
	alone   *op       // PutReservation: one key, committed with the flags
	forget  string    // Forget and Renew: the volume
	// reservation says that the volume's reservations are forgotten too.
	reservation bool

	state atomic.Int32  // queued, then taken or withdrawn
	done  chan struct{} // closed by the committer, after err
	err   error
}

const (
	queued int32 = iota
	taken
	withdrawn
)

// op is one key to be written; a nil value deletes it.
type op struct{ key, value []byte }

// submit hands r to the committer and waits for its outcome.
func (s *Store) submit(ctx context.Context, r *request) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-s.closing:
		return ErrClosed
	default:
	}
	r.done = make(chan struct{})
	select {
	case s.queue <- r:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closing:
		return ErrClosed
	}
	var gaveUp error
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		gaveUp = ctx.Err()
	case <-s.stopped:
		gaveUp = ErrClosed
	}
	if r.state.CompareAndSwap(queued, withdrawn) {
		return gaveUp
	}
	<-r.done
	return r.err
}

// committer owns the durable image: it alone writes to the database and changes
// what readers of Flags see.
type committer struct {
	*Store
	seq    uint64 // of the last commit
	failed error  // why nothing more may be written
}

func newCommitter(s *Store) (*committer, error) {
	value, err := s.get([]byte(seqKey))
	if err != nil {
		return nil, err
	}
	c := &committer{Store: s}
	switch {
	case value != nil && len(value) != 8:
		return nil, damaged(s.dir, fmt.Errorf("the sequence number is %d bytes long", len(value)))
	case value != nil:
		c.seq = binary.BigEndian.Uint64(value)
	}
	if c.seq < s.head.seq {
		return nil, damaged(s.dir, fmt.Errorf("the database ends at commit %d, but commit %d was acknowledged", c.seq, s.head.seq))
	}
	c.syncer, err = openSyncer(filepath.Join(s.dir, badgerDir), &s.tables)
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w", s.dir, err)
	}
	return c, nil
}

func (c *committer) run() {
	defer close(c.stopped)
	defer c.syncer.close()
	batch := make([]*request, 0, maxBatch)
	for {
		batch = batch[:0]
		select {
		case r := <-c.queue:
			batch = append(batch, r)
		case <-c.closing:
			return
		}
	more:
		for len(batch) < maxBatch {
			select {
			case r := <-c.queue:
				batch = append(batch, r)
			default:
				break more
			}
		}
		c.serve(batch)
		clear(batch)
	}
}

// serve commits the batch: the flags and the reservations of all together, then the
// rest one by one.
func (c *committer) serve(batch []*request) {
	stages := make(map[*Flags]*stage, 1)
	var sets, alone []*request
	mine := batch[:0]
	for _, r := range batch {
		if !r.state.CompareAndSwap(queued, taken) {
			continue
		}
		if r.alone != nil {
			alone = append(alone, r)
			continue
		}
		if r.flags == nil {
			mine = append(mine, r)
			continue
		}
		if r.flags.gone.Load() {
			r.finish(wrap(r.flags.volume, r.what(), ErrForgotten))
			continue
		}
		st := stages[r.flags]
		if st == nil {
			st = newStage(r.flags)
			stages[r.flags] = st
		}
		for _, run := range r.runs {
			st.apply(r.kinds, run, r.clear)
		}
		sets = append(sets, r)
	}
	if len(sets)+len(alone) > 0 {
		var units [][]op
		for _, r := range alone {
			units = append(units, []op{*r.alone})
		}
		for _, st := range stages {
			more, err := st.finish()
			units, st.err = append(units, more...), err
		}
		err := c.commit(units...)
		var set uint64
		for _, st := range stages {
			switch {
			case err == nil && st.err == nil:
				set += st.publish()
			case errors.Is(err, ErrFailed):
				// The database may show what is not on stable storage. Its readers are
				// kept away from it for good.
			default:
				st.drop()
			}
		}
		c.stats.served(len(sets)+len(alone), set)
		for _, r := range alone {
			r.finish(err)
		}
		for _, r := range sets {
			r.finish(wrap(r.flags.volume, r.what(), cmp.Or(stages[r.flags].err, err)))
		}
	}
	for _, r := range mine {
		c.stats.served(1, 0)
		switch {
		case r.forget != "":
			r.finish(wrap(r.forget, "forget", c.forgetVolume(r)))
		case len(r.turns) > 0:
			r.finish(c.turn(r))
		default:
			r.finish(c.commit(r.records))
		}
	}
}

// what is what a request of flags does, for its error.
func (r *request) what() string {
	if r.clear {
		return "clear flags"
	}
	return "set flags"
}

func (r *request) finish(err error) {
	r.err = err
	close(r.done)
}

func wrap(volume, what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("volume %s: %s: %w", volume, what, err)
}

// commit writes the units in their order and returns once they are on stable storage.
// They are one transaction, or several if they do not fit into one; each unit lies in
// one. An error leaves none of them written where it is ErrNoSpace or concerns the size;
// after any other the outcome is unknown and nothing more can be written, because a later
// commit that succeeded might lie in the log behind one that was lost.
func (c *committer) commit(units ...[]op) (err error) {
	units = slices.DeleteFunc(units, func(u []op) bool { return len(u) == 0 })
	if len(units) == 0 {
		return nil
	}
	if c.failed != nil {
		return c.failed
	}
	if err := c.checkFree(); err != nil {
		return err
	}
	for rest := units; len(rest) > 0; {
		var some bool
		begin := time.Now()
		rest, some, err = c.commitSome(rest)
		c.stats.committed(time.Since(begin), err)
		if err == nil {
			continue
		}
		if !some && len(rest) == len(units) { // nothing reached the database
			return fmt.Errorf("state directory %s: %w", c.dir, err)
		}
		c.failed = fmt.Errorf("state directory %s: %w: %w: restart the service when the disk is in order", c.dir, ErrFailed, err)
		c.log.Errorf("state: %v", c.failed)
		c.journal.fail(c.failed)
		return c.failed
	}
	return nil
}

// commitSome commits the first units, all of them where they fit, and gives the rest.
// tried tells whether the transaction was handed to the database.
func (c *committer) commitSome(units [][]op) (rest [][]op, tried bool, err error) {
	defer func() {
		if r := recover(); r != nil {
			rest, tried, err = units, true, fmt.Errorf("database: %v", r)
		}
	}()
	txn, n, err := c.fill(units)
	if errors.Is(err, badger.ErrTxnTooBig) && n > 0 {
		txn.Discard()
		txn, n, err = c.fill(units[:n])
	}
	defer txn.Discard()
	if err != nil {
		return units, false, err
	}
	failpoint.Here("state.begin")
	if err := txn.Commit(); err != nil {
		return units, true, err
	}
	failpoint.Here("state.written")
	if err := c.syncer.sync(); err != nil {
		return units, true, err
	}
	failpoint.Here("state.synced")
	c.seq++
	if err := c.head.advance(c.seq); err != nil {
		return units, true, err
	}
	failpoint.Here("state.noted")
	return units[n:], true, nil
}

// fill puts the units into a transaction and tells how many it took as a whole.
func (c *committer) fill(units [][]op) (txn *badger.Txn, n int, err error) {
	txn = c.db.NewTransaction(true)
	err = txn.Set([]byte(seqKey), binary.BigEndian.AppendUint64(nil, c.seq+1))
	for ; err == nil && n < len(units); n++ {
		for _, o := range units[n] {
			if o.value == nil {
				err = txn.Delete(o.key)
			} else {
				err = txn.Set(o.key, o.value)
			}
			if err != nil {
				return txn, n, err
			}
		}
	}
	return txn, n, err
}
