#include "text.h"

#include <stdexcept>

#include "artifact.h"
#include "errors.h"
#include "threads.h"

namespace dreamedge {
namespace {

constexpr const char* MASK = "░";

std::optional<std::string> warning_of(const std::filesystem::path& folder, const Json& manifest) {
    std::string names;
    for (const Json& figure : member(manifest, "figures")) {
        const Json& ok = member(figure, "ok");
        if (!ok.is_boolean()) throw std::invalid_argument("'ok' of a figure is not true or false");
        if (!ok.get<bool>()) names += (names.empty() ? "" : ", ") + text_of(figure, "name");
    }
    if (names.empty()) return std::nullopt;
    return folder.string() + " was out of its bounds when it was made: " + names;
}

}  // namespace

TextArtifact TextArtifact::open(const std::filesystem::path& folder, const Loading& loading,
                                std::optional<int64_t> threads) {
    const Json manifest = load_manifest(folder);
    const std::filesystem::path file = folder / MANIFEST_FILE;
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(folder / TOKENIZER_FILE, ignored)) {
        usage_error(folder.string() + " has no " + TOKENIZER_FILE +
                    ": its checkpoint had no tokenizer, so it takes no text; give ids=");
    }
    Tokenizer tokenizer = Tokenizer::load(folder / TOKENIZER_FILE);
    use_threads(threads);
    Program program = Program::open(folder, loading);
    try {
        const int64_t new_tokens = whole_of(member(manifest, "task"), "new_tokens");
        if (new_tokens < 1 || new_tokens > program.metadata().get_max_seq_len) {
            throw std::invalid_argument("task.new_tokens is " + std::to_string(new_tokens));
        }
        if (const int64_t largest = tokenizer.largest_id(); largest >= program.metadata().get_vocab_size) {
            artifact_error(folder.string() + ": its tokenizer has id " + std::to_string(largest) +
                           ", its program knows 0.." + std::to_string(program.metadata().get_vocab_size - 1));
        }
        auto warning = warning_of(folder, manifest);
        return {folder, std::move(program), std::move(tokenizer), new_tokens, std::move(warning)};
    } catch (const std::invalid_argument& error) {
        artifact_error(file.string() + ": not a manifest: " + error.what());
    }
}

std::string partial_text(const TextArtifact& artifact, const Tokens& tokens) {
    const int64_t mask_id = artifact.program.metadata().get_mask_id;
    std::string text;
    Tokens run;  // neighbours that are written, together: a character may be made of several tokens
    for (const int64_t token : tokens) {
        if (token != mask_id) {
            run.push_back(token);
            continue;
        }
        text += artifact.tokenizer.decode(run) + MASK;
        run.clear();
    }
    return text + artifact.tokenizer.decode(run);
}

}  // namespace dreamedge
