package overlay

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"
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

// OpError says what was refused, by the kernel or by this package. The kernel's errno is in Err, for errors.Is: syscall.EPERM and
// EACCES are os.ErrPermission. What this package refuses itself, as Pipe does packets, has none: Err then is errors.ErrUnsupported
// or one of the errors above, or says in words what is wrong.
type OpError struct {
	Op     string // what was tried: "create", "set MTU", …
	Device string // the device's name; "" where there is none yet
	Err    error
}

// Error names the operation, the device, the cause and, for EPERM, the capability that the operation needs: one line of
// printable text, whatever name the device has.
func (e *OpError) Error() string {
	var b strings.Builder
	b.WriteString("overlay: ")
	b.WriteString(e.Op)
	if e.Device != "" {
		b.WriteString(" " + word(e.Device))
	}
	b.WriteString(": " + oneLine(e.Err.Error()))
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
	Value any    // what the field holds
	Err   error  // why that is refused
}

// Error names field, value and reason: one short line of printable text, whatever came from outside.
func (e *ConfigError) Error() string {
	return fmt.Sprintf("overlay: config: %s: %s: %s", printable(cut(e.Field)), quoteValue(e.Value), oneLine(e.Err.Error()))
}

// Unwrap returns the reason.
func (e *ConfigError) Unwrap() error { return e.Err }

// quoteValue keeps a value on one short line.
func quoteValue(v any) string {
	s := cut(fmt.Sprint(v))
	if _, isString := v.(string); isString {
		return strconv.Quote(s)
	}
	return printable(s)
}

// cut shortens what is too long for a line with other things in it.
func cut(s string) string {
	most := 64
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most] + "…"
}

// needs adds to a permission error which ability the caller lacks.
func needs(err error, ability string) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w (needs %s)", err, ability)
	}
	return err
}
