/* The process's stdin, stdout and stderr: pipes or a terminal, pumped without blocking. */
#include <sys/ioctl.h>
#include <sys/stat.h>

#include "supervisor.h"
#include "text.h"

enum { TERMINAL_MOST = 1 << 20 };

static char chunk[CHUNK];

static int pipe_for(int *ours, int *theirs, bool we_read)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC) < 0)
		return -1;
	*ours = ends[we_read ? 0 : 1];
	*theirs = ends[we_read ? 1 : 0];
	/* The user of the process, whoever it is, may open /dev/stdout anew. Nobody else
	 * reaches a pipe that has no name. */
	if (fchmod(*theirs, 0666) < 0)
		return -1;
	return fcntl(*ours, F_SETFL, O_NONBLOCK);
}

int stdio_open(struct supervisor *s, int child[3])
{
	struct stat st;

	child[0] = child[1] = child[2] = 0; /* our own stdin is /dev/null */
	if (s->plan.flags & HOLD_TTY)
		return 0;
	if ((s->plan.flags & HOLD_STDIN) && pipe_for(&s->input, &child[0], false) < 0)
		return -1;
	if (pipe_for(&s->streams[0], &child[1], true) < 0)
		return -1;
	if (pipe_for(&s->streams[1], &child[2], true) < 0)
		return -1;
	for (int i = 0; i < 3; i++)
		if (child[i] && fstat(child[i], &st) == 0)
			s->stream_ids[i] = st.st_ino;
	return 0;
}

void stdio_started(int child[3])
{
	for (int i = 0; i < 3; i++)
		if (child[i] > 2)
			close(child[i]);
}

int stdio_take_terminal(struct supervisor *s, int master)
{
	if (!(s->plan.flags & HOLD_TTY) || s->streams[0] >= 0) {
		close(master);
		return 0;
	}
	if (fcntl(master, F_SETFL, O_RDWR | O_NONBLOCK) < 0)
		return -1;
	s->streams[0] = master;
	/* A program may close the terminal for a while and open it again: without another
	 * holder, that would be its end. */
	s->terminal = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (s->plan.flags & HOLD_STDIN)
		s->input = fcntl(master, F_DUPFD_CLOEXEC, 3);
	return 0;
}

static void stream_end(struct supervisor *s, int index)
{
	close(s->streams[index]);
	s->streams[index] = -1;
}

/* Read once: how much that was, 0 when there is nothing more now. */
static size_t read_some(struct supervisor *s, int index)
{
	ssize_t n;

	do
		n = read(s->streams[index], chunk, sizeof(chunk));
	while (n < 0 && errno == EINTR);
	if (n > 0) {
		log_write(&s->log, index + 1, now_ns(), chunk, (size_t)n);
		tell_output(s, index + 1, chunk, (size_t)n);
		return (size_t)n;
	}
	if (n == 0 || errno != EAGAIN)
		stream_end(s, index); /* end of file; EIO from a terminal whose other side is gone */
	return 0;
}

void stream_read(struct supervisor *s, int index)
{
	for (int turns = 0; turns < 8 && s->streams[index] >= 0; turns++)
		if (!clients_have_room(s, index + 1) || !read_some(s, index))
			return;
}

/* Take what the process left in its pipes, whatever the clients do. What others write to
 * them from now on is read as before. A terminal counts only the 4 kB that it gives at once:
 * what it has behind them is read until there is no more, or too much to be of before. */
void stream_drain(struct supervisor *s)
{
	for (int index = 0; index < 2; index++) {
		int left = 0;
		if (s->streams[index] < 0 || ioctl(s->streams[index], FIONREAD, &left) < 0)
			continue;
		left += s->plan.flags & HOLD_TTY ? TERMINAL_MOST : CHUNK;
		while (left > 0 && s->streams[index] >= 0) {
			size_t n = read_some(s, index);
			if (!n)
				break;
			left -= (int)n;
		}
	}
}

void terminal_release(struct supervisor *s)
{
	if (s->terminal >= 0)
		close(s->terminal);
	s->terminal = -1;
}

bool streams_ended(const struct supervisor *s)
{
	return s->streams[0] < 0 && s->streams[1] < 0;
}

bool input_pending(const struct supervisor *s)
{
	return s->input >= 0 && s->input_full;
}

static void input_close(struct supervisor *s)
{
	if (s->input < 0)
		return;
	if (s->plan.flags & HOLD_TTY) {
		(void)!write(s->input, "\4", 1); /* what the terminal takes for the end */
		return;
	}
	close(s->input);
	s->input = -1;
	s->input_full = false;
}

static void acknowledge(struct supervisor *s, struct client *c, size_t n)
{
	uint8_t body[4];

	buffer_drop(&c->input, n);
	put_u32(body, (uint32_t)n);
	if (c->fd >= 0)
		client_send(s, c, FR_ACK, 0, body, sizeof(body));
}

/* Nobody reads the process's stdin: let its writers go on. */
static void input_broken(struct supervisor *s)
{
	if (s->input >= 0) {
		close(s->input);
		s->input = -1;
		s->input_full = false;
	}
}

static void pump_client(struct supervisor *s, struct client *c)
{
	while (c->input.len) {
		ssize_t n = (ssize_t)c->input.len;
		if (s->input >= 0 && (c->attach & ATTACH_STDIN)) {
			n = write(s->input, c->input.data + c->input.off, c->input.len);
			if (n < 0 && errno == EAGAIN) {
				s->input_full = true;
				return;
			}
			if (n < 0) {
				input_broken(s);
				continue;
			}
		} else if (s->state == LAUNCHING && (s->plan.flags & HOLD_STDIN)) {
			return; /* the pipe or the terminal comes with the process */
		}
		acknowledge(s, c, (size_t)n);
	}
	if (c->stdin_eof && (s->input >= 0 || s->state != LAUNCHING)) {
		c->stdin_eof = false;
		if (c->attach & ATTACH_STDIN)
			input_close(s);
	}
}

void input_pump(struct supervisor *s)
{
	s->input_full = false;
	for (int i = 0; i < MAX_CLIENTS; i++) {
		struct client *c = &s->clients[i];
		if (!c->used)
			continue;
		pump_client(s, c);
		if (c->fd < 0 && !c->input.len && !c->stdin_eof)
			memset(c, 0, sizeof(*c));
		if (s->input_full)
			return;
	}
}

/* POLLERR on stdin: the process closed its end. */
void input_check(struct supervisor *s)
{
	input_broken(s);
	input_pump(s);
}
