// tokenizer.json, read with suspicion: what is not known here is refused, never left out.
#include <map>
#include <set>
#include <stdexcept>

#include "errors.h"
#include "tokenizer.h"
#include "unicode.h"

namespace dreamedge {
namespace {

constexpr int64_t MAX_BYTES = 64'000'000, MAX_ID = 1 << 24;
const std::set<std::string> FILE_KEYS{"version",       "truncation",     "padding", "added_tokens", "normalizer",
                                      "pre_tokenizer", "post_processor", "decoder", "model"};
const std::set<std::string> MODEL_KEYS{"type",
                                       "dropout",
                                       "unk_token",
                                       "continuing_subword_prefix",
                                       "end_of_word_suffix",
                                       "fuse_unk",
                                       "byte_fallback",
                                       "ignore_merges",
                                       "vocab",
                                       "merges"};

void check_keys(const Json& object, const std::set<std::string>& known) {
    if (!object.is_object()) throw std::invalid_argument("not a JSON object");
    for (const auto& [key, value] : object.items()) {
        if (known.count(key) == 0)
            throw std::invalid_argument("the key " + in_quotes(key) + ", which is not known here");
    }
}

int64_t id_of(const std::string& token, const Json& value) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() >= MAX_ID) {
        throw std::invalid_argument("token " + in_quotes(token) + ": " + one_line(value.dump(), 30) + " is no id");
    }
    return value.get<int64_t>();
}

bool flag_of(const Json& entry, const char* name) {
    const Json& value = member(entry, name);
    if (!value.is_boolean()) throw std::invalid_argument(in_quotes(name) + " of an added token is not true or false");
    return value.get<bool>();
}

bool has_nfc(const Json& normalizer) {
    if (normalizer.is_null()) return false;
    const std::string type = text_of(normalizer, "type");
    if (type == "NFC") return true;
    if (type != "Sequence")
        throw std::invalid_argument("the normalizer " + in_quotes(type) + ", which is not known here");
    bool found = false;
    for (const Json& part : member(normalizer, "normalizers")) found = has_nfc(part) || found;
    return found;
}

// "left right", or a list of both.
std::pair<std::string, std::string> pair_of(const Json& entry, size_t place) {
    if (entry.is_string()) {
        const auto text = entry.get<std::string>();
        const size_t space = text.find(' ');
        const bool is_pair = space != std::string::npos && space > 0 && space + 1 < text.size() &&
                             text.find(' ', space + 1) == std::string::npos;
        if (is_pair) return {text.substr(0, space), text.substr(space + 1)};
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
        return {entry[0].get<std::string>(), entry[1].get<std::string>()};
    }
    throw std::invalid_argument("merge " + std::to_string(place) + ": " + one_line(entry.dump(), 60) +
                                " is no pair of tokens");
}

}  // namespace

class TokenizerFile {
  public:
    static Tokenizer read(const Json& content) {
        check_keys(content, FILE_KEYS);
        Tokenizer made;
        made.normalizes_ = has_nfc(content.value("normalizer", Json()));
        bool is_byte_level = false;
        made.cuts_ = cuts_of(content.value("pre_tokenizer", Json()), is_byte_level);
        const Json decoder = content.value("decoder", Json());
        if (!is_byte_level || !decoder.is_object() || text_of(decoder, "type") != "ByteLevel") {
            throw std::invalid_argument(
                "its pre_tokenizer and decoder are not ByteLevel, and no others are known here");
        }
        read_model(member(content, "model"), made);
        read_added(content.value("added_tokens", Json::array()), made);
        return made;
    }

