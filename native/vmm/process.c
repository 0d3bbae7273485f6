/* The main process: a supervisor's frames over a channel, relayed to our own stdio. */
#include <sys/ioctl.h>
#include <termios.h>

#include "vmm.h"

enum { STDIN_PIECE = 16 << 10, PLAN_END = 16 << 10 };

static const uint8_t attach_all = ATTACH_STDIN | ATTACH_STDOUT | ATTACH_STDERR | ATTACH_LOSSLESS;

void terminal_raw(void)
{
	struct termios t;

	if (tcgetattr(0, &t) < 0)
		return;
	/* The guest has the terminal that edits lines and makes signals. */
	cfmakeraw(&t);
	tcsetattr(0, TCSANOW, &t);
}

void process_start(struct vmm *v)
{
	struct process *p = &v->process;
	uint8_t length[4];

	p->ch = mux_open(&v->mux, MUX_SPAWN);
	if (!p->ch)
		machine_lost(v, PART_AGENT, errno, "no channel");
	p->ch->owner = p;
	put_u32(length, v->config.plan_len);
	mux_send(&v->mux, p->ch, length, sizeof(length)); /* a new channel has credit for it */
	process_turn(v);
}

static bool tell(struct vmm *v, uint8_t type, uint8_t flag, const void *data, size_t n);

static void put_frame(uint8_t *at, uint8_t type, uint8_t flag, size_t n)
{
	memset(at, 0, FRAME_HEAD);
	at[0] = type;
	at[1] = flag;
	put_u32(at + 4, (uint32_t)n);
}

/* A launch that waits is sent the rest of its plan; the number that it waits at comes first. */
static void go_on(struct vmm *v)
{
	uint8_t head[FRAME_HEAD];

	put_frame(head, FR_GO, 0, v->config.plan_len);
	mux_send(&v->mux, v->process.ch, head, sizeof(head));
	process_turn(v);
}

/* Its supervisor is asked how it does: the answer says that the link is bound. */
void process_adopt(struct vmm *v)
{
	struct process *p = &v->process;

	p->ch = mux_open(&v->mux, MUX_ADOPT);
	if (!p->ch)
		machine_lost(v, PART_AGENT, errno, "no channel");
	p->ch->owner = p;
	p->adopted = true;
	p->unacked = v->config.unacked;
	if (v->config.plan_len) {
		tell(v, FR_ATTACH, attach_all, NULL, 0);
		go_on(v);
		return;
	}
	p->attached = true;
	tell(v, FR_QUERY, 0, NULL, 0); /* a new channel has credit for it */
}

/* Send one frame whole, or nothing if there is no room for it now. */
static bool tell(struct vmm *v, uint8_t type, uint8_t flag, const void *data, size_t n)
{
	size_t room;
	uint8_t *at = mux_space(&v->mux, v->process.ch, &room);

	if (room < FRAME_HEAD + n)
		return false;
	put_frame(at, type, flag, n);
	if (n)
		memcpy(at + FRAME_HEAD, data, n);
	mux_commit(&v->mux, v->process.ch, FRAME_HEAD + n);
	return true;
}

/* The attach goes in one piece with the plan's end: it must be there before the process writes
 * anything, or output is lost. */
static void send_plan_end(struct vmm *v)
{
	struct process *p = &v->process;
	size_t room, left = v->config.plan_len - p->plan_sent;
	uint8_t *at = mux_space(&v->mux, p->ch, &room);

	if (room < left + FRAME_HEAD)
		return;
	memcpy(at, v->config.plan + p->plan_sent, left);
	put_frame(at + left, FR_ATTACH, attach_all, 0);
	mux_commit(&v->mux, p->ch, left + FRAME_HEAD);
	p->plan_sent = v->config.plan_len;
	p->attached = true;
}

static void send_plan(struct vmm *v)
{
	struct process *p = &v->process;
	uint32_t left = v->config.plan_len - p->plan_sent;

	if (p->adopted) {
		p->plan_sent += (uint32_t)mux_send(&v->mux, p->ch, v->config.plan + p->plan_sent, left);
		p->attached = p->plan_sent == v->config.plan_len;
		return;
	}
	if (left > PLAN_END)
		p->plan_sent += (uint32_t)mux_send(&v->mux, p->ch, v->config.plan + p->plan_sent,
						   left - PLAN_END);
	if (v->config.plan_len - p->plan_sent <= PLAN_END)
		send_plan_end(v);
}

