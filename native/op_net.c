/* Operations on the network namespace: a link set up, netlink messages sent. */
#include <linux/netlink.h>
#include <sys/socket.h>

#include "launch.h"
#include "net.h"

int op_link_up(struct launch *l, struct reader *r)
{
	return link_set_up(l->what = read_str(r));
}

static bool is_listed(struct reader ignore, int error)
{
	for (uint32_t n = read_count(&ignore); n; n--)
		if ((int)read_u32(&ignore) == error)
			return true;
	return false;
}

static int exchange(int fd, struct reader *r)
{
	struct reader messages = *r, ignore;
	uint32_t count = read_count(r), len;

	for (uint32_t n = count; n; n--)
		read_bytes(r, &len);
	ignore = *r;
	read_count(&messages);
	for (; count; count--) {
		const uint8_t *message = read_bytes(&messages, &len);
		int error;
		if (send(fd, message, len, 0) < 0)
			return -1;
		error = netlink_answer(fd);
		if (error && !is_listed(ignore, error))
			return fail(error);
	}
	for (uint32_t n = read_count(r); n; n--)
		read_u32(r);
	return 0;
}

int op_netlink(struct launch *l, struct reader *r)
{
	int result, error, fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);

	l->what = "netlink";
	if (fd < 0)
		return -1;
	result = exchange(fd, r);
	error = errno;
	close(fd);
	return result < 0 ? fail(error) : 0;
}
