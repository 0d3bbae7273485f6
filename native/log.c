/* Write the log: one record for each line of output, `TIME STREAM DATA`. A capital stream
 * letter marks a piece of a line that goes on. Data has no newline in it, so any byte can
 * stand there unescaped. */
#include "log.h"

#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "text.h"

int log_open(struct log *log)
{
	struct stat st;
	int fd = open(log->path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);

	if (fd < 0)
		return -1;
	if (log->fd >= 0)
		close(log->fd);
	log->fd = fd;
	log->size = fstat(fd, &st) == 0 ? (uint64_t)st.st_size : 0;
	return 0;
}

static const char *numbered(const char *path, uint32_t number, char *buffer, size_t cap)
{
	struct text t = text_in(buffer, cap);

	if (!number)
		return path;
	text_add(&t, path);
	text_add(&t, ".");
	text_add_num(&t, number);
	return buffer;
}

/* log.1 becomes log.2 and so on, log becomes log.1; the oldest is replaced. */
static void rotate(struct log *log)
{
	char from[PATH_MAX], to[PATH_MAX];

	if (log->max_files <= 1)
		unlink(log->path);
	for (uint32_t n = log->max_files > 1 ? log->max_files - 1 : 0; n; n--)
		rename(numbered(log->path, n - 1, from, sizeof(from)),
		       numbered(log->path, n, to, sizeof(to)));
	log_open(log);
}

static void put(struct log *log, struct iovec *iov, int count, size_t total)
{
	struct stat st;
	ssize_t done;

	if (!count)
		return;
	if (log->max_bytes && log->size && log->size + total > log->max_bytes)
		rotate(log);
	done = writev(log->fd, iov, count);
	if (done >= 0 && (size_t)done == total)
		log->size += total;
	else if (done > 0 && fstat(log->fd, &st) == 0)
		/* The disk is full: no half record may stay. Before it may stand what we have not
		 * written, the end of a log that came from another host. */
		(void)!ftruncate(log->fd, st.st_size - done);
}

struct batch {
	struct iovec iov[96];
	int count;
	size_t total;
};

static void batch_add(struct batch *b, const char *data, size_t n)
{
	union { const char *from; char *to; } at = { .from = data };

	b->iov[b->count].iov_base = at.to; /* writev(2) only reads */
	b->iov[b->count++].iov_len = n;
	b->total += n;
}

void log_write(struct log *log, int stream, uint64_t time_ns, const char *data, size_t n)
{
	char head[2][32];
	size_t head_len[2];
	struct batch b = { .count = 0, .total = 0 };

	if (log->fd < 0)
		return;
	for (int partial = 0; partial < 2; partial++) {
		struct text t = text_in(head[partial], sizeof(head[partial]));
		text_add_num(&t, (int64_t)time_ns);
		text_add(&t, partial ? (stream == 2 ? " E " : " O ") : (stream == 2 ? " e " : " o "));
		head_len[partial] = t.len;
	}
	while (n) {
		const char *newline = memchr(data, '\n', n);
		size_t len = newline ? (size_t)(newline - data) + 1 : n;
		int partial = newline == NULL;
		batch_add(&b, head[partial], head_len[partial]);
		batch_add(&b, data, len);
		if (partial)
			batch_add(&b, "\n", 1);
		data += len;
		n -= len;
		if (b.count > 92 || b.total > (256u << 10)) {
			put(log, b.iov, b.count, b.total);
			b.count = 0;
			b.total = 0;
		}
	}
	put(log, b.iov, b.count, b.total);
}
