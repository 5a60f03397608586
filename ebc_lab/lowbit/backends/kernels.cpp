// The low-bit operations on several threads: the blocks of blocks.h, a range of blocks or of groups a thread.
// The interface, and what it gives, are those of kernels.c.
//
// - What threads give is joined by exact integers, by halves or by the lowest index, never in order of arrival:
//   the bits do not depend on their number.
// - No exception leaves this file, and a thread that cannot be started leaves its share to the caller's.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "blocks.h"
#include "kmeans.h"

namespace {

constexpr int64_t share = int64_t{1} << 16; // values below which a thread costs more than it saves

// Calls work(first, last) on consecutive ranges of [0, count), one a thread; `size` is the number of values.
template <class Work> void in_parallel(int32_t threads, int64_t count, int64_t size, const Work &work)
{
    const int64_t parts = std::max<int64_t>(1, std::min({int64_t{threads}, count, size / share}));
    std::vector<std::thread> crew;
    int64_t begun = 1;
    try {
        for (; begun < parts; ++begun)
            crew.emplace_back(
                [&work, begun, count, parts] { work(count * begun / parts, count * (begun + 1) / parts); });
    } catch (const std::exception &) { // no more threads: the rest is done here
    }
    work(0, count / parts);
    if (begun < parts) work(count * begun / parts, count);
    for (std::thread &one : crew) one.join();
}

void keep_least(std::atomic<int64_t> &least, int64_t index)
{
    int64_t seen = least.load();
    while (index < seen && !least.compare_exchange_weak(seen, index)) {
    }
}

int mean_step(const float *x, int64_t n, double *sums, int32_t threads, float &step)
{
    const int64_t blocks = (n + MEAN_BLOCK - 1) / MEAN_BLOCK;
    std::atomic<bool> finite{true};
    in_parallel(threads, blocks, n, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
            const float *block = x + b * MEAN_BLOCK;
            const int64_t length = least(MEAN_BLOCK, n - b * MEAN_BLOCK);
            const uint32_t most = largest(block, length);
            if (most >= INFINITE) {
                finite = false;
                return;
            }
            prefetch(x, (b + 1) * MEAN_BLOCK, n);
            sums[b] = block_sum(block, length, most);
        }
    });
    if (!finite) return NOT_FINITE;
    step = static_cast<float>(halved(sums, blocks) / static_cast<double>(n));
    return DONE;
}

int max_step(const float *x, int64_t n, int top, int32_t threads, float &step)
{
    std::atomic<int64_t> negated{0}; // the bits of the largest magnitude
    in_parallel(threads, n, n, [&](int64_t first, int64_t last) {
        keep_least(negated, -static_cast<int64_t>(largest(x + first, last - first)));
    });
    const auto most = static_cast<uint32_t>(-negated.load());
    if (most >= INFINITE) return NOT_FINITE;
    step = float_of(most) / static_cast<float>(top);
    return DONE;
}

// A step that was given was found on nothing, so here it shows whether all is finite.
int codes_and_values(const float *x, int64_t n, float step, int top, bool check, int32_t threads,
                     int8_t *codes, float *values)
{
    std::atomic<bool> finite{true};
    in_parallel(threads, n, n, [&](int64_t first, int64_t last) {
        for (int64_t start = first; start < last && finite; start += MEAN_BLOCK) {
            const int64_t length = least(MEAN_BLOCK, last - start);
            if (check && largest(x + start, length) >= INFINITE) finite = false;
            if (check) prefetch(x, start + length, n);
            if (codes != nullptr) codes_of(x + start, length, step, top, codes + start);
            if (values != nullptr) values_of(x + start, length, step, top, values + start);
        }
    });
    return finite ? DONE : NOT_FINITE;
}

int quantize_group(const float *x, int64_t n, int top, int scale, double *sums, int32_t threads, float &step,
                   int8_t *codes, float *values)
{
    int outcome = DONE;
    if (scale == ABSMEAN) outcome = mean_step(x, n, sums, threads, step);
    if (scale == ABSMAX) outcome = max_step(x, n, top, threads, step);
    if (outcome == DONE) outcome = codes_and_values(x, n, step, top, scale == GIVEN, threads, codes, values);
    if (outcome == DONE || codes != nullptr) return outcome;
    step = std::numeric_limits<float>::quiet_NaN();
    if (values != nullptr) std::fill(values, values + n, step);
    return DONE;
}

constexpr int64_t none = std::numeric_limits<int64_t>::max();

