// torch's generator of the CPU: the same numbers from the same seed, where they are drawn one after the other.
#pragma once

#include <cstdint>
#include <random>

namespace dreamedge {

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(static_cast<uint32_t>(seed)) {}

    // As torch.randint(n, …), n up to 2**28.
    uint32_t below(uint32_t n) { return static_cast<uint32_t>(engine_() % n); }

    // As torch.rand in float32: 24 bits, 0 and above, below 1.
    float uniform() { return static_cast<float>(engine_() & 0xffffff) * 0x1p-24F; }

  private:
    std::mt19937 engine_;
};

}  // namespace dreamedge
