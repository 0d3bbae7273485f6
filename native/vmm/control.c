/* Our own connection to QEMU's monitor: what QEMU is told there, and what its events mean.
 *
 * A write for which the host has no room stops the machine instead of failing in it (QEMU's
 * werror=enospc). Nobody else may be there to see it, so it is tried again until there is. What
 * stands still for another reason, by its user's will or while it is saved, is left alone: the
 * writes under way at that moment may find no room too. */
#include <sys/socket.h>
#include <sys/uio.h>

#include "../text.h"

#include "vmm.h"

enum { RETRY_MS = 1000, QUIET_MS = 10000 };

static const char hello[] = "{\"execute\":\"qmp_capabilities\"}\n";
static const char how_is_it[] = "{\"execute\":\"query-status\"}\n";
static const char go_on[] = "{\"execute\":\"cont\"}\n";

/* Whole or not at all: QEMU's monitor would be lost after half a command. A buffer without
 * room for a line belongs to a QEMU that has not read for long. */
void control_tell(const char *text, size_t n, int fd)
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

void control_begin(struct vmm *v)
{
	v->control.open = true;
	control_tell(hello, sizeof(hello) - 1, -1);
}

static bool says(const char *line, const char *words)
{
	return strstr(line, words) != NULL;
}

static void no_room(struct control *c)
{
	uint64_t now = mono_ns();

	/* The same want of room, told once: every attempt meets with it again. */
	if (!c->last_ns || now - c->last_ns > QUIET_MS * 1000000ull)
		say("the host has no room for what the machine writes: it waits until there is");
	c->last_ns = now;
	c->retry_ns = now + RETRY_MS * 1000000ull;
}

static void answered(struct control *c, const char *line)
{
	c->asked = false;
	if (says(line, "\"status\": \"io-error\""))
		control_tell(go_on, sizeof(go_on) - 1, -1);
}

static void heed(struct vmm *v, const char *line)
{
	if (says(line, "\"event\": \"BLOCK_IO_ERROR\"") && says(line, "\"nospace\": true") &&
	    says(line, "\"action\": \"stop\""))
		no_room(&v->control);
	else if (v->control.asked && says(line, "{\"return\": {") && says(line, "\"status\": \""))
		answered(&v->control, line);
	else if (says(line, "\"event\": \"SHUTDOWN\"") && says(line, "\"host-qmp-quit\""))
		v->control.quit = true; /* only whoever has saved the machine ends QEMU so */
}

/* Of a line that does not fit its head will do. */
static void take(struct vmm *v, const char *bytes, size_t n)
{
	struct control *c = &v->control;

	for (size_t i = 0; i < n; i++) {
		if (bytes[i] != '\n') {
			if (c->len < sizeof(c->line) - 1)
				c->line[c->len++] = bytes[i];
			continue;
		}
		c->line[c->len] = '\0';
		c->len = 0;
		heed(v, c->line);
	}
}

void control_read(struct vmm *v)
{
	char bytes[4096];
	ssize_t n = recv(FD_CONTROL, bytes, sizeof(bytes), MSG_DONTWAIT);

	if (n > 0)
		take(v, bytes, (size_t)n);
	else if (n == 0 || (errno != EAGAIN && errno != EINTR))
		v->control.open = false;
}

void control_drain(struct vmm *v)
{
	char bytes[4096];
	ssize_t n;

	while (v->control.open && (n = recv(FD_CONTROL, bytes, sizeof(bytes), MSG_DONTWAIT)) > 0)
		take(v, bytes, (size_t)n);
}

void control_turn(struct vmm *v)
{
	struct control *c = &v->control;

	if (!c->retry_ns || mono_ns() < c->retry_ns)
		return;
	c->retry_ns = 0;
	c->asked = true;
	control_tell(how_is_it, sizeof(how_is_it) - 1, -1);
}
