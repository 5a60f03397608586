/* Lloyd's k-means on integers: exact labels and centres, the same bits on any machine and thread count.
 *
 * Points and centres are integers of at most 24 bits held as float64, so scores |c|^2 - 2 x.c and sums are
 * integers below 2^53 and float64 is exact in any order. Most decisions are made in float32, in which the
 * integers themselves are exact and only the sums round: a decision counts where the rounding errors of both
 * scores together cannot turn it, else float64 decides. A part of operations.h; see docs/lowbit.md.
 */
#ifndef EBC_LAB_KMEANS_H
#define EBC_LAB_KMEANS_H

#ifdef __AVX512F__
#define EBC_KM_LANES 16
#else
#define EBC_KM_LANES 8
#endif
#define EBC_KM_TILE (2 * EBC_KM_LANES) /* points side by side: two registers of float32 */
#define EBC_KM_BLOCK 6                 /* centres at once: 12 sums, which fit 16 registers too */
#define EBC_KM_MOST_FEATURES 65536     /* beyond, the bound on the rounding errors is not kept here */
#define EBC_KM_PRODUCTS 32             /* multiplications that take as long as another operation's value */

typedef float ebc_km_floats __attribute__((vector_size(4 * EBC_KM_LANES)));
typedef int32_t ebc_km_ints __attribute__((vector_size(4 * EBC_KM_LANES)));
typedef double ebc_km_doubles __attribute__((vector_size(4 * EBC_KM_LANES), aligned(8)));

typedef struct ebc_km_problem {
    const double *grid; /* (n, d) */
    int64_t n, d, k;
    int exact_only;     /* 1 where float32 cannot hold the values or bound the errors */
    double *centres;    /* (k, d) */
    double *squares;    /* (k,) |c|^2 */
    double *sums;       /* (k, d) of the points of each cluster */
    int64_t *counts;    /* (k,) */
    int32_t *found;     /* (n,) labels of this pass */
    float *tiles;       /* (n / TILE, d, TILE) the points, TILE side by side */
    float *norms;       /* (n,) 2 |x|, rounded up */
    float *packed;      /* blocks of (d, width) centres */
    float *squares32;   /* (k,) */
    float *center_norms; /* (k,) |c|, rounded up */
    float *slacks;      /* (k,) the error of a score is at most slack * (2 |x| + |c|) */
} ebc_km_problem;

/* The exact product of two rows of integers; the order does not matter. */
static inline double ebc_km_dot(const double *a, const double *b, int64_t d)
{
    const int64_t step = EBC_KM_LANES / 2;
    ebc_km_doubles even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * step <= d; i += 2 * step) {
        even += *(const ebc_km_doubles *)(a + i) * *(const ebc_km_doubles *)(b + i);
        odd += *(const ebc_km_doubles *)(a + i + step) * *(const ebc_km_doubles *)(b + i + step);
    }
    double total = 0.0;
    even += odd;
    for (int64_t lane = 0; lane < step; lane++)
        total += even[lane];
    for (; i < d; i++)
        total += a[i] * b[i];
    return total;
}

static inline int32_t ebc_km_nearest_exactly(const ebc_km_problem *p, int64_t point)
{
    int32_t nearest = 0;
    double least = INFINITY;
    for (int64_t j = 0; j < p->k; j++) {
        const double dot = ebc_km_dot(p->grid + point * p->d, p->centres + j * p->d, p->d);
        const double score = p->squares[j] - 2.0 * dot;
        if (score < least) {
            least = score;
            nearest = (int32_t)j;
        }
    }
    return nearest;
}

static inline int64_t ebc_km_tiles(int64_t n) { return (n + EBC_KM_TILE - 1) / EBC_KM_TILE; }

/* How many centres the block from `first` on takes: all blocks nearly the same. */
static inline int64_t ebc_km_width(int64_t first, int64_t k)
{
    const int64_t left = k - first, blocks = (left + EBC_KM_BLOCK - 1) / EBC_KM_BLOCK;
    return (left + blocks - 1) / blocks;
}

static inline void ebc_km_pack_points(ebc_km_problem *p)
{
    for (int64_t point = 0; point < p->n; point++) {
        const double *row = p->grid + point * p->d;
        float *lane = p->tiles + point / EBC_KM_TILE * p->d * EBC_KM_TILE + point % EBC_KM_TILE;
        int differs = 0;
        for (int64_t i = 0; i < p->d; i++) {
            lane[i * EBC_KM_TILE] = (float)row[i];
            differs |= (double)(float)row[i] != row[i];
        }
        p->exact_only |= differs;
        p->norms[point] = (float)(2.000001 * sqrt(ebc_km_dot(row, row, p->d)));
    }
}

