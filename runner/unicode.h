// Text as UTF-8, and what Unicode says of its characters.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace dreamedge {

// The character that begins at a byte, and moves `at` behind it; -1 for what is not UTF-8, and moves by one.
int32_t next_character(std::string_view text, size_t& at);

// Where the last character of a valid text begins.
size_t last_character(std::string_view text);

std::string utf8_of(int32_t character);

// The first byte that is not valid UTF-8, or npos.
size_t first_invalid(std::string_view text);

// Each longest invalid part as U+FFFD, as Rust's and Python's decoders do.
std::string with_replacements(std::string_view bytes);

// Normal form C. Throws `std::invalid_argument`.
std::string nfc(std::string_view text);

bool is_printable(int32_t character);  // as Python's `str.isprintable` has it
bool is_space(int32_t character);      // White_Space
bool is_word(int32_t character);       // what `\w` is in Unicode's regular expressions

// What a regular expression's class holds for \s, in PCRE2's notation.
extern const char* const SPACES;

}  // namespace dreamedge
