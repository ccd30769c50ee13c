// Package e2e holds the tests of the whole: the built lunshift between two tgtd,
// with qemu and libiscsi as initiators. It has no code outside its tests.
package e2e
