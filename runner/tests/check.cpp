// What the tests ask of the parts that need no program. Built with sanitizers: an input that breaks them ends it.
//
//   dreamedge-check files KIND        stdin: paths, one a line; for each a line `taken`, or `refused: why`
//   dreamedge-check tokenizer FILE    stdin: a JSON text or list of ids a line; for each a line with ids or texts
//   dreamedge-check schedule          stdin: [masks, steps, eps] a line; for each how many tokens each step writes
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>

#include "artifact.h"
#include "delegates.h"
#include "errors.h"
#include "generation.h"
#include "json.h"
#include "reference.h"
#include "tokenizer.h"

namespace dreamedge {
namespace {

const char* const TEXT = "1003\n0300 <|mask|> aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! 数独\n";

void use(const std::string& kind, const std::filesystem::path& file) {
    if (kind == "reference") {
        const Reference reference = Reference::load(file);
        for (const Sequence& sequence : reference.sequences) {
            for (const Call& call : sequence.calls) reference.eager(call);
        }
    } else if (kind == "tokenizer") {
        const Tokenizer tokenizer = Tokenizer::load(file);
        tokenizer.decode(tokenizer.encode(TEXT), false);
    } else if (kind == "program") {
        std::ifstream opened(file, std::ios::binary);
        const std::string content(std::istreambuf_iterator<char>(opened), {});
        try {
            if (const std::string why = why_not_kept(content); !why.empty()) usage_error(why);
            identity(content, "");
        } catch (const std::invalid_argument& error) {
            artifact_error(error.what());
        }
    } else if (kind == "artifact") {
        read_manifest(file.parent_path());
    } else {
        usage_error("no kind " + kind);
    }
}

void files(const std::string& kind) {
    for (std::string path; std::getline(std::cin, path);) {
        try {
            use(kind, path);
            std::cout << "taken" << std::endl;
        } catch (const Error& error) {
            std::cout << "refused: " << one_line(error.what()) << std::endl;
        }
    }
}

void tokenizer(const std::filesystem::path& file) {
    const Tokenizer tokenizer = Tokenizer::load(file);
    for (std::string line; std::getline(std::cin, line);) {
        Json said;
        try {
            const Json asked = parse_json(line);
            if (asked.is_string()) {
                said = tokenizer.encode(asked.get<std::string>());
            } else {
                const auto ids = asked.get<std::vector<int64_t>>();
                said = {tokenizer.decode(ids, false), tokenizer.decode(ids, true)};
            }
        } catch (const Error& error) {
            said = {{"error", error.what()}, {"code", static_cast<int>(error.code)}};
        }
        std::cout << said.dump() << std::endl;
    }
}

void schedule() {
    for (std::string line; std::getline(std::cin, line);) {
        const Json asked = parse_json(line);
        const auto masks = asked[0].get<int64_t>();
        std::vector<float> logits;
        const Forward forward = [&](const Tokens&, int64_t, int64_t, const Tokens& rows) -> Logits {
            logits.assign(8 * rows.size(), 0);
            for (size_t k = 0; k < rows.size(); ++k) logits[8 * k + static_cast<size_t>(rows[k]) % 7] = 1;
            return {logits.data(), static_cast<int64_t>(rows.size()), 8};
        };
        const Network network{masks + 1, masks + 1, 8, 7, 0, {1}, 4, [&] { return forward; }};
        Options options;
        options.max_new_tokens = masks, options.steps = asked[1].get<int64_t>(), options.eps = asked[2].get<double>();
        options.alg = "maskgit_plus";
        const Generation written = generate(network, {{1}}, options, nullptr, true);
        Json counts = Json::array();
        std::ptrdiff_t left = masks;
        for (const Tokens& tokens : written.history[0]) {
            const auto now = std::count(tokens.begin(), tokens.end(), 7);
            counts.push_back(left - now);
            left = now;
        }
        counts.erase(0);
        std::cout << counts.dump() << std::endl;
    }
}

}  // namespace
}  // namespace dreamedge

int main(int argc, char** argv) {
    const std::string command = argc > 1 ? argv[1] : "";
    try {
        if (command == "files" && argc == 3) {
            dreamedge::files(argv[2]);
        } else if (command == "tokenizer" && argc == 3) {
            dreamedge::tokenizer(argv[2]);
        } else if (command == "schedule" && argc == 2) {
            dreamedge::schedule();
        } else {
            dreamedge::usage_error("files KIND, tokenizer FILE, or schedule");
        }
    } catch (const dreamedge::Error& error) {
        std::cerr << "error: " << dreamedge::one_line(error.what()) << "\n";
        return static_cast<int>(error.code);
    }
    return 0;
}
