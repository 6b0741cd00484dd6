#include "generation.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <random>
#include <utility>

#include "accept.h"
#include "errors.h"
#include "guards.h"
#include "sample.h"
#include "schedule.h"

namespace dreamedge {
namespace {

using Columns = std::vector<int64_t>;

struct Block {
    int64_t start, end, steps;
    int64_t most;  // tokens of a step that goes by certainty
};

// Columns first .. stop-1 are computed, and see those before `seen`.
struct Window {
    int64_t first, stop, seen;
};

// The tokens as they are filled in. Columns are those of the padded rows.
struct Run {
    const Network& network;
    const Options& options;
    Generation& written;
    std::vector<int64_t> lefts;  // columns of padding that each row starts with
    int64_t begin, length;       // the column where the answers begin, and where they end
    Random random;
    const OnStep& on_step;
    bool keep_history;
    std::vector<int64_t> n_steps_of;
    std::map<size_t, Steadiness> seen;  // by row, of the block that is being filled

    std::vector<Block> plan(const std::vector<size_t>& rows, std::optional<int64_t> steps) const;
    void fill(const Forward& forward, const std::vector<size_t>& rows, const Block& block);
    int64_t write(const Forward& forward, size_t row, const Columns& columns, int64_t n,
                  std::optional<int64_t> block_size, Window window, bool fills_cache);
    std::vector<Columns> drawn(const std::vector<Columns>& columns, float share);
    Columns masked(size_t row, int64_t start, int64_t end) const;
    Window window(size_t row, const Block& block, bool is_whole) const;
    int64_t first_eos(size_t row) const;
    void cut(size_t row);
    void after_step(const std::vector<size_t>& rows);

