"""The default system call filter: what an instance may call when nobody says otherwise.

It lets through what Docker's default lets through: an allow list, further calls for those
who hold a capability, and a few calls with conditions on their arguments. All else fails
with EPERM. Written as tables of words; `default_profile` turns them into a `Profile`.

Left out on purpose, so that they fail: the kernel keyring (not divided by namespaces),
bpf, perf_event_open, userfaultfd, io_uring (a second way to most system calls, past this
filter), kexec, swapping, module loading, and the calls that mount or make namespaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.linux.seccomp_profile import Profile, Rule

__all__ = ["TABLE_TEXT", "default_profile"]

_ALWAYS = """
accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg
recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair

access chdir chmod chown chown32 close close_range creat dup dup2 dup3 faccessat faccessat2
fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat
fcntl fcntl64 fdatasync flock fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate
ftruncate64 futimesat getcwd getdents getdents64 ioctl lchown lchown32 link linkat lseek
_llseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat
openat2 readahead readlink readlinkat rename renameat renameat2 rmdir stat stat64 statfs
statfs64 statx symlink symlinkat sync sync_file_range syncfs truncate truncate64 umask unlink
unlinkat utime utimensat utimensat_time64 utimes cachestat listmount statmount file_getattr
file_setattr

fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat
llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat

copy_file_range pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readv sendfile
sendfile64 splice tee vmsplice write writev

io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit

_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2
epoll_wait epoll_wait_old eventfd eventfd2 poll ppoll ppoll_time64 pselect6 pselect6_time64
select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
timerfd_settime64 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch

brk madvise memfd_create memfd_secret membarrier mincore mlock mlock2 mlockall mmap mmap2
mprotect mremap mseal msync munlock munlockall munmap remap_file_pages map_shadow_stack
pkey_alloc pkey_free pkey_mprotect

execve execveat exit exit_group fork vfork wait4 waitid waitpid pidfd_open pidfd_send_signal
process_mrelease set_tid_address get_thread_area set_thread_area rseq get_robust_list
set_robust_list futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake restart_syscall
sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min
sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity
sched_setattr sched_setparam sched_setscheduler sched_yield getpriority setpriority nice
ioprio_get ioprio_set getrlimit setrlimit prlimit64 ugetrlimit getrusage times prctl seccomp
landlock_add_rule landlock_create_ruleset landlock_restrict_self uretprobe

getpid getppid getpgid getpgrp getsid gettid setpgid setsid getuid getuid32 geteuid geteuid32
getgid getgid32 getegid getegid32 getresuid getresuid32 getresgid getresgid32 getgroups
getgroups32 setuid setuid32 setgid setgid32 setreuid setreuid32 setregid setregid32 setresuid
setresuid32 setresgid setresgid32 setfsuid setfsuid32 setfsgid setfsgid32 setgroups setgroups32
capget capset

kill tgkill tkill pause sigaltstack sigprocmask sigreturn rt_sigaction rt_sigpending
rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64
rt_tgsigqueueinfo

alarm adjtimex clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime
clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer setitimer gettimeofday nanosleep
time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime
timer_settime64

ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop
semtimedop_time64 shmat shmctl shmdt shmget

getcpu getrandom sysinfo uname
"""

# Allowed to those who hold the capability; a call may stand under several.
_WITH_CAPABILITY = {
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount
        mount_setattr move_mount open_tree open_tree_attr perf_event_open quotactl quotactl_fd
        setdomainname sethostname setns syslog umount umount2 unshare""",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module init_module finit_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": """
        kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace""",
    "CAP_SYS_RAWIO": "iopl ioperm",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
    "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}

_ON_ARCHITECTURE = {
    "amd64 x32": "arch_prctl",
    "amd64 x32 x86": "modify_ldt",
    "arm arm64": """
        arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls""",
    "ppc64le": "sync_file_range2 swapcontext",
    "riscv64": "riscv_flush_icache",
    "s390 s390x": "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr",
}

# Before 4.8 a tracer could change a call after the filter had let it through (seccomp(2)).
_TRACING = "process_vm_readv process_vm_writev ptrace"
_TRACING_KERNEL = (4, 8)

# Linux, SVR4-like short inodes and uname26 switches of personality(2), and "ask only".
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)

_AF_VSOCK = 40

# CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_CLONE_NAMESPACES = 0x7E020000

TABLE_TEXT = repr(
    (
        _ALWAYS,
        _WITH_CAPABILITY,
        _ON_ARCHITECTURE,
        _TRACING,
        _TRACING_KERNEL,
        _PERSONALITIES,
        _AF_VSOCK,
        _CLONE_NAMESPACES,
        "layout 1",
    )
)
"""All that decides the filter, for the key of the cache."""


def default_profile() -> Profile:
    """Return the default profile."""
    import errno

    from hutch.linux.seccomp_profile import Argument, Profile, Rule

    allow = "SCMP_ACT_ALLOW"
    rules = [
        Rule(names=tuple(_ALWAYS.split()), action=allow),
        Rule(names=tuple(_TRACING.split()), action=allow, min_kernel=_TRACING_KERNEL),
        Rule(
            names=("socket",),
            action=allow,
            args=(Argument(index=0, value=_AF_VSOCK, op="SCMP_CMP_NE"),),
        ),
    ]
    rules += [
        Rule(
            names=("personality",),
            action=allow,
            args=(Argument(index=0, value=value, op="SCMP_CMP_EQ"),),
        )
        for value in _PERSONALITIES
    ]
    rules += [
        Rule(names=tuple(words.split()), action=allow, include_arches=tuple(arches.split()))
        for arches, words in _ON_ARCHITECTURE.items()
    ]
    rules += [
        Rule(names=tuple(words.split()), action=allow, include_caps=(capability,))
        for capability, words in _WITH_CAPABILITY.items()
    ]
    rules += _clone_rules()
    return Profile(
        default_action="SCMP_ACT_ERRNO",
        default_errno=errno.EPERM,
        architectures=None,
        rules=tuple(rules),
    )


def _clone_rules() -> list[Rule]:
    import errno

    from hutch.linux.seccomp_profile import Argument, Rule

    def without_namespaces(index: int) -> tuple[Argument, ...]:
        mask = _CLONE_NAMESPACES
        return (Argument(index=index, value=mask, value_two=0, op="SCMP_CMP_MASKED_EQ"),)

    return [
        Rule(
            names=("clone",),
            action="SCMP_ACT_ALLOW",
            args=without_namespaces(0),
            exclude_caps=("CAP_SYS_ADMIN",),
            exclude_arches=("s390", "s390x"),
        ),
        # On s390 the flags are the second argument of clone(2).
        Rule(
            names=("clone",),
            action="SCMP_ACT_ALLOW",
            args=without_namespaces(1),
            exclude_caps=("CAP_SYS_ADMIN",),
            include_arches=("s390", "s390x"),
        ),
        # The flags of clone3(2) are behind a pointer, out of a filter's sight; ENOSYS
        # makes the C library fall back to clone.
        Rule(
            names=("clone3",),
            action="SCMP_ACT_ERRNO",
            errno_ret=errno.ENOSYS,
            exclude_caps=("CAP_SYS_ADMIN",),
        ),
    ]
