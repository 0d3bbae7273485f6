/*
 * hutch-dns: the name server of one network.
 *
 *   hutch-dns -d DIRECTORY -l ADDRESS [-l ADDRESS] [-i DEVICE] [-p PORT] [-r RESOLV_CONF] [-f]
 *
 * It answers for the instances in DIRECTORY/hosts, asks the servers of RESOLV_CONF for other
 * names, and leaves when the file does. It binds, gives up all privileges, goes into the
 * background (unless -f) and only then does the starting process end: with 0 when names are
 * served, 3 when the port is taken, 4 when another one serves this directory, else 1.
 */
#include "../background.h"
#include "server.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#define HOSTS_FILE_MAX (8u << 20)
enum { EXIT_TAKEN = 3, EXIT_SERVED = 4 };

struct arguments {
	const char *directory, *device;
	int foreground;
};

static struct server server = {.port = 53, .upstreams.path = "/etc/resolv.conf"};

static _Noreturn void die(int code, const char *what)
{
	fprintf(stderr, "hutch-dns: %s: %s\n", what, strerror(errno));
	exit(code);
}

long long now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int control(struct server *to, int how, int fd, enum kind kind, size_t index,
		   uint32_t events)
{
	struct epoll_event event = {.events = events};
	event.data.u64 = (uint64_t)kind << 32 | index;
	return epoll_ctl(to->epoll, how, fd, &event);
}

int watch(struct server *to, int fd, enum kind kind, size_t index, uint32_t events)
{
	return control(to, EPOLL_CTL_ADD, fd, kind, index, events);
}

int rewatch(struct server *to, int fd, enum kind kind, size_t index, uint32_t events)
{
	return control(to, EPOLL_CTL_MOD, fd, kind, index, events);
}

socklen_t address_to_socket(const struct address *address, uint16_t port,
			    struct sockaddr_storage *out)
{
	memset(out, 0, sizeof *out);
	if (address->family == 4) {
		struct sockaddr_in *in = (struct sockaddr_in *)out;
		in->sin_family = AF_INET;
		in->sin_port = htons(port);
		memcpy(&in->sin_addr, address->bytes, 4);
		return sizeof *in;
	}
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)out;
	in6->sin6_family = AF_INET6;
	in6->sin6_port = htons(port);
	memcpy(&in6->sin6_addr, address->bytes, 16);
	return sizeof *in6;
}

void address_from_socket(const struct sockaddr_storage *from, struct address *out)
{
	memset(out, 0, sizeof *out);
	if (from->ss_family == AF_INET) {
		out->family = 4;
		memcpy(out->bytes, &((const struct sockaddr_in *)from)->sin_addr, 4);
	} else if (from->ss_family == AF_INET6) {
		out->family = 6;
		memcpy(out->bytes, &((const struct sockaddr_in6 *)from)->sin6_addr, 16);
	}
}

static int open_socket(const struct address *address, const char *device, int type)
{
	struct sockaddr_storage at;
	socklen_t length = address_to_socket(address, server.port, &at);
	int on = 1;
	int fd = socket(at.ss_family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		die(1, "socket");
	if (type == SOCK_STREAM)
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (at.ss_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
	/* Members of the network only: queries by other bridges are not heard. */
	if (device &&
	    setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, device, (socklen_t)strlen(device) + 1) < 0)
		die(1, device);
	if (bind(fd, (struct sockaddr *)&at, length) < 0)
		die(errno == EADDRINUSE ? EXIT_TAKEN : 1, "bind");
	if (type == SOCK_STREAM && listen(fd, 64) < 0)
		die(1, "listen");
	return fd;
}

static void load_hosts(void)
{
	int fd = openat(server.directory, "hosts", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0) {
		if (errno == ENOENT && server.names)
			exit(0);
		if (!server.names)
			die(1, "hosts");
		return;
	}
	struct stat status;
	char *text = NULL;
	size_t length = 0;
	if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_size >= 0 &&
	    status.st_size <= (off_t)HOSTS_FILE_MAX)
		text = malloc((size_t)status.st_size + 1);
	while (text && length < (size_t)status.st_size) {
		ssize_t got = read(fd, text + length, (size_t)status.st_size - length);
		if (got <= 0)
			break;
		length += (size_t)got;
	}
	close(fd);
	struct names *fresh = NULL;
	if (text) {
		text[length] = 0;
		fresh = names_parse(text, length);
	}
	if (!fresh && !server.names) {
		errno = EINVAL;
		die(1, "hosts");
	}
	if (fresh) {
		names_free(server.names);
		server.names = fresh;
	}
}

