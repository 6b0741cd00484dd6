#include "memory.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>

namespace dreamedge {
namespace {

int64_t status(const std::string& name) {
    std::ifstream file("/proc/self/status");
    for (std::string line; std::getline(file, line);) {
        if (line.rfind(name + ":", 0) == 0) return 1024 * std::stoll(line.substr(name.size() + 1));
    }
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return 1024 * usage.ru_maxrss;
}

}  // namespace

int64_t peak_rss() { return status("VmHWM"); }

int64_t anonymous() { return status("RssAnon"); }

std::vector<Place> mapped(const std::filesystem::path& file) {
    std::error_code failed;
    const std::string name = " " + std::filesystem::canonical(file, failed).string();
    std::vector<Place> places;
    if (failed) return places;  // it is gone: every place without a file would be taken for one of it
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        if (line.size() < name.size() || line.compare(line.size() - name.size(), name.size(), name) != 0) continue;
        std::istringstream words(line);
        uintptr_t start = 0, end = 0;
        char dash = 0;
        words >> std::hex >> start >> dash >> end;
        // NOLINTNEXTLINE(performance-no-int-to-ptr): as the kernel lists it
        places.push_back({reinterpret_cast<void*>(start), end - start});
    }
    return places;
}

void unpin(const std::vector<Place>& places) {
    for (const Place& place : places) madvise(place.start, place.n_bytes, MADV_DONTNEED);
}

}  // namespace dreamedge
