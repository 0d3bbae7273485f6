/* DNS messages: reading a query, writing an answer (RFC 1035); see packet.c. */
#ifndef HUTCH_DNS_PACKET_H
#define HUTCH_DNS_PACKET_H

#include "names.h"

#define HEADER_SIZE 12
#define QUESTION_MAX (255 + 4)

enum { TYPE_A = 1, TYPE_PTR = 12, TYPE_AAAA = 28, TYPE_ANY = 255 };
enum { RCODE_OK = 0, RCODE_FORMAT = 1, RCODE_FAILED = 2, RCODE_NO_NAME = 3, RCODE_UNKNOWN = 4 };

/* A query with its one question: `name` in lower case without the last dot. */
struct question {
	const uint8_t *wire;
	size_t wire_length;
	char name[NAME_MAX_LENGTH + 1];
	uint16_t type, class;
};

enum verdict { VERDICT_DROP, VERDICT_REPLY, VERDICT_FORWARD };

int packet_question(const uint8_t *packet, size_t length, struct question *out);
enum verdict packet_answer(const struct names *names, const struct address *source,
			   const uint8_t *query, size_t length, uint8_t *out, size_t room,
			   size_t *out_length);
size_t packet_error(const uint8_t *query, size_t length, unsigned rcode, uint8_t *out, size_t room);
int packet_is_reply(const uint8_t *query, size_t query_length, const uint8_t *reply,
		    size_t reply_length);

#endif
