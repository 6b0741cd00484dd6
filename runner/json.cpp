#include "json.h"

#include <cmath>
#include <fstream>
#include <stdexcept>

#include "errors.h"

namespace dreamedge {
namespace {

// Without recursion, so that no depth is too deep for it.
int depth_of(std::string_view text) {
    int depth = 0, deepest = 0;
    bool is_text = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (is_text) {
            if (c == '\\') ++i;
            if (c == '"') is_text = false;
        } else if (c == '"') {
            is_text = true;
        } else if (c == '[' || c == '{') {
            deepest = std::max(deepest, ++depth);
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
    return deepest;
}

}  // namespace

Json parse_json(std::string_view text) {
    if (depth_of(text) > MAX_DEPTH) throw std::invalid_argument("not JSON: nested too deeply");
    try {
        return Json::parse(text.begin(), text.end());
    } catch (const Json::exception& error) {
        throw std::invalid_argument("not JSON: " + one_line(error.what(), 200));
    }
}

std::string read_file(const std::filesystem::path& file, int64_t most) {
    std::error_code failed;
    if (!std::filesystem::is_regular_file(file, failed)) throw std::invalid_argument("not a file");
    std::ifstream opened(file, std::ios::binary);
    const auto size = static_cast<int64_t>(std::filesystem::file_size(file, failed));
    if (!opened || failed) throw std::invalid_argument("cannot be read");
    if (size > most) {
        throw std::invalid_argument(std::to_string(size) + " bytes, more than " + std::to_string(most));
    }
    std::string content(static_cast<size_t>(size), '\0');
    opened.read(content.data(), size);
    content.resize(static_cast<size_t>(opened.gcount()));
    return content;
}

const Json& member(const Json& object, const std::string& key) {
    if (!object.is_object() || !object.contains(key)) throw std::invalid_argument("no " + in_quotes(key));
    return object.at(key);
}

std::string text_of(const Json& object, const std::string& key) {
    const Json& value = member(object, key);
    if (!value.is_string()) throw std::invalid_argument(in_quotes(key) + " is no text");
    return value.get<std::string>();
}

int64_t whole_of(const Json& object, const std::string& key) {
    const Json& value = member(object, key);
    const bool fits = value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
    if (!fits) throw std::invalid_argument(in_quotes(key) + " is no whole number");
    return value.get<int64_t>();
}

double number_of(const Json& object, const std::string& key) {
    const Json& value = member(object, key);
    if (!value.is_number() || !std::isfinite(value.get<double>())) {
        throw std::invalid_argument(in_quotes(key) + " is no number");
    }
    return value.get<double>();
}

}  // namespace dreamedge
