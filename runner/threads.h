// The threads that the runtime computes in: one pool for all programs of a process.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace dreamedge {

// Set how many, before any program is opened. Returns how many there are.
//
// threads: nothing for the runtime's own choice, but no more than there are processors for this process. Throws `Error`
// (Exit::usage) for a number that cannot be.
int64_t use_threads(std::optional<int64_t> threads = std::nullopt);

// How many processors this process may use: by its affinity, and by the limits of its control groups.
int64_t available();

}  // namespace dreamedge
