package ops

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/term"
)

// NewLogger makes the logger of one process. level is debug, info, warn or error.
// format is "json", "console", or "auto": console on a terminal, else JSON. Times
// are UTC with milliseconds.
func NewLogger(w io.Writer, level, format, service string) (zerolog.Logger, error) {
	l, err := zerolog.ParseLevel(level)
	if err != nil || level == "" {
		return zerolog.Nop(), fmt.Errorf("log level must be debug, info, warn or error")
	}
	switch format {
	case "json":
	case "console":
		w = console(w)
	case "auto", "":
		if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			w = console(w)
		}
	default:
		return zerolog.Nop(), fmt.Errorf("log format must be json, console or auto")
	}
	return zerolog.New(w).Level(l).Hook(stamp{}).With().Str("service", service).Logger(), nil
}

func console(w io.Writer) io.Writer {
	return zerolog.ConsoleWriter{Out: w, TimeFormat: time.TimeOnly, NoColor: os.Getenv("NO_COLOR") != ""}
}

// stamp adds the time to each event, without zerolog's global settings.
type stamp struct{}

func (stamp) Run(e *zerolog.Event, _ zerolog.Level, _ string) {
	e.Str(zerolog.TimestampFieldName, time.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00"))
}
