// The matrices that the XNNPACK delegates of a .pte multiply by, as runtime/delegates.py reads them, and whether the
// runtime can keep what it packs of them.
#pragma once

#include <string>
#include <string_view>

namespace dreamedge {

constexpr const char* BACKEND = "XnnpackBackend";

// Why packed weights of the program cannot be kept: the runtime finds them by the names of weights and bias alone, and
// would take one matrix for another with the same numbers and other scales. Empty where they can.
//
// Throws `std::invalid_argument` for a file that is no such program.
std::string why_not_kept(std::string_view program);

// The first constant whose bytes are not those of its name; empty where all are. Reads all of the program.
std::string changed_constant(std::string_view program);

// Of the program, by its flatbuffer and its delegates, which name all constants by their sha256; and of `more`.
std::string identity(std::string_view program, const std::string& more);

}  // namespace dreamedge
