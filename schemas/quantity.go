package schemas

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/go-json-experiment/json/jsontext"
)

// Duration is a length of time that reads and writes as a Go duration string,
// "15m" or "1h30m".
type Duration time.Duration

// Std returns d as the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// String gives the shortest form: "1h", not "1h0m0s".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

var errDuration = errors.New(`must be a duration such as "90s", "15m" or "1h30m"`)

// UnmarshalText implements encoding.TextUnmarshaler. Its error says what a
// duration looks like and never repeats the input.
func (d *Duration) UnmarshalText(b []byte) error {
	if len(b) > 64 {
		return errDuration
	}
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return errDuration
	}
	*d = Duration(v)
	return nil
}

// Size is a number of bytes. It reads a string such as "256MiB" (k, m and g are
// binary, as in docker -m) or a plain number, and writes a number.
type Size int64

// String gives the size for people: "256MiB".
func (s Size) String() string { return units.CustomSize("%.4g%s", float64(s), 1024, sizeUnits) }

var sizeUnits = []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}

var errSize = errors.New(`must be a size such as "64MiB" or "1GiB", or a whole number of bytes`)

// UnmarshalJSON reads either form. Its error never repeats the input.
func (s *Size) UnmarshalJSON(b []byte) error {
	if text, err := jsontext.AppendUnquote(nil, b); err == nil {
		*s, err = ParseSize(string(text))
		return err
	}
	v, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil {
		return errSize
	}
	*s = Size(v)
	return nil
}

// MarshalJSON writes the bytes as a number.
func (s Size) MarshalJSON() ([]byte, error) { return strconv.AppendInt(nil, int64(s), 10), nil }

// ParseSize reads "256MiB", "64m" or "1024".
func ParseSize(text string) (Size, error) {
	if len(text) == 0 || len(text) > 32 {
		return 0, errSize
	}
	v, err := units.RAMInBytes(text)
	if err != nil {
		return 0, errSize
	}
	return Size(v), nil
}

// CPUs is an amount of processors: 0.5 is half of one.
type CPUs float64

// Nano gives the amount in billionths of a processor, Docker's unit.
func (c CPUs) Nano() int64 { return int64(float64(c)*1e9 + 0.5) }

// String gives "0.5".
func (c CPUs) String() string { return fmt.Sprintf("%.4g", float64(c)) }
