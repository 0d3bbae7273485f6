/* The agent channel: frames, the table of channels, credit and bounded queues. */
#include "mux.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { HELLO_LEN = 12, WELCOME_LEN = 24, CREDIT_MAX = 1 << 30, HEAD_FLAG = 5 };

struct frame_head {
	uint32_t channel, length;
	uint8_t type, flag;
	uint16_t zero;
};

void mux_init(struct mux *m, int fd, bool host, const struct mux_handler *handler)
{
	/* Neither the table, free from `high` on, nor the buffer: their pages come with their use. */
	memset(m, 0, offsetof(struct mux, channels));
	m->fd = fd;
	m->host = host;
	m->handler = handler;
	m->next_id = 1;
}

static struct frame_head head_at(const uint8_t *at)
{
	return (struct frame_head){
		.channel = get_u32(at), .type = at[4], .flag = at[5],
		.zero = (uint16_t)(at[6] | at[7] << 8), .length = get_u32(at + 8),
	};
}

static void put_head(uint8_t *at, uint32_t channel, uint8_t type, uint8_t flag, size_t length)
{
	put_u32(at, channel);
	at[4] = type;
	at[5] = flag;
	at[6] = at[7] = 0;
	put_u32(at + 8, (uint32_t)length);
}

/* Frames other than DATA always find room: reading stops at MUX_OUT, and what one read can
 * cause is less than as much again. Without memory for it the peer waits for ever, and so it
 * is let go: see mux_flush. */
static void send_frame(struct mux *m, uint32_t channel, uint8_t type, uint8_t flag,
		       const void *payload, size_t n)
{
	uint8_t frame[MUX_HEAD + WELCOME_LEN];

	put_head(frame, channel, type, flag, n);
	if (n)
		memcpy(frame + MUX_HEAD, payload, n);
	if (!buffer_put(&m->out, frame, MUX_HEAD + n, 2 * MUX_OUT))
		m->problem = "no memory for an answer";
}

static void send_number(struct mux *m, uint32_t channel, uint8_t type, uint32_t number)
{
	uint8_t body[4];

	put_u32(body, number);
	send_frame(m, channel, type, 0, body, sizeof(body));
}

/* The table of channels. */

static struct mux_channel *find(struct mux *m, uint32_t id)
{
	for (uint32_t i = 0; i < m->high; i++)
		if (m->channels[i].id == id)
			return &m->channels[i];
	return NULL;
}

static struct mux_channel *add(struct mux *m, uint32_t id, uint8_t kind)
{
	struct mux_channel *ch = find(m, 0);

	if (!ch && m->high < MUX_CHANNELS)
		ch = &m->channels[m->high++];
	if (!ch)
		return NULL;
	*ch = (struct mux_channel){
		.id = id, .kind = kind, .credit = MUX_WINDOW, .granted = MUX_WINDOW,
	};
	return ch;
}

static void release(struct mux *m, struct mux_channel *ch)
{
	buffer_free(&ch->in);
	memset(ch, 0, sizeof(*ch));
	while (m->high && !m->channels[m->high - 1].id)
		m->high--;
}

static void drop_all(struct mux *m)
{
	for (uint32_t i = m->high; i--; ) {
		struct mux_channel *ch = &m->channels[i];
		if (!ch->id)
			continue;
		if (!ch->closed) {
			ch->closed = true; /* nothing that its owner does now is sent */
			m->handler->closed(m, ch, ECONNRESET);
		}
		release(m, ch);
	}
	buffer_free(&m->out);
	m->greeted = m->starved = false;
	m->problem = NULL;
}

/* HELLO. */

static void say_hello(struct mux *m, uint64_t nonce, uint8_t flag)
{
	uint8_t body[HELLO_LEN];

	m->in_len = 0;
	m->nonce = nonce;
	put_u64(body, nonce);
	put_u32(body + 8, MUX_VERSION);
	send_frame(m, 0, MUX_HELLO, flag, body, sizeof(body));
}

void mux_hello(struct mux *m, uint64_t nonce, bool keep)
{
	drop_all(m);
	say_hello(m, nonce, keep ? MUX_KEEP : 0);
}

