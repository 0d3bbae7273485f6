/* A machine without an agent: its serial port is our stdio, and QEMU's monitor is told to
 * press the power button and takes the clients of the screen. */
#include <sys/socket.h>
#include <sys/uio.h>

#include <poll.h>

#include "vmm.h"

enum { DRAIN_MS = 1000 };

static const char hello[] = "{\"execute\":\"qmp_capabilities\"}\n";
static const char power_button[] = "{\"execute\":\"system_powerdown\"}\n";
static const char screen_client[] =
	"{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"screen\"}}\n"
	"{\"execute\":\"add_client\",\"arguments\":"
	"{\"protocol\":\"vnc\",\"fdname\":\"screen\",\"skipauth\":true}}\n";

/* Whole or not at all: QEMU's monitor would be lost after half a command. A buffer without
 * room for a line belongs to a QEMU that has not read for long. */
static void tell_monitor(const char *text, size_t n, int fd)
{
	union { const char *from; char *to; } words = { .from = text };
	struct iovec io = { .iov_base = words.to, .iov_len = n };
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct msghdr message = { .msg_iov = &io, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *c;

		message.msg_control = control.space;
		message.msg_controllen = sizeof(control.space);
		c = CMSG_FIRSTHDR(&message);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	(void)!sendmsg(FD_CONTROL, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void console_begin(struct vmm *v)
{
	v->console.stdin_open = v->console.control_open = true;
	tell_monitor(hello, sizeof(hello) - 1, -1);
}

void console_signal(int signum)
{
	if (signum == SIGTERM || signum == SIGINT || signum == SIGHUP || signum == SIGQUIT)
		tell_monitor(power_button, sizeof(power_button) - 1, -1);
}

void console_accept(void)
{
	int fd = accept4(FD_LISTEN, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		return;
	tell_monitor(screen_client, sizeof(screen_client) - 1, fd);
	close(fd);
}

/* Answers and events are nobody's business here. */
void console_read_control(struct vmm *v)
{
	char unread[4096];
	ssize_t n = recv(FD_CONTROL, unread, sizeof(unread), MSG_DONTWAIT);

	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
		v->console.control_open = false;
}

static bool is_idle(ssize_t n)
{
	return n < 0 && (errno == EAGAIN || errno == EINTR);
}

static void fill(struct pipe_buffer *b, int fd, bool *open)
{
	ssize_t n = read(fd, b->bytes, sizeof(b->bytes));

	if (is_idle(n))
		return;
	if (n <= 0)
		*open = false;
	b->at = 0;
	b->len = n > 0 ? (size_t)n : 0;
}

/* What nobody reads any more is dropped: the machine goes on. */
static void empty(struct pipe_buffer *b, int fd)
{
	while (b->len) {
		ssize_t n = write(fd, b->bytes + b->at, b->len);

		if (is_idle(n))
			return;
		if (n < 0)
			n = (ssize_t)b->len;
		b->at += (size_t)n;
		b->len -= (size_t)n;
	}
}

void console_read_port(struct vmm *v)
{
	bool open = true;

	if (!v->console.output.len)
		fill(&v->console.output, FD_AGENT, &open);
	empty(&v->console.output, 1);
	if (!open)
		machine_agent_gone(v);
}

void console_read_stdin(struct vmm *v)
{
	if (!v->console.input.len)
		fill(&v->console.input, 0, &v->console.stdin_open);
	empty(&v->console.input, FD_AGENT);
}

void console_write(struct vmm *v)
{
	empty(&v->console.output, 1);
	empty(&v->console.input, FD_AGENT);
}

void console_drain(struct vmm *v)
{
	struct pollfd p = { .fd = 1, .events = POLLOUT };
	bool open = true;

	do {
		empty(&v->console.output, 1);
		while (v->console.output.len && poll(&p, 1, DRAIN_MS) > 0)
			empty(&v->console.output, 1);
		if (v->console.output.len || v->agent_gone)
			return;
		fill(&v->console.output, FD_AGENT, &open);
	} while (v->console.output.len);
}
