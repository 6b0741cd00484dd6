// From the logits of masked positions to tokens, and to how sure the network is of each.
//
// Of equally good tokens the one with the lowest id comes first, of equally sure positions the leftmost. Sums over the
// vocabulary are in double here and in float32 in Python: what is less than float32's rounding apart may come in
// another order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "random.h"

namespace dreamedge {

// confidence: the higher, the surer.
struct Sampled {
    int64_t token;
    float confidence;
};

struct Sampling {
    int64_t mask_id;
    std::string alg;  // or `own`, `own_entropy`: of the network's own distribution, before temperature and cuts
    double temperature;
    std::optional<double> top_p;
    std::optional<int64_t> top_k;
};

// A token for one row of logits [V]. The mask itself is never chosen. Throws `Error` (Exit::artifact) for logits that
// are not finite.
Sampled sample(const float* logits, int64_t V, const Sampling& by, Random& random);

// All probabilities of a row of logits, with the mask only where another token is likelier.
std::vector<float> own_distribution(const float* logits, int64_t V, int64_t mask_id);

// In nats.
float entropy_of(const std::vector<float>& distribution);

// Indices of the n positions to write, the surest first. With `alg_temp` they are drawn with probability
// softmax(confidence / alg_temp).
std::vector<size_t> most_confident(std::vector<float> confidence, size_t n, double alg_temp, Random& random);

}  // namespace dreamedge
