//go:build !linux

package overlay

import "errors"

// New opens the device that cfg describes; it is down until Activate. Elsewhere than on Linux: an *OpError that is
// errors.ErrUnsupported, unless cfg.Disabled says that there shall be no device. Errors: *ConfigError, joined, before that.
func New(cfg Config) (Device, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Disabled {
		return newIdle(cfg), nil
	}
	return nil, opError("create", cfg.Name, errors.ErrUnsupported)
}

// Adopt takes over an open device by its descriptors, one a queue. Elsewhere than on Linux: an *OpError that is
// errors.ErrUnsupported; the descriptors stay the caller's. Errors: *ConfigError, joined, before that.
func Adopt(cfg Config, fds ...int) (Device, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return nil, opError("adopt", cfg.Name, errors.ErrUnsupported)
}
