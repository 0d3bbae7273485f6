/* Let CRIU bring back a process tree in the place of the program, as the supervisor's child. */
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "launch.h"
#include "text.h"

/* CRIU's worker talks at descriptor 3 (criu swrk 3). What the tree inherits it finds as its
 * stdin, stdout, stderr and its network namespace; the directory for its log is one of ours,
 * which it reaches through /proc. */
enum { FD_TALK = 3, FD_STREAMS = 10, FD_NETWORK = 13, FD_WORK = 200 };

/* CRIU's protocol, images/rpc.proto: requests and responses are protobuf messages. */
enum { REQ_RESTORE = 2, REQ_NOTIFY = 6 };
enum { RESP_TYPE = 1, RESP_SUCCESS = 2, RESP_RESTORE = 4, RESP_NOTIFY = 5 };
enum { RESTORE_PID = 1, NOTIFY_SCRIPT = 1 };

/* The step at which all is restored and nothing runs yet. */
static const char last_step[] = "pre-resume";

struct response {
	uint64_t type, success, pid;
	bool is_last_step;
};

/* Put a mount on a path of the host, which is there, in this process's mount namespace. */
int op_attach(struct launch *l, struct reader *r)
{
	int mount = slot_get(l, read_i32(r)), target, result, error;

	l->what = read_str(r);
	if (mount < 0)
		return -1;
	target = open(l->what, O_PATH | O_CLOEXEC | O_NOFOLLOW);
	if (target < 0)
		return -1;
	result = sys_move_mount(mount, target);
	error = errno;
	close(target);
	return result < 0 ? fail(error) : 0;
}

/* Away from the places that are about to be taken. */
static int out_of_the_way(int fd)
{
	return fcntl(fd, F_DUPFD, FD_WORK + 1);
}

static _Noreturn void become_criu(char **argv, char **env, int talk)
{
	int null = out_of_the_way(open("/dev/null", O_RDWR));
	int network = out_of_the_way(open("/proc/self/ns/net", O_RDONLY));

	talk = out_of_the_way(talk);

	for (int fd = 0; fd < 3; fd++)
		if (dup2(fd, FD_STREAMS + fd) < 0)
			_exit(126);
	if (null < 0 || dup2(network, FD_NETWORK) < 0 || dup2(talk, FD_TALK) < 0)
		_exit(126);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	sys_close_range(FD_NETWORK + 1, ~0U, 0);
	sys_close_range(FD_TALK + 1, FD_STREAMS - 1, 0);
	execve(argv[0], argv, env);
	_exit(127);
}

static uint64_t varint(struct reader *r)
{
	uint64_t value = 0;

	for (int shift = 0; shift < 64; shift += 7) {
		if (r->at >= r->end)
			break;
		value |= (uint64_t)(*r->at & 0x7f) << shift;
		if (!(*r->at++ & 0x80))
			return value;
	}
	r->bad = true;
	return 0;
}

/* Take the next field: its number, its value, and what is in one that has a length. */
static bool next_field(struct reader *r, uint64_t *number, uint64_t *value, struct reader *body)
{
	uint64_t key = r->at < r->end ? varint(r) : 0;

	*number = key >> 3;
	*body = (struct reader){ .at = r->at, .end = r->at, .bad = false };
	if (!key || ((key & 7) != 0 && (key & 7) != 2))
		return false;
	*value = varint(r);
	if (r->bad)
		return false;
	if ((key & 7) == 2) {
		if (*value > (uint64_t)(r->end - r->at))
			return false;
		*body = (struct reader){ .at = r->at, .end = r->at + *value, .bad = false };
		r->at += *value;
	}
	return true;
}

static struct response read_response(const uint8_t *data, size_t len)
{
	struct reader r = { .at = data, .end = data + len, .bad = false }, body, none;
	struct response out = { 0 };
	uint64_t number, value;

