#include "figures.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <set>
#include <stdexcept>

namespace dreamedge {
namespace {

std::string six_digits(double value) {
    char text[40];
    std::snprintf(text, sizeof text, "%.6g", value);
    return text;
}

// The call that is least by a measure of it; NaN is less than anything.
template <typename Of>
const Measured& worst(const std::vector<const Measured*>& calls, Of of) {
    const auto rank = [&](const Measured* call) { return std::isnan(of(*call)) ? -INF : of(*call); };
    return **std::min_element(calls.begin(), calls.end(), [&](auto* a, auto* b) { return rank(a) < rank(b); });
}

}  // namespace

std::string Figure::line() const {
    const std::string end = where.empty() ? "" : " (" + where + ")";
    return name + " " + six_digits(value) + (at_least ? " >= " : " <= ") + six_digits(bound) +
           (ok() ? " ok" : " NOT OK") + end;
}

std::string Figure::sentence() const {
    return group + ": " + name + " is " + six_digits(value) + ", must be " + (at_least ? "at least " : "at most ") +
           six_digits(bound) + (where.empty() ? "" : " (" + where + ")");
}

Json Figure::json() const {
    const auto finite = [](double v) {  // JSON has no infinity and no NaN
        return std::isfinite(v) ? Json(v) : Json(std::isnan(v) ? "nan" : v > 0 ? "inf" : "-inf");
    };
    return {
        {"group", group}, {"name", name}, {"value", finite(value)}, {"bound", finite(bound)}, {"at_least", at_least},
        {"where", where}, {"ok", ok()}};
}

double sqnr_db(const std::vector<float>& expected, const std::vector<float>& actual, size_t C) {
    if (expected.size() != actual.size()) throw std::invalid_argument("logits of another shape than the recorded");
    double noise = 0, signal = 0;
    for (size_t row = 0; row < expected.size(); row += C) {
        double row_noise = 0, row_signal = 0;
        for (size_t i = row; i < row + C; ++i) {
            if (!std::isfinite(actual[i])) return std::nan("");
            const double e = expected[i], difference = e - static_cast<double>(actual[i]);
            row_noise += difference * difference, row_signal += e * e;
        }
        noise += row_noise, signal += row_signal;
    }
    if (noise == 0) return IDENTICAL_DB;
    return signal > 0 ? 10 * std::log10(signal / noise) : -INF;
}

Bounds bounds_of(const Json& recipe, bool native_float16) {
    const Json& given = member(recipe, "bounds");
    const Json& native = member(given, "native_float16_db");
    const double lower = native.is_null() ? INF : number_of(given, "native_float16_db");
    const double least = native_float16 ? lower : INF;
    return {std::min(number_of(given, "fidelity_db"), least), std::min(number_of(given, "fidelity_exact_db"), least)};
}

std::vector<Figure> fidelity(const std::vector<Measured>& calls, const Bounds& bounds, double floor_db) {
    const double exact_bound = std::min(bounds.fidelity_exact_db, floor_db);
    std::vector<const Measured*> all, exact;
    bool has_ties = false;
    for (const Measured& call : calls) {
        all.push_back(&call);
        if (call.tie_margin > TIE_MARGIN) exact.push_back(&call);
        has_ties = has_ties || call.tie_margin < INF;
    }
    // Without quantized activations no call has a tie, and both bounds are of the same calls.
    const double bound = has_ties ? bounds.fidelity_db : std::min(bounds.fidelity_db, floor_db);
    const auto floor_of = [&](const Measured& call) { return std::min(bound, call.floor_db); };
    const Measured& least = worst(all, [&](const Measured& call) { return call.sqnr_db - floor_of(call); });
    std::vector<Figure> figures{{"fidelity", "fidelity_db", least.sqnr_db, floor_of(least), true, least.where()}};
    if (exact.empty()) {
        figures[0].where += "; no call is free of rounding ties";
        return figures;
    }
    const auto exact_floor_of = [&](const Measured& call) { return std::min(exact_bound, call.floor_db); };
    const Measured& least_exact =
        worst(exact, [&](const Measured& call) { return call.sqnr_db - exact_floor_of(call); });
    figures.push_back({"fidelity", "fidelity_exact_db", least_exact.sqnr_db, exact_floor_of(least_exact), true,
                       least_exact.where() + "; " + std::to_string(exact.size()) + " of " +
                           std::to_string(calls.size()) + " calls are free of rounding ties"});
    return figures;
}

Figure repeatability(const std::vector<Measured>& first, const std::vector<Measured>& second) {
    std::map<std::string, std::string> digests;
    for (const Measured& call : first) digests[call.where()] = call.sha256;
    std::string where;
    int n = 0;
    for (const Measured& call : second) {
        if (digests.at(call.where()) == call.sha256) continue;
        if (++n <= 3) where += (n == 1 ? "" : ", ") + call.sequence + "/" + std::to_string(call.call);
    }
    if (where.empty() && second.size() < first.size()) {
        where = std::to_string(second.size()) + " of " + std::to_string(first.size()) + " calls, the shortest";
    }
    return {"repeatability", "calls_that_differ", static_cast<double>(n), 0, false, where};
}

Figure wrong_metadata(const Json& found, const Json& expected) {
    if (!expected.is_object()) throw std::invalid_argument("'metadata' is no object");
    std::set<std::string> names;
    for (const Json* values : {&found, &expected}) {
        for (const auto& entry : values->items()) names.insert(entry.key());
    }
    std::string wrong;
    int n = 0;
    for (const std::string& name : names) {
        if (found.value(name, Json()) == expected.value(name, Json())) continue;
        wrong += (n++ == 0 ? "" : ", ") + name;
    }
    return {"format", "wrong_metadata", static_cast<double>(n), 0, false, wrong};
}

}  // namespace dreamedge
