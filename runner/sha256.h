// SHA-256 (FIPS 180-4). Of its own, because the libraries that have it are larger than this program.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace dreamedge {

class Sha256 {
  public:
    void update(const void* data, size_t n_bytes);
    std::string hex();  // ends it

  private:
    void block(const uint8_t* bytes);
    std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> pending_{};
    size_t n_pending_ = 0;
    uint64_t n_bytes_ = 0;
};

}  // namespace dreamedge
