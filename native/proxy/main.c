/*
 * hutch-proxy: holds the published ports of one instance, and relays what the kernel cannot.
 *
 *   hutch-proxy -l LOCK -o PIDFD [-f] PROTOCOL,ADDRESS,PORT,TARGET,TARGET_PORT …
 *
 * The packet filter redirects IPv4 traffic before it gets here; [::1], and IPv6 to an instance
 * that has none, are relayed. It binds, gives up all privileges, goes into the background
 * (unless -f) and only then does the starting process end: with 0 when the ports are held, 3
 * when one is taken (it is named on stderr), else 1 or 2. It ends with the process of PIDFD,
 * and holds a record lock on LOCK until then.
 */
#include "proxy.h"

#include "../background.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_USAGE = 2, EXIT_TAKEN = 3 };
enum { FIELDS = 5, SPARE_FILES = 32 };

struct proxy proxy;

struct arguments {
	const char *lock;
	int owner, foreground;
};

static _Noreturn void die(int code, const char *what)
{
	fprintf(stderr, "hutch-proxy: %s: %s\n", what, strerror(errno));
	exit(code);
}

long long now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int control(int how, int fd, enum kind kind, size_t index, uint32_t events)
{
	struct epoll_event event = {.events = events};
	event.data.u64 = (uint64_t)kind << 32 | index;
	return epoll_ctl(proxy.epoll, how, fd, &event);
}

int watch(int fd, enum kind kind, size_t index, uint32_t events)
{
	return control(EPOLL_CTL_ADD, fd, kind, index, events);
}

int rewatch(int fd, enum kind kind, size_t index, uint32_t events)
{
	return control(EPOLL_CTL_MOD, fd, kind, index, events);
}

static int parse_number(const char *text, int lowest, int highest, int *out)
{
	char *end;
	errno = 0;
	long value = strtol(text, &end, 10);
	if (errno || end == text || *end || value < lowest || value > highest)
		return 0;
	*out = (int)value;
	return 1;
}

static socklen_t parse_address(const char *text, const char *port, struct sockaddr_storage *out)
{
	struct sockaddr_in *in = (struct sockaddr_in *)out;
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)out;
	int number;
	memset(out, 0, sizeof *out);
	if (!parse_number(port, 1, 65535, &number))
		return 0;
	if (inet_pton(AF_INET, text, &in->sin_addr) == 1) {
		in->sin_family = AF_INET;
		in->sin_port = htons((uint16_t)number);
		return sizeof *in;
	}
	if (inet_pton(AF_INET6, text, &in6->sin6_addr) == 1) {
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons((uint16_t)number);
		return sizeof *in6;
	}
	return 0;
}

