#include "defaults.h"

#include <stdexcept>

#include "errors.h"
#include "json.h"

namespace dreamedge {
namespace {

constexpr const char* OWN[] = {"steps", "alg", "temperature", "top_p", "top_k", "alg_temp", "eps", "cache"};

std::map<std::string, std::string> found_in(const std::filesystem::path& file) {
    const Json content = parse_json(read_file(file, MAX_JSON));
    if (!content.is_object()) throw std::invalid_argument("not a JSON object");
    std::map<std::string, std::string> found;
    for (const std::string name : OWN) {
        if (!content.contains(name) || content[name].is_null()) continue;
        const Json& value = content[name];
        const bool is_word = name == "alg" || name == "cache";
        if (is_word ? !value.is_string() : !value.is_number()) {
            throw std::invalid_argument(name + " " + value.dump() + ": must be a " + (is_word ? "text" : "number"));
        }
        found[name] = value.is_string() ? value.get<std::string>() : value.dump();
    }
    const auto steps = Arguments(found).whole("steps");
    if (steps && *steps < 1) throw std::invalid_argument("steps " + found["steps"] + ": must be at least 1");
    auto checked = found;
    if (checked["cache"] == "d2f" || checked["cache"].empty()) checked.erase("cache");  // which may be overridden
    options_of(Arguments(checked), 1).check();
    return found;
}

}  // namespace

std::map<std::string, std::string> own_defaults(const std::filesystem::path& folder, const Arguments& given) {
    const std::filesystem::path file = folder / "generation_config.json";
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(file, ignored)) return {};
    std::map<std::string, std::string> found;
    try {
        found = found_in(file);
    } catch (const std::invalid_argument& error) {
        artifact_error(file.string() + ": " + error.what());
    } catch (const Error& error) {
        artifact_error(file.string() + ": " + error.what());
    }
    // What Dream's class holds where nobody chose: random order.
    if (found["alg"] == "origin" || found["alg"].empty()) found.erase("alg");
    // A rule says how many tokens a step writes, which a number of steps would limit.
    if (given.text("threshold") || given.text("gamma") || given.text("entropy_threshold")) found.erase("steps");
    return found;
}

}  // namespace dreamedge
