package torture

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// childEnv makes the test binary the process that writes to a disk and is killed.
const childEnv = "LUNSHIFT_TORTURE_CHILD"

// writeAndDie leaves on a disk what is synced and what is not, and how it got there.
func writeAndDie(dir string) error {
	file := func(name string) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			panic(err)
		}
		return f
	}
	written := file("written")
	written.WriteAt([]byte("synced"), 0)
	written.Sync()
	mapped := file("mapped")
	mapped.Truncate(2 * page)
	m, err := unix.Mmap(int(mapped.Fd()), 0, 2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(m, "synced")
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := d.Sync(); err != nil {
		return err
	}
	written.WriteAt([]byte("newer!"), 0)
	copy(m, "newer!")
	copy(m[page:], "more")
	file("new").WriteAt([]byte("never synced"), 0)
	fresh := file("fresh")
	fresh.WriteAt([]byte("synced"), 0)
	fresh.Sync()
	os.Rename(filepath.Join(dir, "written"), filepath.Join(dir, "renamed"))
	unix.Kill(os.Getpid(), unix.SIGKILL)
	select {}
}

// TestDiskForgetsWhatWasNotSynced holds the disk of these tests to what a power loss may
// do: without it they would prove nothing.
func TestDiskForgetsWhatWasNotSynced(t *testing.T) {
	if dir := os.Getenv(childEnv); dir != "" {
		t.Fatal(writeAndDie(dir))
	}
	d := newDisk(t)
	d.put("dir", nil)
	dir := filepath.Join(d.dir, "dir")
	cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), childEnv+"="+dir, "LUNSHIFT_TORTURE_BINARY=none")
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("the child ended by itself: %v: %s", err, out)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "renamed")); err != nil || string(b) != "newer!" {
		t.Errorf("before the power loss: %q, %v", b, err)
	}
	d.mu.Lock()
	d.gen++
	d.root = d.leave(d.root, rand.New(rand.NewPCG(1, 1)), 0, map[*inode]*inode{})
	d.mu.Unlock()
	for _, name := range []string{"written", "mapped", "fresh"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(b[:6]) != "synced" || !allZero(b[6:]) {
			t.Errorf("%s after the power loss: %q, %v", name, b[:min(len(b), 16)], err)
		}
	}
	for _, name := range []string{"new", "renamed"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			t.Errorf("the name %s was never synced, and is there", name)
		}
	}
}

// TestDiskCutsAFileOffAsAWhole holds the disk to what file systems with a journal do. With
// zeroes for some of the sectors that were cut off, a log of the state that Badger
// was just deleting (it cuts a log off before it removes it) came back as one that was
// damaged, and the service refused to start.
//
// Caught: pages of a file that was cut off judged one by one; what was cut off coming
// back under what was written since.
func TestDiskCutsAFileOffAsAWhole(t *testing.T) {
	old := bytes.Repeat([]byte("synced!!"), page) // 8 pages
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 3))
		d := &disk{}
		in := d.newInode(syscall.S_IFREG)
		in.write(old, 0)
		in.sync()
		in.resize(page / 2)
		want := old[:page/2]
		if seed%2 == 0 {
			in.write([]byte("newer"), 4*page)
		}
		left := d.leave(in, rng, rng.Float64(), map[*inode]*inode{}).data
		switch {
		case len(left) == len(old):
			// The rest of the page at the new end may be zeroes already.
			if !bytes.Equal(left[:page/2], want) || !bytes.Equal(left[page:], old[page:]) {
				t.Fatalf("seed %d: the file has its former length, and not what was in it", seed)
			}
		case seed%2 != 0:
			if !bytes.Equal(left, want) {
				t.Fatalf("seed %d: %d bytes, of which not all are what was synced", seed, len(left))
			}
		case len(left) != 4*page+5 || !bytes.Equal(left[:page/2], want) || !allZero(left[page:4*page]):
			t.Fatalf("seed %d: %d bytes, and what was cut off is back", seed, len(left))
		case !allZero(left[4*page:]) && string(left[4*page:]) != "newer":
			t.Fatalf("seed %d: %q was never written there", seed, left[4*page:])
		}
	}
}

// TestPowerLossLosesNothingThatWasDurable takes the power from a host whose state and
// file units are on one disk, at random instants and at every failpoint. After it
// a block may hold what it held when it was last made durable (a first write of a block,
// a write with FUA, a SYNCHRONIZE CACHE) or anything written since; nothing else.
//
// It caught, in its first run or the second: no flush of first writes, of copies in either direction, of the
// source at the start and at the cutover; a commit whose log is not synced; the
// name of Badger's directory not synced, after which a volume began again in phase
// ready.
func TestPowerLossLosesNothingThatWasDurable(t *testing.T) {
	r := tierOf(t, 10, 100)
	sum := sum{crashes: map[string]int{}}
	defer func() { tell(t, r, sum) }()
	rng := rand.New(rand.NewPCG(r.seed, 2))
	for sum.cycles < int64(r.cycles) {
		t.Run(fmt.Sprint("life ", sum.cycles), func(t *testing.T) { powerLife(t, rng, &sum) })
		if t.Failed() {
			return
		}
	}
}

func powerLife(t *testing.T, rng *rand.Rand, sum *sum) {
	d := newDisk(t)
	path := filepath.Join(t.TempDir(), "old.img")
	before := image(t, path, rng.Uint64()|1<<40, 1)
	d.put("units", map[string][]byte{"old.img": before, "new.img": make([]byte, len(before))})
	d.put("state", nil)
	units := filepath.Join(d.dir, "units")
	source, destination := filepath.Join(units, "old.img"), filepath.Join(units, "new.img")
	mirrored, more := mirror(rng)
	l := newLife(t, newService(t, filepath.Join(d.dir, "state"), volume{volumeName, source, destination, more}), before, 512, rng, sum)
	l.source, l.destination, l.mirrored = content(t, source), content(t, destination), mirrored
	l.power = func() { d.cut(rng) }
	l.live()
	if d.lost < 1000 {
		t.Errorf("%d pages were lost, hardly a power loss", d.lost)
	}
	t.Logf("%d pages lost", d.lost)
}

// startPaused starts the volume after some writes to its source and pauses the copy at
// once.
func (l *life) startPaused() {
	ctx := l.t.Context()
	w := l.work()
	time.Sleep(100 * time.Millisecond)
	w.drain()
	startVolume(ctx, l.s)
	// The start flushes the source, which takes no more writes.
	for i := range l.o.Cells {
		l.o.Cells[i].Flushed()
	}
	st, err := l.s.client.Pause(ctx, volumeName)
	must(l.t, err)
	// Without initiators the copier takes the regions in rising order.
	if done := st.Copied + st.Skipped + st.Compared; done > mayBeCopied/2 {
		l.t.Fatalf("%d bytes were copied before the pause", done)
	}
}

// beforeCopy crashes the volume while it is paused, so that it is known which writes are
// the first of a block.
func (l *life) beforeCopy() {
	l.uncopied = true
	for range 3 {
		l.crash(inMigrating)
	}
	l.uncopied = false
	_, err := l.s.client.Resume(l.t.Context(), volumeName)
	must(l.t, err)
}
