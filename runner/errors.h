// What a user can cause, and the exit code that says so: those of runtime/errors.py, listed in docs/exit-codes.md.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace dreamedge {

enum class Exit : int {
    done = 0,
    internal = 1,
    usage = 2,
    input = 3,
    artifact = 6,  // damaged, of another version, or with a figure out of its bounds on this device
    output = 7,
    resource = 8,
};

// Ends the run with one line and its exit code.
class Error : public std::runtime_error {
  public:
    Error(Exit code, const std::string& message) : std::runtime_error(message), code(code) {}
    const Exit code;
};

[[noreturn]] void usage_error(const std::string& message);
[[noreturn]] void artifact_error(const std::string& message);

// Text that an artifact may have brought: no line breaks, and nothing that a terminal obeys.
std::string one_line(std::string_view text, size_t longest = 2000);

// As Python writes a text in a message, shortened.
std::string in_quotes(std::string_view text, size_t longest = 30);

// As Python writes it: 0.5, 1e-06, inf.
std::string number(double value);

}  // namespace dreamedge
