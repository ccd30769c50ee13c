package lun_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"lunshift/iscsi"
	"lunshift/lun"
	"lunshift/target"
	"lunshift/tests/peer"
)

const ourKey, otherKey = 0x6c756e0000000001, 0x6c756e0000000002

// fenced is an array with reservations.
type fenced struct {
	lun peer.LUN
	// persists: registrations outlive a loss of power; names: it tells who is registered.
	persists, names bool
	restart         func(t *testing.T)
}

// kept keeps reservations as an array does over a loss of power.
type kept struct {
	mu   sync.Mutex
	data []byte
}

func (k *kept) Load() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return bytes.Clone(k.data), nil
}

func (k *kept) Save(_ context.Context, data []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.data = bytes.Clone(data)
	return nil
}

// onArrays runs a test on tgtd, which knows neither initiator ports nor APTPL and forgets
// no session's registration, and on our own target, which knows all.
func onArrays(t *testing.T, test func(t *testing.T, a fenced)) {
	t.Run("tgtd", func(t *testing.T) {
		d := peer.StartTgtd(t)
		a := fenced{lun: serve(t, d, 8<<20, peer.Unit{Thin: true})}
		a.restart = func(t *testing.T) {
			t.Helper()
			if err := errors.Join(d.Kill(), d.Start(t.Context())); err != nil {
				t.Fatal(err)
			}
		}
		test(t, a)
	})
	t.Run("own", func(t *testing.T) {
		log := logrus.New()
		log.SetOutput(io.Discard)
		portal := "127.0.0.1:0"
		var s *target.Server
		var served chan error
		store := &kept{}
		backing := lun.Serialize(openPath(t, sparseFile(t, 8<<20), lun.Options{}))
		begin := func(t *testing.T) {
			t.Helper()
			var err error
			if s, err = target.New(target.Config{Portals: []target.Portal{{Address: portal}}, Log: log}); err == nil {
				err = s.Listen()
			}
			if err == nil {
				err = s.AddUnit(target.Unit{IQN: testIQN, LUN: 1, Device: backing, NAA: 0x3000000000000001, Reservations: store})
			}
			if err != nil {
				t.Fatal(err)
			}
			portal = s.Addrs()[0].String()
			server, done := s, make(chan error, 1)
			served = done
			go func() { done <- server.Serve(context.Background()) }()
		}
		end := func(t *testing.T) {
			t.Helper()
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			<-served
		}
		begin(t)
		t.Cleanup(func() { end(t) })
		test(t, fenced{
			lun: peer.LUN{Portal: portal, IQN: testIQN, Number: 1}, persists: true, names: true,
			restart: func(t *testing.T) { end(t); begin(t) },
		})
	})
}

