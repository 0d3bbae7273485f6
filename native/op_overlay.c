/* The overlay operation: with one fsconfig(2) call for each layer where the kernel has
 * that (Linux 6.8), with mount(2) in a namespace of its own where it has not. */
#include <stdlib.h>
#include <sys/wait.h>

#include "launch.h"
#include "text.h"

enum { FS_STRING_MAX = 255 }; /* fsconfig(2) refuses longer strings */

/* Give a directory to the overlay by its path, or by descriptor when that is too long. */
static int give_path(struct launch *l, int fs, const char *key, const char *path)
{
	int result, error, dir;

	l->what = path;
	if (strlen(path) <= FS_STRING_MAX)
		return sys_fsconfig(fs, FSCONFIG_SET_STRING, key, path, 0);
	dir = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0)
		return -1;
	result = sys_fsconfig(fs, FSCONFIG_SET_FD, key, NULL, dir);
	error = errno;
	close(dir);
	return result < 0 ? fail(error) : 0;
}

static void add_fd_path(struct text *t, int fd)
{
	text_add(t, "/proc/self/fd/");
	text_add_num(t, fd);
}

static int give_slot(struct launch *l, int fs, const char *key, const char *number)
{
	char path[32];
	struct text t = text_in(path, sizeof(path));
	int fd = slot_get(l, atoi(number));

	if (fd < 0)
		return -1;
	if (sys_fsconfig(fs, FSCONFIG_SET_FD, key, NULL, fd) == 0)
		return 0;
	/* Before Linux 6.13 overlay takes no descriptors, but resolves their links. */
	add_fd_path(&t, fd);
	return sys_fsconfig(fs, FSCONFIG_SET_STRING, key, path, 0);
}

static int configure(struct launch *l, int fs, struct reader *r)
{
	const char *upper, *work;

	for (uint32_t n = read_count(r); n; n--) {
		const char *layer = l->what = read_str(r);
		int result = *layer == '@' ? give_slot(l, fs, "lowerdir+", layer + 1)
					   : give_path(l, fs, "lowerdir+", layer);
		if (result < 0)
			return -1;
	}
	upper = read_str(r);
	work = read_str(r);
	if (*upper && (give_path(l, fs, "upperdir", upper) < 0 ||
		       give_path(l, fs, "workdir", work) < 0))
		return -1;
	return fs_options(l, fs, r);
}

/* Whether this kernel's overlay takes its layers one by one. */
static bool takes_layers(int fs)
{
#ifdef HUTCH_TEST_OLD_OVERLAY
	(void)fs;
	return false;
#else
	/* One that does refuses an empty name, in other words than an unknown key. Before the
	 * new mount API came to overlay (Linux 6.5) any key was taken and looked at later. */
	char said[128];
	ssize_t n;

	if (sys_fsconfig(fs, FSCONFIG_SET_STRING, "lowerdir+", "", 0) == 0)
		return false;
	n = read(fs, said, sizeof(said) - 1);
	said[n > 0 ? n : 0] = 0;
	return !strstr(said, "nknown parameter");
#endif
}

struct opened {
	int fds[256];
	int count;
};

/* Attach a detached mount: before Linux 6.15 overlay takes layers only from mounts of the
 * caller's namespace (clone_private_mount). This one is our own, and what is mounted on its
 * root hides nothing from who has the root already. */
static int attach(int mount)
{
	int error, root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	int result = root < 0 ? -1 : sys_move_mount(mount, root);

	error = errno;
	if (root >= 0)
		close(root);
	return result < 0 ? fail(error) : 0;
}

/* Name a directory for mount(2)'s options by descriptor: short, and free of commas and
 * colons. */
static int add_directory(struct launch *l, struct text *t, const char *path, struct opened *o)
{
	int fd;

	l->what = path;
	if (*path == '@') {
		fd = slot_get(l, atoi(path + 1));
		if (fd >= 0 && attach(fd) < 0)
			return -1;
	} else {
		if (o->count == (int)(sizeof(o->fds) / sizeof(o->fds[0])))
			return fail(E2BIG);
		fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (fd >= 0)
			o->fds[o->count++] = fd;
	}
	if (fd < 0)
		return -1;
	add_fd_path(t, fd);
	return t->len + 1 >= t->cap ? fail(E2BIG) : 0;
}

