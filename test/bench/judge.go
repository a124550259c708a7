package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// judgeAtOnce is how many submissions are judged at a time.
const judgeAtOnce = 16

// judgeTests is how many tests each submission has.
const judgeTests = 20

// judged are the submissions: the same work in C and in Python, compiled once where there
// is something to compile, then run once for each test.
var judged = []struct{ kind, file, source, compile string }{
	{"judge-c", "main.c", "#include <stdio.h>\nint main(){int a,b;scanf(\"%d %d\",&a,&b);printf(\"%d\\n\",a+b);}", "gcc -O2 -o main main.c"},
	{"judge-python", "main.py", "a, b = map(int, input().split())\nprint(a + b)\n", "true"},
}

// judge measures submissions beside the same programs run bare on this machine, by as many
// at a time. It is run from the repository's root.
func judge(ctx context.Context, bin string, n int) (err error) {
	if n == 0 {
		n = 64
	}
	dir, err := os.MkdirTemp("", "dayfly-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	prefix := "dayfly-" + strings.ToLower(rand.Text()[:10]) + "/"
	up, err := harness.New(bin, "--kinds", dir, "--slots", fmt.Sprint(judgeAtOnce), "--cpus", fmt.Sprint(judgeAtOnce))
	if err != nil {
		return err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
		defer cancel()
		err = errors.Join(err, up.Remove(clean), harness.RemoveImage(clean, prefix+"judge-c:12"), harness.RemoveImage(clean, prefix+"python:3"))
	}()
	images := exec.CommandContext(ctx, "deploy/images/build", "judge-c", "python")
	images.Env = append(os.Environ(), "TAG_PREFIX="+prefix)
	if out, err := images.CombinedOutput(); err != nil {
		return fmt.Errorf("build the images: %w: %s", err, out)
	}
	for _, s := range judged {
		b, err := os.ReadFile("deploy/kinds/" + s.kind + ".yaml")
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, s.kind+".yaml"), bytes.Replace(b, []byte("image: dayfly/"), []byte("image: "+prefix), 1), 0o644)
		}
		if err != nil {
			return err
		}
	}
	if err := up.Start(ctx); err != nil {
		return err
	}
	c, err := client.New(up.URL)
	if err != nil {
		return err
	}
	for _, s := range judged {
		if _, err := judgeAll(ctx, c, s.kind, s.source, 4); err != nil { // warm
			return err
		}
		took, err := judgeAll(ctx, c, s.kind, s.source, n)
		if err != nil {
			return err
		}
		bare, err := runBare(ctx, s.file, s.source, s.compile, n)
		if err != nil {
			return err
		}
		runs := float64(n * judgeTests)
		fmt.Printf("%s: %d submissions of %d tests, %d at a time\n  judged  %6.1f submissions/s  %7.0f tests/s\n  bare    %6.1f submissions/s  %7.0f tests/s: x%.2f of the time\n",
			s.kind, n, judgeTests, judgeAtOnce, float64(n)/took.Seconds(), runs/took.Seconds(), float64(n)/bare.Seconds(), runs/bare.Seconds(), took.Seconds()/bare.Seconds())
	}
	one := sample{}
	for range 20 {
		began := time.Now()
		if _, err := judgeAll(ctx, c, "judge-c", judged[0].source, 1); err != nil {
			return err
		}
		one = append(one, time.Since(began))
	}
	fmt.Printf("one submission in C, from POST to its verdict\n  %s\n", one)
	return nil
}

// judgeAll lets n submissions be judged.
func judgeAll(ctx context.Context, c *client.Client, kind, source string, n int) (time.Duration, error) {
	type test struct {
		Stdin    string `json:"stdin"`
		Expected string `json:"expected"`
	}
	var tests []test
	for i := range judgeTests {
		tests = append(tests, test{fmt.Sprintf("%d %d\n", i, i), fmt.Sprint(2 * i)})
	}
	payload, err := schemas.Encode(map[string]any{"source": source, "tests": tests, "limits": map[string]string{"wall": "60s"}})
	if err != nil {
		return 0, err
	}
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * judgeAtOnce) // some wait, so that no slot is empty
	for range n {
		g.Go(func() error {
			t, err := c.Create(ctx, schemas.Spec{Kind: kind, Payload: payload}, client.CreateOptions{Wait: client.UntilDone})
			if err == nil && !t.State.Final() {
				t, err = c.Wait(ctx, t.ID)
			}
			if err == nil && (t.Result == nil || t.Result.Verdict != schemas.VerdictAccepted) {
				err = fmt.Errorf("%s is %s: %s", t.ID, t.State, t.Message)
			}
			return err
		})
	}
	err = g.Wait()
	return time.Since(began), err
}

// runBare compiles and runs the same on this machine, without any sandbox.
func runBare(ctx context.Context, file, source, compile string, n int) (time.Duration, error) {
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(judgeAtOnce)
	for range n {
		g.Go(func() error {
			dir, err := os.MkdirTemp("", "dayfly-bare-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			if err := os.WriteFile(filepath.Join(dir, file), []byte(source), 0o644); err != nil {
				return err
			}
			words := strings.Fields(compile)
			cc := exec.CommandContext(ctx, words[0], words[1:]...)
			cc.Dir = dir
			if out, err := cc.CombinedOutput(); err != nil {
				return fmt.Errorf("compile: %w: %s", err, out)
			}
			for i := range judgeTests {
				run := exec.CommandContext(ctx, "./main")
				if strings.HasSuffix(file, ".py") {
					run = exec.CommandContext(ctx, "python3", file)
				}
				run.Dir, run.Stdin = dir, strings.NewReader(fmt.Sprintf("%d %d\n", i, i))
				out, err := run.Output()
				if err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(2*i) {
					return fmt.Errorf("run: %w: %q", err, out)
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return time.Since(began), err
}
