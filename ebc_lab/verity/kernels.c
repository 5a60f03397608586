/* The functions of eager.py in C: the same formulas, the same bits, rows in parallel (docs/verity.md).

   - Every operation on a double is rounded once, in the order of eager.py: compile with -ffp-contract=off and
     without -ffast-math. Whatever else the compiler does, and however wide its SIMD, the bits stay.
   - Maxima are taken on bit patterns as integers and sums as the written tree, so both vectorise.
   - A function returns DONE, NO_MEMORY or OUT_OF_RANGE. Rows are independent; any number of threads gives the
     same bits. Threads are those of the OpenMP that the process already has (verity_team): a second set of
     threads would compete with torch's for the cores. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { DONE = 0, NO_MEMORY = 1, OUT_OF_RANGE = 2 };
enum { LANES = 8 };          /* rows of exponentials are padded to a multiple of it */
enum { COLUMNS = 256 };      /* sums that are kept at a time */
enum { CHUNK = 1 << 18 };    /* operations, some 50 µs: fewer are not worth another thread */
enum { EXPONENTIAL = 8 };    /* what an exponential costs, in operations */
enum { NOT_FINITE = 1025 };  /* the exponent of NaN and infinity */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE int32_t bits_of_float(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE int64_t bits_of(double value)
{
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE double double_of(int64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE double pow2(int64_t s) { return double_of((int64_t)((uint64_t)(s + 1023) << 52)); }

/* -- threads --------------------------------------------------------------------------------------------- */

typedef void body(const void *task, int64_t begin, int64_t end, double *room);

typedef struct {
    body *work;
    const void *task;
    int64_t rows, grain, room;
    double *rooms;
    atomic_llong next, workers;
} Queue;

typedef void team_function(void (*)(void *), void *, unsigned, unsigned);
static team_function *team; /* GOMP_parallel, or NULL: one thread */

void verity_team(team_function *function) { team = function; }

static void serve(void *address)
{
    Queue *queue = address;
    double *room = queue->rooms + atomic_fetch_add(&queue->workers, 1) * queue->room;
    for (;;) {
        int64_t begin = atomic_fetch_add(&queue->next, queue->grain);
        if (begin >= queue->rows) return;
        queue->work(queue->task, begin, least(begin + queue->grain, queue->rows), room);
    }
}

/* Calls `work` on all rows, a row being `cost` operations. Each thread has a room of so many doubles. */
static int over_rows(body *work, const void *task, int64_t rows, int64_t cost, int64_t room, int64_t threads)
{
    if (rows <= 0) return DONE;
    int64_t grain = CHUNK / (cost > 0 ? cost : 1) + 1;
    threads = team == NULL ? 1 : least(threads, (rows + grain - 1) / grain);
    double *rooms = NULL;
    room = padded(room);
    if (room > 0) {
        rooms = malloc((size_t)(room * threads) * sizeof *rooms);
        if (rooms == NULL) return NO_MEMORY;
    }
    if (threads < 2) {
        work(task, 0, rows, rooms);
    } else {
        Queue queue = {.work = work, .task = task, .rows = rows, .grain = grain, .room = room, .rooms = rooms};
        atomic_init(&queue.next, 0);
        atomic_init(&queue.workers, 0);
        team(serve, &queue, (unsigned)threads, 0);
    }
    free(rooms);
    return DONE;
}

/* -- exponents ------------------------------------------------------------------------------------------- */

static int32_t largest_float(const float *restrict x, int64_t n)
{
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t magnitude = bits_of_float(x[i]) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

static int64_t largest_double(const double *restrict x, int64_t n)
{
    int64_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t magnitude = bits_of(x[i]) & INT64_MAX;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

INLINE int64_t exponent_of_double(int64_t magnitude) { return magnitude == 0 ? 0 : (magnitude >> 52) - 1022; }

INLINE int64_t exponent_of_float(int32_t magnitude)
{
    if (magnitude >= 0x7F800000) return NOT_FINITE;
    if (magnitude >= 0x00800000) return (magnitude >> 23) - 126;
    return magnitude == 0 ? 0 : 32 - __builtin_clz((unsigned)magnitude) - 149;
}

typedef struct {
    const void *x;
    int is_double;
    atomic_llong most;
} Maximum;

static void maximum_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    Maximum *t = (Maximum *)task;
    long long found = t->is_double ? largest_double((const double *)t->x + begin, end - begin)
                                   : largest_float((const float *)t->x + begin, end - begin);
    long long most = atomic_load(&t->most);
    while (found > most && !atomic_compare_exchange_weak(&t->most, &most, found)) {}
}

int verity_max_exponent(const void *x, int64_t n, int32_t is_double, int64_t *e, int64_t threads)
{
    Maximum task = {.x = x, .is_double = is_double};
    atomic_init(&task.most, 0);
    over_rows(maximum_body, &task, n, 1, 0, threads);
    int64_t most = atomic_load(&task.most);
    *e = is_double ? exponent_of_double(most) : exponent_of_float((int32_t)most);
    return DONE;
}

/* -- quantising and the way back ------------------------------------------------------------------------- */

INLINE void quantized(const float *restrict x, int64_t n, double scale, double *restrict q)
{
    for (int64_t j = 0; j < n; j++) q[j] = rint((double)x[j] * scale);
}

typedef struct {
    const float *x;
    int64_t K, bits;
    int64_t *e;
    const int64_t *given;
    double *q;
} Rows;

static void exponents_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Rows *t = task;
    for (int64_t i = begin; i < end; i++) t->e[i] = exponent_of_float(largest_float(t->x + i * t->K, t->K));
}

int verity_row_exponents(const float *x, int64_t N, int64_t K, int64_t *e, int64_t threads)
{
    Rows task = {.x = x, .K = K, .e = e};
    return over_rows(exponents_body, &task, N, K, 0, threads);
}

static void quantize_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Rows *t = task;
    for (int64_t i = begin; i < end; i++)
        quantized(t->x + i * t->K, t->K, pow2(t->bits - t->given[i]), t->q + i * t->K);
}

/* Of a single row, in parts. */
static void quantize_part(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Rows *t = task;
    quantized(t->x + begin, end - begin, pow2(t->bits - t->given[0]), t->q + begin);
}

int verity_quantize_rows(const float *x, int64_t N, int64_t K, const int64_t *e, int64_t bits, double *q,
                         int64_t threads)
{
    Rows task = {.x = x, .K = K, .given = e, .bits = bits, .q = q};
    if (N == 1) return over_rows(quantize_part, &task, K, 2, 0, threads);
    return over_rows(quantize_body, &task, N, 2 * K, 0, threads);
}

typedef struct {
    const double *P;
    int64_t M;
    const int64_t *e;
    int64_t s;
    const float *bias;
    float *y;
} Scaled;

static void scaled_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Scaled *t = task;
    const float *restrict bias = t->bias;
    for (int64_t i = begin; i < end; i++) {
        const double *restrict P = t->P + i * t->M;
        float *restrict y = t->y + i * t->M;
        double scale = pow2(t->e[i] + t->s);
        if (bias == NULL)
            for (int64_t j = 0; j < t->M; j++) y[j] = (float)(P[j] * scale);
        else
            for (int64_t j = 0; j < t->M; j++) y[j] = (float)(P[j] * scale + (double)bias[j]);
    }
}

int verity_scaled_rows(const double *P, int64_t N, int64_t M, const int64_t *e, int64_t s,
                       const float *bias, float *y, int64_t threads)
{
    Scaled task = {.P = P, .M = M, .e = e, .s = s, .bias = bias, .y = y};
    return over_rows(scaled_body, &task, N, 2 * M, 0, threads);
}

/* -- exact sums ------------------------------------------------------------------------------------------ */

INLINE void add_integers(const double *restrict rounded, int64_t n, int64_t *restrict sums)
{
    for (int64_t j = 0; j < n; j++) sums[j] += (int64_t)rounded[j];
}

typedef struct {
    const double *P;
    int64_t *S;
} Integers;

static void add_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Integers *t = task;
    add_integers(t->P + begin, end - begin, t->S + begin);
}

