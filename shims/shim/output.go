package shim

import (
	"context"
	"strings"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// MaxOutput is how much of each stream an answer carries at the most.
const MaxOutput = 1 << 20

// Output gives what the last attempt of a task wrote, the first MaxOutput bytes of each
// stream.
func (s *Shim) Output(ctx context.Context, t schemas.Task) (stdout, stderr []byte, err error) {
	if t.Logs != nil && t.Logs.StdoutBytes <= int64(len(t.Stdout)) && t.Logs.StderrBytes <= int64(len(t.Stderr)) {
		return []byte(t.Stdout), []byte(t.Stderr), nil
	}
	for l, err := range s.Client.Logs(ctx, t.ID, client.LogOptions{Attempt: t.Attempt}) {
		if err != nil {
			return stdout, stderr, err
		}
		b, err := client.LineBytes(l)
		if err != nil {
			return stdout, stderr, err
		}
		if l.Stream == schemas.Stderr {
			stderr = add(stderr, b)
		} else {
			stdout = add(stdout, b)
		}
		if len(stdout) == MaxOutput && len(stderr) == MaxOutput {
			break
		}
	}
	return stdout, stderr, nil
}

func add(to, b []byte) []byte { return append(to, b[:min(len(b), MaxOutput-len(to))]...) }

// Text is bytes as JSON can hold them: those that are no UTF-8 are replaced.
func Text(b []byte) string { return strings.ToValidUTF8(string(b), "\ufffd") }
