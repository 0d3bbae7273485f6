/* Operations on paths in the new root. Every path is resolved beneath the root with
 * openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS): a link in an image leads nowhere else. */
#include <limits.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "launch.h"

int root_open(struct launch *l, const char *path, uint64_t flags, uint64_t mode)
{
	if (l->root < 0)
		return fail(EBADF);
	return sys_openat2(l->root, *path ? path : ".", flags | O_CLOEXEC, mode,
			   RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
}

/* Open the directory that holds `path`; `*leaf` is the last component, inside `buffer`
 * (PATH_MAX bytes). */
int root_parent(struct launch *l, const char *path, char *buffer, const char **leaf)
{
	size_t len = strlen(path);
	char *slash;

	while (len && path[len - 1] == '/')
		len--;
	if (!len || len >= PATH_MAX)
		return fail(len ? ENAMETOOLONG : EEXIST);
	memcpy(buffer, path, len);
	buffer[len] = 0;
	slash = strrchr(buffer, '/');
	*leaf = slash ? slash + 1 : buffer;
	if (!slash)
		return root_open(l, ".", O_PATH | O_DIRECTORY, 0);
	*slash = 0;
	return root_open(l, buffer, O_PATH | O_DIRECTORY, 0);
}

static int make_one_dir(struct launch *l, const char *path, uint32_t mode, uint32_t uid,
			uint32_t gid)
{
	char buffer[PATH_MAX];
	const char *leaf;
	int result, parent = root_parent(l, path, buffer, &leaf);

	if (parent < 0)
		return -1;
	result = mkdirat(parent, leaf, mode);
	if (result == 0 && (uid || gid))
		result = fchownat(parent, leaf, uid, gid, AT_SYMLINK_NOFOLLOW);
	close(parent);
	return result;
}

static int make_parents(struct launch *l, const char *path)
{
	char prefix[PATH_MAX];
	size_t len = strlen(path);

	if (len >= sizeof(prefix))
		return fail(ENAMETOOLONG);
	memcpy(prefix, path, len + 1);
	for (size_t i = 1; i < len; i++) {
		if (prefix[i] != '/')
			continue;
		prefix[i] = 0;
		if (make_one_dir(l, prefix, 0755, 0, 0) < 0 && errno != EEXIST)
			return -1;
		prefix[i] = '/';
	}
	return 0;
}

/* Where the kernel's own file systems go. Through a link of the image they would hide what it
 * has elsewhere, and what is masked in them would not be what is seen. */
static bool is_kernels(const char *path)
{
	return !strcmp(path, "/proc") || !strcmp(path, "/sys") || !strcmp(path, "/dev");
}

int root_dir(struct launch *l, const char *path, uint32_t mode, uint32_t uid, uint32_t gid)
{
	uint64_t more = is_kernels(path) ? RESOLVE_NO_SYMLINKS : 0;
	int fd = l->root < 0 ? fail(EBADF)
			     : sys_openat2(l->root, path, O_PATH | O_DIRECTORY | O_CLOEXEC, 0,
					   RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | more);

	if (fd >= 0 || errno != ENOENT)
		return fd;
	if (make_one_dir(l, path, mode, uid, gid) < 0 && errno != EEXIST) {
		if (errno != ENOENT || make_parents(l, path) < 0)
			return -1;
		if (make_one_dir(l, path, mode, uid, gid) < 0 && errno != EEXIST)
			return -1;
	}
	return root_open(l, path, O_PATH | O_DIRECTORY, 0);
}

static int make_file(struct launch *l, const char *path)
{
	uint64_t flags = O_RDONLY | O_CREAT | O_NONBLOCK | O_NOCTTY;
	int fd = root_open(l, path, flags, 0644);

	if (fd < 0 && errno == ENOENT && make_parents(l, path) == 0)
		fd = root_open(l, path, flags, 0644);
	if (fd < 0)
		return -1;
	close(fd);
	return 0;
}

int root_target(struct launch *l, const char *path, char want)
{
	int fd;

	if (want == 'd')
		return root_dir(l, path, 0755, 0, 0);
	fd = root_open(l, path, O_PATH, 0);
	if (fd >= 0 || errno != ENOENT || want != 'f')
		return fd;
	if (make_file(l, path) < 0)
		return -1;
	return root_open(l, path, O_PATH, 0);
}

int write_file(struct launch *l, int fd, const void *data, size_t len)
{
	const char *at = data;

	(void)l;
	while (len) {
		ssize_t done = write(fd, at, len);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return -1;
		at += done;
		len -= (size_t)done;
	}
	return 0;
}

/* Close without losing the errno of what went before. */
static int closing(int fd, int result)
{
	int error = errno;

	close(fd);
	errno = error;
	return result;
}

int op_mkdir(struct launch *l, struct reader *r)
{
	const char *path = l->what = read_str(r);
	uint32_t mode = read_u32(r), uid = read_u32(r), gid = read_u32(r);
	int fd = root_dir(l, path, mode, uid, gid);

	return fd < 0 ? -1 : closing(fd, 0);
}

static int node_by_bind(struct launch *l, const char *path, const char *host)
{
	int tree, target, result;

	if (make_file(l, path) < 0 && errno != EEXIST)
		return -1;
	tree = sys_open_tree(AT_FDCWD, host, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (tree < 0)
		return -1;
	target = root_open(l, path, O_PATH, 0);
	result = target < 0 ? -1 : sys_move_mount(tree, target);
	if (target >= 0)
		closing(target, 0);
	return closing(tree, result);
}

int op_mknod(struct launch *l, struct reader *r)
{
	char buffer[PATH_MAX];
	const char *leaf, *path = l->what = read_str(r);
	uint32_t mode = read_u32(r), major_no = read_u32(r), minor_no = read_u32(r);
	uint32_t uid = read_u32(r), gid = read_u32(r);
	const char *fallback = read_str(r);
	int result, dir = root_parent(l, path, buffer, &leaf);

	if (dir < 0 && errno == ENOENT && make_parents(l, path) == 0)
		dir = root_parent(l, path, buffer, &leaf);
	if (dir < 0)
		return -1;
	result = mknodat(dir, leaf, mode, makedev(major_no, minor_no));
	if (result == 0 && (uid || gid))
		result = fchownat(dir, leaf, uid, gid, AT_SYMLINK_NOFOLLOW);
	closing(dir, 0);
	if (result < 0 && (errno == EPERM || errno == EACCES) && *fallback)
		return node_by_bind(l, path, fallback);
	return result;
}

int op_symlink(struct launch *l, struct reader *r)
{
	char buffer[PATH_MAX];
	const char *leaf, *target = read_str(r), *path = l->what = read_str(r);
	int result, dir = root_parent(l, path, buffer, &leaf);

	if (dir < 0 && errno == ENOENT && make_parents(l, path) == 0)
		dir = root_parent(l, path, buffer, &leaf);
	if (dir < 0)
		return -1;
	result = symlinkat(target, dir, leaf);
	if (result < 0 && errno == EEXIST)
		result = 0;
	return closing(dir, result);
}

int op_write_file(struct launch *l, struct reader *r)
{
	struct stat st;
	uint32_t len;
	const char *path = l->what = read_str(r);
	const uint8_t *content = read_bytes(r, &len);
	uint32_t mode = read_u32(r), append = read_u32(r);
	/* O_NONBLOCK: an image may have put a FIFO there. */
	uint64_t flags = O_WRONLY | O_CREAT | O_NONBLOCK | O_NOCTTY | (append ? O_APPEND : 0);
	int result, fd = root_open(l, path, flags, mode & 07777);

	if (fd < 0 && errno == ENOENT && make_parents(l, path) == 0)
		fd = root_open(l, path, flags, mode & 07777);
	if (fd < 0)
		return -1;
	result = fstat(fd, &st);
	if (result == 0 && !S_ISREG(st.st_mode))
		result = fail(EINVAL);
	if (result == 0 && !append)
		result = ftruncate(fd, 0);
	if (result == 0)
		result = write_file(l, fd, content, len);
	return closing(fd, result);
}

int op_chdir(struct launch *l, struct reader *r)
{
	const char *path = l->what = read_str(r);
	uint32_t create = read_u32(r), uid = read_u32(r), gid = read_u32(r);
	int fd = create ? root_dir(l, path, 0755, uid, gid)
			: root_open(l, path, O_PATH | O_DIRECTORY, 0);

	return fd < 0 ? -1 : closing(fd, fchdir(fd));
}

int op_sysctl(struct launch *l, struct reader *r)
{
	static const char prefix[] = "proc/sys/";
	char path[sizeof(prefix) + 256];
	const char *key = l->what = read_str(r), *value = read_str(r);
	size_t len = strlen(key);
	int fd;

	if (len > 255)
		return fail(ENAMETOOLONG);
	memcpy(path, prefix, sizeof(prefix) - 1);
	memcpy(path + sizeof(prefix) - 1, key, len + 1);
	fd = root_open(l, path, O_WRONLY | O_TRUNC, 0);
	return fd < 0 ? -1 : closing(fd, write_file(l, fd, value, strlen(value)));
}

int become_root(struct launch *l, int mount)
{
	int top = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (top < 0)
		return -1;
	/* Over "/": paths of this process still start at the mount beneath it. */
	if (sys_move_mount(mount, top) < 0)
		return closing(top, -1);
	close(top);
	l->root = mount;
	return 0;
}

int op_pivot_root(struct launch *l, struct reader *r)
{
	(void)r;
	if (l->root < 0)
		return fail(EBADF);
	if (fchdir(l->root) < 0 || sys_pivot_root(".", ".") < 0)
		return -1;
	if (sys_umount2(".", 2 /* MNT_DETACH */) < 0 || chdir("/") < 0)
		return -1;
	l->root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	return l->root < 0 ? -1 : 0;
}
