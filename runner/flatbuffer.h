// Reading a flatbuffer by the numbers of its fields, as its schema orders them; a union takes two, type and table.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace dreamedge {

// Throws `std::invalid_argument` for a place outside of the data.
std::string_view piece(std::string_view data, uint64_t at, uint64_t n_bytes);

// As it lies, little-endian.
template <typename T>
T number_at(std::string_view data, uint64_t at) {
    T value;
    __builtin_memcpy(&value, piece(data, at, sizeof value).data(), sizeof value);
    return value;
}

// A table of a flatbuffer that is anywhere in the data. A field that is not there is 0 or empty. All of it throws as
// `piece` does.
class Table {
  public:
    // at: where the flatbuffer begins.
    static Table root(std::string_view data, uint64_t at) { return {data, at + number_at<uint32_t>(data, at)}; }

    template <typename T>
    T number(unsigned field) const {
        const auto place = place_of(field);
        return place ? number_at<T>(data_, *place) : T{0};
    }

    std::optional<Table> table(unsigned field) const;
    std::vector<Table> tables(unsigned field) const;
    std::string_view text(unsigned field) const { return content(field, 1); }
    std::string_view content(unsigned field, uint64_t n_bytes) const;  // of a vector of scalars of so many bytes each

  private:
    Table(std::string_view data, uint64_t at) : data_(data), at_(at) {}

    std::optional<uint64_t> place_of(unsigned field) const;

    std::string_view data_;
    uint64_t at_;
};

}  // namespace dreamedge
