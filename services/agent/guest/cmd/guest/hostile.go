package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hostile are calls that the sandbox denies. nil says that one worked.
func hostile() map[string]func() error {
	socket := func(family, kind, proto int) func() error {
		return func() error {
			fd, err := unix.Socket(family, kind, proto)
			if err == nil {
				_ = unix.Close(fd)
			}
			return err
		}
	}
	return map[string]func() error{
		"vsock":  socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0),
		"packet": socket(unix.AF_PACKET, unix.SOCK_RAW, 0),
		"alg":    socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0),
		"raw":    socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP),
		"io_uring": func() error {
			var params [120]byte
			return call(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
		},
		"keyctl":       func() error { return call(unix.SYS_KEYCTL, 0, ^uintptr(2), 0) },
		"userfaultfd":  func() error { return call(unix.SYS_USERFAULTFD, 0, 0, 0) },
		"memfd_secret": func() error { return call(447, 0, 0, 0) },
		"bpf":          func() error { return call(unix.SYS_BPF, 0, 0, 0) },
		"perf":         func() error { return call(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0) },
		"unshare":      func() error { return onThread(func() error { return unix.Unshare(unix.CLONE_NEWUSER) }) },
		"unshare-ns":   func() error { return onThread(func() error { return unix.Unshare(unix.CLONE_NEWNS) }) },
		"setns": func() error {
			return onThread(func() error {
				f, err := os.Open("/proc/1/ns/net")
				if err != nil {
					f, err = os.Open("/proc/self/ns/net")
				}
				if err != nil {
					return err
				}
				defer f.Close()
				return unix.Setns(int(f.Fd()), 0)
			})
		},
		"mount":       func() error { return unix.Mount("none", "/tmp", "tmpfs", 0, "") },
		"remount":     func() error { return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, "") },
		"umount":      func() error { return unix.Unmount("/tmp", unix.MNT_DETACH) },
		"chroot":      func() error { return unix.Chroot("/tmp") },
		"mknod":       func() error { return unix.Mknod("/tmp/sda", unix.S_IFBLK|0o600, 8<<8) },
		"ptrace":      func() error { return onThread(func() error { return unix.PtraceAttach(1) }) },
		"process-vm":  processVM,
		"kill-init":   killInit,
		"setuid":      func() error { return unix.Setresuid(0, 0, 0) },
		"settime":     func() error { return unix.Settimeofday(&unix.Timeval{Sec: 1}) },
		"sethostname": func() error { return unix.Sethostname([]byte("x")) },
		"reboot":      func() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) },
		"write-root":  func() error { return os.WriteFile("/x", nil, 0o600) },
		"write-hosts": func() error { return os.WriteFile("/etc/hosts", []byte("x"), 0o600) },
		"core-pattern": func() error {
			return os.WriteFile("/proc/sys/kernel/core_pattern", []byte("|/x"), 0o600)
		},
		"oom-score": func() error { return os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) },
		"docker":    func() error { _, err := os.Stat("/var/run/docker.sock"); return err },
	}
}

func call(nr, a, b, c uintptr) error {
	if _, _, e := syscall.Syscall6(nr, a, b, c, 0, 0, 0); e != 0 {
		return e
	}
	return nil
}

// onThread runs f on a thread that ends with it.
func onThread(f func() error) error {
	c := make(chan error)
	go func() {
		runtime.LockOSThread()
		c <- f()
	}()
	return <-c
}

func processVM() error {
	var b [8]byte
	local := []unix.Iovec{{Base: &b[0], Len: 8}}
	_, err := unix.ProcessVMReadv(1, local, []unix.RemoteIovec{{Base: 0x400000, Len: 8}}, 0)
	return err
}

// killInit is denied if PID 1 is still there and not stopped after it was sent all
// that a user can send.
func killInit() error {
	for _, s := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP, unix.SIGSEGV, unix.SIGABRT, unix.SIGQUIT, unix.SIGILL, unix.SIGBUS, unix.SIGSYS, unix.SIGHUP, unix.SIGUSR1} {
		_ = unix.Kill(1, s)
	}
	for s := range 65 { // as if they came from elsewhere than a kill
		if unix.Signal(s) == unix.SIGTERM { // ends the task, as it may
			continue
		}
		info := [128 / 8]uint64{uint64(s), uint64(uint32(0xffffffff))} // si_signo, si_errno 0; si_code SI_QUEUE
		_, _, _ = syscall.Syscall6(unix.SYS_RT_SIGQUEUEINFO, 1, uintptr(s), uintptr(unsafe.Pointer(&info)), 0, 0, 0)
	}
	time.Sleep(200 * time.Millisecond)
	b, err := os.ReadFile("/proc/1/stat")
	if err != nil {
		return nil // it is gone
	}
	var pid int
	var name, state string
	if _, err := fmt.Sscan(string(b), &pid, &name, &state); err != nil || state == "T" || state == "Z" {
		return nil
	}
	return fmt.Errorf("init is in state %s", state)
}
