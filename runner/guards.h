// What is not to be written: logits of masked positions, changed before tokens are chosen. runtime/guards.py, in C++.
#pragma once

#include <cstdint>
#include <vector>

namespace dreamedge {

// Lower end tokens of a row of logits, the more of the answer is masked.
void end_later(float* logits, const std::vector<int64_t>& eos_ids, double penalty, double share_masked);

// Ban each token that would complete n tokens in a row which stand elsewhere in `tokens` already. column: of this row
// of logits. mask_id: what is no token yet.
void ban_repetitions(float* logits, const std::vector<int64_t>& tokens, int64_t column, int64_t n, int64_t mask_id);

void ban(float* logits, const std::vector<int64_t>& ids);

}  // namespace dreamedge
