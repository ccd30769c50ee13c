//go:build !race

package lun_test

const raceEnabled = false
