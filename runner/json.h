// JSON that others wrote: its size, depth and number of values are bounded before anything is made of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace dreamedge {

using Json = nlohmann::json;

constexpr int64_t MAX_JSON = 1 << 24;  // bytes of a manifest, and of what is beside it
constexpr int MAX_DEPTH = 64;

// Throws `std::invalid_argument` in words for what is not JSON, or nested deeper than MAX_DEPTH.
Json parse_json(std::string_view text);

// Of a whole file. Throws `std::invalid_argument`, also for a file that is larger than `most` bytes or cannot be read.
std::string read_file(const std::filesystem::path& file, int64_t most);

// The value of a key; throws `std::invalid_argument` where it is not there, or of another type.
const Json& member(const Json& object, const std::string& key);
std::string text_of(const Json& object, const std::string& key);
int64_t whole_of(const Json& object, const std::string& key);
double number_of(const Json& object, const std::string& key);

}  // namespace dreamedge
