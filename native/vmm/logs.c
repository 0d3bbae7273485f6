/* What QEMU and the guest's console say: read from pipes and written to files of bounded size.
 * QEMU has no descriptor of the files, so neither a guest nor a QEMU that was taken over can
 * fill the host's disk with them. What was said first stays, and what was said last. */
#include <sys/stat.h>

#include "../text.h"
#include "vmm.h"

enum { LOG_FIRST = 1 << 20, LOG_LAST = 1 << 20, LOG_MOST = 4 << 20, PIECE = 32 << 10 };

static uint8_t piece[PIECE]; /* used between two calls of the kernel only */

void log_open(struct vmm_log *log, int file, int pipe)
{
	struct stat st;

	log->file = file;
	log->pipe = pipe;
	log->size = fstat(file, &st) == 0 ? (uint64_t)st.st_size : 0;
	fcntl(pipe, F_SETFL, fcntl(pipe, F_GETFL) | O_NONBLOCK);
}

/* A disk that is full takes a part or nothing: the rest is lost, the machine goes on. */
static void append(struct vmm_log *log, const void *data, size_t n)
{
	ssize_t done = pwrite(log->file, data, n, (off_t)log->size);

	if (done > 0)
		log->size += (uint64_t)done;
}

/* Words of our own, where QEMU's are: on a line of their own, since QEMU writes one in pieces. */
void log_say(struct vmm_log *log, const char *words)
{
	char last = '\n';

	if (log->size && pread(log->file, &last, 1, (off_t)log->size - 1) == 1 && last != '\n')
		append(log, "\n", 1);
	append(log, "hutch-vmm: ", 11);
	append(log, words, strnlen(words, MAX_TEXT));
	append(log, "\n", 1);
}

static void copy_down(struct vmm_log *log, uint64_t from, uint64_t end)
{
	while (from < end) {
		size_t n = end - from < PIECE ? (size_t)(end - from) : PIECE;
		ssize_t got = pread(log->file, piece, n, (off_t)from);

		if (got <= 0)
			return;
		append(log, piece, (size_t)got);
		from += (uint64_t)got;
	}
}

/* The middle goes. What is moved lies behind where it comes to, so nothing is overwritten
 * before it was read. */
static void shorten(struct vmm_log *log)
{
	char words[64];
	struct text t = text_in(words, sizeof(words));
	uint64_t end = log->size, last = end - LOG_LAST;

	log->left_out += last - LOG_FIRST - log->note;
	log->size = LOG_FIRST;
	text_add(&t, "\n[");
	text_add_num(&t, (int64_t)log->left_out);
	text_add(&t, " bytes are left out here]\n");
	append(log, words, t.len);
	log->note = log->size - LOG_FIRST;
	copy_down(log, last, end);
	(void)!ftruncate(log->file, (off_t)log->size);
}

/* One read, that the others have their turn. */
bool log_read(struct vmm_log *log)
{
	ssize_t n = read(log->pipe, piece, sizeof(piece));

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (n <= 0) {
		close(log->pipe);
		log->pipe = -1;
		return false;
	}
	append(log, piece, (size_t)n);
	if (log->size > LOG_MOST)
		shorten(log);
	return true;
}

/* After QEMU's end: what is in the pipes is the last word. Somebody else may hold an end open
 * and write, so no more than a pipe has room for is awaited. */
void logs_read_rest(struct vmm *v)
{
	for (int i = 0; i < LOGS; i++)
		for (int left = 64; left && v->logs[i].pipe >= 0 && log_read(&v->logs[i]); left--)
			;
}
