package lun

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	// maxCommandBytes bounds what one READ or WRITE moves, in bytes.
	maxCommandBytes = 4 << 20
	// maxZeroBytes bounds one WRITE SAME or UNMAP of a device that names no limit.
	maxZeroBytes = 64 << 20
	// maxZeroCommand bounds them on a device that names one: a command must end well
	// within Options.IOTimeout also where the device writes every block.
	maxZeroCommand = 256 << 20
	// statusRuns is how many descriptors one GET LBA STATUS has room for, and
	// statusCalls how many of them make one Extents.
	statusRuns  = 1024
	statusCalls = 64
)

// remote is a logical unit of an iSCSI target.
type remote struct {
	*Initiator
	info   Info
	zero   []byte    // one block of zeroes, for WRITE SAME
	pool   sync.Pool // *Command
	limits blockLimits
	fence  fence

	// What the device can do, as probed at open and corrected when it refuses.
	wide      bool        // 16 byte READ and WRITE
	sync16    bool        // SYNCHRONIZE CACHE (16), otherwise (10)
	noSync    bool        // neither: there is no cache to flush
	sameUnmap atomic.Bool // WRITE SAME (16) with UNMAP zeroes and deallocates
	same      atomic.Bool // WRITE SAME (16) without UNMAP
	unmap     bool        // UNMAP
}

