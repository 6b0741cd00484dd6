#include "delegates.h"

#include <algorithm>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flatbuffer.h"
#include "sha256.h"

namespace dreamedge {
namespace {

// Numbers of fields, types and places are those of executorch's schema/program.fbs, and of schema.fbs and XNNHeader in
// its backends/xnnpack/serialization.
constexpr int8_t SEGMENT = 1;                                // of DataLocation
constexpr uint8_t FULLY_CONNECTED = 2, QUANTIZED = 2;        // of XNodeUnion and XValueUnion
constexpr unsigned PLANS = 1, SEGMENTS = 4, NAMED_DATA = 7;  // of Program

// key: equal for the same bytes. An unnamed one is in the delegate itself.
struct Constant {
    std::string key;
    bool is_named;
};

// bytes: all that the exporter made for it.
struct Delegate {
    Table graph;
    std::string_view bytes;
    std::vector<Constant> constants;

    const Constant& constant(uint32_t index) const {
        if (index >= constants.size()) throw std::invalid_argument("a constant that is not there");
        return constants[index];
    }
};

// A number of a tensor, and what it is quantized by.
struct Value {
    Table tensor;
    std::optional<Table> quantized;
};

struct Segments {
    explicit Segments(std::string_view program)
        : program(program), tables(Table::root(program, 0).tables(SEGMENTS)), base(number_at<uint64_t>(program, 24)) {}

    std::string_view at(uint32_t index) const {
        if (index >= tables.size()) throw std::invalid_argument("a segment that is not there");
        return piece(program, base + tables[index].number<uint64_t>(0), tables[index].number<uint64_t>(1));
    }

