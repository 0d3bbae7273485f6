/* What the programs that serve beside the instances share: less rights, no terminal. */
#ifndef HUTCH_BACKGROUND_H
#define HUTCH_BACKGROUND_H

#include <sys/resource.h>

/* Become nobody with no capability, at most `files` descriptors and no core; -1 on failure. */
int drop_privileges(rlim_t files);

/* Leave the session and the standard streams; -1 on failure. */
int enter_background(void);

/* Go on as a child in a session of its own, with nothing on the standard streams; -1 on
 * failure. The process that was started ends with 0. */
int go_to_background(void);

#endif
