// How many steps a block takes, and how much of its masks each of them writes.
#pragma once

#include <cstdint>
#include <vector>

namespace dreamedge {

// Steps of each block; what does not divide goes to the first ones. Throws `Error` (Exit::usage).
std::vector<int64_t> shares(int64_t steps, int64_t n_blocks);

// As torch.linspace(1, eps, n), which counts from both ends, in float32.
float time_at(int64_t i, int64_t n, double eps);

}  // namespace dreamedge
