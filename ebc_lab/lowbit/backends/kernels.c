/* The low-bit operations in C, for one thread: the blocks of blocks.h one after the other. The interface, and
   what it gives, are also those of kernels.cpp. Beyond input and output an operation takes 8 bytes per 4096
   values of the largest group. */

#include <stdlib.h>

#include "blocks.h"
#include "kmeans.h"

/* `sums` has room for a double per block of n. */
static int mean_step(const float *x, int64_t n, double *sums, float *step)
{
    int64_t blocks = 0;
    for (int64_t start = 0; start < n; start += MEAN_BLOCK, blocks++) {
        int64_t length = least(MEAN_BLOCK, n - start);
        uint32_t most = largest(x + start, length);
        if (most >= INFINITE) return NOT_FINITE;
        prefetch(x, start + length, n);
        sums[blocks] = block_sum(x + start, length, most);
    }
    *step = n > 0 ? (float)(halved(sums, blocks) / (double)n) : 0.0f;
    return DONE;
}

static int max_step(const float *x, int64_t n, int top, float *step)
{
    uint32_t most = largest(x, n);
    if (most >= INFINITE) return NOT_FINITE;
    *step = float_of(most) / (float)top;
    return DONE;
}

/* Codes and values of one group. A step that was given was found on nothing, so here it shows whether all is
   finite. */
static int codes_and_values(const float *x, int64_t n, float step, int top, int check, int8_t *codes,
                            float *values)
{
    for (int64_t start = 0; start < n; start += MEAN_BLOCK) {
        int64_t length = least(MEAN_BLOCK, n - start);
        if (check && largest(x + start, length) >= INFINITE) return NOT_FINITE;
        if (check) prefetch(x, start + length, n);
        if (codes != NULL) codes_of(x + start, length, step, top, codes + start);
        if (values != NULL) values_of(x + start, length, step, top, values + start);
    }
    return DONE;
}

static int quantize_group(const float *x, int64_t n, int top, int scale, double *sums, float *step,
                          int8_t *codes, float *values)
{
    int outcome = DONE;
    if (scale == ABSMEAN) outcome = mean_step(x, n, sums, step);
    if (scale == ABSMAX) outcome = max_step(x, n, top, step);
    if (outcome == DONE) outcome = codes_and_values(x, n, *step, top, scale == GIVEN, codes, values);
    if (outcome == DONE || codes != NULL) return outcome;
    *step = NAN;
    for (int64_t i = 0; i < n && values != NULL; i++) values[i] = NAN;
    return DONE;
}

/* Steps, then codes or values where there is room for them (not NULL). What is not finite has no codes; where
   none are asked for, the step and the values of its group are NaN. Returns DONE, NOT_FINITE or NO_MEMORY. */
int64_t ebc_quantize(const float *x, int64_t rows, int64_t columns, int64_t group, int32_t top, int32_t scale,
                     float *steps, int8_t *codes, float *values, int32_t threads)
{
    (void)threads;
    group = least(group, columns);
    double *sums = malloc((size_t)(group / MEAN_BLOCK + 1) * sizeof *sums);
    if (sums == NULL) return NO_MEMORY;
    int outcome = DONE;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t column = 0; column < columns && outcome == DONE; column += group) {
            int64_t start = row * columns + column;
            int8_t *codes_here = codes == NULL ? NULL : codes + start;
            float *values_here = values == NULL ? NULL : values + start;
            outcome = quantize_group(x + start, least(group, columns - column), top, scale, sums, steps++,
                                     codes_here, values_here);
        }
    }
    free(sums);
    return outcome;
}

void ebc_decode(const int8_t *codes, int64_t rows, int64_t columns, int64_t group, const float *steps,
                float *values, int32_t threads)
{
    (void)threads;
    if (rows * columns > 0)
        decoded_span(codes, 0, rows * columns, columns, least(group, columns), steps, values);
}

/* Codes of one positive step, by the uniforms of `key`. Returns DONE or NOT_FINITE. */
int64_t ebc_stochastic(const float *x, int64_t n, int32_t top, float step, uint32_t key, int8_t *codes,
                       int32_t threads)
{
    (void)threads;
    for (int64_t start = 0; start < n; start += MEAN_BLOCK) {
        int64_t length = least(MEAN_BLOCK, n - start);
        if (largest(x + start, length) >= INFINITE) return NOT_FINITE;
        drawn(x + start, start, length, top, step, key, codes + start);
    }
    return DONE;
}

/* Packs n codes. Returns -1, or the index of the first code beyond `top`. */
int64_t ebc_pack(const int8_t *codes, int64_t n, int32_t top, uint8_t *bytes, int32_t threads)
{
    (void)threads;
    int64_t block = planes_of(top) * WIDTH;
    for (int64_t start = 0; start < n; start += block, bytes += bytes_of(top) * WIDTH) {
        int64_t count = least(block, n - start);
        if (pack_block(codes + start, count, top, bytes) <= 2 * top) continue;
        for (int64_t i = start; i < start + count; i++)
            if (codes[i] > top || codes[i] < -top) return i;
    }
    return -1;
}

/* Unpacks n codes. Returns -1, or the index of the first byte that holds no codes. */
int64_t ebc_unpack(const uint8_t *bytes, int64_t n, int32_t top, int8_t *codes, int32_t threads)
{
    (void)threads;
    int64_t block = planes_of(top) * WIDTH;
    int8_t room[MOST_CODES];
    for (int64_t start = 0; start < n; start += block) {
        int64_t count = least(block, n - start);
        int8_t *to = count == block ? codes + start : room;
        if (!unpack_block(bytes, start, n, top, to)) return no_code(bytes, start, n, top);
        if (to == room) memcpy(codes + start, room, (size_t)count);
    }
    return -1;
}

/* Unpacks straight to the values of a matrix. Returns as ebc_unpack. */
int64_t ebc_unpack_values(const uint8_t *bytes, int64_t rows, int64_t columns, int64_t group, int32_t top,
                          const float *steps, float *values, int32_t threads)
{
    (void)threads;
    int64_t n = rows * columns;
    int64_t block = planes_of(top) * WIDTH;
    int8_t room[MOST_CODES];
    for (int64_t start = 0; start < n; start += block) {
        if (!unpack_block(bytes, start, n, top, room)) return no_code(bytes, start, n, top);
        int64_t count = least(block, n - start);
        decoded_span(room, start, count, columns, least(group, columns), steps, values + start);
    }
    return -1;
}

int64_t ebc_kmeans(const double *grid, int64_t n, int64_t d, double *centres, int64_t k, int64_t max_iter,
                   int32_t *labels, int32_t threads)
{
    return ebc_kmeans_lloyd(grid, n, d, centres, k, max_iter, labels, threads);
}