static void send_signals(struct vmm *v)
{
	struct process *p = &v->process;

	for (uint32_t signum = 1; p->signals && signum <= 64; signum++) {
		uint64_t bit = 1ull << (signum - 1);
		uint8_t body[4];
		put_u32(body, signum);
		if (!(p->signals & bit))
			continue;
		if (!tell(v, FR_SIGNAL, 0, body, sizeof(body)))
			return;
		p->signals &= ~bit;
	}
}

static void send_size(struct vmm *v)
{
	struct winsize size = { 0 };
	uint8_t body[4];

	if (ioctl(0, TIOCGWINSZ, &size) == 0 && (size.ws_row || size.ws_col)) {
		memcpy(body, &size.ws_row, 2);
		memcpy(body + 2, &size.ws_col, 2);
		if (!tell(v, FR_RESIZE, 0, body, sizeof(body)))
			return;
	}
	v->process.resized = false;
}

void process_turn(struct vmm *v)
{
	struct process *p = &v->process;

	if (!p->ch || p->exited)
		return;
	if (!p->attached)
		send_plan(v);
	if (!p->started || is_quiet(v))
		return;
	send_signals(v);
	if (p->resized)
		send_size(v);
	if (p->stdin_ended && tell(v, FR_STDIN_EOF, 0, NULL, 0))
		p->stdin_ended = false;
}

void process_signal(struct vmm *v, int signum)
{
	if (signum == SIGWINCH && (v->config.flags & CONFIG_TTY))
		v->process.resized = true;
	else
		v->process.signals |= 1ull << (signum - 1);
}

/* Input. */

bool process_wants_stdin(const struct vmm *v)
{
	const struct process *p = &v->process;

	return p->started && p->ch && p->stdin_open && !is_quiet(v) && !p->ch->starved &&
	       p->ch->credit > FRAME_HEAD && p->unacked < STDIN_WINDOW;
}

void process_read_stdin(struct vmm *v)
{
	struct process *p = &v->process;
	size_t room, want = STDIN_WINDOW - p->unacked;
	uint8_t *at;
	ssize_t n;

	if (!process_wants_stdin(v))
		return;
	at = mux_space(&v->mux, p->ch, &room);
	if (room <= FRAME_HEAD)
		return;
	if (want > room - FRAME_HEAD)
		want = room - FRAME_HEAD;
	if (want > STDIN_PIECE)
		want = STDIN_PIECE;
	n = read(0, at + FRAME_HEAD, want);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		p->stdin_open = false;
		p->stdin_ended = true;
		return;
	}
	put_frame(at, FR_STDIN, 0, (size_t)n);
	p->unacked += (uint32_t)n;
	mux_commit(&v->mux, p->ch, FRAME_HEAD + (size_t)n);
}

/* Output and what the guest's supervisor tells. */

static void launch_failed(struct vmm *v)
{
	struct process *p = &v->process;
	char text[MAX_TEXT];
	size_t len = p->body_len > 8 ? p->body_len - 8 : 0;

	if (len > sizeof(text) - 1)
		len = sizeof(text) - 1;
	memcpy(text, p->body + 8, len);
	text[len] = 0;
	machine_failed(v, PART_LAUNCH, p->head[1], get_u32(p->body), (int)get_u32(p->body + 4),
		       text);
}

static void started(struct vmm *v)
{
	struct process *p = &v->process;

	p->started = p->stdin_open = true;
	p->resized = (v->config.flags & CONFIG_TTY) != 0;
	machine_started(v);
}

static void acknowledged(struct vmm *v, uint32_t count)
{
	if (count > v->process.unacked)
		machine_lost(v, PART_AGENT, EPROTO, "it took more input than it was given");
	v->process.unacked -= count;
}

