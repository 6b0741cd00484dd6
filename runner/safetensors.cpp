#include "safetensors.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>

#include "errors.h"
#include "flatbuffer.h"
#include "json.h"

namespace dreamedge {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian, and read as it lies");

// Bytes of a number; 0 for a type that is none of the format's.
uint64_t size_of(const std::string& dtype) {
    static const std::map<std::string, uint64_t> sizes{
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
        {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}};
    const auto found = sizes.find(dtype);
    return found == sizes.end() ? 0 : found->second;
}

uint64_t natural(const Json& value) {
    if (!value.is_number_unsigned()) throw std::invalid_argument("a shape or offset is no natural number");
    return value.get<uint64_t>();
}

Safetensors::Place place_of(const std::string& name, const Json& entry) {
    Safetensors::Place place{text_of(entry, "dtype"), {}, 0, 0};
    const uint64_t size = size_of(place.dtype);
    uint64_t n_bytes = size;
    const Json& shape = member(entry, "shape");
    if (size == 0 || !shape.is_array()) throw std::invalid_argument(in_quotes(name) + ": no such type or shape");
    for (const Json& length : shape) {
        const uint64_t n = natural(length);
        if (n > INT64_MAX || __builtin_mul_overflow(n_bytes, n, &n_bytes)) {
            throw std::invalid_argument(in_quotes(name) + ": too large");
        }
        place.shape.push_back(static_cast<int64_t>(n));
    }
    const Json& offsets = member(entry, "data_offsets");
    if (!offsets.is_array() || offsets.size() != 2) throw std::invalid_argument(in_quotes(name) + ": no offsets");
    place.begin = natural(offsets[0]), place.end = natural(offsets[1]);
    if (place.end < place.begin || place.end - place.begin != n_bytes) {
        throw std::invalid_argument(in_quotes(name) + ": its offsets are not those of its shape");
    }
    return place;
}

}  // namespace

Safetensors::Safetensors(std::filesystem::path file) : file_(std::move(file)) {
    std::error_code failed;
    const uint64_t size =
        std::filesystem::is_regular_file(file_, failed) ? std::filesystem::file_size(file_, failed) : 0;
    std::ifstream opened(file_, std::ios::binary);
    if (!opened || failed || size < 8) throw std::invalid_argument("not a safetensors file");
    std::string length(8, '\0');
    opened.read(length.data(), 8);
    const auto n_header = number_at<uint64_t>(length, 0);
    if (n_header > MAX_HEADER) {
        throw std::invalid_argument("a header of " + std::to_string(n_header) + " bytes, more than " +
                                    std::to_string(MAX_HEADER));
    }
    if (n_header > size - 8) throw std::invalid_argument("the header is cut off");
    std::string text(n_header, '\0');
    opened.read(text.data(), static_cast<std::streamsize>(n_header));
    data_ = 8 + n_header;
    const Json header = parse_json(text);
    if (!header.is_object()) throw std::invalid_argument("the header is no object");
    std::vector<std::pair<uint64_t, uint64_t>> parts;
    for (const auto& [name, entry] : header.items()) {
        if (name == "__metadata__") {
            for (const auto& [key, value] : entry.items()) metadata_[key] = text_of(entry, key);
            continue;
        }
        const Place& place = tensors_[name] = place_of(name, entry);
        parts.emplace_back(place.begin, place.end);
    }
    // One after the other, without a gap: nothing is read twice, and nothing is hidden.
    std::sort(parts.begin(), parts.end());
    uint64_t at = 0;
    for (const auto& [begin, end] : parts) {
        if (begin != at) throw std::invalid_argument("tensors overlap, or leave a gap");
        at = end;
    }
    if (at != size - data_) throw std::invalid_argument("the tensors are not the file's length");
}

const Safetensors::Place& Safetensors::place(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::invalid_argument("no tensor " + in_quotes(name, 100));
    return found->second;
}

template <typename T>
std::vector<T> Safetensors::read(const std::string& name, const char* dtype, size_t n_dims, int64_t length) const {
    const Place& found = place(name);
    if (found.dtype != dtype || found.shape.size() != n_dims || (length >= 0 && found.shape[0] != length)) {
        throw std::invalid_argument(in_quotes(name, 100) + ": of another type or shape");
    }
    std::vector<T> values((found.end - found.begin) / sizeof(T));
    std::ifstream opened(file_, std::ios::binary);
    opened.seekg(static_cast<std::streamoff>(data_ + found.begin));
    opened.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
    if (!opened) throw std::invalid_argument(in_quotes(name, 100) + ": cannot be read");
    return values;
}

std::vector<int64_t> Safetensors::int64(const std::string& name, size_t n_dims, int64_t length) const {
    return read<int64_t>(name, "I64", n_dims, length);
}

std::vector<float> Safetensors::float32(const std::string& name, size_t n_dims, int64_t length) const {
    return read<float>(name, "F32", n_dims, length);
}

}  // namespace dreamedge
