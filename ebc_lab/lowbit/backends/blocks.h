/* What both compiled backends do to a block of values, codes or bytes. Valid C11 and C++17; docs/lowbit.md has
   the maths and why each rule is there.

   - Plain loops without calls or branches on data: every compiler makes SIMD of them at -O3.
   - Same bits as the numpy reference: only comparisons, single IEEE operations and exact integers decide, so
     neither the width of the SIMD nor its order matters. Compile with -ffp-contract=off, without -ffast-math.
   - A matrix is rows x columns, row-major; a group is `group` neighbours in a row (the last of a row may be
     shorter). A step per tensor is one row and one group of all n. */
#ifndef EBC_LAB_BLOCKS_H
#define EBC_LAB_BLOCKS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { MEAN_BLOCK = 4096 }; /* values whose magnitudes are summed as integers of one scale */
enum { FAR = 1 << 21 };     /* values from which on they come from memory, not from a cache */
enum { WIDTH = 64 };        /* bytes of a plane of a whole packed block */
enum { TERNARY_PLANES = 5, FIVE_PLANES = 24, FIVE_BYTES = 7, MOST_CODES = FIVE_PLANES * WIDTH };
enum { ABSMEAN = 0, ABSMAX = 1, GIVEN = 2 };
static const int64_t DONE = 0, NOT_FINITE = 1, NO_MEMORY = -1;
static const uint32_t INFINITE = 0x7F800000u; /* the bits of infinity: those of NaN are larger */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Calls the values from `start` on from memory while those before them are at work; a few of them are in the
   cache already. */
INLINE void prefetch(const float *x, int64_t start, int64_t n)
{
    if (n < FAR) return;
    int64_t end = least(start + MEAN_BLOCK, n);
    for (int64_t i = start; i < end; i += 16) __builtin_prefetch(x + i);
}

/* -- steps ----------------------------------------------------------------------------------------------- */

