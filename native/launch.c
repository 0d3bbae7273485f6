/* Run the two sections of a plan, and the new process between them. */
#include "launch.h"

#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <linux/magic.h>

#include "frames.h"
#include "text.h"

bool send_report(struct launch *l, uint8_t kind, int error, int32_t number)
{
	struct report report = { .kind = kind, .section = l->section, .error = error,
				 .index = l->base + l->index, .number = number };
	struct text t = text_in(report.detail, sizeof(report.detail));

	if (kind == REPORT_FAIL) {
		text_add(&t, l->what ? l->what : "");
		if (l->extra[0]) {
			text_add(&t, ": ");
			text_add(&t, l->extra);
		}
	}
	/* write, not send: a seccomp filter may already be loaded. */
	return write(l->report, &report, sizeof(report)) == sizeof(report);
}

_Noreturn void child_failed(struct launch *l, int error)
{
	send_report(l, REPORT_FAIL, error, 0);
	_exit(127);
}

/* Die when the supervisor does. The report socket tells whether it already has: the
 * parent's number does not, in a PID namespace. */
void die_with_parent(struct launch *l)
{
	struct pollfd p = { .fd = l->report };

	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	if (poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR)))
		_exit(125);
}

/* Wait for the supervisor's word; without a supervisor there is nothing to go on for. */
void wait_gate(struct launch *l, char gate)
{
	char word;

	while (gate != GATE_EXEC || !l->exec_open) {
		if (read(l->report, &word, 1) != 1)
			_exit(125);
		if (word == GATE_EXEC)
			l->exec_open = true; /* it may come long before it is waited for */
		else if (word == gate)
			return;
	}
}

/* Become the root that the id maps made. */
static int enter_user_namespace(struct launch *l)
{
	l->what = "id maps";
	syscall(SYS_setgroups, (size_t)0, NULL);
	if (syscall(SYS_setresgid, 0, 0, 0) < 0 || syscall(SYS_setresuid, 0, 0, 0) < 0)
		return -1;
	die_with_parent(l);
	return 0;
}

static int run_section(struct launch *l, struct reader section, uint32_t count)
{
	struct reader from = section;
	struct op op;

	for (l->index = 0; l->index < count && next_op(&section, &op); l->index++, from = section) {
		if (op.code == OP_ID_MAP)
			continue; /* done between clone and the child's first operation */
		if (l->outside && op.code != OP_CGROUP_JOIN) {
			l->outside = false;
			if (enter_user_namespace(l) < 0)
				return -1;
		}
		/* Before a filter that may forbid it, where that is not in force already. */
		if ((op.code == OP_SECCOMP || op.code == OP_EXEC) && l->report >= 0 &&
		    !l->absent_known)
			look_along_path(l, from);
		if (run_op(l, op.code, &op.body) < 0)
			return -1;
		if (l->report >= 0 && (int32_t)l->index == l->plan->caps_at &&
		    finish_capabilities(l) < 0)
			return -1;
	}
	return 0;
}

/* Wait for the supervisor's word with the rest of the plan behind it. */
static const uint8_t *wait_rest(struct launch *l, size_t *len)
{
	static uint8_t message[1 + FRAME_MAX];

	for (;;) {
		ssize_t n = recv(l->report, message, 1 + FRAME_MAX, 0);
		if (n < 1)
			_exit(125);
		if (message[0] == GATE_EXEC) {
			l->exec_open = true;
		} else if (message[0] == GATE_GO) {
			*len = (size_t)n - 1;
			return message + 1;
		}
	}
}

/* A launch that waits here may be copied with its machine: each copy then goes on by itself. */
int op_rest(struct launch *l, struct reader *r)
{
	static struct plan rest;
	const uint8_t *data;
	size_t len;

	l->what = "the rest of the plan";
	send_report(l, REPORT_SYNC, 0, (int32_t)read_u32(r));
	data = wait_rest(l, &len);
	rest = *l->plan;
	if (!plan_read_rest(&rest, data, len))
		return fail(EPROTO);
	l->plan = &rest;
	l->base += l->index;
	return run_section(l, rest.child, rest.child_count);
}

int run_prepare(struct launch *l)
{
	l->section = SECTION_PREPARE;
	return run_section(l, l->plan->prepare, l->plan->prepare_count);
}

static const int ignored[] = { SIGHUP, SIGINT, SIGTERM, SIGPIPE, SIGQUIT };
enum { IGNORED = sizeof(ignored) / sizeof(ignored[0]) };

/* By system call: C libraries keep some numbers to themselves, and leave them ignored. */
static void set_action(int signum, void (*handler)(int))
{
	const struct { void (*handler)(int); uint64_t flags, restorer, mask; } action = { handler, 0, 0, 0 };

	syscall(SYS_rt_sigaction, signum, &action, NULL, sizeof(uint64_t));
}

static void unblock_signals(void)
{
	static const uint64_t none;

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof(none));
}

void signals_of_supervisor(void)
{
	for (int signum = 1; signum <= 64; signum++)
		set_action(signum, SIG_DFL);
	for (int i = 0; i < IGNORED; i++)
		set_action(ignored[i], SIG_IGN);
	unblock_signals();
}

/* All others have been what they are to be since the supervisor began. */
static void signals_of_child(void)
{
	for (int i = 0; i < IGNORED; i++)
		set_action(ignored[i], SIG_DFL);
	unblock_signals();
}