/* With u = 2^-24 a float32 score is wrong by less than u ((d + 2) 2|x||c| + 2.1 |c|^2) 1.01 while du < 0.005;
 * the slack has room for its own rounding and for that of the comparison. */
static inline void ebc_km_pack_centres(ebc_km_problem *p)
{
    const int64_t d = p->d;
    for (int64_t j = 0; j < p->k; j++) {
        const double *centre = p->centres + j * d;
        p->squares[j] = ebc_km_dot(centre, centre, d);
        p->squares32[j] = (float)p->squares[j];
        p->center_norms[j] = (float)(1.000001 * sqrt(p->squares[j]));
        p->slacks[j] = (float)(1.02 * (double)(d + 8) * 0x1p-24 * (double)p->center_norms[j]);
    }
    for (int64_t first = 0, width; first < p->k; first += width) {
        width = ebc_km_width(first, p->k);
        for (int64_t i = 0; i < d; i++)
            for (int64_t b = 0; b < width; b++)
                p->packed[first * d + i * width + b] = (float)p->centres[(first + b) * d + i];
    }
}

/* sums[b] = x . c_b for `width` centres, a constant after inlining, so that all sums stay in registers. */
static inline __attribute__((always_inline)) void ebc_km_multiply(
    const int width, const float *tile, const float *packed, int64_t d, ebc_km_floats sums[][2])
{
    const ebc_km_floats zero = {0};
    ebc_km_floats total[EBC_KM_BLOCK][2];
#pragma GCC unroll 6
    for (int b = 0; b < width; b++)
        total[b][0] = total[b][1] = zero;
    for (int64_t i = 0; i < d; i++) {
        const ebc_km_floats left = *(const ebc_km_floats *)(tile + i * EBC_KM_TILE);
        const ebc_km_floats right = *(const ebc_km_floats *)(tile + i * EBC_KM_TILE + EBC_KM_LANES);
#pragma GCC unroll 6
        for (int b = 0; b < width; b++) {
            total[b][0] += left * packed[i * width + b];
            total[b][1] += right * packed[i * width + b];
        }
    }
#pragma GCC unroll 6
    for (int b = 0; b < width; b++) {
        sums[b][0] = total[b][0];
        sums[b][1] = total[b][1];
    }
}

static inline void ebc_km_products(
    int64_t width, const float *tile, const float *packed, int64_t d, ebc_km_floats sums[][2])
{
    switch (width) {
    case 1: ebc_km_multiply(1, tile, packed, d, sums); break;
    case 2: ebc_km_multiply(2, tile, packed, d, sums); break;
    case 3: ebc_km_multiply(3, tile, packed, d, sums); break;
    case 4: ebc_km_multiply(4, tile, packed, d, sums); break;
    case 5: ebc_km_multiply(5, tile, packed, d, sums); break;
    default: ebc_km_multiply(6, tile, packed, d, sums);
    }
}

/* mask ? yes : no, lane by lane (C has no ?: for vectors) */
#define ebc_km_select(mask, yes, no) \
    ((ebc_km_floats)(((ebc_km_ints)(yes) & (mask)) | ((ebc_km_ints)(no) & ~(mask))))

/* The nearest centre of each point of a tile, and whether the errors could have made it another. */
static inline void ebc_km_label_tile(const ebc_km_problem *p, int64_t tile, int32_t *label, int32_t *unsure)
{
    const float *points = p->tiles + tile * p->d * EBC_KM_TILE;
    const ebc_km_floats zero = {0};
    const ebc_km_ints none = {0};
    ebc_km_floats sums[EBC_KM_BLOCK][2];
    ebc_km_floats least[2], error[2], others[2], norm[2];
    ebc_km_ints nearest[2];
    for (int side = 0; side < 2; side++) {
        norm[side] = *(const ebc_km_floats *)(p->norms + tile * EBC_KM_TILE + side * EBC_KM_LANES);
        others[side] = least[side] = zero + INFINITY;
        error[side] = zero;
        nearest[side] = none;
    }
    for (int64_t first = 0, width; first < p->k; first += width) {
        width = ebc_km_width(first, p->k);
        ebc_km_products(width, points, p->packed + first * p->d, p->d, sums);
        for (int64_t j = first; j < first + width; j++) {
            for (int side = 0; side < 2; side++) {
                const ebc_km_floats score = p->squares32[j] - 2.0f * sums[j - first][side];
                const ebc_km_floats bound = p->slacks[j] * (norm[side] + p->center_norms[j]);
                const ebc_km_ints nearer = score < least[side];
                /* the loser of the two: the most that its true score can lie below its own */
                const ebc_km_floats low = ebc_km_select(nearer, least[side] - error[side], score - bound);
                others[side] = ebc_km_select(low < others[side], low, others[side]);
                least[side] = ebc_km_select(nearer, score, least[side]);
                error[side] = ebc_km_select(nearer, bound, error[side]);
                nearest[side] = ((none + (int32_t)j) & nearer) | (nearest[side] & ~nearer);
            }
        }
    }
    for (int side = 0; side < 2; side++) {
        const ebc_km_ints sure = others[side] > least[side] + error[side];
        memcpy(label + side * EBC_KM_LANES, &nearest[side], sizeof sure);
        memcpy(unsure + side * EBC_KM_LANES, &sure, sizeof sure);
    }
    for (int lane = 0; lane < EBC_KM_TILE; lane++)
        unsure[lane] = !unsure[lane];
}

