#include "splitting.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <stdexcept>

#include "errors.h"
#include "unicode.h"

namespace dreamedge {
namespace {

constexpr uint32_t MOST_STEPS = 10'000'000, MOST_KIB = 1 << 18;

// What ByteLevel itself cuts by.
const char* const GPT2 = R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

[[noreturn]] void unknown(const std::string& what) { throw std::invalid_argument(what + ", which is not known here"); }

// An escape at `at`, rewritten. What PCRE2 and Oniguruma read differently is refused.
std::string escape(std::string_view written, size_t& at, bool in_class) {
    const char c = at + 1 < written.size() ? written[at + 1] : '\0';
    const std::string spaces = SPACES;
    at += 2;
    if (c == 's') return in_class ? spaces : "[" + spaces + "]";
    if (c == 'S' && !in_class) return "[^" + spaces + "]";
    if (c == 'p' || c == 'P') {
        const size_t end = written.find('}', at);
        if (at >= written.size() || written[at] != '{' || end == std::string_view::npos || end - at > 20) {
            unknown("a property without braces");
        }
        const std::string property(written.substr(at, end + 1 - at));
        at = end + 1;
        return std::string("\\") + c + property;
    }
    const bool is_plain = c == 'r' || c == 'n' || c == 't' || c == 'd' || (c > ' ' && c < '0') ||
                          std::string_view(":;<=>?@[\\]^_`{|}~ ").find(c) != std::string_view::npos;
    if (!is_plain || c == '\0') unknown("the escape \\" + one_line(std::string(1, c)));
    return std::string("\\") + c;
}

std::string in_pcre2(std::string_view written) {
    std::string made;
    bool in_class = false;
    for (size_t at = 0; at < written.size();) {
        const char c = written[at];
        if (c == '\\') {
            made += escape(written, at, in_class);
            continue;
        }
        if (in_class && (c == '[' || written.substr(at, 2) == "&&")) unknown("a class in a class");
        if (!in_class && (c == '^' || c == '$')) unknown("the anchor " + std::string(1, c));
        if (!in_class && c == '(' && at + 1 < written.size() && written[at + 1] == '*') unknown("a verb");
        if (!in_class && written.substr(at, 2) == "(?") {
            const auto kind = written.substr(at + 2, 2);
            const bool is_known = kind.substr(0, 1) == ":" || kind.substr(0, 1) == "!" || kind.substr(0, 1) == "=" ||
                                  kind == "i:" || kind == "<!" || kind == "<=" || kind.substr(0, 1) == ">";
            if (!is_known) unknown("the group (?" + one_line(std::string(kind)));
        }
        if (c == '[') {
            in_class = true;
            made += c;
            ++at;
            if (at < written.size() && written[at] == '^') made += written[at++];
            if (at < written.size() && written[at] == ']') unknown("a class that begins with ]");
            continue;
        }
        if (c == ']') in_class = false;
        made += c;
        ++at;
    }
    return made;
}

}  // namespace

struct Pattern::Inside {
    std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code;
    std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context;
    std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data;
};

Pattern::Pattern(const std::string& written) {
    const std::string pattern = in_pcre2(written);
    int error = 0;
    PCRE2_SIZE place = 0;
    auto* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP,
                               &error, &place, nullptr);
    if (code == nullptr) {
        std::array<PCRE2_UCHAR, 200> said{};
        pcre2_get_error_message(error, said.data(), said.size());
        throw std::invalid_argument(std::string("a broken pattern: ") + reinterpret_cast<const char*>(said.data()));
    }
    inside_ = std::make_unique<Inside>(Inside{{code, &pcre2_code_free},
                                              {pcre2_match_context_create(nullptr), &pcre2_match_context_free},
                                              {pcre2_match_data_create(1, nullptr), &pcre2_match_data_free}});
    pcre2_set_match_limit(inside_->context.get(), MOST_STEPS);
    pcre2_set_heap_limit(inside_->context.get(), MOST_KIB);
}

Pattern::~Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;

std::vector<std::string_view> Pattern::isolate(std::string_view text) const {
    std::vector<std::string_view> pieces;
    size_t done = 0;
    for (size_t from = 0; from <= text.size();) {
        const int found = pcre2_match(inside_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                      0, inside_->data.get(), inside_->context.get());
        if (found == PCRE2_ERROR_NOMATCH) break;
        if (found < 0) throw std::invalid_argument("the pattern takes too many steps for this text");
        const PCRE2_SIZE* place = pcre2_get_ovector_pointer(inside_->data.get());
        if (place[0] > done) pieces.push_back(text.substr(done, place[0] - done));
        if (place[1] > place[0]) pieces.push_back(text.substr(place[0], place[1] - place[0]));
        done = std::max(done, place[1]);
        from = place[1];
        if (place[1] == place[0]) {  // an empty match: the next one begins a character later
            if (from >= text.size()) break;
            next_character(text, from);
        }
    }
    if (done < text.size()) pieces.push_back(text.substr(done));
    return pieces;
}

std::vector<Cut> cuts_of(const Json& step, bool& is_byte_level) {
    std::vector<Cut> cuts;
    if (step.is_null()) return cuts;
    const std::string type = text_of(step, "type");
    if (type == "Sequence") {
        for (const Json& part : member(step, "pretokenizers")) {
            for (Cut& cut : cuts_of(part, is_byte_level)) cuts.push_back(std::move(cut));
        }
    } else if (type == "ByteLevel" && !is_byte_level) {
        is_byte_level = true;
        const bool by_itself = step.value("use_regex", Json(true)) != Json(false);
        cuts.push_back(
            {by_itself ? std::make_unique<Pattern>(GPT2) : nullptr, member(step, "add_prefix_space") == Json(true)});
    } else if (type == "Split" && !is_byte_level) {
        if (text_of(step, "behavior") != "Isolated" || step.value("invert", Json(false)) != Json(false)) {
            unknown("a Split that is not Isolated");
        }
        cuts.push_back({std::make_unique<Pattern>(text_of(member(step, "pattern"), "Regex")), false});
    } else {
        unknown("the pre_tokenizer " + in_quotes(type));
    }
    return cuts;
}

}  // namespace dreamedge