int verity_add_integers(int64_t *S, const double *P, int64_t n, int64_t threads)
{
    Integers task = {.P = P, .S = S};
    return over_rows(add_body, &task, n, 1, 0, threads);
}

typedef struct {
    const void *terms;
    int is_double;
    int64_t M, shift, N, V;
    const int64_t *ids;
    int64_t *out;
} Terms;

/* A loop each for rounding and converting: of one, compilers make a call that does not vectorise. */
INLINE void add_floats(const float *restrict x, int64_t n, double scale, int64_t *restrict sums)
{
    double rounded[COLUMNS];
    quantized(x, n, scale, rounded);
    add_integers(rounded, n, sums);
}

INLINE void add_doubles(const double *restrict x, int64_t n, double scale, int64_t *restrict sums)
{
    double rounded[COLUMNS];
    for (int64_t j = 0; j < n; j++) rounded[j] = rint(x[j] * scale);
    add_integers(rounded, n, sums);
}

static void sums_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Terms *t = task;
    double scale = pow2(t->shift);
    int64_t sums[COLUMNS];
    for (int64_t column = 0; column < t->M; column += COLUMNS) {
        int64_t n = least(COLUMNS, t->M - column);
        memset(sums, 0, sizeof sums);
        for (int64_t i = begin; i < end; i++) {
            int64_t at = i * t->M + column;
            if (t->is_double)
                add_doubles((const double *)t->terms + at, n, scale, sums);
            else
                add_floats((const float *)t->terms + at, n, scale, sums);
        }
        for (int64_t j = 0; j < n; j++) __atomic_fetch_add(t->out + column + j, sums[j], __ATOMIC_RELAXED);
    }
}

