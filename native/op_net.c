/* Operations on the network namespace: a link set up, netlink messages sent. */
#include <linux/netlink.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "launch.h"

static int set_up(int fd, const char *name)
{
	struct ifreq request;
	size_t len = strlen(name);

	memset(&request, 0, sizeof(request));
	if (len >= sizeof(request.ifr_name))
		return fail(ENAMETOOLONG);
	memcpy(request.ifr_name, name, len);
	if (ioctl(fd, SIOCGIFFLAGS, &request) < 0)
		return -1;
	request.ifr_flags |= IFF_UP;
	return ioctl(fd, SIOCSIFFLAGS, &request);
}

int op_link_up(struct launch *l, struct reader *r)
{
	const char *name = l->what = read_str(r);
	int result, error, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	result = set_up(fd, name);
	error = errno;
	close(fd);
	return result < 0 ? fail(error) : 0;
}

/* The errno in the answer to a message, 0 for success. */
static int answer(int fd)
{
	_Alignas(struct nlmsghdr) char buffer[8192];
	const struct nlmsghdr *head = (const void *)buffer;
	const struct nlmsgerr *error = (const void *)(buffer + NLMSG_HDRLEN);

	for (;;) {
		ssize_t n = recv(fd, buffer, sizeof(buffer), 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno;
		if ((size_t)n >= NLMSG_HDRLEN + sizeof(error->error) &&
		    head->nlmsg_type == NLMSG_ERROR)
			return -error->error;
		if ((size_t)n >= NLMSG_HDRLEN && head->nlmsg_type == NLMSG_DONE)
			return 0;
	}
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
		error = answer(fd);
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
