/* Files and directories of the guest's own root. */
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>

#include "../text.h"
#include "agent.h"

bool climbs(const char *path)
{
	for (const char *at = path; (at = strstr(at, "..")); at += 2)
		if ((at == path || at[-1] == '/') && (!at[2] || at[2] == '/'))
			return true;
	return false;
}

int make_dirs(const char *path, uint32_t mode, bool last)
{
	char copy[PATH_MAX];
	size_t len = strlen(path);

	if (!len || len >= sizeof(copy))
		return len ? ENAMETOOLONG : ENOENT;
	memcpy(copy, path, len + 1);
	for (char *at = copy + 1; (at = strchr(at, '/')); *at++ = '/') {
		*at = 0;
		if (mkdir(copy, 0755) < 0 && errno != EEXIST)
			return errno;
	}
	if (!last)
		return 0;
	if (mkdir(path, mode & 07777) == 0)
		return chmod(path, mode & 07777) < 0 ? errno : 0; /* whatever the umask is */
	return errno == EEXIST ? 0 : errno;
}

int make_symlink(const char *target, const char *path)
{
	int error = make_dirs(path, 0, false);

	if (error)
		return error;
	if (symlink(target, path) == 0)
		return 0;
	if (errno != EEXIST || unlink(path) < 0)
		return errno;
	return symlink(target, path) < 0 ? errno : 0;
}

/* Replaced whole: who reads it meanwhile sees the old content or the new. */
int put_file(const char *path, uint32_t mode, const void *data, size_t n)
{
	char name[PATH_MAX];
	struct text t = text_in(name, sizeof(name));
	int fd, error = make_dirs(path, 0, false);

	if (error)
		return error;
	text_add(&t, path);
	text_add(&t, ".new");
	if (strlen(path) + 4 != t.len)
		return ENAMETOOLONG;
	unlink(name);
	fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0)
		return errno;
	if (write_all(fd, data, n) < 0 || fchmod(fd, mode & 07777) < 0)
		error = errno;
	close(fd);
	if (!error && rename(name, path) < 0)
		error = errno;
	if (error)
		unlink(name);
	return error;
}

int rewrite_file(const char *path, const void *data, size_t n)
{
	int error = 0, fd = open(path, O_WRONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0)
		return errno;
	/* Cut last: a reader meanwhile finds the old end, not nothing. */
	if (write_all(fd, data, n) < 0 || fstat(fd, &st) < 0 ||
	    (st.st_size > (off_t)n && ftruncate(fd, (off_t)n) < 0))
		error = errno;
	close(fd);
	return error;
}

int put_value(const char *path, const char *value)
{
	int error = 0, fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	if (write(fd, value, strlen(value)) < 0)
		error = errno;
	close(fd);
	return error;
}

ssize_t get_file(const char *path, char *buffer, size_t cap)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t len = 0;
	ssize_t n = 1;

	buffer[0] = 0;
	if (fd < 0)
		return -1;
	while (len + 1 < cap && n > 0) {
		n = read(fd, buffer + len, cap - 1 - len);
		if (n < 0 && errno == EINTR)
			n = 1;
		else if (n > 0)
			len += (size_t)n;
	}
	close(fd);
	buffer[len] = 0;
	return n < 0 && !len ? -1 : (ssize_t)len;
}
