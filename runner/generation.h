// Writing with a diffusion language model: masks are filled in over several steps, the most confident first.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "network.h"
#include "options.h"

namespace dreamedge {

constexpr int64_t MAX_STEPS = 100'000;  // more than any cache has positions

// (step, tokens of all rows after it)
using OnStep = std::function<void(int64_t, const std::vector<Tokens>&)>;

// What was written, and what it took.
//
// tokens: of each row, prompt and answer; rows with a shorter prompt are padded on the left with the pad id.
// answers: the new tokens of each row; with `stop_at_eos` up to the end-of-sequence token, without it.
// history: of each row, the tokens before the first step and after each, if it was asked for.
struct Generation {
    std::vector<Tokens> tokens, answers;
    std::vector<std::vector<Tokens>> history;
    int64_t forward_calls, positions;
    double seconds;
};

// Append `max_new_tokens` masks to each prompt, then fill every mask, those inside the prompts too. Each row is
// answered as if it were alone. As `runtime.generate`, from the same random numbers where positions are drawn; tokens
// (temperature above 0) are drawn with the same probabilities, and by other numbers.
//
// Throws `Error`: Exit::usage for a prompt or an option that cannot be, Exit::artifact for a network that fails.
Generation generate(const Network& network, const std::vector<Tokens>& prompts, Options options,
                    const OnStep& on_step = nullptr, bool keep_history = false);

}  // namespace dreamedge
