#include "arguments.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "errors.h"

namespace dreamedge {

const char* const HELP = R"(Run an artifact of DreamEdge without Python. The answer goes to stdout, all else to stderr.

usage: dreamedge-run artifact=DIR [prompt=TEXT | prompts=FILE] [key=value ...]
       dreamedge-run --self-test artifact=DIR [--json]

keys, as `python -m pipeline generate` has them; null is the same as not to give one:
  artifact         an artifact folder
  prompt           the text; else it is read from stdin
  prompts          a file of JSON lines, each with a "prompt"; - for stdin
  max_new_tokens   by default what the task of the artifact's validation takes; with ids there is no default
  steps alg temperature top_p top_k alg_temp eps block_length cache threshold seed stop_at_eos alpha relaxed_threshold
  radius kl_threshold gamma entropy_threshold suffix_window eos_penalty min_new_tokens no_repeat_ngram_size
                   of writing: docs/generation.md; cache is none, prefix or dual; what the checkpoint's own
                   generation_config.json sets counts for a prompt where nothing is given
  threads          of the runtime; else one for each processor that it may use
  packed_cache     a folder that keeps what the runtime packs of the weights, and opens the program faster with it
and of this command alone:
  ids              token ids in place of a prompt, such as 11,205,7 (rows of a batch with ; between); the answer is
                   ids too, and the artifact may be a .pte alone
  load             mmap: pages of the program as they are read (default); file: all of it in memory
  memory           MiB that this process may take for data; what needs more ends with exit code 8

switches:
  --self-test      the recorded calls on this device, judged by the artifact's own bounds: exit code 0 or 6
  --json           of --self-test: one object in place of lines
  --stream         the answer as it is written: a JSON line after each step, and the last with the answer
  --history        of ids: the tokens before the first step and after each, as one JSON object
  --processor      its features, and whether it multiplies integers right, as one JSON object
  --help, --version

exit codes: 0 done, 2 a wrong key, value or prompt, 6 a damaged artifact or a figure out of its bounds, 7 output that
cannot be written, 8 too little memory, 1 an internal error
)";

namespace {

const std::vector<std::string> KEYS{"artifact",
                                    "prompt",
                                    "prompts",
                                    "ids",
                                    "max_new_tokens",
                                    "steps",
                                    "alg",
                                    "temperature",
                                    "top_p",
                                    "top_k",
                                    "alg_temp",
                                    "eps",
                                    "block_length",
                                    "cache",
                                    "threshold",
                                    "seed",
                                    "stop_at_eos",
                                    "threads",
                                    "load",
                                    "memory",
                                    "packed_cache",
                                    "alpha",
                                    "relaxed_threshold",
                                    "radius",
                                    "kl_threshold",
                                    "gamma",
                                    "entropy_threshold",
                                    "suffix_window",
                                    "eos_penalty",
                                    "min_new_tokens",
                                    "no_repeat_ngram_size"};
const std::vector<std::string> SWITCHES{"--self-test", "--json", "--stream", "--history",
                                        "--processor", "--help", "--version"};

// Keys that Python has and this command has not, and why.
const std::map<std::string, std::string> OF_PYTHON{
    {"stop", "texts that end an answer are of Python alone: cut it where it is used"},
    {"chat", "chat templates are of Python alone: give a prompt that is rendered"},
};

size_t distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t changed = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
        }
    }
    return row[b.size()];
}

}  // namespace

std::string nearest(const std::string& word, const std::vector<std::string>& words) {
    const auto closest = std::min_element(words.begin(), words.end(), [&](const auto& a, const auto& b) {
        return distance(word, a) < distance(word, b);
    });
    const bool is_near =
        word.size() <= 100 && closest != words.end() && distance(word, *closest) <= word.size() / 3 + 1;
    return is_near ? "; did you mean '" + *closest + "'?" : "";
}

