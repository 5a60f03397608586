// The low-bit operations in C++: templates over the levels, on several threads. The maths is in
// docs/lowbit.md; the interface and the rules that keep the bits are those of kernels.c. Only k-means is
// shared with it, so that each checks the other.
//
// - A thread takes a range of blocks or of groups. What they give is joined by exact integers, by halves
//   or by the lowest index, never in order of arrival: the bits do not depend on the number of threads.
// - No exception leaves this file, and a thread that cannot be started leaves its share to the caller's.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "kmeans.h"

namespace {

constexpr int64_t mean_block = 4096;        // values whose magnitudes are summed as integers of one scale
constexpr int64_t far = int64_t{1} << 21;   // values from which on they come from memory, not from a cache
constexpr int64_t width = 64;               // bytes of a plane of a whole packed block
constexpr int64_t share = int64_t{1} << 16; // values below which a thread costs more than it saves
constexpr uint32_t infinite = 0x7F800000u;  // the bits of infinity: those of NaN are larger

enum Scale : int32_t { absmean = 0, absmax = 1, given = 2 };
enum Outcome : int64_t { done = 0, not_finite = 1, no_memory = -1 };

template <int Top> struct Levels;
template <> struct Levels<1> {
    static constexpr int64_t planes = 5, bytes = 1, largest = 242;
};
template <> struct Levels<2> {
    static constexpr int64_t planes = 24, bytes = 7, largest = 124;
};
template <int Top> constexpr int64_t block_codes = Levels<Top>::planes * width;

template <class To, class From> inline To same_bits(From from)
{
    static_assert(sizeof(To) == sizeof(From), "bits are copied one to one");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

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

// Calls the values from `start` on from memory while those before them are at work; a few of them are in the
// cache already.
inline void prefetch(const float *x, int64_t start, int64_t n)
{
    if (n < far) return;
    const int64_t end = std::min(start + mean_block, n);
    for (int64_t i = start; i < end; i += 16) __builtin_prefetch(x + i);
}

// -- steps --------------------------------------------------------------------------------------------------

uint32_t largest_bits(const float *__restrict x, int64_t n)
{
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, same_bits<uint32_t>(x[i]) & 0x7FFFFFFFu);
    return most;
}

double block_sum(const float *__restrict x, int64_t n, uint32_t most)
{
    const int exponent = static_cast<int>(most >> 23) - 126;
    if (exponent < -89) return 0.0; // below 2^-90
    const float scale = same_bits<float>(static_cast<uint32_t>(157 - exponent) << 23);
    const auto counted = [scale](float value) {
        return static_cast<uint32_t>(static_cast<int32_t>(std::rint(std::fabs(value) * scale)));
    };
    uint64_t sum = 0;
    const int64_t half = n / 2; // two counts are below 2^31: a half of the sums is widened
    for (int64_t i = 0; i < half; ++i) sum += counted(x[i]) + counted(x[half + i]);
    if (n % 2 == 1) sum += counted(x[n - 1]);
    return std::ldexp(static_cast<double>(sum), exponent - 30);
}

double add_by_halves(double *t, int64_t count)
{
    int64_t half = 1;
    while (half < count) half *= 2;
    for (; half > 1; half /= 2)
        for (int64_t i = half / 2; i < std::min(count, half); ++i) t[i - half / 2] += t[i];
    return t[0];
}

Outcome mean_step(const float *x, int64_t n, double *sums, int32_t threads, float &step)
{
    const int64_t blocks = (n + mean_block - 1) / mean_block;
    std::atomic<bool> finite{true};
    in_parallel(threads, blocks, n, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
            const float *block = x + b * mean_block;
            const int64_t length = std::min(mean_block, n - b * mean_block);
            const uint32_t most = largest_bits(block, length);
            if (most >= infinite) {
                finite = false;
                return;
            }
            prefetch(x, (b + 1) * mean_block, n);
            sums[b] = block_sum(block, length, most);
        }
    });
    if (!finite) return not_finite;
    step = static_cast<float>(add_by_halves(sums, blocks) / static_cast<double>(n));
    return done;
}

