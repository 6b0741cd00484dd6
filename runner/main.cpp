// dreamedge-run: the command. What a user causes ends in one line on stderr and a documented exit code.
#include <csignal>
#include <iostream>

#include "answers.h"
#include "arguments.h"
#include "errors.h"
#include "json.h"
#include "limits.h"
#include "processor.h"
#include "self_test.h"

namespace dreamedge {
namespace {

Loading loading_of(const Arguments& arguments) {
    const std::string load = arguments.text("load").value_or("mmap");
    if (load != "mmap" && load != "file") usage_error("load " + in_quotes(load) + ": there are mmap, file");
    return {load == "mmap" ? Load::mmap : Load::file, arguments.text("packed_cache")};
}

void limit(const Arguments& arguments) {
    const auto mib = arguments.whole("memory");
    if (mib && (*mib < 1 || *mib > INT64_MAX >> 20))
        usage_error("memory " + std::to_string(*mib) + ": are MiB, 1 or more");
    if (mib) limit_memory(*mib << 20);
}

void run(const Arguments& arguments) {
    if (arguments.is_on("--help")) {
        std::cout << HELP;
        return;
    }
    if (arguments.is_on("--version")) {
        std::cout << "dreamedge-run of contract version " << CONTRACT_VERSION << ", executorch " << EXECUTORCH_VERSION
                  << "\n";
        return;
    }
    if (arguments.is_on("--processor")) {
        std::cout << Json{{"features", features()}, {"multiplies_right", multiplies_right()}}.dump() << "\n";
        return;
    }
    const std::string artifact = arguments.needed("artifact");
    const auto packed = arguments.text("packed_cache");
    end_in_words(packed ? artifact + " with the packed weights in " + *packed + " (delete them to pack anew)"
                        : artifact);
    limit(arguments);
    const Loading loading = loading_of(arguments);
    if (arguments.is_on("--self-test")) {
        if (loading.packed_cache) usage_error("packed_cache: --self-test packs the weights anew, it judges them");
        self_test(artifact, arguments.is_on("--json"), loading.how, arguments.whole("threads"));
        return;
    }
    if (arguments.is_on("--json")) usage_error("--json is of --self-test");
    if (arguments.is_on("--history") && !arguments.text("ids")) usage_error("--history is of ids=");
    if (arguments.is_on("--stream") && (arguments.text("ids") || arguments.text("prompts"))) {
        usage_error("--stream is of one prompt");
    }
    (arguments.text("ids") ? answer_ids : arguments.text("prompts") ? answer_lines : answer_prompt)(arguments, loading);
}

int exit_code(int argc, char** argv) {
    const auto ends = [](const std::string& message, Exit code) {
        std::cout.flush();
        if (!message.empty()) std::cerr << "error: " << one_line(message) << "\n";
        return static_cast<int>(code);
    };
    try {
        run(Arguments(argc, argv));
        std::cout.flush();
        return std::cout ? 0 : ends("stdout cannot be written", Exit::output);
    } catch (const Error& error) {
        return ends(error.what(), error.code);
    } catch (const std::exception& error) {
        return ends(std::string("internal: ") + error.what(), Exit::internal);
    }
}

}  // namespace
}  // namespace dreamedge

int main(int argc, char** argv) {
    std::signal(SIGPIPE, SIG_IGN);  // a closed stdout is told by the exit code
    return dreamedge::exit_code(argc, argv);
}
