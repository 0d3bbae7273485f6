/* Operations on the process itself: groups, namespaces, terminal, limits, exec. */
#include <limits.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>

#include "launch.h"
#include "text.h"

enum { FIRST_INHERITED = 3 };

static int write_once(const char *path, const char *value)
{
	int result, error, fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return -1;
	result = write_all(fd, value, strlen(value));
	error = errno;
	close(fd);
	return result < 0 ? fail(error) : 0;
}

int op_cgroup_join(struct launch *l, struct reader *r)
{
	if (l->joined) {
		l->joined = false;
		return 0;
	}
	for (uint32_t n = read_count(r); n; n--) {
		l->what = read_str(r);
		if (write_once(l->what, "0") < 0)
			return -1;
	}
	return 0;
}

int op_unshare(struct launch *l, struct reader *r)
{
	int result = unshare((int)read_u64(r));

	if (result == 0 && l->report >= 0)
		die_with_parent(l);
	return result;
}

int op_setns(struct launch *l, struct reader *r)
{
	int fd = slot_get(l, read_i32(r));
	uint64_t nstype = read_u64(r);

	if (fd < 0)
		return -1;
	/* A process of the container must not trace this one while it is half inside. */
	if (l->report >= 0 && (nstype & (CLONE_NEWPID | CLONE_NEWNS)))
		prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	if (setns(fd, (int)nstype) < 0)
		return -1;
	if (l->report >= 0)
		die_with_parent(l); /* another user namespace is a change of credentials */
	if (nstype & CLONE_NEWNS) {
		l->root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		return l->root < 0 ? -1 : 0;
	}
	return 0;
}

int op_fork(struct launch *l, struct reader *r)
{
	struct clone3_args args = { .flags = CLONE_PARENT };
	int pid = sys_clone3(&args);

	(void)r;
	if (pid < 0)
		return -1;
	if (pid > 0) {
		send_report(l, REPORT_FORKED, 0, pid);
		_exit(0);
	}
	die_with_parent(l);
	return 0;
}

int op_sync(struct launch *l, struct reader *r)
{
	send_report(l, REPORT_SYNC, 0, (int32_t)read_u32(r));
	wait_gate(l, GATE_GO);
	return 0;
}

int op_hostname(struct launch *l, struct reader *r)
{
	const char *name = l->what = read_str(r), *domain = read_str(r);

	if (sethostname(name, strlen(name)) < 0)
		return -1;
	return *domain ? setdomainname(domain, strlen(domain)) : 0;
}

