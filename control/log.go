package control

import (
	"io"

	"github.com/sirupsen/logrus"

	"lunshift/conf"
)

// NewLogger is the logger that the configuration asks for, writing to w.
func NewLogger(service conf.Service, w io.Writer) *logrus.Logger {
	log := logrus.New()
	log.SetOutput(w)
	setLog(log, service)
	return log
}

// setLog has the logger log as the configuration asks for.
func setLog(log *logrus.Logger, service conf.Service) {
	level, err := logrus.ParseLevel(service.LogLevel)
	if err != nil {
		level = logrus.InfoLevel // conf lets only levels through
	}
	log.SetLevel(level)
	if service.LogFormat == "json" {
		log.SetFormatter(&logrus.JSONFormatter{})
	} else {
		log.SetFormatter(&logrus.TextFormatter{FullTimestamp: true, DisableColors: true})
	}
}

// QuietLogger writes warnings alone, for commands that have an output of their own.
func QuietLogger(w io.Writer) *logrus.Logger {
	return NewLogger(conf.Service{LogLevel: "warn", LogFormat: "text"}, w)
}
