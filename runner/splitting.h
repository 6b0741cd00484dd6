// How a text is cut into words before they are merged into tokens: the `pre_tokenizer` of a tokenizer.json.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace dreamedge {

// A regular expression that was written for Oniguruma, in PCRE2: as far as both mean the same by it.
class Pattern {
  public:
    // Throws `std::invalid_argument` for one that is broken, or that the two would read differently.
    explicit Pattern(const std::string& written);
    ~Pattern();
    Pattern(Pattern&&) noexcept;

    // Its matches and what is between them, in order: together the text. Throws `std::invalid_argument` for a text that
    // takes it more than ten million steps.
    std::vector<std::string_view> isolate(std::string_view text) const;

  private:
    struct Inside;
    std::unique_ptr<Inside> inside_;
};

// One step of cutting. A pattern, or none, and then whether each piece is brought to begin with a space.
struct Cut {
    std::unique_ptr<Pattern> pattern;
    bool adds_prefix_space;
};

// Of the kinds `Split` (Isolated), `ByteLevel` and `Sequence`. is_byte_level: whether there was a `ByteLevel`.
// Throws `std::invalid_argument` for others.
std::vector<Cut> cuts_of(const Json& pre_tokenizer, bool& is_byte_level);

}  // namespace dreamedge
