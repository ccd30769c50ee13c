package lun

import (
	"context"
	"errors"
)

func openISCSI(ctx context.Context, a Address, o Options) (Device, error) {
	return nil, errors.New("x")
}
