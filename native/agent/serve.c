/* The loop: the channel to the host, the sockets of the relays, ended children, devices. */
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <time.h>
#include <sys/wait.h>
#include <sys/socket.h>

#include "agent.h"

enum { EVENTS = 64 };

struct agent the;

static struct watch peer, children, devices;
static bool deaf; /* the host's end is not open */
static bool have_ended; /* children */

int watch_set(struct watch *w, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.ptr = w };
	int what = !events ? EPOLL_CTL_DEL : w->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;

	if (events == w->events)
		return 0;
	w->events = events;
	return epoll_ctl(the.epoll, what, w->fd, &event);
}

static int opened(struct mux *m, struct mux_channel *ch)
{
	(void)m;
	return ch->kind == MUX_CALL ? call_open(ch) : relay_open(ch);
}

static size_t data(struct mux *m, struct mux_channel *ch, const uint8_t *bytes, size_t n)
{
	(void)m;
	return ch->kind == MUX_CALL ? call_data(ch, bytes, n) : relay_data(ch, bytes, n);
}

static void eof(struct mux *m, struct mux_channel *ch)
{
	(void)m;
	if (ch->kind == MUX_CALL)
		call_eof(ch);
	else
		relay_eof(ch);
}

static void closed(struct mux *m, struct mux_channel *ch, uint32_t error)
{
	(void)m;
	if (ch->kind == MUX_CALL)
		call_closed(ch);
	else
		relay_closed(ch, error == ECONNRESET);
}

static void greeted(struct mux *m)
{
	(void)m;
	relay_greeted();
}

static void ready(struct mux *m, struct mux_channel *ch)
{
	(void)m;
	if (ch->kind == MUX_CALL)
		call_ready(ch);
	else
		relay_ready(ch);
}

static const struct mux_handler handler = {
	.opened = opened, .data = data, .eof = eof, .closed = closed, .ready = ready,
	.greeted = greeted,
};

/* The host may come back (a virtio port outlives its peers); a test's socket does not. */
static void peer_gone(void)
{
	mux_reset(&the.mux);
	if (!the.init)
		_exit(0);
	deaf = true;
}

/* While nobody is at the other end the port says so without a pause: hear of changes only. */
static void peer_watch(void)
{
	uint32_t events = (mux_may_read(&the.mux) ? EPOLLIN : 0) |
			  (mux_pending(&the.mux) ? EPOLLOUT : 0);

	watch_set(&peer, deaf ? EPOLLIN | EPOLLET : events ? events : EPOLLERR);
}

static void peer_ready(struct watch *w, uint32_t events)
{
	enum mux_result result = MUX_OK;

	(void)w;
	if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
		result = mux_read(&the.mux);
	if (result == MUX_OK && deaf && (events & EPOLLIN))
		deaf = false;
	if (result == MUX_BROKEN)
		mux_reset(&the.mux);
	else if (result == MUX_GONE)
		peer_gone();
}

static void children_ready(struct watch *w, uint32_t events)
{
	struct signalfd_siginfo info[8];

	(void)events;
	while (read(w->fd, info, sizeof(info)) == sizeof(info))
		;
	have_ended = true;
}

/* After the host has been told: it waits for what they said, not for their burial. */
static void reap(void)
{
	if (!have_ended)
		return;
	have_ended = false;
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

static void devices_ready(struct watch *w, uint32_t events)
{
	char message[4096];

	(void)events;
	while (recv(w->fd, message, sizeof(message), MSG_DONTWAIT) > 0)
		;
	links_changed();
	call_device_came();
}

static void watch_children(void)
{
	sigset_t mask;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&mask);
	sigaddset(&mask, SIGCHLD);
	sigprocmask(SIG_BLOCK, &mask, NULL);
	children = (struct watch){ .ready = children_ready,
				   .fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK) };
	if (children.fd < 0 || watch_set(&children, EPOLLIN) < 0)
		give_up("signalfd");
}

static void watch_devices(void)
{
	if (the.uevents < 0)
		return;
	devices = (struct watch){ .ready = devices_ready, .fd = the.uevents };
	watch_set(&devices, EPOLLIN);
}

static int timeout_ms(void)
{
	int call = call_timeout_ms(), launcher = spare_timeout_ms();

	return call < 0 || (launcher >= 0 && launcher < call) ? launcher : call;
}

static void turn(void)
{
	struct epoll_event events[EVENTS];
	int n = epoll_wait(the.epoll, events, EVENTS, timeout_ms());

	if (n < 0 && errno != EINTR)
		give_up("epoll_wait");
	for (int i = 0; i < n; i++) {
		struct watch *w = events[i].data.ptr;
		if (w->events) /* an earlier event of this turn may have ended it */
			w->ready(w, events[i].events);
	}
	if (n == 0)
		call_device_came(); /* a deadline */
	switch (mux_flush(&the.mux)) {
	case MUX_BROKEN: mux_reset(&the.mux); break;
	case MUX_GONE: peer_gone(); break;
	case MUX_OK: break;
	}
	peer_watch();
	relay_free_dead();
	reap();
	if (n == 0)
		spare_start();
}

void serve(int fd)
{
	struct timespec start;

	/* Mapping memory anew for every request costs an emulated processor more than the request. */
	buffer_keep(4);
	the.main_fd = -1;
	the.epoll = epoll_create1(EPOLL_CLOEXEC);
	if (the.epoll < 0)
		give_up("epoll_create1");
	clock_gettime(CLOCK_BOOTTIME, &start);
	mux_init(&the.mux, fd, false, &handler);
	the.mux.start_ns = (uint64_t)start.tv_sec * 1000000000u + (uint64_t)start.tv_nsec;
	peer = (struct watch){ .ready = peer_ready, .fd = fd };
	watch_children();
	watch_devices();
	peer_watch();
	spare_wanted(0);
	for (;;)
		turn();
}
