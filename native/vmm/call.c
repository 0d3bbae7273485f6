/* Our own calls to the agent: SETUP before the start, SHUTDOWN at the end, what quiet.c asks. */
#include "vmm.h"

void call_start(struct vmm *v, struct call *call, call_done *done, const uint8_t *request,
		size_t n)
{
	*call = (struct call){ .owner = OWNER_CALL, .done = done, .request = request, .left = n };
	call->ch = mux_open(&v->mux, MUX_CALL);
	if (!call->ch) {
		call_over(v, call, (uint32_t)errno);
		return;
	}
	call->ch->owner = call;
	call_pump(v, call);
}

void call_pump(struct vmm *v, struct call *call)
{
	size_t sent;

	if (!call->ch || !call->request)
		return;
	sent = mux_send(&v->mux, call->ch, call->request, call->left);
	call->request += sent;
	call->left -= sent;
	if (call->left)
		return;
	call->request = NULL;
	mux_eof(&v->mux, call->ch);
}

size_t call_data(struct call *call, const uint8_t *data, size_t n)
{
	size_t room = sizeof(call->answer) - call->answer_len;

	if (room > n)
		room = n;
	memcpy(call->answer + call->answer_len, data, room);
	call->answer_len += room;
	return n;
}

void call_over(struct vmm *v, struct call *call, uint32_t error)
{
	call->ch = NULL;
	call->request = NULL;
	call->done(v, call, error);
}

static void setup_answered(struct vmm *v, const struct call *call, uint32_t error)
{
	struct reader r = { .at = call->answer, .end = call->answer + call->answer_len };
	uint32_t failed = read_u32(&r), index = read_u32(&r), len = read_u32(&r);
	char text[MAX_TEXT];

	if (r.bad)
		machine_failed(v, PART_SETUP, 0, 0, error ? (int)error : EPROTO,
			       "the agent did not answer");
	if (!failed) {
		machine_ready(v);
		return;
	}
	if (len > (size_t)(r.end - r.at))
		len = (uint32_t)(r.end - r.at);
	if (len > sizeof(text) - 1)
		len = sizeof(text) - 1;
	memcpy(text, r.at, len);
	text[len] = 0;
	machine_failed(v, PART_SETUP, 0, index, (int)failed, text);
}

void call_setup(struct vmm *v)
{
	call_start(v, &v->call, setup_answered, v->config.setup, v->config.setup_len);
}
