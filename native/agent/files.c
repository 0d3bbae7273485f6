/* The files helper: the stream, and the requests on single files. */
#include "files.h"

#include <dirent.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/sysmacros.h>

#include "../text.h"
#include "agent.h"

enum { FILES_STAT = 1, FILES_LIST, FILES_READ, FILES_WRITE, FILES_MKDIR, FILES_REMOVE,
       FILES_PACK, FILES_UNPACK, FILES_PACK_UPPER };

enum { WRITE_APPEND = 1, WRITE_PARENTS = 2 };

static uint8_t in[64 << 10], out[64 << 10];
static size_t in_at, in_len, out_len;

static bool in_fill(void)
{
	ssize_t n;

	if (in_at < in_len)
		return true;
	do
		n = read(0, in, sizeof(in));
	while (n < 0 && errno == EINTR);
	in_at = 0;
	in_len = n > 0 ? (size_t)n : 0;
	return n > 0;
}

size_t in_some(const uint8_t **at, size_t most)
{
	size_t n;

	if (!most || !in_fill())
		return 0;
	n = in_len - in_at < most ? in_len - in_at : most;
	*at = in + in_at;
	in_at += n;
	return n;
}

bool in_exact(void *to, size_t n)
{
	uint8_t *put = to;

	while (n) {
		const uint8_t *at;
		size_t got = in_some(&at, n);
		if (!got)
			return false;
		memcpy(put, at, got);
		put += got;
		n -= got;
	}
	return true;
}

bool in_was_abandoned(void)
{
	struct pollfd p = { .fd = 0, .events = POLLIN };

	return poll(&p, 1, 0) == 1 && (p.revents & (POLLHUP | POLLERR));
}

void out_flush(void)
{
	if (out_len && write_all(1, out, out_len) < 0)
		_exit(1);
	out_len = 0;
}

void out_bytes(const void *data, size_t n)
{
	const uint8_t *from = data;

	while (n) {
		size_t part = sizeof(out) - out_len < n ? sizeof(out) - out_len : n;
		memcpy(out + out_len, from, part);
		out_len += part;
		from += part;
		n -= part;
		if (out_len == sizeof(out))
			out_flush();
	}
}

void out_u32(uint32_t value)
{
	uint8_t bytes[4];

	put_u32(bytes, value);
	out_bytes(bytes, sizeof(bytes));
}

void out_u64(uint64_t value)
{
	uint8_t bytes[8];

	put_u64(bytes, value);
	out_bytes(bytes, sizeof(bytes));
}

void out_str(const char *s)
{
	size_t n = strlen(s);

	out_u32((uint32_t)n);
	out_bytes(s, n + 1);
}

void out_ok(void)
{
	out_u32(0);
	out_str("");
}

/* A sender with more to say learns from the end of the stream that nobody listens; what was
 * answered before reaches it all the same. */
static _Noreturn void finish(void)
{
	out_flush();
	_exit(0);
}

void fail_with(int error, const char *detail)
{
	out_u32((uint32_t)error);
	out_str(detail);
	finish();
}

/* Requests. The fields come before a stream that may have no end, so they are read one by one. */

static uint32_t field_u32(void)
{
	uint8_t bytes[4];

	if (!in_exact(bytes, sizeof(bytes)))
		fail_with(EPROTO, "the request");
	return get_u32(bytes);
}

static uint64_t field_u64(void)
{
	uint8_t bytes[8];

	if (!in_exact(bytes, sizeof(bytes)))
		fail_with(EPROTO, "the request");
	return get_u64(bytes);
}

static char *field_str(void)
{
	uint32_t len = field_u32();
	char *s = len < PATH_MAX ? malloc((size_t)len + 1) : NULL;

	if (!s)
		fail_with(len < PATH_MAX ? ENOMEM : ENAMETOOLONG, "a string of the request");
	if (!in_exact(s, (size_t)len + 1) || s[len] || strlen(s) != len)
		fail_with(EPROTO, "a string of the request");
	return s;
}

