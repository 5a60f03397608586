/* The low-bit operations in C, for one thread. */

#include "operations.h"

static int64_t in_parallel(int32_t threads, int64_t count, int64_t size, Part *part, const Work *work)
{
    (void)threads;
    (void)size;
    return part(work, 0, count);
}
