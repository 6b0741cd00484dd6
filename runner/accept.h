// Which masks of a step are written, where that follows from how sure the network is: runtime/accept.py, in C++.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "options.h"

namespace dreamedge {

// By the vocabulary.
using Distribution = std::vector<float>;

// A threshold that is low at a block's end, where more is known: by alpha of it with the last mask.
double sliding(double threshold, double alpha, double share_masked);

// At least the threshold; or the relaxed one, up to `radius` columns from a mask that has the threshold.
std::vector<bool> near_anchors(const std::vector<int64_t>& columns, const std::vector<float>& sure, double threshold,
                               double relaxed, int64_t radius);

// The surest, as long as their entropies but for the largest one add up to at most gamma nats.
std::vector<bool> within_entropy_bound(const std::vector<float>& sure, const std::vector<float>& entropies,
                                       double gamma);

// What the last step made of the masks of a row's block.
class Steadiness {
  public:
    // Of each column: whether the KL from the step before was below it for two steps running.
    std::vector<bool> see(const std::vector<int64_t>& columns, std::vector<Distribution> distributions,
                          double kl_threshold);

  private:
    struct State {
        Distribution distribution;
        int64_t steps;
    };
    std::map<int64_t, State> before_;
};

// Of each column, by the rule of the options. sure: the network's own probability of the token, or its negative entropy
// for a rule of that. share_masked: of the masks that the block had at first.
std::vector<bool> accepted(const Options& options, const std::vector<int64_t>& columns, const std::vector<float>& sure,
                           std::vector<Distribution> distributions, double share_masked, Steadiness& seen);

}  // namespace dreamedge