template <int Top> Outcome max_step(const float *x, int64_t n, int32_t threads, float &step)
{
    std::atomic<int64_t> least{0}; // the negated bits of the largest magnitude
    in_parallel(threads, n, n, [&](int64_t first, int64_t last) {
        keep_least(least, -static_cast<int64_t>(largest_bits(x + first, last - first)));
    });
    const auto most = static_cast<uint32_t>(-least.load());
    if (most >= infinite) return not_finite;
    step = same_bits<float>(most) / static_cast<float>(Top);
    return done;
}

// -- codes and values ---------------------------------------------------------------------------------------

template <int Top> struct Thresholds {
    float first, second;
    explicit Thresholds(float step) // none is beyond infinity: a step of 0 has no codes but 0
        : first(step > 0.0f ? 0.5f * step : std::numeric_limits<float>::infinity()),
          second(step > 0.0f && Top > 1 ? 1.5f * step : std::numeric_limits<float>::infinity())
    {
    }
};

inline int8_t with_sign_of(float x, int32_t magnitude)
{
    const int32_t negative = -static_cast<int32_t>(same_bits<uint32_t>(x) >> 31);
    return static_cast<int8_t>((magnitude ^ negative) - negative);
}

template <int Top> void codes_of(const float *__restrict x, int64_t n, float step, int8_t *__restrict codes)
{
    const Thresholds<Top> at(step);
    for (int64_t i = 0; i < n; ++i) {
        const float magnitude = std::fabs(x[i]);
        int32_t code = magnitude > at.first ? 1 : 0;
        if constexpr (Top > 1) code = magnitude >= at.second ? 2 : code;
        codes[i] = with_sign_of(x[i], code);
    }
}

template <int Top> void values_of(const float *__restrict x, int64_t n, float step, float *__restrict values)
{
    const Thresholds<Top> at(step);
    const float twice = 2.0f * step;
    for (int64_t i = 0; i < n; ++i) {
        const float magnitude = std::fabs(x[i]);
        float level = step;
        if constexpr (Top > 1) level = magnitude >= at.second ? twice : step;
        values[i] = magnitude > at.first ? std::copysign(level, x[i]) : 0.0f;
    }
}

// A step that was given was found on nothing, so here it shows whether all is finite.
template <int Top> Outcome codes_and_values(const float *x, int64_t n, float step, bool check,
                                            int32_t threads, int8_t *codes, float *values)
{
    std::atomic<bool> finite{true};
    in_parallel(threads, n, n, [&](int64_t first, int64_t last) {
        for (int64_t start = first; start < last && finite; start += mean_block) {
            const int64_t length = std::min(mean_block, last - start);
            if (check && largest_bits(x + start, length) >= infinite) finite = false;
            if (check) prefetch(x, start + length, n);
            if (codes != nullptr) codes_of<Top>(x + start, length, step, codes + start);
            if (values != nullptr) values_of<Top>(x + start, length, step, values + start);
        }
    });
    return finite ? done : not_finite;
}

template <int Top> Outcome quantize_group(const float *x, int64_t n, Scale scale, double *sums,
                                          int32_t threads, float &step, int8_t *codes, float *values)
{
    Outcome outcome = done;
    if (scale == absmean) outcome = mean_step(x, n, sums, threads, step);
    if (scale == absmax) outcome = max_step<Top>(x, n, threads, step);
    if (outcome == done) outcome = codes_and_values<Top>(x, n, step, scale == given, threads, codes, values);
    if (outcome == done || codes != nullptr) return outcome;
    step = std::numeric_limits<float>::quiet_NaN();
    if (values != nullptr) std::fill(values, values + n, step);
    return done;
}

