/* The reaping init of `Exec(init=True)`: the launcher itself stays as process 1. */
#include <sys/prctl.h>
#include <sys/wait.h>

#include "launch.h"

/* Reap what has ended; return the wanted process's wait status, or -1. */
static int reap(pid_t wanted)
{
	int status, found = -1;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == wanted)
			found = status;
	return found;
}

_Noreturn void run_init(pid_t pid)
{
	sigset_t all;
	int status;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	/* Nothing of the launch stays open: the report's end of file means "it runs", and
	 * the pipes' end of file must be the program's own. */
	sys_close_range(0, ~0U, 0);
	prctl(PR_SET_NAME, "hutch-init", 0, 0, 0);
	for (;;) {
		siginfo_t info;
		int signum;
		status = reap(pid);
		if (status >= 0)
			break;
		signum = sigwaitinfo(&all, &info);
		if (signum <= 0 || signum == SIGCHLD)
			continue;
		/* Signals of the terminal reach its foreground group by themselves. */
		if (info.si_code == SI_KERNEL &&
		    (signum == SIGTTIN || signum == SIGTTOU || signum == SIGTSTP))
			continue;
		kill(pid, signum);
	}
	_exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}
