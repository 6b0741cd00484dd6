#include "unicode.h"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace dreamedge {

const char* const SPACES =
    R"(\x{9}-\x{D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

namespace {

const utf8proc_uint8_t* bytes_of(std::string_view text) {
    return reinterpret_cast<const utf8proc_uint8_t*>(text.data());
}

// How many bytes at `at` could begin a character: 1 for what begins none.
size_t invalid_length(std::string_view text, size_t at) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char first = byte(at);
    const size_t length = first >= 0xf0 && first <= 0xf4 ? 4 : first >= 0xe0 && first < 0xf0 ? 3 : 1;
    // Of the second byte less is allowed after some first ones: no surrogate, nothing too long, nothing too large.
    const unsigned char low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    const unsigned char high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    size_t n = 1;
    while (n < length - (length > 1) && at + n < text.size()) {
        const unsigned char next = byte(at + n);
        if (next < (n == 1 ? low : 0x80) || next > (n == 1 ? high : 0xbf)) break;
        ++n;
    }
    return n;
}

}  // namespace

int32_t next_character(std::string_view text, size_t& at) {
    utf8proc_int32_t character = -1;
    const utf8proc_ssize_t n =
        utf8proc_iterate(bytes_of(text) + at, static_cast<utf8proc_ssize_t>(text.size() - at), &character);
    at += n > 0 ? static_cast<size_t>(n) : 1;
    return n > 0 ? character : -1;
}

size_t last_character(std::string_view text) {
    size_t at = text.size() - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
    return at;
}

std::string utf8_of(int32_t character) {
    std::string text(4, '\0');
    const auto n = utf8proc_encode_char(character, reinterpret_cast<utf8proc_uint8_t*>(text.data()));
    text.resize(static_cast<size_t>(n));
    return text;
}

size_t first_invalid(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        const size_t start = at;
        if (next_character(text, at) < 0) return start;
    }
    return std::string_view::npos;
}

std::string with_replacements(std::string_view bytes) {
    std::string text;
    for (size_t at = 0; at < bytes.size();) {
        const size_t start = at;
        if (next_character(bytes, at) >= 0) {
            text += bytes.substr(start, at - start);
        } else {
            text += "\xef\xbf\xbd";
            at = start + invalid_length(bytes, start);
        }
    }
    return text;
}

std::string nfc(std::string_view text) {
    utf8proc_uint8_t* made = nullptr;
    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    const auto n = utf8proc_map(bytes_of(text), static_cast<utf8proc_ssize_t>(text.size()), &made, options);
    const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owned(made, &std::free);
    if (n < 0) throw std::invalid_argument(utf8proc_errmsg(n));
    return {reinterpret_cast<const char*>(made), static_cast<size_t>(n)};
}

bool is_printable(int32_t c) {
    switch (utf8proc_category(c)) {
        case UTF8PROC_CATEGORY_CC:
        case UTF8PROC_CATEGORY_CF:
        case UTF8PROC_CATEGORY_CS:
        case UTF8PROC_CATEGORY_CO:
        case UTF8PROC_CATEGORY_CN:
        case UTF8PROC_CATEGORY_ZL:
        case UTF8PROC_CATEGORY_ZP:
            return false;
        case UTF8PROC_CATEGORY_ZS:
            return c == ' ';
        default:
            return true;
    }
}

bool is_space(int32_t c) {
    return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_word(int32_t c) {
    switch (utf8proc_category(c)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC:
            return true;
        default:  // joiners, and the letters in circles and squares, which count as alphabetic
            return c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
                   (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
    }
}

}  // namespace dreamedge
