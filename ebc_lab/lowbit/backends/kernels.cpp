// The low-bit operations on several threads. No exception leaves this file, and a thread that cannot be started
// leaves its share to the caller's.

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "operations.h"

constexpr int64_t share = int64_t{1} << 16; // values below which a thread costs more than it saves

static int64_t in_parallel(int32_t threads, int64_t count, int64_t size, Part *part, const Work *work)
{
    const int64_t parts = std::max<int64_t>(1, std::min({int64_t{threads}, count, size / share}));
    std::vector<std::thread> crew;
    std::atomic<int64_t> outcome{FINE};
    const auto run = [&](int64_t first, int64_t last) {
        const int64_t mine = part(work, first, last);
        int64_t seen = outcome.load();
        while (mine < seen && !outcome.compare_exchange_weak(seen, mine)) {
        }
    };
    int64_t begun = 1;
    try {
        for (; begun < parts; ++begun)
            crew.emplace_back(run, count * begun / parts, count * (begun + 1) / parts);
    } catch (const std::exception &) { // no more threads: the rest is done here
    }
    run(0, count / parts);
    if (begun < parts) run(count * begun / parts, count);
    for (std::thread &one : crew) one.join();
    return outcome;
}