static int open_listener(struct listener *listener, const struct sockaddr_storage *at,
			 socklen_t length)
{
	int on = 1, fd = socket(at->ss_family, listener->type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -1;
	if (listener->type == SOCK_STREAM)
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (at->ss_family == AF_INET6) {
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
		setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
	}
	if (bind(fd, (const struct sockaddr *)at, length) < 0 ||
	    (listener->type == SOCK_STREAM && listen(fd, 128) < 0)) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

/* Open what PROTOCOL,ADDRESS,PORT,TARGET,TARGET_PORT says. */
static void open_mapping(const char *given, struct listener *listener)
{
	char copy[192], *fields[FIELDS], *rest = copy;
	struct sockaddr_storage at;
	size_t length = strlen(given);
	socklen_t at_length;

	if (length >= sizeof copy)
		exit(EXIT_USAGE);
	memcpy(copy, given, length + 1);
	for (int i = 0; i < FIELDS; i++) {
		fields[i] = strsep(&rest, ",");
		if (!fields[i])
			exit(EXIT_USAGE);
	}
	listener->type = strcmp(fields[0], "tcp") == 0 ? SOCK_STREAM : SOCK_DGRAM;
	at_length = parse_address(fields[1], fields[2], &at);
	listener->target_length = parse_address(fields[3], fields[4], &listener->target);
	if (rest || !at_length || !listener->target_length ||
	    (listener->type == SOCK_DGRAM && strcmp(fields[0], "udp") != 0))
		exit(EXIT_USAGE);
	listener->family = at.ss_family;
	listener->fd = open_listener(listener, &at, at_length);
	if (listener->fd < 0)
		die(errno == EADDRINUSE || errno == EADDRNOTAVAIL ? EXIT_TAKEN : 1, given);
}

static rlim_t allow_files(size_t listeners)
{
	struct rlimit limit;
	rlim_t wanted = listeners + 2 * STREAMS_MAX + FLOWS_MAX + SPARE_FILES;
	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		return wanted;
	if (limit.rlim_max < wanted)
		wanted = limit.rlim_max;
	limit.rlim_cur = wanted;
	setrlimit(RLIMIT_NOFILE, &limit);
	return wanted;
}

/* A record lock tells who has it (F_GETLK), and is not the child's of whoever took it. */
static void take_lock(int fd)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	if (fcntl(fd, F_SETLK, &lock) < 0)
		die(1, "lock");
}

/* As go_to_background, but the starter ends only when the child has the lock. */
static void go_on_behind(int lock)
{
	int ready[2];
	char byte = 0;
	if (pipe2(ready, O_CLOEXEC) < 0)
		die(1, "pipe");
	pid_t pid = fork();
	if (pid < 0)
		die(1, "fork");
	if (pid > 0) {
		close(ready[1]);
		_exit(read(ready[0], &byte, 1) == 1 ? 0 : 1);
	}
	take_lock(lock);
	if (enter_background() < 0 || write(ready[1], &byte, 1) != 1)
		_exit(1);
	close(ready[0]);
	close(ready[1]);
}

/* The end of a process gives its record locks back before its sockets: whoever sees that the
 * lock is free must find the ports free too. */
static _Noreturn void leave(void)
{
	for (size_t i = 0; i < proxy.count; i++)
		close(proxy.listeners[i].fd);
	exit(0);
}

static void dispatch(const struct epoll_event *event)
{
	size_t index = (size_t)(event->data.u64 & 0xffffffffu);
	switch ((enum kind)(event->data.u64 >> 32)) {
	case KIND_OWNER:
		leave();
	case KIND_LISTENER:
		if (proxy.listeners[index].type == SOCK_STREAM)
			tcp_accept(index);
		else
			udp_request(index);
		break;
	case KIND_CLIENT:
		tcp_event(index, 0, event->events);
		break;
	case KIND_SERVER:
		tcp_event(index, 1, event->events);
		break;
	case KIND_FLOW:
		udp_reply(index);
		break;
	}
}

static _Noreturn void serve(void)
{
	/* One at a time: what an event belongs to may be gone after another. */
	struct epoll_event event;
	for (;;) {
		long long udp = udp_expire(), tcp = tcp_timeout();
		long long timeout = udp < 0 || (tcp >= 0 && tcp < udp) ? tcp : udp;
		int count = epoll_wait(proxy.epoll, &event, 1, timeout < 0 ? -1 : (int)timeout + 1);
		if (count < 0 && errno != EINTR)
			exit(1);
		if (count == 1)
			dispatch(&event);
	}
}

static void parse_arguments(int argc, char **argv, struct arguments *out)
{
	int option;
	out->owner = -1;
	while ((option = getopt(argc, argv, "l:o:f")) != -1) {
		if (option == 'l')
			out->lock = optarg;
		else if (option == 'f')
			out->foreground = 1;
		else if (option != 'o' || !parse_number(optarg, 0, 1 << 20, &out->owner))
			exit(EXIT_USAGE);
	}
	if (!out->lock || out->owner < 0 || optind == argc)
		exit(EXIT_USAGE);
}

int main(int argc, char **argv)
{
	struct arguments arguments = {0};
	parse_arguments(argc, argv, &arguments);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	umask(077);
	int lock = open(arguments.lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (lock < 0)
		die(1, "lock");
	proxy.epoll = epoll_create1(EPOLL_CLOEXEC);
	proxy.listeners = calloc((size_t)(argc - optind), sizeof *proxy.listeners);
	if (proxy.epoll < 0 || !proxy.listeners)
		die(1, "epoll_create1");
	rlim_t files = allow_files((size_t)(argc - optind));
	for (int i = optind; i < argc; i++, proxy.count++) {
		open_mapping(argv[i], &proxy.listeners[proxy.count]);
		if (watch(proxy.listeners[proxy.count].fd, KIND_LISTENER, proxy.count, EPOLLIN) < 0)
			die(1, "epoll_ctl");
	}
	fcntl(arguments.owner, F_SETFD, FD_CLOEXEC);
	if (watch(arguments.owner, KIND_OWNER, 0, EPOLLIN) < 0)
		die(1, "owner");
	if (chdir("/") < 0 || drop_privileges(files) < 0)
		die(1, "setuid");
	if (arguments.foreground)
		take_lock(lock);
	else
		go_on_behind(lock);
	serve();
}