int verity_sum_rows(const void *terms, int64_t N, int64_t M, int32_t is_double, int64_t shift, int64_t *out,
                    int64_t threads)
{
    Terms task = {.terms = terms, .is_double = is_double, .M = M, .shift = shift, .out = out};
    return over_rows(sums_body, &task, N, 2 * M, 0, threads);
}

/* Here the rows are parts of columns: two threads never write to one sum. */
static void sums_by_id_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Terms *t = task;
    double scale = pow2(t->shift);
    for (int64_t column = begin; column < end; column += COLUMNS)
        for (int64_t i = 0; i < t->N; i++)
            add_floats((const float *)t->terms + i * t->M + column, least(COLUMNS, end - column), scale,
                       t->out + t->ids[i] * t->M + column);
}

int verity_sum_rows_by_id(const float *terms, int64_t N, int64_t M, const int64_t *ids, int64_t V,
                          int64_t shift, int64_t *out, int64_t threads)
{
    for (int64_t i = 0; i < N; i++)
        if (ids[i] < 0 || ids[i] >= V) return OUT_OF_RANGE;
    Terms task = {.terms = terms, .M = M, .shift = shift, .N = N, .ids = ids, .out = out};
    return over_rows(sums_by_id_body, &task, M, 2 * N, 0, threads);
}

/* -- trees of sums --------------------------------------------------------------------------------------- */

INLINE void fold(double *restrict a, const double *restrict b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) a[i] += b[i];
}

/* Destroys a. */
static double tree_sum(double *a, int64_t n)
{
    while (n > 1) {
        if (n == 8) {
            double even = (a[0] + a[4]) + (a[2] + a[6]);
            return even + ((a[1] + a[5]) + (a[3] + a[7]));
        }
        int64_t h = (n + 1) / 2;
        fold(a, a + h, n - h);
        n = h;
    }
    return n == 1 ? a[0] : 0.0;
}

/* Keeps x; `room` is for half of it. */
static double tree_sum_of(const double *restrict x, int64_t n, double *restrict room)
{
    int64_t h = (n + 1) / 2;
    for (int64_t i = 0; i < n - h; i++) room[i] = x[i] + x[i + h];
    if (n - h < h) room[h - 1] = x[h - 1];
    return tree_sum(room, h);
}

