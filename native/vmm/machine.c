/* The life of the machine: one stage after the other, and how it ends. */
#include <sys/random.h>
#include <sys/wait.h>

#include "../text.h"
#include "vmm.h"

/* How long QEMU's end may be awaited after it has closed the agent's channel. */
enum { GONE_MS = 2000 };

enum { CALL_SHUTDOWN = 3 };

static void wait_at_most(struct vmm *v, uint32_t ms)
{
	v->deadline_ns = mono_ns() + ms * 1000000ull;
}

void say(const char *text)
{
	char line[MAX_TEXT + 64];
	struct text t = text_in(line, sizeof(line) - 1);

	text_add(&t, "hutch-vmm: ");
	text_add(&t, text);
	line[t.len] = '\n';
	(void)!write(2, line, t.len + 1);
}

/* On stderr it is among what the program said; whoever asks why the machine was lost finds it
 * at the end of QEMU's words. */
static void explain(struct vmm *v, const char *text)
{
	say(text);
	log_say(&v->logs[LOG_QEMU], text);
}

_Noreturn void machine_failed(struct vmm *v, enum part part, uint32_t section, uint32_t index,
			      int error, const char *text)
{
	uint8_t body[12 + MAX_TEXT];
	size_t len = strnlen(text, MAX_TEXT);

	if (error < 0 || error > 4095)
		error = EPROTO; /* the guest's number is no errno */
	qemu_kill(v); /* when the starter is told, nothing is left */
	put_u32(body, section);
	put_u32(body + 4, index);
	put_u32(body + 8, (uint32_t)error);
	memcpy(body + 12, text, len);
	status_send(v, STATUS_FAILED, (uint8_t)part, body, 12 + len);
	_exit(EXIT_LOST);
}

_Noreturn void machine_lost(struct vmm *v, enum part part, int error, const char *text)
{
	if (v->stage >= ST_SHUTDOWN) { /* the process has ended: only the tidying is cut short */
		qemu_kill(v);
		_exit(v->code);
	}
	if (!machine_is_up(v))
		machine_failed(v, part, 0, 0, error, text);
	qemu_kill(v);
	explain(v, text);
	_exit(EXIT_LOST);
}

bool machine_is_up(const struct vmm *v)
{
	return v->stage >= ST_RUN;
}

void machine_begin(struct vmm *v)
{
	v->stage = ST_HELD;
	wait_at_most(v, v->config.boot_ms);
	if (v->config.flags & CONFIG_HOLD)
		v->deadline_ns = 0; /* the starter is at work, and it knows how long */
	qemu_start(v);
	if (!(v->config.flags & CONFIG_HOLD))
		machine_greet(v);
}

void machine_greet(struct vmm *v)
{
	uint64_t nonce = 0;

	if (v->config.flags & CONFIG_CONSOLE) {
		console_begin(v);
		machine_started(v);
		return;
	}
	/* Without randomness the clock does: old answers in a template must not match. */
	if (getrandom(&nonce, sizeof(nonce), GRND_NONBLOCK) != sizeof(nonce))
		nonce = mono_ns();
	v->stage = ST_AGENT;
	wait_at_most(v, v->config.boot_ms);
	if ((v->config.flags & CONFIG_ADOPT) && !v->config.plan_len)
		mux_hello_again(&v->mux, nonce);
	else /* a launch that waits has said all it had to before the template was saved */
		mux_hello(&v->mux, nonce, v->config.flags & CONFIG_ADOPT);
}

void machine_set_up(struct vmm *v)
{
	status_send(v, STATUS_AGENT, 0, NULL, 0);
	v->stage = ST_SETUP;
	if (v->config.setup_len)
		call_setup(v);
	else
		machine_ready(v);
}

void machine_ready(struct vmm *v)
{
	status_send(v, STATUS_READY, 0, NULL, 0);
	if (v->config.plan_len || (v->config.flags & CONFIG_ADOPT)) {
		v->stage = ST_LAUNCH;
		if (v->config.flags & CONFIG_ADOPT)
			process_adopt(v);
		else
			process_start(v);
		return;
	}
	v->stage = ST_RUN; /* a template: it serves until it is told to end */
	v->deadline_ns = 0;
	config_free(&v->config);
}

void machine_started(struct vmm *v)
{
	uint8_t time[8];

	v->stage = ST_RUN;
	v->deadline_ns = 0;
	config_free(&v->config);
	if (config_has_control(&v->config))
		control_begin(v);
	put_u64(time, now_ns());
	status_send(v, STATUS_STARTED, 0, time, sizeof(time));
}

