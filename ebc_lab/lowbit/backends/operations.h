/* The operations of both compiled backends. Each does a part of its blocks, groups or values; `in_parallel` of
   the file that includes this one takes the parts: one for all in kernels.c, one a thread in kernels.cpp.

   - A part's outcome is an integer, and the least of them is the operation's: the bits depend neither on the
     number of threads nor on the order in which they end.
   - Beyond input and output an operation takes 8 bytes per 4096 values of the largest group, for each thread.
   - Valid C11 and C++17, with GNU's designated initialisers. */
#ifndef EBC_LAB_OPERATIONS_H
#define EBC_LAB_OPERATIONS_H

#include <stdlib.h>

#include "blocks.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What an operation reads and writes; an output that is not asked for is NULL. */
typedef struct {
    const float *x;
    const int8_t *codes;
    const uint8_t *bytes;
    const float *steps;
    float *new_steps;
    int8_t *new_codes;
    uint8_t *new_bytes;
    float *values;
    double *sums;              /* a double for each block of x */
    int64_t n, columns, group; /* of all values, of a row, of neighbours in a group */
    int top, scale;
    float step;
    uint32_t key;
    int32_t threads; /* within a group */
    const struct ebc_km_problem *problem;
} Work;

typedef int64_t Part(const Work *work, int64_t first, int64_t last);

static const int64_t FINE = INT64_MAX; /* the outcome of a part that has nothing to tell */

/* Does the parts of [0, count), which are of `size` values together, and returns the least outcome. */
static int64_t in_parallel(int32_t threads, int64_t count, int64_t size, Part *part, const Work *work);

#include "kmeans.h"

INLINE int64_t ceiling(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* -- quantizing ------------------------------------------------------------------------------------------ */

static int64_t sums_of_blocks(const Work *work, int64_t first, int64_t last)
{
    for (int64_t b = first; b < last; b++) {
        const float *block = work->x + b * MEAN_BLOCK;
        int64_t length = least(MEAN_BLOCK, work->n - b * MEAN_BLOCK);
        uint32_t most = largest(block, length);
        if (most >= INFINITE) return NOT_FINITE;
        prefetch(work->x, (b + 1) * MEAN_BLOCK, work->n);
        work->sums[b] = block_sum(block, length, most);
    }
    return FINE;
}

/* The bits of the largest magnitude, negated. */
static int64_t negated_largest(const Work *work, int64_t first, int64_t last)
{
    return -(int64_t)largest(work->x + first, last - first);
}

/* Codes and values of one group. A step that was given was found on nothing, so here it shows whether all is
   finite. */
static int64_t codes_and_values(const Work *work, int64_t first, int64_t last)
{
    for (int64_t start = first; start < last; start += MEAN_BLOCK) {
        const float *x = work->x + start;
        int64_t length = least(MEAN_BLOCK, last - start);
        if (work->scale == GIVEN) {
            if (largest(x, length) >= INFINITE) return NOT_FINITE;
            prefetch(work->x, start + length, work->n);
        }
        if (work->new_codes != NULL) codes_of(x, length, work->step, work->top, work->new_codes + start);
        if (work->values != NULL) values_of(x, length, work->step, work->top, work->values + start);
    }
    return FINE;
}

static int64_t quantize_group(Work group)
{
    int64_t outcome = FINE;
    if (group.scale == ABSMEAN) {
        int64_t blocks = ceiling(group.n, MEAN_BLOCK);
        outcome = in_parallel(group.threads, blocks, group.n, sums_of_blocks, &group);
        if (outcome == FINE) *group.new_steps = (float)(halved(group.sums, blocks) / (double)group.n);
    }
    if (group.scale == ABSMAX) {
        uint32_t most = (uint32_t)-in_parallel(group.threads, group.n, group.n, negated_largest, &group);
        outcome = most >= INFINITE ? NOT_FINITE : FINE;
        *group.new_steps = float_of(most) / (float)group.top;
    }
    group.step = *group.new_steps;
    if (outcome == FINE) outcome = in_parallel(group.threads, group.n, group.n, codes_and_values, &group);
    if (outcome == FINE || group.new_codes != NULL) return outcome;
    *group.new_steps = NAN;
    for (int64_t i = 0; i < group.n && group.values != NULL; i++) group.values[i] = NAN;
    return FINE;
}

static int64_t quantize_groups(const Work *work, int64_t first, int64_t last)
{
    int64_t in_row = ceiling(work->columns, work->group);
    double *sums = (double *)malloc((size_t)(work->group / MEAN_BLOCK + 1) * sizeof *sums);
    if (sums == NULL) return NO_MEMORY;
    int64_t outcome = FINE;
    for (int64_t g = first; g < last && outcome == FINE; g++) {
        int64_t column = g % in_row * work->group;
        int64_t start = g / in_row * work->columns + column;
        Work group = *work;
        group.x += start;
        group.n = least(work->group, work->columns - column);
        group.sums = sums;
        group.new_steps += g;
        if (group.new_codes != NULL) group.new_codes += start;
        if (group.values != NULL) group.values += start;
        outcome = quantize_group(group);
    }
    free(sums);
    return outcome;
}

/* -- the other operations -------------------------------------------------------------------------------- */

static int64_t decode_part(const Work *work, int64_t first, int64_t last)
{
    decoded_span(work->codes + first, first, last - first, work->columns, work->group, work->steps,
                 work->values + first);
    return FINE;
}

static int64_t stochastic_blocks(const Work *work, int64_t first, int64_t last)
{
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * MEAN_BLOCK;
        int64_t length = least(MEAN_BLOCK, work->n - start);
        if (largest(work->x + start, length) >= INFINITE) return NOT_FINITE;
        drawn(work->x + start, start, length, work->top, work->step, work->key, work->new_codes + start);
    }
    return FINE;
}

