// Conformance runs libiscsi's conformance suite, iscsi-test-cu, against lunshift in
// every phase of a migration, and against tgtd beside it, and prints what each case
// gave.
//
// The suite reports a case that it could not run as passed and says so in its output
// only. Here a case is passed, failed or skipped; what is skipped, and what prints a
// failure and passes all the same, must be in a table with its reason (expect.go).
package main
