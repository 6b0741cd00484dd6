#include "guards.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dreamedge {
namespace {

constexpr float BANNED = std::numeric_limits<float>::lowest();

}  // namespace

void end_later(float* logits, const std::vector<int64_t>& eos_ids, double penalty, double share_masked) {
    for (const int64_t id : eos_ids) logits[id] += static_cast<float>(penalty * std::log(1 - share_masked + 1e-3));
}

void ban(float* logits, const std::vector<int64_t>& ids) {
    for (const int64_t id : ids) logits[id] = BANNED;
}

void ban_repetitions(float* logits, const std::vector<int64_t>& tokens, int64_t column, int64_t n, int64_t mask_id) {
    const auto last = static_cast<int64_t>(tokens.size()) - n;  // where the last n tokens begin
    for (int64_t start = std::max<int64_t>(0, column - n + 1); start <= std::min(column, last); ++start) {
        const int64_t at = column - start;
        const auto is_same = [&](int64_t other) {
            for (int64_t k = 0; k < n; ++k) {
                const int64_t there = tokens[static_cast<size_t>(other + k)];
                const int64_t here = k == at ? there : tokens[static_cast<size_t>(start + k)];
                if (there == mask_id || here == mask_id || there != here) return false;
            }
            return true;
        };
        for (int64_t other = 0; other <= last; ++other) {
            if (is_same(other)) logits[tokens[static_cast<size_t>(other + at)]] = BANNED;
        }
    }
}

}  // namespace dreamedge