static int old_options(struct launch *l, struct text *t, struct reader *r, struct opened *o)
{
	const char *upper, *work;

	text_add(t, "lowerdir=");
	for (uint32_t n = read_count(r); n; n--) {
		if (add_directory(l, t, read_str(r), o) < 0)
			return -1;
		text_add(t, n > 1 ? ":" : "");
	}
	upper = read_str(r);
	work = read_str(r);
	if (*upper) {
		text_add(t, ",upperdir=");
		if (add_directory(l, t, upper, o) < 0)
			return -1;
		text_add(t, ",workdir=");
		if (add_directory(l, t, work, o) < 0)
			return -1;
	}
	for (uint32_t n = read_count(r); n; n--) {
		text_add(t, ",");
		text_add(t, read_str(r));
	}
	return t->len + 1 >= t->cap ? fail(E2BIG) : 0;
}

/* In a process with a mount namespace of its own: mount, and take the mount out of there. */
static int mount_apart(struct launch *l, struct reader *r, struct opened *o)
{
	enum { REC_PRIVATE = 0x4000 | 1 << 18 }; /* MS_REC | MS_PRIVATE */
	char options[4096]; /* a page is what the kernel takes */
	struct text t = text_in(options, sizeof(options));
	uint64_t attr;
	int tree;

	if (sys_mount(NULL, "/", NULL, REC_PRIVATE, NULL) < 0 || old_options(l, &t, r, o) < 0)
		return -1;
	attr = read_u64(r);
	/* Any directory will do for a target: nobody else sees it. */
	if (sys_mount("overlay", "/proc", "overlay", 0, options) < 0)
		return -1;
	tree = sys_open_tree(AT_FDCWD, "/proc", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (tree >= 0 && attr && sys_mount_setattr(tree, 0, attr, 0, 0, -1) < 0)
		return -1;
	return tree;
}

static _Noreturn void mount_and_tell(struct launch *l, struct reader *r, int out)
{
	struct opened o = { .count = 0 };
	int32_t answer[2];

	answer[0] = mount_apart(l, r, &o);
	answer[1] = errno;
	for (int i = 0; i < o.count; i++)
		close(o.fds[i]); /* they are the supervisor's too */
	(void)!write(out, answer, sizeof(answer));
	_exit(0);
}

/* The other process shares our descriptors: what it opens is ours too. */
static int old_overlay(struct launch *l, struct reader *r)
{
	struct clone3_args args = { .flags = CLONE_FILES | CLONE_NEWNS, .exit_signal = SIGCHLD };
	int32_t answer[2] = { -1, EIO };
	int ends[2], pid;

	if (pipe2(ends, O_CLOEXEC) < 0)
		return -1;
	pid = sys_clone3(&args);
	if (pid == 0)
		mount_and_tell(l, r, ends[1]);
	if (pid > 0) {
		while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
			;
		fcntl(ends[0], F_SETFL, O_NONBLOCK);
		if (read(ends[0], answer, sizeof(answer)) != (ssize_t)sizeof(answer))
			answer[1] = EIO;
	} else {
		answer[1] = errno;
	}
	close(ends[0]);
	close(ends[1]);
	return answer[0] < 0 ? fail(answer[1]) : answer[0];
}

static int keep_overlay(struct launch *l, int32_t slot, int mount)
{
	if (mount < 0 || slot_put(l, slot, mount) < 0)
		return -1;
	l->overlay[slot] = true;
	return 0;
}

/* Whether a layer is a detached mount, which kernels before 6.15 want attached. */
static bool has_mounts(struct reader r)
{
	for (uint32_t n = read_count(&r); n; n--)
		if (*read_str(&r) == '@')
			return true;
	return false;
}

int op_overlay(struct launch *l, struct reader *r)
{
	int32_t slot = read_i32(r);
	int mount = -1, error, fs = sys_fsopen("overlay", FSOPEN_CLOEXEC);

	if (fs < 0)
		return -1;
	if (takes_layers(fs)) {
		struct reader body = *r;
		if (configure(l, fs, &body) < 0)
			fs_failed(l, fs);
		else
			mount = fs_mount(l, fs, read_u64(&body));
		error = errno;
		close(fs);
		if (mount >= 0 || error != EINVAL || !has_mounts(*r)) {
			*r = body;
			errno = error;
			return keep_overlay(l, slot, mount);
		}
	} else {
		close(fs);
	}
	mount = old_overlay(l, r);
	r->at = r->end; /* the other process has read the rest */
	return keep_overlay(l, slot, mount);
}
