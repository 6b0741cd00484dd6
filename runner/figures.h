// The figures of a self-test: what the program gave here against what eager gave, each with its bound. As in
// validation/figures.py.
#pragma once

#include <string>
#include <vector>

#include "json.h"
#include "reference.h"

namespace dreamedge {

// Above this, in steps of an activation's int8 grid, eager and XNNPACK differ by float32 rounding alone.
constexpr double TIE_MARGIN = 1e-4;
constexpr double IDENTICAL_DB = 200;  // stands for "no difference at all"

// where: the case that gave the value.
struct Figure {
    std::string group, name;
    double value, bound;
    bool at_least;
    std::string where;

    bool ok() const { return at_least ? value >= bound : value <= bound; }  // NaN is never ok
    std::string line() const;                                               // `name value bound ok`
    std::string sentence() const;                                           // of one that is out of its bound
    Json json() const;                                                      // as a manifest keeps it
};

// One call as it was measured. sha256: of the bits of its logits.
struct Measured {
    std::string sequence;
    size_t call;
    double sqnr_db, tie_margin, floor_db;
    std::string sha256;

    std::string where() const { return sequence + ", call " + std::to_string(call); }
};

// Signal to noise of actual [K, C]: 10 log10(sum expected^2 / sum (expected - actual)^2); NaN if one is not finite.
double sqnr_db(const std::vector<float>& expected, const std::vector<float>& actual, size_t C);

// What the calls have to reach here: all of them, and those free of ties.
struct Bounds {
    double fidelity_db, fidelity_exact_db;
};

// Of the recipe, on a processor that adds the products of float16 in float16, or on another. Throws
// `std::invalid_argument`.
Bounds bounds_of(const Json& recipe, bool native_float16);

// The call that is farthest below its bound, and the worst of those free of ties.
std::vector<Figure> fidelity(const std::vector<Measured>& calls, const Bounds& bounds, double floor_db);

// second: a repetition of some of the calls, by sequence and call.
Figure repeatability(const std::vector<Measured>& first, const std::vector<Measured>& second);

// What the program says of itself, against what it was made with. Throws `std::invalid_argument`.
Figure wrong_metadata(const Json& found, const Json& expected);

}  // namespace dreamedge
