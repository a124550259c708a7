// Package judge lets real submissions be judged, right, wrong and hostile ones, in
// containers of images that are built from Debian's packages.
package judge

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// patience bounds each wait for a fact.
const patience = 2 * time.Minute

type built struct{ dir, bin, prefix, kinds string }

// build builds dayfly, the images of the kinds, and a folder of the kinds as they are
// delivered, but for the names of the images.
var build = sync.OnceValues(func() (built, error) {
	dir, err := os.MkdirTemp("", "dayfly-judge-")
	if err != nil {
		return built{}, err
	}
	b := built{dir: dir, prefix: "dayfly-" + strings.ToLower(rand.Text()[:10]) + "/", kinds: filepath.Join(dir, "kinds")}
	if b.bin, err = harness.Binaries(context.Background(), dir); err != nil {
		return b, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*patience)
	defer cancel()
	make := exec.CommandContext(ctx, "../../deploy/images/build")
	make.Env = append(os.Environ(), "TAG_PREFIX="+b.prefix)
	if out, err := make.CombinedOutput(); err != nil {
		return b, fmt.Errorf("build the images: %w\n%s", err, out)
	}
	files, err := filepath.Glob("../../deploy/kinds/*.yaml")
	if err != nil {
		return b, err
	}
	if err := os.Mkdir(b.kinds, 0o755); err != nil {
		return b, err
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return b, err
		}
		text = []byte(strings.Replace(string(text), "image: dayfly/", "image: "+b.prefix, 1))
		if err := os.WriteFile(filepath.Join(b.kinds, filepath.Base(f)), text, 0o644); err != nil {
			return b, err
		}
	}
	return b, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if b, _ := build(); b.dir != "" {
		for _, name := range []string{"python:3", "judge-c:12", "judge-sh:1"} {
			if err := harness.RemoveImage(context.Background(), b.prefix+name); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				fmt.Fprintln(os.Stderr, err)
			}
		}
		_ = os.RemoveAll(b.dir)
	}
	os.Exit(code)
}

// start runs a dayfly with the kinds, which goes with the test.
func start(t *testing.T, args ...string) (*harness.Up, *client.Client) {
	t.Helper()
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	up := harness.NewFor(t, b.bin, append([]string{"--kinds", b.kinds, "--cpus", "32", "--sync", "default", "--tcp-ports", ""}, args...)...)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := up.Start(ctx); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(up.URL)
	if err != nil {
		t.Fatal(err)
	}
	return up, c
}

// submission is the payload of a judge.
type submission struct {
	Source       string              `json:"source"`
	Tests        []schemas.JudgeTest `json:"tests"`
	Limits       map[string]string   `json:"limits,omitempty"`
	Compare      string              `json:"compare,omitempty"`
	ShortCircuit bool                `json:"short_circuit,omitempty"`
}