// host is a session of somebody else, past its unit attentions.
func (a fenced) host(t *testing.T, n byte) *peer.Session {
	t.Helper()
	l := a.lun
	l.Initiator = fmt.Sprintf("iqn.2026-11.net.example:forgotten%d", n)
	s, err := l.Login(t.Context(), iscsi.ISID{0x80, 0, 0, 0, 0, n})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for range 8 {
		x, err := s.Do(make([]byte, 6), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		if x.Status == iscsi.StatusGood {
			return s
		}
	}
	t.Fatal("the unit is not ready")
	return nil
}

// writes is the status of a host's write of block 0.
func writes(t *testing.T, s *peer.Session) byte {
	t.Helper()
	for range 8 {
		x, err := s.Do([]byte{0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0}, bytes.Repeat([]byte{0xee}, 512), 0)
		if err != nil {
			t.Fatal(err)
		}
		if x.Status != iscsi.StatusCheckCondition || x.Key != 6 {
			return x.Status
		}
	}
	t.Fatal("unit attentions without end")
	return 0
}

// reserveOut is a PERSISTENT RESERVE OUT of a host.
func reserveOut(t *testing.T, s *peer.Session, action, kind byte, key, newKey uint64, flags ...byte) {
	t.Helper()
	list := make([]byte, 24)
	copy(list[20:], flags)
	for i := range 8 {
		list[i], list[8+i] = byte(key>>(56-8*i)), byte(newKey>>(56-8*i))
	}
	x, err := s.Do([]byte{0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0}, list, 0)
	if err != nil || x.Status != iscsi.StatusGood {
		t.Fatalf("PERSISTENT RESERVE OUT action %d: %+v, %v", action, x, err)
	}
}

// open opens the array's unit as a service does whose state has that name.
func (a fenced) open(t *testing.T, name string, sessions int) (lun.Device, lun.Fencer) {
	t.Helper()
	dev := openPath(t, a.lun.URL(), lun.Options{
		SessionKey: name, Sessions: sessions, InitiatorName: "iqn.2026-11.net.example:gateway",
		PingInterval: 200 * time.Millisecond, LoginTimeout: 5 * time.Second,
	})
	return dev, dev.(lun.Fencer)
}

func fine(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// allSessionsWrite writes so often that each session has its turn.
func allSessionsWrite(t *testing.T, dev lun.Device) {
	t.Helper()
	for n := range 8 {
		fine(t, dev.WriteAt(t.Context(), bytes.Repeat([]byte{byte(n)}, 512), lun.LBA(n)))
	}
}

const (
	good     = byte(iscsi.StatusGood)
	conflict = byte(iscsi.StatusReservationConflict)
)

func TestFenceKeepsOthersFromWriting(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		dev, f := a.open(t, "a/source", 3)
		forgotten := a.host(t, 1)
		if got := writes(t, forgotten); got != good {
			t.Fatalf("before the fence: status %02Xh", got)
		}
		fine(t, f.Fence(t.Context(), ourKey))
		if got := writes(t, forgotten); got != conflict {
			t.Errorf("behind the fence: status %02Xh", got)
		}
		allSessionsWrite(t, dev)
		fine(t, f.Fence(t.Context(), ourKey)) // a look at what is held
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Type != 5 || held.Key != ourKey || len(held.Registrants) != 3 || held.HeldByOther(ourKey) || len(held.Others(ourKey)) > 0 {
			t.Errorf("held: %+v", held)
		}
		if named := held.Registrants[0].Port != ""; named != a.names {
			t.Errorf("registrants: %+v", held.Registrants)
		}
		fine(t, f.Unfence(t.Context(), ourKey))
		if got := writes(t, forgotten); got != good {
			t.Errorf("after the fence: status %02Xh", got)
		}
		if held, err = f.Fenced(t.Context()); err != nil || held.Type != 0 || len(held.Registrants) > 0 {
			t.Errorf("given up, and yet: %+v, %v", held, err)
		}
		fine(t, f.Unfence(t.Context(), ourKey))
		allSessionsWrite(t, dev)
	})
}

// TestFenceOfAnotherIsRefusedAndLeftAlone. Caught: a fence that registers before it looks
// and stays registered; one that takes a reservation of others for its own.
func TestFenceOfAnotherIsRefusedAndLeftAlone(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		first, f := a.open(t, "a/source", 2)
		fine(t, f.Fence(t.Context(), ourKey))
		second, g := a.open(t, "b/source", 2)
		err := g.Fence(t.Context(), otherKey)
		var reserved *lun.ReservedError
		if !errors.Is(err, lun.ErrConflict) || !errors.As(err, &reserved) || reserved.Key != ourKey {
			t.Fatalf("the second fence: %v", err)
		}
		t.Log(err)
		if err := second.WriteAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, lun.ErrConflict) {
			t.Errorf("a write of the second: %v", err)
		}
		fine(t, g.Unfence(t.Context(), otherKey))
		allSessionsWrite(t, first)
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Key != ourKey || len(held.Registrants) != 2 {
			t.Errorf("after the second was refused: %+v", held)
		}
	})
}

// TestOfTwoFencesAtOnceOneIsTaken, and nothing of the other stays. Caught: a fence that
// stays registered after it lost the race.
func TestOfTwoFencesAtOnceOneIsTaken(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		devices, fences, keys := [2]lun.Device{}, [2]lun.Fencer{}, [2]uint64{ourKey, otherKey}
		for i := range 2 {
			devices[i], fences[i] = a.open(t, fmt.Sprint(i), 2)
		}
		raced := 0
		for range 20 {
			var errs [2]error
			var group sync.WaitGroup
			for i := range 2 {
				group.Go(func() { errs[i] = fences[i].Fence(t.Context(), keys[i]) })
			}
			group.Wait()
			won := 0
			if errs[0] != nil {
				won = 1
			}
			if errs[won] != nil || !errors.Is(errs[1-won], lun.ErrConflict) {
				t.Fatalf("fences at once: %v", errs)
			}
			held, err := fences[won].Fenced(t.Context())
			fine(t, err)
			if held.Key != keys[won] || len(held.Others(keys[won])) > 0 {
				t.Fatalf("%x won: %+v", keys[won], held)
			}
			if err := devices[1-won].WriteAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, lun.ErrConflict) {
				t.Errorf("a write of the other: %v", err)
			}
			raced += won
			fine(t, fences[won].Unfence(t.Context(), keys[won]))
		}
		t.Logf("the second won %d times", raced)
	})
}

