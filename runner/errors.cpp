#include "errors.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace dreamedge {

void usage_error(const std::string& message) { throw Error(Exit::usage, message); }

void artifact_error(const std::string& message) { throw Error(Exit::artifact, message); }

std::string one_line(std::string_view text, size_t longest) {
    std::string line;
    for (char c : text) {
        if (const auto byte = static_cast<unsigned char>(c); byte >= 0x20 && byte != 0x7f) {
            line += c;
            continue;
        }
        std::array<char, 8> escaped{};
        std::snprintf(escaped.data(), escaped.size(), "\\x%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
        line += c == '\n' ? "\\n" : c == '\t' ? "\\t" : c == '\r' ? "\\r" : escaped.data();
    }
    if (line.size() <= longest) return line;
    while (longest > 0 && (static_cast<unsigned char>(line[longest]) & 0xc0) == 0x80) --longest;  // no half character
    return line.substr(0, longest) + "…";
}

std::string in_quotes(std::string_view text, size_t longest) { return "'" + one_line(text, longest) + "'"; }

std::string number(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
    std::array<char, 40> digits{};
    // The shortest digits that are this number. Python writes exponents from 1e16 on and below 1e-4.
    const double size = std::abs(value);
    const auto format =
        size != 0 && (size >= 1e16 || size < 1e-4) ? std::chars_format::scientific : std::chars_format::fixed;
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value, format).ptr;
    std::string written(digits.data(), end);
    const bool is_whole = format == std::chars_format::fixed && written.find('.') == std::string::npos;
    return is_whole ? written + ".0" : written;
}

}  // namespace dreamedge
