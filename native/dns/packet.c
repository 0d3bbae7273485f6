/*
 * Read queries and write answers. Every length is checked against the packet before the
 * bytes are touched; compressed names in a question are refused, so nothing loops.
 */
#include "packet.h"

#include <stdio.h>
#include <string.h>

#define ANSWERS_MAX 64
#define TTL_S 5

static unsigned get16(const uint8_t *at)
{
	return (unsigned)at[0] << 8 | at[1];
}

static void put16(uint8_t *at, unsigned value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static char lower(uint8_t byte)
{
	return (char)(byte >= 'A' && byte <= 'Z' ? byte + 32 : byte);
}

/* Read a name of plain labels at `at`; return the offset behind it, 0 if it is not one. */
static size_t read_name(const uint8_t *packet, size_t length, size_t at, char *name)
{
	size_t used = 0;
	for (;;) {
		if (at >= length)
			return 0;
		size_t label = packet[at++];
		if (label == 0)
			break;
		if (label > 63 || label > length - at || used + label + 1 > NAME_MAX_LENGTH + 1)
			return 0;
		if (used)
			name[used - 1] = '.';
		for (size_t i = 0; i < label; i++) {
			/* A dot or a zero inside a label would read as another name. */
			if (packet[at + i] == '.' || packet[at + i] == 0)
				return 0;
			name[used + i] = lower(packet[at + i]);
		}
		used += label + 1;
		at += label;
	}
	name[used ? used - 1 : 0] = 0;
	return at;
}

/* Read the question of a message with exactly one; return whether there is one. */
int packet_question(const uint8_t *packet, size_t length, struct question *out)
{
	if (length < HEADER_SIZE || get16(packet + 4) != 1)
		return 0;
	size_t end = read_name(packet, length, HEADER_SIZE, out->name);
	if (end == 0 || length - end < 4)
		return 0;
	out->wire = packet + HEADER_SIZE;
	out->wire_length = end + 4 - HEADER_SIZE;
	out->type = (uint16_t)get16(packet + end);
	out->class = (uint16_t)get16(packet + end + 2);
	return 1;
}

/* Write the header of an answer, echoing the question; return the length so far, or 0. */
static size_t start(const uint8_t *query, const struct question *question, unsigned rcode,
		    uint8_t *out, size_t room)
{
	size_t length = HEADER_SIZE + (question ? question->wire_length : 0);
	if (length > room)
		return 0;
	memset(out, 0, HEADER_SIZE);
	memcpy(out, query, 2);
	out[2] = (uint8_t)(0x84 | (query[2] & 0x79)); /* QR, AA, the query's opcode and RD */
	out[3] = (uint8_t)(0x80 | rcode);	      /* RA */
	put16(out + 4, question ? 1 : 0);
	if (question)
		memcpy(out + HEADER_SIZE, question->wire, question->wire_length);
	return length;
}

/* Write an answer without records. */
size_t packet_error(const uint8_t *query, size_t length, unsigned rcode, uint8_t *out, size_t room)
{
	struct question question;
	if (length < HEADER_SIZE)
		return 0;
	int has_question = packet_question(query, length, &question);
	size_t used = start(query, has_question ? &question : NULL, rcode, out, room);
	if (used && rcode != RCODE_NO_NAME)
		out[2] &= (uint8_t)~0x04; /* not authoritative */
	return used;
}

/* Append one record about the question's name; return the new length, 0 if it is too long. */
static size_t append(uint8_t *out, size_t used, size_t room, unsigned type, const uint8_t *data,
		     size_t size)
{
	if (room - used < 12 + size)
		return 0;
	uint8_t *at = out + used;
	put16(at, 0xc000 | HEADER_SIZE);
	put16(at + 2, type);
	put16(at + 4, 1);
	put16(at + 6, 0);
	put16(at + 8, TTL_S);
	put16(at + 10, (unsigned)size);
	memcpy(at + 12, data, size);
	put16(out + 6, get16(out + 6) + 1);
	return used + 12 + size;
}

static size_t write_addresses(const struct question *question, const struct address *found,
			      size_t count, uint8_t *out, size_t used, size_t room)
{
	static unsigned turn; /* takes turns between instances that share an alias */
	turn++;
	for (size_t i = 0; i < count; i++) {
		const struct address *address = &found[(i + turn) % count];
		unsigned type = address->family == 4 ? TYPE_A : TYPE_AAAA;
		if (question->type != type && question->type != TYPE_ANY)
			continue;
		size_t longer = append(out, used, room, type, address->bytes,
				       address->family == 4 ? 4 : 16);
		if (!longer) {
			out[2] |= 0x02; /* TC: the rest by TCP */
			break;
		}
		used = longer;
	}
	return used;
}

static int hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Read d.c.b.a.in-addr.arpa or 32 nibbles and .ip6.arpa. */
static int reverse_address(const char *name, struct address *out)
{
	unsigned a, b, c, d;
	int end = 0;
	memset(out, 0, sizeof *out);
	size_t length = strlen(name);
	if (length > 13 && strcmp(name + length - 13, ".in-addr.arpa") == 0) {
		if (sscanf(name, "%3u.%3u.%3u.%3u.in-addr.arpa%n", &a, &b, &c, &d, &end) != 4 ||
		    (size_t)end != length || a > 255 || b > 255 || c > 255 || d > 255)
			return 0;
		out->family = 4;
		out->bytes[0] = (uint8_t)d;
		out->bytes[1] = (uint8_t)c;
		out->bytes[2] = (uint8_t)b;
		out->bytes[3] = (uint8_t)a;
		return 1;
	}
	if (length != 72 || strcmp(name + 63, ".ip6.arpa") != 0)
		return 0;
	for (size_t i = 0; i < 32; i++) {
		int digit = hex_digit(name[i * 2]);
		if (digit < 0 || name[i * 2 + 1] != '.')
			return 0;
		out->bytes[15 - i / 2] |= (uint8_t)(i % 2 ? digit << 4 : digit);
	}
	out->family = 6;
	return 1;
}

static size_t encode_name(const char *name, uint8_t *out)
{
	size_t used = 0;
	while (*name) {
		size_t label = strcspn(name, ".");
		if (label == 0 || label > 63)
			return 0;
		out[used++] = (uint8_t)label;
		memcpy(out + used, name, label);
		used += label;
		name += label + (name[label] == '.');
	}
	out[used++] = 0;
	return used;
}

/* Answer from `names` what they know; VERDICT_FORWARD leaves `out` alone. */
enum verdict packet_answer(const struct names *names, const struct address *source,
			   const uint8_t *query, size_t length, uint8_t *out, size_t room,
			   size_t *out_length)
{
	struct question question;
	struct address found[ANSWERS_MAX], reverse;
	size_t count = 0;
	if (length < HEADER_SIZE || query[2] & 0x80)
		return VERDICT_DROP;
	if ((query[2] & 0x78) || !packet_question(query, length, &question)) {
		unsigned rcode = query[2] & 0x78 ? RCODE_UNKNOWN : RCODE_FORMAT;
		*out_length = packet_error(query, length, rcode, out, room);
		return *out_length ? VERDICT_REPLY : VERDICT_DROP;
	}
	size_t scope = names_scope(names, source);
	size_t used = start(query, &question, RCODE_OK, out, room);
	int inet = question.class == 1 || question.class == 255;
	if (used && inet && names_find(names, scope, question.name, found, ANSWERS_MAX, &count)) {
		*out_length = write_addresses(&question, found, count, out, used, room);
		return VERDICT_REPLY;
	}
	if (used && inet && question.type == TYPE_PTR && reverse_address(question.name, &reverse)) {
		const char *name = names_reverse(names, scope, &reverse);
		uint8_t encoded[NAME_MAX_LENGTH + 2];
		size_t size = name ? encode_name(name, encoded) : 0;
		if (size && (*out_length = append(out, used, room, TYPE_PTR, encoded, size)))
			return VERDICT_REPLY;
	}
	if (names_scope_at(names, scope)->forward)
		return VERDICT_FORWARD;
	*out_length = packet_error(query, length, RCODE_NO_NAME, out, room);
	return *out_length ? VERDICT_REPLY : VERDICT_DROP;
}

/* Tell whether `reply` answers `query`: same id, a response, the same question. */
int packet_is_reply(const uint8_t *query, size_t query_length, const uint8_t *reply,
		    size_t reply_length)
{
	struct question asked, answered;
	if (reply_length < HEADER_SIZE || memcmp(query, reply, 2) != 0 || !(reply[2] & 0x80))
		return 0;
	if (!packet_question(query, query_length, &asked))
		return 0;
	if (get16(reply + 4) == 0) /* some servers send errors without the question */
		return reply[3] & 0x0f;
	return packet_question(reply, reply_length, &answered) && asked.type == answered.type &&
	       asked.class == answered.class && strcmp(asked.name, answered.name) == 0;
}
