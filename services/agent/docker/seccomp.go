package docker

import (
	"encoding/json"
	"slices"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// denied are system calls that Docker's profile allows, some with a capability or
// on some kernels, and that no task needs: what they reach has broken containers
// before. A call that the engine's profile does not know at all is denied anyway.
var denied = []string{
	"io_uring_enter", "io_uring_register", "io_uring_setup",
	"keyctl", "add_key", "request_key",
	"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd",
	"userfaultfd", "memfd_secret", "vmsplice",
	"socketcall", // 32-bit: would get around the rule for socket
	"unshare", "setns", "mount", "mount_setattr", "move_mount", "open_tree", "umount", "umount2",
	"fsopen", "fsconfig", "fsmount", "fspick", "open_by_handle_at", "name_to_handle_at",
	"bpf", "perf_event_open", "fanotify_init", "lookup_dcookie", "quotactl", "quotactl_fd", "syslog", "vhangup",
	"init_module", "finit_module", "delete_module", "reboot", "acct", "iopl", "ioperm",
	"settimeofday", "stime", "clock_settime", "clock_settime64", "setdomainname", "sethostname",
}

// families are the address families that socket may open: no vsock (it reaches the
// hypervisor), no packet, no alg.
var families = []uint64{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}

// seccompProfile is Docker's own profile of this build's moby/profiles, less what is
// denied. It does not depend on the engine's version: that of 20.10 lets vsock and
// io_uring through.
func seccompProfile() (string, error) {
	p := seccomp.DefaultProfile()
	var kept []*seccomp.Syscall
	for _, rule := range p.Syscalls {
		// A rule that denies (clone3: ENOSYS, so that libc falls back to clone) stays.
		if rule.Action == specs.ActAllow {
			rule.Names = slices.DeleteFunc(rule.Names, func(n string) bool {
				return n == "socket" || slices.Contains(denied, n)
			})
		}
		if len(rule.Names) > 0 {
			kept = append(kept, rule)
		}
	}
	for _, family := range families {
		kept = append(kept, &seccomp.Syscall{LinuxSyscall: specs.LinuxSyscall{
			Names: []string{"socket"}, Action: specs.ActAllow,
			Args: []specs.LinuxSeccompArg{{Index: 0, Value: family, Op: specs.OpEqualTo}},
		}})
	}
	p.Syscalls = kept
	b, err := json.Marshal(p)
	return string(b), err
}
