/* A machine without an agent: its serial port is our stdio, and QEMU's monitor is told to
 * press the power button and takes the clients of the screen. */
#include <sys/socket.h>

#include <poll.h>

#include "vmm.h"

enum { DRAIN_MS = 1000 };

static const char power_button[] = "{\"execute\":\"system_powerdown\"}\n";
static const char screen_client[] =
	"{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"screen\"}}\n"
	"{\"execute\":\"add_client\",\"arguments\":"
	"{\"protocol\":\"vnc\",\"fdname\":\"screen\",\"skipauth\":true}}\n";

void console_begin(struct vmm *v)
{
	v->console.stdin_open = true;
}

void console_signal(int signum)
{
	if (signum == SIGTERM || signum == SIGINT || signum == SIGHUP || signum == SIGQUIT)
		control_tell(power_button, sizeof(power_button) - 1, -1);
}

void console_accept(struct vmm *v)
{
	int fd = accept4(FD_LISTEN, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0) {
		accept_later(v);
		return;
	}
	control_tell(screen_client, sizeof(screen_client) - 1, fd);
	close(fd);
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
