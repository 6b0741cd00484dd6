#include "answers.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>

#include "artifact.h"
#include "defaults.h"
#include "errors.h"
#include "generation.h"
#include "json.h"
#include "memory.h"
#include "text.h"
#include "threads.h"
#include "unicode.h"

namespace dreamedge {
namespace {

constexpr size_t LONGEST_LINE = 1 << 24;

Json took_json(const Generation& written) {
    return {{"new_tokens", written.answers[0].size()},
            {"forward_calls", written.forward_calls},
            {"positions", written.positions},
            {"seconds", written.seconds}};
}

// Raises no error for text that is not UTF-8: what an artifact's tokens give always is.
void say(const Json& line) { std::cout << line.dump() << std::endl; }

struct Answer {
    std::string text;
    Generation generation;
};

Answer answer(TextArtifact& artifact, const Options& options, const std::string& prompt, bool streams) {
    const Tokens ids = artifact.tokenizer.encode(prompt);
    const int64_t mask_id = artifact.program.metadata().get_mask_id;
    // A prompt with masks in it is shown as it was filled, the answer after it.
    const bool has_masks = std::find(ids.begin(), ids.end(), mask_id) != ids.end();
    const auto shown = static_cast<std::ptrdiff_t>(has_masks ? 0 : ids.size());
    const OnStep on_step = [&](int64_t step, const std::vector<Tokens>& rows) {
        const Tokens seen(rows[0].begin() + shown, rows[0].end());
        say({{"step", step + 1},
             {"masks_left", std::count(rows[0].begin(), rows[0].end(), mask_id)},
             {"text", partial_text(artifact, seen)}});
    };
    Answer given{"", generate(artifact.program.network(), {ids}, options, streams ? on_step : OnStep())};
    const Tokens& row = given.generation.tokens[0];
    Tokens written(row.begin() + shown, row.begin() + static_cast<std::ptrdiff_t>(ids.size()));
    written.insert(written.end(), given.generation.answers[0].begin(), given.generation.answers[0].end());
    given.text = artifact.tokenizer.decode(written);
    return given;
}

TextArtifact opened(const Arguments& arguments, const Loading& loading) {
    TextArtifact artifact = TextArtifact::open(arguments.needed("artifact"), loading, arguments.whole("threads"));
    if (artifact.warning) std::cerr << "warning: " << one_line(*artifact.warning) << "\n";
    return artifact;
}

// The prompt of a line.
std::string parsed(const std::string& line) {
    if (line.size() > LONGEST_LINE) usage_error("longer than " + std::to_string(LONGEST_LINE) + " bytes");
    Json entry;
    try {
        entry = parse_json(line);
    } catch (const std::invalid_argument& error) {
        usage_error(error.what());
    }
    if (entry.is_object() && entry.contains("messages")) {
        usage_error("messages take the chat template, which is of Python alone: give a prompt that is rendered");
    }
    for (const auto& [key, value] : entry.is_object() ? entry.items() : Json::object().items()) {
        if (key != "prompt") usage_error("no key " + in_quotes(key) + " in a line; it has a prompt");
    }
    if (!entry.is_object() || !entry.contains("prompt") || !entry["prompt"].is_string()) {
        usage_error("expected a JSON object with a \"prompt\" (text)");
    }
    return entry["prompt"].get<std::string>();
}

std::vector<Tokens> rows_of(const std::string& text) {
    std::vector<Tokens> rows(1);
    std::string word;
    for (const char c : text + ";") {
        if (c != ',' && c != ';') {
            word += c;
            continue;
        }
        try {
            size_t n = 0;
            if (!word.empty() || c == ',') rows.back().push_back(std::stoll(word, &n));
            if (n != word.size()) throw std::invalid_argument(word);
        } catch (const std::exception&) {
            usage_error("ids " + in_quotes(word) + ": must be token ids such as 11,205,7, rows of them with ; between");
        }
        word.clear();
        if (c == ';') rows.emplace_back();
    }
    rows.pop_back();
    return rows;
}

std::string said_of(const Tokens& ids) {
    std::string text;
    for (const int64_t id : ids) text += (text.empty() ? "" : ",") + std::to_string(id);
    return text;
}

// What is asked, and what the checkpoint's own file sets where nothing is.
Options asked_of(Arguments arguments, const TextArtifact& artifact) {
    const auto own = own_defaults(artifact.folder, arguments);
    std::string said;
    for (const auto& [name, value] : own) {
        if (!arguments.text(name)) said += " " + name + "=" + value;
    }
    if (!said.empty()) std::cerr << "the checkpoint's own:" << one_line(said) << " (generation_config.json)\n";
    arguments.add_defaults(own);
    return options_of(arguments, artifact.new_tokens);
}

}  // namespace

void answer_prompt(const Arguments& arguments, const Loading& loading) {
    TextArtifact artifact = opened(arguments, loading);
    std::string prompt = arguments.text("prompt").value_or("");
    if (!arguments.text("prompt")) prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
    const bool streams = arguments.is_on("--stream");
    const Answer given = answer(artifact, asked_of(arguments, artifact), prompt, streams);
    if (streams) {
        Json last = took_json(given.generation);
        last["answer"] = given.text;
        say(last);
        return;
    }
    std::cout << given.text << std::endl;
    const Generation& written = given.generation;
    const auto n = written.answers[0].size();
    std::fprintf(
        stderr, "%zu tokens in %.2f s: %.1f tokens/s, %lld forward calls over %lld positions, peak memory %.1f MiB\n",
        n, written.seconds, static_cast<double>(n) / written.seconds, static_cast<long long>(written.forward_calls),
        static_cast<long long>(written.positions), static_cast<double>(peak_rss()) / 0x1p20);
}

void answer_lines(const Arguments& arguments, const Loading& loading) {
    if (arguments.text("prompt")) usage_error("prompt and prompts: give one of them");
    const std::string name = arguments.needed("prompts");
    TextArtifact artifact = opened(arguments, loading);
    const Options options = asked_of(arguments, artifact);
    std::ifstream file;
    if (name != "-") {
        file.open(name);
        std::error_code ignored;
        if (!file || std::filesystem::is_directory(name, ignored)) usage_error("prompts: " + name + " cannot be read");
    }
    std::istream& lines = name == "-" ? std::cin : file;
    const std::string shown = name == "-" ? "stdin" : name;
    int64_t number = 0, n = 0, n_failed = 0;
    for (std::string line; std::getline(lines, line);) {
        ++number;
        if (number == 1 && line.rfind("\xef\xbb\xbf", 0) == 0) line.erase(0, 3);
        if (line.find_first_not_of(" \t\r\n\v\f") == std::string::npos) continue;
        ++n;
        try {
            const Answer given = answer(artifact, options, parsed(line), false);
            Json said = took_json(given.generation);
            said["line"] = number, said["answer"] = given.text;
            say(said);
        } catch (const Error& error) {
            if (error.code != Exit::usage) throw;
            ++n_failed;
            std::cerr << "error: " << one_line(shown + ", line " + std::to_string(number) + ": " + error.what())
                      << "\n";
            say({{"line", number}, {"error", with_replacements(error.what())}});
        }
    }
    if (n == 0) usage_error(shown + ": holds no line");
    if (n_failed > 0) {
        usage_error(shown + ": " + std::to_string(n_failed) + " of " + std::to_string(n) + " lines were not answered");
    }
}

void answer_ids(const Arguments& arguments, const Loading& loading) {
    if (arguments.text("prompt") || arguments.text("prompts")) usage_error("ids, prompt and prompts: give one of them");
    const std::vector<Tokens> rows = rows_of(arguments.needed("ids"));
    const bool has_history = arguments.is_on("--history");
    const Options options = options_of(arguments, std::nullopt);
    use_threads(arguments.whole("threads"));
    Program program = Program::open(arguments.needed("artifact"), loading);
    const Generation written = generate(program.network(), rows, options, OnStep(), has_history);
    if (has_history) {
        Json said = took_json(written);
        said["answers"] = written.answers, said["tokens"] = written.tokens, said["history"] = written.history;
        say(said);
        return;
    }
    for (const Tokens& one : written.answers) std::cout << said_of(one) << "\n";
}

}  // namespace dreamedge