/* -- layer norm ------------------------------------------------------------------------------------------ */

typedef struct {
    const float *dy, *x, *w, *bias;
    int64_t d;
    double eps;
    const double *mean_in, *rstd_in;
    double *mean, *rstd, *terms;
    float *out;
} Norm;

static void norm_body(const void *task, int64_t begin, int64_t end, double *room)
{
    const Norm *t = task;
    const float *restrict w = t->w;
    const float *restrict bias = t->bias;
    int64_t d = t->d;
    double *restrict c = room;
    double *restrict a = room + d;
    for (int64_t i = begin; i < end; i++) {
        const float *restrict x = t->x + i * d;
        float *restrict y = t->out + i * d;
        for (int64_t j = 0; j < d; j++) a[j] = (double)x[j];
        double mean = tree_sum(a, d) / (double)d;
        for (int64_t j = 0; j < d; j++) {
            c[j] = (double)x[j] - mean;
            a[j] = c[j] * c[j];
        }
        double rstd = 1.0 / sqrt(tree_sum(a, d) / (double)d + t->eps);
        if (bias == NULL)
            for (int64_t j = 0; j < d; j++) y[j] = (float)((c[j] * rstd) * (double)w[j]);
        else
            for (int64_t j = 0; j < d; j++) y[j] = (float)((c[j] * rstd) * (double)w[j] + (double)bias[j]);
        t->mean[i] = mean;
        t->rstd[i] = rstd;
    }
}

int verity_layer_norm(const float *x, int64_t N, int64_t d, const float *w, const float *bias, double eps,
                      float *y, double *mean, double *rstd, int64_t threads)
{
    Norm task = {.x = x, .d = d, .w = w, .bias = bias, .eps = eps, .out = y, .mean = mean, .rstd = rstd};
    return over_rows(norm_body, &task, N, 8 * d, 2 * d, threads);
}

static void norm_backward_body(const void *task, int64_t begin, int64_t end, double *room)
{
    const Norm *t = task;
    const float *restrict w = t->w;
    int64_t d = t->d;
    double *restrict g = room;
    double *restrict h = room + d;
    double *restrict gh = room + 2 * d;
    double *restrict half = room + 3 * d;
    for (int64_t i = begin; i < end; i++) {
        const float *restrict dy = t->dy + i * d;
        const float *restrict x = t->x + i * d;
        double *restrict terms = t->terms + i * d;
        float *restrict dx = t->out + i * d;
        double mean = t->mean_in[i];
        double rstd = t->rstd_in[i];
        for (int64_t j = 0; j < d; j++) {
            double wide = (double)dy[j];
            h[j] = ((double)x[j] - mean) * rstd;
            g[j] = wide * (double)w[j];
            gh[j] = g[j] * h[j];
            terms[j] = wide * h[j];
        }
        double a = tree_sum_of(g, d, half) / (double)d;
        double b = tree_sum(gh, d) / (double)d;
        for (int64_t j = 0; j < d; j++) dx[j] = (float)(((g[j] - a) - h[j] * b) * rstd);
    }
}

int verity_layer_norm_backward(const float *dy, const float *x, int64_t N, int64_t d, const float *w,
                               const double *mean, const double *rstd, float *dx, double *terms,
                               int64_t threads)
{
    Norm task = {.dy = dy, .x = x, .d = d, .w = w, .mean_in = mean, .rstd_in = rstd, .out = dx, .terms = terms};
    return over_rows(norm_backward_body, &task, N, 10 * d, 4 * d, threads);
}

/* -- exponential, logarithm, normal distribution --------------------------------------------------------- */

#define LOG2_E 0x1.71547652b82fep+0
#define LN2_HIGH 0x1.62e42feep-1
#define LN2_LOW 0x1.a39ef35793c76p-33
#define ROOT_HALF 0x1.6a09e667f3bcdp-1
#define DENSITY_AT_0 0x1.9884533d43651p-2
#define LEAST_EXP (-700.0)
#define TO_INTEGER 0x1.8p52 /* t = k + this is exact for integers |k| < 2^51, and its lowest bits are k's */

