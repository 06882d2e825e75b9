package overlay

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// Beside these, errors may be tested for os.ErrClosed, os.ErrPermission and errors.ErrUnsupported.
var (
	ErrGone         = errors.New("the device was deleted")                             // final
	ErrDown         = errors.New("the link is down")                                   // passes when the link is up again
	ErrBusy         = errors.New("the device is in use")                               // by another process, or the name is taken
	ErrRestart      = errors.New("fixed for the life of a device")                     // Reload of a fixed field; nothing changed
	ErrPartial      = errors.New("neither the old nor the new configuration is whole") // the next Reload or Activate repairs
	ErrIPv6Disabled = errors.New("IPv6 is disabled on this device or host")
)

// OpError says what the kernel refused. Err holds the errno, for errors.Is: syscall.EPERM and EACCES are os.ErrPermission.
type OpError struct {
	Op     string // what was tried: "create", "set MTU", …
	Device string // the device's name; "" where there is none yet
	Err    error
}

// Error names the operation, the device, the cause and, for EPERM, the capability that the operation needs.
func (e *OpError) Error() string {
	var b strings.Builder
	b.WriteString("overlay: ")
	b.WriteString(e.Op)
	if e.Device != "" {
		b.WriteString(" " + e.Device)
	}
	b.WriteString(": " + e.Err.Error())
	return b.String()
}

// Unwrap returns the cause.
func (e *OpError) Unwrap() error { return e.Err }

// opError returns nil for nil, so that it can wrap any call's result.
func opError(op, device string, err error) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, Device: device, Err: err}
}

// ConfigError says which field of a Config is refused and why; no system call was made.
type ConfigError struct {
	Field string // a path: "Routes[2].Via[1].Weight"
	Value any
	Err   error
}

// Error names field, value and reason.
func (e *ConfigError) Error() string {
	return fmt.Sprintf("overlay: config: %s: %s: %v", e.Field, quoteValue(e.Value), e.Err)
}

// Unwrap returns the reason.
func (e *ConfigError) Unwrap() error { return e.Err }

// quoteValue keeps what came from outside on one short line of printable text.
func quoteValue(v any) string {
	const most = 64
	s := fmt.Sprint(v)
	if len(s) > most {
		s = s[:most] + "…"
	}
	if _, isString := v.(string); isString {
		return fmt.Sprintf("%q", s)
	}
	return s
}

// needs adds to a permission error which ability the caller lacks.
func needs(err error, ability string) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w (needs %s)", err, ability)
	}
	return err
}
