package judge0

import (
	"archive/zip"
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"unicode/utf8"

	"dayfly.dev/schemas"
)

const (
	maxExtract = 10 << 20  // of all additional files together
	maxInline  = 256 << 10 // of files and tests in one request of ours; what is more goes as blobs
)

// fromBase64 reads base64 as Judge0 does: with line ends or without, padded or not.
func fromBase64(s string) ([]byte, error) {
	s = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return -1
		}
		return r
	}, s)
	return base64.RawStdEncoding.DecodeString(strings.TrimRight(s, "="))
}

// unzip gives the files of a zip archive in base64.
func unzip(encoded string) (files []schemas.File, err error) {
	if encoded == "" {
		return nil, nil
	}
	b, err := fromBase64(encoded)
	if err != nil {
		return nil, errors.New("must be a zip archive in base64")
	}
	archive, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, errors.New("must be a zip archive in base64")
	}
	left := int64(maxExtract)
	for _, f := range archive.File {
		switch mode := f.Mode(); {
		case mode.IsDir():
			continue
		case !mode.IsRegular() || !fs.ValidPath(f.Name) || strings.Contains(f.Name, `\`):
			return nil, errors.New("must have plain files below its own root only")
		case len(files) == schemas.MaxFiles:
			return nil, fmt.Errorf("must have at most %d files", schemas.MaxFiles)
		}
		content, err := extract(f, left)
		if err != nil {
			return nil, err
		}
		left -= int64(len(content))
		files = append(files, schemas.File{Path: f.Name, Content: content})
	}
	return files, nil
}

// extract reads a file of an archive, whatever that says of its size.
func extract(f *zip.File, most int64) (string, error) {
	broken := errors.New("has a file that cannot be read")
	r, err := f.Open()
	if err != nil {
		return "", broken
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, most+1))
	switch {
	case int64(len(b)) > most:
		return "", fmt.Errorf("must hold at most %s", schemas.Size(maxExtract))
	case err != nil:
		return "", broken
	}
	return string(b), nil
}

// spill makes blobs of what a request has no room for, the largest first, and of what is no
// text.
func (h handler) spill(ctx context.Context, p *payload) error {
	type piece struct {
		text *string
		blob *schemas.BlobID
	}
	test := &p.Tests[0]
	pieces := []piece{{&test.Stdin, &test.StdinBlob}, {&test.Expected, &test.ExpectedBlob}}
	for i := range p.Files {
		pieces = append(pieces, piece{&p.Files[i].Content, &p.Files[i].Blob})
	}
	slices.SortStableFunc(pieces, func(a, b piece) int { return cmp.Compare(len(*b.text), len(*a.text)) })
	inline := 0
	for _, x := range pieces {
		inline += len(*x.text)
	}
	for _, x := range pieces {
		if inline <= maxInline && utf8.ValidString(*x.text) {
			continue
		}
		blob, _, err := h.Client.PutBlob(ctx, strings.NewReader(*x.text), int64(len(*x.text)))
		if err != nil {
			return err
		}
		inline -= len(*x.text)
		*x.blob, *x.text = blob.Blob, ""
	}
	return nil
}