static const double EXP[11] = {
    0x1p+0, 0x1p+0, 0x1p-1, 0x1.5555555555555p-3,
    0x1.5555555555555p-5, 0x1.1111111111111p-7, 0x1.6c16c16c16c17p-10, 0x1.a01a01a01a01ap-13,
    0x1.a01a01a01a01ap-16, 0x1.71de3a556c734p-19, 0x1.27e4fb7789f5cp-22,
};
static const double LOG[12] = {
    0x1p+1, 0x1.5555555555555p-1, 0x1.999999999999ap-2, 0x1.2492492492492p-2,
    0x1.c71c71c71c71cp-3, 0x1.745d1745d1746p-3, 0x1.3b13b13b13b14p-3, 0x1.1111111111111p-3,
    0x1.e1e1e1e1e1e1ep-4, 0x1.af286bca1af28p-4, 0x1.8618618618618p-4, 0x1.642c8590b2164p-4,
};
static const double ERFC[17] = {
    0x1.46e80e2276062p+0,   -0x1.7bf5ec17849aep-4,  -0x1.5407beb68c3f1p-3,  0x1.4ffa1e1c266e5p-3,
    -0x1.bc2b99645051dp-5,  -0x1.0742357d441f9p-7,  0x1.1dd3a7624b617p-7,   0x1.4d4573c13c2d4p-10,
    -0x1.7e07f02e0edcap-10, -0x1.dc5779d15d0a3p-12, 0x1.b483bf93a2a8cp-13,  0x1.3c92818de58c4p-13,
    -0x1.5bd892fa4e23cp-18, -0x1.3425102871dcfp-15, -0x1.2d28fa1411c3ep-17, 0x1.472d98a647cd9p-18,
    0x1.295923152889bp-19,
};

INLINE double horner(double x, const double *coefficients, int terms)
{
    double p = coefficients[terms - 1];
#pragma GCC unroll 32
    for (int i = terms - 2; i >= 0; i--) p = p * x + coefficients[i];
    return p;
}

/* exp(x), x <= 0. The sum with TO_INTEGER rounds half to even as rint does, and holds k as an integer. */
INLINE double exp64(double x)
{
    double near = x < LEAST_EXP ? LEAST_EXP : x;
    double shifted = near * LOG2_E + TO_INTEGER;
    double k = shifted - TO_INTEGER;
    double r = (near - k * LN2_HIGH) - k * LN2_LOW;
    double power = double_of((int64_t)((uint64_t)(bits_of(shifted) + 1023) << 52));
    double found = horner(r, EXP, 11) * power;
    return x < LEAST_EXP ? 0.0 : found;
}

INLINE double log64(double x)
{
    int64_t e = exponent_of_double(bits_of(x) & INT64_MAX);
    double m = x * pow2(-e);
    int low = m < ROOT_HALF;
    m = low ? m + m : m;
    double whole = (double)(low ? e - 1 : e);
    double s = (m - 1.0) / (m + 1.0);
    double p = horner(s * s, LOG, 12);
    p = p * s + whole * LN2_LOW;
    return whole * LN2_HIGH + p;
}

INLINE void gelu_of(float value, float *y, float *slope)
{
    double x = (double)value;
    double E = exp64(-((x * x) * 0.5));
    double z = fabs(x) * ROOT_HALF;
    double P = horner((z - 2.0) / (z + 2.0), ERFC, 17);
    P = ((P / ((z + z) + 1.0)) * E) * 0.5;
    double phi = x > 0.0 ? 1.0 - P : P;
    *y = (float)(x * phi);
    *slope = (float)(phi + (E * DENSITY_AT_0) * x);
}

typedef struct {
    const float *x;
    float *y, *slope;
} Gelu;

static void gelu_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Gelu *t = task;
    const float *restrict x = t->x;
    float *restrict y = t->y;
    float *restrict slope = t->slope;
    for (int64_t i = begin; i < end; i++) gelu_of(x[i], y + i, slope + i);
}

