#include "added_tokens.h"

#include <algorithm>

#include "unicode.h"

namespace dreamedge {
namespace {

bool ends_with_word(std::string_view text) {
    if (text.empty()) return false;
    size_t at = last_character(text);
    return is_word(next_character(text, at));
}

bool starts_with_word(std::string_view text) {
    size_t at = 0;
    return !text.empty() && is_word(next_character(text, at));
}

size_t without_spaces_at_end(std::string_view text) {
    while (!text.empty()) {
        const size_t last = last_character(text);
        size_t at = last;
        if (!is_space(next_character(text, at))) break;
        text = text.substr(0, last);
    }
    return text.size();
}

size_t spaces_at_start(std::string_view text) {
    for (size_t at = 0, start = 0; at < text.size(); start = at) {
        if (!is_space(next_character(text, at))) return start;
    }
    return text.size();
}

}  // namespace

void AddedTokens::add(const AddedToken& token, const std::string& content) {
    if (content.empty()) return;
    size_t node = 0;
    for (const char c : content) {
        const auto found = nodes_[node].next.find(c);
        if (found != nodes_[node].next.end()) {
            node = found->second;
        } else {
            nodes_[node].next[c] = nodes_.size();
            node = nodes_.size();
            nodes_.emplace_back();
        }
    }
    if (nodes_[node].token) return;
    nodes_[node].token = tokens_.size();
    tokens_.push_back(token);
}

std::optional<std::pair<size_t, const AddedToken*>> AddedTokens::longest(std::string_view text, size_t at) const {
    std::optional<std::pair<size_t, const AddedToken*>> found;
    for (size_t node = 0, i = at; i < text.size(); ++i) {
        const auto next = nodes_[node].next.find(text[i]);
        if (next == nodes_[node].next.end()) break;
        node = next->second;
        if (nodes_[node].token) found = {i + 1, &tokens_[*nodes_[node].token]};
    }
    return found;
}

std::vector<Part> AddedTokens::find(std::string_view text) const {
    std::vector<Part> parts;
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
        const auto found = longest(text, at);
        if (!found) {
            ++at;
            continue;
        }
        size_t start = at, stop = found->first;
        const AddedToken& token = *found->second;
        at = stop;
        if (token.single_word && (ends_with_word(text.substr(0, start)) || starts_with_word(text.substr(stop))))
            continue;
        // Spaces that the token before took are not there any more.
        if (token.lstrip) start = std::max(without_spaces_at_end(text.substr(0, start)), done);
        if (token.rstrip) stop += spaces_at_start(text.substr(stop));
        if (done < start) parts.push_back({text.substr(done, start - done), std::nullopt});
        parts.push_back({text.substr(start, stop - start), token.id});
        done = stop;
    }
    if (done < text.size()) parts.push_back({text.substr(done), std::nullopt});
    return parts;
}

}  // namespace dreamedge