/* The outcome is the index of the first code beyond `top`. */
static int64_t pack_blocks(const Work *work, int64_t first, int64_t last)
{
    int64_t block = planes_of(work->top) * WIDTH;
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * block;
        int64_t end = least(work->n, start + block);
        uint8_t *bytes = work->new_bytes + b * bytes_of(work->top) * WIDTH;
        if (pack_block(work->codes + start, end - start, work->top, bytes) <= 2 * work->top) continue;
        for (int64_t i = start; i < end; i++)
            if (work->codes[i] > work->top || work->codes[i] < -work->top) return i;
    }
    return FINE;
}

/* Gives codes, or straight their values. The outcome is the index of the first byte that holds no codes. */
static int64_t unpack_blocks(const Work *work, int64_t first, int64_t last)
{
    int64_t block = planes_of(work->top) * WIDTH;
    int8_t room[MOST_CODES];
    for (int64_t b = first; b < last; b++) {
        int64_t start = b * block;
        int64_t count = least(block, work->n - start);
        int8_t *to = work->new_codes != NULL && count == block ? work->new_codes + start : room;
        if (!unpack_block(work->bytes, start, work->n, work->top, to))
            return no_code(work->bytes, start, work->n, work->top);
        if (work->values != NULL)
            decoded_span(room, start, count, work->columns, work->group, work->steps, work->values + start);
        else if (to == room)
            memcpy(work->new_codes + start, room, (size_t)count);
    }
    return FINE;
}

/* -- what Python calls ----------------------------------------------------------------------------------- */

/* Steps, then codes or values where there is room for them (not NULL). What is not finite has no codes; where
   none are asked for, the step and the values of its group are NaN. Returns DONE, NOT_FINITE or NO_MEMORY. */
int64_t ebc_quantize(const float *x, int64_t rows, int64_t columns, int64_t group, int32_t top, int32_t scale,
                     float *steps, int8_t *codes, float *values, int32_t threads)
{
    if (rows * columns == 0) return DONE;
    group = least(group, columns);
    int64_t groups = rows * ceiling(columns, group);
    Work work = {.x = x, .new_steps = steps, .new_codes = codes, .values = values, .columns = columns,
                 .group = group, .top = top, .scale = scale, .threads = groups > 1 ? 1 : threads};
    int64_t outcome = in_parallel(groups > 1 ? threads : 1, groups, rows * columns, quantize_groups, &work);
    return outcome == FINE ? DONE : outcome;
}

void ebc_decode(const int8_t *codes, int64_t rows, int64_t columns, int64_t group, const float *steps,
                float *values, int32_t threads)
{
    int64_t n = rows * columns;
    Work work = {.codes = codes, .steps = steps, .values = values, .columns = columns,
                 .group = least(group, columns)};
    if (n > 0) in_parallel(threads, n, n, decode_part, &work);
}

/* Codes of one positive step, by the uniforms of `key`. Returns DONE or NOT_FINITE. */
int64_t ebc_stochastic(const float *x, int64_t n, int32_t top, float step, uint32_t key, int8_t *codes,
                       int32_t threads)
{
    Work work = {.x = x, .new_codes = codes, .n = n, .top = top, .step = step, .key = key};
    int64_t outcome = in_parallel(threads, ceiling(n, MEAN_BLOCK), n, stochastic_blocks, &work);
    return outcome == FINE ? DONE : outcome;
}

/* Packs n codes. Returns -1, or the index of the first code beyond `top`. */
int64_t ebc_pack(const int8_t *codes, int64_t n, int32_t top, uint8_t *bytes, int32_t threads)
{
    Work work = {.codes = codes, .new_bytes = bytes, .n = n, .top = top};
    int64_t wrong = in_parallel(threads, ceiling(n, planes_of(top) * WIDTH), n, pack_blocks, &work);
    return wrong == FINE ? -1 : wrong;
}

static int64_t unpack(int32_t threads, const Work *work)
{
    int64_t blocks = ceiling(work->n, planes_of(work->top) * WIDTH);
    int64_t wrong = in_parallel(threads, blocks, work->n, unpack_blocks, work);
    return wrong == FINE ? -1 : wrong;
}

/* Unpacks n codes. Returns -1, or the index of the first byte that holds no codes. */
int64_t ebc_unpack(const uint8_t *bytes, int64_t n, int32_t top, int8_t *codes, int32_t threads)
{
    Work work = {.bytes = bytes, .new_codes = codes, .n = n, .top = top};
    return unpack(threads, &work);
}

/* Unpacks straight to the values of a matrix. Returns as ebc_unpack. */
int64_t ebc_unpack_values(const uint8_t *bytes, int64_t rows, int64_t columns, int64_t group, int32_t top,
                          const float *steps, float *values, int32_t threads)
{
    Work work = {.bytes = bytes, .steps = steps, .values = values, .n = rows * columns, .columns = columns,
                 .group = least(group, columns), .top = top};
    return unpack(threads, &work);
}

#ifdef __cplusplus
}
#endif

#endif