	while (next_field(&r, &number, &value, &body)) {
		if (number == RESP_TYPE)
			out.type = value;
		else if (number == RESP_SUCCESS)
			out.success = value;
		else if (number == RESP_RESTORE && next_field(&body, &number, &value, &none) &&
			 number == RESTORE_PID)
			out.pid = value;
		else if (number == RESP_NOTIFY && next_field(&body, &number, &value, &none) &&
			 number == NOTIFY_SCRIPT)
			out.is_last_step = none.end - none.at == sizeof(last_step) - 1 &&
					   !memcmp(none.at, last_step, sizeof(last_step) - 1);
	}
	return out;
}

/* Receive a response; a terminal's master that comes with it goes to the supervisor. */
static int receive(struct launch *l, int talk, struct response *out)
{
	static uint8_t data[16 << 10];
	struct iovec iov = { .iov_base = data, .iov_len = sizeof(data) };
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *cmsg;
	ssize_t n;
	int fd;

	do
		n = recvmsg(talk, &msg, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		return n < 0 ? -1 : fail(ECHILD);
	*out = read_response(data, (size_t)n);
	cmsg = CMSG_FIRSTHDR(&msg);
	if (!cmsg || cmsg->cmsg_type != SCM_RIGHTS)
		return 0;
	memcpy(&fd, CMSG_DATA(cmsg), sizeof(fd));
	n = pass_master(l, fd);
	close(fd);
	return (int)n;
}

/* Ask for the restore and agree to every step of it; return the first process's number. */
static int converse(struct launch *l, int talk, const uint8_t *request, uint32_t len,
		    int32_t hold)
{
	static const uint8_t agreed[] = { 1 << 3, REQ_NOTIFY, 3 << 3, true };
	struct response response = { 0 };

	if (send(talk, request, len, MSG_NOSIGNAL) != (ssize_t)len)
		return -1;
	for (;;) {
		if (receive(l, talk, &response) < 0)
			return -1;
		if (response.type != REQ_NOTIFY)
			break;
		if (response.is_last_step && hold >= 0) {
			send_report(l, REPORT_SYNC, 0, hold);
			wait_gate(l, GATE_GO);
		}
		if (send(talk, agreed, sizeof(agreed), MSG_NOSIGNAL) < 0)
			return -1;
	}
	if (response.type != REQ_RESTORE || !response.success || !response.pid ||
	    response.pid > INT32_MAX)
		return fail(ECHILD);
	return (int)response.pid;
}

static void wait_end(pid_t pid)
{
	struct pollfd p = { .fd = sys_pidfd_open(pid), .events = POLLIN };

	if (p.fd < 0)
		return;
	while (poll(&p, 1, -1) < 0 && errno == EINTR)
		;
	close(p.fd);
}

/* Start CRIU beside this process, not under it: what it makes is to be the supervisor's child. */
static int start_criu(struct launch *l, char **argv, char **env, const char *work, int *talk)
{
	struct clone3_args args = { .flags = CLONE_PARENT };
	int ends[2], pid, fd = open(work, O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0 || dup3(fd, FD_WORK, O_CLOEXEC) < 0 ||
	    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		return -1;
	pid = sys_clone3(&args);
	if (pid == 0) {
		die_with_parent(l);
		become_criu(argv, env, ends[1]);
	}
	close(ends[1]);
	*talk = ends[0];
	return pid;
}

int op_restore(struct launch *l, struct reader *r)
{
	char **argv = string_list(r), **env = string_list(r);
	const char *work = read_str(r);
	uint32_t len;
	const uint8_t *request = read_bytes(r, &len);
	int32_t hold = read_i32(r);
	int talk, criu, pid, error;

	if (!argv || !env || !argv[0])
		return fail(EINVAL);
	l->what = argv[0];
	wait_gate(l, GATE_EXEC);
	criu = start_criu(l, argv, env, work, &talk);
	if (criu < 0 || !send_report(l, REPORT_AIDE, 0, criu))
		return -1;
	pid = converse(l, talk, request, len, hold);
	error = errno;
	close(talk);
	if (pid < 0)
		return fail(error);
	wait_end(criu);
	l->section = SECTION_EXEC;
	send_report(l, REPORT_FORKED, 0, pid);
	_exit(send_report(l, REPORT_EXEC, 0, 0) ? 0 : 125);
}