    std::string_view program;
    std::vector<Table> tables;
    uint64_t base;
};

using Key = std::vector<std::string>;

std::map<std::string_view, uint32_t> named_data(std::string_view program) {
    std::map<std::string_view, uint32_t> segments;
    for (const Table& entry : Table::root(program, 0).tables(NAMED_DATA)) {
        segments[entry.text(0)] = entry.number<uint32_t>(1);
    }
    return segments;
}

Delegate delegate_of(std::string_view bytes, const std::map<std::string_view, uint32_t>& names) {
    if (piece(bytes, 4, 4) != "XH00") throw std::invalid_argument("a delegate without an XNNPACK header");
    Delegate delegate{Table::root(bytes, number_at<uint32_t>(bytes, 10)), bytes, {}};
    for (const Table& entry : delegate.graph.tables(8)) {
        if (const std::string name(entry.text(2)); !name.empty()) {
            const auto found = names.find(name);  // two names of one segment have the same bytes
            delegate.constants.push_back({found == names.end() ? name : std::to_string(found->second), true});
        } else {
            const uint64_t at = number_at<uint32_t>(bytes, 18) + entry.number<uint64_t>(0);
            delegate.constants.push_back({std::string(piece(bytes, at, entry.number<uint64_t>(1))), false});
        }
    }
    return delegate;
}

std::vector<Delegate> delegates(std::string_view program) {
    const auto names = named_data(program);
    const Segments segments(program);
    std::vector<Delegate> found;
    for (const Table& plan : Table::root(program, 0).tables(PLANS)) {
        for (const Table& delegate : plan.tables(7)) {
            if (delegate.text(0) != BACKEND) continue;
            const auto processed = delegate.table(1);
            if (!processed || processed->number<int8_t>(0) != SEGMENT) {
                throw std::invalid_argument("a delegate in no segment");
            }
            found.push_back(delegate_of(segments.at(processed->number<uint32_t>(1)), names));
        }
    }
    return found;
}

std::map<uint32_t, Value> values_of(const Table& graph) {
    std::map<uint32_t, Value> values;
    for (const Table& value : graph.tables(2)) {
        const auto held = value.table(1);
        const bool is_quantized = value.number<uint8_t>(0) == QUANTIZED;
        const auto tensor = held && is_quantized ? held->table(0) : held;
        if (tensor)
            values.insert_or_assign(tensor->number<uint32_t>(6), Value{*tensor, is_quantized ? held : std::nullopt});
    }
    return values;
}

// By the type of XNNQuantParams: the fields of its numbers, and of the index of its scales, if it has one.
void add_quantization(Key& key, const Delegate& delegate, const Table& quantized) {
    static const std::map<uint8_t, std::vector<unsigned>> numbers{{1, {1}}, {2, {0, 1}}, {3, {0}}, {4, {1, 2}}};
    static const std::map<uint8_t, unsigned> scales{{1, 2}, {4, 4}};
    const auto parameters = quantized.table(2);
    if (!parameters) return;
    const auto kind = quantized.number<uint8_t>(1);
    const auto fields = numbers.find(kind);
    if (fields == numbers.end()) throw std::invalid_argument("a quantization of no known kind");
    key.push_back(std::to_string(kind));
    for (const unsigned field : fields->second) key.push_back(std::to_string(parameters->number<uint32_t>(field)));
    const auto index_at = scales.find(kind);
    if (index_at == scales.end()) return;
    const auto index = parameters->number<uint32_t>(index_at->second);
    key.push_back(index != 0 ? delegate.constant(index).key : std::string(parameters->content(0, 4)));
}

// Of each named matrix that a fully connected node multiplies by: what the runtime keeps it by, that is the names of
// weights and bias; and all else that decides how it is packed.
std::vector<std::pair<Key, Key>> matrices(const Delegate& delegate) {
    const auto values = values_of(delegate.graph);
    const auto value = [&](uint32_t id) -> const Value& {
        const auto found = values.find(id);
        if (found == values.end()) throw std::invalid_argument("a node of a value that is not there");
        return found->second;
    };
    std::vector<std::pair<Key, Key>> found;
    for (const Table& node : delegate.graph.tables(1)) {
        const auto product = node.table(1);
        if (node.number<uint8_t>(0) != FULLY_CONNECTED || !product) continue;
        const auto input = product->number<uint32_t>(0), weights = product->number<uint32_t>(1),
                   bias = product->number<uint32_t>(2);
        if (!delegate.constant(value(weights).tensor.number<uint32_t>(3)).is_named) continue;
        Key name, packed_by{std::to_string(product->number<uint32_t>(4)),
                            std::to_string(value(input).tensor.number<int16_t>(0))};
        for (const uint32_t id : {weights, bias}) {
            if (values.count(id) == 0) continue;
            const auto& [tensor, quantized] = value(id);
            const Constant& constant = delegate.constant(tensor.number<uint32_t>(3));
            if (constant.is_named) name.push_back(constant.key);
            packed_by.push_back(std::to_string(tensor.number<int16_t>(0)));
            packed_by.emplace_back(tensor.content(2, 4));
            if (quantized) add_quantization(packed_by, delegate, *quantized);
        }
        found.emplace_back(std::move(name), std::move(packed_by));
    }
    return found;
}

// The sha256 of what it names, with or without the exporter's word for scales.
bool is_by_content(std::string_view name) {
    constexpr std::string_view prefix = "scale_";
    if (name.substr(0, prefix.size()) == prefix) name.remove_prefix(prefix.size());
    return name.size() == 64 && name.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

}  // namespace

std::string why_not_kept(std::string_view program) {
    for (const auto& [name, segment] : named_data(program)) {
        if (!is_by_content(name)) return "a constant is not named by its sha256";
    }
    std::map<Key, Key> known;
    for (const Delegate& delegate : delegates(program)) {
        for (auto& [name, packed_by] : matrices(delegate)) {
            if (known.try_emplace(name, packed_by).first->second == packed_by) continue;
            return "two matrices have the same numbers but other scales or shapes, and the runtime would take one for "
                   "the other: open it without packed_cache";
        }
    }
    return "";
}

std::string changed_constant(std::string_view program) {
    const Segments segments(program);
    std::map<uint32_t, std::string> digests;
    for (const auto& [name, index] : named_data(program)) {
        std::string& digest = digests[index];
        if (digest.empty()) {
            const std::string_view bytes = segments.at(index);
            Sha256 sha256;
            sha256.update(bytes.data(), bytes.size());
            digest = sha256.hex();
        }
        if (name.substr(name.size() - digest.size()) != digest) return std::string(name);
    }
    return "";
}

std::string identity(std::string_view program, const std::string& more) {
    Sha256 digest;
    const auto add = [&](std::string_view bytes) { digest.update(bytes.data(), bytes.size()); };
    add(more);
    add(piece(program, 0, number_at<uint64_t>(program, 16)));  // the flatbuffer; the segments follow it
    for (const Delegate& delegate : delegates(program)) add(delegate.bytes);
    return digest.hex().substr(0, 32);
}

}  // namespace dreamedge
