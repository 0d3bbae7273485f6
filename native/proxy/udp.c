/* Relay datagrams: every client gets a socket that asks for it, until it has been idle. */
#include "proxy.h"

#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

struct flow {
	int used, fd;
	size_t listener;
	long long last_ms;
	struct sockaddr_storage client;
	socklen_t client_length;
	struct in6_pktinfo asked; /* the address the client asked, to answer from */
};

static struct flow flows[FLOWS_MAX];
static unsigned char datagram[DATAGRAM_MAX];

static void close_flow(struct flow *flow)
{
	close(flow->fd);
	memset(flow, 0, sizeof *flow);
}

long long udp_expire(void)
{
	long long now = now_ms(), next = -1;
	for (size_t i = 0; i < FLOWS_MAX; i++) {
		if (!flows[i].used)
			continue;
		long long left = flows[i].last_ms + FLOW_IDLE_MS - now;
		if (left <= 0)
			close_flow(&flows[i]);
		else if (next < 0 || left < next)
			next = left;
	}
	return next;
}

static int is_flow_of(const struct flow *flow, size_t listener, const struct msghdr *from)
{
	return flow->used && flow->listener == listener &&
	       flow->client_length == from->msg_namelen &&
	       memcmp(&flow->client, from->msg_name, from->msg_namelen) == 0;
}

/* Return the place for a new flow: a free one, else the one idle for longest. */
static struct flow *free_flow(void)
{
	struct flow *oldest = &flows[0];
	for (size_t i = 0; i < FLOWS_MAX; i++) {
		if (!flows[i].used)
			return &flows[i];
		if (flows[i].last_ms < oldest->last_ms)
			oldest = &flows[i];
	}
	close_flow(oldest);
	return oldest;
}

static struct flow *new_flow(size_t index, const struct msghdr *from)
{
	const struct listener *listener = &proxy.listeners[index];
	struct flow *flow = free_flow();
	int fd = socket(listener->target.ss_family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return NULL;
	if (connect(fd, (const struct sockaddr *)&listener->target, listener->target_length) < 0 ||
	    watch(fd, KIND_FLOW, (size_t)(flow - flows), EPOLLIN) < 0) {
		close(fd);
		return NULL;
	}
	flow->used = 1;
	flow->fd = fd;
	flow->listener = index;
	flow->client_length = from->msg_namelen;
	memcpy(&flow->client, from->msg_name, from->msg_namelen);
	return flow;
}

static struct flow *flow_of(size_t listener, const struct msghdr *from)
{
	for (size_t i = 0; i < FLOWS_MAX; i++)
		if (is_flow_of(&flows[i], listener, from))
			return &flows[i];
	return new_flow(listener, from);
}

void udp_request(size_t index)
{
	struct sockaddr_storage client;
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(struct in6_pktinfo))];
	struct iovec iov = {.iov_base = datagram, .iov_len = sizeof datagram};
	struct msghdr from = {.msg_name = &client,
			      .msg_namelen = sizeof client,
			      .msg_iov = &iov,
			      .msg_iovlen = 1,
			      .msg_control = control,
			      .msg_controllen = sizeof control};
	memset(&client, 0, sizeof client);
	ssize_t length = recvmsg(proxy.listeners[index].fd, &from, 0);
	if (length < 0)
		return;
	struct flow *flow = flow_of(index, &from);
	if (!flow)
		return;
	const struct cmsghdr *first = CMSG_FIRSTHDR(&from);
	if (first && first->cmsg_level == IPPROTO_IPV6 && first->cmsg_type == IPV6_PKTINFO)
		memcpy(&flow->asked, CMSG_DATA(first), sizeof flow->asked);
	flow->last_ms = now_ms();
	/* An error here is one of an earlier datagram, and that is lost as on any network. */
	if (send(flow->fd, datagram, (size_t)length, 0) < 0)
		(void)send(flow->fd, datagram, (size_t)length, 0);
}

static void answer(const struct flow *flow, size_t length)
{
	const struct listener *listener = &proxy.listeners[flow->listener];
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(struct in6_pktinfo))] = {0};
	struct sockaddr_storage client = flow->client;
	struct iovec iov = {.iov_base = datagram, .iov_len = length};
	struct msghdr to = {.msg_name = &client,
			    .msg_namelen = flow->client_length,
			    .msg_iov = &iov,
			    .msg_iovlen = 1};
	if (listener->family == AF_INET6) {
		struct in6_pktinfo from = flow->asked;
		if (!IN6_IS_ADDR_LINKLOCAL(&from.ipi6_addr))
			from.ipi6_ifindex = 0; /* the way back is the routes' to choose */
		to.msg_control = control;
		to.msg_controllen = sizeof control;
		struct cmsghdr *header = CMSG_FIRSTHDR(&to);
		header->cmsg_level = IPPROTO_IPV6;
		header->cmsg_type = IPV6_PKTINFO;
		header->cmsg_len = CMSG_LEN(sizeof from);
		memcpy(CMSG_DATA(header), &from, sizeof from);
	}
	(void)sendmsg(listener->fd, &to, 0);
}

void udp_reply(size_t index)
{
	struct flow *flow = &flows[index];
	if (!flow->used)
		return;
	ssize_t length = recv(flow->fd, datagram, sizeof datagram, 0);
	if (length < 0) /* refused: who asks again gets a new answer */
		return;
	flow->last_ms = now_ms();
	answer(flow, (size_t)length);
}