void mux_hello_again(struct mux *m, uint64_t nonce)
{
	const size_t n = MUX_HEAD + MUX_PAYLOAD;
	char *at;

	drop_all(m);
	at = buffer_room(&m->out, n, MUX_OUT);
	if (!at) {
		m->problem = "no memory for an answer";
		return;
	}
	memset(at, 0xff, n);
	m->out.len += n;
	say_hello(m, nonce, MUX_KEEP);
}

static void welcome(struct mux *m, const uint8_t *hello, uint8_t flag)
{
	uint8_t body[WELCOME_LEN];

	drop_all(m);
	m->keep = flag == MUX_KEEP;
	memcpy(body, hello, 8);
	put_u32(body + 8, MUX_VERSION);
	put_u32(body + 12, MUX_CHANNELS);
	put_u64(body + 16, m->start_ns);
	send_frame(m, 0, MUX_HELLO, 0, body, sizeof(body));
	m->greeted = true;
	if (m->handler->greeted)
		m->handler->greeted(m);
}

static void welcomed(struct mux *m, const uint8_t *body)
{
	if (get_u32(body + 8) != MUX_VERSION) {
		m->problem = "the agent speaks another version of the protocol";
		return;
	}
	m->start_ns = get_u64(body + 16);
	m->greeted = true;
	if (m->handler->greeted)
		m->handler->greeted(m);
}

/* Look for the other side's HELLO in bytes of whatever was under way before; return how many
 * bytes are done with. */
static size_t scan(struct mux *m, const uint8_t *data, size_t n)
{
	const size_t body = m->host ? WELCOME_LEN : HELLO_LEN;
	uint8_t head[MUX_HEAD];

	put_head(head, 0, MUX_HELLO, 0, body);
	for (size_t at = 0; at < n; at++) {
		size_t part = n - at < MUX_HEAD ? n - at : MUX_HEAD;
		if (part > HEAD_FLAG)
			head[HEAD_FLAG] = !m->host && data[at + HEAD_FLAG] == MUX_KEEP;
		if (memcmp(data + at, head, part) != 0)
			continue;
		if (n - at < MUX_HEAD + body)
			return at; /* the rest is still to come */
		if (!m->host)
			welcome(m, data + at + MUX_HEAD, data[at + HEAD_FLAG]);
		else if (get_u64(data + at + MUX_HEAD) == m->nonce)
			welcomed(m, data + at + MUX_HEAD);
		else
			continue;
		return at + MUX_HEAD + body;
	}
	return n;
}

/* What arrives on a channel. */

static void grant(struct mux *m, struct mux_channel *ch, size_t taken)
{
	ch->owed += (uint32_t)taken;
	if (ch->owed < MUX_WINDOW / 2 || ch->closed || ch->eof_in)
		return;
	send_number(m, ch->id, MUX_CREDIT, ch->owed);
	ch->granted += ch->owed;
	ch->owed = 0;
}

static void tell_eof(struct mux *m, struct mux_channel *ch)
{
	if (!ch->eof_in || ch->eof_told || ch->in.len || ch->closed)
		return;
	ch->eof_told = true;
	m->handler->eof(m, ch);
}

void mux_pull(struct mux *m, struct mux_channel *ch)
{
	while (ch->in.len && !ch->closed) {
		size_t taken = m->handler->data(m, ch, (uint8_t *)ch->in.data + ch->in.off,
						ch->in.len);
		if (ch->closed)
			return;
		buffer_drop(&ch->in, taken);
		grant(m, ch, taken);
		if (!taken)
			return;
	}
	tell_eof(m, ch);
}

static const char *on_data(struct mux *m, struct mux_channel *ch, const uint8_t *data, size_t n)
{
	size_t taken;

	if (n > ch->granted)
		return "more data than it has credit for";
	if (ch->eof_in)
		return "data after the end";
	ch->granted -= (uint32_t)n;
	if (ch->closed || !n)
		return NULL;
	taken = ch->in.len ? 0 : m->handler->data(m, ch, data, n);
	if (ch->closed)
		return NULL;
	if (taken < n && !buffer_put(&ch->in, data + taken, n - taken, MUX_WINDOW)) {
		m->handler->closed(m, ch, ENOMEM);
		mux_close(m, ch, ENOMEM);
		return NULL;
	}
	grant(m, ch, taken);
	return NULL;
}