/* The bits of the largest magnitude: magnitudes are ordered as their bits are. */
static uint32_t largest(const float *__restrict x, int64_t n)
{
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFFu;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

INLINE uint32_t scaled(float value, float scale) { return (uint32_t)(int32_t)rintf(fabsf(value) * scale); }

/* T_b of one block: the sum of |x| in units of 2^(e-30), an exact integer, where 2^(e-1) <= max|x| < 2^e.
   Four terms fit into 32 bits, since each is below 2^30: only one in four sums is then widened. */
static double block_sum(const float *__restrict x, int64_t n, uint32_t most)
{
    int e = (int)(most >> 23) - 126;
    if (e < -89) return 0.0; /* below 2^-90; so no block of subnormal numbers gets here */
    float scale = float_of((uint32_t)(30 - e + 127) << 23);
    uint64_t sum = 0;
    int64_t quarter = n / 4;
    for (int64_t i = 0; i < quarter; i++)
        sum += scaled(x[i], scale) + scaled(x[quarter + i], scale) + scaled(x[2 * quarter + i], scale) +
               scaled(x[3 * quarter + i], scale);
    for (int64_t i = 4 * quarter; i < n; i++) sum += scaled(x[i], scale);
    return ldexp((double)sum, e - 30);
}

/* t <- t[:h] + t[h:] until one is left. Zeros that would pad t to a power of two change nothing. */
static double halved(double *t, int64_t count)
{
    int64_t half = 1;
    while (half < count) half *= 2;
    for (half /= 2; half >= 1; half /= 2)
        for (int64_t i = 0; i + half < least(count, 2 * half); i++) t[i] += t[i + half];
    return count > 0 ? t[0] : 0.0;
}

/* -- codes and values ------------------------------------------------------------------------------------ */

/* A step of 0 has no codes but 0: no magnitude exceeds infinity. */
INLINE float first_threshold(float step) { return step > 0.0f ? 0.5f * step : INFINITY; }

INLINE float second_threshold(float step, int top) { return step > 0.0f && top > 1 ? 1.5f * step : INFINITY; }

static void codes_of(const float *__restrict x, int64_t n, float step, int top, int8_t *__restrict codes)
{
    float first = first_threshold(step);
    float second = second_threshold(step, top);
    for (int64_t i = 0; i < n; i++) {
        float magnitude = fabsf(x[i]);
        int32_t code = magnitude > first ? 1 : 0;
        code = magnitude >= second ? 2 : code;
        int32_t negative = -(int32_t)(bits_of(x[i]) >> 31);
        codes[i] = (int8_t)((code ^ negative) - negative);
    }
}

static void values_of(const float *__restrict x, int64_t n, float step, int top, float *__restrict values)
{
    float first = first_threshold(step);
    float second = second_threshold(step, top);
    float twice = 2.0f * step;
    for (int64_t i = 0; i < n; i++) {
        float magnitude = fabsf(x[i]);
        float level = magnitude >= second ? twice : step;
        values[i] = magnitude > first ? copysignf(level, x[i]) : 0.0f;
    }
}

static void decoded(const int8_t *__restrict codes, int64_t n, float step, float *__restrict values)
{
    for (int64_t i = 0; i < n; i++) values[i] = step * (float)codes[i]; /* a code of 0 is +0 */
}

/* Values of the `n` codes that begin at element `start` of a matrix; `values` is that of element `start`. */
static void decoded_span(const int8_t *codes, int64_t start, int64_t n, int64_t columns, int64_t group,
                         const float *steps, float *values)
{
    int64_t groups = (columns + group - 1) / group;
    int64_t row = start / columns;
    int64_t column = start % columns;
    while (n > 0) {
        int64_t end = least(columns, (column / group + 1) * group);
        int64_t length = least(n, end - column);
        decoded(codes, length, steps[row * groups + column / group], values);
        codes += length;
        values += length;
        n -= length;
        column += length;
        if (column == columns) {
            column = 0;
            row++;
        }
    }
}

/* -- stochastic codes ------------------------------------------------------------------------------------ */

INLINE uint32_t mix(uint32_t h) /* murmur3's finaliser */
{
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
}

static void drawn(const float *__restrict x, int64_t start, int64_t n, int top, float step, uint32_t key,
                  int8_t *__restrict codes)
{
    float most = (float)top;
    uint32_t offset = (uint32_t)start * 0x9E3779B9u + key;
    for (int64_t i = 0; i < n; i++) {
        float uniform = (float)(int32_t)(mix((uint32_t)i * 0x9E3779B9u + offset) >> 8) * 0x1p-24f;
        float y = fabsf(x[i]) / step;
        y = y < most ? y : most;
        float whole = floorf(y);
        int32_t code = (int32_t)whole + (uniform < y - whole ? 1 : 0);
        int32_t negative = -(int32_t)(bits_of(x[i]) >> 31);
        codes[i] = (int8_t)((code ^ negative) - negative);
    }
}

/* -- packing --------------------------------------------------------------------------------------------- */

/* Of `ternary` (top 1) and `five` (top 2): codes and bytes across the planes, the largest packed value. */
INLINE int64_t planes_of(int top) { return top == 1 ? TERNARY_PLANES : FIVE_PLANES; }

INLINE int64_t bytes_of(int top) { return top == 1 ? 1 : FIVE_BYTES; }

INLINE int largest_packed(int top) { return top == 1 ? 242 : 124; }

/* The width of the planes of the block that begins at code `start` of n. */
INLINE int64_t width_of(int64_t start, int64_t n, int top)
{
    return least(WIDTH, (n - start + planes_of(top) - 1) / planes_of(top));
}

/* Horner's rule in bytes. Codes of -1, 0, 1 whose digits are one more: 121 = 1 + 3 + 9 + 27 + 81. */
INLINE uint8_t pack_ternary(const int8_t *__restrict c, int64_t w, uint8_t *__restrict bytes)
{
    uint8_t most = 0;
    for (int64_t i = 0; i < w; i++) {
        uint8_t byte = 0;
        for (int j = TERNARY_PLANES - 1; j >= 0; j--) {
            uint8_t digit = (uint8_t)(c[j * w + i] + 1);
            most = digit > most ? digit : most;
            byte = (uint8_t)(byte + byte + byte + digit);
        }
        bytes[i] = byte;
    }
    return most;
}

INLINE uint8_t pack_five(const int8_t *__restrict c, int64_t w, uint8_t *__restrict bytes)
{
    uint8_t most = 0;
    uint8_t v[FIVE_BYTES + 1][WIDTH];
    for (int m = 0; m <= FIVE_BYTES; m++) {
        for (int64_t i = 0; i < w; i++) {
            uint8_t low = (uint8_t)(c[3 * m * w + i] + 2);
            uint8_t middle = (uint8_t)(c[(3 * m + 1) * w + i] + 2);
            uint8_t high = (uint8_t)(c[(3 * m + 2) * w + i] + 2);
            most = low > most ? low : most;
            most = middle > most ? middle : most;
            most = high > most ? high : most;
            v[m][i] = (uint8_t)(low + 5 * middle + 25 * high);
        }
    }
    for (int m = 0; m < FIVE_BYTES; m++)
        for (int64_t i = 0; i < w; i++)
            bytes[m * w + i] = v[m][i] | ((v[FIVE_BYTES][i] & (1 << m)) != 0 ? 128 : 0);
    return most;
}

/* Packs the block of `count` codes. Returns the largest digit, above 2 top where there is no code. */
static uint8_t pack_block(const int8_t *codes, int64_t count, int top, uint8_t *bytes)
{
    if (count == planes_of(top) * WIDTH) /* a width that the compiler knows */
        return top == 1 ? pack_ternary(codes, WIDTH, bytes) : pack_five(codes, WIDTH, bytes);
    int64_t w = width_of(0, count, top);
    int8_t padded[MOST_CODES] = {0}; /* missing codes are 0 */
    memcpy(padded, codes, (size_t)count);
    return top == 1 ? pack_ternary(padded, w, bytes) : pack_five(padded, w, bytes);
}

/* Returns the largest byte. 171/512 and 205/1024 stand for thirds and fifths: exact for a byte. */
INLINE uint8_t unpack_ternary(const uint8_t *__restrict bytes, int64_t w, int8_t *__restrict c)
{
    uint8_t most = 0;
    for (int64_t i = 0; i < w; i++) {
        uint8_t rest = bytes[i];
        most = rest > most ? rest : most;
        for (int j = 0; j < TERNARY_PLANES; j++) {
            uint8_t third = (uint8_t)((uint16_t)((uint16_t)rest * 171) >> 9);
            c[j * w + i] = (int8_t)(rest - 3 * third - 1);
            rest = third;
        }
    }
    return most;
}

INLINE uint8_t unpack_five(const uint8_t *__restrict bytes, int64_t w, int8_t *__restrict c)
{
    uint8_t most = 0;
    uint8_t v[FIVE_BYTES + 1][WIDTH];
    memset(v[FIVE_BYTES], 0, WIDTH);
    for (int m = 0; m < FIVE_BYTES; m++) {
        for (int64_t i = 0; i < w; i++) {
            v[m][i] = bytes[m * w + i] & 127;
            v[FIVE_BYTES][i] |= bytes[m * w + i] >= 128 ? (uint8_t)(1 << m) : 0;
        }
    }
    for (int m = 0; m <= FIVE_BYTES; m++) {
        for (int64_t i = 0; i < w; i++) {
            uint8_t whole = v[m][i];
            uint8_t fifth = (uint8_t)((uint16_t)((uint16_t)whole * 205) >> 10);
            uint8_t last = (uint8_t)((uint16_t)((uint16_t)fifth * 205) >> 10);
            most = whole > most ? whole : most;
            c[3 * m * w + i] = (int8_t)(whole - 5 * fifth - 2);
            c[(3 * m + 1) * w + i] = (int8_t)(fifth - 5 * last - 2);
            c[(3 * m + 2) * w + i] = (int8_t)(last - 2);
        }
    }
    return most;
}

/* Unpacks the block that begins at code `start` of n to `codes`, which has room for a whole one. Returns whether
   its bytes hold codes. */
static int unpack_block(const uint8_t *bytes, int64_t start, int64_t n, int top, int8_t *codes)
{
    const uint8_t *from = bytes + start / planes_of(top) * bytes_of(top);
    int64_t w = width_of(start, n, top);
    uint8_t most;
    if (w == WIDTH)
        most = top == 1 ? unpack_ternary(from, WIDTH, codes) : unpack_five(from, WIDTH, codes);
    else
        most = top == 1 ? unpack_ternary(from, w, codes) : unpack_five(from, w, codes);
    return most <= largest_packed(top);
}

/* The first byte of the block at code `start` that is no code; of a v in the high bits, its lowest bit's. */
static int64_t no_code(const uint8_t *bytes, int64_t start, int64_t n, int top)
{
    int64_t at = start / planes_of(top) * bytes_of(top);
    int64_t w = width_of(start, n, top);
    int mask = top == 1 ? 255 : 127;
    for (int64_t i = 0; i < bytes_of(top) * w; i++)
        if ((bytes[at + i] & mask) > largest_packed(top)) return at + i;
    for (int64_t i = 0; i < w; i++) {
        int v = 0;
        for (int m = 0; m < FIVE_BYTES; m++) v |= (bytes[at + m * w + i] >> 7) << m;
        if (v > largest_packed(top)) return at + i;
    }
    return -1;
}

#endif
