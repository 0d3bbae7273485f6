/* Start: the starter's socket at descriptor 3, over which the plan and its slots come; or all
 * of them placed: the plan at 3, the socket at 4, slots from 5 on. */
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "supervisor.h"
#include "text.h"

enum { FD_PLAN = 3, FD_PLACED_STARTER = 4, FD_PLACED_SLOTS = 5, PLAN_FDS = 1 + MAX_SLOTS };

static struct supervisor the;

/* Leave the starter's session, and its family if it is not one that reaps us. */
static void detach(bool reaped)
{
	int null;

	if (!reaped && fork() != 0)
		_exit(0);
	setsid();
	signals_of_supervisor();
	umask(0077);
	(void)!chdir("/");
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int fd = 0; fd < 3; fd++)
		if (null >= 0 && null != fd)
			dup2(null, fd);
	if (null > 2)
		close(null);
}

static void set_up(struct supervisor *s, int starter, bool reaped)
{
	s->dir = s->listen = s->report = s->pidfd = s->old_pidfd = -1;
	s->streams[0] = s->streams[1] = s->input = s->terminal = -1;
	s->sync_held = s->sync_open = -1;
	s->log.fd = s->health.fd = -1;
	s->launch.root = s->launch.report = s->launch.mask_dir = -1;
	s->launch.what = "";
	s->launch.plan = &s->plan;
	for (int i = 0; i < MAX_SLOTS; i++)
		s->launch.slots[i] = -1;
	fcntl(starter, F_SETFD, FD_CLOEXEC);
	client_add(s, starter, true);
	s->clients[0].corked = reaped;
}

/* Take the descriptors that came with a message; the first is the plan, the others its
 * slots. Return the plan's, or -1. */
static int take_descriptors(struct supervisor *s, struct msghdr *msg)
{
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg);
	int fds[PLAN_FDS];
	size_t count;

	if (!cmsg || cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS ||
	    (msg->msg_flags & MSG_CTRUNC))
		return -1;
	count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
	if (!count || count > PLAN_FDS)
		return -1;
	memcpy(fds, CMSG_DATA(cmsg), count * sizeof(int));
	for (size_t i = 1; i < count; i++)
		s->launch.slots[i - 1] = fds[i];
	return fds[0];
}

/* Wait for the plan. The starter prepares it while this process comes to be; one that gives
 * up closes its end, and nothing has been done yet. */
static int receive_plan(struct supervisor *s, uint8_t *attach)
{
	uint8_t head[FRAME_HEAD];
	struct iovec iov = { .iov_base = head, .iov_len = sizeof(head) };
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(PLAN_FDS * sizeof(int))];
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	ssize_t n;

	do
		n = recvmsg(s->clients[0].fd, &msg, MSG_CMSG_CLOEXEC | MSG_WAITALL);
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		_exit(0);
	if (n != FRAME_HEAD || head[0] != FR_PLAN || get_u32(head + 4))
		return -1;
	*attach = head[1];
	return take_descriptors(s, &msg);
}

/* The descriptors of a starter that had the plan at hand. */
static int placed_plan(struct supervisor *s)
{
	for (int i = 0; i < MAX_SLOTS; i++)
		if (fcntl(FD_PLACED_SLOTS + i, F_SETFD, FD_CLOEXEC) == 0)
			s->launch.slots[i] = FD_PLACED_SLOTS + i;
	return FD_PLAN;
}

static bool is_socket(int fd)
{
	struct stat st;

	return fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode);
}

static uint8_t *load_plan(int fd, size_t *len)
{
	struct stat st;
	uint8_t *data;
	size_t got = 0;

	if (fstat(fd, &st) < 0 || st.st_size <= 0 || st.st_size > MAX_PLAN)
		return NULL;
	data = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (data == MAP_FAILED)
		return NULL;
	while (got < (size_t)st.st_size) {
		ssize_t n = pread(fd, data + got, (size_t)st.st_size - got, (off_t)got);
		if (n <= 0)
			return NULL;
		got += (size_t)n;
	}
	close(fd);
	*len = got;
	return data;
}

/* The supervision stays; the operations have been run. */
static void free_operations(struct supervisor *s, const uint8_t *plan, size_t len)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	size_t kept = ((size_t)(s->plan.prepare.at - plan) + page - 1) & ~(page - 1);
	union { const uint8_t *from; uint8_t *to; } at = { .from = plan + kept };

	if (kept < len)
		munmap(at.to, len - kept);
}

