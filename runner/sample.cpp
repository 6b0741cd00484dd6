#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "errors.h"

namespace dreamedge {
namespace {

using Row = std::vector<float>;
constexpr float DROPPED = std::numeric_limits<float>::lowest();

// Of equal ones the first.
size_t best(const Row& row) { return static_cast<size_t>(std::max_element(row.begin(), row.end()) - row.begin()); }

Row softmax(const Row& logits) {
    const float largest = logits[best(logits)];
    Row probs(logits.size());
    double total = 0;
    for (size_t i = 0; i < logits.size(); ++i) total += static_cast<double>(probs[i] = std::exp(logits[i] - largest));
    const auto sum = static_cast<float>(total);
    for (float& p : probs) p /= sum;
    return probs;
}

// Keeps the n best tokens, of equal ones those with the lowest ids.
void keep(Row& logits, size_t n) {
    Row ordered = logits;
    std::nth_element(ordered.begin(), ordered.begin() + static_cast<std::ptrdiff_t>(n - 1), ordered.end(),
                     std::greater<>());
    const float last = ordered[n - 1];
    size_t n_ties =
        n - static_cast<size_t>(std::count_if(ordered.begin(), ordered.begin() + static_cast<std::ptrdiff_t>(n),
                                              [&](float value) { return value > last; }));
    for (float& value : logits) {
        if (value > last) continue;
        if (value == last && n_ties > 0) {
            --n_ties;
        } else {
            value = DROPPED;
        }
    }
}

// How many of the best tokens there are up to the one with which their probability passes `top_p`.
size_t nucleus(const Row& logits, double top_p) {
    Row probs = softmax(logits);
    std::sort(probs.begin(), probs.end(), std::greater<>());
    double sum = 0;
    size_t n = 1;
    for (const float p : probs) n += static_cast<float>(sum += static_cast<double>(p)) <= static_cast<float>(top_p);
    return std::min(n, probs.size());
}

// A token with its probability: each waits for an exponential time, the first one wins.
size_t draw(const Row& probs, Random& random) {
    size_t first = 0;
    double highest = -1;
    for (size_t i = 0; i < probs.size(); ++i) {
        const double rate = static_cast<double>(probs[i]) / -std::log1p(-static_cast<double>(random.uniform()));
        if (probs[i] > 0 && rate > highest) highest = rate, first = i;
    }
    return first;
}

}  // namespace

Sampled sample(const float* logits, int64_t V, const Sampling& by, Random& random) {
    Row own(logits, logits + V);
    const auto mask = static_cast<size_t>(by.mask_id);
    Row row = own;
    if (by.temperature > 0) {
        for (float& value : row) {
            value /= static_cast<float>(by.temperature);
            if (value < DROPPED) value = DROPPED;  // what is banned stays a number
        }
        row[mask] = DROPPED;
    }
    const bool is_finite = std::none_of(row.begin(), row.end(), [](float value) { return std::isnan(value); });
    size_t token = best(row);
    if (!is_finite || !std::isfinite(row[token])) artifact_error("the network gave logits that are not finite");
    if (token == mask) {
        row[mask] = own[mask] = DROPPED;
        token = best(row);
    }
    if (by.temperature > 0) own[mask] = DROPPED;
    if (by.top_p && *by.top_p < 1) keep(row, nucleus(row, *by.top_p));
    if (by.top_k && *by.top_k < V) keep(row, static_cast<size_t>(*by.top_k));
    Row probs = softmax(row);
    if (by.temperature > 0) token = draw(probs, random);
    if (by.alg == "own_entropy") return {static_cast<int64_t>(token), -entropy_of(softmax(own))};
    if (by.alg == "own" && (by.temperature > 0 || by.top_p || by.top_k)) probs = softmax(own);
    if (by.alg == "topk_margin") {
        std::partial_sort(probs.begin(), probs.begin() + 2, probs.end(), std::greater<>());
        return {static_cast<int64_t>(token), probs[0] - probs[1]};
    }
    if (by.alg == "entropy") {  // sum p log p
        const double largest = row[best(row)];
        double total = 0, weighted = 0;
        for (const float value : row) {
            const double below = static_cast<double>(value) - largest, p = std::exp(below);
            total += p;
            if (p > 0) weighted += p * below;
        }
        return {static_cast<int64_t>(token), static_cast<float>(weighted / total - std::log(total))};
    }
    return {static_cast<int64_t>(token), probs[token]};
}

std::vector<float> own_distribution(const float* logits, int64_t V, int64_t mask_id) {
    Row own(logits, logits + V);
    if (best(own) == static_cast<size_t>(mask_id)) own[static_cast<size_t>(mask_id)] = DROPPED;
    return softmax(own);
}

float entropy_of(const std::vector<float>& distribution) {
    double sum = 0;
    for (const float p : distribution) {
        if (p > 0) sum -= static_cast<double>(p) * std::log(static_cast<double>(p));
    }
    return static_cast<float>(sum);
}

std::vector<size_t> most_confident(std::vector<float> confidence, size_t n, double alg_temp, Random& random) {
    if (alg_temp > 0) {
        // Gumbel's trick draws without replacement, and also where a probability is too small for a float.
        for (float& value : confidence) {
            const float uniform = std::max(random.uniform(), std::numeric_limits<float>::min());
            value = value / static_cast<float>(alg_temp) - std::log(-std::log(uniform));
        }
    }
    std::vector<size_t> order(confidence.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return confidence[a] > confidence[b]; });
    order.resize(std::min(n, order.size()));
    return order;
}

}  // namespace dreamedge