  private:
    static void read_model(const Json& model, Tokenizer& made) {
        if (text_of(model, "type") != "BPE")
            throw std::invalid_argument("its model is not BPE, and no other is known here");
        check_keys(model, MODEL_KEYS);
        for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}) {
            const Json value = model.value(key, Json());
            if (!value.is_null() && value != Json("") && value != Json(false) && value != Json(0.0)) {
                throw std::invalid_argument("model." + std::string(key) + ", which is not known here");
            }
        }
        made.ignores_merges_ = model.value("ignore_merges", Json(false)) == Json(true);
        const Json& vocab = member(model, "vocab");
        if (!vocab.is_object()) throw std::invalid_argument("model.vocab is no object");
        for (const auto& [token, value] : vocab.items()) {
            const int64_t id = id_of(token, value);
            const auto [other, is_new] = made.tokens_.emplace(id, token);
            if (!is_new) {
                throw std::invalid_argument("tokens " + in_quotes(other->second) + " and " + in_quotes(token) +
                                            " have the same id " + std::to_string(id));
            }
            made.vocab_[token] = id;
        }
        read_merges(member(model, "merges"), made);
        for (int byte = 0; byte < 256; ++byte) {
            const auto found = made.vocab_.find(utf8_of(character_of(static_cast<uint8_t>(byte))));
            made.bytes_.push_back(found == made.vocab_.end() ? -1 : found->second);
        }
    }

    static void read_merges(const Json& merges, Tokenizer& made) {
        if (!merges.is_array()) throw std::invalid_argument("model.merges is no list");
        for (size_t i = 0; i < merges.size(); ++i) {
            const auto [left, right] = pair_of(merges[i], i + 1);
            const auto id = [&, place = i](const std::string& token) {
                const auto found = made.vocab_.find(token);
                if (found == made.vocab_.end()) {
                    throw std::invalid_argument("merge " + std::to_string(place + 1) + ": " +
                                                one_line(merges[place].dump(), 60) + ": " + in_quotes(token) +
                                                " is not in the vocabulary");
                }
                return found->second;
            };
            const int64_t a = id(left), b = id(right);
            made.merges_[Tokenizer::pair(a, b)] = {static_cast<uint32_t>(i), id(left + right)};
        }
    }

    static void read_added(const Json& entries, Tokenizer& made) {
        if (!entries.is_array()) throw std::invalid_argument("added_tokens is no list");
        int64_t largest = -1;
        for (const Json& entry : entries) {
            check_keys(entry, {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
            AddedToken token{0,
                             text_of(entry, "content"),
                             flag_of(entry, "special"),
                             flag_of(entry, "normalized"),
                             flag_of(entry, "lstrip"),
                             flag_of(entry, "rstrip"),
                             flag_of(entry, "single_word")};
            token.id = id_of(token.content, member(entry, "id"));
            const auto known = made.vocab_.find(token.content);
            const auto size = static_cast<int64_t>(made.vocab_.size());
            const int64_t next = largest >= size ? largest + 1 : size;
            if (token.id != (known == made.vocab_.end() ? next : known->second)) {
                throw std::invalid_argument("added token " + in_quotes(token.content) + ": id " +
                                            std::to_string(token.id) + " is not the next one");
            }
            largest = std::max(largest, token.id);
            if (!made.added_.emplace(token.id, token).second) {
                throw std::invalid_argument("added token " + in_quotes(token.content) + " is there twice");
            }
            if (known == made.vocab_.end() && made.tokens_.count(token.id) > 0) {
                throw std::invalid_argument("tokens " + in_quotes(made.tokens_[token.id]) + " and " +
                                            in_quotes(token.content) + " have the same id " + std::to_string(token.id));
            }
            if (token.normalized) {
                made.normalized_.add(token, made.normalizes_ ? nfc(token.content) : token.content);
            } else {
                made.raw_.add(token, token.content);
            }
        }
    }
};

Tokenizer Tokenizer::load(const std::filesystem::path& file) {
    try {
        return TokenizerFile::read(parse_json(read_file(file, MAX_BYTES)));
    } catch (const std::invalid_argument& error) {
        artifact_error(file.string() + ": not a tokenizer: " + one_line(error.what(), 200));
    }
}

}  // namespace dreamedge
