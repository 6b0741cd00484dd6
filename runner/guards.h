// What is not to be written: logits of masked positions, changed before tokens are chosen. runtime/guards.py, in C++.
#pragma once

#include <cstdint>
#include <vector>

#include "network.h"
#include "options.h"

namespace dreamedge {

// A row without its padding: its tokens, where its answer begins, and how many of that are masks.
struct Answered {
    const Tokens& tokens;
    int64_t begin, n_masked;
};

// The logits [V] of a column, without what is not to be written.
std::vector<float> guard(const Options& options, const Network& network, const Answered& row, int64_t column,
                         const float* logits, int64_t V);

// Lower end tokens of a row of logits, the more of the answer is masked.
void end_later(float* logits, const std::vector<int64_t>& eos_ids, double penalty, double share_masked);

// Ban each token that would complete n tokens in a row which stand elsewhere in `tokens` already. column: of this row
// of logits. mask_id: what is no token yet.
void ban_repetitions(float* logits, const std::vector<int64_t>& tokens, int64_t column, int64_t n, int64_t mask_id);

void ban(float* logits, const std::vector<int64_t>& ids);

}  // namespace dreamedge
