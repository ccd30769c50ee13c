//go:build deps

package lunshift

import (
	_ "github.com/dgraph-io/badger/v4"
	_ "github.com/gostor/gotgt/pkg/scsi"
	_ "github.com/pelletier/go-toml/v2"
	_ "github.com/prometheus/client_golang/prometheus/promhttp"
	_ "github.com/schollz/progressbar/v3"
	_ "github.com/HdrHistogram/hdrhistogram-go"
	_ "github.com/sirupsen/logrus"
	_ "github.com/dustin/go-humanize"
	_ "github.com/spf13/cobra"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/time/rate"
	_ "pgregory.net/rapid"
)
