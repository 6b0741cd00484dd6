#include "self_test.h"

#include <sys/utsname.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <set>
#include <stdexcept>

#include "artifact.h"
#include "errors.h"
#include "figures.h"
#include "limits.h"
#include "memory.h"
#include "processor.h"
#include "sha256.h"
#include "threads.h"

namespace dreamedge {
namespace {

using Clock = std::chrono::steady_clock;

// Bytes of the program times tokens of its second run: as in validation/judge.py.
constexpr int64_t REPEATED = int64_t{1} << 42;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

Json json_of(const Metadata& meta) {
    return {{"get_contract_version", meta.get_contract_version},
            {"get_max_seq_len", meta.get_max_seq_len},
            {"get_max_context_len", meta.get_max_context_len},
            {"get_max_rows", meta.get_max_rows},
            {"get_vocab_size", meta.get_vocab_size},
            {"get_n_layers", meta.get_n_layers},
            {"get_bos_id", meta.get_bos_id},
            {"get_eos_ids", meta.get_eos_ids},
            {"get_pad_id", meta.get_pad_id},
            {"get_mask_id", meta.get_mask_id},
            {"get_block_length", meta.get_block_length},
            {"logits_shift", meta.logits_shift},
            {"use_kv_cache", meta.use_kv_cache},
            {"use_sdpa_with_kv_cache", meta.use_sdpa_with_kv_cache},
            {"enable_dynamic_shape", meta.enable_dynamic_shape}};
}

// The shortest sequences that have no more than `most` tokens in all, one at least, in their order.
std::set<std::string> shortest(const std::vector<Sequence>& sequences, int64_t most) {
    std::vector<const Sequence*> ordered;
    for (const Sequence& sequence : sequences) ordered.push_back(&sequence);
    std::stable_sort(ordered.begin(), ordered.end(), [](auto* a, auto* b) { return a->n_tokens() < b->n_tokens(); });
    std::set<std::string> names;
    int64_t n = 0;
    for (const Sequence* sequence : ordered) {
        n += sequence->n_tokens();
        if (n > most && !names.empty()) break;
        names.insert(sequence->name);
    }
    return names;
}

std::vector<Measured> replay(Program& program, const Reference& reference, const std::set<std::string>& chosen) {
    const auto n_bytes = static_cast<double>(std::filesystem::file_size(program.path()));
    const int64_t V = program.metadata().get_vocab_size, C = std::min(V, SKETCH);
    std::vector<Measured> measured;
    for (const Sequence& sequence : reference.sequences) {
        if (chosen.count(sequence.name) == 0) continue;
        const Forward forward = program.network().start();
        for (size_t i = 0; i < sequence.calls.size(); ++i) {
            const Call& call = sequence.calls[i];
            end_in(60 + static_cast<double>(call.tokens.size()) * n_bytes / 0x1p30);
            measured.push_back({sequence.name, i, 0, call.tie_margin, call.floor_db, ""});
            try {
                const Logits logits = forward(call.tokens, call.start_pos, call.kv_len, call.rows);
                Sha256 digest;
                digest.update(logits.data, static_cast<size_t>(logits.K * logits.V) * sizeof(float));
                measured.back().sha256 = digest.hex();
                measured.back().sqnr_db = sqnr_db(reference.eager(call), vector_of(logits), static_cast<size_t>(C));
            } catch (const Error& error) {
                const Exit code = error.code == Exit::resource ? Exit::resource : Exit::artifact;
                throw Error(code, measured.back().where() + ": " + error.what());
            } catch (const std::invalid_argument& error) {
                artifact_error(program.path().string() + ": " + measured.back().where() + ": " + error.what());
            }
        }
    }
    end_in(0);
    return measured;
}

Json calls_json(const std::vector<Measured>& calls) {
    Json list = Json::array();
    for (const Measured& call : calls) {
        const Json db = std::isfinite(call.sqnr_db) ? Json(call.sqnr_db) : Json();
        const Json margin = std::isfinite(call.tie_margin) ? Json(call.tie_margin) : Json();
        list.push_back({{"sequence", call.sequence},
                        {"call", call.call},
                        {"sqnr_db", db},
                        {"tie_margin", margin},
                        {"sha256", call.sha256}});
    }
    return list;
}

}  // namespace

void self_test(const std::filesystem::path& artifact, bool as_json, Load load, std::optional<int64_t> threads) {
    if (!multiplies_right()) {
        usage_error(
            "this processor multiplies integers wrong with SME, as QEMU before 10 does: it cannot judge a program");
    }
    const Json manifest = read_manifest(artifact);
    const Reference reference = Reference::load(artifact / REFERENCE_FILE);
    const int64_t n_threads = use_threads(threads);
    const auto n_bytes = static_cast<int64_t>(std::filesystem::file_size(artifact / MODEL_FILE));
    std::set<std::string> all;
    for (const Sequence& sequence : reference.sequences) all.insert(sequence.name);
    std::vector<Measured> first, second;
    Json metadata;
    double load_seconds = 0, run_seconds = 0;
    for (std::vector<Measured>* run : {&first, &second}) {
        end_in(120 + static_cast<double>(n_bytes) / 0x1p24);
        const auto started = Clock::now();
        Program program = Program::open(artifact, {load});
        const auto loaded = Clock::now();
        const bool is_first = run == &first;
        *run = replay(program, reference,
                      is_first ? all : shortest(reference.sequences, REPEATED / std::max<int64_t>(1, n_bytes)));
        if (!is_first) break;
        metadata = json_of(program.metadata());
        load_seconds = std::chrono::duration<double>(loaded - started).count();
        run_seconds = seconds_since(loaded);
    }
    std::vector<Figure> figures;
    try {
        figures = fidelity(first, bounds_of(member(manifest, "recipe"), native_float16()), reference.floor_db);
        figures.push_back(wrong_metadata(metadata, member(member(manifest, "expected_format"), "metadata")));
    } catch (const std::invalid_argument& error) {
        artifact_error((artifact / MANIFEST_FILE).string() + ": not a manifest: " + error.what());
    }
    figures.push_back(repeatability(first, second));
    std::string wrong;
    Json listed = Json::array();
    for (const Figure& figure : figures) {
        if (!figure.ok() && wrong.empty()) wrong = figure.sentence();
        if (as_json) {
            listed.push_back(figure.json());
        } else {
            std::cout << one_line(figure.line()) << "\n";
        }
    }
    if (as_json) {
        utsname machine{};
        uname(&machine);
        const Json said{{"ok", wrong.empty()},          {"figures", listed},
                        {"calls", calls_json(first)},   {"metadata", metadata},
                        {"processor", machine.machine}, {"threads", n_threads},
                        {"load_seconds", load_seconds}, {"run_seconds", run_seconds},
                        {"peak_rss", peak_rss()},       {"anonymous", anonymous()},
                        {"features", features()}};
        std::cout << said.dump() << "\n";
    }
    if (!wrong.empty()) artifact_error(artifact.string() + ": " + wrong);
}

}  // namespace dreamedge
