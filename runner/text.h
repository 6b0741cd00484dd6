// An artifact that takes text: its program and its tokenizer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "program.h"
#include "tokenizer.h"

namespace dreamedge {

struct TextArtifact {
    std::filesystem::path folder;
    Program program;
    Tokenizer tokenizer;
    int64_t new_tokens;                  // what the task of its validation takes
    std::optional<std::string> warning;  // figures that were out of their bounds when it was made

    // Throws `Error`: Exit::artifact, or Exit::usage for one without a tokenizer.
    static TextArtifact open(const std::filesystem::path& folder, const Loading& loading,
                             std::optional<int64_t> threads);
};

// What is written so far: masks as blocks.
std::string partial_text(const TextArtifact& artifact, const Tokens& tokens);

}  // namespace dreamedge
