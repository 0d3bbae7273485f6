/* Launchers: one for each plan, and one that waits for the next plan. To start a launcher costs
 * an emulated processor as much as all that it does then, so the one that waits is started when
 * there is nothing else to do. */
#include <sys/socket.h>

#include "../frames.h"
#include "../text.h"
#include "agent.h"

/* Where a launcher expects its descriptors: the plan and the starter's socket, or, to wait for a
 * plan, the socket alone; slots behind them. */
enum { FD_FIRST = 3, SPARE_MS = 100 };

static int spare = -1;     /* our end of the socket of the one that waits */
static uint64_t spare_due; /* when to start it, ns; 0: not now */

static _Noreturn void become_launcher(const int fds[3])
{
	char name[] = "hutch-supervisor", reaped[] = "--reaped", *argv[] = { name, reaped, NULL };

	/* The agent's own descriptors are all above these places. */
	for (int i = 0; i < 3; i++)
		if (fds[i] >= 0)
			dup2(fds[i], FD_FIRST + i);
	execve(the.launcher, argv, the.env);
	_exit(127);
}

/* In a function of its own: vfork(2) shares the stack, and nothing here changes after it. */
static bool fork_launcher(const int fds[3])
{
	const pid_t pid = vfork();

	if (pid == 0)
		become_launcher(fds);
	return pid > 0;
}

void spare_wanted(uint32_t after_ms)
{
	if (spare < 0)
		spare_due = mono_ns() + after_ms * 1000000u + 1;
}

int spare_timeout_ms(void)
{
	uint64_t now = mono_ns();

	if (!spare_due)
		return -1;
	return spare_due <= now ? 0 : (int)((spare_due - now) / 1000000 + 1);
}

void spare_start(void)
{
	int ends[2];

	if (!spare_due || spare_due > mono_ns())
		return;
	spare_due = 0;
	if (spare >= 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
		return;
	if (fork_launcher((const int[3]){ ends[1], -1, -1 }))
		spare = ends[0];
	else
		close(ends[0]);
	close(ends[1]);
}

/* Give the plan and its slot to the launcher that waits, in one piece with what has come behind
 * the plan. Returns its socket, or -1 when none waits. */
static int hand_over(int plan, int slot, const uint8_t *data, size_t n, size_t *sent)
{
	uint8_t head[FRAME_HEAD] = { FR_PLAN };
	union { const uint8_t *from; void *to; } rest = { .from = data };
	struct iovec iov[2] = { { head, sizeof(head) }, { rest.to, n } };
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = { 0 };
	const int fds[2] = { plan, slot }, fd = spare;
	const size_t len = (slot < 0 ? 1 : 2) * sizeof(int);
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = n ? 2 : 1, .msg_control = control,
			      .msg_controllen = CMSG_SPACE(len) };
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	ssize_t done;

	if (fd < 0)
		return -1;
	spare = -1;
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(len);
	memcpy(CMSG_DATA(cmsg), fds, len);
	done = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (done < (ssize_t)sizeof(head)) {
		close(fd); /* somebody has killed it */
		return -1;
	}
	*sent = (size_t)done - sizeof(head);
	return fd;
}

static int start_another(int plan, int slot, const uint8_t *data, size_t n, size_t *sent)
{
	ssize_t done;
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
		return -1;
	done = n ? send(ends[0], data, n, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
	if (!fork_launcher((const int[3]){ plan, ends[1], slot })) {
		int error = errno;
		close(ends[0]);
		close(ends[1]);
		errno = error;
		return -1;
	}
	close(ends[1]);
	*sent = done < 0 ? 0 : (size_t)done;
	return ends[0];
}

int launcher_run(int plan, int slot, const uint8_t *data, size_t n, size_t *sent)
{
	int fd = hand_over(plan, slot, data, n, sent);

	if (fd < 0)
		fd = start_another(plan, slot, data, n, sent);
	spare_wanted(SPARE_MS);
	return fd;
}
