package agent

import (
	"bufio"
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"strings"

	"dayfly.dev/schemas"
)

// comparison holds output against what is expected, however long both are: of each it keeps the
// SHA-256 of its plain form. In that two texts are the same which the way of comparing does
// not tell apart.
type comparison struct {
	how    schemas.Compare
	output *plain
}

func newComparison(how schemas.Compare) *comparison { return &comparison{how, newPlain(how)} }

// Write takes more of the output. It never fails.
func (c *comparison) Write(p []byte) (int, error) { return c.output.Write(p) }

// right says whether all of the output is what is expected.
func (c *comparison) right(ctx context.Context, expected io.Reader) (bool, error) {
	want := newPlain(c.how)
	if _, err := io.Copy(want, untilOver{ctx, expected}); err != nil {
		return false, err
	}
	return want.sum() == c.output.sum(), nil
}

// untilOver reads until ctx ends.
type untilOver struct {
	ctx context.Context
	r   io.Reader
}

func (u untilOver) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// blanksKept is how long white space within a line may be to be part of the plain form as it
// is. Of a longer run that has its SHA-256.
const blanksKept = 1 << 10

// plain makes the plain form of a text.
type plain struct {
	how     schemas.Compare
	all     hash.Hash
	form    *bufio.Writer // into all
	started bool          // anything but white space has come
	lines   int           // line ends that have come since the last other character
	blanks  []byte        // that have come since, of this line
	more    hash.Hash     // of blanks, and what had no room there; nil if there is none
}

func newPlain(how schemas.Compare) *plain {
	all := sha256.New()
	return &plain{how: how, all: all, form: bufio.NewWriterSize(all, 8<<10)}
}

const blanks = " \t\r\v\f"

func isSpace(b byte) bool { return b == '\n' || strings.IndexByte(blanks, b) >= 0 }

// Write implements io.Writer. It never fails, as a hash never does.
func (p *plain) Write(text []byte) (int, error) {
	if p.how == schemas.CompareExact {
		return p.form.Write(text)
	}
	for _, b := range text {
		if p.how == schemas.CompareLines {
			p.line(b)
		} else {
			p.word(b)
		}
	}
	return len(text), nil
}

// word leaves one space between words.
func (p *plain) word(b byte) {
	if isSpace(b) {
		p.lines = 1
		return
	}
	if p.lines > 0 && p.started {
		_ = p.form.WriteByte(' ')
	}
	p.lines, p.started = 0, true
	_ = p.form.WriteByte(b)
}

// line drops white space at the ends of lines, and empty lines at the end.
func (p *plain) line(b byte) {
	switch {
	case b == '\n':
		p.lines++
		p.blanks, p.more = p.blanks[:0], nil
		return
	case isSpace(b):
		if p.blanks = append(p.blanks, b); len(p.blanks) >= blanksKept {
			p.fold()
		}
		return
	}
	for ; p.lines > 0; p.lines-- {
		_ = p.form.WriteByte('\n')
	}
	if p.more != nil {
		p.fold()
		p.blanks = p.more.Sum(p.blanks)
	}
	_, _ = p.form.Write(p.blanks)
	p.blanks, p.more = p.blanks[:0], nil
	_ = p.form.WriteByte(b)
}

func (p *plain) fold() {
	if p.more == nil {
		p.more = sha256.New()
	}
	_, _ = p.more.Write(p.blanks)
	p.blanks = p.blanks[:0]
}

func (p *plain) sum() (sum [sha256.Size]byte) {
	_ = p.form.Flush()
	p.all.Sum(sum[:0])
	return sum
}
