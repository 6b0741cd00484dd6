// The memory of this process, as Linux counts it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

namespace dreamedge {

int64_t peak_rss();   // the high-water mark, bytes
int64_t anonymous();  // resident now, but for pages of mapped files, bytes

// A place in the memory of this process.
struct Place {
    void* start;
    size_t n_bytes;
};

// Where a file is mapped into this process.
std::vector<Place> mapped(const std::filesystem::path& file);

// Drop the pages of a mapped file that are in memory now: what is read again comes back from the file.
void unpin(const std::vector<Place>& places);

}  // namespace dreamedge