static const char *on_open(struct mux *m, uint32_t id, uint8_t kind)
{
	struct mux_channel *ch;
	int error;

	if (m->host || !id)
		return "an OPEN that it may not send";
	if (find(m, id))
		return "an OPEN of a channel in use";
	ch = add(m, id, kind);
	if (!ch)
		return "too many channels";
	error = m->handler->opened(m, ch);
	if (error)
		mux_close(m, ch, (uint32_t)error);
	return NULL;
}

static const char *on_close(struct mux *m, struct mux_channel *ch, uint32_t error)
{
	if (!ch->closed) {
		m->handler->closed(m, ch, error);
		mux_close(m, ch, 0);
	}
	release(m, ch);
	return NULL;
}

static const char *on_credit(struct mux *m, struct mux_channel *ch, uint32_t more)
{
	if (more > CREDIT_MAX || ch->credit + more > CREDIT_MAX)
		return "credit beyond all bounds";
	ch->credit += more;
	if (!ch->starved || !more || ch->closed)
		return NULL;
	if (m->out.len >= MUX_OUT_DATA) {
		m->starved = true;
		return NULL;
	}
	ch->starved = false;
	m->handler->ready(m, ch);
	return NULL;
}

/* One whole frame; what is wrong with it, or NULL. */
static const char *on_frame(struct mux *m, struct frame_head head, const uint8_t *body)
{
	struct mux_channel *ch;

	if (head.zero || (head.flag && head.type != MUX_OPEN &&
			  !(head.type == MUX_HELLO && head.flag == MUX_KEEP)))
		return "a head with unknown bits";
	if (head.type == MUX_OPEN)
		return head.length ? "an OPEN with a payload"
				   : on_open(m, head.channel, head.flag);
	if (head.type == MUX_HELLO) {
		if (m->host || head.channel || head.length != HELLO_LEN)
			return "a HELLO out of place";
		welcome(m, body, head.flag);
		return NULL;
	}
	ch = head.channel ? find(m, head.channel) : NULL;
	if (!ch)
		return "a frame of no channel";
	if (head.type == MUX_DATA)
		return on_data(m, ch, body, head.length);
	if (head.type == MUX_EOF && !head.length && !ch->eof_in) {
		ch->eof_in = true;
		tell_eof(m, ch);
		return NULL;
	}
	if (head.type == MUX_CLOSE && head.length == 4)
		return on_close(m, ch, get_u32(body));
	if (head.type == MUX_CREDIT && head.length == 4)
		return on_credit(m, ch, get_u32(body));
	return "a frame of no known shape";
}

static size_t parse(struct mux *m, const uint8_t *data, size_t n)
{
	struct frame_head head;
	const char *problem;

	if (!m->greeted)
		return scan(m, data, n);
	if (n < MUX_HEAD)
		return 0;
	head = head_at(data);
	if (head.length > MUX_PAYLOAD) {
		m->problem = "a frame that is too long";
		return 0;
	}
	if (n < MUX_HEAD + head.length)
		return 0;
	problem = on_frame(m, head, data + MUX_HEAD);
	if (problem)
		m->problem = problem;
	return MUX_HEAD + head.length;
}

static void consume(struct mux *m)
{
	size_t done = 0, step;

	do {
		step = parse(m, m->in + done, m->in_len - done);
		done += step;
	} while (step && !m->problem);
	m->in_len -= done;
	memmove(m->in, m->in + done, m->in_len);
}

void mux_reset(struct mux *m)
{
	drop_all(m);
	while (consume(m), m->problem)
		drop_all(m);
}

enum mux_result mux_read(struct mux *m)
{
	ssize_t got = read(m->fd, m->in + m->in_len, sizeof(m->in) - m->in_len);

