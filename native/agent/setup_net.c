/* SETUP operations on network devices: names, addresses, routes. */
#include <dirent.h>
#include <limits.h>
#include <linux/if_addr.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "../net.h"
#include "../text.h"
#include "agent.h"

enum { MOST_LINKS = 32, MOST_ADDRESSES = 256, MAC_BYTES = 6 };

struct found {
	char device[PATH_MAX / 4]; /* in sysfs: sorts in PCI order */
	char name[IFNAMSIZ];
};

static int by_device(const void *a, const void *b)
{
	return strcmp(((const struct found *)a)->device, ((const struct found *)b)->device);
}

/* Fill in where the device of a link is; false when it is no virtio device. */
static bool is_virtio(const char *name, struct found *f)
{
	char path[64 + IFNAMSIZ];
	struct text t = text_in(path, sizeof(path));
	ssize_t n;

	if (strlen(name) >= IFNAMSIZ)
		return false;
	strcpy(f->name, name);
	text_add(&t, "/sys/class/net/");
	text_add(&t, name);
	n = readlink(path, f->device, sizeof(f->device) - 1);
	if (n < 0)
		return false;
	f->device[n] = 0;
	return strstr(f->device, "/virtio") != NULL;
}

/* Sockets that stay open: a clone has them from its template, and making one takes an emulated
 * processor longer than what is then asked of it. */

static int inet_socket(void)
{
	static int fd = -1;

	if (fd < 0)
		fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	return fd;
}

static int route_socket(void)
{
	static int fd = -1;
	struct sockaddr_nl any = { .nl_family = AF_NETLINK };

	if (fd >= 0)
		return fd;
	fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	if (fd >= 0)
		(void)!bind(fd, (const struct sockaddr *)&any, sizeof(any));
	return fd;
}

/* Which device was the n-th when that was last looked up, as the kernel numbers them. */
static int known[MOST_LINKS];

void links_changed(void)
{
	memset(known, 0, sizeof(known));
}

static bool known_link(uint32_t n, char name[IFNAMSIZ])
{
	struct ifreq q = { 0 };

	if (n >= MOST_LINKS || !known[n])
		return false;
	q.ifr_ifindex = known[n];
	if (ioctl(inet_socket(), SIOCGIFNAME, &q) < 0)
		return false;
	memcpy(name, q.ifr_name, IFNAMSIZ);
	return true;
}

/* The name of the n-th virtio network device. */
static bool nth_link(uint32_t n, char name[IFNAMSIZ])
{
	static struct found links[MOST_LINKS];
	size_t count = 0;
	struct dirent *entry;
	DIR *dir = opendir("/sys/class/net");

	while (dir && count < MOST_LINKS && (entry = readdir(dir)))
		if (is_virtio(entry->d_name, &links[count]))
			count++;
	if (dir)
		closedir(dir);
	if (n >= count)
		return false;
	qsort(links, count, sizeof(links[0]), by_device);
	memcpy(name, links[n].name, IFNAMSIZ);
	known[n] = (int)if_nametoindex(name);
	return true;
}

static int take_down(int fd, struct ifreq *q)
{
	if (ioctl(fd, SIOCGIFFLAGS, q) < 0)
		return errno;
	if (!(q->ifr_flags & IFF_UP))
		return 0;
	q->ifr_flags &= (short)~IFF_UP;
	return ioctl(fd, SIOCSIFFLAGS, q) < 0 ? errno : 0;
}

/* One that is up already keeps that, unless it is renamed: kernels before 6.2 refuse it then. */
static int configure(int fd, struct ifreq *q, const char *name, const uint8_t *mac, uint32_t mtu)
{
	if (strcmp(q->ifr_name, name) != 0) {
		int error = take_down(fd, q);
		if (error)
			return error;
		memset(&q->ifr_ifru, 0, sizeof(q->ifr_ifru));
		memcpy(q->ifr_newname, name, strlen(name));
		if (ioctl(fd, SIOCSIFNAME, q) < 0)
			return errno;
		memcpy(q->ifr_name, name, strlen(name) + 1);
	}
	if (mac) {
		memset(&q->ifr_ifru, 0, sizeof(q->ifr_ifru));
		q->ifr_hwaddr.sa_family = ARPHRD_ETHER;
		memcpy(q->ifr_hwaddr.sa_data, mac, MAC_BYTES);
		if (ioctl(fd, SIOCSIFHWADDR, q) < 0)
			return errno;
	}
	if (mtu) {
		memset(&q->ifr_ifru, 0, sizeof(q->ifr_ifru));
		q->ifr_mtu = (int)mtu;
		if (ioctl(fd, SIOCSIFMTU, q) < 0)
			return errno;
	}
	return 0;
}

int setup_interface(struct reader *r, const char **what)
{
	uint32_t n = read_u32(r), mac_len, mtu;
	const char *name = *what = read_str(r);
	const uint8_t *mac = read_bytes(r, &mac_len);
	struct ifreq request;
	int fd;

	mtu = read_u32(r);
	if (!*name || strlen(name) >= IFNAMSIZ || (mac_len && mac_len != MAC_BYTES) || mtu > INT_MAX)
		return EINVAL;
	memset(&request, 0, sizeof(request));
	fd = inet_socket();
	if (fd < 0 || route_socket() < 0)
		return errno;
	if (!known_link(n, request.ifr_name) && !nth_link(n, request.ifr_name))
		return SETUP_WAIT;
	return configure(fd, &request, name, mac_len ? mac : NULL, mtu);
}

