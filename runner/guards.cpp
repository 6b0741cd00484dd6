#include "guards.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dreamedge {
namespace {

constexpr float BANNED = std::numeric_limits<float>::lowest();

}  // namespace

void end_later(float* logits, const std::vector<int64_t>& eos_ids, double penalty, double share_masked) {
    const double by = penalty * std::log(1 - share_masked + 1e-3);
    for (const int64_t id : eos_ids) {
        logits[id] = static_cast<float>(std::max(static_cast<double>(BANNED), static_cast<double>(logits[id]) + by));
    }
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

std::vector<float> guard(const Options& options, const Network& network, const Answered& row, int64_t column,
                         const float* logits, int64_t V) {
    std::vector<float> guarded(logits, logits + V);
    const auto n_new = static_cast<double>(std::max<int64_t>(1, static_cast<int64_t>(row.tokens.size()) - row.begin));
    if (options.eos_penalty > 0) {
        end_later(guarded.data(), network.eos_ids, options.eos_penalty, static_cast<double>(row.n_masked) / n_new);
    }
    if (column < row.begin + options.min_new_tokens) ban(guarded.data(), network.eos_ids);
    if (options.no_repeat_ngram_size) {
        ban_repetitions(guarded.data(), row.tokens, column, *options.no_repeat_ngram_size, network.mask_id);
    }
    return guarded;
}

}  // namespace dreamedge
