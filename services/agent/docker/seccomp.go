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

// bounded are the rules for system calls that are allowed with some arguments only. What
// changes limits and priorities of a process does so for that which calls: init is a process
// of the same user, and hands what it has on to the programs that come later.
var bounded = []specs.LinuxSyscall{
	{Names: []string{"prlimit64"}, Args: []specs.LinuxSeccompArg{equal(0, 0)}},
	{Names: []string{"prlimit64"}, Args: []specs.LinuxSeccompArg{equal(2, 0)}}, // it only asks
	{Names: []string{"setpriority"}, Args: []specs.LinuxSeccompArg{equal(0, unix.PRIO_PROCESS), equal(1, 0)}},
	{Names: []string{"ioprio_set"}, Args: []specs.LinuxSeccompArg{equal(0, ioprioProcess), equal(1, 0)}},
	{Names: []string{"sched_setattr"}, Args: []specs.LinuxSeccompArg{equal(0, 0)}},
	{Names: []string{"sched_setscheduler"}, Args: []specs.LinuxSeccompArg{equal(0, 0)}},
	{Names: []string{"sched_setscheduler"}, Args: []specs.LinuxSeccompArg{equal(1, unix.SCHED_NORMAL)}},
}

const ioprioProcess = 1 // IOPRIO_WHO_PROCESS of ioprio_set(2)

func equal(arg uint, value uint64) specs.LinuxSeccompArg {
	return specs.LinuxSeccompArg{Index: arg, Value: value, Op: specs.OpEqualTo}
}

// seccompProfile is Docker's own profile of this build's moby/profiles, less what is
// denied. It does not depend on the engine's version: that of 20.10 lets vsock and
// io_uring through.
func seccompProfile() (string, error) {
	p := seccomp.DefaultProfile()
	rules := slices.Clone(bounded)
	for _, family := range families {
		rules = append(rules, specs.LinuxSyscall{Names: []string{"socket"}, Args: []specs.LinuxSeccompArg{equal(0, family)}})
	}
	ruled := func(name string) bool {
		return slices.ContainsFunc(rules, func(r specs.LinuxSyscall) bool { return slices.Contains(r.Names, name) })
	}
	var kept []*seccomp.Syscall
	for _, rule := range p.Syscalls {
		// A rule that denies (clone3: ENOSYS, so that libc falls back to clone) stays.
		if rule.Action == specs.ActAllow {
			rule.Names = slices.DeleteFunc(rule.Names, func(n string) bool {
				return ruled(n) || slices.Contains(denied, n)
			})
		}
		if len(rule.Names) > 0 {
			kept = append(kept, rule)
		}
	}
	for _, rule := range rules {
		rule.Action = specs.ActAllow
		kept = append(kept, &seccomp.Syscall{LinuxSyscall: rule})
	}
	p.Syscalls = kept
	b, err := json.Marshal(p)
	return string(b), err
}