int verity_gelu(const float *x, int64_t n, float *y, float *slope, int64_t threads)
{
    Gelu task = {.x = x, .y = y, .slope = slope};
    return over_rows(gelu_body, &task, n, 2 * EXPONENTIAL, 0, threads);
}

/* The largest of n, a multiple of LANES; NaN is passed over. */
INLINE double largest_of(const double *restrict z, int64_t n)
{
    double most[LANES];
    for (int k = 0; k < LANES; k++) most[k] = z[k];
    for (int64_t i = LANES; i < n; i += LANES)
        for (int k = 0; k < LANES; k++) most[k] = z[i + k] > most[k] ? z[i + k] : most[k];
    double largest = most[0];
    for (int k = 1; k < LANES; k++) largest = most[k] > largest ? most[k] : largest;
    return largest;
}

/* z <- exp(z - max) for n values, after which comes minus infinity up to a multiple of LANES; the maximum. */
INLINE double exponentials(double *restrict z, int64_t n)
{
    double most = largest_of(z, padded(n));
    for (int64_t i = 0; i < padded(n); i += LANES)
        for (int k = 0; k < LANES; k++) z[i + k] = exp64(z[i + k] - most);
    return most;
}

/* -- softmax and cross-entropy --------------------------------------------------------------------------- */

typedef struct {
    const float *z;
    int64_t V;
    const int64_t *y;
    double *loss;
    float *out;
} Soft;

static void soft_body(const void *task, int64_t begin, int64_t end, double *room)
{
    const Soft *t = task;
    int64_t V = t->V;
    double *restrict e = room;
    double *restrict half = room + padded(V);
    for (int64_t i = begin; i < end; i++) {
        const float *restrict z = t->z + i * V;
        float *restrict out = t->out + i * V;
        for (int64_t j = 0; j < V; j++) e[j] = (double)z[j];
        for (int64_t j = V; j < padded(V); j++) e[j] = -INFINITY;
        double most = exponentials(e, V);
        double sum = tree_sum_of(e, V, half);
        for (int64_t j = 0; j < V; j++) out[j] = (float)(e[j] / sum);
        if (t->y == NULL) continue;
        int64_t hit = t->y[i];
        t->loss[i] = (log64(sum) + most) - (double)z[hit];
        out[hit] = (float)(e[hit] / sum - 1.0);
    }
}

int verity_softmax(const float *x, int64_t N, int64_t V, float *p, int64_t threads)
{
    Soft task = {.z = x, .V = V, .out = p};
    return V > 0 ? over_rows(soft_body, &task, N, EXPONENTIAL * V, 2 * padded(V), threads) : DONE;
}

int verity_cross_entropy(const float *z, int64_t N, int64_t V, const int64_t *y, double *loss, float *dz,
                         int64_t threads)
{
    for (int64_t i = 0; i < N; i++)
        if (y[i] < 0 || y[i] >= V) return OUT_OF_RANGE;
    Soft task = {.z = z, .V = V, .y = y, .loss = loss, .out = dz};
    return over_rows(soft_body, &task, N, EXPONENTIAL * V, 2 * padded(V), threads);
}

/* -- attention ------------------------------------------------------------------------------------------- */

/* `parts` tensors of `heads` heads of `D` features side by side, or each head of a sequence by itself. */
typedef struct {
    int64_t B, T, parts, heads, D, bits;
    const float *x;
    double *q;
    int64_t *e;
    const double *const *P;
    const int64_t *s;
    float *y;
} Heads;

/* Where the unit, a part of a sequence's head, begins in the tensor of tokens. */
INLINE int64_t place(const Heads *t, int64_t unit)
{
    int64_t head = unit % t->heads;
    int64_t sequence = unit / t->heads % t->B;
    int64_t part = unit / t->heads / t->B;
    return sequence * t->T * t->parts * t->heads * t->D + (part * t->heads + head) * t->D;
}

