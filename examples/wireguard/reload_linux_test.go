package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"example.com/overlay"

	"github.com/sirupsen/logrus"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
)

// reluctant is a Device whose next Reloads fail so.
type reluctant struct {
	overlay.Device
	errs []error
	mtus []int // that it was asked for
}

func (r *reluctant) Reload(cfg overlay.Config) error {
	r.mtus = append(r.mtus, cfg.MTU)
	if len(r.errs) > 0 {
		err := r.errs[0]
		r.errs = r.errs[1:]
		return err
	}
	return r.Device.Reload(cfg)
}

// Where a reload of the device's half is neither done nor undone the daemon goes back, and tells if there is no way.
func TestReloadHalfDone(t *testing.T) {
	half := fmt.Errorf("MTU: %w", overlay.ErrPartial)
	for _, test := range []struct {
		name string
		errs []error
		mtus string
		says string
	}{
		{"done", nil, "[1390]", "<nil>"},
		{"undone", []error{errors.New("no")}, "[1390]", "no"},
		{"half", []error{half}, "[1390 1400]", half.Error() + "; what was in force is so again"},
		{"half, and half back", []error{half, half}, "[1390 1400]", half.Error() + "; and there is no way back: " + half.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "wg0.conf")
			write := func(text string) {
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write(minimal("MTU = 1400\n", ""))
			in, err := load(t.Context(), path, nil)
			if err != nil {
				t.Fatal(err)
			}
			dev, host, err := overlay.Pipe(in.cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			log := logrus.New()
			log.SetOutput(io.Discard)
			wg := device.NewDevice(newTunnel(dev), conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
			defer wg.Close()
			d := &daemon{path: path, log: logrus.NewEntry(log), dev: &reluctant{Device: dev, errs: test.errs}, wg: wg, settings: in}
			write(minimal("MTU = 1390\n", ""))
			err = d.reload(t.Context())
			if mtus := fmt.Sprint(d.dev.(*reluctant).mtus); fmt.Sprint(err) != test.says || mtus != test.mtus {
				t.Errorf("%v, and reloads with MTU %s; want %s, %s", err, mtus, test.says, test.mtus)
			}
			if in := fmt.Sprint(d.settings.cfg.MTU); (err == nil) != (in == "1390") || !strings.Contains("1390 1400", in) {
				t.Errorf("the daemon takes MTU %s for what is in force", in)
			}
		})
	}
}