int pass_master(struct launch *l, int master)
{
	struct report report = { .kind = REPORT_TTY };
	struct iovec iov = { .iov_base = &report, .iov_len = sizeof(report) };
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &master, sizeof(master));
	return sendmsg(l->report, &msg, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

/* Put the terminal at /dev/console, as login programs expect of a container. */
static int bind_console(struct launch *l, int master)
{
	char path[32];
	struct text t = text_in(path, sizeof(path));
	unsigned number;
	int target, tree, pts, result = -1, error;

	l->what = "/dev/console";
	if (ioctl(master, TIOCGPTN, &number) < 0)
		return -1;
	text_add(&t, "dev/pts/");
	text_add_num(&t, number);
	target = root_target(l, "dev/console", 'f');
	pts = root_open(l, path, O_PATH, 0);
	tree = pts < 0 ? -1 : sys_open_tree(pts, "", AT_EMPTY_PATH | OPEN_TREE_CLONE |
							     OPEN_TREE_CLOEXEC);
	if (tree >= 0 && target >= 0)
		result = sys_move_mount(tree, target);
	error = errno;
	if (target >= 0)
		close(target);
	if (pts >= 0)
		close(pts);
	if (tree >= 0)
		close(tree);
	return result < 0 ? fail(error) : 0;
}

static int open_terminal(struct launch *l, uint32_t rows, uint32_t columns, int *slave)
{
	struct winsize size = { .ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns };
	int zero = 0, master;

	l->what = "/dev/pts/ptmx";
	master = root_open(l, "dev/pts/ptmx", O_RDWR | O_NOCTTY, 0);
	if (master < 0)
		return -1;
	if (ioctl(master, TIOCSPTLCK, &zero) < 0)
		return -1;
	*slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (*slave < 0)
		return -1;
	if ((rows || columns) && ioctl(master, TIOCSWINSZ, &size) < 0)
		return -1;
	return master;
}

int op_setsid_tty(struct launch *l, struct reader *r)
{
	uint32_t tty = read_u32(r), console = read_u32(r), rows = read_u32(r), columns = read_u32(r);
	int master, slave;

	if (setsid() < 0 && errno != EPERM)
		return -1;
	if (!tty)
		return 0;
	master = open_terminal(l, rows, columns, &slave);
	if (master < 0)
		return -1;
	if (console && bind_console(l, master) < 0)
		return -1;
	if (ioctl(slave, TIOCSCTTY, 0) < 0)
		return -1;
	for (int fd = 0; fd < 3; fd++)
		if (dup2(slave, fd) < 0)
			return -1;
	if (slave > 2)
		close(slave);
	if (pass_master(l, master) < 0)
		return -1;
	close(master);
	return 0;
}

int op_rlimit(struct launch *l, struct reader *r)
{
	uint32_t resource = read_u32(r);
	struct { uint64_t soft, hard; } limit, old;
	uint32_t clamp;

	(void)l;
	limit.soft = read_u64(r);
	limit.hard = read_u64(r);
	clamp = read_u32(r);
	if (syscall(SYS_prlimit64, 0, resource, &limit, NULL) == 0)
		return 0;
	if (errno != EPERM || !clamp)
		return -1;
	if (syscall(SYS_prlimit64, 0, resource, NULL, &old) < 0)
		return -1;
	if (limit.hard > old.hard)
		limit.hard = old.hard;
	if (limit.soft > limit.hard)
		limit.soft = limit.hard;
	return (int)syscall(SYS_prlimit64, 0, resource, &limit, NULL);
}

int op_scheduler(struct launch *l, struct reader *r)
{
	char number[16];
	struct text t = text_in(number, sizeof(number));
	uint32_t required;

	text_add_num(&t, read_i32(r));
	required = read_u32(r);
	l->what = "oom_score_adj";
	if (write_once("/proc/self/oom_score_adj", number) == 0)
		return 0;
	return !required && (errno == EACCES || errno == EPERM) ? 0 : -1;
}

int op_umask(struct launch *l, struct reader *r)
{
	umask((mode_t)read_u32(r));
	l->umask_set = true;
	return 0;
}

int op_close_range(struct launch *l, struct reader *r)
{
	l->no_close = true;
	return sys_close_range(read_u32(r), ~0U, CLOSE_RANGE_CLOEXEC);
}

/* Take copies now, above where they will go, so that nothing done meanwhile is in the way. */
int op_inherit(struct launch *l, struct reader *r)
{
	uint32_t count = read_count(r);

	if (l->inherited || count > MAX_SLOTS)
		return fail(EINVAL);
	for (uint32_t i = 0; i < count; i++) {
		int fd = slot_get(l, (int32_t)read_u32(r));
		if (fd < 0)
			return -1;
		l->inherit[i] = fcntl(fd, F_DUPFD_CLOEXEC, FIRST_INHERITED + (int)count);
		if (l->inherit[i] < 0)
			return -1;
	}
	l->inherited = count;
	return 0;
}

/* Put them in their places; the report's socket makes way, it still has to tell. */
static int place_inherited(struct launch *l)
{
	int first_free = FIRST_INHERITED + (int)l->inherited;

	if (l->report < first_free) {
		l->report = fcntl(l->report, F_DUPFD_CLOEXEC, first_free);
		if (l->report < 0)
			return -1;
	}
	for (uint32_t i = 0; i < l->inherited; i++)
		if (dup2(l->inherit[i], FIRST_INHERITED + (int)i) < 0)
			return -1;
	return sys_close_range((unsigned)first_free, ~0U, CLOSE_RANGE_CLOEXEC);
}

static char **new_list(size_t count)
{
	static char *few[256]; /* as good as always enough, and a mapping costs more */
	static size_t used;
	char **list = few + used;

	if (count <= sizeof(few) / sizeof(few[0]) - used) {
		used += count;
		return list;
	}
	list = mmap(NULL, count * sizeof(char *), PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return list == MAP_FAILED ? NULL : list;
}

char **string_list(struct reader *r)
{
	uint32_t count = read_count(r);
	char **list = new_list((size_t)count + 1);

	if (!list)
		return NULL;
	for (uint32_t i = 0; i < count; i++) {
		union { const char *from; char *to; } word = { .from = read_str(r) };
		list[i] = word.to; /* execve(2) does not write to them */
	}
	return list;
}

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

static const char *path_of(char **env)
{
	for (; *env; env++)
		if (strncmp(*env, "PATH=", 5) == 0)
			return *env + 5;
	return default_path;
}

/* Write the program's path in the directory at `dir` and return the next one, NULL at the end;
 * an empty path did not fit. */
static const char *path_in(const char *dir, const char *name, char file[PATH_MAX])
{
	size_t len = strcspn(dir, ":"), name_len = strlen(name);
	struct text t = text_in(file, PATH_MAX);

	if (len + name_len + 2 <= PATH_MAX) {
		text_add_bytes(&t, dir, len);
		text_add(&t, len ? "/" : "./");
		text_add_bytes(&t, name, name_len);
	}
	return dir[len] ? dir + len + 1 : NULL;
}

static void count_absent(struct launch *l, const char *name, const char *dir)
{
	char file[PATH_MAX];

	l->absent_known = true;
	for (l->absent = 0; dir && !strchr(name, '/'); l->absent++) {
		dir = path_in(dir, name, file);
		if (access(file, F_OK) == 0 || (errno != ENOENT && errno != ENOTDIR))
			return;
	}
}

/* To fail at execve(2) costs the kernel a new address space each time. */
void look_along_path(struct launch *l, struct reader rest)
{
	struct op op = { 0 };
	const char *name = "", *dir = NULL;

	while (op.code != OP_EXEC)
		if (rest.at == rest.end || !next_op(&rest, &op))
			return;
	for (uint32_t n = read_count(&op.body), i = 0; i < n; i++) {
		const char *word = read_str(&op.body);
		name = i ? name : word;
	}
	for (uint32_t n = read_count(&op.body), i = 0; i < n; i++) {
		const char *word = read_str(&op.body);
		if (!dir && strncmp(word, "PATH=", 5) == 0)
			dir = word + 5;
	}
	if (!op.body.bad)
		count_absent(l, name, dir ? dir : default_path);
}

/* Try each directory of PATH; like a shell, remember a refusal but go on. */
static int exec_along_path(const struct launch *l, char **argv, char **env)
{
	char file[PATH_MAX];
	int error = ENOENT;
	const char *dir = path_of(env);

	for (uint32_t i = 0; dir; i++) {
		dir = path_in(dir, argv[0], file);
		if (i < l->absent || !*file)
			continue;
		execve(file, argv, env);
		if (errno == EACCES)
			error = EACCES;
		else if (errno != ENOENT && errno != ENOTDIR)
			return -1;
	}
	return fail(error);
}

static int apparmor_on_exec(const char *profile)
{
	char text[256 + 8];
	struct text t = text_in(text, sizeof(text));

	text_add(&t, "exec ");
	text_add(&t, profile);
	if (write_once("/proc/self/attr/apparmor/exec", text) == 0)
		return 0;
	return write_once("/proc/self/attr/exec", text);
}

/* Leave an init behind as the parent; only the child returns. */
static int split_init(struct launch *l)
{
	pid_t pid;

	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	pid = fork();
	if (pid < 0)
		return -1;
	if (pid > 0)
		run_init(pid);
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	if (setpgid(0, 0) == 0 && isatty(0)) {
		signal(SIGTTOU, SIG_IGN);
		tcsetpgrp(0, getpgrp());
		signal(SIGTTOU, SIG_DFL);
	}
	(void)l;
	return 0;
}

int op_exec(struct launch *l, struct reader *r)
{
	char **argv = string_list(r), **env = string_list(r);
	uint32_t init = read_u32(r);
	const char *profile = read_str(r);

	if (!argv || !env)
		return -1;
	if (!argv[0])
		return fail(EINVAL);
	l->what = argv[0];
	wait_gate(l, GATE_EXEC);
	if (!l->umask_set)
		umask(022);
	if (*profile && apparmor_on_exec(profile) < 0)
		return -1;
	if (l->inherited) {
		if (place_inherited(l) < 0)
			return -1;
	} else if (!l->no_close && sys_close_range(3, ~0U, CLOSE_RANGE_CLOEXEC) < 0) {
		return -1;
	}
	if (init && split_init(l) < 0)
		return -1;
	l->section = SECTION_EXEC;
	/* A supervisor that undoes the launch hears no more: then nothing may run. */
	if (!send_report(l, REPORT_EXEC, 0, 0))
		_exit(125);
	if (!*argv[0])
		return fail(ENOENT);
	if (strchr(argv[0], '/'))
		return execve(argv[0], argv, env);
	return exec_along_path(l, argv, env);
}