static int64_t ebc_km_label(const Work *work, int64_t first, int64_t last)
{
    const ebc_km_problem *p = work->problem;
    int32_t label[EBC_KM_TILE], unsure[EBC_KM_TILE];
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t from = tile * EBC_KM_TILE;
        const int64_t left = p->n - from, points = left < EBC_KM_TILE ? left : EBC_KM_TILE;
        if (!p->exact_only)
            ebc_km_label_tile(p, tile, label, unsure);
        for (int64_t lane = 0; lane < points; lane++) {
            const int exactly = p->exact_only || unsure[lane];
            p->found[from + lane] = exactly ? ebc_km_nearest_exactly(p, from + lane) : label[lane];
        }
    }
    return FINE;
}

/* Labels of all points into `found`. Threads share nothing they write, so their number changes nothing. */
static inline void ebc_km_label_all(ebc_km_problem *p, int32_t threads)
{
    const double products = (double)p->n * (double)p->d * (double)p->k;
    const Work work = {.problem = p};
    ebc_km_pack_centres(p);
    in_parallel(threads, ebc_km_tiles(p->n), (int64_t)(products / EBC_KM_PRODUCTS), ebc_km_label, &work);
}

static inline void ebc_km_add(ebc_km_problem *p, int64_t point, int64_t cluster, double sign)
{
    const double *row = p->grid + point * p->d;
    double *sum = p->sums + cluster * p->d;
    for (int64_t i = 0; i < p->d; i++)
        sum[i] += sign * row[i];
    p->counts[cluster] += (int64_t)sign;
}

/* Takes over the labels found and returns how many points changed theirs (-1 before the first pass). */
static inline int64_t ebc_km_move(ebc_km_problem *p, int32_t *labels)
{
    int64_t moved = 0;
    for (int64_t point = 0; point < p->n; point++) {
        if (p->found[point] == labels[point])
            continue;
        if (labels[point] >= 0)
            ebc_km_add(p, point, labels[point], -1.0);
        ebc_km_add(p, point, p->found[point], 1.0);
        labels[point] = p->found[point];
        moved++;
    }
    return moved;
}

/* The point farthest from its own centre in a cluster of more than one, lowest index on ties. */
static inline int64_t ebc_km_farthest(const ebc_km_problem *p, const int32_t *labels, const double *distances)
{
    int64_t farthest = 0;
    double most = -1.0;
    for (int64_t point = 0; point < p->n; point++) {
        if (distances[point] > most && p->counts[labels[point]] > 1) {
            most = distances[point];
            farthest = point;
        }
    }
    return farthest;
}

/* Gives each empty cluster a point, in order; `given[j]` is cluster j's, -1 for the others. */
static inline void ebc_km_fill(ebc_km_problem *p, const int32_t *labels, double *distances, int64_t *given)
{
    for (int64_t point = 0; point < p->n; point++) {
        const double *row = p->grid + point * p->d, *centre = p->centres + labels[point] * p->d;
        const double product = ebc_km_dot(row, centre, p->d);
        distances[point] = ebc_km_dot(row, row, p->d) - 2.0 * product + p->squares[labels[point]];
    }
    for (int64_t j = 0; j < p->k; j++) {
        if (p->counts[j] > 0)
            continue;
        const int64_t point = ebc_km_farthest(p, labels, distances);
        ebc_km_add(p, point, labels[point], -1.0);
        ebc_km_add(p, point, j, 1.0);
        given[j] = point;
        distances[point] = -2.0; /* it is alone now and cannot be given again */
    }
}