static const char *last_name(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

static void record(const char *name, int at, const char *entry, const struct stat *st)
{
	char target[PATH_MAX] = "";

	if (S_ISLNK(st->st_mode)) {
		ssize_t n = readlinkat(at, entry, target, sizeof(target) - 1);
		target[n > 0 ? n : 0] = 0;
	}
	out_str(name);
	out_u32(st->st_mode);
	out_u32(st->st_uid);
	out_u32(st->st_gid);
	out_u64((uint64_t)st->st_size);
	out_u64((uint64_t)st->st_mtim.tv_sec);
	out_u32((uint32_t)st->st_mtim.tv_nsec);
	out_u32((uint32_t)st->st_nlink);
	out_u32(major(st->st_rdev));
	out_u32(minor(st->st_rdev));
	out_str(target);
}

static void files_stat(void)
{
	char *path = field_str();
	bool follow = field_u32() != 0;
	int fd = tree_open(ROOT, path, O_PATH | (follow ? 0 : O_NOFOLLOW), 0);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		fail_with(errno, path);
	out_ok();
	record(last_name(path), fd, "", &st);
}

static void files_list(void)
{
	char *path = field_str();
	int fd = tree_open(ROOT, path, O_RDONLY | O_DIRECTORY, 0);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;
	struct stat st;

	if (!dir)
		fail_with(errno, path);
	out_ok();
	while ((entry = readdir(dir))) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (fstatat(fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0)
			record(entry->d_name, fd, entry->d_name, &st); /* else: gone meanwhile */
	}
	out_str("");
}

static int open_regular(const char *path, uint64_t flags, uint64_t mode, struct stat *st)
{
	/* A FIFO would make the opener wait for its other end. */
	int fd = tree_open(ROOT, path, flags | O_NONBLOCK | O_NOCTTY, mode);

	if (fd < 0 || fstat(fd, st) < 0)
		return -1;
	if (S_ISREG(st->st_mode))
		return fd;
	close(fd);
	errno = S_ISDIR(st->st_mode) ? EISDIR : EINVAL;
	return -1;
}

static void files_read(void)
{
	static uint8_t chunk[64 << 10];
	char *path = field_str();
	uint64_t offset = field_u64(), limit = field_u64();
	struct stat st;
	int fd = open_regular(path, O_RDONLY, 0, &st);
	ssize_t n = 1;

	if (fd < 0 || (offset && lseek(fd, (off_t)offset, SEEK_SET) < 0))
		fail_with(errno, path);
	if (!limit)
		limit = UINT64_MAX;
	out_ok();
	while (limit && n > 0) {
		n = read(fd, chunk, limit < sizeof(chunk) ? limit : sizeof(chunk));
		if (n <= 0)
			break;
		out_bytes(chunk, (size_t)n);
		limit -= (uint64_t)n;
	}
}

static void make_parents(const char *path)
{
	char *copy = strdup(path), *slash = copy ? strrchr(copy, '/') : NULL;

	if (slash && slash != copy) {
		*slash = 0;
		if (tree_make(ROOT, copy, 0755, (uint32_t)KEEP, (uint32_t)KEEP) < 0)
			fail_with(errno, copy);
	}
	free(copy);
}

static void set_owner(int fd, const char *path, uint32_t uid, uint32_t gid)
{
	if ((uid != (uint32_t)KEEP || gid != (uint32_t)KEEP) && fchown(fd, uid, gid) < 0)
		fail_with(errno, path);
}

/* A new file that its sender did not finish is taken away again. */
static void files_write(void)
{
	char *path = field_str();
	uint32_t mode = field_u32(), uid = field_u32(), gid = field_u32(), flags = field_u32();
	uint64_t how = O_WRONLY | ((flags & WRITE_APPEND) ? O_APPEND : O_TRUNC);
	const uint8_t *at;
	const char *leaf;
	struct stat st;
	bool made = false;
	size_t n;
	int fd, error;

	if (flags & WRITE_PARENTS)
		make_parents(path);
	fd = open_regular(path, how, 0, &st);
	if (fd < 0 && errno == ENOENT) {
		fd = open_regular(path, how | O_CREAT, 0600, &st);
		made = fd >= 0;
	}
	if (fd < 0)
		fail_with(errno, path);
	for (error = 0; !error && (n = in_some(&at, sizeof(in)));)
		error = write_all(fd, at, n) < 0 ? errno : 0;
	if (made && (error || in_was_abandoned())) {
		int parent = tree_parent(ROOT, path, &leaf);
		if (parent >= 0)
			unlinkat(parent, leaf, 0);
	}
	if (error)
		fail_with(error, path);
	set_owner(fd, path, uid, gid); /* before the mode: it clears set-user-id */
	if (mode == (uint32_t)KEEP && made)
		mode = 0644;
	if (mode != (uint32_t)KEEP && fchmod(fd, mode & 07777) < 0)
		fail_with(errno, path);
	out_ok();
}

static void files_mkdir(void)
{
	char *path = field_str();
	uint32_t mode = field_u32(), uid = field_u32(), gid = field_u32();

	if (tree_make(ROOT, path, mode, uid, gid) < 0)
		fail_with(errno, path);
	out_ok();
}

static void files_remove(void)
{
	char *path = field_str();
	bool recursive = field_u32() != 0;
	const char *leaf;
	int parent = tree_parent(ROOT, path, &leaf);

	if (parent < 0 || tree_remove(parent, leaf, recursive) < 0)
		fail_with(errno, path);
	out_ok();
}

static void files_pack(void)
{
	char *path = field_str();
	uint32_t flags = field_u32();

	pack(path, flags, field_str());
}

static void files_unpack(void)
{
	char *path = field_str();
	uint32_t uid = field_u32();

	unpack(path, uid, field_u32());
}

void files_main(const char *upper)
{
	struct rlimit limit;

	umask(0);
	/* Walks hold a descriptor a level. */
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	switch (field_u32()) {
	case FILES_STAT: files_stat(); break;
	case FILES_LIST: files_list(); break;
	case FILES_READ: files_read(); break;
	case FILES_WRITE: files_write(); break;
	case FILES_MKDIR: files_mkdir(); break;
	case FILES_REMOVE: files_remove(); break;
	case FILES_PACK: files_pack(); break;
	case FILES_UNPACK: files_unpack(); break;
	case FILES_PACK_UPPER: pack_upper(upper); break;
	default: fail_with(ENOSYS, "");
	}
	finish();
}
