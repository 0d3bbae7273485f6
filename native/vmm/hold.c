/* Hold the memory of a template: `hutch-vmm hold SECONDS`. Descriptor 3 is the memory, 4 a
 * listening Unix socket. Whoever connects is sent the memory's descriptor. Without a caller
 * for so long, it ends, and the memory with it. */
#include "hold.h"

#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "../sys.h"

enum { FD_MEMORY = 3, FD_LISTEN = 4, SEND_MS = 1000 };

static void hand_over(int connection)
{
	char byte = 'm';
	struct iovec io = { .iov_base = &byte, .iov_len = 1 };
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct msghdr message = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = control.space,
				  .msg_controllen = sizeof(control.space) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&message);
	int memory = FD_MEMORY;

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &memory, sizeof(int));
	(void)!sendmsg(connection, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

int hold_memory(const char *seconds)
{
	struct pollfd p = { .fd = FD_LISTEN, .events = POLLIN };
	long limit = strtol(seconds, NULL, 10);
	int timeout = limit > 0 && limit < 1000000 ? (int)limit * 1000 : -1;

	/* A terminal's signals are not for us; an order to end is. */
	signal(SIGTERM, SIG_DFL);
	for (;;) {
		int ready = poll(&p, 1, timeout);
		int connection;

		if (ready < 0 && errno != EINTR)
			return 1;
		if (ready == 0)
			return 0;
		if (ready < 0)
			continue;
		connection = accept4(FD_LISTEN, NULL, NULL, SOCK_CLOEXEC);
		if (connection < 0) {
			if (is_exhausted(errno))
				poll(NULL, 0, ACCEPT_PAUSE_MS);
			continue;
		}
		hand_over(connection);
		close(connection);
	}
}
