package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"dayfly.dev/schemas"
)

// judgeLog is the folder of a judge. Its file says what it shall do, and line by line what has
// come of it; beside it are the blobs of its tests, which the cache keeps as long as they are
// there. Like the journal it outlives a kill of the agent, and not a crash of the host.
type judgeLog struct {
	dir    string
	file   *os.File
	spec   schemas.Judge
	result schemas.JudgeResult
}

// judgeLine is one line: the first has the judge, each other the result as it was then, of
// which only what is new is written.
type judgeLine struct {
	Judge   *schemas.Judge        `json:"judge,omitzero"`
	Compile *schemas.JudgeCompile `json:"compile,omitzero"`
	Case    *schemas.JudgeCase    `json:"case,omitzero"`
}

func (a *Agent) judgePath(of schemas.Assignment) string {
	return filepath.Join(a.cfg.StateDir, "judges", fmt.Sprintf("%s-%d", of.Task, of.Attempt))
}

// judgeFile is the name of the file.
const judgeFile = "log"

// newJudgeLog begins the folder of an attempt.
func newJudgeLog(dir string, j schemas.Judge) (*judgeLog, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, judgeFile), os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	l := &judgeLog{dir: dir, file: f, spec: j}
	return l, l.write(judgeLine{Judge: &j})
}

// keep takes the blobs of the tests from where they are.
func (l *judgeLog) keep(paths map[schemas.BlobID]string) error {
	for _, t := range l.spec.Tests {
		for _, id := range []schemas.BlobID{t.StdinBlob, t.ExpectedBlob} {
			if id == "" {
				continue
			}
			if err := os.Link(paths[id], filepath.Join(l.dir, id.Hex())); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("keep a blob of a test: %w", err)
			}
		}
	}
	return nil
}

// open opens what a test gives as a text, or as a blob.
func (l *judgeLog) open(text string, blob schemas.BlobID) (io.ReadCloser, error) {
	if blob == "" {
		return io.NopCloser(strings.NewReader(text)), nil
	}
	return os.Open(filepath.Join(l.dir, blob.Hex()))
}

// openJudgeLog reads the file of an attempt that another agent began. A last line that was
// cut off is dropped.
func openJudgeLog(dir string) (*judgeLog, error) {
	f, err := os.OpenFile(filepath.Join(dir, judgeFile), os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return nil, err
	}
	l := &judgeLog{dir: dir, file: f}
	lines, whole := bufio.NewReader(f), int64(0)
	for first := true; ; first = false {
		b, err := lines.ReadBytes('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			l.close()
			return nil, err
		}
		var line judgeLine
		if err != nil || schemas.Decode(b, &line) != nil || first != (line.Judge != nil) {
			if first {
				l.close()
				return nil, fmt.Errorf("%s does not say what to judge", filepath.Base(dir))
			}
			break
		}
		whole += int64(len(b))
		switch {
		case line.Judge != nil:
			l.spec = *line.Judge
		case line.Compile != nil:
			l.result.Compile = line.Compile
		case line.Case != nil:
			l.result.Cases = append(l.result.Cases, *line.Case)
		}
	}
	if err := f.Truncate(whole); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// add writes what is new.
func (l *judgeLog) add(r schemas.JudgeResult) error {
	if r.Compile != nil && l.result.Compile == nil {
		if err := l.write(judgeLine{Compile: r.Compile}); err != nil {
			return err
		}
	}
	for i := len(l.result.Cases); i < len(r.Cases); i++ {
		if err := l.write(judgeLine{Case: &r.Cases[i]}); err != nil {
			return err
		}
	}
	l.result = r
	return nil
}

func (l *judgeLog) write(line judgeLine) error {
	b, err := schemas.Encode(line)
	if err == nil {
		_, err = l.file.Write(append(b, '\n'))
	}
	return err
}

func (l *judgeLog) close() {
	if l != nil {
		_ = l.file.Close()
	}
}

// forgetJudges removes the folders of judges that no live attempt goes on with. It runs under a.mu.
func (a *Agent) forgetJudges() {
	dir := filepath.Join(a.cfg.StateDir, "judges")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	known := map[string]bool{}
	for _, t := range a.live {
		known[filepath.Base(a.judgePath(t.Assignment))] = true
	}
	for _, e := range entries {
		if !known[e.Name()] {
			_ = os.RemoveAll(filepath.Join(dir, e.Name()))
		}
	}
}
