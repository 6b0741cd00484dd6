#include "accept.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <utility>

#include "sample.h"

namespace dreamedge {
namespace {

constexpr int64_t STEADY = 2;  // steps running that a distribution has hardly changed for, in KLASS

// In nats. What q leaves no room for counts as the least float does.
double kl(const Distribution& p, const Distribution& q) {
    double sum = 0;
    for (size_t i = 0; i < p.size(); ++i) {
        if (p[i] > 0) {
            const double other = std::max(q[i], std::numeric_limits<float>::min());
            sum += static_cast<double>(p[i]) * std::log(static_cast<double>(p[i]) / other);
        }
    }
    return sum;
}

}  // namespace

double sliding(double threshold, double alpha, double share_masked) {
    return threshold * (1 - alpha * (1 - share_masked));
}

std::vector<bool> near_anchors(const std::vector<int64_t>& columns, const std::vector<float>& sure, double threshold,
                               double relaxed, int64_t radius) {
    const auto is_anchor = [&](size_t i) { return sure[i] >= static_cast<float>(threshold); };
    std::vector<bool> accepted(columns.size());
    for (size_t i = 0; i < columns.size(); ++i) {
        bool is_near = false;
        for (size_t j = 0; j < columns.size(); ++j) {
            is_near = is_near || (is_anchor(j) && std::abs(columns[i] - columns[j]) <= radius);
        }
        accepted[i] = is_anchor(i) || (is_near && sure[i] >= static_cast<float>(relaxed));
    }
    return accepted;
}

std::vector<bool> within_entropy_bound(const std::vector<float>& sure, const std::vector<float>& entropies,
                                       double gamma) {
    std::vector<size_t> order(sure.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return sure[a] > sure[b]; });
    std::vector<bool> accepted(sure.size());
    float sum = 0, largest = 0;
    for (const size_t i : order) {
        sum += entropies[i];
        largest = std::max(largest, entropies[i]);
        if (sum - largest > static_cast<float>(gamma)) break;  // it never falls
        accepted[i] = true;
    }
    return accepted;
}

std::vector<bool> Steadiness::see(const std::vector<int64_t>& columns, std::vector<Distribution> distributions,
                                  double kl_threshold) {
    std::map<int64_t, State> now;
    std::vector<bool> steady(columns.size());
    for (size_t i = 0; i < columns.size(); ++i) {
        int64_t steps = 0;
        if (const auto before = before_.find(columns[i]); before != before_.end()) {
            const bool is_close = kl(distributions[i], before->second.distribution) < kl_threshold;
            steps = is_close ? before->second.steps + 1 : 0;
        }
        steady[i] = steps >= STEADY;
        now[columns[i]] = {std::move(distributions[i]), steps};
    }
    before_ = std::move(now);
    return steady;
}

std::vector<bool> accepted(const Options& options, const std::vector<int64_t>& columns, const std::vector<float>& sure,
                           std::vector<Distribution> distributions, double share_masked, Steadiness& seen) {
    if (options.gamma) {
        std::vector<float> entropies;
        for (const Distribution& one : distributions) entropies.push_back(entropy_of(one));
        return within_entropy_bound(sure, entropies, *options.gamma);
    }
    if (options.relaxed_threshold) {
        return near_anchors(columns, sure, *options.threshold, *options.relaxed_threshold, options.radius);
    }
    double least = options.entropy_threshold ? -*options.entropy_threshold : *options.threshold;
    if (options.alpha) least = sliding(least, *options.alpha, share_masked);
    std::vector<bool> is_steady(columns.size(), true), is_accepted;
    if (options.kl_threshold) is_steady = seen.see(columns, std::move(distributions), *options.kl_threshold);
    for (size_t i = 0; i < columns.size(); ++i) {
        is_accepted.push_back(is_steady[i] && sure[i] >= static_cast<float>(least));
    }
    return is_accepted;
}

}  // namespace dreamedge