static void frame_received(struct vmm *v)
{
	static const uint8_t least[] = { [FR_STARTED] = 8, [FR_FAILED] = 8, [FR_EXIT] = 8,
					 [FR_ACK] = 4 };
	struct process *p = &v->process;
	uint8_t type = p->head[0];

	if (type < sizeof(least) && p->body_len < least[type])
		machine_lost(v, PART_AGENT, EPROTO, "a frame of its supervisor is too short");
	if (p->adopted && !v->config.plan_len && !p->started && (type == FR_STATE || type == FR_EXIT))
		started(v);
	/* Once it has started the configuration goes, and the plan with it. */
	if (((type == FR_STARTED || (type == FR_SYNC && (v->config.flags & CONFIG_PARK))) &&
	     !p->attached) || (type == FR_EXIT && !p->started))
		machine_lost(v, PART_AGENT, EPROTO, "a frame of its supervisor comes too early");
	switch (type) {
	case FR_STARTED:
		if (!p->started)
			started(v);
		break;
	case FR_SYNC:
		if ((v->config.flags & CONFIG_PARK) && !machine_is_up(v))
			machine_started(v); /* as far as it is to go here */
		break;
	case FR_FAILED:
		if (!p->started)
			launch_failed(v);
		break;
	case FR_ACK: acknowledged(v, get_u32(p->body)); break;
	case FR_EXIT:
		p->exited = true;
		machine_end(v, (int)(get_u32(p->body) & 0xff));
		break;
	default: break; /* what it tells beside that is of no use here */
	}
}

static size_t take_head(struct vmm *v, const uint8_t *data, size_t n)
{
	struct process *p = &v->process;
	size_t want = (size_t)(FRAME_HEAD - p->head_len);

	if (want > n)
		want = n;
	memcpy(p->head + p->head_len, data, want);
	p->head_len += (uint8_t)want;
	if (p->head_len < FRAME_HEAD)
		return want;
	p->left = get_u32(p->head + 4);
	p->body_len = 0;
	if (p->left > FRAME_MAX || (p->head[0] == FR_OUTPUT && p->head[1] != 1 && p->head[1] != 2))
		machine_lost(v, PART_AGENT, EPROTO, "a frame of its supervisor is malformed");
	return want;
}

static size_t take_output(struct vmm *v, const uint8_t *data, size_t n)
{
	struct process *p = &v->process;
	int which = p->head[1] - 1;
	ssize_t done;

	if (p->broken[which])
		return n;
	done = write(which + 1, data, n);
	if (done < 0 && (errno == EAGAIN || errno == EINTR)) {
		p->blocked[which] = true;
		return 0;
	}
	if (done < 0) {
		p->broken[which] = true;
		return n;
	}
	return (size_t)done;
}

static size_t take_body(struct vmm *v, const uint8_t *data, size_t n)
{
	struct process *p = &v->process;
	size_t kept = sizeof(p->body) - p->body_len;

	if (p->head[0] == FR_OUTPUT)
		return take_output(v, data, n);
	if (kept > n)
		kept = n;
	memcpy(p->body + p->body_len, data, kept);
	p->body_len += (uint32_t)kept;
	return n;
}

size_t process_data(struct vmm *v, const uint8_t *data, size_t n)
{
	struct process *p = &v->process;
	size_t done = 0;

	while (done < n && !p->exited) {
		size_t step = n - done;
		if (p->head_len < FRAME_HEAD) {
			step = take_head(v, data + done, step);
		} else {
			if (step > p->left)
				step = p->left;
			step = take_body(v, data + done, step);
			if (!step)
				return done;
			p->left -= (uint32_t)step;
		}
		done += step;
		if (p->head_len == FRAME_HEAD && !p->left) {
			p->head_len = 0;
			frame_received(v);
		}
	}
	return p->exited ? n : done; /* nothing of it is of use after the exit */
}

static void read_rest(struct vmm *v)
{
	struct process *p = &v->process;

	while (p->rest.len) {
		size_t taken = process_data(v, (uint8_t *)p->rest.data + p->rest.off, p->rest.len);
		if (!taken)
			return;
		buffer_drop(&p->rest, taken);
	}
	if (!p->exited)
		machine_lost(v, PART_AGENT, ECHILD, "the process's supervisor in the guest ended");
}

void process_pull(struct vmm *v)
{
	struct process *p = &v->process;

	p->blocked[0] = p->blocked[1] = false;
	if (p->ch)
		mux_pull(&v->mux, p->ch);
	else if (p->rest.len)
		read_rest(v);
}

void process_closed(struct vmm *v, uint32_t error)
{
	struct process *p = &v->process;

	p->rest = p->ch->in;
	p->ch->in = (struct buffer){ 0 };
	p->ch = NULL;
	if (!p->exited && !p->started && !p->rest.len && error)
		machine_lost(v, PART_AGENT, (int)error,
			     p->adopted ? "the process has ended"
					: "the agent cannot start a process");
	if (!p->exited)
		read_rest(v);
}
