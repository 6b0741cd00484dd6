#include "tokenizer.h"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <tuple>

#include "errors.h"
#include "unicode.h"

namespace dreamedge {
namespace {

// The byte that each character of a byte-level vocabulary stands for, or -1.
int byte_of(int32_t character) {
    static const std::vector<int> bytes = [] {
        std::vector<int> of(512, -1);
        for (int byte = 0; byte < 256; ++byte) of[static_cast<size_t>(character_of(static_cast<uint8_t>(byte)))] = byte;
        return of;
    }();
    return character >= 0 && character < 512 ? bytes[static_cast<size_t>(character)] : -1;
}

// Symbols of a word as they are merged: a list, of which the merged ones drop out.
struct Symbol {
    int64_t id;
    size_t before, after;  // indices, or npos
};
constexpr size_t npos = std::string::npos;

}  // namespace

int32_t character_of(uint8_t byte) {
    const auto is_shown = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
    if (is_shown(byte)) return byte;
    int32_t n_before = 0;  // others follow one another from 256 on
    for (int b = 0; b < byte; ++b) n_before += !is_shown(b);
    return 256 + n_before;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text) const {
    if (const size_t at = first_invalid(text); at != npos) {
        usage_error("byte " + std::to_string(at) + " of the text is not valid Unicode in UTF-8");
    }
    std::vector<int64_t> ids;
    try {
        for (const Part& part : raw_.find(text)) {
            if (part.id) {
                ids.push_back(*part.id);
                continue;
            }
            const std::string normal = normalizes_ ? nfc(part.text) : std::string(part.text);
            for (const Part& inner : normalized_.find(normal)) {
                if (inner.id) {
                    ids.push_back(*inner.id);
                } else {
                    encode_piece(inner.text, 0, ids);
                }
            }
        }
    } catch (const std::invalid_argument& error) {
        usage_error(std::string("the tokenizer cannot encode the text: ") + error.what());
    }
    return ids;
}

void Tokenizer::encode_piece(std::string_view piece, size_t step, std::vector<int64_t>& ids) const {
    if (step == cuts_.size()) {
        encode_word(piece, ids);
        return;
    }
    const Cut& cut = cuts_[step];
    std::string prefixed;
    if (cut.adds_prefix_space && (piece.empty() || piece[0] != ' ')) piece = prefixed = " " + std::string(piece);
    if (!cut.pattern) {
        encode_piece(piece, step + 1, ids);
        return;
    }
    for (const std::string_view part : cut.pattern->isolate(piece)) encode_piece(part, step + 1, ids);
}

// Merges the pair of the lowest rank, of equal ones the leftmost, until there is none.
void Tokenizer::encode_word(std::string_view word, std::vector<int64_t>& ids) const {
    if (ignores_merges_) {
        std::string symbols;
        for (const char c : word) symbols += utf8_of(character_of(static_cast<uint8_t>(c)));
        if (const auto whole = vocab_.find(symbols); whole != vocab_.end()) {
            ids.push_back(whole->second);
            return;
        }
    }
    std::vector<Symbol> symbols;
    for (size_t i = 0; i < word.size(); ++i) {
        const int64_t id = bytes_[static_cast<uint8_t>(word[i])];
        if (id < 0) {  // BPE would drop it
            size_t at = last_character(word.substr(0, i + 1));
            const int32_t lost = next_character(word, at);
            char code[16];
            std::snprintf(code, sizeof code, "U+%04X", static_cast<unsigned>(lost));
            usage_error("the tokenizer's vocabulary has no token for " + in_quotes(utf8_of(lost)) + " (" + code + ")");
        }
        symbols.push_back({id, i == 0 ? npos : i - 1, i + 1 == word.size() ? npos : i + 1});
    }
    using Pair = std::tuple<uint32_t, size_t, int64_t, int64_t>;  // rank, place, ids of both
    std::priority_queue<Pair, std::vector<Pair>, std::greater<>> queue;
    const auto look = [&](size_t left) {
        if (left == npos || symbols[left].after == npos) return;
        const int64_t a = symbols[left].id, b = symbols[symbols[left].after].id;
        const auto merge = merges_.find(pair(a, b));
        if (merge != merges_.end()) queue.emplace(merge->second.rank, left, a, b);
    };
    for (size_t i = 0; i < symbols.size(); ++i) look(i);
    while (!queue.empty()) {
        const auto [rank, left, a, b] = queue.top();
        queue.pop();
        const size_t right = symbols[left].after;
        if (symbols[left].id != a || right == npos || symbols[right].id != b) continue;  // it is not there any more
        symbols[left].id = merges_.at(pair(a, b)).id;
        symbols[left].after = symbols[right].after;
        if (symbols[left].after != npos) symbols[symbols[left].after].before = left;
        symbols[right] = {-1, npos, npos};
        look(symbols[left].before);
        look(left);
    }
    for (size_t i = symbols.empty() ? npos : 0; i != npos; i = symbols[i].after) ids.push_back(symbols[i].id);
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids, bool skip_special_tokens) const {
    std::string bytes;
    for (const int64_t id : ids) {
        const auto added = added_.find(id);
        if (added != added_.end() && skip_special_tokens && added->second.special) continue;
        const auto token = tokens_.find(id);
        if (added == added_.end() && token == tokens_.end()) continue;
        const std::string& text = added != added_.end() ? added->second.content : token->second;
        std::string decoded;
        for (size_t at = 0; at < text.size();) {
            const int byte = byte_of(next_character(text, at));
            if (byte < 0) {  // no token of bytes
                decoded = text;
                break;
            }
            decoded += static_cast<char>(byte);
        }
        bytes += decoded;
    }
    return with_replacements(bytes);
}

int64_t Tokenizer::largest_id() const {
    int64_t largest = 0;
    for (const auto& [id, token] : tokens_) largest = std::max(largest, id);
    for (const auto& [id, token] : added_) largest = std::max(largest, id);
    return largest;
}

}  // namespace dreamedge
