// Recorded calls and what eager gave for them: reference.safetensors, as far as a device is judged by it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "network.h"
#include "safetensors.h"

namespace dreamedge {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64_t SKETCH = 1024;  // vocabularies up to this are kept whole, wider ones as a sketch of so many numbers

// One `forward`, and the place of what it should give.
//
// tie_margin: how far the nearest quantized activation is from a rounding tie, in steps of its int8 grid (0..0.5);
// infinite without quantized activations. floor_db: decibels to which a tie may bring a right program in this very
// call; infinite where the recipe's bound is enough.
struct Call {
    std::vector<int64_t> tokens, rows;
    int64_t start_pos, kv_len;
    double tie_margin, floor_db;
    std::string eager;  // name of a tensor [K, min(V, SKETCH)]
};

// Calls in order on one cache. Each sees only positions that the sequence has written.
struct Sequence {
    std::string name;
    std::vector<Call> calls;

    int64_t n_tokens() const;
};

class Reference {
  public:
    // Throws `Error` (Exit::artifact) for anything that `validation.reference.save_reference` does not write.
    static Reference load(const std::filesystem::path& file);

    std::vector<Sequence> sequences;
    // Decibels to which rounding alone may bring a right program; infinite where that was not measured.
    double floor_db;

    // What eager gave, float32 [K, C]. Throws `std::invalid_argument`.
    std::vector<float> eager(const Call& call) const;

  private:
    explicit Reference(Safetensors file);
    Safetensors file_;
};

// What is kept of logits [K, V]: themselves, or their count sketch [K, SKETCH], as validation/logits.py says.
std::vector<float> vector_of(const Logits& logits);

}  // namespace dreamedge
