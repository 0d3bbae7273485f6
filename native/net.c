/* Links and netlink, as far as launcher and agent share them. */
#include "net.h"

#include <linux/netlink.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "sys.h"

int link_set_up_by(int fd, const char *name)
{
	struct ifreq request;
	size_t len = strlen(name);

	memset(&request, 0, sizeof(request));
	if (len >= sizeof(request.ifr_name)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(request.ifr_name, name, len);
	if (ioctl(fd, SIOCGIFFLAGS, &request) < 0)
		return -1;
	request.ifr_flags |= IFF_UP;
	return ioctl(fd, SIOCSIFFLAGS, &request);
}

int link_set_up(const char *name)
{
	int result, error, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	result = link_set_up_by(fd, name);
	error = errno;
	close(fd);
	errno = error;
	return result;
}

int netlink_answer(int fd)
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
