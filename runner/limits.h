// Foreign bytes may crash the runtime, hang it, or ask for all memory: each ends this process with one line.
#pragma once

#include <cstdint>
#include <string>

namespace dreamedge {

// From now on a crash of this process is told as one of `what`, with Exit::artifact; so is a call that hangs
// (`end_in`). Where there is no memory left, that is told with Exit::resource, wherever it happens.
void end_in_words(const std::string& what);

// The time in seconds that this process has until the next of these; 0 for any time.
void end_in(double seconds);

// From now on this process may take no more than so many bytes for data. Throws `Error` where that cannot be set.
void limit_memory(int64_t n_bytes);

}  // namespace dreamedge
