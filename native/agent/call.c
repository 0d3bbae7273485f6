/* CALL channels: a request, its answer. A SETUP may wait for a device in between. */
#include <stdlib.h>
#include <sys/ioctl.h>
#include <linux/fs.h>

#include "../text.h"
#include "agent.h"

enum { CALL_SETUP = 1, CALL_PING, CALL_SHUTDOWN, CALL_STATS, CALL_FREEZE, CALL_THAW,
       CALL_PROCESSES, CALL_QUIESCE, CALL_RESUME };

#define DEVICE_NS 10000000000u

struct call {
	struct mux_channel *ch;
	struct call *next; /* of those that wait */
	struct buffer request;
	struct answer answer;
	size_t head;       /* where the op's own part of the answer begins; 0: nothing there */
	struct reader operations;
	uint32_t index, count;
	uint64_t deadline;
	bool answered;
};

int call_open(struct mux_channel *ch)
{
	struct call *c = calloc(1, sizeof(*c));

	if (!c)
		return ENOMEM;
	c->ch = ch;
	ch->owner = c;
	return 0;
}

static void drop_request(struct call *c)
{
	the.pending -= c->request.len;
	buffer_free(&c->request);
}

static void stop_waiting(struct call *c)
{
	for (struct call **at = &the.waiting; *at; at = &(*at)->next) {
		if (*at != c)
			continue;
		*at = c->next;
		return;
	}
}

void call_closed(struct mux_channel *ch)
{
	struct call *c = ch->owner;

	stop_waiting(c);
	if (the.quiescing == c)
		the.quiescing = NULL;
	drop_request(c);
	buffer_free(&c->answer.bytes);
	free(c);
	ch->owner = NULL;
}

static void close_with(struct call *c, int error)
{
	struct mux_channel *ch = c->ch;

	call_closed(ch);
	mux_close(&the.mux, ch, (uint32_t)error);
}

size_t call_data(struct mux_channel *ch, const uint8_t *data, size_t n)
{
	struct call *c = ch->owner;

	if (c->request.len + n > MAX_REQUEST)
		close_with(c, EMSGSIZE);
	else if (the.pending + n > MAX_PENDING ||
		 !buffer_put(&c->request, data, n, MAX_REQUEST))
		close_with(c, ENOBUFS);
	else
		the.pending += n;
	return n;
}

void call_ready(struct mux_channel *ch)
{
	struct call *c = ch->owner;
	struct buffer *b = &c->answer.bytes;

	if (!c->answered)
		return;
	buffer_drop(b, mux_send(&the.mux, ch, b->data + b->off, b->len));
	if (!b->len)
		close_with(c, 0);
}

/* The head goes before what the operation has put into its own answer. */
static void answer(struct call *c, int error, uint32_t index, const char *detail)
{
	struct answer own = c->answer;

	c->answer = (struct answer){ 0 };
	answer_u32(&c->answer, (uint32_t)error);
	answer_u32(&c->answer, index);
	answer_str(&c->answer, detail);
	if (!error && own.bytes.len)
		answer_bytes(&c->answer, own.bytes.data + own.bytes.off, own.bytes.len);
	c->answer.failed |= own.failed;
	buffer_free(&own.bytes);
	drop_request(c);
	if (c->answer.failed) {
		close_with(c, ENOMEM);
		return;
	}
	c->answered = true;
	call_ready(c->ch);
}

/* Go on with a SETUP until its end or a device that is not there. */
static void go_on(struct call *c)
{
	while (c->index < c->count) {
		struct reader before = c->operations;
		const char *what = "";
		struct op op;
		int error;
		if (!next_op(&c->operations, &op))
			error = EPROTO; /* cannot be: all of it was checked */
		else
			error = setup_run(&op, &what);
		if (error == SETUP_WAIT && mono_ns() < c->deadline) {
			c->operations = before;
			c->next = the.waiting;
			the.waiting = c;
			return;
		}
		if (error) {
			answer(c, error == SETUP_WAIT ? ETIMEDOUT : error, c->index, what);
			return;
		}
		c->index++;
		c->deadline = mono_ns() + DEVICE_NS;
	}
	answer(c, 0, 0, "");
}

static void begin_setup(struct call *c, struct reader *r)
{
	uint32_t bad = 0;

	c->count = read_count(r);
	c->operations = *r;
	if (r->bad || !setup_fits(*r, c->count, &bad)) {
		answer(c, EPROTO, bad, "an operation that cannot be read");
		return;
	}
	c->deadline = mono_ns() + DEVICE_NS;
	go_on(c);
}

void call_device_came(void)
{
	struct call *c = the.waiting;

	the.waiting = NULL;
	while (c) {
		struct call *next = c->next;
		c->next = NULL;
		go_on(c);
		c = next;
	}
}

int call_timeout_ms(void)
{
	uint64_t first = 0, now;

	for (const struct call *c = the.waiting; c; c = c->next)
		if (!first || c->deadline < first)
			first = c->deadline;
	if (!first)
		return -1;
	now = mono_ns();
	return first <= now ? 0 : (int)((first - now) / 1000000 + 1);
}

/* Hold all writing to the file system of a path, or go on. */
static int freeze(const char *path, bool frozen)
{
	int error = 0, fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	if (ioctl(fd, frozen ? FIFREEZE : FITHAW, 0) < 0)
		error = errno;
	close(fd);
	return error;
}

void call_quiet(int error)
{
	struct call *c = the.quiescing;

	the.quiescing = NULL;
	if (c)
		answer(c, error, 0, "");
}

/* Let the main link stand still: what it has said is on its way to the host before the answer,
 * for both go through one queue. */
static void quiesce(struct call *c)
{
	int error = the.quiescing ? EBUSY : main_quiesce();

	if (error == EINPROGRESS)
		the.quiescing = c;
	else
		answer(c, error, 0, "");
}

static const char *rest_str(struct reader *r)
{
	return r->at == r->end ? "" : read_str(r);
}

static void run(struct call *c, uint32_t code, struct reader *r)
{
	const char *what = "", *text = "";
	uint32_t flags = 0;
	int error = 0;

	switch (code) {
	case CALL_SHUTDOWN: flags = read_u32(r); break;
	case CALL_FREEZE: case CALL_THAW: text = what = read_str(r); break;
	case CALL_STATS: case CALL_PROCESSES: text = what = rest_str(r); break;
	default: break;
	}
	if (r->bad || r->at != r->end)
		error = EPROTO;
	else if (code == CALL_SHUTDOWN)
		error = shut_down(flags, &what);
	else if (code == CALL_STATS)
		error = stats(&c->answer, text);
	else if (code == CALL_FREEZE || code == CALL_THAW)
		error = freeze(text, code == CALL_FREEZE);
	else if (code == CALL_PROCESSES)
		error = processes(&c->answer, text);
	else if (code == CALL_RESUME)
		main_resume();
	else if (code != CALL_PING)
		error = ENOSYS;
	answer(c, error, 0, error ? what : "");
}

void call_eof(struct mux_channel *ch)
{
	struct call *c = ch->owner;
	const uint8_t *at = (const uint8_t *)c->request.data + c->request.off;
	struct reader r = { .at = at, .end = at + c->request.len, .bad = false };
	uint32_t code;

	if (c->request.len < 4) {
		answer(c, EPROTO, 0, "a request without an operation");
		return;
	}
	code = read_u32(&r);
	if (code == CALL_SETUP)
		begin_setup(c, &r);
	else if (code == CALL_QUIESCE && r.at == r.end)
		quiesce(c);
	else
		run(c, code, &r);
}