Arguments::Arguments(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument.rfind("--", 0) == 0) {
            if (std::find(SWITCHES.begin(), SWITCHES.end(), argument) == SWITCHES.end()) {
                usage_error("no switch " + in_quotes(argument) + nearest(argument.substr(0, 100), SWITCHES));
            }
            switches_[argument] = "";
            continue;
        }
        const size_t equal = argument.find('=');
        if (equal == std::string::npos) usage_error(in_quotes(argument) + " is no key=value; --help shows the keys");
        const std::string key = argument.substr(0, equal);
        if (const auto why = OF_PYTHON.find(key); why != OF_PYTHON.end()) usage_error(key + ": " + why->second);
        if (std::find(KEYS.begin(), KEYS.end(), key) == KEYS.end()) {
            usage_error("no key " + in_quotes(key) + nearest(key.substr(0, 100), KEYS));
        }
        if (const std::string value = argument.substr(equal + 1); value != "null" || key == "prompt") {
            values_[key] = value;
        } else {
            values_.erase(key);
        }
    }
}

std::optional<std::string> Arguments::text(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? std::nullopt : std::optional(found->second);
}

std::optional<int64_t> Arguments::whole(const std::string& key) const {
    const auto given = text(key);
    if (!given) return std::nullopt;
    int64_t value = 0;
    const auto [end, error] = std::from_chars(given->data(), given->data() + given->size(), value);
    if (error != std::errc() || end != given->data() + given->size()) {
        usage_error(key + " " + in_quotes(*given) + ": must be a whole number");
    }
    return value;
}

std::optional<double> Arguments::real(const std::string& key) const {
    const auto given = text(key);
    if (!given) return std::nullopt;
    char* end = nullptr;
    const double value = std::strtod(given->c_str(), &end);
    if (given->empty() || *end != '\0') usage_error(key + " " + in_quotes(*given) + ": must be a number");
    return value;
}

std::optional<bool> Arguments::truth(const std::string& key) const {
    const auto given = text(key);
    if (!given) return std::nullopt;
    if (*given != "true" && *given != "false") usage_error(key + " " + in_quotes(*given) + ": must be true or false");
    return *given == "true";
}

std::string Arguments::needed(const std::string& key) const {
    const auto given = text(key);
    if (!given) usage_error("give " + key + "=; --help shows the keys");
    return *given;
}

Options options_of(const Arguments& arguments, std::optional<int64_t> new_tokens) {
    Options options;
    const auto n = arguments.whole("max_new_tokens");
    if (!n && !new_tokens) usage_error("with ids= give max_new_tokens=");
    options.max_new_tokens = n ? *n : *new_tokens;
    options.steps = arguments.whole("steps");
    options.alg = arguments.text("alg").value_or(options.alg);
    options.temperature = arguments.real("temperature").value_or(options.temperature);
    options.top_p = arguments.real("top_p");
    options.top_k = arguments.whole("top_k");
    options.alg_temp = arguments.real("alg_temp");
    options.eps = arguments.real("eps").value_or(options.eps);
    options.block_length = arguments.whole("block_length");
    options.cache = arguments.text("cache");
    if (options.cache == "none") options.cache = std::nullopt;
    options.threshold = arguments.real("threshold");
    options.alpha = arguments.real("alpha");
    options.relaxed_threshold = arguments.real("relaxed_threshold");
    options.radius = arguments.whole("radius").value_or(options.radius);
    options.kl_threshold = arguments.real("kl_threshold");
    options.gamma = arguments.real("gamma");
    options.entropy_threshold = arguments.real("entropy_threshold");
    options.suffix_window = arguments.whole("suffix_window");
    options.eos_penalty = arguments.real("eos_penalty").value_or(options.eos_penalty);
    options.min_new_tokens = arguments.whole("min_new_tokens").value_or(options.min_new_tokens);
    options.no_repeat_ngram_size = arguments.whole("no_repeat_ngram_size");
    options.seed = arguments.whole("seed");
    options.stop_at_eos = arguments.truth("stop_at_eos").value_or(true);
    return options;
}

}  // namespace dreamedge
