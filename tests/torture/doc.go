// Package torture crashes the real lunshift, over and over, under load from several
// sessions, and holds every block to what was acknowledged.
//
// TestKillsLoseNoAcknowledgedWrite kills it at random instants and at its failpoints, in
// every phase. TestHistoriesAreLinearizable has concurrent clients fight for a few
// blocks across kills. TestPowerLossLosesNothingThatWasDurable cuts the power of its
// disk as well. docs/reliability.md says which promise rests on which test, and what
// these tests cannot show.
//
// `make torture` runs the long tier, SEED and DURATION choose what and for how long.
package torture