/* What the plan does not know of is not handed to its process. */
static void close_extra_slots(struct supervisor *s)
{
	for (uint32_t i = s->plan.slots; i < MAX_SLOTS; i++) {
		if (s->launch.slots[i] >= 0)
			close(s->launch.slots[i]);
		s->launch.slots[i] = -1;
	}
}

static _Noreturn void step_failed(struct supervisor *s, uint8_t section)
{
	char detail[DETAIL];
	int error = errno;
	struct text t = text_in(detail, sizeof(detail));

	text_add(&t, s->launch.what);
	if (s->launch.extra[0]) {
		text_add(&t, ": ");
		text_add(&t, s->launch.extra);
	}
	launch_failed(s, section, s->launch.index, error, detail);
}

static void clone_and_report(struct supervisor *s)
{
	int stdio[3], ends[2];

	s->launch.what = "stdio";
	if (stdio_open(s, stdio) < 0 ||
	    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		step_failed(s, SECTION_SUPERVISE);
	s->report = ends[0];
	s->pid = clone_child(&s->launch, stdio, ends, &s->pidfd);
	if (s->pid < 0)
		step_failed(s, SECTION_CLONE);
	close(ends[1]);
	stdio_started(stdio);
	if (s->plan.has_id_map &&
	    (write_id_maps(&s->launch, s->pid) < 0 || tell_child(s, GATE_MAPS) < 0))
		step_failed(s, SECTION_PREPARE);
	if (!s->plan.has_fork) /* the process to be is another one */
		tell_pid(s);
}

/* Make the files of the run directory while the child works; it runs the program only
 * when they are there. */
static void open_records(struct supervisor *s)
{
	if (record_open(s) < 0)
		step_failed(s, SECTION_SUPERVISE);
	record_pid(s);
	/* Whoever finds no such file may take it that nothing runs, as soon as the starter is dead. */
	if (is_gone(&s->clients[0]))
		launch_failed(s, SECTION_SUPERVISE, 0, ECANCELED, "the starter left");
	if (tell_child(s, GATE_EXEC) < 0 && errno != EPIPE && errno != ECONNRESET)
		step_failed(s, SECTION_SUPERVISE);
}

static void score(struct supervisor *s)
{
	char number[16];
	struct text t = text_in(number, sizeof(number));
	int fd;

	if (!(s->plan.flags & HOLD_OOM))
		return;
	text_add_num(&t, s->plan.oom_score_adj);
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	(void)!write(fd, number, t.len);
	close(fd);
}

/* Be a process in a new user namespace until stdin ends, for whoever writes its maps. */
static int hold_user_namespace(void)
{
	char byte;

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || unshare(CLONE_NEWUSER) < 0)
		return 1;
	if (write(STDOUT_FILENO, "r", 1) != 1)
		return 1;
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	return 0;
}

int main(int argc, char **argv)
{
	struct supervisor *s = &the;
	const char *problem = "its size";
	uint8_t *plan, attach = 0;
	bool waits, reaped = argc == 2 && !strcmp(argv[1], "--reaped");
	size_t len = 0;

	if (argc == 2 && !strcmp(argv[1], "--userns"))
		return hold_user_namespace();
	detach(reaped);
	waits = is_socket(FD_PLAN);
	set_up(s, waits ? FD_PLAN : FD_PLACED_STARTER, reaped);
	sys_close_range((waits ? FD_PLAN : FD_PLACED_SLOTS + MAX_SLOTS - 1) + 1, ~0U, 0);
	plan = load_plan(waits ? receive_plan(s, &attach) : placed_plan(s), &len);
	fcntl(s->clients[0].fd, F_SETFL, O_RDWR | O_NONBLOCK);
	if (!plan || !plan_read(&s->plan, plan, len, &problem))
		launch_failed(s, SECTION_PLAN, 0, EPROTO, problem);
	if (!s->plan.ends_in_exec)
		buffer_keep(1); /* for the rest of the plan */
	close_extra_slots(s);
	client_attach(s, &s->clients[0], attach);
	client_read(s, &s->clients[0]); /* an ATTACH sent ahead sees the first output */
	if (run_prepare(&s->launch) < 0)
		step_failed(s, SECTION_PREPARE);
	clone_and_report(s);
	s->launch.index = 0;
	open_records(s);
	free_operations(s, plan, len);
	score(s);
	supervise(s);
}