    bool has_masks(const std::vector<size_t>& rows, int64_t start, int64_t end) const {
        return std::any_of(rows.begin(), rows.end(), [&](size_t row) { return !masked(row, start, end).empty(); });
    }
};

// Masks inside a prompt are a first block, then comes the answer in blocks.
std::vector<Block> Run::plan(const std::vector<size_t>& rows, std::optional<int64_t> steps) const {
    std::vector<Block> blocks{{0, length, 0, 0}};
    if (options.block_length) {
        blocks.clear();
        int64_t inside = begin;
        for (const size_t row : rows) {
            if (const Columns columns = masked(row, 0, begin); !columns.empty()) inside = std::min(inside, columns[0]);
        }
        if (inside < begin) blocks.push_back({inside, begin, 0, 0});
        for (int64_t start = begin; start < length;) {
            const int64_t end = start + std::min(*options.block_length, length - start);
            blocks.push_back({start, end, 0, 0});
            start = end;
        }
    }
    int64_t n_masks = 0;
    for (const size_t row : rows) n_masks = std::max(n_masks, static_cast<int64_t>(masked(row, 0, length).size()));
    const auto n_blocks = static_cast<int64_t>(blocks.size());
    const auto of_each = shares(steps.value_or(std::max({int64_t{1}, n_masks, n_blocks})), n_blocks);
    for (size_t i = 0; i < blocks.size(); ++i) {
        blocks[i].steps = of_each[i];
        // Fast-dLLM's threshold without blocks keeps to the pace that the steps set, if they are given.
        blocks[i].most = steps ? std::max<int64_t>(1, n_masks / *steps) : n_masks;
    }
    return blocks;
}

// In blocks, the first step computes the whole row, which is what the caches start from. If there are more steps, it
// writes nothing but the block's first token (Fast-dLLM), or what the rule accepts.
void Run::fill(const Forward& forward, const std::vector<size_t>& rows, const Block& block) {
    const bool in_blocks = options.block_length.has_value();
    const bool by_rule = options.goes_by_certainty(), opens_alone = in_blocks && !options.writes_at_once();
    std::vector<int64_t> n_masks;
    for (const size_t row : rows) n_masks.push_back(static_cast<int64_t>(masked(row, block.start, block.end).size()));
    int64_t n_steps = block.steps;
    // Each step writes a token at least: so many are enough whatever the network says.
    if (by_rule) n_steps = opens_alone + std::max<int64_t>(1, *std::max_element(n_masks.begin(), n_masks.end()));
    std::vector<int64_t> unused(rows.size());  // tokens that the rule kept earlier steps from writing
    seen.clear();
    for (int64_t i = 0; i < n_steps; ++i) {
        if (options.stop_at_eos && !has_masks(rows, 0, length)) return;
        const bool is_last = i == n_steps - 1, opens = opens_alone && i == 0 && !is_last;
        std::vector<Columns> chosen;
        for (const size_t row : rows) chosen.push_back(masked(row, block.start, opens ? block.start + 1 : block.end));
        const bool writes_all = is_last || opens || by_rule;
        float share =
            writes_all ? 1 : 1 - time_at(i + 1, n_steps + 1, options.eps) / time_at(i, n_steps + 1, options.eps);
        if (options.alg == "origin" && !opens) chosen = drawn(chosen, share), share = 1;
        for (size_t r = 0; r < rows.size(); ++r) {
            auto n = static_cast<int64_t>(static_cast<float>(chosen[r].size()) * share);
            std::optional<int64_t> block_size;
            if (by_rule && !is_last) {
                n = std::min(n, unused[r] += block.most);
                block_size = n_masks[r];
            }
            const bool fills_cache = options.cache && i == 0;
            unused[r] -= write(forward, rows[r], chosen[r], n, block_size, window(rows[r], block, i == 0), fills_cache);
        }
        after_step(rows);
        if (by_rule && i >= opens_alone && !has_masks(rows, block.start, block.end)) return;
    }
}

// What the cache knows of columns that are not computed stands.
Window Run::window(size_t row, const Block& block, bool is_whole) const {
    const int64_t beyond = std::min(options.suffix_window.value_or(length), length - block.end);
    const int64_t seen = block.end + beyond;
    if (is_whole || !options.cache) return {lefts[row], seen, seen};
    return {std::max(block.start, lefts[row]), *options.cache == "dual" ? block.end : seen, seen};
}

// Write the n most confident of these masks, or what the rule accepts of them. Returns how many. block_size: the
// columns of the block, where a rule decides.
int64_t Run::write(const Forward& forward, size_t row, const Columns& columns, int64_t n,
                   std::optional<int64_t> block_size, Window window, bool fills_cache) {
    if (n == 0 && !fills_cache) return 0;
    const int64_t left = lefts[row];
    Tokens& tokens = written.tokens[row];
    // Logits are read shifted: a token comes from the row before it, the first from its own.
    Columns sources;
    for (const int64_t column : columns) sources.push_back(std::max(left, column - 1));
    if (n == 0) sources = {left};
    const int64_t first = std::min(window.first, *std::min_element(sources.begin(), sources.end()));
    const Tokens computed(tokens.begin() + first, tokens.begin() + window.stop);
    const std::string alg = !block_size ? options.alg : options.entropy_threshold ? "own_entropy" : "own";
    const Sampling by{network.mask_id, alg, options.temperature, options.top_p, options.top_k};
    const bool by_distribution = block_size && (options.gamma || options.kl_threshold);
    std::vector<Sampled> sampled;
    std::vector<Distribution> distributions;
    // Several calls if one may not ask for so many rows at once.
    for (size_t at = 0; at < sources.size(); at += static_cast<size_t>(network.max_rows)) {
        Columns rows(sources.begin() + static_cast<std::ptrdiff_t>(at),
                     sources.begin() + static_cast<std::ptrdiff_t>(
                                           std::min(sources.size(), at + static_cast<size_t>(network.max_rows))));
        for (int64_t& source : rows) source -= first;
        const Logits logits = forward(computed, first - left, window.seen - left, rows);
        ++written.forward_calls;
        written.positions += static_cast<int64_t>(computed.size());
        for (int64_t k = 0; n > 0 && k < logits.K; ++k) {
            std::vector<float> guarded;
            if (options.guards()) {
                const Tokens own(tokens.begin() + left, tokens.end());
                const Answered so_far{own, begin - left, static_cast<int64_t>(masked(row, begin, length).size())};
                const int64_t column = columns[at + static_cast<size_t>(k)] - left;
                guarded = guard(options, network, so_far, column, logits.row(k), logits.V);
            }
            const float* of_row = options.guards() ? guarded.data() : logits.row(k);
            sampled.push_back(sample(of_row, logits.V, by, random));
            if (by_distribution) distributions.push_back(own_distribution(of_row, logits.V, network.mask_id));
        }
    }
    if (n == 0) return 0;
    std::vector<float> confidence;
    for (const Sampled& one : sampled) confidence.push_back(one.confidence);
    int64_t n_written = 0;
    std::vector<bool> is_accepted(columns.size(), true);
    if (block_size) {
        const double share = static_cast<double>(columns.size()) / static_cast<double>(*block_size);
        is_accepted = accepted(options, columns, confidence, std::move(distributions), share, seen[row]);
    }
    for (const size_t i : most_confident(confidence, static_cast<size_t>(n), options.alg_temp.value_or(0), random)) {
        if (n_written > 0 && !is_accepted[i]) continue;  // the surest is written in any case
        tokens[static_cast<size_t>(columns[i])] = sampled[i].token;
        ++n_written;
    }
    if (options.stop_at_eos) cut(row);
    return n_written;
}

// `origin`: of the masks of all rows, in order, each with probability `share`.
std::vector<Columns> Run::drawn(const std::vector<Columns>& columns, float share) {
    std::vector<Columns> kept;
    for (const Columns& of_row : columns) {
        kept.emplace_back();
        for (const int64_t column : of_row) {
            if (random.uniform() < share) kept.back().push_back(column);
        }
    }
    return kept;
}

Columns Run::masked(size_t row, int64_t start, int64_t end) const {
    Columns columns;
    for (int64_t at = std::max(start, lefts[row]); at < end; ++at) {  // the pad id may be the mask id
        if (written.tokens[row][static_cast<size_t>(at)] == network.mask_id) columns.push_back(at);
    }
    return columns;
}

// The column of the answer's first end of sequence, or where it ends.
int64_t Run::first_eos(size_t row) const {
    const Tokens& tokens = written.tokens[row];
    const auto found =
        std::find_first_of(tokens.begin() + begin, tokens.end(), network.eos_ids.begin(), network.eos_ids.end());
    return found - tokens.begin();
}

// Once all before the answer's first end of sequence is written, what follows it is end of sequence too.
void Run::cut(size_t row) {
    const int64_t eos = first_eos(row);
    if (eos == length || !masked(row, 0, eos).empty()) return;
    Tokens& tokens = written.tokens[row];
    std::fill(tokens.begin() + eos, tokens.end(), tokens[static_cast<size_t>(eos)]);
}

void Run::after_step(const std::vector<size_t>& rows) {
    if (on_step) on_step(n_steps_of[rows[0]], written.tokens);
    for (const size_t row : rows) {
        ++n_steps_of[row];
        if (keep_history) written.history[row].push_back(written.tokens[row]);
    }
}

}  // namespace

Generation generate(const Network& network, const std::vector<Tokens>& prompts, Options options, const OnStep& on_step,
                    bool keep_history) {
    const auto started = std::chrono::steady_clock::now();
    if (!options.block_length && options.cache) options.block_length = network.block_length;
    if (options.block_length && options.goes_by_certainty()) options.steps = std::nullopt;
    options.check();
    check_prompts(network, prompts, options.max_new_tokens);
    Generation written{};
    size_t longest = 0;
    for (const Tokens& prompt : prompts) longest = std::max(longest, prompt.size());
    std::vector<int64_t> lefts;
    for (const Tokens& prompt : prompts) {
        lefts.push_back(static_cast<int64_t>(longest - prompt.size()));
        Tokens row(longest - prompt.size(), network.pad_id);
        row.insert(row.end(), prompt.begin(), prompt.end());
        row.insert(row.end(), static_cast<size_t>(options.max_new_tokens), network.mask_id);
        if (keep_history) written.history.push_back({row});
        written.tokens.push_back(std::move(row));
    }
    const uint64_t seed = options.seed ? static_cast<uint64_t>(*options.seed) : std::random_device()();
    const auto begin = static_cast<int64_t>(longest);
    Run run{network,
            options,
            written,
            lefts,
            begin,
            begin + options.max_new_tokens,
            Random(seed),
            on_step,
            keep_history,
            std::vector<int64_t>(prompts.size()),
            {}};
    // One cache holds one row, and a row's blocks and steps are its own. Only the draws of `origin` go through the
    // whole batch, step by step, as in the reference.
    std::vector<std::vector<size_t>> groups;
    for (size_t row = 0; row < prompts.size(); ++row) {
        if (groups.empty() || options.alg != "origin" || options.block_length) groups.emplace_back();
        groups.back().push_back(row);
    }
    std::vector<std::vector<Block>> plans;
    for (const auto& group : groups) plans.push_back(run.plan(group, options.steps));
    for (size_t g = 0; g < groups.size(); ++g) {
        const Forward forward = network.start();
        for (const Block& block : plans[g]) run.fill(forward, groups[g], block);
    }
    for (size_t row = 0; row < prompts.size(); ++row) {
        const Tokens& tokens = written.tokens[row];
        const int64_t end = options.stop_at_eos ? run.first_eos(row) : run.length;
        written.answers.emplace_back(tokens.begin() + begin, tokens.begin() + end);
    }
    size_t n_states = 0;
    for (const auto& states : written.history) n_states = std::max(n_states, states.size());
    for (auto& states : written.history) states.resize(n_states, states.back());
    written.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    return written;
}

}  // namespace dreamedge
