// The command line: keys and values as `python -m pipeline generate` has them, and a few switches.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "options.h"

namespace dreamedge {

extern const char* const HELP;

class Arguments {
  public:
    // Throws `Error` (Exit::usage) for a key or switch that does not exist, with the nearest that does.
    Arguments(int argc, char** argv);
    explicit Arguments(std::map<std::string, std::string> values) : values_(std::move(values)) {}

    bool is_on(const std::string& a_switch) const { return switches_.count(a_switch) > 0; }

    // Nothing where the key is not given, or is `null`. Throws `Error` (Exit::usage) for a value of another type.
    std::optional<std::string> text(const std::string& key) const;
    std::optional<int64_t> whole(const std::string& key) const;
    std::optional<double> real(const std::string& key) const;
    std::optional<bool> truth(const std::string& key) const;

    // Of a key that must be given.
    std::string needed(const std::string& key) const;

    // These, where nothing else is given.
    void add_defaults(const std::map<std::string, std::string>& values) {
        values_.insert(values.begin(), values.end());
    }

  private:
    std::map<std::string, std::string> values_, switches_;
};

// Those of writing. new_tokens: where max_new_tokens is not given. Throws `Error` (Exit::usage).
Options options_of(const Arguments& arguments, std::optional<int64_t> new_tokens);

// `; did you mean 'word'?`, or nothing where no word is near.
std::string nearest(const std::string& word, const std::vector<std::string>& words);

}  // namespace dreamedge
