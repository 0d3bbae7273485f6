/* QEMU, our only child: started with its own descriptors and nothing of ours. */
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "../text.h"
#include "vmm.h"

static char **string_list(struct reader r)
{
	uint32_t count = read_count(&r);
	size_t size = ((size_t)count + 1) * sizeof(char *);
	char **list = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (list == MAP_FAILED)
		return NULL;
	for (uint32_t i = 0; i < count; i++) {
		union { const char *from; char *to; } word = { .from = read_str(&r) };
		list[i] = word.to; /* execve(2) does not write to them */
	}
	return list;
}

static void default_signals(void)
{
	static const uint64_t none[4]; /* SIG_DFL, no flags, no mask */

	for (int signum = 1; signum <= 64; signum++)
		syscall(SYS_rt_sigaction, signum, none, NULL, sizeof(uint64_t));
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, none, NULL, sizeof(uint64_t));
}

static int exec_qemu(const struct config *c, pid_t parent, int null, int said)
{
	char **argv = string_list(c->argv), **env = string_list(c->env);

	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	if (getppid() != parent)
		_exit(127);
	setsid(); /* the terminal is not QEMU's */
	default_signals();
	if (!argv || !env || dup2(null, 0) < 0 || dup2(said, 1) < 0 || dup2(said, 2) < 0)
		return -1;
	for (int fd = config_first_fd(c); fd < FD_QEMU + (int)c->fds; fd++)
		if (fcntl(fd, F_SETFD, 0) < 0)
			return -1;
	return execve(argv[0], argv, env);
}

/* What is empty for ever is QEMU's stdin, errno of a failed exec comes back through the second
 * pipe, and what QEMU says through the third. */
static int start(struct vmm *v)
{
	int empty[2], told[2], said[2], error = 0;
	pid_t parent = getpid();

	if (pipe2(empty, O_CLOEXEC) < 0 || pipe2(told, O_CLOEXEC) < 0 || pipe2(said, O_CLOEXEC) < 0)
		return errno;
	log_open(&v->logs[LOG_QEMU], FD_LOG, said[0]);
	log_open(&v->logs[LOG_CONSOLE], FD_CONSOLE_LOG, FD_CONSOLE_PIPE);
	close(empty[1]);
	v->qemu = fork();
	if (v->qemu < 0) {
		v->qemu = 0;
		return errno;
	}
	if (v->qemu == 0) {
		exec_qemu(&v->config, parent, empty[0], said[1]);
		error = errno;
		(void)!write(told[1], &error, sizeof(error));
		_exit(127);
	}
	close(empty[0]);
	close(told[1]);
	close(said[1]);
	if (read(told[0], &error, sizeof(error)) != sizeof(error))
		error = 0;
	close(told[0]);
	return error;
}

void qemu_start(struct vmm *v)
{
	struct reader argv = v->config.argv;
	uint8_t pid[4];
	unsigned first = (unsigned)config_first_fd(&v->config), last = FD_QEMU + v->config.fds;
	int error;

	read_count(&argv);
	error = start(v);
	if (error)
		machine_failed(v, PART_QEMU, 0, 0, error, read_str(&argv));
	if (first < last)
		sys_close_range(first, last - 1, 0);
	put_u32(pid, (uint32_t)v->qemu);
	status_send(v, STATUS_QEMU, 0, pid, sizeof(pid));
}

void qemu_signal(struct vmm *v, int signum)
{
	if (v->qemu > 0)
		kill(v->qemu, signum);
}

bool qemu_reap(struct vmm *v)
{
	bool ended = false;
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid != v->qemu)
			continue;
		v->qemu = 0;
		v->qemu_status = status;
		ended = true;
	}
	return ended;
}

void qemu_kill(struct vmm *v)
{
	if (v->qemu <= 0)
		return;
	kill(v->qemu, SIGKILL);
	while (waitpid(v->qemu, &v->qemu_status, 0) < 0 && errno == EINTR)
		;
	v->qemu = 0;
	logs_read_rest(v);
}