static void read_inotify(void)
{
	static char events[4096] __attribute__((aligned(8)));
	while (read(server.inotify, events, sizeof events) > 0) {
	}
	load_hosts();
}

static void dispatch(const struct epoll_event *event)
{
	size_t index = (size_t)(event->data.u64 & 0xffffffffu);
	switch ((enum kind)(event->data.u64 >> 32)) {
	case KIND_INOTIFY:
		break; /* done before all others */
	case KIND_UDP:
		udp_query(&server, index);
		break;
	case KIND_TCP:
		tcp_accept(&server, index);
		break;
	case KIND_PENDING:
		udp_reply(&server, index);
		break;
	case KIND_STREAM:
		tcp_event(&server, index, 0, event->events);
		break;
	case KIND_STREAM_UPSTREAM:
		tcp_event(&server, index, 1, event->events);
		break;
	}
}

static _Noreturn void serve(void)
{
	struct epoll_event events[32];
	for (;;) {
		long long udp = udp_expire(&server), tcp = tcp_expire(&server);
		long long timeout = udp < 0 || (tcp >= 0 && tcp < udp) ? tcp : udp;
		int count =
			epoll_wait(server.epoll, events, 32, timeout < 0 ? -1 : (int)timeout + 1);
		if (count < 0 && errno != EINTR)
			exit(1);
		/* A name written before a query was sent must be known to its answer. */
		for (int i = 0; i < count; i++)
			if (events[i].data.u64 >> 32 == KIND_INOTIFY)
				read_inotify();
		for (int i = 0; i < count; i++)
			dispatch(&events[i]);
	}
}

static void parse_arguments(int argc, char **argv, struct arguments *out)
{
	int option;
	while ((option = getopt(argc, argv, "d:l:i:p:r:f")) != -1) {
		struct address address;
		if (option == 'd')
			out->directory = optarg;
		else if (option == 'i')
			out->device = optarg;
		else if (option == 'p')
			server.port = (uint16_t)atoi(optarg);
		else if (option == 'r')
			server.upstreams.path = optarg;
		else if (option == 'f')
			out->foreground = 1;
		else if (option == 'l' && server.listener_count < LISTENERS_MAX &&
			 address_parse(optarg, &address))
			server.listeners[server.listener_count++].address = address;
		else
			exit(2);
	}
	if (!out->directory || server.listener_count == 0)
		exit(2);
}

/* One server per directory: the lock is held by the open file, so it ends with the process. */
static void take_lock(const char *directory)
{
	server.directory = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (server.directory < 0)
		die(1, directory);
	int fd = openat(server.directory, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		die(1, "lock");
	if (flock(fd, LOCK_EX | LOCK_NB) < 0)
		die(EXIT_SERVED, "lock");
}

static void open_listeners(const char *device)
{
	for (size_t i = 0; i < server.listener_count; i++) {
		struct listener *listener = &server.listeners[i];
		listener->udp = open_socket(&listener->address, device, SOCK_DGRAM);
		listener->tcp = open_socket(&listener->address, device, SOCK_STREAM);
		if (watch(&server, listener->udp, KIND_UDP, i, EPOLLIN) < 0 ||
		    watch(&server, listener->tcp, KIND_TCP, i, EPOLLIN) < 0)
			die(1, "epoll_ctl");
	}
}

static void watch_directory(const char *directory)
{
	server.inotify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	if (server.inotify < 0 ||
	    inotify_add_watch(server.inotify, directory,
			      IN_MOVED_TO | IN_MOVED_FROM | IN_DELETE | IN_DELETE_SELF) < 0 ||
	    watch(&server, server.inotify, KIND_INOTIFY, 0, EPOLLIN) < 0)
		die(1, "inotify");
}

int main(int argc, char **argv)
{
	struct arguments arguments = {0};
	parse_arguments(argc, argv, &arguments);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	umask(077);
	take_lock(arguments.directory);
	server.epoll = epoll_create1(EPOLL_CLOEXEC);
	if (server.epoll < 0)
		die(1, "epoll_create1");
	watch_directory(arguments.directory);
	load_hosts();
	open_listeners(arguments.device);
	if (chdir("/") < 0)
		die(1, "chdir");
	if (drop_privileges(1024) < 0)
		die(1, "setuid");
	if (!arguments.foreground && go_to_background() < 0)
		die(1, "fork");
	serve();
}