template <int Top> int64_t quantize(const float *x, int64_t rows, int64_t columns, int64_t group, Scale scale,
                                    float *steps, int8_t *codes, float *values, int32_t threads)
{
    if (rows * columns == 0) return done;
    group = std::min(group, columns);
    const int64_t in_row = (columns + group - 1) / group;
    const int64_t groups = rows * in_row;
    std::atomic<int64_t> outcome{done};
    in_parallel(groups > 1 ? threads : 1, groups, rows * columns, [&](int64_t first, int64_t last) {
        const std::unique_ptr<double[]> sums(new (std::nothrow) double[group / mean_block + 1]);
        if (sums == nullptr) outcome = no_memory;
        for (int64_t g = first; g < last && outcome == done; ++g) {
            const int64_t column = g % in_row * group;
            const int64_t start = g / in_row * columns + column;
            const Outcome here = quantize_group<Top>(x + start, std::min(group, columns - column), scale,
                                                     sums.get(), groups > 1 ? 1 : threads, steps[g],
                                                     codes == nullptr ? nullptr : codes + start,
                                                     values == nullptr ? nullptr : values + start);
            if (here != done) outcome = here;
        }
    });
    return outcome;
}

void decoded(const int8_t *__restrict codes, int64_t n, float step, float *__restrict values)
{
    for (int64_t i = 0; i < n; ++i) values[i] = step * static_cast<float>(codes[i]); // a code of 0 is +0
}

// Values of the codes of elements [start, start + n) of a matrix; `codes` and `values` begin at `start`.
void decoded_span(const int8_t *codes, int64_t start, int64_t n, int64_t columns, int64_t group,
                  const float *steps, float *values)
{
    const int64_t in_row = (columns + group - 1) / group;
    for (int64_t done_of_it = 0; done_of_it < n;) {
        const int64_t row = (start + done_of_it) / columns;
        const int64_t column = (start + done_of_it) % columns;
        const int64_t end = std::min(columns, (column / group + 1) * group);
        const int64_t length = std::min(n - done_of_it, end - column);
        decoded(codes + done_of_it, length, steps[row * in_row + column / group], values + done_of_it);
        done_of_it += length;
    }
}

// -- stochastic codes ---------------------------------------------------------------------------------------

inline uint32_t mix(uint32_t h) // murmur3's finaliser
{
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

template <int Top> void drawn(const float *__restrict x, int64_t start, int64_t n, float step, uint32_t key,
                              int8_t *__restrict codes)
{
    const uint32_t begin = static_cast<uint32_t>(start);
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t hashed = mix((begin + static_cast<uint32_t>(i)) * 0x9E3779B9u + key);
        const float uniform = static_cast<float>(static_cast<int32_t>(hashed >> 8)) * 0x1p-24f;
        const float position = std::min(std::fabs(x[i]) / step, static_cast<float>(Top));
        const float below = std::floor(position);
        codes[i] = with_sign_of(x[i], static_cast<int32_t>(below) + (uniform < position - below ? 1 : 0));
    }
}

template <int Top>
int64_t stochastic(const float *x, int64_t n, float step, uint32_t key, int8_t *codes, int32_t threads)
{
    std::atomic<int64_t> outcome{done};
    in_parallel(threads, (n + mean_block - 1) / mean_block, n, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last && outcome == done; ++b) {
            const int64_t start = b * mean_block;
            const int64_t length = std::min(mean_block, n - start);
            if (largest_bits(x + start, length) >= infinite)
                outcome = not_finite;
            else
                drawn<Top>(x + start, start, length, step, key, codes + start);
        }
    });
    return outcome;
}

// -- packing ------------------------------------------------------------------------------------------------

// Each packs or unpacks one block whose planes are `w` wide, and returns the largest digit or value in it.
inline uint8_t pack_planes(Levels<1>, const int8_t *__restrict c, int64_t w, uint8_t *__restrict bytes)
{
    uint8_t most = 0;
    for (int64_t i = 0; i < w; ++i) {
        unsigned byte = 0;
        for (int j = 4; j >= 0; --j) {
            const auto digit = static_cast<uint8_t>(c[j * w + i] + 1);
            most = std::max(most, digit);
            byte = static_cast<uint8_t>(3 * byte + digit);
        }
        bytes[i] = static_cast<uint8_t>(byte);
    }
    return most;
}