// Gives each block's codes to `take(codes, start, count)`. Returns -1, or the index of the first byte that
// holds none.
template <class Take>
int64_t unpack(const uint8_t *bytes, int64_t n, int top, int32_t threads, const Take &take)
{
    const int64_t block = planes_of(top) * WIDTH;
    std::atomic<int64_t> wrong{none};
    in_parallel(threads, (n + block - 1) / block, n, [&](int64_t first, int64_t last) {
        int8_t codes[MOST_CODES];
        for (int64_t start = first * block; start < least(last * block, n); start += block) {
            if (!unpack_block(bytes, start, n, top, codes))
                return keep_least(wrong, no_code(bytes, start, n, top));
            take(codes, start, least(block, n - start));
        }
    });
    return wrong == none ? -1 : wrong.load();
}

} // namespace

extern "C" {

int64_t ebc_quantize(const float *x, int64_t rows, int64_t columns, int64_t group, int32_t top, int32_t scale,
                     float *steps, int8_t *codes, float *values, int32_t threads)
{
    if (rows * columns == 0) return DONE;
    group = least(group, columns);
    const int64_t in_row = (columns + group - 1) / group;
    const int64_t groups = rows * in_row;
    std::atomic<int64_t> outcome{DONE};
    in_parallel(groups > 1 ? threads : 1, groups, rows * columns, [&](int64_t first, int64_t last) {
        const std::unique_ptr<double[]> sums(new (std::nothrow) double[group / MEAN_BLOCK + 1]);
        if (sums == nullptr) outcome = NO_MEMORY;
        for (int64_t g = first; g < last && outcome == DONE; ++g) {
            const int64_t column = g % in_row * group;
            const int64_t start = g / in_row * columns + column;
            const int here = quantize_group(x + start, least(group, columns - column), top, scale, sums.get(),
                                            groups > 1 ? 1 : threads, steps[g],
                                            codes == nullptr ? nullptr : codes + start,
                                            values == nullptr ? nullptr : values + start);
            if (here != DONE) outcome = here;
        }
    });
    return outcome;
}

void ebc_decode(const int8_t *codes, int64_t rows, int64_t columns, int64_t group, const float *steps,
                float *values, int32_t threads)
{
    const int64_t n = rows * columns;
    if (n == 0) return;
    in_parallel(threads, n, n, [&](int64_t first, int64_t last) {
        decoded_span(codes + first, first, last - first, columns, least(group, columns), steps,
                     values + first);
    });
}

int64_t ebc_stochastic(const float *x, int64_t n, int32_t top, float step, uint32_t key, int8_t *codes,
                       int32_t threads)
{
    std::atomic<int64_t> outcome{DONE};
    in_parallel(threads, (n + MEAN_BLOCK - 1) / MEAN_BLOCK, n, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last && outcome == DONE; ++b) {
            const int64_t start = b * MEAN_BLOCK;
            const int64_t length = least(MEAN_BLOCK, n - start);
            if (largest(x + start, length) >= INFINITE)
                outcome = NOT_FINITE;
            else
                drawn(x + start, start, length, top, step, key, codes + start);
        }
    });
    return outcome;
}

int64_t ebc_pack(const int8_t *codes, int64_t n, int32_t top, uint8_t *bytes, int32_t threads)
{
    const int64_t block = planes_of(top) * WIDTH;
    std::atomic<int64_t> wrong{none};
    in_parallel(threads, (n + block - 1) / block, n, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
            const int8_t *from = codes + b * block;
            const int64_t count = least(block, n - b * block);
            if (pack_block(from, count, top, bytes + b * bytes_of(top) * WIDTH) <= 2 * top) continue;
            const auto beyond = [top](int8_t code) { return code < -top || code > top; };
            return keep_least(wrong, std::find_if(from, from + count, beyond) - codes);
        }
    });
    return wrong == none ? -1 : wrong.load();
}

int64_t ebc_unpack(const uint8_t *bytes, int64_t n, int32_t top, int8_t *codes, int32_t threads)
{
    return unpack(bytes, n, top, threads, [codes](const int8_t *from, int64_t start, int64_t count) {
        std::memcpy(codes + start, from, static_cast<size_t>(count));
    });
}

int64_t ebc_unpack_values(const uint8_t *bytes, int64_t rows, int64_t columns, int64_t group, int32_t top,
                          const float *steps, float *values, int32_t threads)
{
    return unpack(bytes, rows * columns, top, threads, [=](const int8_t *from, int64_t start, int64_t count) {
        decoded_span(from, start, count, columns, least(group, columns), steps, values + start);
    });
}

int64_t ebc_kmeans(const double *grid, int64_t n, int64_t d, double *centres, int64_t k, int64_t max_iter,
                   int32_t *labels, int32_t threads)
{
    return ebc_kmeans_lloyd(grid, n, d, centres, k, max_iter, labels, threads);
}

} // extern "C"
