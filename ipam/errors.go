package ipam

import "errors"

// reason is why a request is refused, for callers that decide on it.
type reason string

func (r reason) Error() string { return string(r) }

const (
	invalid     reason = "invalid"
	taken       reason = "taken"
	exhausted   reason = "exhausted"
	unknownPool reason = "unknown pool"
)

// IsInvalid reports whether a request could never be granted as it is.
func IsInvalid(err error) bool { return errors.Is(err, invalid) }

// IsTaken reports whether somebody else holds the address requested.
func IsTaken(err error) bool { return errors.Is(err, taken) }

// IsExhausted reports whether there was no free address in the pool, or no free pool to choose.
func IsExhausted(err error) bool { return errors.Is(err, exhausted) }

// IsUnknownPool reports whether the pool of the request is not held.
func IsUnknownPool(err error) bool { return errors.Is(err, unknownPool) }