int setup_link_up(struct reader *r, const char **what)
{
	int fd = inet_socket();

	*what = read_str(r);
	return fd < 0 || link_set_up_by(fd, *what) < 0 ? errno : 0;
}

/* Down, a device loses its routes and its IPv6 addresses; those of IPv4 go one by one. */
static int forget_addresses(int fd, struct ifreq *q)
{
	int error = take_down(fd, q);

	if (error)
		return error;
	for (int i = 0; i < MOST_ADDRESSES; i++) {
		memset(&q->ifr_ifru, 0, sizeof(q->ifr_ifru));
		q->ifr_addr.sa_family = AF_INET;
		if (ioctl(fd, SIOCGIFADDR, q) < 0)
			return errno == EADDRNOTAVAIL ? 0 : errno;
		memset(&q->ifr_ifru, 0, sizeof(q->ifr_ifru));
		q->ifr_addr.sa_family = AF_INET; /* and no address: the present one goes */
		if (ioctl(fd, SIOCSIFADDR, q) < 0)
			return errno;
	}
	return EBUSY;
}

int setup_flush(struct reader *r, const char **what)
{
	const char *name = *what = read_str(r);
	struct ifreq request;
	int fd, error;

	if (!*name || strlen(name) >= IFNAMSIZ)
		return EINVAL;
	memset(&request, 0, sizeof(request));
	strcpy(request.ifr_name, name);
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return errno;
	error = forget_addresses(fd, &request);
	close(fd);
	return error;
}

/* What is down has no routes, and its addresses answer to nobody; its name is free then. */
int setup_retire(struct reader *r, const char **what)
{
	const char *name = *what = read_str(r), *aside = read_str(r);
	struct ifreq q;
	int fd, error;

	if (!*name || strlen(name) >= IFNAMSIZ || !*aside || strlen(aside) >= IFNAMSIZ)
		return EINVAL;
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return errno;
	memset(&q, 0, sizeof(q));
	memcpy(q.ifr_name, name, strlen(name));
	error = take_down(fd, &q);
	memset(&q.ifr_ifru, 0, sizeof(q.ifr_ifru));
	memcpy(q.ifr_newname, aside, strlen(aside));
	if (!error && ioctl(fd, SIOCSIFNAME, &q) < 0)
		error = errno;
	close(fd);
	return error;
}

/* A netlink message: head, one fixed part, attributes. */
struct message {
	_Alignas(struct nlmsghdr) uint8_t bytes[256];
	size_t len;
};

static void begin(struct message *m, uint16_t type, uint16_t flags, const void *part, size_t n)
{
	struct nlmsghdr head = { .nlmsg_type = type,
				 .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags) };

	memset(m, 0, sizeof(*m));
	memcpy(m->bytes, &head, sizeof(head));
	memcpy(m->bytes + NLMSG_HDRLEN, part, n);
	m->len = NLMSG_HDRLEN + NLMSG_ALIGN(n);
}

static void attribute(struct message *m, uint16_t type, const void *value, size_t n)
{
	struct rtattr head = { .rta_len = (uint16_t)(RTA_LENGTH(n)), .rta_type = type };

	memcpy(m->bytes + m->len, &head, sizeof(head));
	memcpy(m->bytes + m->len + RTA_LENGTH(0), value, n);
	m->len += RTA_ALIGN(head.rta_len);
}

static int transact(struct message *m)
{
	uint32_t len = (uint32_t)m->len;
	int fd = route_socket();

	if (fd < 0)
		return errno;
	memcpy(m->bytes, &len, sizeof(len));
	return send(fd, m->bytes, m->len, 0) < 0 ? errno : netlink_answer(fd);
}

/* As if_nametoindex(3), which makes a socket for it. */
static uint32_t index_of(const char *name)
{
	struct ifreq q = { 0 };

	if (strlen(name) >= IFNAMSIZ)
		return 0;
	strcpy(q.ifr_name, name);
	return ioctl(inet_socket(), SIOCGIFINDEX, &q) < 0 ? 0 : (uint32_t)q.ifr_ifindex;
}

int setup_address(struct reader *r, const char **what)
{
	const char *name = *what = read_str(r);
	uint32_t len, prefix, index = index_of(name);
	const uint8_t *address = read_bytes(r, &len);
	struct ifaddrmsg body = { .ifa_index = index };
	struct message m;

	prefix = read_u32(r);
	if (!index)
		return ENODEV;
	if ((len != 4 && len != 16) || prefix > len * 8)
		return EINVAL;
	body.ifa_family = len == 4 ? AF_INET : AF_INET6;
	body.ifa_prefixlen = (uint8_t)prefix;
	body.ifa_flags = len == 16 ? IFA_F_NODAD : 0; /* the host gave it to nobody else */
	begin(&m, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body, sizeof(body));
	attribute(&m, IFA_LOCAL, address, len);
	attribute(&m, IFA_ADDRESS, address, len);
	return transact(&m);
}

int setup_route(struct reader *r, const char **what)
{
	const char *name = *what = read_str(r);
	uint32_t len, index = index_of(name);
	const uint8_t *gateway = read_bytes(r, &len);
	struct rtmsg body = { .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_BOOT,
			      .rtm_scope = RT_SCOPE_UNIVERSE, .rtm_type = RTN_UNICAST };
	struct message m;

	if (!index)
		return ENODEV;
	if (len != 4 && len != 16)
		return EINVAL;
	body.rtm_family = len == 4 ? AF_INET : AF_INET6;
	begin(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body, sizeof(body));
	attribute(&m, RTA_GATEWAY, gateway, len);
	attribute(&m, RTA_OIF, &index, sizeof(index));
	return transact(&m);
}
