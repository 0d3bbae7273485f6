/* The end of the guest: everything killed, everything written. */
#include <sys/mount.h>
#include <sys/wait.h>
#include <time.h>

#include "../text.h"
#include "agent.h"

enum { SKIP_SYNC = 1, REAP_MS = 2000, VOLUMES = 8 };

static const char writable[] = "/hutch/rw", volumes[] = "/hutch/volumes/";

/* Process 1 is what -1 leaves out. */
static void kill_all(void)
{
	uint64_t until = mono_ns() + (uint64_t)REAP_MS * 1000000u;
	struct timespec pause = { .tv_nsec = 1000000 };

	kill(-1, SIGKILL);
	while (mono_ns() < until) {
		pid_t pid = waitpid(-1, NULL, WNOHANG);
		if (pid < 0)
			return; /* none is left */
		if (pid == 0)
			nanosleep(&pause, NULL);
	}
}

/* A mount in a namespace that is just going away may still be there: then it is made
 * read-only, which leaves as clean a file system as an unmount. */
static int put_away(const char *path)
{
	if (umount2(path, 0) == 0 || errno == EINVAL || errno == ENOENT)
		return 0;
	if (mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0)
		return 0;
	return errno;
}

/* The volumes that are disks, by their numbers, and what is written beside them. */
static int put_all_away(const char **what)
{
	int failed = 0, error;
	char path[64];

	sync();
	*what = writable;
	for (uint32_t i = 0; i < VOLUMES; i++) {
		struct text t = text_in(path, sizeof(path));
		text_add(&t, volumes);
		text_add_num(&t, i);
		error = put_away(path);
		if (error) {
			failed = error;
			*what = volumes;
		}
	}
	error = put_away(writable);
	if (error) {
		failed = error;
		*what = writable;
	}
	return failed;
}

int shut_down(uint32_t flags, const char **what)
{
	if (the.init)
		kill_all();
	if (the.main_fd >= 0)
		close(the.main_fd);
	the.main_fd = -1;
	if (flags & SKIP_SYNC)
		return 0;
	if (!the.init) {
		sync();
		return 0;
	}
	umount2(the.root, MNT_DETACH);
	return put_all_away(what);
}