// TestReturningSessionDoesNotJoinAnothersReservation, which would let it write. Caught: a
// session that registers whoever holds the reservation.
func TestReturningSessionDoesNotJoinAnothersReservation(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		if !a.persists {
			t.Skip("the array forgets its reservations")
		}
		dev, f := a.open(t, "a/source", 2)
		fine(t, f.Fence(t.Context(), ourKey))
		const register, preempt, theirs, persist = 0, 4, 0xbad, 1
		thief := a.host(t, 1)
		reserveOut(t, thief, register, 0, 0, theirs, persist)
		reserveOut(t, thief, preempt, 5, theirs, ourKey)
		a.restart(t)
		for range 4 {
			if err := dev.WriteAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, lun.ErrConflict) {
				t.Fatalf("a write of a returning session: %v", err)
			}
		}
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Key != theirs || len(held.Registrants) != 1 {
			t.Errorf("held: %+v", held)
		}
	})
}

// TestFenceOutlivesAKilledProcess: the process that comes back has the key and the session
// key of the one before. Caught: registrations of dead sessions that stay.
func TestFenceOutlivesAKilledProcess(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		dev, f := a.open(t, "a/source", 2)
		fine(t, f.Fence(t.Context(), ourKey))
		fine(t, dev.Close())
		forgotten := a.host(t, 1)
		if got := writes(t, forgotten); got != conflict {
			t.Errorf("while nobody is there: status %02Xh", got)
		}
		dev, f = a.open(t, "a/source", 2)
		fine(t, f.Fence(t.Context(), ourKey))
		allSessionsWrite(t, dev)
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Key != ourKey || held.Type != 5 || len(held.Registrants) != 2 {
			t.Errorf("back again: %+v", held) // the sessions of before are not counted
		}
		if got := writes(t, forgotten); got != conflict {
			t.Errorf("back again: status %02Xh", got)
		}
		fine(t, f.Unfence(t.Context(), ourKey))
		if got := writes(t, forgotten); got != good {
			t.Errorf("given up: status %02Xh", got)
		}
	})
}

// TestFenceOutlivesAnArrayThatRestarts: by the array's own memory where it has one, else
// because each new session takes it again. Caught: sessions that do not register when they
// come back.
func TestFenceOutlivesAnArrayThatRestarts(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		dev, f := a.open(t, "a/source", 2)
		fine(t, f.Fence(t.Context(), ourKey))
		for len(f.Disturbed()) > 0 {
			<-f.Disturbed()
		}
		a.restart(t)
		allSessionsWrite(t, dev)
		select {
		case <-f.Disturbed():
		case <-time.After(30 * time.Second):
			t.Error("the loss of the sessions is not told")
		}
		if got := writes(t, a.host(t, 1)); got != conflict {
			t.Errorf("after the restart: status %02Xh", got)
		}
		fine(t, f.Fence(t.Context(), ourKey))
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Key != ourKey || held.Type != 5 || len(held.Registrants) != 2 {
			t.Errorf("after the restart: %+v", held)
		}
	})
}

// TestLostFenceIsTakenAgainOnlyWhileItIsFree. Caught: a look that registers whoever holds
// the reservation.
func TestLostFenceIsTakenAgainOnlyWhileItIsFree(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		dev, f := a.open(t, "a/source", 2)
		fine(t, f.Fence(t.Context(), ourKey))
		thief := a.host(t, 1)
		const register, clear, preempt = 0, 3, 4
		const theirs = 0xbad

		// Taken: every write fails and nothing registers itself again.
		reserveOut(t, thief, register, 0, 0, theirs)
		reserveOut(t, thief, preempt, 5, theirs, ourKey)
		for range 4 {
			if err := dev.WriteAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, lun.ErrConflict) {
				t.Fatalf("a write without the fence: %v", err)
			}
		}
		select {
		case <-f.Disturbed():
		case <-time.After(30 * time.Second):
			t.Error("the loss is not told")
		}
		err := f.Fence(t.Context(), ourKey)
		if !errors.Is(err, lun.ErrConflict) {
			t.Fatalf("taken by somebody else: %v", err)
		}
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Key != theirs || len(held.Registrants) != 1 {
			t.Errorf("taken by somebody else: %+v", held)
		}

		// Free again.
		reserveOut(t, thief, clear, 0, theirs, 0)
		fine(t, f.Fence(t.Context(), ourKey))
		allSessionsWrite(t, dev)
		if got := writes(t, thief); got != conflict {
			t.Errorf("taken again: status %02Xh", got)
		}
	})
}

