/* The main link standing still, for whoever saves the machine's state: nothing is in flight
 * between the process and us, and input and signals wait. It lasts as long as its client is
 * connected, so a client that is killed leaves a machine that goes on. */
#include <sys/socket.h>

#include <poll.h>

#include "vmm.h"

enum { CALL_QUIESCE = 8, CALL_RESUME = 9, ANSWER = 8, DISMISSED = 1 };

/* To a monitor in whatever state its killed client left it: an impossible byte ends what was
 * half said, a migration under way ends, the machine runs. */
static const char rescue[] = "\xff\n{\"execute\":\"migrate_cancel\"}\n"
			     "{\"execute\":\"cont\",\"id\":\"go-on\"}\n";
static const char rescued[] = "go-on";

bool is_quiet(const struct vmm *v)
{
	return v->quiet.client != NULL;
}

/* The answer: u32 errno, u32 input that the process has been given and did not take. */
static void tell(struct vmm *v, uint32_t error)
{
	uint8_t answer[ANSWER];

	put_u32(answer, error);
	put_u32(answer + 4, v->process.unacked);
	(void)!send(v->quiet.client->fd, answer, sizeof(answer), MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void asked(struct vmm *v, const struct call *call, uint32_t error)
{
	struct reader r = { .at = call->answer, .end = call->answer + call->answer_len };
	uint32_t failed = read_u32(&r);

	if (!is_quiet(v))
		return; /* it went meanwhile: RESUME is on its way */
	if (r.bad)
		failed = error ? error : EPROTO;
	if (failed)
		tell(v, failed);
	else
		v->quiet.draining = true;
}

static void answered(struct vmm *v, const struct call *call, uint32_t error)
{
	(void)v;
	(void)call;
	(void)error;
}

static void ask(struct vmm *v)
{
	static const uint8_t request[4] = { CALL_QUIESCE };

	call_start(v, &v->quiet.asking, asked, request, sizeof(request));
}

static bool refuse(struct vmm_client *c, uint32_t error)
{
	uint8_t answer[ANSWER] = { 0 };

	put_u32(answer, error);
	(void)!send(c->fd, answer, sizeof(answer), MSG_NOSIGNAL | MSG_DONTWAIT);
	return false;
}

bool quiet_begin(struct vmm *v, struct vmm_client *c)
{
	if (is_quiet(v))
		return refuse(c, EBUSY);
	if (!v->process.started || !v->process.ch)
		return refuse(c, ESRCH);
	v->quiet.client = c;
	v->quiet.draining = false;
	v->quiet.monitor = c->passed ? c->passed : -1;
	c->passed = 0;
	ask(v);
	return true;
}

/* All that the process said before has reached our own stdout and stderr. */
void quiet_turn(struct vmm *v)
{
	const struct process *p = &v->process;

	if (!v->quiet.draining || !p->ch || p->ch->in.len || p->head_len)
		return;
	v->quiet.draining = false;
	tell(v, 0);
}

static void forget_monitor(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void abandon(struct vmm *v, struct call *call)
{
	if (call->ch)
		mux_close(&v->mux, call->ch, 0);
	call->ch = NULL;
}

static void go_on(struct vmm *v)
{
	static const uint8_t request[4] = { CALL_RESUME };

	v->quiet.client = NULL;
	v->quiet.draining = false;
	if (v->stage != ST_RUN || v->agent_gone)
		return;
	/* What was asked before is carried out before it; the answers do not matter. */
	abandon(v, &v->quiet.asking);
	abandon(v, &v->quiet.resuming);
	call_start(v, &v->quiet.resuming, answered, request, sizeof(request));
}

void quiet_end(struct vmm *v, bool dismissed)
{
	int monitor = v->quiet.monitor;

	v->quiet.monitor = -1;
	if (monitor >= 0 && !dismissed) {
		(void)!send(monitor, rescue, sizeof(rescue) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		forget_monitor(&v->rescue);
		v->rescue = monitor; /* open until it has obeyed */
		v->rescue_seen = 0;
		monitor = -1;
	}
	forget_monitor(&monitor);
	go_on(v);
}

bool quiet_client(struct vmm *v, struct vmm_client *c)
{
	uint8_t byte = 0;
	ssize_t n = recv(c->fd, &byte, 1, MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	quiet_end(v, n == 1 && byte == DISMISSED);
	return false;
}

void rescue_read(struct vmm *v)
{
	char bytes[512];
	ssize_t n = recv(v->rescue, bytes, sizeof(bytes), MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	for (ssize_t i = 0; i < n && v->rescue_seen < sizeof(rescued) - 1; i++)
		if (bytes[i] == rescued[v->rescue_seen])
			v->rescue_seen++;
		else
			v->rescue_seen = bytes[i] == rescued[0];
	if (n <= 0 || v->rescue_seen == sizeof(rescued) - 1)
		forget_monitor(&v->rescue);
}