	if (got < 0 && (errno == EINTR || errno == EAGAIN))
		return MUX_OK;
	if (got <= 0) {
		if (!got)
			errno = 0;
		return MUX_GONE;
	}
	m->in_len += (size_t)got;
	consume(m);
	return m->problem ? MUX_BROKEN : MUX_OK;
}

bool mux_may_read(const struct mux *m)
{
	return m->out.len < MUX_OUT;
}

/* What goes out. */

static void feed(struct mux *m)
{
	m->starved = false;
	for (uint32_t i = 0; i < m->high; i++) {
		struct mux_channel *ch = &m->channels[i];
		if (!ch->id || !ch->starved || ch->closed || !ch->credit)
			continue;
		if (m->out.len >= MUX_OUT_DATA) {
			m->starved = true;
			return;
		}
		ch->starved = false;
		m->handler->ready(m, ch);
	}
}

enum mux_result mux_flush(struct mux *m)
{
	if (m->problem)
		return MUX_BROKEN;
	while (m->out.len) {
		ssize_t done = write(m->fd, m->out.data + m->out.off, m->out.len);
		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0 && errno == EAGAIN)
			return MUX_OK;
		if (done < 0)
			return MUX_GONE;
		buffer_take(&m->out, (size_t)done);
		if (m->starved && m->out.len < MUX_OUT_DATA / 2)
			feed(m);
	}
	return MUX_OK;
}

bool mux_pending(const struct mux *m)
{
	return m->out.len > 0;
}

struct mux_channel *mux_open(struct mux *m, enum mux_kind kind)
{
	struct mux_channel *ch;

	while (!m->next_id || find(m, m->next_id))
		m->next_id++;
	ch = m->greeted ? add(m, m->next_id, (uint8_t)kind) : NULL;
	if (!ch) {
		errno = m->greeted ? EAGAIN : ENOTCONN;
		return NULL;
	}
	m->next_id++;
	send_frame(m, ch->id, MUX_OPEN, (uint8_t)kind, NULL, 0);
	return ch;
}

uint8_t *mux_space(struct mux *m, struct mux_channel *ch, size_t *room)
{
	char *at;

	*room = 0;
	if (ch->closed || ch->eof_out)
		return NULL;
	if (!ch->credit || m->out.len >= MUX_OUT_DATA) {
		ch->starved = true;
		m->starved |= ch->credit > 0;
		return NULL;
	}
	*room = ch->credit < MUX_PAYLOAD ? ch->credit : MUX_PAYLOAD;
	at = buffer_room(&m->out, MUX_HEAD + *room, 2 * MUX_OUT);
	if (!at) {
		m->problem = "no memory for its data";
		*room = 0;
		return NULL;
	}
	return (uint8_t *)at + MUX_HEAD;
}

void mux_commit(struct mux *m, struct mux_channel *ch, size_t n)
{
	if (!n)
		return;
	put_head((uint8_t *)m->out.data + m->out.off + m->out.len, ch->id, MUX_DATA, 0, n);
	m->out.len += MUX_HEAD + n;
	ch->credit -= (uint32_t)n;
}

size_t mux_send(struct mux *m, struct mux_channel *ch, const void *data, size_t n)
{
	size_t sent = 0;

	while (sent < n) {
		size_t room;
		uint8_t *at = mux_space(m, ch, &room);
		if (!at)
			break;
		if (room > n - sent)
			room = n - sent;
		memcpy(at, (const uint8_t *)data + sent, room);
		mux_commit(m, ch, room);
		sent += room;
	}
	return sent;
}

void mux_eof(struct mux *m, struct mux_channel *ch)
{
	if (ch->eof_out || ch->closed)
		return;
	ch->eof_out = true;
	send_frame(m, ch->id, MUX_EOF, 0, NULL, 0);
}

void mux_close(struct mux *m, struct mux_channel *ch, uint32_t error)
{
	if (ch->closed)
		return;
	ch->closed = true;
	ch->owner = NULL;
	buffer_free(&ch->in);
	send_number(m, ch->id, MUX_CLOSE, error);
}
