/* Operations that make, clone and change mounts, with the new mount API only. */
#include <limits.h>
#include <sys/stat.h>

#include "launch.h"
#include "text.h"

int fs_failed(struct launch *l, int fs)
{
	int error = errno;
	ssize_t n = read(fs, l->extra, sizeof(l->extra) - 1);

	l->extra[n > 0 ? n : 0] = 0;
	return fail(error);
}

static int fs_option(int fs, const char *option)
{
	char key[64];
	const char *equals = strchr(option, '=');
	size_t len = equals ? (size_t)(equals - option) : 0;

	if (!equals)
		return sys_fsconfig(fs, FSCONFIG_SET_FLAG, option, NULL, 0);
	if (len >= sizeof(key))
		return fail(EINVAL);
	memcpy(key, option, len);
	key[len] = 0;
	return sys_fsconfig(fs, FSCONFIG_SET_STRING, key, equals + 1, 0);
}

int fs_options(struct launch *l, int fs, struct reader *r)
{
	for (uint32_t n = read_count(r); n; n--) {
		const char *option = read_str(r);
		if (fs_option(fs, option) < 0) {
			l->what = option;
			return -1;
		}
	}
	return 0;
}

int fs_mount(struct launch *l, int fs, uint64_t attr)
{
	int mount;

	if (sys_fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
		return fs_failed(l, fs);
	mount = sys_fsmount(fs, FSMOUNT_CLOEXEC, (unsigned)attr);
	return mount < 0 ? fs_failed(l, fs) : mount;
}

static int tree_adjust(struct launch *l, int tree, uint32_t recursive, uint64_t attr,
		       int32_t userns, uint64_t propagation)
{
	unsigned flags = recursive ? AT_RECURSIVE : 0;
	int ns = -1;

	if (userns >= 0) {
		ns = slot_get(l, userns);
		if (ns < 0)
			return -1;
		attr |= MOUNT_ATTR_IDMAP;
	}
	if (!attr && !propagation)
		return 0;
	return sys_mount_setattr(tree, flags, attr, 0, propagation, ns);
}

int op_open_tree(struct launch *l, struct reader *r)
{
	int32_t slot = read_i32(r);
	const char *path = l->what = read_str(r);
	int32_t source = read_i32(r);
	uint32_t recursive = read_u32(r);
	uint64_t attr = read_u64(r);
	int32_t userns = read_i32(r);
	uint64_t propagation = read_u64(r);
	unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (recursive ? AT_RECURSIVE : 0);
	int dir = AT_FDCWD, tree;

	if (source >= 0) {
		dir = slot_get(l, source);
		if (dir < 0)
			return -1;
		flags |= *path ? 0 : AT_EMPTY_PATH;
	}
	tree = sys_open_tree(dir, path, flags);
	if (tree < 0)
		return -1;
	if (tree_adjust(l, tree, recursive, attr, userns, propagation) < 0) {
		int error = errno;
		close(tree);
		return fail(error);
	}
	return slot_put(l, slot, tree);
}

static int put_on(struct launch *l, int mount, const char *path, char want)
{
	int error, result, target = root_target(l, path, want);

	if (target < 0)
		return -1;
	result = sys_move_mount(mount, target);
	error = errno;
	close(target);
	return result < 0 ? fail(error) : 0;
}

int op_move_mount(struct launch *l, struct reader *r)
{
	int mount = slot_get(l, read_i32(r));
	const char *target = l->what = read_str(r), *create = read_str(r);

	if (mount < 0)
		return -1;
	return *target ? put_on(l, mount, target, *create) : become_root(l, mount);
}

int op_root_dir(struct launch *l, struct reader *r)
{
	const char *path = l->what = read_str(r);
	unsigned recursive = read_u32(r) ? AT_RECURSIVE : 0;
	int tree = sys_open_tree(AT_FDCWD, path,
				 OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive);

	return tree < 0 ? -1 : become_root(l, tree);
}

int op_propagation(struct launch *l, struct reader *r)
{
	const char *path = l->what = read_str(r);

	return sys_mount(NULL, path, NULL, (unsigned long)read_u64(r), NULL);
}

enum { COPY_DEPTH = 32 };

static int copy_content(int from, int to);

static int copy_regular(int from, int to, const char *name, const struct stat *st)
{
	char chunk[4096];
	ssize_t n = -1;
	int in = openat(from, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	int out = in < 0 ? -1 : openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	int result = -1, error;

	while (out >= 0 && (n = read(in, chunk, sizeof(chunk))) > 0)
		if (write_all(out, chunk, (size_t)n) < 0)
			break;
	if (out >= 0 && n == 0)
		result = fchown(out, st->st_uid, st->st_gid) < 0
				 ? -1 : fchmod(out, st->st_mode & 07777);
	error = errno;
	if (in >= 0)
		close(in);
	if (out >= 0)
		close(out);
	return result < 0 ? fail(error) : 0;
}

static int copy_link(int from, int to, const char *name, const struct stat *st)
{
	char target[PATH_MAX];
	ssize_t n = readlinkat(from, name, target, sizeof(target) - 1);

	if (n < 0)
		return -1;
	target[n] = 0;
	if (symlinkat(target, to, name) < 0)
		return -1;
	return fchownat(to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW);
}

static int copy_subdir(int from, int to, const char *name, const struct stat *st)
{
	int in = openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	int out = -1, result = -1, error;

	if (in >= 0 && mkdirat(to, name, 0700) == 0)
		out = openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (out >= 0 && copy_content(in, out) == 0 && fchown(out, st->st_uid, st->st_gid) == 0)
		result = fchmod(out, st->st_mode & 07777);
	error = errno;
	if (in >= 0)
		close(in);
	if (out >= 0)
		close(out);
	return result < 0 ? fail(error) : 0;
}

static int copy_entry(int from, int to, const char *name)
{
	struct stat st;

	if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return -1;
	if (S_ISDIR(st.st_mode))
		return copy_subdir(from, to, name, &st);
	if (S_ISLNK(st.st_mode))
		return copy_link(from, to, name, &st);
	if (S_ISREG(st.st_mode))
		return copy_regular(from, to, name, &st);
	return 0; /* sockets, FIFOs and devices are not content */
}

struct dirent64 {
	uint64_t ino, off;
	uint16_t reclen;
	uint8_t type;
	char name[];
};

static int copy_content(int from, int to)
{
	static int depth; /* one thread; bounds the stack */
	_Alignas(8) char entries[2048];
	long n;
	int result = 0;

	if (++depth > COPY_DEPTH)
		result = fail(ELOOP);
	while (result == 0 && (n = syscall(SYS_getdents64, from, entries, sizeof(entries))) > 0) {
		for (long at = 0; at < n && result == 0;) {
			const struct dirent64 *entry = (const void *)(entries + at);
			if (strcmp(entry->name, ".") != 0 && strcmp(entry->name, "..") != 0)
				result = copy_entry(from, to, entry->name);
			at += entry->reclen;
		}
	}
	depth--;
	return result == 0 && n < 0 ? -1 : result;
}

/* Copy what is at `target` now into the mount that is about to hide it. */
static int copy_up(struct launch *l, int mount, const char *target)
{
	struct stat st;
	int from = root_open(l, target, O_RDONLY | O_DIRECTORY, 0);
	int to, result, error;

	if (from < 0)
		return errno == ENOENT ? 0 : -1;
	to = openat(mount, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	result = to < 0 ? -1 : copy_content(from, to);
	/* The mode that the plan asks for stays; the owner follows the image. */
	if (result == 0 && fstat(from, &st) == 0)
		result = fchown(to, st.st_uid, st.st_gid);
	error = errno;
	close(from);
	if (to >= 0)
		close(to);
	return result < 0 ? fail(error) : 0;
}

static int fs_configure(struct launch *l, int fs, const char *source, struct reader *r)
{
	if (*source && sys_fsconfig(fs, FSCONFIG_SET_STRING, "source", source, 0) < 0)
		return -1;
	return fs_options(l, fs, r);
}

int op_mount(struct launch *l, struct reader *r)
{
	const char *fstype = read_str(r), *target = l->what = read_str(r), *source = read_str(r);
	int mount = -1, error, result, fs = sys_fsopen(fstype, FSOPEN_CLOEXEC);
	uint64_t attr;

	if (fs < 0) {
		l->what = fstype;
		return -1;
	}
	if (fs_configure(l, fs, source, r) < 0) {
		fs_failed(l, fs);
	} else {
		attr = read_u64(r);
		/* Copying needs a writable mount: forbid writing afterwards. */
		mount = fs_mount(l, fs, attr & ~(uint64_t)MOUNT_ATTR_RDONLY);
	}
	error = errno;
	close(fs);
	if (mount < 0)
		return fail(error);
	result = read_u32(r) ? copy_up(l, mount, target) : 0;
	if (result == 0 && (attr & MOUNT_ATTR_RDONLY))
		result = sys_mount_setattr(mount, 0, MOUNT_ATTR_RDONLY, 0, 0, -1);
	if (result == 0)
		result = put_on(l, mount, target, 'd');
	error = errno;
	close(mount);
	return result < 0 ? fail(error) : 0;
}

int op_remount(struct launch *l, struct reader *r)
{
	const char *target = l->what = read_str(r);
	uint64_t set = read_u64(r), clear = read_u64(r);
	unsigned flags = read_u32(r) ? AT_RECURSIVE : 0;
	uint64_t propagation = read_u64(r);
	int result, error, fd = *target ? root_open(l, target, O_PATH, 0) : l->root;

	if (fd < 0)
		return *target ? -1 : fail(EBADF);
	result = sys_mount_setattr(fd, flags, set, clear, propagation, -1);
	error = errno;
	if (*target)
		close(fd);
	return result < 0 ? fail(error) : 0;
}

static int mask_directory(struct launch *l, int target)
{
	int fs, mount;

	if (l->mask_dir >= 0) {
		mount = sys_open_tree(l->mask_dir, "",
				      AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	} else {
		fs = sys_fsopen("tmpfs", FSOPEN_CLOEXEC);
		if (fs < 0)
			return -1;
		if (sys_fsconfig(fs, FSCONFIG_SET_STRING, "source", "tmpfs", 0) < 0 ||
		    sys_fsconfig(fs, FSCONFIG_SET_STRING, "nr_inodes", "1", 0) < 0 ||
		    sys_fsconfig(fs, FSCONFIG_SET_FLAG, "ro", NULL, 0) < 0)
			mount = -1;
		else
			mount = fs_mount(l, fs, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID |
						       MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
		close(fs);
	}
	if (mount < 0 || sys_move_mount(mount, target) < 0) {
		int error = errno;
		if (mount >= 0)
			close(mount);
		return fail(error);
	}
	/* A detached mount cannot be cloned before Linux 6.15: clone the first attached one. */
	if (l->mask_dir < 0)
		l->mask_dir = mount;
	else
		close(mount);
	return 0;
}

static int mask_other(struct launch *l, int target)
{
	int result, error, tree, null = root_open(l, "dev/null", O_PATH, 0);

	if (null < 0)
		return -1;
	tree = sys_open_tree(null, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	result = tree < 0 ? -1 : sys_move_mount(tree, target);
	error = errno;
	close(null);
	if (tree >= 0)
		close(tree);
	return result < 0 ? fail(error) : 0;
}

int op_mask(struct launch *l, struct reader *r)
{
	struct stat st;

	for (uint32_t n = read_count(r); n; n--) {
		const char *path = l->what = read_str(r);
		int result, error, target = root_open(l, path, O_PATH, 0);
		if (target < 0 && (errno == ENOENT || errno == ENOTDIR))
			continue;
		if (target < 0 || fstat(target, &st) < 0)
			return -1;
		result = S_ISDIR(st.st_mode) ? mask_directory(l, target) : mask_other(l, target);
		error = errno;
		close(target);
		if (result < 0)
			return fail(error);
	}
	return 0;
}

static int make_read_only(int target)
{
	int result, error, tree = sys_open_tree(target, "",
			AT_EMPTY_PATH | AT_RECURSIVE | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);

	if (tree < 0)
		return -1;
	result = sys_mount_setattr(tree, AT_RECURSIVE, MOUNT_ATTR_RDONLY, 0, 0, -1);
	if (result == 0)
		result = sys_move_mount(tree, target);
	error = errno;
	close(tree);
	return result < 0 ? fail(error) : 0;
}

int op_read_only(struct launch *l, struct reader *r)
{
	for (uint32_t n = read_count(r); n; n--) {
		const char *path = l->what = read_str(r);
		int result, error, target = root_open(l, path, O_PATH, 0);
		if (target < 0 && (errno == ENOENT || errno == ENOTDIR))
			continue;
		if (target < 0)
			return -1;
		result = make_read_only(target);
		error = errno;
		close(target);
		if (result < 0)
			return fail(error);
	}
	return 0;
}
