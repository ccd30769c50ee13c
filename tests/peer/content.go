package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
)

// Stamp fills p, whole blocks from lba on, with content that no other block,
// seed or version has: an older, misplaced or torn block can be told from the right one.
func Stamp(p []byte, blockSize int, lba uint64, seed, version uint64) {
	for ; len(p) > 0; p, lba = p[blockSize:], lba+1 {
		stampBlock(p[:blockSize], lba, seed, version)
	}
}

func stampBlock(block []byte, lba, seed, version uint64) {
	word := lba*0x9e3779b97f4a7c15 ^ seed*0xbf58476d1ce4e5b9 ^ version*0x94d049bb133111eb
	binary.BigEndian.PutUint64(block, lba)
	binary.BigEndian.PutUint64(block[8:], seed)
	binary.BigEndian.PutUint64(block[16:], version)
	for i := 24; i < len(block); i += 8 {
		// xorshift64*, which must not stand at 0.
		word |= 1
		word ^= word >> 12
		word ^= word << 25
		word ^= word >> 27
		binary.BigEndian.PutUint64(block[i:], word*0x2545f4914f6cdd1d)
	}
}

// Stamped says which version of seed a block holds, false where it holds none
// as a whole. A block of zeroes is version 0 of seed 0 at no address: use Zero.
func Stamped(block []byte, lba, seed uint64) (version uint64, ok bool) {
	if binary.BigEndian.Uint64(block) != lba || binary.BigEndian.Uint64(block[8:]) != seed {
		return 0, false
	}
	version = binary.BigEndian.Uint64(block[16:])
	want := make([]byte, len(block))
	stampBlock(want, lba, seed, version)
	return version, string(want) == string(block)
}

// Zero says whether p is all zeroes.
func Zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// SparseFile makes a file of size bytes of which about share (0 to 1) is
// allocated, in runs of 64 KiB to 4 MiB and holes between them, stamped per 512
// bytes with seed, version 1. It returns the bytes written. The same seed makes
// the same file.
func SparseFile(path string, size uint64, share float64, seed uint64) (written uint64, err error) {
	const grain = 64 << 10
	if size%grain != 0 {
		return 0, fmt.Errorf("%s: the size must be a multiple of %d", path, grain)
	}
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(int64(size)); err != nil {
		return 0, err
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	buf := make([]byte, 4<<20)
	want := uint64(float64(size) * share)
	for offset := uint64(0); offset < size && share > 0; {
		run := min(uint64(1+rng.IntN(len(buf)/grain))*grain, size-offset)
		// A run is written while what was written lags behind the share.
		if float64(written) <= share*float64(offset) && written < want {
			p := buf[:run]
			Stamp(p, 512, offset/512, seed, 1)
			if _, err := f.WriteAt(p, int64(offset)); err != nil {
				return written, err
			}
			written += run
		}
		offset += run
	}
	return written, nil
}

// EmptyFile makes a file of size bytes without storage.
func EmptyFile(path string, size uint64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(int64(size)), f.Close())
}
