#include "schedule.h"

#include <string>

#include "errors.h"
#include "generation.h"

namespace dreamedge {

std::vector<int64_t> shares(int64_t steps, int64_t n_blocks) {
    if (steps < 1 || steps > MAX_STEPS) {
        usage_error("steps " + std::to_string(steps) + ": must be at least 1, and at most " +
                    std::to_string(MAX_STEPS));
    }
    if (steps < n_blocks) {
        usage_error("steps " + std::to_string(steps) + ": must be at least 1 for each of the " +
                    std::to_string(n_blocks) + " blocks");
    }
    std::vector<int64_t> of_each;
    for (int64_t block = 0; block < n_blocks; ++block) of_each.push_back(steps / n_blocks + (block < steps % n_blocks));
    return of_each;
}

float time_at(int64_t i, int64_t n, double eps) {
    const auto end = static_cast<float>(eps);
    const float step = (end - 1.0F) / static_cast<float>(n - 1);
    return i < n / 2 ? 1.0F + step * static_cast<float>(i) : end - step * static_cast<float>(n - 1 - i);
}

}  // namespace dreamedge
