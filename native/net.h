/* Links and netlink, as far as launcher and agent share them. */
#ifndef HUTCH_NET_H
#define HUTCH_NET_H

/* Set a link up; 0, or -1 with errno. `fd` is any socket of the Internet. */
int link_set_up(const char *name);
int link_set_up_by(int fd, const char *name);

/* The errno in the answer to a netlink message, 0 for success. */
int netlink_answer(int fd);

#endif
