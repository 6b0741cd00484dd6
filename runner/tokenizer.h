// The tokenizer of an artifact: a tokenizer.json of Qwen2's kind, byte-level BPE, as the `tokenizers` library reads it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "added_tokens.h"
#include "splitting.h"

namespace dreamedge {

class Tokenizer {
  public:
    // Throws `Error` (Exit::artifact) for a file that is broken, or that holds something which is not known here.
    static Tokenizer load(const std::filesystem::path& file);

    // No token is added to those of the text. Throws `Error` (Exit::usage) if the text would not come through whole.
    std::vector<int64_t> encode(std::string_view text) const;

    // Ids of no token are left out.
    std::string decode(const std::vector<int64_t>& ids, bool skip_special_tokens = true) const;

    int64_t largest_id() const;

  private:
    friend class TokenizerFile;

    struct Merge {
        uint32_t rank;
        int64_t id;
    };

    void encode_piece(std::string_view piece, size_t step, std::vector<int64_t>& ids) const;
    void encode_word(std::string_view word, std::vector<int64_t>& ids) const;

    std::unordered_map<std::string, int64_t> vocab_;
    std::unordered_map<int64_t, std::string> tokens_;
    static uint64_t pair(int64_t left, int64_t right) {
        return static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right);
    }
    std::unordered_map<uint64_t, Merge> merges_;  // by the `pair` of both ids
    std::vector<int64_t> bytes_;                  // the token of each byte, or -1
    bool ignores_merges_ = false, normalizes_ = false;
    std::vector<Cut> cuts_;
    AddedTokens raw_, normalized_;  // found before and after the text is brought to its normal form
    std::unordered_map<int64_t, AddedToken> added_;
};

// The character that stands for a byte in a byte-level vocabulary.
int32_t character_of(uint8_t byte);

}  // namespace dreamedge
