#include "flatbuffer.h"

#include <stdexcept>

namespace dreamedge {

std::string_view piece(std::string_view data, uint64_t at, uint64_t n_bytes) {
    if (at > data.size() || n_bytes > data.size() - at) throw std::invalid_argument("a place outside of the file");
    return data.substr(at, n_bytes);
}

std::optional<uint64_t> Table::place_of(unsigned field) const {
    const uint64_t vtable = at_ - static_cast<uint64_t>(int64_t{number_at<int32_t>(data_, at_)});
    const uint64_t slot = 4 + 2 * uint64_t{field};
    if (slot >= number_at<uint16_t>(data_, vtable)) return std::nullopt;
    const auto offset = number_at<uint16_t>(data_, vtable + slot);
    return offset == 0 ? std::nullopt : std::optional(at_ + offset);
}

std::optional<Table> Table::table(unsigned field) const {
    const auto place = place_of(field);
    return place ? std::optional(root(data_, *place)) : std::nullopt;
}

std::vector<Table> Table::tables(unsigned field) const {
    std::vector<Table> found;
    const std::string_view offsets = content(field, 4);
    for (const char* offset = offsets.data(); offset < offsets.data() + offsets.size(); offset += 4) {
        found.push_back(root(data_, static_cast<uint64_t>(offset - data_.data())));
    }
    return found;
}

std::string_view Table::content(unsigned field, uint64_t n_bytes) const {
    const auto place = place_of(field);
    if (!place) return {};
    const uint64_t start = *place + number_at<uint32_t>(data_, *place);
    return piece(data_, start + 4, number_at<uint32_t>(data_, start) * n_bytes);
}

}  // namespace dreamedge
