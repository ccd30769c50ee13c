// Package failpoint marks the places of the code at which a crash is told apart from a
// crash just before or just after: each persist step of the state, each step of
// the write rule and of the mirror, each change of phase.
//
// In the product Here is an empty function. A build with the tag failpoint takes one
// point from the environment, LUNSHIFT_FAILPOINT=point:count, and kills its own
// process at that passage of it; tests/torture runs such a build.
package failpoint
