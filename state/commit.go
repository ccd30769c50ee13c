package state

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"

	"lunshift/failpoint"
)

// maxBatch bounds the requests in the queue and those of one batch.
const maxBatch = 1024

// request is one call that waits for the committer. Exactly one of its four
// parts is used.
type request struct {
	flags *Flags // Set
	kinds Kinds
	runs  []Run

	records []op   // PutRecords, and the header of new flags
	alone   *op    // PutReservation: one key, committed with the flags
	forget  string // Forget and Renew: the volume
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
			r.finish(fmt.Errorf("volume %s: set flags: %w", r.flags.volume, ErrForgotten))
			continue
		}
		st := stages[r.flags]
		if st == nil {
			st = newStage(r.flags)
			stages[r.flags] = st
		}
		for _, run := range r.runs {
			st.set(r.kinds, run)
		}
		sets = append(sets, r)
	}
	if len(sets)+len(alone) > 0 {
		var ops []op
		for _, r := range alone {
			ops = append(ops, *r.alone)
		}
		for _, st := range stages {
			if more, err := st.finish(ops); err == nil {
				ops = more
			} else {
				st.err = err
			}
		}
		err := c.commit(ops, false)
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
			r.finish(wrap(r.flags.volume, "set flags", cmp.Or(stages[r.flags].err, err)))
		}
	}
	for _, r := range mine {
		c.stats.served(1, 0)
		if r.forget != "" {
			r.finish(wrap(r.forget, "forget", c.forgetVolume(r)))
		} else {
			r.finish(c.commit(r.records, true))
		}
	}
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

// commit writes ops in their order and returns once they are on stable storage.
// They are one transaction, or, if they do not fit into one and atomic is false,
// several. An error leaves none of them written where it is ErrNoSpace or
// concerns the size; after any other the outcome is unknown and nothing more can
// be written, because a later commit that succeeded might lie in the log behind
// one that was lost.
func (c *committer) commit(ops []op, atomic bool) (err error) {
	if len(ops) == 0 {
		return nil
	}
	if c.failed != nil {
		return c.failed
	}
	if err := c.checkFree(); err != nil {
		return err
	}
	for rest := ops; len(rest) > 0; {
		var some bool
		begin := time.Now()
		rest, some, err = c.commitSome(rest, atomic)
		c.stats.committed(time.Since(begin), err)
		if err == nil {
			continue
		}
		if !some && len(rest) == len(ops) { // nothing reached the database
			return fmt.Errorf("state directory %s: %w", c.dir, err)
		}
		c.failed = fmt.Errorf("state directory %s: %w: %w: restart the service when the disk is in order", c.dir, ErrFailed, err)
		c.log.Errorf("state: %v", c.failed)
		c.journal.fail(c.failed)
		return c.failed
	}
	return nil
}

// commitSome commits a first part of ops, all of them where they fit, and gives
// the rest. tried tells whether the transaction was handed to the database.
func (c *committer) commitSome(ops []op, atomic bool) (rest []op, tried bool, err error) {
	defer func() {
		if r := recover(); r != nil {
			rest, tried, err = ops, true, fmt.Errorf("database: %v", r)
		}
	}()
	txn := c.db.NewTransaction(true)
	defer txn.Discard()
	if err := txn.Set([]byte(seqKey), binary.BigEndian.AppendUint64(nil, c.seq+1)); err != nil {
		return ops, false, err
	}
	n := 0
	for ; n < len(ops); n++ {
		if ops[n].value == nil {
			err = txn.Delete(ops[n].key)
		} else {
			err = txn.Set(ops[n].key, ops[n].value)
		}
		if errors.Is(err, badger.ErrTxnTooBig) && n > 0 && !atomic {
			break
		}
		if err != nil {
			return ops, false, err
		}
	}
	failpoint.Here("state.begin")
	if err := txn.Commit(); err != nil {
		return ops, true, err
	}
	failpoint.Here("state.written")
	if err := c.syncer.sync(); err != nil {
		return ops, true, err
	}
	failpoint.Here("state.synced")
	c.seq++
	if err := c.head.advance(c.seq); err != nil {
		return ops, true, err
	}
	failpoint.Here("state.noted")
	return ops[n:], true, nil
}
