#include "reference.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>

#include "errors.h"
#include "json.h"
#include "random.h"

namespace dreamedge {
namespace {

// Every reference holds sequences of each of these; numbered ones are named KIND-00, KIND-01, …
const std::set<std::string> KINDS{"whole",       "prefill-then-block", "rewrite-inside", "suffix-hidden",
                                  "rows-subset", "one-token",          "one-inside",     "max-length",
                                  "short",       "short-append",       "short-rewrite"};

std::string kind_of(std::string name) {
    name.erase(name.find_last_not_of("0123456789") + 1);
    name.erase(name.find_last_not_of('-') + 1);
    return name;
}

double tie_margin(const Json& entry) {
    const Json& margin = member(entry, "tie_margin");
    if (margin.is_null()) return INF;
    if (!margin.is_number_float() || !(margin.get<double>() >= 0)) throw std::invalid_argument("a tie_margin below 0");
    return margin.get<double>();
}

double decibels(const Json& entry) {
    const Json& floor = member(entry, "floor_db");
    if (floor.is_null()) return INF;
    if (!floor.is_number_float() || std::isnan(floor.get<double>()))
        throw std::invalid_argument("floor_db is no number");
    return floor.get<double>();
}

Call call_of(const Safetensors& file, const std::string& prefix, const Json& entry) {
    Call call{file.int64(prefix + "tokens", 1),
              file.int64(prefix + "rows", 1),
              whole_of(entry, "start_pos"),
              whole_of(entry, "kv_len"),
              tie_margin(entry),
              decibels(entry),
              prefix + "eager"};
    if (call.start_pos < 0 || call.start_pos >= call.kv_len || call.kv_len > INT32_MAX) {
        throw std::invalid_argument(prefix + ": start_pos " + std::to_string(call.start_pos) + ", kv_len " +
                                    std::to_string(call.kv_len));
    }
    if (call.tokens.empty() || call.rows.empty()) throw std::invalid_argument(prefix + ": no tokens, or no rows");
    const Safetensors::Place& eager = file.place(call.eager);
    if (eager.dtype != "F32" || eager.shape.size() != 2 || eager.shape[0] != static_cast<int64_t>(call.rows.size())) {
        throw std::invalid_argument(call.eager + ": of another type or shape");
    }
    return call;
}

}  // namespace

int64_t Sequence::n_tokens() const {
    int64_t n = 0;
    for (const Call& call : calls) n += static_cast<int64_t>(call.tokens.size());
    return n;
}

Reference::Reference(Safetensors file) : floor_db(INF), file_(std::move(file)) {
    const auto note = file_.metadata().find("reference");
    if (note == file_.metadata().end()) throw std::invalid_argument("no note 'reference'");
    const Json header = parse_json(note->second);
    floor_db = decibels(header);
    std::set<std::string> names;
    for (const Json& entry : member(header, "sequences")) {
        Sequence sequence{text_of(entry, "name"), {}};
        for (const Json& call : member(entry, "calls")) {
            const std::string prefix = sequence.name + "/" + std::to_string(sequence.calls.size()) + "/";
            sequence.calls.push_back(call_of(file_, prefix, call));
        }
        if (sequence.calls.empty()) throw std::invalid_argument(in_quotes(sequence.name) + ": no calls");
        names.insert(sequence.name);
        sequences.push_back(std::move(sequence));
    }
    // A file that was cut down must not pass: each use of the contract is there.
    std::set<std::string> kinds;
    for (const std::string& name : names) kinds.insert(kind_of(name));
    for (const std::string& kind : KINDS) {
        if (kinds.count(kind) == 0) throw std::invalid_argument("lacks the recorded calls " + kind);
    }
    if (kinds != KINDS || names.size() < sequences.size()) {
        throw std::invalid_argument("holds recorded calls of no known kind, or of the same name");
    }
}

Reference Reference::load(const std::filesystem::path& file) {
    try {
        return Reference(Safetensors(file));
    } catch (const std::invalid_argument& error) {
        artifact_error(file.string() + ": not readable as recorded calls: " + one_line(error.what(), 300));
    }
}

std::vector<float> Reference::eager(const Call& call) const { return file_.float32(call.eager, 2); }

std::vector<float> vector_of(const Logits& logits) {
    const auto V = static_cast<size_t>(logits.V), K = static_cast<size_t>(logits.K);
    if (logits.V <= SKETCH) return {logits.data, logits.data + K * V};
    // Each logit goes, with a random sign, into one of SKETCH sums.
    Random random(V);
    std::vector<uint32_t> bucket(V);
    std::vector<double> sign(V);
    for (uint32_t& place : bucket) place = random.below(SKETCH);
    for (double& one : sign) one = 2.0 * random.below(2) - 1;
    std::vector<float> vector;
    for (int64_t k = 0; k < logits.K; ++k) {
        std::vector<double> sums(SKETCH);
        for (size_t i = 0; i < V; ++i) sums[bucket[i]] += sign[i] * static_cast<double>(logits.row(k)[i]);
        for (const double sum : sums) vector.push_back(static_cast<float>(sum));
    }
    return vector;
}

}  // namespace dreamedge