static void heads_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Heads *t = task;
    int64_t stride = t->parts * t->heads * t->D;
    for (int64_t unit = begin; unit < end; unit++) {
        const float *x = t->x + place(t, unit);
        double *q = t->q + unit * t->T * t->D;
        int32_t most = 0;
        for (int64_t i = 0; i < t->T; i++) {
            int32_t found = largest_float(x + i * stride, t->D);
            most = found > most ? found : most;
        }
        t->e[unit] = exponent_of_float(most);
        double scale = pow2(t->bits - t->e[unit]);
        for (int64_t i = 0; i < t->T; i++) quantized(x + i * stride, t->D, scale, q + i * t->D);
    }
}

int verity_heads(const float *x, int64_t B, int64_t T, int64_t parts, int64_t heads, int64_t D, int64_t bits,
                 double *q, int64_t *e, int64_t threads)
{
    Heads task = {.B = B, .T = T, .parts = parts, .heads = heads, .D = D, .bits = bits, .x = x, .q = q, .e = e};
    return over_rows(heads_body, &task, parts * B * heads, 3 * T * D, 0, threads);
}

static void merge_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Heads *t = task;
    int64_t stride = t->parts * t->heads * t->D;
    int64_t units = t->B * t->heads; /* of a part */
    for (int64_t unit = begin; unit < end; unit++) {
        const double *P = t->P[unit / units] + unit % units * t->T * t->D;
        float *y = t->y + place(t, unit);
        double scale = pow2(t->s[unit]);
        for (int64_t i = 0; i < t->T; i++) {
            const double *restrict from = P + i * t->D;
            float *restrict to = y + i * stride;
            for (int64_t j = 0; j < t->D; j++) to[j] = (float)(from[j] * scale);
        }
    }
}

int verity_merged(const double *const *P, const int64_t *s, int64_t B, int64_t T, int64_t parts,
                  int64_t heads, int64_t D, float *y, int64_t threads)
{
    Heads task = {.B = B, .T = T, .parts = parts, .heads = heads, .D = D, .P = P, .s = s, .y = y};
    return over_rows(merge_body, &task, parts * B * heads, 2 * T * D, 0, threads);
}

typedef struct {
    const double *Z;
    const int64_t *s;
    int64_t T, bits;
    double alpha;
    const float *p_in;
    float *p;
    double *q;
    int64_t *e;
} Causal;

/* A row of token i: exponentials of what it sees, zero for the rest. */
static void causal_body(const void *task, int64_t begin, int64_t end, double *room)
{
    const Causal *t = task;
    int64_t T = t->T;
    double *restrict e = room;
    double *restrict half = room + padded(T);
    double grid = pow2(t->bits);
    for (int64_t row = begin; row < end; row++) {
        const double *restrict Z = t->Z + row * T;
        float *restrict p = t->p + row * T;
        double *restrict q = t->q + row * T;
        int64_t seen = row % T + 1;
        int64_t known = least(padded(seen), T);
        double scale = pow2(t->s[row / T]);
        for (int64_t j = 0; j < seen; j++) e[j] = (Z[j] * scale) * t->alpha;
        for (int64_t j = seen; j < padded(seen); j++) e[j] = -INFINITY;
        exponentials(e, seen);
        for (int64_t j = known; j < T; j++) e[j] = 0.0;
        double sum = tree_sum_of(e, T, half);
        for (int64_t j = 0; j < known; j++) {
            p[j] = (float)(e[j] / sum);
            q[j] = rint((double)p[j] * grid);
        }
        float unseen = (float)(0.0 / sum);
        for (int64_t j = known; j < T; j++) {
            p[j] = unseen;
            q[j] = (double)unseen;
        }
    }
}

int verity_causal_softmax(const double *Z, const int64_t *s, int64_t units, int64_t T, double alpha,
                          int64_t bits, float *p, double *q, int64_t threads)
{
    Causal task = {.Z = Z, .s = s, .T = T, .alpha = alpha, .bits = bits, .p = p, .q = q};
    return over_rows(causal_body, &task, units * T, EXPONENTIAL * T, 2 * padded(T), threads);
}

