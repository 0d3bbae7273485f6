/* The files of the instance's run directory: ctl.sock, pid, exit. */
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "supervisor.h"
#include "text.h"

enum { EXIT_ROOM = 256 };

#define EXIT_TEMPORARY ".exit.tmp"

static int listen_in(struct supervisor *s)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct text t = text_in(address.sun_path, sizeof(address.sun_path));
	struct stat st;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -1;
	/* Through the descriptor: a socket's path has room for 107 bytes only. */
	text_add(&t, "/proc/self/fd/");
	text_add_num(&t, s->dir);
	text_add(&t, "/ctl.sock");
	unlinkat(s->dir, "ctl.sock", 0);
	/* The umask is 0077: nobody else can connect between bind and a chmod. */
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 32) < 0) {
		int error = errno;
		close(fd);
		return fail(error);
	}
	if (fstatat(s->dir, "ctl.sock", &st, AT_SYMLINK_NOFOLLOW) == 0)
		s->socket_inode = st.st_ino;
	s->listen = fd;
	return 0;
}

/* A program may fill the disk that its exit is to be told on: the room for that is taken now. */
static void reserve_exit(const struct supervisor *s)
{
	static const char room[EXIT_ROOM];
	int fd = openat(s->dir, EXIT_TEMPORARY, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW,
			0600);

	if (fd < 0)
		return;
	(void)!write(fd, room, sizeof(room));
	close(fd);
}

int record_open(struct supervisor *s)
{
	const struct plan *p = &s->plan;

	if (*p->log_path) {
		s->log.path = p->log_path;
		s->log.max_bytes = p->log_max_bytes;
		s->log.max_files = p->log_max_files;
		s->launch.what = p->log_path;
		if (log_open(&s->log) < 0)
			return -1;
	}
	if (!*p->directory)
		return 0;
	s->launch.what = p->directory;
	s->dir = open(p->directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (s->dir < 0)
		return -1;
	unlinkat(s->dir, "exit", 0);
	reserve_exit(s);
	return listen_in(s);
}

int record_write(struct supervisor *s, const char *name, const char *data, size_t n)
{
	char temporary[32];
	struct text t = text_in(temporary, sizeof(temporary));
	int fd, result, error;

	if (s->dir < 0)
		return 0;
	text_add(&t, ".");
	text_add(&t, name);
	text_add(&t, ".tmp");
	fd = openat(s->dir, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return -1;
	result = write_all(fd, data, n);
	error = errno;
	close(fd);
	if (result < 0)
		return fail(error);
	return renameat(s->dir, temporary, s->dir, name);
}

static size_t read_small(const char *path, char *buffer, size_t cap)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, buffer, cap - 1);

	if (fd >= 0)
		close(fd);
	buffer[n > 0 ? n : 0] = 0;
	return n > 0 ? (size_t)n : 0;
}

/* Field 22 of /proc/PID/stat: with the pid it names a process for good. */
static void add_start_time(struct text *t, pid_t pid)
{
	char path[32], stat[1024];
	struct text p = text_in(path, sizeof(path));
	const char *at;

	text_add(&p, "/proc/");
	text_add_num(&p, pid);
	text_add(&p, "/stat");
	read_small(path, stat, sizeof(stat));
	at = strrchr(stat, ')'); /* the name may hold anything, spaces too */
	for (int field = 2; at && field < 22; field++) {
		at = strchr(at, ' ');
		at = at ? at + 1 : NULL;
	}
	if (at)
		text_add_bytes(t, at, strspn(at, "0123456789"));
	else
		text_add(t, "0");
}

void record_pid(struct supervisor *s)
{
	char line[320], boot[64];
	struct text t = text_in(line, sizeof(line));
	size_t n;

	if (s->dir < 0)
		return;
	n = read_small("/proc/sys/kernel/random/boot_id", boot, sizeof(boot));
	text_add(&t, "{\"pid\":");
	text_add_num(&t, s->pid);
	text_add(&t, ",\"start_time\":");
	add_start_time(&t, s->pid);
	text_add(&t, ",\"supervisor\":");
	text_add_num(&t, getpid());
	text_add(&t, ",\"supervisor_start_time\":");
	add_start_time(&t, getpid());
	text_add(&t, ",\"boot_id\":");
	text_add_json(&t, boot, n && boot[n - 1] == '\n' ? n - 1 : n);
	for (int i = 0; i < 3; i++) {
		text_add(&t, i ? "," : ",\"streams\":[");
		text_add_num(&t, (int64_t)s->stream_ids[i]);
	}
	text_add(&t, "]}\n");
	record_write(s, "pid", line, t.len);
}

void record_exit(struct supervisor *s)
{
	char line[EXIT_ROOM];
	struct text t = text_in(line, sizeof(line));
	bool signaled = s->exit.si_code != CLD_EXITED;
	int fd;

	text_add(&t, "{\"code\":");
	text_add_num(&t, signaled ? 128 + s->exit.si_status : s->exit.si_status);
	text_add(&t, ",\"signal\":");
	text_add_num(&t, signaled ? s->exit.si_status : 0);
	text_add(&t, ",\"core\":");
	text_add(&t, s->exit.si_code == CLD_DUMPED ? "true" : "false");
	text_add(&t, ",\"time_ns\":");
	text_add_num(&t, (int64_t)s->exit_ns);
	text_add(&t, ",\"pid\":");
	text_add_num(&t, s->pid);
	text_add(&t, ",\"started_ns\":");
	text_add_num(&t, (int64_t)s->started_ns);
	text_add(&t, "}\n");
	if (s->dir < 0)
		return;
	fd = openat(s->dir, EXIT_TEMPORARY, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return;
	if (write_all(fd, line, t.len) == 0 && ftruncate(fd, (off_t)t.len) == 0)
		renameat(s->dir, EXIT_TEMPORARY, s->dir, "exit");
	close(fd);
}

void record_remove(struct supervisor *s)
{
	struct stat st;

	if (s->dir >= 0)
		unlinkat(s->dir, EXIT_TEMPORARY, 0); /* of a launch that failed */
	if (s->listen < 0)
		return;
	close(s->listen);
	s->listen = -1;
	if (fstatat(s->dir, "ctl.sock", &st, AT_SYMLINK_NOFOLLOW) == 0 &&
	    st.st_ino == s->socket_inode)
		unlinkat(s->dir, "ctl.sock", 0);
}
