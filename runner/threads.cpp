#include "threads.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "quiet.h"

// The wheel has these in libexecutorch_threadpool.so, and no header that says so: as in runtime/packed.py, the names
// are those of the pinned version, and a build with another one ends at the linker.
namespace executorch::extension::threadpool {
class ThreadPool {
  public:
    size_t get_thread_count() const;
    bool _unsafe_reset_threadpool(uint32_t new_thread_count);  // NOLINT: the runtime's name
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace dreamedge {
namespace {

constexpr int64_t MOST = 1024;

std::optional<std::string> read(const std::filesystem::path& file) {
    std::ifstream opened(file);
    std::string text;
    if (!std::getline(opened, text)) return std::nullopt;
    return text;
}

// Processors' worth of time in one folder of a control group, of version 2 (cpu.max) or 1.
std::optional<double> quota(const std::filesystem::path& folder, bool is_first_version) {
    const std::vector<const char*> names =
        is_first_version ? std::vector{"cpu.cfs_quota_us", "cpu.cfs_period_us"} : std::vector{"cpu.max"};
    std::string all;
    for (const char* name : names) all += read(folder / name).value_or("") + " ";
    std::istringstream words(all);
    double used = 0, period = 0;
    if (!(words >> used >> period) || used < 0 || period <= 0) return std::nullopt;
    return used / period;
}

}  // namespace

int64_t available() {
    double n = std::max(1U, std::thread::hardware_concurrency());
    cpu_set_t mask;
    CPU_ZERO(&mask);
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) n = CPU_COUNT(&mask);
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
        const std::filesystem::path mount = std::filesystem::path("/sys/fs/cgroup") / controllers;
        // In a container the name may be the host's; its own group is then at the mount.
        for (auto name = std::filesystem::path(line.substr(second + 1)).relative_path();; name = name.parent_path()) {
            n = std::min(n, quota(mount / name, !controllers.empty()).value_or(n));
            if (name.empty()) break;
        }
    }
    const auto whole = static_cast<int64_t>(n);
    return std::max<int64_t>(1, whole + (static_cast<double>(whole) < n));
}

int64_t use_threads(std::optional<int64_t> threads) {
    if (threads && (*threads < 1 || *threads > MOST)) {
        usage_error("threads " + std::to_string(*threads) + ": must be from 1 to " + std::to_string(MOST));
    }
    const Quiet quiet;  // the first time it looks at the processor, and says so
    auto* pool = executorch::extension::threadpool::get_threadpool();
    const auto now = static_cast<int64_t>(pool->get_thread_count());
    const int64_t wanted = threads.value_or(std::min(now, available()));
    if (wanted != now) pool->_unsafe_reset_threadpool(static_cast<uint32_t>(wanted));
    return static_cast<int64_t>(pool->get_thread_count());
}

}  // namespace dreamedge
