/* hutch-agent: process 1 of a guest, or with --serve FD the same service for a test. */
#include <stdlib.h>
#include <sys/stat.h>

#include "agent.h"

enum { FD_FIRST = 3, FD_OWN = 16 };

/* Keep the places that launchers expect their descriptors in, so that putting them there never
 * overwrites one of ours. */
static int out_of_the_way(int fd)
{
	int null, moved = fcntl(fd, F_DUPFD_CLOEXEC, FD_OWN);

	if (moved < 0)
		give_up("the descriptor");
	close(fd);
	fd = the.uevents;
	if (fd >= 0) {
		the.uevents = fcntl(fd, F_DUPFD_CLOEXEC, FD_OWN);
		close(fd);
	}
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0)
		give_up("/dev/null");
	for (int to = FD_FIRST; to < FD_OWN; to++)
		if (to != null)
			dup3(null, to, O_CLOEXEC);
	return moved;
}

static int serve_test(int argc, char **argv)
{
	char *end;
	long fd = argc > 2 ? strtol(argv[2], &end, 10) : -1;

	if (argc < 3 || *end || fd < 3 || fd > 1 << 20 || argc % 2 == 0)
		return 2;
	for (int i = 3; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--launcher"))
			the.launcher = argv[i + 1];
		else if (!strcmp(argv[i], "--root"))
			the.root = argv[i + 1];
		else if (!strcmp(argv[i], "--upper"))
			the.upper = argv[i + 1];
		else
			return 2;
	}
	fcntl((int)fd, F_SETFL, O_RDWR | O_NONBLOCK);
	serve(out_of_the_way((int)fd));
	return 0;
}

int main(int argc, char **argv)
{
	static char *const no_env[] = { NULL };
	extern char **environ;

	the.launcher = "/bin/hutch-launcher";
	the.root = "/hutch/root";
	the.upper = "/hutch/rw/upper";
	the.uevents = -1;
	the.env = environ;
	if (argc > 1 && !strcmp(argv[1], "--serve")) {
		the.uevents = open_uevents();
		return serve_test(argc, argv);
	}
	if (getpid() != 1) {
		static const char text[] =
			"usage: hutch-agent is process 1 of a guest\n"
			"       hutch-agent --serve FD [--launcher PATH] [--root DIR] [--upper DIR]\n";
		return write(2, text, sizeof(text) - 1) < 0 ? 1 : 2;
	}
	the.init = true;
	the.env = no_env;
	serve(out_of_the_way(boot()));
}
