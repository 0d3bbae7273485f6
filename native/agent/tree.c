/* Names below a directory, resolved as its own processes would: links cannot lead out. */
#include <dirent.h>
#include <limits.h>
#include <stdlib.h>

#include "files.h"

int tree_open(int dir, const char *path, uint64_t flags, uint64_t mode)
{
	return sys_openat2(dir, *path ? path : ".", flags | O_CLOEXEC, mode,
			   RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
}

static bool is_dots(const char *name, size_t len)
{
	return (len == 1 && name[0] == '.') || (len == 2 && name[0] == '.' && name[1] == '.');
}

/* Open what comes before the last name of a path; trailing slashes do not count. */
static int open_before(int dir, const char *path, size_t len)
{
	char before[PATH_MAX];

	if (len >= sizeof(before)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(before, path, len);
	before[len] = 0;
	return tree_open(dir, before, O_PATH | O_DIRECTORY, 0);
}

int tree_parent(int dir, const char *path, const char **leaf)
{
	size_t len = strlen(path);
	const char *slash;

	slash = strrchr(path, '/');
	*leaf = slash ? slash + 1 : path;
	len = (size_t)(*leaf - path);
	if (!**leaf || is_dots(*leaf, strlen(*leaf))) {
		errno = EINVAL; /* the root itself, or a name that says less than it seems to */
		return -1;
	}
	return open_before(dir, path, len);
}

static int make_one(int dir, const char *path, size_t end, uint32_t mode, uint32_t uid, uint32_t gid)
{
	char leaf[NAME_MAX + 1];
	size_t begin = end;
	int parent, result;

	while (begin && path[begin - 1] != '/')
		begin--;
	if (is_dots(path + begin, end - begin))
		return 0;
	if (end - begin > NAME_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(leaf, path + begin, end - begin);
	leaf[end - begin] = 0;
	parent = open_before(dir, path, begin);
	if (parent < 0)
		return -1;
	result = mkdirat(parent, leaf, mode & 07777);
	if (result == 0 && (uid != (uint32_t)KEEP || gid != (uint32_t)KEEP))
		result = fchownat(parent, leaf, uid, gid, AT_SYMLINK_NOFOLLOW);
	else if (result < 0 && errno == EEXIST)
		result = 0;
	close(parent);
	return result;
}

int tree_make(int dir, const char *path, uint32_t mode, uint32_t uid, uint32_t gid)
{
	size_t len = strlen(path);
	int fd;

	for (size_t end = 1; end <= len; end++)
		if ((end == len || path[end] == '/') && path[end - 1] != '/' &&
		    make_one(dir, path, end, mode, uid, gid) < 0)
			return -1;
	fd = tree_open(dir, path, O_PATH | O_DIRECTORY, 0); /* was there all along, but as a file? */
	if (fd < 0)
		return -1;
	close(fd);
	return 0;
}

static int empty(int parent, const char *name)
{
	int result = 0, error = 0;
	int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;

	if (!dir) {
		if (fd >= 0)
			close(fd);
		return -1;
	}
	while (!result && (entry = readdir(dir)))
		if (!is_dots(entry->d_name, strlen(entry->d_name)))
			result = tree_remove(fd, entry->d_name, true);
	error = errno;
	closedir(dir);
	errno = error;
	return result;
}

int tree_remove(int parent, const char *leaf, bool recursive)
{
	if (unlinkat(parent, leaf, 0) == 0)
		return 0;
	if (errno != EISDIR && errno != EPERM)
		return -1;
	if (recursive && empty(parent, leaf) < 0)
		return -1;
	return unlinkat(parent, leaf, AT_REMOVEDIR);
}
