#include "errors.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "unicode.h"

namespace dreamedge {

void usage_error(const std::string& message) { throw Error(Exit::usage, message); }

void artifact_error(const std::string& message) { throw Error(Exit::artifact, message); }

std::string one_line(std::string_view text, size_t longest) {
    std::string line;
    for (size_t at = 0; at < text.size();) {
        const size_t start = at;
        const int32_t c = next_character(text, at);
        if (c >= 0 && is_printable(c)) {
            line += text.substr(start, at - start);
            continue;
        }
        const int32_t value = c < 0 ? static_cast<unsigned char>(text[start]) : c;
        std::array<char, 16> escaped{};
        const char* form = value < 0x100 ? "\\x%02x" : value < 0x10000 ? "\\u%04x" : "\\U%08x";
        std::snprintf(escaped.data(), escaped.size(), form, static_cast<unsigned>(value));
        line += value == '\n' ? "\\n" : value == '\t' ? "\\t" : value == '\r' ? "\\r" : escaped.data();
    }
    if (line.size() <= longest) return line;
    while (longest > 0 && (static_cast<unsigned char>(line[longest]) & 0xc0) == 0x80) --longest;  // no half character
    return line.substr(0, longest) + "…";
}

std::string in_quotes(std::string_view text, size_t longest) {
    const bool has_one = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
    const char* quote = has_one ? "\"" : "'";
    return quote + one_line(text, longest) + quote;
}

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