inline uint8_t pack_planes(Levels<2>, const int8_t *__restrict c, int64_t w, uint8_t *__restrict bytes)
{
    uint8_t most = 0;
    uint8_t v[8][width];
    for (int m = 0; m < 8; ++m) {
        for (int64_t i = 0; i < w; ++i) {
            uint8_t digit[3];
            for (int j = 0; j < 3; ++j) {
                digit[j] = static_cast<uint8_t>(c[(3 * m + j) * w + i] + 2);
                most = std::max(most, digit[j]);
            }
            v[m][i] = static_cast<uint8_t>(digit[0] + 5 * digit[1] + 25 * digit[2]);
        }
    }
    for (int m = 0; m < 7; ++m)
        for (int64_t i = 0; i < w; ++i)
            bytes[m * w + i] = static_cast<uint8_t>(v[m][i] | ((v[7][i] & (1 << m)) ? 128 : 0));
    return most;
}

// 171/512 and 205/1024 stand for a third and a fifth: exact for a byte.
inline uint8_t unpack_planes(Levels<1>, const uint8_t *__restrict bytes, int64_t w, int8_t *__restrict c)
{
    uint8_t most = 0;
    for (int64_t i = 0; i < w; ++i) {
        uint8_t rest = bytes[i];
        most = std::max(most, rest);
        for (int j = 0; j < 5; ++j) {
            const auto third = static_cast<uint8_t>(static_cast<uint16_t>(rest * 171) >> 9);
            c[j * w + i] = static_cast<int8_t>(rest - 3 * third - 1);
            rest = third;
        }
    }
    return most;
}

inline uint8_t unpack_planes(Levels<2>, const uint8_t *__restrict bytes, int64_t w, int8_t *__restrict c)
{
    uint8_t most = 0;
    uint8_t v[8][width] = {};
    for (int m = 0; m < 7; ++m) {
        for (int64_t i = 0; i < w; ++i) {
            v[m][i] = bytes[m * w + i] & 127;
            v[7][i] |= bytes[m * w + i] >= 128 ? static_cast<uint8_t>(1 << m) : 0;
        }
    }
    for (int m = 0; m < 8; ++m) {
        for (int64_t i = 0; i < w; ++i) {
            uint8_t rest = v[m][i];
            most = std::max(most, rest);
            for (int j = 0; j < 3; ++j) {
                const auto fifth = static_cast<uint8_t>(static_cast<uint16_t>(rest * 205) >> 10);
                c[(3 * m + j) * w + i] = static_cast<int8_t>(rest - 5 * fifth - 2);
                rest = fifth;
            }
        }
    }
    return most;
}

// Whole blocks have a width that the compiler knows.
template <int Top> uint8_t pack_block(const int8_t *codes, int64_t count, uint8_t *bytes)
{
    constexpr int64_t planes = Levels<Top>::planes;
    if (count == block_codes<Top>) return pack_planes(Levels<Top>{}, codes, width, bytes);
    int8_t padded[block_codes<Top>] = {}; // missing codes are 0
    std::memcpy(padded, codes, static_cast<size_t>(count));
    return pack_planes(Levels<Top>{}, padded, (count + planes - 1) / planes, bytes);
}

template <int Top> bool unpack_block(const uint8_t *bytes, int64_t count, int8_t *codes)
{
    constexpr int64_t planes = Levels<Top>::planes;
    const uint8_t most = count == block_codes<Top>
                             ? unpack_planes(Levels<Top>{}, bytes, width, codes)
                             : unpack_planes(Levels<Top>{}, bytes, (count + planes - 1) / planes, codes);
    return most <= Levels<Top>::largest;
}

// The first byte of a block that holds no codes; of a value in the high bits, the byte with its lowest bit.
template <int Top> int64_t no_code(const uint8_t *bytes, int64_t count)
{
    const int64_t w = (count + Levels<Top>::planes - 1) / Levels<Top>::planes;
    const int mask = Top == 1 ? 255 : 127;
    for (int64_t i = 0; i < w * Levels<Top>::bytes; ++i)
        if ((bytes[i] & mask) > Levels<Top>::largest) return i;
    for (int64_t i = 0; i < w; ++i) {
        int last = 0;
        for (int m = 0; m < 7; ++m) last += (bytes[m * w + i] >> 7) << m;
        if (last > Levels<Top>::largest) return i;
    }
    return -1;
}

constexpr int64_t none = std::numeric_limits<int64_t>::max();

