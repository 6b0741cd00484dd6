// What writing needs of a network: a `Program` gives one, and a test one that is no program.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace dreamedge {

// Of K rows, [K, V], row after row; they belong to the network and stand until its next call.
struct Logits {
    const float* data;
    int64_t K, V;

    const float* row(int64_t k) const { return data + k * V; }
};

// (tokens [T], start_pos, kv_len, rows [K]) -> raw logits [K, V]: the program's contract.
using Forward = std::function<Logits(const std::vector<int64_t>&, int64_t, int64_t, const std::vector<int64_t>&)>;

struct Network {
    int64_t max_seq_len, max_rows, vocab_size, mask_id, pad_id;
    std::vector<int64_t> eos_ids;
    int64_t block_length;
    std::function<Forward()> start;  // `forward` for one new sequence, over a cache that nothing else uses meanwhile
};

}  // namespace dreamedge
