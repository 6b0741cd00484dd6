// Tokens that are found in a text before anything else is: `added_tokens` of a tokenizer.json.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dreamedge {

struct AddedToken {
    int64_t id;
    std::string content;
    bool special, normalized, lstrip, rstrip, single_word;
};

// A part of a text, and the id of the added token that it is.
struct Part {
    std::string_view text;
    std::optional<int64_t> id;
};

// Finds tokens from left to right, the longest of those that begin at a place.
class AddedTokens {
  public:
    // content: as it is found, which may be another than the token's own.
    void add(const AddedToken& token, const std::string& content);

    std::vector<Part> find(std::string_view text) const;

  private:
    struct Node {
        std::map<char, size_t> next;
        std::optional<size_t> token;
    };

    std::optional<std::pair<size_t, const AddedToken*>> longest(std::string_view text, size_t at) const;
    std::vector<Node> nodes_{1};
    std::vector<AddedToken> tokens_;
};

}  // namespace dreamedge