// TestSessionThatLostItsRegistrationRegistersAgain: a conflict under the device's own
// reservation is mended by the command that meets it. Caught: a conflict that is handed up.
func TestSessionThatLostItsRegistrationRegistersAgain(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		dev, f := a.open(t, "a/source", 3)
		fine(t, f.Fence(t.Context(), ourKey))
		// Whoever comes with the key takes away what others have under it.
		_, g := a.open(t, "a/again", 1)
		fine(t, g.Fence(t.Context(), ourKey))
		allSessionsWrite(t, dev)
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Key != ourKey || len(held.Registrants) != 4 {
			t.Errorf("held: %+v", held)
		}
	})
}

func TestBreakFenceTakesTheUnitFromOthers(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		first, f := a.open(t, "a/source", 2)
		fine(t, f.Fence(t.Context(), ourKey))
		registered := a.host(t, 1)
		const register = 0
		reserveOut(t, registered, register, 0, 0, 0xcafe)
		if got := writes(t, registered); got != good {
			t.Errorf("registered: status %02Xh", got)
		}

		second, g := a.open(t, "b/source", 2)
		fine(t, g.BreakFence(t.Context(), otherKey))
		held, err := g.Fenced(t.Context())
		fine(t, err)
		if held.Type != 0 || len(held.Registrants) > 0 {
			t.Errorf("broken: %+v", held)
		}
		fine(t, g.Fence(t.Context(), otherKey))
		allSessionsWrite(t, second)
		for what, err := range map[string]error{"fence": f.Fence(t.Context(), ourKey), "write": first.WriteAt(t.Context(), make([]byte, 512), 0)} {
			if !errors.Is(err, lun.ErrConflict) {
				t.Errorf("%s of the first: %v", what, err)
			}
		}
		if got := writes(t, registered); got != conflict {
			t.Errorf("registered before: status %02Xh", got)
		}

		// One that is held stays, and is alone then.
		reserveOut(t, registered, register, 0, 0, 0xcafe)
		fine(t, g.BreakFence(t.Context(), otherKey))
		if held, err = g.Fenced(t.Context()); err != nil || held.Key != otherKey || len(held.Registrants) != 2 {
			t.Errorf("broken while it was held: %+v, %v", held, err)
		}
		allSessionsWrite(t, second)
	})
}

func TestReservationOfAllRegistrantsIsBroken(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		const register, reserve = 0, 1
		host := a.host(t, 1)
		reserveOut(t, host, register, 0, 0, 0xcafe)
		reserveOut(t, host, reserve, 7, 0xcafe, 0)
		dev, f := a.open(t, "a/source", 2)
		if err := f.Fence(t.Context(), ourKey); !errors.Is(err, lun.ErrConflict) {
			t.Errorf("a fence beside it: %v", err)
		}
		fine(t, f.BreakFence(t.Context(), ourKey))
		fine(t, f.Fence(t.Context(), ourKey))
		allSessionsWrite(t, dev)
		if got := writes(t, host); got != conflict {
			t.Errorf("its holder: status %02Xh", got)
		}
	})
}

// TestDeviceThatIsReservedForOthersOpens: so that it can be said whose it is.
func TestDeviceThatIsReservedForOthersOpens(t *testing.T) {
	onArrays(t, func(t *testing.T, a fenced) {
		const register, reserve, exclusiveAccess = 0, 1, 3
		host := a.host(t, 1)
		reserveOut(t, host, register, 0, 0, 0xcafe)
		reserveOut(t, host, reserve, exclusiveAccess, 0xcafe, 0)
		_, f := a.open(t, "a/source", 1)
		held, err := f.Fenced(t.Context())
		fine(t, err)
		if held.Type != exclusiveAccess || held.Key != 0xcafe {
			t.Errorf("held: %+v", held)
		}
	})
}

func TestFileIsFencedByItsLock(t *testing.T) {
	path := sparseFile(t, 1<<20)
	f := openPath(t, path, lun.Options{}).(lun.Fencer)
	fine(t, f.Fence(t.Context(), ourKey))
	if held, err := f.Fenced(t.Context()); err != nil || !held.Locked {
		t.Errorf("held: %+v, %v", held, err)
	}
	if _, err := lun.Open(t.Context(), path, lun.Options{}); !errors.Is(err, lun.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	fine(t, f.Unfence(t.Context(), ourKey))
	if _, err := lun.Open(t.Context(), path, lun.Options{}); !errors.Is(err, lun.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
}