func submit(t *testing.T, c *client.Client, kind string, s any) schemas.Task {
	t.Helper()
	payload, err := schemas.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	task, err := c.Create(t.Context(), schemas.Spec{Kind: kind, Payload: payload}, client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// judge waits for the verdict.
func judge(t *testing.T, c *client.Client, kind string, s any) schemas.Task {
	t.Helper()
	task := submit(t, c, kind, s)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	task, err := c.Wait(ctx, task.ID)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

// verdicts lists those of a task: of the compile stage, if it failed, or of the tests.
func verdicts(task schemas.Task) string {
	if task.Result == nil {
		return fmt.Sprintf("none: %s %s %s", task.State, task.Reason, task.Message)
	}
	if task.Result.Verdict == schemas.VerdictCompileError {
		return string(schemas.VerdictCompileError)
	}
	var list []string
	for _, c := range task.Result.Cases {
		list = append(list, string(c.Verdict))
	}
	return strings.Join(list, " ")
}

var sums = []schemas.JudgeTest{{Stdin: "1 2\n", Expected: "3\n"}, {Stdin: "20 22\n", Expected: "42\n"}}

const c = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n#include <fcntl.h>\n#include <signal.h>\n#include <sys/stat.h>\n#include <sys/shm.h>\n#include <sys/ipc.h>\n#include <sys/socket.h>\n#include <sys/mman.h>\n" +
	"static void sum(void){int a,b; if(scanf(\"%d %d\",&a,&b)==2) printf(\"%d\\n\",a+b); fflush(stdout);}\n"

var submissions = map[string]struct {
	kind, source string
	limits       map[string]string
	want         string // of two tests
}{
	"c, right":                    {"judge-c", c + `int main(){sum();}`, nil, "accepted accepted"},
	"c, wrong on the second":      {"judge-c", c + `int main(){int a,b; scanf("%d %d",&a,&b); printf("%d",a<9?a+b:7);}`, nil, "accepted wrong_answer"},
	"c, reads after the end":      {"judge-c", c + `int main(){sum(); char x[9]; while(read(0,x,9)>0); if(read(0,x,9)!=0) return 1;}`, nil, "accepted accepted"},
	"c, says nothing":             {"judge-c", c + `int main(){}`, nil, "wrong_answer wrong_answer"},
	"c, infinite loop":            {"judge-c", c + `int main(){for(volatile int i=0;;i++);}`, map[string]string{"cpu": "200ms"}, "time_limit time_limit"},
	"c, loop in a child":          {"judge-c", c + `int main(){sum(); if(!fork()) for(volatile int i=0;;i++); pause();}`, map[string]string{"cpu": "200ms"}, "time_limit time_limit"},
	"c, sleeps":                   {"judge-c", c + `int main(){sum(); sleep(100);}`, map[string]string{"wall": "300ms"}, "time_limit time_limit"},
	"c, memory hog":               {"judge-c", c + `int main(){for(;;){char*p=malloc(1<<20); if(p) memset(p,1,1<<20);}}`, map[string]string{"memory": "24MiB"}, "memory_limit memory_limit"},
	"c, loop in full memory":      {"judge-c", c + `int main(){char*p=malloc(22<<20); memset(p,1,22<<20); for(volatile int i=0;;i++);}`, map[string]string{"memory": "24MiB", "cpu": "200ms"}, "time_limit time_limit"},
	"c, sleeps in full memory":    {"judge-c", c + `int main(){char*p=malloc(22<<20); memset(p,1,22<<20); sleep(100);}`, map[string]string{"memory": "24MiB", "wall": "500ms"}, "time_limit time_limit"},
	"c, a child is the hog":       {"judge-c", c + `int main(){sum(); if(!fork()) for(;;){char*p=malloc(1<<20); if(p) memset(p,1,1<<20);} sleep(1);}`, map[string]string{"memory": "24MiB"}, "memory_limit memory_limit"},
	"c, output flood":             {"judge-c", c + `int main(){for(;;) puts("flood");}`, nil, "output_limit output_limit"},
	"c, crash":                    {"judge-c", c + `int main(){sum(); *(volatile int*)0=1;}`, nil, "runtime_error runtime_error"},
	"c, exit code":                {"judge-c", c + `int main(){sum(); return 3;}`, nil, "runtime_error runtime_error"},
	"c, abort":                    {"judge-c", c + `int main(){sum(); abort();}`, nil, "runtime_error runtime_error"},
	"c, fork bomb":                {"judge-c", c + `int main(){for(;;) fork();}`, map[string]string{"cpu": "300ms", "wall": "2s", "memory": "256MiB"}, "time_limit time_limit"}, // room for all of them
	"c, fork bomb that answers":   {"judge-c", c + `int main(){sum(); for(int i=0;i<30;i++) if(!fork()) for(;;) {fork(); setsid();} _exit(0);}`, map[string]string{"cpu": "10s", "wall": "20s", "memory": "256MiB"}, "accepted accepted"},
	"c, leaves daemons":           {"judge-c", c + `int main(){sum(); if(!fork()){setsid(); if(!fork()){clearenv(); for(int i=0;i<999;i++) close(i); for(;;){int f=open("/tmp/mark",O_CREAT|O_RDWR,0600); close(f); usleep(100);}} _exit(0);} usleep(20000); return 0;}`, nil, "accepted accepted"},
	"c, finds what it left":       {"judge-c", c + `int main(){struct stat s; char*w[]={"/tmp/mark","/task/output/mark","/dev/shm/mark"}; int n=0; for(int i=0;i<3;i++){ if(!stat(w[i],&s)) n++; int f=open(w[i],O_CREAT|O_RDWR,0600); if(f<0) return 9; write(f,"x",1); } if(shmget(77,4096,0)>=0) n++; shmget(77,4096,IPC_CREAT|0600); if(n) return 8; sum();}`, nil, "accepted accepted"},
	"c, marks the places":         {"judge-c", "#include <sys/xattr.h>\n#include <sys/ioctl.h>\n#include <utime.h>\n" + c + `int main(){char*w[]={"/tmp","/task/output"}; for(int i=0;i<2;i++){ struct stat s; char b[9]; long g=0; if(stat(w[i],&s)||s.st_mtime||s.st_atime||(s.st_mode&07777)!=0755) return 6; if(getxattr(w[i],"user.x",b,9)>=0) return 7; int f=open(w[i],O_RDONLY); ioctl(f,0x80086601,&g); if(g&0x40) return 8; g=0x40; ioctl(f,0x40086602,&g); setxattr(w[i],"user.x","1",1,0); chmod(w[i],01700); utime(w[i],0);} sum();}`, nil, "accepted accepted"},
	"c, closes what it left":      {"judge-c", c + `int main(){sum(); mkdir("/tmp/a",0700); mkdir("/tmp/a/b",0700); int f=open("/tmp/a/b/c",O_CREAT|O_RDWR,0); (void)f; chmod("/tmp/a/b",0); chmod("/tmp/a",0); chmod("/tmp",0); return 0;}`, nil, "accepted accepted"},
	"c, deep folders":             {"judge-c", c + `int main(){sum(); chdir("/tmp"); for(int i=0;i<3000;i++){ if(mkdir("a",0700)||chdir("a")) return 7;} return 0;}`, nil, "accepted accepted"},
	"c, fills the disk":           {"judge-c", c + `int main(){sum(); signal(SIGXFSZ,SIG_IGN); static char b[1<<16]; char*w[]={"/tmp/f","/task/output/f","/dev/shm/f"}; for(int i=0;i<3;i++){int f=open(w[i],O_CREAT|O_RDWR,0600); while(write(f,b,sizeof b)>0);} return 0;}`, map[string]string{"memory": "256MiB"}, "accepted accepted"},
	"c, disk beyond its memory":   {"judge-c", c + `int main(){sum(); static char b[1<<16]; int f=open("/tmp/f",O_CREAT|O_RDWR,0600); while(write(f,b,sizeof b)>0); return 0;}`, map[string]string{"memory": "24MiB"}, "memory_limit memory_limit"},
	"c, changes what is compiled": {"judge-c", c + `int main(int n,char**v){sum(); if(!chmod(v[0],0777)||!unlink(v[0])||!rename(v[0],"/tmp/x")||open(v[0],O_WRONLY)>=0) return 6; return 0;}`, nil, "accepted accepted"},
	"c, kills all":                {"judge-c", c + `int main(){sum(); kill(1,9); kill(1,11); kill(1,19); kill(1,15); kill(-1,9); return 0;}`, nil, "accepted accepted"},
	"c, all signals for init":     {"judge-c", c + `int main(){sum(); for(int s=1;s<65;s++) for(int i=0;i<50;i++) kill(1,s); return 0;}`, nil, "accepted accepted"},
	"c, stops itself":             {"judge-c", c + `int main(){sum(); raise(SIGSTOP); return 0;}`, map[string]string{"wall": "300ms"}, "time_limit time_limit"},
	"c, floods stderr":            {"judge-c", c + `int main(){sum(); static char b[1<<16]; for(;;) write(2,b,sizeof b);}`, map[string]string{"cpu": "200ms", "wall": "2s"}, "time_limit time_limit"},
	"c, hides its output": {"judge-c", c + `#define _(f) do{union{char b[CMSG_SPACE(4)];struct cmsghdr h;}u; char x=0; struct iovec v={&x,1}; struct msghdr m={0}; m.msg_iov=&v; m.msg_iovlen=1; m.msg_control=u.b; m.msg_controllen=sizeof u.b; u.h.cmsg_level=SOL_SOCKET; u.h.cmsg_type=SCM_RIGHTS; u.h.cmsg_len=CMSG_LEN(4); memcpy(CMSG_DATA(&u.h),&f,4); if(sendmsg(s[0],&m,0)!=1) return 5;}while(0)
int main(){sum(); int s[2],one=1; if(socketpair(AF_UNIX,SOCK_DGRAM,0,s)) return 4; _(one); _(s[0]); _(s[1]); return 0;}`, nil, "accepted accepted"},
	"c, memory without a process": {"judge-c", "#define _GNU_SOURCE\n" + c + `int main(){sum(); static char b[1<<16]; int f=memfd_create("x",0); if(f<0) return 3; while(write(f,b,sizeof b)>0); return 0;}`, map[string]string{"memory": "24MiB"}, "memory_limit memory_limit"},
	"c, bounds init":              {"judge-c", "#define _GNU_SOURCE\n#include <sys/resource.h>\n" + c + `int main(){struct rlimit r={8,8}; if(!prlimit(1,RLIMIT_NOFILE,&r,0)) return 7; if(!setpriority(PRIO_PROCESS,1,5)||!setpriority(PRIO_USER,0,5)) return 8; if(prlimit(1,RLIMIT_NOFILE,0,&r)||setrlimit(RLIMIT_NOFILE,&r)||setpriority(PRIO_PROCESS,0,5)) return 9; sum();}`, nil, "accepted accepted"},
	"c, kills itself":             {"judge-c", c + `int main(){sum(); raise(9);}`, nil, "runtime_error runtime_error"},
	"c, closes its output":        {"judge-c", c + `int main(){sum(); close(1); close(2); sleep(100);}`, map[string]string{"wall": "300ms"}, "time_limit time_limit"},
	"c, error":                    {"judge-c", `int main(){ return x; }`, nil, "compile_error"},
	"c, nothing to link":          {"judge-c", `int f(){return 1;}`, nil, "compile_error"},
	"c, endless include":          {"judge-c", "#include \"/dev/zero\"\n", nil, "compile_error"},
	"c, includes itself":          {"judge-c", "#include __FILE__\n#include __FILE__\nint main(){}", nil, "compile_error"},
	"c, huge program":             {"judge-c", "char a[1<<28]={1}; int main(){return a[0]-1;}", nil, "compile_error"},
	"c, compile bomb":             {"judge-c", "#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(A(x))))\n#define C(x) B(B(x))\nint main(){int i=0; C(i++;) return i;}", nil, "compile_error"},
	"c, waits for the compiler":   {"judge-c", "#include \"/dev/stdin\"\nint main(){int a,b;__builtin_scanf(\"%d%d\",&a,&b);__builtin_printf(\"%d\",a+b);}", nil, "accepted accepted"},
	"python, right":               {"judge-python", "print(sum(map(int, input().split())))", nil, "accepted accepted"},
	"python, exception":           {"judge-python", "print(int(input()))", nil, "runtime_error runtime_error"},
	"python, syntax":              {"judge-python", "print(", nil, "compile_error"},
	"python, memory hog":          {"judge-python", "x=[]\nwhile True: x.append('a'*100000)", map[string]string{"memory": "32MiB"}, "memory_limit memory_limit"},
	"python, loop":                {"judge-python", "while True: pass", map[string]string{"cpu": "300ms"}, "time_limit time_limit"},
	"shell, right":                {"judge-sh", "read a b; echo $((a + b))", nil, "accepted accepted"},
	"shell, talks to the agent":   {"judge-sh", "ls /.dayfly/c >/dev/null 2>&1; for i in 1 2 3; do echo '{}' | nc -w 1 local:/.dayfly/c/s >/dev/null 2>&1; done; read a b; echo $((a + b))", nil, "accepted accepted"},
}

func TestVerdicts(t *testing.T) {
	_, cl := start(t)
	for name, s := range submissions {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			task := judge(t, cl, s.kind, submission{Source: s.source, Tests: sums, Limits: s.limits})
			if got := verdicts(task); got != s.want || task.State != schemas.Completed {
				b, _ := json.Marshal(task.Result)
				t.Errorf("%s %s: %s, want %s\n%s\n%s", task.State, task.Message, got, s.want, b, task.Stderr)
			}
		})
	}
}
