// What may be asked of writing: prompts and options, checked before the first call of the network.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "network.h"

namespace dreamedge {

using Tokens = std::vector<int64_t>;

// As runtime/generation.py has them; docs/generation.md says what each does.
struct Options {
    int64_t max_new_tokens = 0;
    std::optional<int64_t> steps;
    std::string alg = "entropy";
    double temperature = 0;
    std::optional<double> top_p;
    std::optional<int64_t> top_k;
    std::optional<double> alg_temp;
    double eps = 1e-3;
    std::optional<int64_t> block_length;
    std::optional<std::string> cache;  // prefix, dual
    std::optional<double> threshold;
    std::optional<int64_t> seed;
    bool stop_at_eos = false;
    std::optional<double> alpha, relaxed_threshold;
    int64_t radius = 4;
    std::optional<double> kl_threshold, gamma, entropy_threshold;
    std::optional<int64_t> suffix_window;
    double eos_penalty = 0;
    int64_t min_new_tokens = 0;
    std::optional<int64_t> no_repeat_ngram_size;

    bool guards() const { return eos_penalty > 0 || min_new_tokens > 0 || no_repeat_ngram_size; }

    // How many tokens a step writes follows from how sure the network is, not from a schedule.
    bool goes_by_certainty() const { return threshold || gamma || entropy_threshold; }

    // The call that opens a block writes by the rule, too; with the plain threshold, one token as in Fast-dLLM.
    bool writes_at_once() const { return alpha || relaxed_threshold || kl_threshold || gamma || entropy_threshold; }

    // Throws `Error` (Exit::usage); written so that a NaN is refused.
    void check() const;
};

// Throws `Error` (Exit::usage).
void check_prompts(const Network& network, const std::vector<Tokens>& prompts, int64_t max_new_tokens);

}  // namespace dreamedge
