package gateway

import (
	"bytes"
	"encoding/base64"
	"time"
	"unicode/utf8"

	"dayfly.dev/schemas"
)

// logWriter writes pieces of a log.
type logWriter struct {
	*streamWriter
	stamps bool // text: the time before each line
	mid    map[lane]bool
}

func (g *Gateway) newLogWriter(w *response, format streamFormat, stamps bool) *logWriter {
	return &logWriter{streamWriter: g.newStream(w, format), stamps: stamps, mid: map[lane]bool{}}
}

// write writes one piece. id is where a client may go on from.
func (l *logWriter) write(p piece, id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.piece()
	if l.format == formatText {
		l.text(p)
		return l.out()
	}
	line := schemas.LogLine{Attempt: p.attempt, Stream: p.stream, Offset: p.offset, At: p.at}
	if utf8.Valid(p.data) {
		line.Data = string(p.data)
	} else {
		line.Base64 = base64.StdEncoding.EncodeToString(p.data)
	}
	if err := l.value("log", id, line); err != nil {
		return err
	}
	return l.out()
}

func (l *logWriter) text(p piece) {
	if !l.stamps {
		l.buf.Write(p.data)
		return
	}
	for line := range bytes.Lines(p.data) {
		if !l.mid[p.lane] {
			l.buf.WriteString(p.at.UTC().Format(time.RFC3339Nano) + " ")
		}
		l.buf.Write(line)
		l.mid[p.lane] = line[len(line)-1] != '\n'
	}
}