static _Noreturn void child_main(struct launch *l, const int stdio[3])
{
	l->section = SECTION_CHILD;
	l->index = 0;
	die_with_parent(l);
	signals_of_child();
	umask(0); /* modes in a plan are exact */
	for (int fd = 0; fd < 3; fd++)
		if (dup2(stdio[fd], fd) < 0)
			child_failed(l, errno);
	if (l->plan->has_id_map)
		wait_gate(l, GATE_MAPS);
	/* The files of a cgroup belong to the root outside: join before becoming the other. */
	l->outside = l->plan->has_id_map;
	run_section(l, l->plan->child, l->plan->child_count);
	child_failed(l, errno);
}

/* Processes made later must not follow a `Setns` of the prepare section. */
static void restore_pid_namespace(void)
{
	int fd = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);

	if (fd >= 0) {
		setns(fd, CLONE_NEWPID);
		close(fd);
	}
}

static bool prepare_has(const struct plan *p, uint32_t code)
{
	struct reader section = p->prepare;
	struct op op;

	while (section.at < section.end && next_op(&section, &op))
		if (op.code == code)
			return true;
	return false;
}

/* The directory of the one cgroup, of version 2, that the process joins first of all; or -1.
 * To move a process between cgroups holds up every fork in the system for a while; to make one
 * in its cgroup does not. */
static int first_cgroup(const struct launch *l)
{
	static const char file[] = "/cgroup.procs";
	struct reader section = l->plan->child;
	struct statfs fs;
	struct text t;
	char path[4096];
	const char *name;
	size_t len;
	struct op op;
	int fd;

	if (l->plan->has_id_map || !next_op(&section, &op) || op.code != OP_CGROUP_JOIN ||
	    read_count(&op.body) != 1)
		return -1;
	name = read_str(&op.body);
	len = strlen(name);
	if (len < sizeof(file) || len >= sizeof(path) ||
	    strcmp(name + len - (sizeof(file) - 1), file) != 0)
		return -1;
	t = text_in(path, sizeof(path));
	text_add_bytes(&t, name, len - (sizeof(file) - 1));
	fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd >= 0 && (fstatfs(fd, &fs) < 0 || fs.f_type != CGROUP2_SUPER_MAGIC)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* Make the process, in its cgroup where that can be. */
static pid_t clone_into(struct launch *l, struct clone3_args *args)
{
	int cgroup = args->flags & CLONE_INTO_CGROUP ? -1 : first_cgroup(l);
	pid_t pid;

	if (cgroup < 0)
		return sys_clone3(args);
	args->flags |= CLONE_INTO_CGROUP;
	args->cgroup = (uint64_t)cgroup;
	l->joined = true;
	pid = sys_clone3(args);
	if (pid < 0) { /* let the operation say what is wrong */
		args->flags &= ~(uint64_t)CLONE_INTO_CGROUP;
		l->joined = false;
		pid = sys_clone3(args);
	}
	if (pid != 0) {
		l->joined = false;
		close(cgroup);
	}
	return pid;
}

pid_t clone_child(struct launch *l, const int stdio[3], const int ends[2], int *pidfd)
{
	int fd = -1, pid;
	struct clone3_args args = {
		.flags = l->plan->clone_flags | CLONE_PIDFD,
		.pidfd = (uint64_t)(uintptr_t)&fd,
		.exit_signal = SIGCHLD,
	};
	bool joins;

	l->section = SECTION_CLONE;
	l->index = 0;
	l->what = "clone3";
	if (l->plan->cgroup_slot >= 0) {
		int cgroup = slot_get(l, l->plan->cgroup_slot);
		if (cgroup < 0)
			return -1;
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (uint64_t)cgroup;
	}
	joins = prepare_has(l->plan, OP_SETNS);
	/* In somebody's PID namespace from its first moment, it must not be traced from there. */
	if (joins && !l->plan->has_id_map)
		prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	pid = clone_into(l, &args);
	if (pid == 0) {
		close(ends[0]); /* its end of file tells of the supervisor's death */
		l->report = ends[1];
		child_main(l, stdio);
	}
	if (joins && !l->plan->has_id_map)
		prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
	if (pid < 0)
		return -1;
	*pidfd = fd;
	if (joins)
		restore_pid_namespace();
	return pid;
}

static int write_map(pid_t pid, const char *name, struct reader *r)
{
	char path[40], lines[4096];
	struct text p = text_in(path, sizeof(path)), t = text_in(lines, sizeof(lines));
	int fd, result, error;

	for (uint32_t n = read_count(r); n; n--) {
		for (int field = 0; field < 3; field++) {
			text_add_num(&t, read_u32(r));
			text_add(&t, field < 2 ? " " : "\n");
		}
	}
	text_add(&p, "/proc/");
	text_add_num(&p, pid);
	text_add(&p, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	result = (int)write(fd, lines, t.len); /* the kernel takes the map in one write only */
	error = errno;
	close(fd);
	return result < 0 ? fail(error) : 0;
}

int write_id_maps(struct launch *l, pid_t pid)
{
	struct reader section = l->plan->prepare;
	struct op op;

	for (l->index = 0; next_op(&section, &op); l->index++) {
		if (op.code != OP_ID_MAP)
			continue;
		l->section = SECTION_PREPARE;
		l->what = "id maps";
		return write_map(pid, "/uid_map", &op.body) < 0 ? -1
			: write_map(pid, "/gid_map", &op.body);
	}
	return 0;
}
