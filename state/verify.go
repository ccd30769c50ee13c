package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/fb"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

// verifyFiles checks Badger's files before Badger opens them, and changes none.
//
// Badger goes on without a table that fails its checksum, ends the process on
// one that is cut off, cuts a log at its first unreadable entry, and deletes
// tables that its manifest does not name. Flags that vanish so would have the
// source's older blocks served again; so none of it may happen unseen.
func verifyFiles(dir string) error {
	manifest, err := readManifest(dir)
	if errors.Is(err, fs.ErrNotExist) {
		// Badger writes its manifest before any other file that matters.
		if names, err := filepath.Glob(filepath.Join(dir, "*.sst")); err != nil || len(names) > 0 {
			return fmt.Errorf("%s is missing", badger.ManifestFilename)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", badger.ManifestFilename, err)
	}
	logs, err := filepath.Glob(filepath.Join(dir, "*"+logExt))
	if err != nil {
		return err
	}
	var files errgroup.Group
	files.SetLimit(runtime.GOMAXPROCS(0)) // so many files are in memory at a time
	for id := range manifest.Tables {
		files.Go(func() error { return verifyFile(table.NewFilename(id, dir), verifyTable) })
	}
	for _, name := range logs {
		files.Go(func() error { return verifyFile(name, verifyLog) })
	}
	return files.Wait()
}

func readManifest(dir string) (m badger.Manifest, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("not readable: %v", r)
		}
	}()
	file, err := os.Open(filepath.Join(dir, badger.ManifestFilename))
	if err != nil {
		return m, err
	}
	defer file.Close()
	m, _, err = badger.ReplayManifestFile(file, 0, badger.DefaultOptions(dir).WithLogger(nil))
	return m, err
}

func verifyFile(name string, verify func([]byte) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("not readable: %v", r)
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", filepath.Base(name), err)
		}
	}()
	b, err := os.ReadFile(name)
	if err != nil {
		return reason(err)
	}
	return verify(b)
}

var errCutOff = errors.New("cut off")

// verifyTable checks a table of Badger: blocks | index | length of the index |
// checksum of the index | length of that checksum, lengths big-endian uint32.
func verifyTable(b []byte) error {
	body, sum, err := cutSum(b)
	if err != nil {
		return err
	}
	if len(body) < 4 {
		return errCutOff
	}
	at := len(body) - 4
	n := int(binary.BigEndian.Uint32(body[at:]))
	if n > at {
		return errCutOff
	}
	raw := body[at-n : at]
	if err := y.VerifyChecksum(raw, sum); err != nil {
		return fmt.Errorf("index fails its checksum")
	}
	index := fb.GetRootAsTableIndex(raw, 0)
	for i := range index.OffsetsLength() {
		var o fb.BlockOffset
		if !index.Offsets(&o, i) || uint64(o.Offset())+uint64(o.Len()) > uint64(at-n) {
			return errCutOff
		}
		// A block: entries | offsets | their count, then the checksum of these.
		data, sum, err := cutSum(b[o.Offset() : o.Offset()+o.Len()])
		if err != nil || y.VerifyChecksum(data, sum) != nil {
			return fmt.Errorf("block %d fails its checksum", i)
		}
	}
	return nil
}

// cutSum splits data | checksum | length of the checksum.
func cutSum(b []byte) (data []byte, sum *pb.Checksum, err error) {
	if len(b) < 4 {
		return nil, nil, errCutOff
	}
	at := len(b) - 4
	n := int(binary.BigEndian.Uint32(b[at:]))
	if n > at {
		return nil, nil, errCutOff
	}
	sum = new(pb.Checksum)
	if err := proto.Unmarshal(b[at-n:at], sum); err != nil {
		return nil, nil, err
	}
	if _, known := pb.Checksum_Algorithm_name[int32(sum.Algo)]; !known {
		return nil, nil, fmt.Errorf("unknown checksum")
	}
	return b[:at-n], sum, nil
}

const (
	logHeader = 20 // key id and IV, unused
	// Entries: meta | user meta | key length | value length | expiry (uvarints) |
	// key with its version | value | CRC-32C big-endian of all that.
	logFinish   = "!badger!txn" // the key of the entry that ends a transaction
	versionSize = 8             // behind each key: MaxUint64 - version, big-endian
)

// verifyLog tells a log whose end was torn by a crash from one that was damaged
// later. A transaction is written only after the one before it was synced, so
// behind the first unreadable entry the end of one transaction can lie, its own,
// but not those of two.
func verifyLog(b []byte) error {
	if len(b) < logHeader {
		return nil // created and not yet written
	}
	at, last := logHeader, uint64(0)
	for {
		key, n := logEntry(b[at:])
		if n == 0 {
			break
		}
		if bytes.HasPrefix(key, []byte(logFinish)) {
			last = version(key)
		}
		at += n
	}
	bad := at
	var behind []uint64
	for at < len(b) {
		i := bytes.Index(b[at:], []byte(logFinish))
		if i < 0 {
			break
		}
		at += i
		// Five bytes lie before the key: both metas, the two lengths, no expiry.
		if key, n := logEntry(b[max(at-5, 0):]); n > 0 && bytes.HasPrefix(key, []byte(logFinish)) {
			behind = append(behind, version(key))
		}
		at += len(logFinish)
	}
	if len(behind) > 1 || len(behind) == 1 && last != 0 && behind[0] > last+1 {
		return fmt.Errorf("unreadable at byte %d, with later transactions behind it", bad)
	}
	return nil
}

func version(key []byte) uint64 {
	return math.MaxUint64 - binary.BigEndian.Uint64(key[len(key)-versionSize:])
}

// logEntry is the key of the entry that b begins with, and the entry's length; 0
// where there is no whole one.
func logEntry(b []byte) (key []byte, n int) {
	if len(b) < 2 {
		return nil, 0
	}
	at := 2
	var lengths [3]uint64
	for i := range lengths {
		v, n := binary.Uvarint(b[at:])
		if n <= 0 {
			return nil, 0
		}
		lengths[i], at = v, at+n
	}
	rest := uint64(len(b) - at)
	klen, vlen := lengths[0], lengths[1]
	if klen < versionSize || klen > 1<<16 || vlen > math.MaxUint32 || klen+vlen+crc32.Size > rest {
		return nil, 0
	}
	end := at + int(klen+vlen)
	if crc32.Checksum(b[:end], crc32.MakeTable(crc32.Castagnoli)) != binary.BigEndian.Uint32(b[end:]) {
		return nil, 0
	}
	return b[at : at+int(klen)], end + crc32.Size
}