/* The ends. */

static void put_away(struct vmm *v, const struct call *call, uint32_t error)
{
	(void)call;
	(void)error;
	if (v->stage == ST_SHUTDOWN)
		machine_put_away(v);
}

static void terminate(struct vmm *v)
{
	v->stage = ST_TERMINATE;
	wait_at_most(v, v->config.shutdown_ms);
	qemu_signal(v, SIGTERM);
}

static void kill_qemu(struct vmm *v)
{
	v->stage = ST_KILL;
	v->deadline_ns = 0;
	qemu_signal(v, SIGKILL);
}

void machine_end(struct vmm *v, int code)
{
	static const uint8_t request[8] = { CALL_SHUTDOWN }; /* u32 op, u32 flags */
	uint8_t told[4];

	if (v->stage >= ST_SHUTDOWN)
		return;
	v->code = code;
	put_u32(told, (uint32_t)code);
	status_send(v, STATUS_EXIT, 0, told, sizeof(told));
	if (!v->qemu)
		_exit(code);
	if (v->config.flags & CONFIG_VOLATILE) {
		kill_qemu(v);
		return;
	}
	v->stage = ST_SHUTDOWN;
	wait_at_most(v, v->config.shutdown_ms);
	if (v->agent_gone)
		terminate(v);
	else
		call_start(v, &v->call, put_away, request, sizeof(request));
}

void machine_put_away(struct vmm *v)
{
	terminate(v);
}

static void describe_end(const struct vmm *v, struct text *t)
{
	if (WIFSIGNALED(v->qemu_status)) {
		text_add(t, "qemu was killed by signal ");
		text_add_num(t, WTERMSIG(v->qemu_status));
	} else {
		text_add(t, "qemu ended with status ");
		text_add_num(t, WEXITSTATUS(v->qemu_status));
	}
}

void machine_qemu_ended(struct vmm *v)
{
	char line[64];
	struct text t = text_in(line, sizeof(line));

	logs_read_rest(v);
	if (v->config.flags & CONFIG_CONSOLE)
		console_drain(v);
	else if (v->stage < ST_SHUTDOWN && !v->agent_gone)
		agent_read_rest(v); /* the process's exit may be among it */
	if (v->stage >= ST_SHUTDOWN)
		_exit(v->code);
	control_drain(v);
	if (v->config.flags & CONFIG_CONSOLE && v->stage == ST_RUN && v->control.quit)
		_exit(EXIT_SAVED);
	/* Nobody waits for a template's process: whoever quits its QEMU is done with it. */
	if (v->stage == ST_RUN && !v->process.started && v->qemu_status == 0)
		_exit(0);
	if (v->stage == ST_RUN && is_quiet(v) && v->qemu_status == 0)
		_exit(EXIT_SAVED);
	describe_end(v, &t);
	machine_lost(v, PART_QEMU, ECHILD, line);
}

void machine_agent_gone(struct vmm *v)
{
	v->agent_gone = true;
	if (v->stage == ST_SHUTDOWN)
		terminate(v);
	else if (v->stage < ST_SHUTDOWN)
		wait_at_most(v, GONE_MS); /* most likely QEMU is about to end: it says more */
}

/* What the guest asks of a share is never answered again, and what waits for it cannot be
 * killed: the machine is of no use. What it has on its disk is put away as at any end. */
void machine_shares_gone(struct vmm *v)
{
	static const char text[] = "the server of the shared directories (virtiofsd) has ended";

	v->shares_gone = true;
	if (v->stage >= ST_SHUTDOWN)
		return;
	if (!machine_is_up(v))
		machine_failed(v, PART_QEMU, 0, 0, EPIPE, text);
	explain(v, text);
	machine_end(v, EXIT_LOST);
}

void machine_timeout(struct vmm *v)
{
	static const char *const late[] = {
		[ST_AGENT] = "the agent does not answer", [ST_SETUP] = "the setup takes too long",
		[ST_LAUNCH] = "the launch takes too long",
	};

	if (v->stage == ST_SHUTDOWN)
		terminate(v);
	else if (v->stage >= ST_TERMINATE)
		kill_qemu(v);
	else if (v->agent_gone)
		machine_lost(v, PART_QEMU, EPIPE, "qemu closed the agent's channel");
	else if (v->stage >= ST_AGENT && v->stage <= ST_LAUNCH)
		machine_failed(v, v->stage == ST_SETUP ? PART_SETUP : PART_AGENT, 0, 0, ETIMEDOUT,
			       late[v->stage]);
}