template <int Top> int64_t pack(const int8_t *codes, int64_t n, uint8_t *bytes, int32_t threads)
{
    constexpr int64_t block = block_codes<Top>;
    std::atomic<int64_t> wrong{none};
    in_parallel(threads, (n + block - 1) / block, n, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
            const int8_t *from = codes + b * block;
            const int64_t count = std::min(block, n - b * block);
            if (pack_block<Top>(from, count, bytes + b * Levels<Top>::bytes * width) <= 2 * Top) continue;
            const auto beyond = [](int8_t code) { return code < -Top || code > Top; };
            return keep_least(wrong, std::find_if(from, from + count, beyond) - codes);
        }
    });
    return wrong == none ? -1 : wrong.load();
}

// Gives each block's codes to `take(codes, start, count)`. Returns -1, or the index of the first byte that
// holds none.
template <int Top, class Take>
int64_t unpack(const uint8_t *bytes, int64_t n, int32_t threads, const Take &take)
{
    constexpr int64_t block = block_codes<Top>;
    std::atomic<int64_t> wrong{none};
    in_parallel(threads, (n + block - 1) / block, n, [&](int64_t first, int64_t last) {
        int8_t codes[block];
        for (int64_t b = first; b < last; ++b) {
            const uint8_t *from = bytes + b * Levels<Top>::bytes * width;
            const int64_t count = std::min(block, n - b * block);
            if (!unpack_block<Top>(from, count, codes))
                return keep_least(wrong, from - bytes + no_code<Top>(from, count));
            take(codes, b * block, count);
        }
    });
    return wrong == none ? -1 : wrong.load();
}

} // namespace

extern "C" {

int64_t ebc_quantize(const float *x, int64_t rows, int64_t columns, int64_t group, int32_t top, int32_t scale,
                     float *steps, int8_t *codes, float *values, int32_t threads)
{
    const auto by = static_cast<Scale>(scale);
    return top == 1 ? quantize<1>(x, rows, columns, group, by, steps, codes, values, threads)
                    : quantize<2>(x, rows, columns, group, by, steps, codes, values, threads);
}

void ebc_decode(const int8_t *codes, int64_t rows, int64_t columns, int64_t group, const float *steps,
                float *values, int32_t threads)
{
    const int64_t n = rows * columns;
    if (n == 0) return;
    in_parallel(threads, n, n, [&](int64_t first, int64_t last) {
        decoded_span(codes + first, first, last - first, columns, std::min(group, columns), steps,
                     values + first);
    });
}

int64_t ebc_stochastic(const float *x, int64_t n, int32_t top, float step, uint32_t key, int8_t *codes,
                       int32_t threads)
{
    return top == 1 ? stochastic<1>(x, n, step, key, codes, threads)
                    : stochastic<2>(x, n, step, key, codes, threads);
}

int64_t ebc_pack(const int8_t *codes, int64_t n, int32_t top, uint8_t *bytes, int32_t threads)
{
    return top == 1 ? pack<1>(codes, n, bytes, threads) : pack<2>(codes, n, bytes, threads);
}

int64_t ebc_unpack(const uint8_t *bytes, int64_t n, int32_t top, int8_t *codes, int32_t threads)
{
    const auto copy = [codes](const int8_t *from, int64_t start, int64_t count) {
        std::memcpy(codes + start, from, static_cast<size_t>(count));
    };
    return top == 1 ? unpack<1>(bytes, n, threads, copy) : unpack<2>(bytes, n, threads, copy);
}

int64_t ebc_unpack_values(const uint8_t *bytes, int64_t rows, int64_t columns, int64_t group, int32_t top,
                          const float *steps, float *values, int32_t threads)
{
    const auto decode = [=](const int8_t *from, int64_t start, int64_t count) {
        decoded_span(from, start, count, columns, std::min(group, columns), steps, values + start);
    };
    const int64_t n = rows * columns;
    return top == 1 ? unpack<1>(bytes, n, threads, decode) : unpack<2>(bytes, n, threads, decode);
}

int64_t ebc_kmeans(const double *grid, int64_t n, int64_t d, double *centres, int64_t k, int64_t max_iter,
                   int32_t *labels, int32_t threads)
{
    return ebc_kmeans_lloyd(grid, n, d, centres, k, max_iter, labels, threads);
}

} // extern "C"