func openISCSI(ctx context.Context, a Address, opts Options) (Device, error) {
	i, err := DialInitiator(ctx, a, opts)
	if err != nil {
		return nil, err
	}
	r := &remote{Initiator: i, fence: fence{turn: make(chan struct{}, 1), told: make(chan struct{}, 1)}}
	r.pool.New = func() any { return new(Command) }
	if err := r.setUp(ctx); err != nil {
		i.Close()
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	i.mu.Lock()
	i.onReturn = r.rejoin
	i.mu.Unlock()
	return r, nil
}

// setUp learns what the device is and can.
func (r *remote) setUp(ctx context.Context) error {
	if err := r.ready(ctx); err != nil {
		return err
	}
	var c Command
	buf := make([]byte, longestPage)
	ask := func(what string) ([]byte, error) {
		c.In = buf
		if err := r.run(ctx, &c); err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		return buf[:c.Received], nil
	}
	inquiryCDB(&c.CDB, false, 0, 255)
	c.In = buf[:255]
	if err := r.run(ctx, &c); err != nil {
		return fmt.Errorf("INQUIRY: %w", err)
	}
	standard := slices.Clone(buf[:c.Received])
	inq, err := parseInquiry(standard)
	if err != nil {
		return err
	}
	if inq.qualifier != 0 {
		return r.absent()
	}
	if inq.deviceType != 0 {
		return fmt.Errorf("LUN %d is no disk but a device of type %02Xh", r.addr.LUN, inq.deviceType)
	}
	capa, err := r.capacity(ctx)
	if err != nil {
		return err
	}
	r.info = Info{
		BlockSize: capa.blockSize, Blocks: capa.blocks, PhysicalExponent: capa.exponent,
		Vendor: inq.vendor, Product: inq.product, Revision: inq.revision,
	}
	r.zero = make([]byte, capa.blockSize)

	page := func(p byte) []byte {
		inquiryCDB(&c.CDB, true, p, len(buf))
		b, err := ask("INQUIRY")
		if err != nil {
			return nil
		}
		return append([]byte(nil), b...)
	}
	pages := page(0x00)
	var serial []byte
	if hasVPD(pages, 0x80) {
		serial = page(0x80)
		r.info.Serial = parseSerial(serial)
	}
	r.mu.Lock()
	r.info.ID = r.identity.designator
	// A unit that was not ready at login did not say.
	r.identity.blocks, r.identity.blockSize = capa.blocks, capa.blockSize
	r.mu.Unlock()
	if r.info.ID == "" {
		r.info.ID = fmt.Sprintf("iscsi:%s:%d", r.addr.Target, r.addr.LUN)
	}
	r.info.Identity = newIdentity(standard, serial, page(0x83))
	r.limits = parseBlockLimits(page(0xb0))
	prov := provisioning{}
	if capa.provisioned {
		prov = parseProvisioning(page(0xb2))
	}
	if err := r.probe(ctx, capa, prov); err != nil {
		return err
	}
	return ctx.Err()
}

// probe finds out which commands work, with ones that do no harm.
func (r *remote) probe(ctx context.Context, capa capacity, prov provisioning) error {
	var c Command
	// A READ of no blocks transfers nothing and tells whether it is known.
	r.wide = true
	rwCDB(&c.CDB, false, true, 0, 0)
	if err := r.run(ctx, &c); err != nil && !known(err) {
		if !refused(err) || r.info.Blocks > 1<<32 {
			return fmt.Errorf("READ (16): %w", err)
		}
		r.wide = false
	}
	r.sync16 = true
	if err := r.flush(ctx, &c); err != nil && !known(err) {
		if !refused(err) {
			return fmt.Errorf("SYNCHRONIZE CACHE (16): %w", err)
		}
		r.sync16 = false
		if err := r.flush(ctx, &c); err != nil && !known(err) {
			if !refused(err) {
				return fmt.Errorf("SYNCHRONIZE CACHE (10): %w", err)
			}
			r.noSync = true
		}
	}
	r.info.VolatileCache = !r.noSync && r.writeCache(ctx)

	zeroes := capa.readsZeroes || prov.readsZeroes
	if capa.provisioned && zeroes {
		runs, err := r.lbaStatus(ctx, Extent{Blocks: min(r.info.Blocks, math.MaxUint32)})
		r.info.ReportsAllocation = err == nil && len(runs) > 0
	}
	r.unmap = prov.unmap
	r.same.Store(true)
	r.sameUnmap.Store(prov.writeSame && zeroes)
	r.info.Thin = capa.provisioned && (prov.unmap || prov.writeSame)
	// An UNMAP may leave blocks as they are. WRITE SAME with UNMAP may not, and after
	// UNMAP the device can be asked what it left.
	r.info.UnmapZeroes = r.info.Thin && (r.sameUnmap.Load() || zeroes && r.info.ReportsAllocation)
	r.info.UnmapGranularity = r.limits.unmapGranularity
	limit := uint32(maxCommandBytes / r.info.BlockSize)
	if r.limits.maxTransfer > 0 {
		limit = min(limit, r.limits.maxTransfer)
	}
	if !r.wide {
		limit = min(limit, math.MaxUint16)
	}
	r.info.MaxTransfer = limit
	return nil
}

// known tells from the outcome of a command that did not succeed that the device knows
// it: somebody's reservation kept it from being done. Who serves the device asks whose.
func known(err error) bool { return errors.Is(err, ErrConflict) }

func (r *remote) Info() Info { return r.info }

func (r *remote) ReadAt(ctx context.Context, p []byte, start LBA) error {
	return r.transfer(ctx, p, start, false)
}

func (r *remote) WriteAt(ctx context.Context, p []byte, start LBA) error {
	return r.transfer(ctx, p, start, true)
}

// transfer reads or writes p in commands of at most MaxTransfer blocks.
func (r *remote) transfer(ctx context.Context, p []byte, start LBA, write bool) error {
	bs := uint64(r.info.BlockSize)
	if err := r.admit(ctx, Extent{start, uint64(len(p)) / bs}, len(p), write); err != nil {
		return err
	}
	c := r.get()
	defer r.put(c)
	for len(p) > 0 {
		n := min(uint64(len(p))/bs, uint64(r.info.MaxTransfer))
		part := p[:n*bs]
		rwCDB(&c.CDB, write, r.wide, start, uint32(n))
		if write {
			c.Out = part
		} else {
			c.In = part
		}
		if err := r.run(ctx, c); err != nil {
			return r.failed(c, Extent{start, n}, err)
		}
		p, start = p[n*bs:], start+LBA(n)
	}
	return nil
}

func (r *remote) Flush(ctx context.Context) error {
	if err := r.admit(ctx, Extent{}, 0, false); err != nil {
		return err
	}
	if r.noSync {
		return nil
	}
	c := r.get()
	defer r.put(c)
	if err := r.flush(ctx, c); err != nil {
		return fmt.Errorf("%s: flush: %w", r.addr, err)
	}
	return nil
}

// flush sends SYNCHRONIZE CACHE for the whole medium.
func (r *remote) flush(ctx context.Context, c *Command) error {
	c.Out, c.In = nil, nil
	c.CDB = [16]byte{0: opSyncCache10}
	if r.sync16 {
		c.CDB[0] = opSyncCache16
	}
	return r.run(ctx, c)
}

func (r *remote) Unmap(ctx context.Context, e Extent) error {
	if !r.info.Thin {
		if err := r.admit(ctx, e, 0, false); err != nil {
			return err
		}
		return fmt.Errorf("%s: unmap: %w", r.addr, ErrUnsupported)
	}
	if r.info.UnmapZeroes {
		return r.WriteZeroes(ctx, e)
	}
	if err := r.admit(ctx, e, 0, true); err != nil {
		return err
	}
	if !r.unmap {
		return r.inParts(ctx, e, r.sameLimit(), func(c *Command, part Extent) error { return r.writeSame(ctx, c, part, true) })
	}
	return r.unmapAll(ctx, e)
}

func (r *remote) WriteZeroes(ctx context.Context, e Extent) error {
	if err := r.admit(ctx, e, 0, true); err != nil {
		return err
	}
	if r.sameUnmap.Load() {
		err := r.inParts(ctx, e, r.sameLimit(), func(c *Command, part Extent) error { return r.writeSame(ctx, c, part, true) })
		if !refused(err) {
			return err
		}
		r.sameUnmap.Store(false)
	}
	if r.info.UnmapZeroes && r.unmap && r.info.ReportsAllocation {
		err := r.unmapAndZero(ctx, e)
		if !refused(err) {
			return err
		}
	}
	return r.zeroPlain(ctx, e)
}

// zeroPlain writes zeroes without deallocation.
func (r *remote) zeroPlain(ctx context.Context, e Extent) error {
	if r.same.Load() {
		err := r.inParts(ctx, e, r.sameLimit(), func(c *Command, part Extent) error { return r.writeSame(ctx, c, part, false) })
		if !refused(err) {
			return err
		}
		r.same.Store(false)
	}
	return writeZeroBuffers(ctx, e, &r.info, func(p []byte, at LBA) error { return r.transfer(ctx, p, at, true) })
}

// unmapAndZero unmaps e and writes zeroes to what the device kept.
func (r *remote) unmapAndZero(ctx context.Context, e Extent) error {
	if err := r.unmapAll(ctx, e); err != nil {
		return err
	}
	for at := e.Start; at < e.End(); {
		runs, err := r.Extents(ctx, Extent{at, uint64(e.End() - at)})
		if err != nil {
			return err
		}
		for _, run := range runs {
			if run.Allocated {
				if err := r.zeroPlain(ctx, run.Extent); err != nil {
					return err
				}
			}
			at = run.End()
		}
	}
	return nil
}

func (r *remote) unmapAll(ctx context.Context, e Extent) error {
	return r.inParts(ctx, e, r.zeroLimit(uint64(r.limits.maxUnmapBlocks)), func(c *Command, part Extent) error {
		c.Out = unmapList(part)
		unmapCDB(&c.CDB, len(c.Out))
		return r.run(ctx, c)
	})
}

func (r *remote) writeSame(ctx context.Context, c *Command, part Extent, unmap bool) error {
	c.Out = r.zero
	writeSameZeroes(&c.CDB, part.Start, uint32(part.Blocks), unmap, false)
	return r.run(ctx, c)
}

func (r *remote) sameLimit() uint64 { return r.zeroLimit(r.limits.maxWriteSame) }

// zeroLimit is how many blocks one command zeroes or unmaps, of as many as the device
// says it takes; 0 says nothing.
func (r *remote) zeroLimit(said uint64) uint64 {
	if said == 0 {
		return uint64(maxZeroBytes / r.info.BlockSize)
	}
	return min(said, uint64(maxZeroCommand/r.info.BlockSize))
}

// inParts does a command on e in parts of at most limit blocks.
func (r *remote) inParts(ctx context.Context, e Extent, limit uint64, do func(*Command, Extent) error) error {
	c := r.get()
	defer r.put(c)
	limit = min(limit, math.MaxUint32)
	for at := e.Start; at < e.End(); {
		part := Extent{at, min(limit, uint64(e.End()-at))}
		if err := do(c, part); err != nil {
			return r.failed(c, part, err)
		}
		at = part.End()
	}
	return nil
}

func (r *remote) Extents(ctx context.Context, e Extent) ([]Allocation, error) {
	if err := r.admit(ctx, e, 0, false); err != nil {
		return nil, err
	}
	if e.Empty() {
		return nil, nil
	}
	if !r.info.ReportsAllocation {
		return []Allocation{{Extent: e, Allocated: true}}, nil
	}
	var out []Allocation
	at := e.Start
	// Some devices describe few runs, or a short stretch, in one answer.
	for calls := 0; calls < statusCalls && at < e.End() && len(out) < extentsPerCall; calls++ {
		runs, err := r.lbaStatus(ctx, Extent{at, uint64(e.End() - at)})
		if err != nil {
			return nil, fmt.Errorf("%s: allocation of %v: %w", r.addr, e, err)
		}
		for _, run := range runs {
			out = appendRun(out, run)
		}
		at = out[len(out)-1].End()
	}
	return out, nil
}

func (r *remote) lbaStatus(ctx context.Context, e Extent) ([]Allocation, error) {
	c := r.get()
	defer r.put(c)
	c.In = make([]byte, 8+16*statusRuns)
	getLBAStatusCDB(&c.CDB, e.Start, len(c.In))
	if err := r.run(ctx, c); err != nil {
		return nil, err
	}
	return parseLBAStatus(c.In[:c.Received], e)
}

func (r *remote) admit(ctx context.Context, e Extent, n int, change bool) error {
	if r.closed.Load() {
		return fmt.Errorf("%s: %w", r.addr, ErrClosed)
	}
	if err := admit(ctx, &r.info, e, n); err != nil {
		return fmt.Errorf("%s: %w", r.addr, err)
	}
	if change && r.opts.ReadOnly {
		return fmt.Errorf("%s: %w", r.addr, errWriteProtected())
	}
	return nil
}

// failed names the device and the blocks in an error.
func (r *remote) failed(c *Command, e Extent, err error) error {
	return fmt.Errorf("%s: command %02Xh on %v: %w", r.addr, c.CDB[0], e, err)
}

func (r *remote) get() *Command { return r.pool.Get().(*Command) }

func (r *remote) put(c *Command) {
	c.Out, c.In = nil, nil
	r.pool.Put(c)
}

// ready waits until the unit accepts commands.
func (r *remote) ready(ctx context.Context) error {
	var c Command
	if err := r.run(ctx, &c); err != nil {
		var sense *SenseError
		if errors.As(err, &sense) && sense.Key == senseIllegalRequest && sense.ASC == 0x25 {
			return r.absent()
		}
		return fmt.Errorf("TEST UNIT READY: %w", err)
	}
	return nil
}

func (r *remote) absent() error {
	return fmt.Errorf("the target has no logical unit %d: correct the number at the end of the address", r.addr.LUN)
}

func (r *remote) capacity(ctx context.Context) (capacity, error) {
	var c Command
	c.In = make([]byte, 32)
	readCapacity16CDB(&c.CDB, len(c.In))
	err := r.run(ctx, &c)
	if err == nil {
		return parseCapacity16(c.In[:c.Received])
	}
	if !refused(err) {
		return capacity{}, fmt.Errorf("READ CAPACITY (16): %w", err)
	}
	c.CDB = [16]byte{0: opReadCapacity10}
	c.In = c.In[:8]
	if err := r.run(ctx, &c); err != nil {
		return capacity{}, fmt.Errorf("READ CAPACITY (10): %w", err)
	}
	capa, err := parseCapacity10(c.In[:c.Received])
	if err == nil && binary.BigEndian.Uint32(c.In) == math.MaxUint32 {
		err = errors.New("READ CAPACITY (16) is not supported and the unit is too large for READ CAPACITY (10)")
	}
	return capa, err
}

// writeCache asks for WCE. A device that does not say is taken to have a
// volatile cache.
func (r *remote) writeCache(ctx context.Context) bool {
	var c Command
	c.In = make([]byte, 192)
	// DBD: no block descriptors, the caching page.
	c.CDB = [16]byte{opModeSense6, 0x08, 0x08, 0, byte(len(c.In))}
	if err := r.run(ctx, &c); err != nil {
		return true
	}
	wce, known := parseWriteCache(c.In[:c.Received])
	return wce || !known
}
