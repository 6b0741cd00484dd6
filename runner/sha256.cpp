#include "sha256.h"

#include <algorithm>

namespace dreamedge {
namespace {

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr std::array<uint32_t, 64> K{
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr uint32_t turned(uint32_t value, unsigned by) { return value >> by | value << (32 - by); }

}  // namespace

void Sha256::block(const uint8_t* bytes) {
    std::array<uint32_t, 64> w{};
    for (size_t i = 0; i < 16; ++i) {
        w[i] = static_cast<uint32_t>(bytes[4 * i] << 24 | bytes[4 * i + 1] << 16 | bytes[4 * i + 2] << 8 |
                                     bytes[4 * i + 3]);
    }
    for (size_t i = 16; i < 64; ++i) {
        const uint32_t s0 = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3;
        const uint32_t s1 = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (size_t i = 0; i < 64; ++i) {
        const uint32_t t1 = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i];
        const uint32_t t2 = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<uint32_t, 8> added{a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < 8; ++i) state_[i] += added[i];
}

void Sha256::update(const void* data, size_t n_bytes) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    n_bytes_ += n_bytes;
    while (n_bytes > 0) {
        if (n_pending_ == 0 && n_bytes >= 64) {
            block(bytes);
            bytes += 64, n_bytes -= 64;
            continue;
        }
        const size_t n = std::min(n_bytes, 64 - n_pending_);
        std::copy_n(bytes, n, &pending_[n_pending_]);
        n_pending_ += n, bytes += n, n_bytes -= n;
        if (n_pending_ == 64) block(pending_.data()), n_pending_ = 0;
    }
}

std::string Sha256::hex() {
    const uint64_t n_bits = 8 * n_bytes_;
    const uint8_t one = 0x80, zero = 0;
    update(&one, 1);
    while (n_pending_ != 56) update(&zero, 1);
    for (unsigned i = 0; i < 8; ++i) {
        const auto byte = static_cast<uint8_t>(n_bits >> (56 - 8 * i));
        update(&byte, 1);
    }
    std::string text;
    for (const uint32_t word : state_) {
        for (unsigned i = 0; i < 8; ++i) text += "0123456789abcdef"[word >> (28 - 4 * i) & 0xf];
    }
    return text;
}

}  // namespace dreamedge
