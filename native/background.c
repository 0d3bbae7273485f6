/* Less rights, no terminal: for programs that outlive whoever started them. */
#include "background.h"

#include <fcntl.h>
#include <grp.h>
#include <sys/prctl.h>
#include <unistd.h>

#define NOBODY 65534

int drop_privileges(rlim_t files)
{
	struct rlimit open_files = {files, files}, none = {0, 0};
	setrlimit(RLIMIT_NOFILE, &open_files);
	setrlimit(RLIMIT_CORE, &none);
	if (getuid() == 0 && (setgroups(0, NULL) < 0 || setresgid(NOBODY, NOBODY, NOBODY) < 0 ||
			      setresuid(NOBODY, NOBODY, NOBODY) < 0))
		return -1;
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	return 0;
}

int enter_background(void)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0 || setsid() < 0)
		return -1;
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	return 0;
}

int go_to_background(void)
{
	pid_t pid = fork();
	if (pid < 0)
		return -1;
	if (pid > 0)
		_exit(0);
	return enter_background();
}