/* The gradients of a unit stand in q, as the float32 numbers that they are, until their exponent is known. */
static void causal_backward_body(const void *task, int64_t begin, int64_t end, double *room)
{
    const Causal *t = task;
    int64_t T = t->T;
    for (int64_t unit = begin; unit < end; unit++) {
        double scale = pow2(t->s[unit]);
        int64_t most = 0;
        for (int64_t row = unit * T; row < (unit + 1) * T; row++) {
            const double *restrict Z = t->Z + row * T;
            const float *restrict p = t->p_in + row * T;
            double *restrict q = t->q + row * T;
            double *restrict dp = room;
            double *restrict products = room + T;
            for (int64_t j = 0; j < T; j++) {
                dp[j] = Z[j] * scale;
                products[j] = dp[j] * (double)p[j];
            }
            double mean = tree_sum(products, T);
            for (int64_t j = 0; j < T; j++) q[j] = (double)(float)(((dp[j] - mean) * (double)p[j]) * t->alpha);
            int64_t found = largest_double(q, T);
            most = found > most ? found : most;
        }
        t->e[unit] = exponent_of_double(most);
        double grid = pow2(t->bits - t->e[unit]);
        double *restrict q = t->q + unit * T * T;
        for (int64_t j = 0; j < T * T; j++) q[j] = rint(q[j] * grid);
    }
}

int verity_causal_softmax_backward(const double *dP, const int64_t *s, int64_t units, int64_t T,
                                   const float *p, double alpha, int64_t bits, double *q, int64_t *e,
                                   int64_t threads)
{
    Causal task = {.Z = dP, .s = s, .T = T, .alpha = alpha, .bits = bits, .p_in = p, .q = q, .e = e};
    return over_rows(causal_backward_body, &task, units, 10 * T * T, 2 * T, threads);
}

/* -- Adam ------------------------------------------------------------------------------------------------ */

typedef struct {
    float *w, *m, *v;
    const float *g;
    double lr, beta1, beta2, eps, decay, c1, c2;
} Adam;

static void adam_body(const void *task, int64_t begin, int64_t end, double *room)
{
    (void)room;
    const Adam a = *(const Adam *)task;
    float *restrict w = a.w;
    float *restrict m = a.m;
    float *restrict v = a.v;
    const float *restrict g = a.g;
    double rest1 = 1.0 - a.beta1;
    double rest2 = 1.0 - a.beta2;
    int decays = a.decay != 0.0;
    for (int64_t i = begin; i < end; i++) {
        double wide = (double)g[i];
        float first = (float)((double)m[i] * a.beta1 + wide * rest1);
        float second = (float)((double)v[i] * a.beta2 + (wide * wide) * rest2);
        double at = (double)w[i];
        double decayed = at - at * a.decay;
        at = decays ? decayed : at;
        double root = sqrt((double)second / a.c2) + a.eps;
        m[i] = first;
        v[i] = second;
        w[i] = (float)(at - (((double)first / a.c1) / root) * a.lr);
    }
}

int verity_adam(float *w, const float *g, float *m, float *v, int64_t n, double lr, double beta1, double beta2,
                double eps, double decay, double c1, double c2, int64_t threads)
{
    Adam task = {w, m, v, g, lr, beta1, beta2, eps, decay, c1, c2};
    return over_rows(adam_body, &task, n, EXPONENTIAL, 0, threads);
}

/* -- for the check after loading ------------------------------------------------------------------------- */

/* Of n negative numbers x: exp64(x), log64(-x), x by their sum, the root of -x, x² + x and x rounded; each n. */
int verity_known(const double *restrict x, int64_t n, double *restrict out)
{
    double *room = malloc((size_t)(n + 1) * sizeof *room);
    if (room == NULL) return NO_MEMORY;
    double sum = tree_sum_of(x, n, room);
    free(room);
    for (int64_t i = 0; i < n; i++) {
        out[i] = exp64(x[i]);
        out[n + i] = log64(-x[i]);
        out[2 * n + i] = x[i] / sum;
        out[3 * n + i] = sqrt(-x[i]);
        out[4 * n + i] = x[i] * x[i] + x[i];
        out[5 * n + i] = rint(x[i]);
    }
    return DONE;
}
