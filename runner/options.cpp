#include "options.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace dreamedge {
namespace {

void refuse_unless(bool holds, const std::string& name, const std::string& value, const std::string& rule) {
    if (!holds) usage_error(name + " " + value + ": " + rule);
}

void check_ids(const Network& network, const Tokens& tokens) {
    for (const int64_t token : tokens) {
        if (token >= 0 && token < network.vocab_size) continue;
        const auto [least, most] = std::minmax_element(tokens.begin(), tokens.end());
        usage_error("token id " + std::to_string(*least < 0 ? *least : *most) + " is outside the vocabulary, 0.." +
                    std::to_string(network.vocab_size - 1));
    }
}

bool is_finite(double value) { return 0 <= value && value < INFINITY; }

// The name of what says which positions are written, a threshold or another rule; none for a schedule.
std::string check_rules(const Options& options) {
    const struct {
        const char* name;
        std::optional<double> value;
        bool with_threshold;
    } rules[] = {{"alpha", options.alpha, true},
                 {"relaxed_threshold", options.relaxed_threshold, true},
                 {"kl_threshold", options.kl_threshold, true},
                 {"gamma", options.gamma, false},
                 {"entropy_threshold", options.entropy_threshold, false}};
    std::string given;
    for (const auto& [name, value, with_threshold] : rules) {
        if (!value) continue;
        if (!given.empty()) {
            usage_error(given + " and " + name + " both say which positions are written: give one of them");
        }
        given = name;
    }
    for (const auto& [name, value, with_threshold] : rules) {
        if (!value) continue;
        if (with_threshold && !options.threshold) {
            usage_error(given + " goes with a threshold: give threshold=0.9 or another");
        }
        if (!with_threshold && options.threshold) {
            usage_error("threshold and " + given + " both say which positions are written: give one of them");
        }
        const bool is_nats = given == "kl_threshold" || given == "gamma" || given == "entropy_threshold";
        refuse_unless(!is_nats || is_finite(*value), given, number(*value), "are nats, at least 0");
    }
    const double alpha = options.alpha.value_or(0), relaxed = options.relaxed_threshold.value_or(0);
    refuse_unless(0 <= alpha && alpha <= 1, "alpha", number(alpha), "is the share that a threshold falls by, 0 to 1");
    refuse_unless(0 <= relaxed && relaxed <= options.threshold.value_or(0), "relaxed_threshold", number(relaxed),
                  "must be 0 to the threshold");
    refuse_unless(options.radius >= 1, "radius", std::to_string(options.radius), "must be at least 1");
    if (options.suffix_window && !options.block_length) {
        usage_error("suffix_window: what lies behind a block, so there must be blocks: give block_length");
    }
    refuse_unless(options.suffix_window.value_or(0) >= 0, "suffix_window",
                  std::to_string(options.suffix_window.value_or(0)), "must be at least 0");
    return options.threshold ? "threshold" : given;
}

}  // namespace

void Options::check() const {
    const bool is_alg = alg == "origin" || alg == "maskgit_plus" || alg == "topk_margin" || alg == "entropy";
    refuse_unless(is_alg, "alg", in_quotes(alg), "there are origin, maskgit_plus, topk_margin, entropy");
    const bool is_cache = !cache || *cache == "prefix" || *cache == "dual";
    if (cache == "d2f") usage_error("cache 'd2f': blocks in parallel are of Python alone: give none, prefix or dual");
    if (!is_cache) refuse_unless(false, "cache", in_quotes(*cache), "there are prefix, dual, and none");
    refuse_unless(is_finite(temperature), "temperature", number(temperature), "must be 0 (the best token) or above");
    refuse_unless(temperature == 0 || temperature >= 1e-6, "temperature", number(temperature),
                  "below 1e-6 it is 0 but for rounding: give 0");
    refuse_unless(!top_p || (0 < *top_p && *top_p <= 1), "top_p", number(top_p.value_or(0)),
                  "must be above 0, where no token is left, and at most 1");
    refuse_unless(!top_k || *top_k >= 1, "top_k", std::to_string(top_k.value_or(0)), "must leave at least 1 token");
    refuse_unless(0 < eps && eps < 1, "eps", number(eps), "must be between 0 and 1");
    refuse_unless(!block_length || *block_length >= 1, "block_length", std::to_string(block_length.value_or(0)),
                  "must be at least 1");
    refuse_unless(!threshold || (0 <= *threshold && *threshold <= 1), "threshold", number(threshold.value_or(0)),
                  "is a probability, 0 to 1");
    refuse_unless(!alg_temp || is_finite(*alg_temp), "alg_temp", number(alg_temp.value_or(0)),
                  "must be 0 (the most confident) or above");
    refuse_unless(is_finite(eos_penalty), "eos_penalty", number(eos_penalty), "must be 0 (none) or above");
    refuse_unless(min_new_tokens >= 0, "min_new_tokens", std::to_string(min_new_tokens), "must be at least 0");
    refuse_unless(no_repeat_ngram_size.value_or(2) >= 2, "no_repeat_ngram_size",
                  std::to_string(no_repeat_ngram_size.value_or(2)), "must be at least 2 tokens");
    const std::string rule = check_rules(*this);
    const bool draws_positions = alg_temp.value_or(0) != 0;
    if (alg == "origin" && (!rule.empty() || draws_positions)) {
        usage_error("alg 'origin' picks positions at random: it has no confidence for " +
                    (rule.empty() ? "threshold" : rule) + " or alg_temp");
    }
    if (!rule.empty() && draws_positions) {
        usage_error(rule + " and alg_temp both say which positions are written: give one of them");
    }
}

void check_prompts(const Network& network, const std::vector<Tokens>& prompts, int64_t max_new_tokens) {
    const bool has_empty =
        std::any_of(prompts.begin(), prompts.end(), [](const Tokens& prompt) { return prompt.empty(); });
    if (prompts.empty() || has_empty) usage_error("a prompt is empty: the first token is predicted from one before it");
    if (max_new_tokens < 0) usage_error("max_new_tokens " + std::to_string(max_new_tokens) + ": must be at least 0");
    for (const Tokens& prompt : prompts) {
        check_ids(network, prompt);
        const auto n = static_cast<int64_t>(prompt.size());
        const std::string most = std::to_string(network.max_seq_len);
        if (n > network.max_seq_len) {
            usage_error("the prompt has " + std::to_string(n) + " tokens, max_seq_len is " + most);
        }
        if (max_new_tokens > network.max_seq_len - n) {
            usage_error("the prompt's " + std::to_string(n) + " tokens and " + std::to_string(max_new_tokens) +
                        " new ones are more than max_seq_len " + most + ": at most " +
                        std::to_string(network.max_seq_len - n) + " new tokens fit");
        }
    }
}

}  // namespace dreamedge