/* centres = rint(sum / count). Labels stay as found: points given to empty clusters go back afterwards. */
static inline void ebc_km_update(ebc_km_problem *p, const int32_t *labels, double *distances, int64_t *given)
{
    int64_t empty = 0;
    for (int64_t j = 0; j < p->k; j++) {
        given[j] = -1;
        empty += p->counts[j] == 0;
    }
    if (empty > 0)
        ebc_km_fill(p, labels, distances, given);
    for (int64_t j = 0; j < p->k; j++)
        for (int64_t i = 0; i < p->d; i++)
            p->centres[j * p->d + i] = rint(p->sums[j * p->d + i] / (double)p->counts[j]) + 0.0;
    for (int64_t j = 0; j < p->k; j++) {
        if (given[j] < 0)
            continue;
        ebc_km_add(p, given[j], j, -1.0);
        ebc_km_add(p, given[j], labels[given[j]], 1.0);
    }
}

/* A part of one allocation, on a boundary of 64 bytes; with no memory yet it only counts. */
static inline void *ebc_km_part(char *memory, int64_t *used, int64_t bytes)
{
    char *part = memory ? memory + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return part;
}

static inline int64_t ebc_km_layout(ebc_km_problem *p, char *memory, double **distances, int64_t **given)
{
    const int64_t n = p->n, d = p->d, k = p->k, padded = ebc_km_tiles(n) * EBC_KM_TILE;
    int64_t used = 0;
    p->tiles = (float *)ebc_km_part(memory, &used, padded * d * 4);
    p->norms = (float *)ebc_km_part(memory, &used, padded * 4);
    p->found = (int32_t *)ebc_km_part(memory, &used, n * 4);
    p->squares = (double *)ebc_km_part(memory, &used, k * 8);
    p->sums = (double *)ebc_km_part(memory, &used, k * d * 8);
    p->counts = (int64_t *)ebc_km_part(memory, &used, k * 8);
    p->packed = (float *)ebc_km_part(memory, &used, k * d * 4);
    p->squares32 = (float *)ebc_km_part(memory, &used, k * 4);
    p->center_norms = (float *)ebc_km_part(memory, &used, k * 4);
    p->slacks = (float *)ebc_km_part(memory, &used, k * 4);
    *distances = (double *)ebc_km_part(memory, &used, n * 8);
    *given = (int64_t *)ebc_km_part(memory, &used, k * 8);
    return used;
}

/* grid (n, d) and centres (k, d): integers as float64, row-major, |value| at most 2^b of docs/lowbit.md.
 * `centres` holds the start and takes the result, `labels` (n,) the label of each point for these centres.
 * Returns the passes, the last one included, or -1 where there is no memory. Expects 1 <= k <= n, 1 <= d and
 * 1 <= max_iter. `threads` changes the time alone. */
int64_t ebc_kmeans(const double *grid, int64_t n, int64_t d, double *centres, int64_t k, int64_t max_iter,
                   int32_t *labels, int32_t threads)
{
    ebc_km_problem p;
    double *distances;
    int64_t *given;
    memset(&p, 0, sizeof p);
    p.grid = grid;
    p.centres = centres;
    p.n = n;
    p.d = d;
    p.k = k;
    p.exact_only = d > EBC_KM_MOST_FEATURES;
    const int64_t bytes = ebc_km_layout(&p, NULL, &distances, &given);
    char *memory = (char *)aligned_alloc(64, (size_t)bytes);
    if (!memory)
        return -1;
    ebc_km_layout(&p, memory, &distances, &given);
    const int64_t last_tile = (ebc_km_tiles(n) - 1) * EBC_KM_TILE;
    memset(p.tiles + last_tile * d, 0, (size_t)(EBC_KM_TILE * d * 4));
    memset(p.norms + last_tile, 0, EBC_KM_TILE * 4);
    memset(p.sums, 0, (size_t)(k * d * 8));
    memset(p.counts, 0, (size_t)(k * 8));
    for (int64_t point = 0; point < n; point++)
        labels[point] = -1;
    ebc_km_pack_points(&p);
    int64_t passes = 0;
    while (passes < max_iter) {
        passes++;
        ebc_km_label_all(&p, threads);
        if (ebc_km_move(&p, labels) == 0) {
            free(memory);
            return passes;
        }
        ebc_km_update(&p, labels, distances, given);
    }
    ebc_km_label_all(&p, threads); /* the centres moved after the last pass */
    memcpy(labels, p.found, (size_t)n * 4);
    free(memory);
    return passes;
}

#endif
